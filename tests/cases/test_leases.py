"Leases under bad luck: whoever dies, sleeps or comes at the same time, one has the work, and one gets it after him."

import itertools
import json
import os
import random
import shutil
import socket
import threading
from functools import partial

import pytest

from reidlab.core.files import write_json
from reidlab.core.lease import BEAT, Watch, see_lease, take
from reidlab.core.recipe import Recipe
from reidlab.core.run import STALE, RunFolder, TakenOver, open_run, this_process
from reidlab.jobs.grid import plan_cells
from reidlab.jobs.sweep import SIGNS, run_sweep

GONE = {"pid": 2**22 + 1}  # on this machine: seen at once
AWAY = {"host": "elsewhere"}  # on another: watched
NAMESAKE = {"where": "another boot"}  # of a machine with our name
CALLS = ("open", "pwrite", "fsync", "rename", "unlink", "link")


class Time:
    "A clock that is turned by hand."

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def time():
    return Time()


def left_by(path, time, **who):
    "A lease whose owner looks like somebody else."
    lease = take(path, Watch(clock=time))
    path.write_bytes(json.dumps(this_process() | who | {"token": lease.token}).encode())
    return lease


def watched(path, time, watch, seconds, step=20.0):
    "Try to take a lease every few seconds; the lease, and how long it took."
    for n in range(int(seconds / step) + 1):
        if got := take(path, watch):
            return got, n * step
        time.now += step
    return None, seconds


@pytest.mark.parametrize(
    ("who", "seconds"), [(GONE, 0), (AWAY, STALE), (NAMESAKE, STALE), (AWAY | GONE, STALE)]
)
def test_a_dead_lease_is_taken_over_when_it_is_known_to_be_dead(who, seconds, tmp_path, time):
    left_by(tmp_path / "l", time, **who)
    got, took = watched(tmp_path / "l", time, Watch(clock=time), 600)
    assert got.renew() and took == seconds
    assert [p.name for p in tmp_path.iterdir()] == ["l"]


@pytest.mark.parametrize("sign", ["l", "status.json", "evaluate/market/pulse.json"])
@pytest.mark.parametrize("off", [-3600, 0, 3600])
def test_one_that_shows_life_keeps_it_whatever_the_clocks_say(sign, off, tmp_path, time):
    left_by(tmp_path / "l", time, **AWAY)
    watch = Watch(also=("status.json", "evaluate/*/*.json"), clock=time)
    file = tmp_path / sign
    file.parent.mkdir(parents=True, exist_ok=True)
    for n in range(50):  # touched by a server whose clock is an hour off
        file.touch()
        os.utime(file, (1e9 + off + n, 1e9 + off + n))
        assert take(tmp_path / "l", watch) is None
        time.now += BEAT
    assert watched(tmp_path / "l", time, watch, 600)[1] <= STALE + 20


def test_a_lease_that_is_old_is_watched_for_half_a_minute_all_the_same(tmp_path, time):
    left_by(tmp_path / "l", time, **AWAY)
    os.utime(tmp_path / "l", (1e9, 1e9))
    assert watched(tmp_path / "l", time, Watch(clock=time), 600, step=BEAT)[1] == STALE / 4


def test_who_slept_himself_has_watched_nothing(tmp_path, time):
    left_by(tmp_path / "l", time, **AWAY)
    watch = Watch(clock=time)
    assert take(tmp_path / "l", watch) is None
    time.now += 9 * STALE  # this machine was suspended
    assert take(tmp_path / "l", watch) is None
    assert watched(tmp_path / "l", time, watch, 600)[1] > STALE / 2


def test_who_wakes_up_late_finds_out_and_touches_nothing(tmp_path, time):
    asleep = left_by(tmp_path / "l", time, **AWAY)
    heir, _ = watched(tmp_path / "l", time, Watch(clock=time), 600)
    held = (tmp_path / "l").read_bytes()
    assert not asleep.held() and not asleep.renew()
    asleep.release()
    assert (tmp_path / "l").read_bytes() == held and heir.renew()
    heir.release()
    heir.release()  # twice is once
    assert not heir.renew() and not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["unlinked", "another file", "its folder gone"])
def test_a_lease_that_others_removed_is_lost(what, tmp_path, time):
    lease = take(tmp_path / "d" / "l", Watch(clock=time))
    if what == "its folder gone":
        shutil.rmtree(tmp_path / "d")
    else:
        lease.path.unlink()
        lease.path.write_bytes(b"{}") if what == "another file" else None
    assert not lease.renew() and not lease.held()
    lease.release()


class Killed(BaseException):
    "What a signal does: nothing after it happens."


def interrupted(monkeypatch, n, act):
    "Have the n-th of the calls that change a folder be preceded by something else."
    count = iter(range(n))

    def around(real):
        def call(*words, **more):
            if next(count, None) is None and not over:
                over.append(1)
                act()
            return real(*words, **more)

        return call

    over = []
    for name in CALLS:
        monkeypatch.setattr(os, name, around(getattr(os, name)))
    return over


@pytest.mark.parametrize("n", range(11))
def test_of_two_heirs_one_wins_wherever_the_other_stands(n, tmp_path, time, monkeypatch):
    path, got = tmp_path / "l", []
    left_by(path, time, **GONE)
    with monkeypatch.context() as patch:
        over = interrupted(patch, n, lambda: got.append(take(path, Watch(clock=time))))
        got.append(take(path, Watch(clock=time)))
    assert len(over) == (n < 10), "how many calls there are to come between"
    winners = [lease for lease in got if lease]
    assert len(winners) == 1 and winners[0].renew()
    assert [p.name for p in tmp_path.iterdir()] == ["l"]


