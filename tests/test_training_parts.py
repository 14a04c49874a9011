"""A training builds its network once, counts its cost on that one, and follows its genotype once."""

import pytest
from conftest import tiny_recipe

from reidlab.core.run import open_run
from reidlab.models import genotype as genotypes
from reidlab.models.genotype import random_genotype
from reidlab.models.reid import ReIDModel
from reidlab.training.loop import check_model, fit_from_recipe
from reidlab.training.with_generator import fit_beside_generator

ONE = {"train__epochs": 1, "train__validate_every": 0}
CELLS = {"model__backbone": "derived", "model__init_channels": 6, "model__cells_per_stage": [1, 1]}
DRAWING = {"input_dim": 256, "mode": "adversarial", "ngf": 4, "ndf": 4, "batch_size": 8}


def counted(monkeypatch, owner, name):
    "A list that grows by one at each call of a function."
    calls, whole = [], getattr(owner, name)

    def call(*given, **more):
        calls.append(name)
        return whole(*given, **more)

    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.fixture
def cells(tmp_path):
    path = tmp_path / "cells.json"
    path.write_text(random_genotype(0).to_json())
    return {**CELLS, "model__genotype": str(path)}


@pytest.mark.parametrize("kind", ["plain", "weights", "genotype", "generator"])
def test_a_training_builds_one_network(kind, cells, finished, photos, tmp_path, monkeypatch):
    recipe = tiny_recipe(
        **ONE
        | {
            "plain": {},
            "weights": {"model__weights": str(finished[0] / "checkpoints" / "best.pt")},
            "genotype": cells,
            "generator": {f"train__gan__{key}": value for key, value in DRAWING.items()},
        }[kind]
    )
    run = open_run(kind, recipe, verb="train", root=tmp_path)
    work = fit_beside_generator if kind == "generator" else fit_from_recipe
    built = counted(monkeypatch, ReIDModel, "__init__")
    read = counted(monkeypatch, genotypes, "genotype_from")
    work(recipe, run.path, workers=0, data_dir=photos)
    assert len(built) == 1
    assert len(read) == (kind == "genotype")


@pytest.mark.parametrize("kind", ["plain", "weights", "genotype"])
def test_a_check_builds_one_network(kind, cells, finished, monkeypatch):
    weights = {"model__weights": str(finished[0] / "checkpoints" / "best.pt")}
    recipe = tiny_recipe(**{"plain": {}, "weights": weights, "genotype": cells}[kind])
    built = counted(monkeypatch, ReIDModel, "__init__")
    read = counted(monkeypatch, genotypes, "genotype_from")
    check_model(recipe)
    assert len(built) == 1
    assert len(read) == (kind == "genotype")
