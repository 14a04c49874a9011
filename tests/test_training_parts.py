"""A training builds its network once and follows its genotype once; what older trainings left is continued."""

import pytest
import torch
from conftest import tiny_recipe

from reidlab.core.run import open_run
from reidlab.core.sealed import write_sealed
from reidlab.models import genotype as genotypes
from reidlab.models.genotype import random_genotype
from reidlab.models.reid import ReIDModel
from reidlab.nas.search import search_from_recipe
from reidlab.nas.supernet import Supernet
from reidlab.training.checkpoint import read_checkpoint
from reidlab.training.checks import check_model
from reidlab.training.fit import fit_from_recipe
from reidlab.training.generate import generate_from_recipe
from reidlab.training.with_generator import fit_beside_generator

ONE = {"train__epochs": 1, "train__validate_every": 0}
CELLS = {
    "model__backbone": "derived",
    "model__backbone__*__init_channels": 6,
    "model__backbone__*__cells_per_stage": [1, 1],
}
DRAWING = {"input_dim": 256, "ngf": 4, "ndf": 4, "batch_size": 8}


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
    return {**CELLS, "model__backbone__*__genotype": str(path)}


@pytest.mark.parametrize("kind", ["plain", "weights", "genotype", "generator"])
def test_a_training_builds_one_network(kind, cells, finished, photos, tmp_path, monkeypatch):
    recipe = tiny_recipe(
        **ONE
        | {
            "plain": {},
            "weights": {
                "model__backbone__*__weights": str(finished[0] / "checkpoints" / "best.pt")
            },
            "genotype": cells,
            "generator": {"train__gan": {"adversarial": DRAWING}},
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
    weights = {"model__backbone__*__weights": str(finished[0] / "checkpoints" / "best.pt")}
    recipe = tiny_recipe(**{"plain": {}, "weights": weights, "genotype": cells}[kind])
    built = counted(monkeypatch, ReIDModel, "__init__")
    read = counted(monkeypatch, genotypes, "genotype_from")
    check_model(recipe)
    assert len(built) == 1
    assert len(read) == (kind == "genotype")


def test_a_search_builds_its_supernet_once_and_once_without_memory(photos, tmp_path, monkeypatch):
    cells = {"reid": {"init_channels": 6, "cells_per_stage": [1], "nodes": 1}}
    cells = {"space": cells, "p": 4, "k": 2, "epochs": 1}
    alone = {"warmup": 0, "validate_every": 0, "optimizer": "sgd"}
    recipe = tiny_recipe(**{f"search__{key}": value for key, value in {**cells, **alone}.items()})
    run = open_run("search", recipe, verb="search", root=tmp_path)
    built = counted(monkeypatch, Supernet, "__init__")
    search_from_recipe(recipe, run.path, workers=0, data_dir=photos)
    assert len(built) == 2


def before_fields(content):
    "A training's checkpoint as it was written before its progress was an object."
    old = ("epoch", "step", "sums", "seconds", "best")
    return content | {"progress": {key: content["progress"][key] for key in old}}


def before_the_frame(content):
    "A generator's checkpoint as it was written before it was trained in the frame of the others."
    kept = content["progress"]
    old = {"epoch": kept["epoch"], "seconds": kept["seconds"], "last": {"generator_loss": 1.0}}
    mine = {key: value for key, value in content.items() if key not in ("baselines", "random")}
    return mine | {"progress": old | {"baselines": content["baselines"]}}


def stopped(path, record):
    "Ends a run after its first epoch, once."
    if record["epoch"] == 1 and not (path / "once").exists():
        (path / "once").touch()
        raise SystemError("the power went out")


@pytest.mark.parametrize("kind", ["train", "generate"])
def test_an_older_checkpoint_is_continued_to_the_same_bits(kind, photos, tmp_path):
    drawing = {"train__gan": {"only": DRAWING}}
    recipe = tiny_recipe(**drawing if kind == "generate" else {"model__head__*__dropout": 0.2})
    work = generate_from_recipe if kind == "generate" else fit_from_recipe
    ends = []
    for name in ("whole", "older"):
        run = open_run(name, recipe, verb=kind, root=tmp_path)
        file = run.path / "checkpoints" / "last.pt"
        if name == "older":
            with pytest.raises(SystemError):
                work(recipe, run.path, on_epoch=[stopped], workers=0, data_dir=photos)
            old = before_the_frame if kind == "generate" else before_fields
            write_sealed(file, old(read_checkpoint(file)))
        final = work(recipe, run.path, workers=0, data_dir=photos)
        ends.append((read_checkpoint(file), final["metrics"], final.get("baselines")))
    (whole, *figures), (older, *same) = ends
    assert all(torch.equal(value, older["model"][key]) for key, value in whole["model"].items())
    assert figures == same