@pytest.mark.parametrize("n", range(19))
def test_whoever_dies_while_he_takes_over_or_gives_back_is_followed_by_one(
    n, tmp_path, time, monkeypatch
):
    def die():
        raise Killed

    path = tmp_path / "l"
    left_by(path, time, **GONE)
    with monkeypatch.context() as patch:
        interrupted(patch, n, die)
        try:
            take(path, Watch(clock=time)).release()
        except Killed:
            patch.setattr("reidlab.core.lease.living", lambda who: None)  # nobody sees it
            got, took = watched(path, time, Watch(clock=time), 900)
            assert got and got.renew() and took <= 2 * STALE + 20
            return
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("n", range(12))
def test_an_owner_who_gives_back_while_another_takes_over(n, tmp_path, time, monkeypatch):
    path, watch, got = tmp_path / "l", Watch(clock=time), []
    asleep = left_by(path, time, **AWAY)
    for _ in range(6):
        assert take(path, watch) is None
        time.now += 20
    with monkeypatch.context() as patch:
        interrupted(patch, n, asleep.release)
        got.append(take(path, watch))
    got += [take(path, watch)]
    assert len([lease for lease in got if lease]) == 1


def test_a_crowd_takes_every_lease_once(tmp_path):
    for n in range(20):
        left_by(tmp_path / f"{n}", Time(), **GONE)
    won, meet = [], threading.Barrier(4)

    def all_of_them():
        meet.wait()
        won.extend(n for n in range(20) if take(tmp_path / f"{n}"))

    crowd = [threading.Thread(target=all_of_them) for _ in range(4)]
    [one.start() for one in crowd]
    [one.join() for one in crowd]
    assert sorted(won) == list(range(20))


def test_a_full_disk_leaves_no_lease_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            take(tmp_path / "l")
    assert not list(tmp_path.iterdir())
    lease = take(tmp_path / "l")
    monkeypatch.setattr(os, "pwrite", full)
    assert lease.renew()  # it is still ours; the next renewal may succeed


def test_a_run_that_another_has_taken_over_is_left_to_it(tmp_path):
    run = open_run("r", Recipe(name="demo"), verb="train", root=tmp_path)
    other = {"pid": 7, "host": "elsewhere", "where": "its boot", "state": "running", "epoch": 3}
    with pytest.raises(TakenOver, match="taken over by process 7 on elsewhere"), run.working():
        run.beat(epoch=1)
        write_json(run.path / "status.json", run.status() | other)
        run.beat(epoch=2)
    status = run.status()
    assert {key: status[key] for key in other} == other
    assert socket.gethostname() != "elsewhere" and see_lease(tmp_path / "none") is None


class Page:
    "A page of a cell: an epoch a look, from where the run's history stands."

    def __init__(self, log, cell, step, slot, held):
        self.log, self.step = log, step
        self.run = open_run(cell.name, cell.resolved(), verb="train", root=log.parent)
        self.left = 2 - len(self.run.events("epoch"))

    def poll(self):
        if self.step == "train" and self.left > 0:
            self.run.log("epoch", epoch=3 - self.left)
            self.left -= 1
            return None
        with self.log.open("a") as file:
            file.write(f"{self.run.name} {self.step}\n")
        if self.step == "train":
            self.run.finish({"val_mAP": 0.5}, seconds=1.0)
        else:
            write_json(self.run.path / "evaluate/synthetic/metrics.json", {"metrics": {"mAP": 0.4}})
        return 0

    def send_signal(self, sig):
        raise AssertionError("nothing to stop")


def dies_at(point, cells, log):
    "A runner in a process of its own that is killed where it looks at its pages for the n-th time, or takes a lease."
    if pid := os.fork():
        return os.waitpid(pid, 0)[1]
    count = itertools.count(1)

    def around(real):
        def call(*words, **more):
            if next(count) == point:
                os.kill(os.getpid(), 9)
            return real(*words, **more)

        return call

    for name in ("pwrite", "unlink", "replace"):
        setattr(os, name, around(getattr(os, name)))
    run_sweep(cells, partial(Page, log), 2, log.parent, pause=lambda: None)
    os._exit(0)


SEEDS = [*range(4), *(pytest.param(n, marks=pytest.mark.slow) for n in range(4, 10))]


@pytest.mark.parametrize("seed", SEEDS)
def test_of_two_runners_one_is_killed_and_every_cell_is_run_once(seed, tmp_path, monkeypatch, time):
    cells, log = plan_cells("smoke", seeds=[0, 1, 2]), tmp_path / "log"
    point = random.Random(seed).randrange(3, 33)
    assert dies_at(point, cells, log) == 9, "it was killed in the middle"
    before = log.read_text().splitlines() if log.is_file() else []
    if seed % 2:  # the other runner is on another machine, and locks hold on one alone
        monkeypatch.setattr("reidlab.core.lease.living", lambda who: None)
        monkeypatch.setattr("fcntl.flock", refused)
    left = [cell.name for cell in cells if see_lease(tmp_path / cell.name / ".lease")]

    def pause():
        time.now += 20

    watch = Watch(SIGNS, clock=time)
    table = run_sweep(cells, partial(Page, log), 2, tmp_path, pause=pause, others=watch)
    assert [place.state for place in table] == ["finished"] * 3
    steps = log.read_text().splitlines()
    lost = steps.count(before[-1]) - 1 if before else 0  # killed between its end and its record
    assert len(steps) - lost == len(set(steps)) == 6 and lost <= 1
    for cell in cells:
        assert [e["epoch"] for e in RunFolder(tmp_path / cell.name).events()] == [1, 2]
    assert time.now - 1000 >= (STALE if seed % 2 and left else 0)
    assert not list(tmp_path.glob("*/.lease"))


def refused(*_):
    raise OSError(37, "No locks available")
