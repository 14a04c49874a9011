"""Jobs that are stopped in time, or by the weather: what they say, what is left, and how they go on."""

import errno
import os
import shutil
import time
import warnings
from functools import partial

import pytest
import torch
from conftest import TINY, tiny_recipe, walk
from test_crew import SEARCH
from test_gan import PLAN
from test_repeatable import different, leaves

from reidlab.core import files
from reidlab.core.run import RunFolder, open_run
from reidlab.data.loaders import open_data
from reidlab.evaluation.evaluate_run import evaluate_run
from reidlab.training.fit import fit_from_recipe
from reidlab.training.stop import until_of, within

SMALL = TINY | {"data.height": 32, "data.width": 16, "train.epochs": 2, "data.val_fraction": 0.0}
PAGES = {
    "train": {},
    "search": {k.replace("__", "."): v for k, v in (SEARCH | {"search__epochs": 2}).items()},
    "generate": {"train.gan": {"only": PLAN}},
}


@pytest.mark.parametrize("verb", PAGES)
def test_a_page_that_is_stopped_says_how_far_it_came(verb, stocked):
    asked = {"recipe": "smoke", "run": "slice", "overrides": SMALL | PAGES[verb]}
    names = walk(f"nbs/{verb}.ipynb", minutes=1e-6, **asked)
    run = RunFolder(stocked.runs / "slice")
    assert run.status()["state"] == "stopped" and not (run.path / "metrics.json").exists()
    assert names["told"]["selection"].startswith("stopped (the minutes are over): ")
    assert "The same call continues it" in names["told"]["selection"]
    names = walk(f"nbs/{verb}.ipynb", **asked)
    assert names["done"] and "stopped" not in names["told"]["selection"]


# --- bad weather ------------------------------------------------------------------------------


BARE = {"data__height": 32, "data__width": 16, "data__val_fraction": 0.0, "train__epochs": 3}


class Weather:
    "One training, called again and again, and what may happen to it after its first epoch."

    def __init__(self, photos, root):
        self.photos, self.root, self.recipe = photos, root, tiny_recipe(**BARE)
        self.data = open_data(self.recipe.data, self.recipe.seed, photos).fingerprint

    def train(self, name, happens=lambda run: None, minutes=0.0):
        run = open_run(name, self.recipe, "train", self.data, root=self.root)
        once = lambda path, record: happens(run) if record["epoch"] == 1 else None
        about = {"on_epoch": [once], "workers": 0, "data_dir": self.photos}
        within(fit_from_recipe, until_of(minutes), recipe=self.recipe, folder=run.path, **about)
        return run

    def weights(self, name):
        file = self.root / name / "checkpoints" / "last.pt"
        return leaves(torch.load(file, weights_only=True))


@pytest.fixture(scope="module")
def weather(photos, tmp_path_factory):
    found = Weather(photos, tmp_path_factory.mktemp("runs"))
    found.train("whole")
    return found


def refusing(number):
    "A disk that from here on takes no file."

    def put_in_place(*given):
        raise OSError(number, os.strerror(number))

    return lambda patch: patch.setattr(files, "put_in_place", put_in_place)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "there is no room (no space left on device). What stood there is as"),
        (errno.EDQUOT, "there is no room (disk quota exceeded)"),
        (errno.EFBIG, "there is no room (file too large)"),
        (errno.EROFS, "and may not (read-only file system). Make it writable"),
    ],
)
def test_a_disk_that_takes_nothing_is_named_and_nothing_is_lost(number, words, weather):
    name = f"disk{number}"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError) as caught:
        weather.train(name, lambda run: refusing(number)(patch))
    assert words in str(caught.value) and str(weather.root / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it goes on from previous.pt
        weather.train(name)
    assert different(weather.weights(name), weather.weights("whole")) == []


def removed(run):
    shutil.rmtree(run.path)


def renamed(run):
    run.path.rename(run.path.with_name("elsewhere"))


def replaced(run):
    renamed(run)
    run.path.mkdir()


@pytest.mark.parametrize("happens", [removed, renamed, replaced])
def test_a_folder_that_goes_while_the_run_works_ends_it_in_one_line(happens, weather):
    with pytest.raises(
        FileNotFoundError, match=r"the folder of run 'gone' is gone: .* put the folder"
    ):
        weather.train("gone", happens)
    assert not [*weather.root.glob("gone/*")]  # nobody's files are left
    if happens is renamed:
        (weather.root / "elsewhere").rename(weather.root / "gone")
        assert RunFolder(weather.root / "gone").events()[-1]["epoch"] == 1
    shutil.rmtree(weather.root / "elsewhere", ignore_errors=True)
    weather.train("gone")
    assert different(weather.weights("gone"), weather.weights("whole")) == []
    shutil.rmtree(weather.root / "gone")


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_put_an_hour_off_changes_nothing(hours, weather, monkeypatch):
    real = time.time
    later = lambda run: monkeypatch.setattr(time, "time", lambda: real() + 3600 * hours)
    assert weather.train(f"clock{hours}", later, minutes=30.0).finished
    assert different(weather.weights(f"clock{hours}"), weather.weights("whole")) == []


def test_two_jobs_on_one_run(weather):
    with pytest.raises(ValueError, match="run 'twice' is being written by process"):
        weather.train("twice", lambda run: weather.train("twice"))
    weather.train("twice")
    assert different(weather.weights("twice"), weather.weights("whole")) == []


def test_an_evaluation_without_room_leaves_the_run_as_it_was(finished, photos, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "done")
    test = partial(evaluate_run, folder, data_dir=photos, workers=0)
    with pytest.MonkeyPatch.context() as patch:
        refusing(errno.ENOSPC)(patch)
        with pytest.raises(OSError, match="there is no room"):
            test()
    assert not [*folder.glob("evaluate/*/metrics.json")] and RunFolder(folder).finished
    assert test()["metrics"]["mAP"] > 0
