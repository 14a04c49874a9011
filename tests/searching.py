"""What the processes of test_search.py and test_layers.py run: apart, so that they need not import all of it."""

from contextlib import contextmanager

import torch

from reidlab.data.loaders import open_data
from reidlab.nas.cdnet_space import LAYER_SPACES
from reidlab.nas.search import weight_plan
from reidlab.nas.split import Circle, half_loaders
from reidlab.nas.strategies import search_model, search_trainer
from reidlab.training.distributed import process_rank


class Doubled:
    "A loader's batches in double precision."

    def __init__(self, loader):
        self.loader, self.batch_sampler = loader, loader.batch_sampler

    def __iter__(self):
        return (batch._replace(images=batch.images.double()) for batch in self.loader)


@contextmanager
def three_candidates():
    "Within the block a search of space cnet offers three layers a place, so that two still leave one out."
    whole = LAYER_SPACES["cnet"]
    LAYER_SPACES["cnet"] = whole._replace(candidates=whole.candidates[:3])
    try:
        yield
    finally:
        LAYER_SPACES["cnet"] = whole


def two_steps(recipes, folder, data_dir, device):
    """Alphas and weights after two alternating steps of each recipe, a file a process: the second step
    reads what the optimisers kept of the first."""
    for name, recipe in recipes.items():
        data = open_data(recipe.data, recipe.seed, data_dir)
        loader, other = map(Doubled, half_loaders(data.train, recipe))
        model = search_model(recipe, data.n_pids).double()
        trainer = search_trainer(recipe, model, weight_plan(recipe), other, device, data.n_pids)
        trainer.begin(0)
        batches = Circle(loader)
        for _ in range(2):
            trainer.step(batches.next())
        torch.save(trainer.model.state_dict(), folder / f"{name}{process_rank()}.pt")


def two_steps_of_three(recipes, folder, data_dir, device):
    "The same where three candidates are on offer."
    with three_candidates():
        two_steps(recipes, folder, data_dir, device)
