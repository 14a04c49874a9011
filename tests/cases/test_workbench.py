"A workbench: made whole or not at all, and worked in with what it lacks taken from the package."

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, facts

import reidlab
from reidlab.core.own import load_own
from reidlab.core.recipe import load_recipe, recipe_card, recipe_names
from reidlab.core.run import as_installed, commit, provenance
from reidlab.core.settings import USUAL, project_root, settings, shipped
from reidlab.evaluation.published import read_published
from reidlab.jobs import workbench
from reidlab.jobs.grid import SweepCell
from reidlab.jobs.sets import SETS
from reidlab.jobs.sweep import page_command
from reidlab.jobs.workbench import LAID, OWN, PAGES, carried, new
from reidlab.viz.links import LINK

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A workbench in a folder with a space and an umlaut in its name: to be read."
    return new(tmp_path_factory.mktemp("a room") / "Prüf stand")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    "An empty folder that is no checkout's, with a package that lies in none."
    (tmp_path / "packages" / "reidlab").mkdir(parents=True)
    (tmp_path / "desk").mkdir()
    bench = tmp_path / "packages" / "reidlab" / "bench"
    for name in carried(ROOT):
        (bench / name).parent.mkdir(parents=True, exist_ok=True)
        (bench / name).write_bytes((ROOT / name).read_bytes())
    where = "reidlab.core.settings.package_folder"
    monkeypatch.setattr(where, lambda: tmp_path / "packages" / "reidlab")
    monkeypatch.delenv("REIDLAB_ROOT", raising=False)
    monkeypatch.chdir(tmp_path / "desk")
    return tmp_path / "desk"


# --- what is laid into it --------------------------------------------------------------------


def test_it_holds_what_the_pages_need(lab):
    made = {p.relative_to(lab).as_posix() for p in lab.rglob("*") if p.is_file()}
    written = {"settings.ini", "own.py", ".gitignore", "README.md", "nbs/index.ipynb"}
    assert made == {*carried(ROOT, LAID), *written}
    assert {p.stem for p in (lab / "data_prep").glob("*.ipynb")} == set(SETS)
    assert {p.stem for p in (lab / "nbs").iterdir()} == {*PAGES, "reference", "index"}
    assert all((lab / name).is_dir() for name in ("runs", "data/raw", "data/weights", "reports"))
    here = settings(lab)
    assert here.own == lab / "own.py" and here.raw_dirs == (lab / "data/raw",)
    assert {here.runs_dir, here.data_dir, here.recipes_dir} == {
        lab / "runs",
        lab / "data",
        lab / "recipes",
    }
    assert recipe_names(lab / "recipes") == recipe_names(ROOT / "recipes")


def test_its_settings_are_explained_and_usual(lab):
    lines = (lab / "settings.ini").read_text(encoding="utf-8").splitlines()
    said = dict(
        line.replace(" =", " = ").split(" = ", 1) for line in lines if re.match(r"\w", line)
    )
    assert {k: v.strip() for k, v in said.items()} == USUAL | {"own": "own.py"}
    assert sum(line.startswith("#") for line in lines) > len(USUAL)


def test_no_link_in_it_is_dead(lab):
    for page in [*lab.glob("*/*.ipynb"), *lab.rglob("README.md")]:
        text = page.read_text(encoding="utf-8")
        cells = json.loads(text)["cells"] if page.suffix == ".ipynb" else [{"source": [text]}]
        for cell in (c for c in cells if c.get("cell_type") != "code"):
            for link in LINK.finditer("".join(cell["source"])):
                assert (page.parent / link["to"]).exists(), (page.name, link["to"])


