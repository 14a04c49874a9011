"""Trainings, searches and generators that are killed or stopped anywhere: called again, they end with the same bits."""

import os
import random
import signal
from itertools import count

import pytest
import torch
from conftest import tiny_recipe
from harming import WORK
from pandas.testing import assert_frame_equal
from test_crew import SEARCH, SMALL, different
from test_gan import PLAN

from reidlab.core.run import RunFolder, open_run
from reidlab.data.loaders import open_data
from reidlab.training import epoch
from reidlab.training.adversary import Pair
from reidlab.training.generate import generate_from_recipe
from reidlab.training.step import Trainer

VERBS = WORK | {"generate": generate_from_recipe}
MORE = {"search": SEARCH, "generate": {"train__gan": {"only": PLAN}}}
STEP = {"train": (Trainer, "rate"), "search": (Trainer, "rate"), "generate": (Pair, "step")}
KILLS = {"train": 12, "search": 12, "generate": 6}  # in CI; 100 with -m slow


def forked(work):
    "How a child of this process ends that does some work: 0, or the signal that ended it."
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying(owner, name, at, before, sign=signal.SIGKILL):
    "Have a function send its process a signal at its n-th call, before or after what it does."
    whole, calls = getattr(owner, name), count(1)

    def call(*given, **more):
        now = next(calls)
        if now == at and before:
            os.kill(os.getpid(), sign)
        found = whole(*given, **more)
        if now == at and not before:
            os.kill(os.getpid(), sign)
        return found

    setattr(owner, name, call)


class Place:
    "Runs of one recipe, each in a process of its own."

    def __init__(self, verb, photos, root):
        self.verb, self.photos, self.root = verb, photos, root
        small = SMALL | {"train__epochs": 2, "search__epochs": 2, "train__checkpoint_minutes": 1e-9}
        self.recipe = tiny_recipe(**MORE.get(verb, {}) | small)
        self.data = open_data(self.recipe.data, self.recipe.seed, photos)

    def run(self, name, kill=()):
        def work():
            epoch.ASK = 2  # a checkpoint every other step
            for one in kill:
                dying(*one)
            about = (self.verb, self.data.fingerprint, "cpu", 1, self.root)
            run = open_run(name, self.recipe, *about)
            VERBS[self.verb](self.recipe, run.path, workers=0, data_dir=self.photos)

        return forked(work)

    def kept(self, name):
        "All tensors that a run needs to go on, and the pictures that it drew."
        file = self.root / name / "checkpoints" / "last.pt"
        drawn = {p.name: torch.tensor(list(p.read_bytes())) for p in file.parents[1].rglob("*.png")}
        return leaves(torch.load(file, weights_only=True)) | drawn

    def told(self, name):
        "A run's history but for its speed."
        return RunFolder(self.root / name).history().drop(columns=["seconds", "images_per_s"])


def leaves(content, name=""):
    "The tensors of nested dictionaries and lists by their names."
    if isinstance(content, torch.Tensor):
        return {name: content}
    parts = content.items() if isinstance(content, dict) else enumerate(content)
    nested = [
        leaves(p, f"{name}.{k}") for k, p in parts if isinstance(p, torch.Tensor | dict | list)
    ]
    return {key: value for one in nested for key, value in one.items()}


@pytest.fixture(scope="module", params=sorted(VERBS))
def place(request, photos, tmp_path_factory):
    found = Place(request.param, photos, tmp_path_factory.mktemp("runs"))
    assert found.run("whole") == 0
    return found


def killed_until_done(place, name, kills):
    "Kill a run at each of these places in turn, where it still comes there; then let it end."
    ends = [place.run(name, [kill]) for kill in kills]
    assert set(ends) <= {0, -signal.SIGKILL} and -signal.SIGKILL in ends
    assert place.run(name) == 0
    equals_the_whole(place, name)


def equals_the_whole(place, name):
    "A run in pieces has everything that the run in one piece has."
    assert different(place.kept(name), place.kept("whole")) == []
    ours, theirs = RunFolder(place.root / name), RunFolder(place.root / "whole")
    assert ours.metrics()["metrics"] == pytest.approx(theirs.metrics()["metrics"], abs=0)
    assert list(place.told(name)["epoch"]) == [1, 2]
    assert_frame_equal(place.told(name), place.told("whole"), check_exact=True)


def anywhere(verb, n, seed):
    "Places to kill at: renames by number, steps by chance, before and after."
    chance = random.Random(seed)
    renames = [(os, "replace", 1 + i, bool(i % 2)) for i in range(n // 2)]
    steps = [(*STEP[verb], 1 + chance.randrange(9), True) for _ in range(n - len(renames))]
    return [kill for pair in zip(renames, steps, strict=False) for kill in pair]


def test_kills_on_the_way_change_no_bit(place):
    for half in (0, 1):
        kills = anywhere(place.verb, KILLS[place.verb] // 2, seed=half)
        killed_until_done(place, f"killed{half}", kills[half::2])


def test_three_slices_equal_one_run(place):
    folder = RunFolder(place.root / "slices")
    for at, sign in ((3, signal.SIGUSR1), (2, signal.SIGTERM))[: 2 - (place.verb == "generate")]:
        assert place.run("slices", [(*STEP[place.verb], at, False, sign)]) == 0
        status = folder.status()
        assert (status["state"], status["reason"]) == ("stopped", sign.name)
        assert not (folder.path / "stop").exists() and not (folder.path / "metrics.json").exists()
    assert place.run("slices") == 0 and "reason" not in folder.status()
    equals_the_whole(place, "slices")


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_kill_at_every_rename(before, place):
    for at in count(1):
        name = f"rename{at}{before}"
        if place.run(name, [(os, "replace", at, before)]) == 0:
            break
        assert place.run(name) == 0
        assert different(place.kept(name), place.kept("whole")) == []
    assert at > 8


@pytest.mark.slow
def test_a_hundred_kills(place):
    for n in range(17):
        killed_until_done(place, f"hundred{n}", anywhere(place.verb, 6, seed=n)[n % 2 :: 2])
