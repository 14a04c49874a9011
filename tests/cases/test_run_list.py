"How runs are told as they stand: by those who look at their folders from outside."

import os
import shutil
import socket
import time

import pytest

from reidlab.core.files import clock_of, write_bytes, write_json
from reidlab.core.recipe import Recipe
from reidlab.core.run import TICK, RunFolder, open_run, state_of
from reidlab.jobs.command import main
from reidlab.jobs.run_list import ORDER, Runs, run_details, run_table, state_word

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
    assert main(["runs", "--state"]) == 1
    assert "for each run that is named" in capsys.readouterr().err


def damage_of(kind, path):
    "Spoil a run in one way."
    file, content = DAMAGE[kind]
    if content is None:
        (path / file).unlink()
    elif content == "folder":
        (path / file).unlink(missing_ok=True)
        (path / file).mkdir()
    else:
        write_bytes(path / file, content)


DAMAGE = {
    "torn pulse": ("status.json", b'{"state": "run'),
    "empty pulse": ("status.json", b""),
    "no text": ("status.json", b"\xff\xfe\x00"),
    "a later format": ("status.json", b'{"format": 9, "state": "running"}'),
    "no such state": ("status.json", b'{"state": "dreaming"}'),
    "epoch is a word": ("status.json", b'{"state": "running", "epoch": "three"}'),
    "pulse is a folder": ("status.json", "folder"),
    "no recipe": ("recipe.yaml", None),
    "recipe is no text": ("recipe.yaml", b"name: \xff\xfe"),
    "recipe is no yaml": ("recipe.yaml", b"name: [\n"),
    "recipe is a folder": ("recipe.yaml", "folder"),
    "torn figures": ("metrics.json", b'{"metr'),
    "figures are a list": ("metrics.json", b'{"format": 1, "metrics": [1]}'),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_a_row_with_its_fault(kind, run, capsys):
    run.finish({"val_mAP": 0.5}, seconds=1.0)
    write_json(run.path.parent / "good" / "submit.json", {"state": "queued", "number": "17"})
    damage_of(kind, run.path)
    table = run_table(roots=[run.path.parent])
    assert dict(table["state"]) == {"r": "damaged", "good": "queued"} and table.loc["r", "about"]
    assert main(["runs"]) == 0 and "damaged" in capsys.readouterr().out
    assert "damaged" in run_details("r", [run.path.parent])


def test_a_folder_of_another_user_that_may_not_be_read_is_a_row(run, monkeypatch):
    real = type(run.path).read_text

    def refused(path, *words, **more):
        if path.name == "status.json":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *words, **more)

    monkeypatch.setattr(type(run.path), "read_text", refused)
    row = run_table(roots=[run.path.parent]).loc["r"]
    assert row["state"] == "damaged" and "ermission denied" in row["about"]


def test_a_seal_that_is_broken_is_told_beside_the_state(run):
    status = (run.path / "status.json").read_bytes().replace(b'"epoch": 2', b'"epoch": 3')
    write_bytes(run.path / "status.json", status)
    row = run_table(roots=[run.path.parent]).loc["r"]
    assert row["state"] == "running" and "damaged or edited" in row["about"]


@pytest.mark.parametrize(
    ("events", "tests", "finished", "shown"),
    [
        ([], {}, False, ""),
        ([{"loss": 2.0}], {}, False, "loss 2.000"),
        (
            [{"loss": 2.0, "val_mAP": 0.25}, {"loss": 1.0, "val_mAP": 0.5}],
            {},
            False,
            "val_mAP 50.0",
        ),
        ([{"val_mAP": 0.25}], {}, True, "val_mAP 75.0"),
        ([], {"market": {"mAP": 0.3}}, True, "mAP 30.0"),
        ([], {"shapes": {"top1": 0.9}}, True, "top1 90.0"),
    ],
)
def test_the_figure_is_that_of_the_run_s_stage(events, tests, finished, shown, run):
    for n, event in enumerate(events, 1):
        run.log("epoch", epoch=n, **event)
    run.log("warning", about="x" * 70_000)
    if finished:
        run.finish({"val_mAP": 0.75}, seconds=1.0)
    for name, figures in tests.items():
        write_json(run.path / "evaluate" / name / "metrics.json", {"metrics": figures})
    run.log("epoch", epoch=len(events), **events[-1]) if events else None
    cells = Runs(roots=[run.path.parent]).cells
    assert cells.loc["r"].get("figure", "") == shown


def test_those_to_look_at_come_first_and_every_state_has_a_place(run):
    root = run.path.parent
    for name, change in {
        "away": AWAY,
        "old": {"state": "stopped", "reason": "an interrupt"},
        "dead": {"pid": 2**22 + 1},
        "done": {"state": "finished"},
    }.items():
        shutil.copytree(run.path, root / name)
        told(RunFolder(root / name), **change | {"place": ""})
    told(RunFolder(root / "away"), 50)
    write_json(root / "queued" / "submit.json", {"state": "queued", "number": "17"})
    (root / "pages").mkdir()
    table = run_table(roots=[root])
    assert list(table.index) == ["away", "dead", "r", "old", "queued", "done"]
    assert set(table["state"]) <= set(ORDER)
    assert list(run_table(["done", "r"], [root]).index) == ["done", "r"]
    assert "an interrupt" in run_details("old", [root])
    with pytest.raises(ValueError, match="Close names: done"):
        run_table(["dome"], [root])


def test_what_files_say_is_text_in_a_page(run):
    told(run, state="crashed", error="<script>alert(1)</script>", host="<img src=x>")
    page = Runs(roots=[run.path.parent])._repr_mimebundle_()["text/html"]
    assert "<script" not in page and "<img" not in page and "&lt;script" in page


@pytest.mark.parametrize(
    ("said", "squeue", "state", "words"),
    [
        ({"state": "failed", "why": "sbatch refused: Invalid gres"}, "exit 1", "refused", "gres"),
        ({"state": "meant"}, "exit 1", "queued", "squeue --me"),
        ({"state": "queued", "number": "7"}, "exit 1", "queued", "job 7"),  # it does not answer
        ({"state": "queued", "number": "7"}, "echo 7 PENDING", "queued", "job 7, PENDING"),
        ({"state": "queued", "number": "7"}, "echo '7_0 RUNNING'", "queued", "job 7, RUNNING"),
        ({"state": "queued", "number": "7"}, "exit 0", "crashed", "never began: see its slurm.log"),
        ({"state": "queued", "number": "7", "command": ["reidlab", "sweep", "smoke"]}, "exit 0", "over", "rows of their own"),
        ({"state": "queued", "number": [7]}, "exit 0", "damaged", "number [7]"),
        ({"state": "queued"}, "exit 0", "damaged", "number None"),
    ],
)  # fmt: skip
def test_what_was_submitted_is_told_by_what_the_queue_says(
    said, squeue, state, words, tmp_path, monkeypatch
):
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    write_json(tmp_path / "runs" / "sent" / "submit.json", said)
    row = run_table(roots=[tmp_path / "runs"]).loc["sent"]
    assert row["state"] == state and words in row["about"]


def test_a_link_to_itself_and_a_terminal_s_signs_spoil_no_list(run):
    told(run, state="crashed", error="\x1b[31mred\x07")
    (run.path.parent / "loop").symlink_to("loop")
    (run.path.parent / "gone").symlink_to("nowhere")
    assert list(run_table(roots=[run.path.parent]).index) == ["r"]
    listed = Runs(roots=[run.path.parent])
    assert "?[31mred?" in repr(listed) and "\x1b" not in repr(listed) + listed.html