def test_the_example_in_own_py_is_a_loss_once_its_marks_are_gone(tmp_path, monkeypatch):
    bench = new(tmp_path / "lab")
    monkeypatch.setenv("REIDLAB_ROOT", str(bench))
    want = {"loss": {"softmax": {}, "contrastive": {"weight": 0.1}}}
    assert (
        want["loss"].keys() == json.loads(re.search(r"--overrides '(.+)'", OWN)[1])["loss"].keys()
    )
    with pytest.raises(ValueError, match="contrastive"):
        load_recipe("smoke", overrides=TINY | want)
    bare = re.sub(r"^# ?", "", OWN.partition("\n\n")[2], flags=re.M)
    (bench / "own.py").write_text(bare, encoding="utf-8")
    assert load_recipe("smoke", overrides=TINY | want).loss["contrastive"]["margin"] == 4.0
    lines = [line for line in bare.splitlines() if line]
    assert len(lines) <= 10
    monkeypatch.undo()
    load_own()


# --- whole or not at all ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "place", "says"),
    [
        (lambda p: (p / "note.txt").write_text("mine"), "", "is not empty: it holds note.txt. "),
        (lambda p: (p / ".hidden").mkdir(), "", "is not empty: it holds .hidden. "),
        (lambda p: [(p / n).write_text("") for n in "abc"], "", "it holds a and 2 more. "),
        (lambda p: (p / "file").write_text("mine"), "file", "file is a file. "),
        (lambda p: (p / "file").write_text("mine"), "file/lab", "file is a file. "),
        (lambda p: os.mkfifo(p / "pipe"), "pipe", "pipe is a file. "),
        (lambda p: None, "a" * 300, "cannot be made: File name too long"),
        (lambda p: os.symlink("loop", p / "loop"), "loop/lab", "cannot be made"),
    ],
)
def test_what_lies_there_is_left_alone(make, place, says, tmp_path):
    desk = tmp_path / "desk"
    desk.mkdir()
    make(desk)
    before = sorted(tmp_path.rglob("*")), facts(tmp_path)
    with pytest.raises(ValueError, match=re.escape(says)) as refused:
        new(desk / place)
    assert "\n" not in str(refused.value)
    assert (sorted(tmp_path.rglob("*")), facts(tmp_path)) == before


def test_an_empty_folder_becomes_one_but_not_under_ones_feet(tmp_path, monkeypatch):
    (tmp_path / "lab").mkdir()
    assert new(tmp_path / "lab") == tmp_path / "lab"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place in (".", "", tmp_path / "here"):
        with pytest.raises(ValueError, match="you stand in this one"):
            new(place)
    assert (new("inside") / "settings.ini").is_file()


KILLED = """
import os, sys
from reidlab.jobs import workbench
copy, left = workbench.shutil.copyfile, [int(sys.argv[2])]
def copied(*places):
    left[0] -= 1
    if left[0] < 0:
        os._exit(9)
    return copy(*places)
workbench.shutil.copyfile = copied
workbench.new(sys.argv[1])
"""


@pytest.mark.parametrize("after", [0, 30])
def test_a_killed_one_leaves_nothing_half(after, tmp_path):
    words = [sys.executable, "-c", KILLED, str(tmp_path / "lab"), str(after)]
    assert subprocess.run(words).returncode == 9
    assert not (tmp_path / "lab").exists()
    new(tmp_path / "lab")
    assert [p.name for p in tmp_path.iterdir()] == ["lab"]  # and what it left is cleared away


def test_an_interrupt_or_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    for wrong, raised in (
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "No space left on device"), ValueError),
    ):

        def copied(*places, wrong=wrong):
            raise wrong

        monkeypatch.setattr(workbench.shutil, "copyfile", copied)
        with pytest.raises(raised):
            new(tmp_path / "lab")
        assert not list(tmp_path.iterdir())


def test_modules_alone_say_that_the_rest_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("reidlab.core.settings.package_folder", lambda: tmp_path / "reidlab")
    with pytest.raises(FileNotFoundError, match="without its recipes and pages"):
        new(tmp_path / "lab")
    assert not list(tmp_path.iterdir())


# --- a folder that nobody has made anything of -----------------------------------------------


