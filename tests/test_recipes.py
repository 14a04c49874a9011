"""Every recipe says what it is, is complete, and can be trained: networks, losses and branches fit."""

import json

import pytest
import torch

from reidlab.core.recipe import load_recipe, recipe_card, recipe_names
from reidlab.core.seed import seed_all
from reidlab.core.settings import project_root
from reidlab.data.loaders import Batch
from reidlab.training.network import build_network, loss_from_recipe
from reidlab.training.step import Trainer

FOLDER = project_root() / "recipes"
NAMES = recipe_names(FOLDER)
BARE = {"model.backbone.*.weights": "", "train.distill": "none"}  # what lies elsewhere
PEOPLE = 4


def bare(name, **more):
    return load_recipe(name, folder=FOLDER, overrides=BARE | more)


def distinct():
    "One recipe for each architecture, size of photos and loss: height by name."
    found = {}
    for name in NAMES:
        r = bare(name)
        if r.data.task == "reid" and not r.model.genotype.startswith("run:"):
            sizes = r.data.height, r.data.width
            said = r.model.model_dump(), sizes, r.loss
            found.setdefault(json.dumps(said, default=str), (name, r.data.height))
    return dict(sorted(found.values()))


DISTINCT = distinct()
SMALL = [name for name, height in DISTINCT.items() if height <= 64]


def test_every_file_says_what_it_is_what_it_should_reach_and_what_it_costs():
    for path in FOLDER.rglob("*.yaml"):
        card = recipe_card(path.relative_to(FOLDER).with_suffix("").as_posix(), folder=FOLDER)
        assert all(card[key] for key in ("what", "paper", "should reach", "costs")), path.name


@pytest.mark.parametrize("name", DISTINCT)
def test_the_loss_finds_its_branches(name):
    loss_from_recipe(bare(name), PEOPLE)  # built without memory, the loss tried on made-up photos


def one_step(name):
    recipe = bare(name, **{"train.precision": "fp32"})
    seed_all(0)
    model = build_network(recipe, PEOPLE)
    trainer = Trainer(model, loss_from_recipe(recipe, PEOPLE), recipe.train)
    trainer.begin(recipe.train.freeze_epochs)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e-3
    images = torch.randn(4, 3, recipe.data.height, recipe.data.width)
    pids = torch.tensor([0, 0, 1, 1])
    values = trainer.step(Batch(images, pids, pids * 0, torch.arange(4)))
    after = dict(model.named_parameters())
    assert all(value.isfinite().all() for value in values.values())
    assert all(p.isfinite().all() for p in after.values())
    assert any(not torch.equal(before[n], p) for n, p in after.items())


@pytest.mark.parametrize("name", SMALL)
def test_a_step_of_a_small_recipe(name):
    one_step(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in DISTINCT if n not in SMALL])
def test_a_step_of_a_large_recipe(name):
    one_step(name)
