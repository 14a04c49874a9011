"JupyterLab at a workbench: where it is rooted, what it trusts, and what becomes of a job's page."

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.sign import NotebookNotary
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from reidlab.core.settings import project_root
from reidlab.jobs import lab
from reidlab.jobs.command import main
from reidlab.jobs.workbench import new
from reidlab.viz.contents import written_pages

SHOWN = new_output("display_data", {"text/html": "<b>made here</b>"})


@pytest.fixture
def started(monkeypatch):
    "What JupyterLab would have been started with."
    calls = []
    monkeypatch.setattr(os, "execv", lambda program, words: calls.append((program, words)))
    return calls


def test_a_workbench_opens_at_its_front_page_from_wherever_one_stands(
    tmp_path, monkeypatch, started
):
    bench = new(tmp_path / "my bench")
    monkeypatch.chdir(bench / "nbs")
    monkeypatch.delenv("REIDLAB_ROOT", raising=False)
    assert main(["lab", "--no-browser", "--port", "9999"]) == 0
    program, words = started[0]
    assert program == sys.executable and words[1:3] == ["-m", "jupyterlab"]
    assert f"--ServerApp.root_dir={bench}" in words
    assert "--LabApp.default_url=/lab/tree/nbs/index.ipynb" in words
    assert words[-3:] == ["--no-browser", "--port", "9999"]


def test_a_checkout_opens_at_the_front_page(monkeypatch, started):
    assert main(["lab"]) == 0
    assert "--LabApp.default_url=/lab/tree/nbs/index.ipynb" in started[0][1]
    assert lab.lab_words(project_root())[0] == f"--ServerApp.root_dir={project_root()}"


def test_without_jupyterlab_or_a_workbench_there_is_one_line(
    monkeypatch, started, tmp_path, capsys
):
    monkeypatch.setenv("REIDLAB_ROOT", str(tmp_path))
    assert main(["lab"]) == 1
    assert "is no workbench" in capsys.readouterr().err
    monkeypatch.setattr(lab, "find_spec", lambda name: None)
    assert main(["lab"]) == 1
    assert 'pip install "reidlab[lab]"' in capsys.readouterr().err
    assert started == []


# --- trust -------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "A checkout whose modules are the ones that run, with pages in every state."
    root = tmp_path / "checkout"
    root.mkdir()
    page = new_notebook(cells=[new_code_cell("1", outputs=[SHOWN], id="a")])
    for name in ("kept", "changed", "foreign", "staged"):
        page.cells[0].source = name
        nbformat.write(page, root / f"{name}.ipynb")
    page.cells[0].source = "elsewhere"
    nbformat.write(new_notebook(cells=[new_code_cell("1", id="b")]), root / "bare.ipynb")
    (root / "linked.ipynb").symlink_to(tmp_path / "elsewhere.ipynb")
    nbformat.write(page, tmp_path / "elsewhere.ipynb")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(root)]
    for words in (["init", "-q"], ["add", "kept*", "ch*", "bare*", "linked*", "staged*"]):
        subprocess.run([*git, *words], check=True)
    subprocess.run([*git, "commit", "-qm", "all"], check=True)
    page.cells[0].source = "new"
    for name in ("changed", "staged"):
        nbformat.write(page, root / f"{name}.ipynb")
    subprocess.run([*git, "add", "staged.ipynb"], check=True)
    monkeypatch.setattr(lab, "package_folder", lambda: root / "reidlab")
    return root


def test_pages_are_trusted_as_they_were_committed_and_no_other(checkout, tmp_path, monkeypatch):
    notary = NotebookNotary(db_file=":memory:", secret=b"s")
    assert lab.book_pages(checkout) == ["bare.ipynb", "kept.ipynb"]
    assert lab.trust(checkout, notary) == 1  # a page without outputs needs no trust
    assert lab.trust(checkout, notary) == 0
    trusted = {
        path.stem
        for path in checkout.glob("*.ipynb")
        if notary.check_signature(nbformat.read(path, as_version=4))
    }
    assert trusted == {"kept"}
    monkeypatch.setattr(lab, "package_folder", lambda: tmp_path / "site-packages" / "reidlab")
    assert lab.book_pages(checkout) == []  # another checkout than the one that runs


# --- a job's page ------------------------------------------------------------------------------

FORM = new_notebook(
    cells=[
        new_markdown_cell("# Train", id="t"),
        new_code_cell(
            'recipe = "smoke"\nrun = ""\nseed = 0', metadata={"tags": ["parameters"]}, id="p"
        ),
        new_code_cell("1 + 1", id="c"),
    ]
)


