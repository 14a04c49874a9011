"""A sweep: its plan under all grids, its runner under bad luck; with the real pages: test_jobs.py."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from functools import partial

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from reidlab.core.names import plain_name
from reidlab.core.run import open_run, write_json
from reidlab.jobs.command import finished
from reidlab.jobs.grid import plan_cells
from reidlab.jobs.parameters import SweepJob, check_parameters
from reidlab.jobs.sweep import cell_state, check_sweep, claim, open_sweep, run_sweep, stop_all

VALUES = {
    "train.clip": st.floats(1e-6, 1, allow_nan=False),
    "train.epochs": st.integers(1, 99),
    "data.augment.flip.probability": st.sampled_from([0.0, 0.25, 1.0]),
    "search.clip": st.floats(1e-6, 1, allow_nan=False),
    "loss.triplet.margin": st.sampled_from([0.1, 0.3, "soft"]),
    "model.backbone.*.weights": st.text("ab:/ .-_", max_size=6),
}
grids = st.lists(st.sampled_from(list(VALUES)), unique=True, max_size=3).flatmap(
    lambda keys: st.fixed_dictionaries(
        {k: st.lists(VALUES[k], min_size=1, max_size=3, unique=True) for k in keys}
    )
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "A folder with one recipe, quick to read."
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "plain.yaml").write_text("train: {epochs: 3}\n")
    return folder


@given(grids, st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True))
@settings(deadline=None, max_examples=60)
def test_every_combination_has_a_folder_of_its_own_or_the_plan_is_refused(shop, grid, seeds):
    try:
        cells = plan_cells("plain", grid=grid, seeds=seeds, folder=shop)
    except ValueError as wrong:
        assert "two cells would share the run" in str(wrong)
        return
    assert [plain_name(c.name) for c in cells] == list(dict.fromkeys(c.name for c in cells))
    wanted = list(itertools.product(*grid.values(), seeds))
    assert [(*c.overrides.values(), c.seed) for c in cells] == wanted
    again = plan_cells("plain", grid=json.loads(json.dumps(grid)), seeds=seeds, folder=shop)
    assert cells == again


def test_a_job_takes_its_lists_as_text():
    given = {"rows": '["all"]', "grid": '{"train.clip": [0.1]}', "seeds": "[0, 1]", "overrides": ""}
    job = check_parameters(given, SweepJob)
    assert (job.rows, job.grid, job.seeds, job.overrides) == (
        ["all"],
        {"train.clip": [0.1]},
        [0, 1],
        {},
    )
    with pytest.raises(ValueError, match=r"parameter seeds: .*needs JSON such as '\[0, 1, 2\]'"):
        check_parameters({"seeds": "0 1"}, SweepJob)
    with pytest.raises(ValueError, match="parameter seeds"):
        check_parameters({"seeds": [-1]}, SweepJob)


class Page:
    "A step that ends at once and leaves what the real page would."

    def __init__(self, runs, log, cell, step, slot, held):
        os.fstat(held)  # an open claim
        log.append((cell.name, step))
        run = open_run(cell.name, cell.resolved(), verb="train", root=runs)
        if step == "train":
            run.finish({"val_mAP": 0.5}, seconds=1.0)
        else:
            write_json(run.path / "evaluate/synthetic/metrics.json", {"metrics": {"mAP": 0.4}})

    def poll(self):
        return 0

    def send_signal(self, sig):
        raise AssertionError("nothing to stop")


def test_two_sweeps_at_once_run_every_cell_once(tmp_path):
    cells, log, tables = plan_cells("smoke", seeds=range(12)), [], {}
    meet = threading.Barrier(2)

    def sweep(who):
        meet.wait()
        launch = partial(Page, tmp_path, log)
        tables[who] = run_sweep(cells, launch, 3, tmp_path, pause=lambda: None)

    threads = [threading.Thread(target=sweep, args=[who]) for who in "ab"]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert sorted(log) == sorted((c.name, s) for c in cells for s in ("train", "evaluate"))
    for cell, a, b in zip(cells, tables["a"], tables["b"], strict=True):
        assert "finished" in (a.state, b.state), cell.name
        assert cell_state(cell, tmp_path)[0] == "finished"


def test_a_card_of_a_sweep_that_is_done_does_not_wait_for_first_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("REIDLAB_RUNS_DIR", str(tmp_path))
    job = SweepJob(recipe="smoke", seeds=[3])
    assert "not known before the first steps" in str(open_sweep(job).card)
    run_sweep(plan_cells("smoke", seeds=[3]), partial(Page, tmp_path, []), 1, tmp_path)
    told = str(open_sweep(job).card)
    assert "1: 1 group, seed 3\n" in told and "1 finished, 0 to do" in told
    assert "Time: 1 s, measured" in told and "not known" not in told


def test_a_claim_ends_with_the_process_that_holds_it(tmp_path):
    code = (
        "import sys; from reidlab.jobs.sweep import claim; print(claim(sys.argv[1]), flush=True);"
        " sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=-1, stdout=-1, text=True
    ) as other:
        assert other.stdout.readline().strip().isdigit()
        assert claim(tmp_path) is None
        other.kill()
        other.wait()
    held = claim(tmp_path)
    assert held is not None
    os.close(held)


def test_a_page_that_ignores_the_interrupt_is_ended():
    code = (
        "import signal; signal.signal(2, signal.SIG_IGN); print('on', flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=-1, text=True) as deaf:
        assert deaf.stdout.readline() == "on\n"
        stop_all([deaf], grace=0.2)
        assert deaf.poll() == -signal.SIGTERM


def test_a_page_that_ends_well_and_leaves_nothing_has_failed(tmp_path):
    class Idle(Page):
        def __init__(self, *_):
            pass

    table = run_sweep(plan_cells("smoke"), Idle, runs=tmp_path, pause=lambda: None)
    assert (table[0].state, table[0].about) == ("failed", "train: no result was left")


@pytest.mark.parametrize("file", ["environment.json", "metrics.json"])
@pytest.mark.parametrize("text", ["{", None])
def test_a_cell_whose_record_is_damaged_stops_no_other(file, text, tmp_path):
    cells, log = plan_cells("smoke", seeds=[0, 1]), []
    run_sweep(cells[:1], partial(Page, tmp_path, log), 1, tmp_path)
    path = tmp_path / cells[0].name / file
    path.write_text(text) if text else path.unlink()
    table = run_sweep(cells, partial(Page, tmp_path, log), 1, tmp_path, pause=lambda: None)
    assert table[1].state == "finished"
    assert table[0].state == "failed" and file in table[0].about


def test_a_step_that_cannot_start_gives_its_claim_back(tmp_path):
    def broken(*_):
        raise FileNotFoundError("no papermill here")

    cells = plan_cells("smoke")
    with pytest.raises(FileNotFoundError, match="no papermill here"):
        run_sweep(cells, broken, runs=tmp_path)
    held = claim(tmp_path / cells[0].name)
    assert held is not None
    os.close(held)


@pytest.mark.parametrize(
    "ends, states, word, code",
    [
        (["stopped", "stopped"], ["stopped", "stopped"], "goes on where it was", 75),
        (["stopped", "crashed"], ["stopped", "failed"], "Mend the cause", 1),
    ],
)
def test_a_stopped_cell_is_to_be_continued_and_has_not_failed(ends, states, word, code, tmp_path):
    cells = plan_cells("smoke", seeds=[0, 1])

    def launch(cell, step, slot, held):
        run = open_run(cell.name, cell.resolved(), verb="train", root=tmp_path)
        run.beat(ends[cell.seed])
        return subprocess.Popen(["false" if ends[cell.seed] == "crashed" else "true"])

    table = run_sweep(cells, launch, runs=tmp_path)
    assert [place.state for place in table] == states
    with pytest.raises(RuntimeError, match=word):
        check_sweep(table)
    with pytest.raises(typer.Exit) as left:  # as the command ends
        finished(lambda: check_sweep(table))
    assert left.value.exit_code == code
