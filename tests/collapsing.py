"""Small searches that go well, and small searches that are driven to collapse: what test_health.py runs.

Every search is a real one: a supernet of one normal cell with three nodes and the seven ops of the
re-ID space, the trainer of the book, twenty epochs of six alternating steps on drawn patterns. Two
kinds go well, and two are driven to the two ways in which a search collapses:

sound     all ops as they are, photos that are new each time, a head start for the weights
planted   likewise, but only sep_conv_3x3 gives anything but zeros: there is something to find
few       the weights see one batch over and over, and no head start: they learn it by heart, the
          alphas see other photos, and `none` takes over
hollow    only the ops without parameters give anything but zeros: the cell fills with them
"""

from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pandas as pd
import torch
import torch.nn.functional as F
from searching import Doubled

from reidlab.core.recipe import Model, Recipe, Search
from reidlab.core.run import write_json
from reidlab.data.loaders import Batch, open_data
from reidlab.losses.catalogue import weighted_sum
from reidlab.models.blocks import Zero
from reidlab.models.ops import PARAMETER_FREE
from reidlab.nas.curvature import alpha_sharpness
from reidlab.nas.darts import SearchTrainer
from reidlab.nas.derive import derive
from reidlab.nas.health import health
from reidlab.nas.search import weight_plan
from reidlab.nas.split import half_loaders
from reidlab.nas.supernet import supernet_from_recipe
from reidlab.training.distributed import process_rank

N_PIDS, EPOCHS, STEPS, WARMUP = 8, 20, 6, 4
PROBLEMS = {  # which ops work (None: all, as they are), epochs of head start, one batch for the weights
    "sound": (None, WARMUP, False),
    "planted": (("sep_conv_3x3",), WARMUP, False),
    "few": (None, 0, True),
    "hollow": (PARAMETER_FREE, WARMUP, False),
}
DRIVEN = ("few", "hollow")


class Drawn:
    "Batches of four people, each a pattern of their own under noise that is new each time."

    def __init__(self, seed, part, few=False):
        self.random = torch.Generator().manual_seed(10 * seed + part)
        patterns = torch.Generator().manual_seed(10 * seed)
        self.people = torch.randn(N_PIDS, 3, 4, 2, generator=patterns)
        self.few, self.kept = few, None
        self.batch_sampler = SimpleNamespace(set_epoch=lambda *place: None)

    def batch(self):
        if self.kept is None or not self.few:
            pids = torch.randperm(N_PIDS, generator=self.random)[:4].repeat_interleave(4)
            images = F.interpolate(self.people[pids], size=(32, 16))
            images = images + torch.randn(images.shape, generator=self.random)
            self.kept = Batch(images, pids, torch.zeros_like(pids), torch.arange(len(pids)))
        return self.kept

    def __iter__(self):
        return (self.batch() for _ in range(STEPS))


def trainer_of(problem, seed):
    "The trainer of a problem, its supernet as the problem wants it."
    works, warmup, _ = PROBLEMS[problem]
    recipe = Recipe(
        seed=seed,
        model=Model(neck="none"),
        search=Search(
            space={
                "reid": {
                    "stem": "conv3x2",
                    "last_stride": 2,
                    "init_channels": 6,
                    "nodes": 3,
                    "cells_per_stage": (1,),
                }
            },
            epochs=EPOCHS,
            warmup=warmup,
            optimizer={"sgd": {"lr": 0.05, "weight_decay": 5e-5}},
            schedule={"cosine": {"lr_min": 0.05}},
            alpha_lr=0.05,
            loss={
                "softmax": {"weight": 0.5, "smoothing": 0.0},
                "triplet": {"weight": 0.5, "margin": "soft"},
            },
        ),
    )
    model = supernet_from_recipe(recipe, N_PIDS)
    for cell in model.backbone.stack.cells if works else ():
        for edge in cell.edges:
            for op in set(edge.ops) - set(works):
                edge.ops[op] = Zero(1)
    loss, plan = weighted_sum(recipe.search.loss), weight_plan(recipe)
    return SearchTrainer(model, loss, plan, recipe.search, Drawn(seed, 2))


def answer(net):
    "The genotype of the present alphas, with them."
    alphas = {
        kind: a.detach().tolist() for kind, a in zip(("normal", "reduce"), net.alphas, strict=True)
    }
    found = derive(net.alpha_normal, net.alpha_reduce, net.space)
    return replace(found, about={"alphas": alphas})


def searched(problem, seed, epochs=EPOCHS, curvature=False):
    "The history of a search: its figures of health after every epoch."
    trainer, records = trainer_of(problem, seed), []
    watched = list(islice(Drawn(seed, 3), 2))
    batches, was = Drawn(seed, 1, few=PROBLEMS[problem][2]), answer(trainer.net)
    for epoch in range(epochs):
        trainer.begin(epoch)
        for batch in batches:
            trainer.step(batch)
        now = answer(trainer.net)
        bend = alpha_sharpness(trainer, watched, steps=5) if curvature else {}
        records.append({"epoch": epoch + 1, "epochs": EPOCHS, **health(now, was), **bend})
        was = now
    return pd.DataFrame(records)


def bends(recipe, folder, data_dir, device):
    "The curvature and noise of a supernet's alphas in double precision, a file a process."
    data = open_data(recipe.data, recipe.seed, data_dir)
    _, other = half_loaders(data.train, recipe)
    other.batch_sampler.set_epoch(0, 0)
    watched = list(islice(Doubled(other), 2))
    model = supernet_from_recipe(recipe, data.n_pids).double()
    loss = weighted_sum(recipe.search.loss)
    trainer = SearchTrainer(model, loss, weight_plan(recipe), recipe.search, other, device)
    found = alpha_sharpness(trainer, watched, steps=4)
    write_json(folder / f"{process_rank()}.json", found)