def test_an_empty_folder_is_a_workbench(elsewhere):
    assert project_root() == elsewhere
    here = settings()
    assert (here.runs_dir, here.data_dir) == (elsewhere / "runs", elsewhere / "data")
    assert (here.workers, here.own, here.weights_dir) == (2, None, elsewhere / "data/weights")
    assert load_recipe("first_look/handmade").name == "first_look/handmade"
    assert recipe_card("smoke")["what"] and "lite/teacher" in recipe_names()
    page = page_command(SweepCell("a", "a", "smoke", seed=0), "train", elsewhere / "runs/a")[3]
    assert Path(page) == shipped("nbs/train.ipynb") and Path(page).is_file()
    assert len(read_published()) > 100
    assert not list(elsewhere.iterdir())


def test_the_nearest_settings_above_are_the_workbench(elsewhere):
    inner = new(elsewhere / "lab")
    (inner / "a/b").mkdir(parents=True)
    assert project_root(inner / "a/b") == inner
    assert project_root() == elsewhere
    (inner / "settings.ini").write_text("[reidlab]\nworkers = 3\n")
    assert settings(inner).workers == 3 and settings(inner).runs_dir == inner / "runs"


@pytest.mark.parametrize(
    ("files", "name", "epochs"),
    [
        ({"mine.yaml": "base: smoke\ntrain: {epochs: 3}\n"}, "mine", 3),
        ({"mine.yaml": "rows:\n  one: {train: {epochs: 4}}\n"}, "mine/one", 4),
        ({"deep/er.yaml": "train: {epochs: 5}\n"}, "deep/er", 5),
        ({"smoke.yaml": "train: {epochs: 6}\n"}, "smoke", 6),  # one's own counts
        ({"smoke.yaml": "train: {epochs: 7}\n", "a.yaml": "base: smoke\n"}, "a", 7),
    ],
)
def test_recipes_of_ones_own_beside_those_of_the_package(files, name, epochs, elsewhere):
    for file, text in files.items():
        place = elsewhere / "recipes" / file
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    assert load_recipe(name).train.epochs == epochs
    names = recipe_names()
    assert name in names and {"smoke", "vehicles8"} <= set(names) and len(set(names)) == len(names)


def test_what_is_in_neither_is_missed_and_a_file_of_ones_own_hides_the_other(elsewhere):
    (elsewhere / "recipes").mkdir()
    (elsewhere / "recipes" / "first_look.yaml").write_text("rows:\n  mine: {}\n")
    (elsewhere / "recipes" / "lite.yaml").mkdir()
    for name, says in {
        "smoek": "recipe 'smoek' not found in recipes/. Close names: smoke",
        "first_look/searched": "recipe 'first_look/searched' not found",
        "../recipes/smoke": "not found",
        "lite": "lite.yaml is a folder",
    }.items():
        with pytest.raises(ValueError, match=re.escape(says)):
            load_recipe(name)
    assert "first_look/searched" not in recipe_names()


# --- which code it was -----------------------------------------------------------------------


def test_a_run_says_the_version_where_no_commit_is_to_be_had(tmp_path, monkeypatch):
    "As of a wheel within somebody's own repository, or of a tree that was copied without git."
    place = tmp_path / "site" / "reidlab"
    place.mkdir(parents=True)
    (place / "__init__.py").write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "mine"], check=True)
    monkeypatch.setattr("reidlab.core.run.package_folder", lambda: place)
    assert not as_installed()  # no list has these files
    assert commit() == (f"reidlab {reidlab.__version__}", True)


def test_a_table_shows_a_version_whole_and_a_commit_short():
    import pandas as pd

    told = ["0123456789abcdef0123456789abcdef01234567", "reidlab 0.1.0", None]
    table = provenance(pd.DataFrame({"commit": told}, index=["a", "b", "c"]))
    assert list(table["commit"]) == ["0123456789", "reidlab 0.1.0", ""]


def test_there_is_one_version_number():
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
    assert cited == reidlab.__version__
    assert 'version = { attr = "reidlab.__version__" }' in (ROOT / "pyproject.toml").read_text()
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\d\S*)$", changes, re.M)[1] == reidlab.__version__