def filled(parameters=None, title="# Train"):
    page = nbformat.from_dict(json.loads(json.dumps(FORM)))
    page.cells[0].source, page.cells[1].source = title, parameters or page.cells[1].source
    page.cells[2].outputs, page.cells[2].execution_count = [SHOWN], 7
    page.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)"}}
    return page


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("REIDLAB_RUNS_DIR", str(tmp_path / "runs"))
    for name in ("nbs", "data_prep", "reports", "runs/smoke-train-s3", "runs/mine"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("nbs/train", "data_prep/own", "reports/01_asked", "nbs/broken"):
        nbformat.write(FORM, tmp_path / f"{name}.ipynb")
    return tmp_path


def saved(bench, path, page, kind="notebook"):
    "What would be written, and what else was kept."
    model = {"type": kind, "content": page}
    lab.keep_form(model, path, SimpleNamespace(root_dir=str(bench)))
    return model["content"], [
        p.relative_to(bench / "runs").as_posix() for p in bench.rglob("*.lab.ipynb")
    ]


@pytest.mark.parametrize(
    ("parameters", "kept"),
    [
        ('recipe = "smoke"\nrun = ""\nseed = 3', "smoke-train-s3"),
        ('recipe = "smoke"\nrun = "mine"\nseed = 0', "mine"),
        ('recipe = "smoke"\nrun = ""\nseed = 4', "pages"),  # has not begun
        ('recipe = "smoke"\nrun = "../../etc"\nseed = 0', "pages"),
        ('recipe = "smoke"\nrun = ["mine"]\nseed = 0', "pages"),
        ('recipe = "smoke"\nrun = __import__("os").getcwd()\nseed = 0', "pages"),
        ('recipe = "smoke"\nrun = ""\nseed = 3 + 4', "pages"),  # worked out
        ('recipe = "smoke"\nrun = "mine\nseed = 0', "pages"),  # a quote left open
        ("recipe = ", "pages"),  # half typed
    ],
)
def test_a_filled_form_goes_to_its_run_and_the_page_stays(bench, parameters, kept):
    page = filled(parameters)
    written, copies = saved(bench, "nbs/train.ipynb", page)
    assert copies == [f"{kept}/train.lab.ipynb"]
    copy = nbformat.read(bench / "runs" / copies[0], as_version=4)
    assert copy.cells[1].source == parameters and copy.cells[2].outputs == [SHOWN]
    assert written == FORM


def test_an_edited_page_is_saved_where_it_is(bench):
    written, _ = saved(
        bench, "nbs/train.ipynb", filled("recipe = 'a'\nrun = ''\nseed = 1", "# Learn")
    )
    assert written["cells"][0]["source"] == "# Learn"
    assert written["cells"][1]["source"] == FORM.cells[1].source
    another = "recipe = 'a'\nrun = ''\nseed = 1\nmore = 2"  # another form
    written, _ = saved(bench, "nbs/train.ipynb", filled(another))
    assert written["cells"][1]["source"] == another


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("reports/01_asked.ipynb", "notebook"),  # a report keeps its outputs
        ("nbs/new.ipynb", "notebook"),  # not there yet
        ("nbs/00_core/00_core.ipynb", "notebook"),
        ("runs/mine/train.lab.ipynb", "notebook"),
        ("nbs/train.ipynb", "file"),
    ],
)
def test_other_pages_are_saved_as_ever(bench, path, kind):
    page = filled()
    assert saved(bench, path, page, kind) == (page, [])


# --- kept pages --------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
HELD = '"outputs": [\n'
TAKEN = re.compile(r"<(svg|script|iframe|canvas|object)\b", re.I)  # by the cleaner


@pytest.mark.parametrize(
    "page",
    [p for p in written_pages(ROOT) if HELD in p.read_text("utf-8")],
    ids=lambda p: p.relative_to(ROOT).as_posix(),
)
def test_what_a_page_keeps_is_seen_without_trust(page):
    for cell in nbformat.read(page, as_version=4).cells:
        for output in cell.get("outputs", []):
            forms = output.get("data", {})
            assert not [kind for kind in forms if "widget" in kind], (
                "it needs a kernel that is gone"
            )
            assert "image/svg+xml" not in forms or "image/png" in forms, cell.source
            if found := TAKEN.search("".join(forms.get("text/html", ""))):
                pytest.fail(f"{found[0]}> is taken out of a page without trust:\n{cell.source}")
