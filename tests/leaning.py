"What the processes of test_lean.py run: apart from it, so that they need not import all of it."

import torch

from reidlab.data.loaders import Batch
from reidlab.losses.catalogue import weighted_sum
from reidlab.nas.darts import SearchTrainer
from reidlab.nas.lean import use_memory
from reidlab.nas.supernet import supernet_from_recipe
from reidlab.training.distributed import process_rank, world_size
from reidlab.training.step import Trainer


class Same:
    "A loader that gives one batch for ever."

    def __init__(self, batch):
        self.batch, self.batch_sampler = batch, self

    def set_epoch(self, epoch, step):
        pass

    def __iter__(self):
        while True:
            yield self.batch


def mine(batch):
    "This process's share of a batch."
    return Batch(*(part.chunk(world_size())[process_rank()] for part in batch))


def two_steps(recipes, batches, folder, device):
    "A supernet after two alternating steps, by recipe and memory level, a file a process."
    for name, (recipe, memory) in recipes.items():
        model = supernet_from_recipe(recipe, n_pids=4).double()
        use_memory(model, memory, 32, 16, 4)
        one, other = map(mine, batches)
        plan = recipe.train
        trainer = SearchTrainer(
            model, weighted_sum(recipe.search.loss), plan, recipe.search, Same(other), device
        )
        assert isinstance(trainer, Trainer)
        trainer.begin(0)
        for _ in range(2):
            trainer.step(one)
        torch.save(trainer.model.state_dict(), folder / f"{name}{process_rank()}.pt")
