"""Processes that fail, are killed or fall silent: the right one is named, nobody is left, nothing is lost."""

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_recipe
from harming import WORK, harmed, open_ports, surroundings

from reidlab.core.heartbeat import Sign, alive
from reidlab.core.processes import processes
from reidlab.core.run import RunFolder, open_run
from reidlab.data.loaders import open_data
from reidlab.data.readers import ended_reader, readers_named
from reidlab.training import crew
from reidlab.training.crew import Afar, Rank, Seat, _hear, account, run_crew, silent
from reidlab.training.distributed import Member
from reidlab.training.launch import _join, launch

# Six seconds, not the twenty of the contract: a stopped process is found when patience is over, so that
# each of the stopped kinds would take 14 s longer and find nothing that six do not.
PATIENCE = 6
SMALL = {"data__height": 32, "data__width": 16, "data__val_fraction": 0.0, "train__epochs": 3}
SMALL |= {"train__checkpoint_minutes": 1e-9}
SEARCH = {
    "model__backbone": {
        "derived": {"stem": "conv3x2", "init_channels": 4, "cells_per_stage": [1, 1]}
    },
    "search__space__*__init_channels": 4,
    "search__space__*__ops": ["skip_connect", "sep_conv_3x3", "none"],
    "search__space__*__cells_per_stage": [1, 1],
    "search__space__*__nodes": 2,
    "search__p": 4,
    "search__k": 2,
    "search__epochs": 3,
    "search__warmup": 1,
}


# --- in two processes ------------------------------------------------------------------------


class Bench:
    "Runs of one recipe in two processes or in place."

    def __init__(self, photos, root):
        self.photos, self.root, self.whole = photos, root, {}

    def recipe(self, verb):
        more = SEARCH if verb == "search" else {}
        return tiny_recipe(**SMALL, **more)

    def run(self, verb, name, fault=None, gpus=2, **more):
        recipe = self.recipe(verb)
        data = open_data(recipe.data, recipe.seed, self.photos)
        asked = (data.fingerprint, "cpu", max(1, gpus), self.root)
        run = open_run(name, recipe, verb, *asked, **more)
        about = {"recipe": recipe, "folder": run.path, "workers": 1, "data_dir": self.photos}
        launch(partial_of(verb, fault), gpus, "cpu", **about)
        return run.path

    def reference(self, verb, gpus=2):
        key = verb, gpus
        if key not in self.whole:
            path = self.run(verb, f"whole-{verb}{gpus}", gpus=gpus)
            self.whole[key] = weights(path)
        return self.whole[key]


def partial_of(verb, fault):
    "What the processes do; it has a module, as launch wants."
    work = partial(harmed, verb, fault)
    work.__module__ = harmed.__module__
    return work


def weights(path):
    return torch.load(path / "checkpoints" / "last.pt", weights_only=True)["model"]


def different(one, other):
    assert one.keys() == other.keys()
    return [key for key in one if not torch.equal(one[key], other[key])]


def left(path):
    "Processes of a run that are still there."
    lines = [line for file in path.glob("who*") for line in file.read_text().splitlines()]
    pids = [int(line.split()[0]) for line in lines if ":" not in line]
    table = processes()
    assert len(pids) >= 2
    return [pid for pid in pids if pid in table and table[pid].state != "Z"]


