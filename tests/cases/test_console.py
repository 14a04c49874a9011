"""What an error of ours says at the console: one line, ten names at most, and how to see them all."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
import typer

import reidlab
from reidlab.core.explain import explain
from reidlab.core.recipe import load_recipe
from reidlab.core.run import find_run
from reidlab.core.settings import settings
from reidlab.evaluation.groups import group_table
from reidlab.jobs.command import VERBS, finished, main
from reidlab.jobs.console import OURS, PageEngine, briefly, message_of
from reidlab.jobs.sets import prepare
from reidlab.losses.catalogue import checked_terms
from reidlab.viz.curves import plot_history

ROOT = Path(__file__).parents[2]


def recipe(overrides):
    return lambda lab: load_recipe("smoke", overrides=overrides)


def many_runs(lab):
    for i in range(40):
        (lab.runs / f"run{i}").mkdir()
        (lab.runs / f"run{i}/recipe.yaml").write_text("")
    find_run("smoke-train-s0")


def a_setting(lab):
    (lab.root / "settings.ini").write_text("[reidlab]\nzzz = 1\n")
    settings(lab.root)


def a_name(lab):
    return reidlab.zzz


MANY = {  # what is looked up in vain: what is asked, what is said to show all
    "a part": (recipe({"model.backbone": "zzz"}), "reidlab explain model.backbone shows all"),
    "another part": (recipe({"loss": {"zzz": {}}}), "reidlab explain loss shows all"),
    "a key": (recipe({"train." + "z" * 30: 1}), "reidlab explain train shows all"),
    "a place": (lambda lab: explain("zzz"), "reidlab explain shows all"),
    "a recipe": (lambda lab: load_recipe("zzz"), "recipes/README.md shows all"),
    "a run": (many_runs, "reidlab runs shows all"),
    "a setting": (a_setting, "settings.ini shows all"),
    "a name of the package": (a_name, "dir(reidlab) shows all"),
    "a data page": (lambda lab: prepare("zzz"), "reidlab prepare shows all"),
    "no loss": (
        lambda lab: checked_terms({"softmax": {"weight": 0.0}}),
        "reidlab explain loss shows all",
    ),
    "a group": (lambda lab: group_table(dict.fromkeys("abcdefghijklmnop"), "zzz"), "; got"),
    "a history": (lambda lab: plot_history(pd.DataFrame(columns=[*"abcdefghijklmnop"])), ". Has"),
}


@pytest.mark.parametrize("what", MANY)
def test_ten_names_and_how_to_see_the_others(what, lab):
    ask, see = MANY[what]
    with pytest.raises((ValueError, AttributeError)) as wrong:
        ask(lab)
    line = str(wrong.value)
    assert "\n" not in line and len(line) < 500
    assert re.search(rf"(?:[^,]+, ){{9}}[^,]+ and \d+ more.*{re.escape(see)}", line), line


# --- papermill -------------------------------------------------------------------------------

STEP = f"File \x1b[32m{OURS}/core/recipe.py:603\x1b[39m, in load_recipe(name, seed)"
TORCH = "File /env/lib/python3.11/site-packages/torch/nn/module.py:12, in forward(x)"
ERRORS = {  # (kind, message, traceback): what the console shows instead of everything
    "ours": (("ValueError", "recipe 'x' not found.", [STEP]), "ValueError: recipe 'x' not found."),
    "ours, two lines": (("PartError", "a\nb", [STEP]), "PartError: a\nb"),
    "ours after torch": (("RuntimeError", "no", [TORCH, STEP]), "RuntimeError: no"),
    "torch": (("RuntimeError", "shapes", [STEP, TORCH]), None),
    "a slip": (("KeyError", "'x'", [STEP]), None),
    "without a word": (("ValueError", "", [STEP]), None),
    "a cell's own": (("ValueError", "no", ["Cell In[2], line 2"]), None),
    "a dead kernel": (("CellExecutionError", "", []), None),
    "another reidlab": (("ValueError", "no", [STEP.replace(str(OURS), "/else/reidlab")]), None),
}


@pytest.mark.parametrize("what", ERRORS)
def test_whose_error_it_is(what, monkeypatch, capsys):
    (kind, said, traceback), line = ERRORS[what]
    assert message_of(kind, said, traceback) == line
    error = SimpleNamespace(ename=kind, evalue=said, traceback=traceback)
    usual = []
    hook = briefly(lambda *given: usual.append(given))
    Raised = type("PapermillExecutionError", (Exception,), {})
    for program, short in {
        "papermill": True,
        "papermill/__main__.py": True,
        "mine.py": False,
    }.items():
        monkeypatch.setattr(sys, "argv", [f"/env/bin/{program}"])
        usual.clear()
        hook(Raised, error, None)
        shown = f"{line}\n" if short and line else ""
        assert capsys.readouterr().err == shown and bool(usual) != bool(shown)


def test_the_engine_is_papermills_own():
    from papermill.engines import NBClientEngine

    for name in ("execute_notebook", "nb_kernel_name", "nb_language"):
        assert getattr(PageEngine, name) == getattr(NBClientEngine, name)


def test_papermill_says_one_line_and_the_page_keeps_the_rest(tmp_path):
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    about = tmp_path / "packages/reidlab_here-0.dist-info"  # as pip would write it
    about.mkdir(parents=True)
    lines = [f"{k} = {v}\n" for k, v in points["papermill.engine"].items()]
    (about / "entry_points.txt").write_text("[papermill.engine]\n" + "".join(lines))
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: reidlab-here\nVersion: 0\n")
    path = os.pathsep.join([str(ROOT), str(about.parent), os.environ.get("PYTHONPATH", "")])
    page = nbformat.v4.new_notebook()
    source = "from reidlab.core.recipe import load_recipe\n\nload_recipe('smoek')"
    page.cells = [nbformat.v4.new_code_cell(source)]
    nbformat.write(page, tmp_path / "page.ipynb")
    words = [str(tmp_path / name) for name in ("page.ipynb", "out.ipynb")]
    kernel = ["-k", "python3", "--no-progress-bar"]
    done = subprocess.run(
        [sys.executable, "-m", "papermill", *words, *kernel],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "JUPYTER_PREFER_ENV_PATH": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == "ValueError: recipe 'smoek' not found in recipes/. Close names: smoke."
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    (kept,) = [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"]
    assert len("\n".join(kept["traceback"]).splitlines()) > 10


# --- reidlab ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["train", "smoek"],
            "ValueError: recipe 'smoek' not found in recipes/. Close names: smoke.",
        ),
        (
            ["train", "smoke", "--gpu", "4"],
            "ValueError: parameter 'gpu' not found. Close names: gpus.",
        ),
        (["evaluate", "none"], "ValueError: run 'none' not found"),
        (
            ["prepare", "vehicles8"],
            "FileNotFoundError: data set 'vehicles8' is not here. Get a clone",
        ),
        (
            ["prepare", "vehicles8", "--source", "x"],
            "FileNotFoundError: source 'x' does not exist.",
        ),
        (["explain", "zzz"], "ValueError: key 'zzz' not found."),
        (["sweep", "smoke", "--grid", "{"], "ValueError: parameter grid: the text is not JSON"),
    ],
)
def test_a_verb_ends_in_one_line_and_not_in_0(words, says, lab, capsys):
    assert main(words) == 1
    said = capsys.readouterr()
    assert said.err.startswith(says) and said.err.count("\n") == 1, said.err


@pytest.mark.parametrize(
    "wrong", [NotADirectoryError(20, "Not a directory", "runs/a"), RuntimeError("no")]
)
def test_what_the_machine_refuses_is_one_line_too(wrong, capsys):
    def work():
        raise wrong

    with pytest.raises(typer.Exit) as end:
        finished(work)
    assert end.value.exit_code == 1
    assert capsys.readouterr().err == f"{type(wrong).__name__}: {wrong}\n"


def test_a_verb_says_what_came_of_it_and_what_to_type_next():
    trained = {"run": "a", "selection": "best val_mAP 0.8, epoch 10"}
    assert VERBS["train"].told(None, trained).endswith("epoch 10. Next: reidlab evaluate a")
    tested = {"run": "a", "dataset": "d", "protocol": {"checkpoint": "best.pt, epoch 10"}}
    people = {"metrics": {"mAP": 0.4369, "R1": 0.5, "R5": 0.6, "mINP": 0.2, "cmc": [0.5]}}
    people |= {"baselines": {"histogram": {"mAP": 0.027}}}
    classes = {"metrics": {"top1": 0.9, "top5": 1.0}}
    told = [VERBS["evaluate"].told(None, tested | more) for more in (people, classes)]
    line = "a on d: mAP 43.7, R1 50.0, mINP 20.0 per cent (best.pt, epoch 10)"
    assert told[0] == f"{line}; a colour histogram has mAP 2.7"
    assert told[1] == "a on d: top1 90.0, top5 100.0 per cent (best.pt, epoch 10)"
