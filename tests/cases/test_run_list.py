"How runs are told as they stand: by those who look at their folders from outside."

import os
import shutil
import socket
import time

import pytest

from reidlab.core.files import clock_of, write_json
from reidlab.core.recipe import Recipe
from reidlab.core.run import TICK, RunFolder, open_run, state_of
from reidlab.jobs.command import main
from reidlab.jobs.run_list import state_word

AWAY = {"host": "elsewhere", "pid": 7, "where": "its boot"}
NAMESAKE = {"host": socket.gethostname(), "pid": 7, "where": "its boot"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("REIDLAB_RUNS_DIR", str(tmp_path))
    run = open_run("r", Recipe(name="demo"), verb="train", root=tmp_path)
    run.beat("running", epoch=2)
    return run


def told(run, silent=0.0, **change):
    "Have a run's pulse say something else, and have been touched so many seconds ago."
    path = run.path / "status.json"
    write_json(path, run.status() | change)
    then = clock_of(run.path) - silent
    os.utime(path, (then, then))


@pytest.mark.parametrize(
    ("silent", "change", "word"),
    [
        (0, {}, "running"),
        (30, {}, "running"),
        (50, {}, "stalled"),
        (0, {"pid": 2**22 + 1}, "crashed"),
        (0, {"began": "another boot 17"}, "crashed"),  # its number was given to another
        (0, AWAY, "running"),
        (0, AWAY | {"beat": time.time() - 3600}, "running"),  # that clock is an hour behind
        (0, AWAY | {"beat": time.time() + 3600}, "running"),
        (50, AWAY | {"beat": time.time() + 3600}, "stalled"),
        (50, AWAY, "stalled"),
        (0, NAMESAKE, "running"),  # two machines of one name
        (1e9, NAMESAKE, "crashed"),  # or this one, before it was started again
        (0, {"place": "17"}, "crashed"),  # copied while it was written
        (0, AWAY | {"place": "17"}, "running"),  # or seen through another file system
        (50, AWAY | {"place": "17"}, "crashed"),
        (900, {"state": "stopped"}, "stopped"),
        (900, AWAY | {"state": "crashed"}, "crashed"),
        (900, {"state": "finished"}, "finished"),
    ],
)
def test_a_run_is_told_by_its_process_and_its_pulse(silent, change, word, run, capsys):
    told(run, silent, **change)
    assert state_of(run) == word
    assert main(["runs", "r", "--state"]) == 0 and capsys.readouterr().out == f"{word}\n"


def test_a_clock_of_ours_that_is_an_hour_off_changes_nothing(run, monkeypatch):
    told(run, **AWAY)
    for off in (-3600, 3600):
        now = time.time() + off
        monkeypatch.setattr(time, "time", lambda now=now: now)
        assert state_of(run) == "running"
        with pytest.raises(ValueError, match="is being written by process 7 on elsewhere"):
            open_run("r", Recipe(name="demo"), verb="train", root=run.path.parent)
    told(run, 130, **AWAY)
    open_run("r", Recipe(name="demo"), verb="train", root=run.path.parent)


def test_a_process_that_stands_still_is_stalled_at_once(run):
    child, go = os.pipe(), os.pipe()
    if (pid := os.fork()) == 0:
        RunFolder(run.path).beat("running")
        os.write(child[1], b"1")
        os.read(go[0], 1)
        os._exit(0)
    os.read(child[0], 1)
    seen = [state_of(run)]
    os.kill(pid, 19)
    os.waitpid(pid, os.WUNTRACED)
    seen.append(state_of(run))
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    assert [*seen, state_of(run)] == ["running", "stalled", "crashed"]


def test_the_pulse_is_touched_while_the_work_keeps_to_what_it_said(run, monkeypatch):
    monkeypatch.setattr("reidlab.core.run.TICK", TICK / 1e4)
    path, late, asked = run.path / "status.json", [], []
    old = clock_of(run.path) - 1000

    def on_time():
        asked.append(1)
        return not late

    def ticks(n):
        before = len(asked)
        while len(asked) < before + n:
            os.sched_yield()

    with run.working(on_time):
        os.utime(path, (old, old))
        ticks(2)
        assert state_of(run) == "running"
        late.append(1)
        ticks(2)
        os.utime(path, (old, old))
        ticks(2)
        assert state_of(run) == "stalled"


def test_what_cannot_be_read_or_was_only_prepared_has_a_word_too(run, capsys):
    shutil.copytree(run.path, run.path.parent / "torn")
    (run.path.parent / "torn" / "status.json").write_bytes(b'{"state": "run')
    (run.path.parent / "prepared").mkdir()
    with pytest.warns(UserWarning, match=r"status\.json in .*torn cannot be read"):
        assert main(["runs", "prepared", "torn", "--state"]) == 0
    assert capsys.readouterr().out == "new\ncrashed\n"
    assert main(["runs", "torm", "--state"]) == 1
    assert "Close names: torn" in capsys.readouterr().err
    with pytest.raises(ValueError, match="plain folder name"):
        state_word("../r")