@pytest.fixture(scope="module")
def bench(photos, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REIDLAB_PATIENCE", str(PATIENCE))
        yield Bench(photos, tmp_path_factory.mktemp("runs"))


SAYS = {
    "exception": "failed: ValueError: a photo of nobody",
    "killed": "was ended by SIGKILL",
    "stopped": "it is stopped in epoch",
    "killed reader": "a reader (process",
    "stopped reader": "stopped",
}


def suffer(bench, verb, fault, name, gpus=2):
    "Let a fault happen: the error's text, once it is clear that nobody is left."
    with pytest.raises((RuntimeError, ValueError)) as caught:
        bench.run(verb, name, fault, gpus)
    path = bench.root / name
    assert left(path) == []
    assert RunFolder(path).status()["state"] == "crashed"
    return str(caught.value)


def check(said, what, who):
    first = said.splitlines()[0]
    assert first.startswith(f"process {who} of 2 failed: ") and SAYS[what] in first, said
    assert "reader" in first or "reader" not in what
    assert not re.search(r"closed by peer|gloo", first, re.IGNORECASE)


def test_what_happens_to_one_is_told_and_costs_nothing(bench):
    whole = bench.reference("train")
    for step, fault in enumerate([("exception", 1), ("killed", 0), ("stopped reader", 1)], 2):
        check(suffer(bench, "train", (*fault, step), "harmed"), *fault)
    assert different(weights(bench.run("train", "harmed")), whole) == []


def test_a_wish_that_one_process_hears_stops_both(bench):
    path = bench.run("train", "asked", ("asked", 1, 3))
    status = RunFolder(path).status()
    assert (status["state"], status["reason"], status["epoch"]) == ("stopped", "SIGTERM", 1)
    assert left(path) == [] and not (path / "stop").exists()
    shutil.copytree(path, bench.root / "alone")
    with pytest.raises(ValueError, match="number of processes is 1 here and 2 there, and its bits"):
        bench.run("train", "alone", gpus=0)
    alone = RunFolder(bench.run("train", "alone", gpus=0, other_processes=True))
    (change,) = alone.metrics()["other_processes"]
    assert change == {"epoch": 1, "step": status["step"], "was": 2, "processes": 1}
    assert [e["processes"] for e in alone.events("processes")] == [1]
    assert different(weights(bench.run("train", "asked")), bench.reference("train")) == []


FAULTS = [(what, who) for what in SAYS for who in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("verb", WORK)
@pytest.mark.parametrize(("what", "who"), FAULTS, ids=[f"{w}-{r}" for w, r in FAULTS])
def test_every_fault_in_either_process(verb, what, who, bench):
    name = f"{verb}-{what.replace(' ', '-')}-{who}"
    check(suffer(bench, verb, (what, who, 6), name), what, who)
    assert different(weights(bench.run(verb, name)), bench.reference(verb)) == []


@pytest.mark.slow
@pytest.mark.parametrize("verb", WORK)
def test_two_processes_that_are_killed_again_and_again_change_no_bit(verb, bench):
    "At steps of either and at renames, with a checkpoint at every other step, until one comes through."
    chance, name = random.Random(len(verb)), f"again-{verb}"
    for n in range(20):
        step, rename = ("killed", n % 2, chance.randrange(3, 6)), ("killed at a rename", 0, 5 + n)
        try:
            path = bench.run(verb, name, rename if n % 3 == 2 else step)
            break
        except RuntimeError:
            assert RunFolder(bench.root / name).status()["state"] == "crashed"
    assert n >= 4
    assert different(weights(path), bench.reference(verb)) == []


@pytest.mark.parametrize("what", ["killed reader", "stopped reader"])
def test_readers_of_a_page(what, bench, monkeypatch):
    monkeypatch.setenv("REIDLAB_PATIENCE", "2")
    with pytest.raises(RuntimeError, match=SAYS[what].replace("(", r"\(")):
        bench.run("train", f"here-{what[:6]}", (what, 0, 3), gpus=0)
    assert left(bench.root / f"here-{what[:6]}") == [os.getpid()]


def test_no_port_is_open_beyond_this_machine(bench):
    bench.reference("train")
    noted = [(bench.root / "whole-train2" / f"who{r}").read_text() for r in (0, 1)]
    ports = [line.partition(": ")[2] for text in noted for line in text.splitlines() if ":" in line]
    assert len(ports) == 6 and set(ports) == {"[]"}  # the page and two ranks, a reader each


def test_a_port_that_is_open_is_found():
    with socket.socket() as wide, socket.socket() as near:
        for one, address in ((wide, "0.0.0.0"), (near, "127.0.0.1")):
            one.bind((address, 0))
            one.listen()
        assert open_ports(os.getpid()) == [f"00000000:{wide.getsockname()[1]:04X}"]


class Going:
    "A process that has let go of everything and has no exit code yet, as for a moment every process that is killed."

    def __init__(self, end=-9):
        self.sentinel, own = os.pipe()
        os.close(own)
        self.pid, self.end, self.exitcode = 4711, end, None

    def join(self, timeout=None):
        self.exitcode = self.end


def test_a_reader_that_is_about_to_end_is_waited_for():
    reading = SimpleNamespace(_workers=[Going()])
    said = ended_reader(ConnectionResetError(104, "Connection reset by peer"), reading)
    assert said.startswith("a reader (process 4711) was ended by SIGKILL")


WORD = RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. ")


def test_a_reader_is_named_though_its_end_broke_into_something_else(monkeypatch):
    "torch speaks up at any line; here while a thread begins, which then cannot undo what is done."
    plainly, begun = threading._start_new_thread, threading.Event()

    def interrupted(run, given):
        plainly(run, given)
        begun.wait()
        raise WORD

    monkeypatch.setattr(threading, "_start_new_thread", interrupted)
    with pytest.raises(RuntimeError, match=r"a reader \(process 4711\) was ended"), readers_named():
        threading.Thread(target=begun.set, daemon=True).start()


@pytest.mark.parametrize(
    ("cause", "context", "hidden", "named"),
    [
        (WORD, None, True, True),
        (ValueError("between"), None, True, False),
        (None, WORD, False, True),
        (None, WORD, True, False),  # said already, in other words
    ],
)
def test_what_an_error_covers(cause, context, hidden, named):
    wrong = KeyError("a thread")
    wrong.__cause__, wrong.__context__, wrong.__suppress_context__ = cause, context, hidden
    assert bool(ended_reader(wrong)) is named


def test_a_last_word_is_heard():
    "A rank that answers and ends between two looks has answered."
    near, far = Pipe()

    def is_alive():
        far.send("a value")
        return False

    one = rank_of(0, 20)
    one.process.is_alive, one.pipe, said = is_alive, near, {}
    _hear(one, said)
    assert said == {0: "a value"} and one.done


def rank_of(r, limit, what="epoch 1, step 2", count=5):
    "A rank that was heard at second 0, without a process."
    seat = Seat(r, 2, "cpu", 1, Path("nowhere"), 20.0)
    return Rank(SimpleNamespace(pid=-1 - r, exitcode=None), None, seat, Sign(count, limit, what))


@pytest.mark.parametrize(
    ("limits", "stopped", "now", "says"),
    [
        ((20, 20), {}, 24, ""),
        ((20, 20), {}, 26, "process 1 of 2 failed: no sign of life for 26 s in epoch 1, step 1"),
        ((20, 3600), {}, 3000, ""),  # the other ranks a gallery
        ((20, 3600), {9: 2900.0}, 3000, "process 0 of 2 failed: its reader (process 9) is stopped"),
        ((20, 20), {9: 25.0}, 26, "process 0 of 2 failed: its reader (process 9) is stopped"),
        ((20, 20), {-1: 1.0}, 22, "process 0 of 2 failed: it is stopped in epoch 1, step 2"),
    ],
)
def test_who_holds_up_the_job(limits, stopped, now, says, monkeypatch):
    monkeypatch.setattr(os, "kill", lambda *given: None)
    ranks = [rank_of(0, limits[0]), rank_of(1, limits[1], "epoch 1, step 1", count=4)]
    ranks[0].stopped = stopped
    found = silent(ranks, now)
    assert account([found], 2).startswith(says) if says else found is None


def test_processes_from_a_server_see_today_s_surroundings(tmp_path, monkeypatch):
    for word in ("one", "two"):  # the server is as old as the first
        monkeypatch.setenv("WORD_OF_TODAY", word)
        (tmp_path / word).mkdir()
        monkeypatch.chdir(tmp_path / word)
        assert run_crew(surroundings, 2, "cpu", {}) == (word, str(tmp_path / word))


# --- on several machines ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signs", "heard", "now", "says"),
    [
        ([(5, 20), (5, 20)], [0, 9], 43, ""),  # the other ranks' word may be 15 s old
        ([(5, 20), (4, 20)], [0, 9], 45, "for 36 s; process 1 gave the fewest, the last in step 4"),
        ([(4, 20), (5, 20)], [9, 0], 45, "for 36 s; process 0 gave the fewest, the last in step 4"),
        ([(5, 3600), (5, 20)], [0, 0], 3600, ""),  # a gallery is ranked
        ([(5, 3600), (5, 20)], [0, 0], 3616, "for 3616 s; process 0"),
        ([(-1, 3600), (5, 20)], [0, 0], 3600, ""),  # it still starts
    ],
)
def test_who_looks_from_within(signs, heard, now, says):
    afar = Afar(1, [Sign(count, limit, f"step {count}") for count, limit in signs], heard)
    said = afar.verdict(now)
    assert (
        said.startswith(f"process 1 of 2 ends in step {signs[1][0]}: no process")
        if says
        else not said
    )
    assert says in said and "\n" not in said


class Clock:
    "The time of a thread that looks, and what tells it that the work is over: never."

    def __init__(self, pace, looks=100):
        self.now, self.pace, self.left = 0.0, pace, looks

    def monotonic(self):
        return self.now

    def wait(self, seconds):
        self.now, self.left = self.now + self.pace, self.left - 1
        return self.left < 0


@pytest.mark.parametrize(("pace", "end"), [(1.0, [36.0]), (9.0, [])], ids=["hangs", "had no turn"])
def test_a_process_that_hangs_ends_itself(pace, end, monkeypatch, tmp_path):
    clock, ended = Clock(pace), []
    monkeypatch.setattr(crew, "time", clock)
    monkeypatch.setattr(crew, "_give_up", lambda line: ended.append(clock.now))
    afar = Afar(0, [Sign(3, 20.0, "step 3")] * 2, [0.0, 0.0])
    crew._judge(afar, tmp_path / "none", clock)
    assert ended == end


def world_of_one(device):
    "What is in the store, once this process has given a sign."
    alive("epoch 1, step 2")
    path = next(file for file in Path(os.environ["TMPDIR"]).glob("reidlab-*/signs"))
    store = dist.TCPStore("127.0.0.1", int(os.environ["PORT"]), is_master=False)
    afar = Afar(0, [Sign(-1, 1.0, "")], [0.0])
    crew._speak(afar, store, path, Clock(1.0, looks=1))
    return afar.known[0], afar.visits


def test_a_process_that_others_started_gives_signs(monkeypatch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("PORT", str(port))
    monkeypatch.setenv("REIDLAB_PATIENCE", "7")
    member = Member(0, 1, 0, "localhost", port, "slurm")
    said = _join(member, world_of_one, "cpu", {})
    assert said == (Sign(1, 35.0, "epoch 1, step 2"), {0: 1})
    assert list(tmp_path.iterdir()) == []


LIMIT = 60 + 5 + 10  # patience, the margin, two visits


@pytest.mark.parametrize(
    ("words", "now", "says"),
    [
        ([], LIMIT, ""),  # nobody has come yet
        ([], LIMIT + 1, "the store where all met does not answer for 76 s"),
        ([(9, {1: 1})], LIMIT + 1, "process 0 left no word for 76 s, the last while starting"),
        ([(9, {0: 1, 1: 1}), (80, {0: 1, 1: 2})], 84, ""),
        ([(9, {0: 1, 1: 1}), (80, {0: 1, 1: 2})], 85, "process 0 left no word for 76 s"),
        ([(9, {0: 1, 1: 1}), (80, {0: 2, 1: 2})], LIMIT + 80, ""),
        ([(9, {0: 1, 1: 1}), (80, {0: crew.OVER, 1: 2}), (140, {1: 3})], 200, ""),  # it was done
        ([(9, {0: 1, 1: 1}), (90, {0: 1, 1: 2})], 91, "process 0 left no word for 82 s"),
    ],
)
def test_who_comes_no_more_to_the_store_is_gone_whatever_its_work_may_take(words, now, says):
    afar = Afar(1, [Sign(0, 3600.0, "starting")] * 2, [0.0, 0.0], came={0: 0.0, 1: 0.0})
    for when, visits in words:
        afar.meet({r: crew.Word(n, Sign(0, 3600.0, "starting")) for r, n in visits.items()}, when)
    assert says in afar.verdict(now) and bool(says) == bool(afar.verdict(now))


def lost(*given):
    raise OSError("the store is gone")


@pytest.mark.parametrize("end", ["over", "lost"])
def test_what_another_may_take_counts_as_long_as_it_can_be_heard(end, tmp_path):
    "The other had announced an hour; this one's patience is over."
    afar = Afar(0, [Sign(9, 60.0, "step 9"), Sign(3, 3600.0, "ranking")], [0.0, 0.0])
    assert afar.verdict(200.0) == ""
    if end == "over":
        afar.meet({1: crew.Word(crew.OVER, Sign(4, 3600.0, "ranking"))}, 9.0)
    else:
        crew.new_signs(tmp_path / "signs")
        crew._speak(afar, SimpleNamespace(set=lost), tmp_path / "signs", Clock(1.0))
    assert "no process gave a sign of life" in afar.verdict(200.0)


@pytest.mark.parametrize(("wrong", "over"), [(None, True), (KeyError("oh"), False)])
def test_only_who_has_done_its_work_says_so(wrong, over):
    store = dist.HashStore()
    with suppress(KeyError), crew.watched_afar(store, 0, 1):
        if wrong:
            raise wrong
    if store.check(["reidlab/word/0"]):
        assert (json.loads(store.get("reidlab/word/0"))[0] == crew.OVER) == over
    else:
        assert not over


STOPS = """
import os, signal, sys
from reidlab.training import crew, launch
from reidlab.training.distributed import barrier, process_rank
crew.PULSE, crew.MARGIN = 0.2, 0.4
def work(device):
    if process_rank() == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGSTOP)
    barrier()
launch.launch(work, device="cpu")
"""


@pytest.mark.parametrize("who", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_stops_before_its_second_word_holds_up_nobody(who):
    "Two that a cluster started; the first keeps the store."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    member = {"SLURM_NTASKS": "2", "SLURM_NODELIST": "localhost", "MASTER_PORT": port}
    member |= {"SLURM_JOB_ID": "1", "REIDLAB_PATIENCE": "1"}
    both = []
    for r in ("0", "1"):
        place = os.environ | member | {"SLURM_PROCID": r, "SLURM_LOCALID": r}
        asked = [sys.executable, "-c", STOPS, str(who)]
        both.append(subprocess.Popen(asked, env=place, stderr=subprocess.PIPE, text=True))
    try:
        said = both[1 - who].communicate(timeout=120)[1]
        assert both[1 - who].returncode == 1
        why = (
            f"process {who} left no word for" if who else "the store where all met does not answer"
        )
        assert f"process {1 - who} of 2 ends in starting: {why}" in said, said
    finally:
        for process in both:
            process.kill()
            process.communicate()
