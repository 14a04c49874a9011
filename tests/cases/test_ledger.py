"""A training's ledger: the same bits with and without, the same lines after a kill, one for every kind of job."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_recipe

from reidlab.core.run import open_run
from reidlab.data.loaders import open_data
from reidlab.nas.search import search_from_recipe
from reidlab.training import epoch as epochs
from reidlab.training.fit import fit_from_recipe
from reidlab.training.generate import generate_from_recipe
from reidlab.training.ledger import read_ledger
from reidlab.training.step import Trainer

SMALL = {"data__height": 32, "data__width": 16, "data__val_fraction": 0.0}


def trained(recipe, name, root, photos, work=fit_from_recipe, **how):
    "A run's folder after its training, or after what stopped it."
    data = open_data(recipe.data, recipe.seed, photos)
    verb = {search_from_recipe: "search", generate_from_recipe: "generate"}.get(work, "train")
    path = open_run(name, recipe, verb=verb, data=data.fingerprint, root=root).path
    work(recipe, path, workers=0, data_dir=photos, **how)
    return path


@pytest.fixture(scope="module")
def plain(photos, tmp_path_factory):
    "Five epochs of 5, 5, 5, 4 and 4 batches, with dropout, so that the random state counts."
    recipe = tiny_recipe(model__head={"linear": {"dropout": 0.3}}, train__epochs=5, **SMALL)
    root = tmp_path_factory.mktemp("plain")
    return SimpleNamespace(recipe=recipe, path=trained(recipe, "run", root, photos))


def weights(path):
    return torch.load(path / "checkpoints" / "last.pt", weights_only=True)["model"]


def test_a_training_has_the_same_bits_without_a_ledger(plain, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("REIDLAB_LEDGER", "0")
    path = trained(plain.recipe, "silent", tmp_path, photos)
    assert not (path / "ledger.jsonl").exists()
    with_it, without = weights(plain.path), weights(path)
    assert [k for k in with_it if not torch.equal(with_it[k], without[k])] == []


def test_every_step_has_a_line_and_the_last_is_whole(plain):
    told = read_ledger(plain.path)
    assert [*told.steps] == [*range(len(told.steps))] and told.last == 23
    assert {"loss", "lr", "photos", "pixels", "weights"} <= told.steps[1].keys()
    assert {"buffers", "random", "kept"} <= told.steps[told.last].keys()
    assert {"optimizer", "scaler"} <= told.steps[0]["kept"].keys()
    sizes = [len(line) for line in (plain.path / "ledger.jsonl").read_bytes().splitlines()[1:]]
    assert sum(sizes) / len(sizes) < 1000


@pytest.mark.parametrize(("at", "start"), [(1, 0), (3, 2), (6, 5), (22, 21)])
def test_a_killed_run_tells_the_same_in_the_end(at, start, plain, photos, tmp_path, monkeypatch):
    step, done = Trainer.step, []

    def dies(*args, **options):
        done.append(args)
        if len(done) == at + 1:
            raise KeyboardInterrupt
        return step(*args, **options)

    monkeypatch.setattr(Trainer, "step", dies)
    monkeypatch.setattr(epochs, "ASK", 2)  # a look at the clock, and a checkpoint, every two steps
    hasty = plain.recipe.train.model_copy(update={"checkpoint_minutes": 1e-9})
    hasty = plain.recipe.model_copy(update={"train": hasty})
    with pytest.raises(KeyboardInterrupt):
        trained(hasty, "killed", tmp_path, photos)
    with (tmp_path / "killed" / "ledger.jsonl").open("ab") as file:
        file.write(b'{"step":9,"epoch":2,"lo')  # what a crash tears
    told = read_ledger(trained(hasty, "killed", tmp_path, photos))
    assert [line["start"] for line in told.starts] == [0, start]
    assert (told.again, told.lost) == ([], 0)
    same = lambda entry: {k: v for k, v in entry.items() if k in SAME}
    wanted = read_ledger(plain.path).steps
    assert {s: same(e) for s, e in told.steps.items()} == {s: same(e) for s, e in wanted.items()}


SAME = ("loss", "lr", "photos", "pixels", "weights", "layers")  # of every line, whole or not


SEARCH = {
    "model__backbone": {
        "derived": {"stem": "conv3x2", "init_channels": 6, "cells_per_stage": [1, 1]}
    },
    "search__space__*__init_channels": 6,
    "search__space__*__cells_per_stage": [1, 1],
    "search__space__*__nodes": 2,
    "search__p": 4,
    "search__k": 2,
    "search__epochs": 1,
    "search__warmup": 0,
}
PAIR = {"input_dim": 8, "ngf": 4, "ndf": 4, "batch_size": 16, "sample_every": 1}


@pytest.mark.parametrize(
    ("work", "how", "kept", "learning"),
    [
        (
            search_from_recipe,
            SEARCH,
            {"optimizer", "scaler", "alpha_optimizer", "circle"},
            ("alpha_normal", "alpha_reduce", "head."),
        ),
        (
            generate_from_recipe,
            {"train__gan": {"only": PAIR}, "train__epochs": 1},
            {"optimizers", "baselines"},
            ("0.", "1."),  # the generator and its critic
        ),
    ],
    ids=["search", "generator"],
)
def test_searches_and_generators_have_one_too(work, how, kept, learning, photos, tmp_path):
    recipe = tiny_recipe(**SMALL | how)
    twins = [read_ledger(trained(recipe, n, tmp_path, photos, work)) for n in ("one", "two")]
    told = twins[0]
    assert told.steps == twins[1].steps and told.last == told.starts[0]["steps"] > 1
    assert told.steps[told.last]["kept"].keys() == kept
    pairs = zip(told.layers, groups(told, 0), groups(told, told.last), strict=True)
    moved = {name for name, was, now in pairs if was != now}
    assert [part for part in learning if not any(part in name for name in moved)] == []


def groups(told, step):
    "The hashes of a step's layers."
    text = told.steps[step]["layers"]
    return [text[i : i + 4] for i in range(0, len(text), 4)]
