"""What the processes of test_search.py run: apart from it, so that they need not import all of it."""

import torch

from reidlab.data.loaders import open_data
from reidlab.nas.halves import Circle
from reidlab.nas.search import half_loaders, weight_plan
from reidlab.nas.strategies import search_model, search_trainer
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
        model = search_model(recipe, data.n_pids).double()
        trainer = search_trainer(recipe, model, weight_plan(recipe), other, device, data.n_pids)
        trainer.begin(0)
        batches = Circle(loader)
        for _ in range(4):
            trainer.step(batches.next())
        torch.save(trainer.model.state_dict(), folder / f"{name}{rank()}.pt")
