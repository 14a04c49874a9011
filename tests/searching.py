"""What the processes of test_search.py run: apart from it, so that they need not import all of it."""

import torch

from reidlab.data.loaders import open_data
from reidlab.losses.catalogue import weighted_sum
from reidlab.nas.darts import Circle, SearchTrainer
from reidlab.nas.search import half_loaders, weight_plan
from reidlab.nas.supernet import supernet_from_recipe
from reidlab.training.world import rank


class Doubled:
    "A loader's batches in double precision."

    def __init__(self, loader):
        self.loader, self.batch_sampler = loader, loader.batch_sampler

    def __iter__(self):
        return (batch._replace(images=batch.images.double()) for batch in self.loader)


def four_steps(recipes, folder, data_dir, device):
    "Alphas and weights after four alternating steps of each recipe, a file a process."
    for name, recipe in recipes.items():
        data = open_data(recipe.data, recipe.seed, data_dir)
        loader, other = map(Doubled, half_loaders(data.train, recipe))
        model = supernet_from_recipe(recipe, data.n_pids).double()
        loss = weighted_sum(recipe.search.loss)
        trainer = SearchTrainer(model, loss, weight_plan(recipe), recipe.search, other, device)
        trainer.begin(0)
        batches = Circle(loader)
        for _ in range(4):
            trainer.step(batches.next())
        torch.save(trainer.model.state_dict(), folder / f"{name}{rank()}.pt")
