"""A training's ledger: the same bits with and without, the same lines after a kill, one for every kind of job."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_recipe

from reidlab.core.run import open_run
from reidlab.data.loaders import open_data
from reidlab.training import epoch as epochs
from reidlab.training.fit import fit_from_recipe
from reidlab.training.ledger import read_ledger
from reidlab.training.step import Trainer

SMALL = {"data__height": 32, "data__width": 16, "data__val_fraction": 0.0}


def trained(recipe, name, root, photos, work=fit_from_recipe, **how):
    "A run's folder after its training, or after what stopped it."
    data = open_data(recipe.data, recipe.seed, photos)
    path = open_run(name, recipe, verb="train", data=data.fingerprint, root=root).path
    work(recipe, path, workers=0, data_dir=photos, **how)
    return path


@pytest.fixture(scope="module")
def plain(photos, tmp_path_factory):
    "Two epochs with dropout, so that the random state counts."
    recipe = tiny_recipe(model__head={"linear": {"dropout": 0.3}}, **SMALL)
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
    assert [*told.steps] == [*range(len(told.steps))] and told.last == 2 * told.starts[0]["steps"]
    assert {"loss", "lr", "photos", "pixels", "weights"} <= told.steps[1].keys()
    assert {"buffers", "random", "kept"} <= told.steps[told.last].keys()
    assert {"optimizer", "scaler"} <= told.steps[0]["kept"].keys()
    sizes = [len(line) for line in (plain.path / "ledger.jsonl").read_bytes().splitlines()[1:]]
    assert sum(sizes) / len(sizes) < 1000


@pytest.mark.parametrize(("at", "start"), [(1, 0), (3, 2), (6, 5)])
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
