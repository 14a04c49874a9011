"Installed from a wheel, with no checkout in sight."

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY

import reidlab
from reidlab.jobs.workbench import carried

ROOT = Path(__file__).parents[1]
BUILT_FROM = (
    "reidlab",
    "nbs",
    "data_prep",
    "recipes",
    "reports/published",
    "results/people_bench",
)  # and what lies beside


def call(*words, cwd, path=()):
    "A command, without what this session has set; what it said."
    ours = {"PYTHONPATH", "PYTEST_CURRENT_TEST"}
    outside = {
        k: v for k, v in os.environ.items() if not k.startswith("REIDLAB_") and k not in ours
    }
    outside["PATH"] = os.pathsep.join([*map(str, path), outside["PATH"]])
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=outside | {"JUPYTER_PREFER_ENV_PATH": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "A wheel of this tree in an environment of its own over the packages of this one."
    place = tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        shutil.copytree(ROOT / name, place / "tree" / name, ignore=lambda *_: ["__pycache__"])
    for file in (p for p in ROOT.iterdir() if p.suffix in (".py", ".toml", ".md", ".ini")):
        shutil.copy(file, place / "tree")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    words = ["--no-deps", "--no-index", "--quiet"]
    call(*pip, "wheel", "--no-build-isolation", *words, "-w", place, ".", cwd=place / "tree")
    (wheel,) = place.glob("*.whl")
    shutil.rmtree(place / "tree")
    call(sys.executable, "-m", "venv", "--without-pip", place / "env", cwd=place)
    python = place / "env/bin/python"
    (site,) = (place / "env/lib").glob("python*/site-packages")
    packages = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (site / "base.pth").write_text(
        "\n".join(packages)
    )  # and no .pth of theirs, which may lead here
    call(*pip, "--python", python, "install", *words, wheel, cwd=place)
    return SimpleNamespace(place=place, wheel=wheel, python=python, bin=python.parent, site=site)


def test_a_wheel_carries_its_modules_recipes_and_pages(installed):
    names = {n for n in zipfile.ZipFile(installed.wheel).namelist() if ".dist-info/" not in n}
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "reidlab").rglob("*.py")}
    bench = {f"reidlab/bench/{name}" for name in carried(ROOT)}
    tables = {p.relative_to(ROOT).as_posix() for p in (ROOT / "reidlab/data/pak128").iterdir()}
    assert len(tables) == 5  # of vehicles8
    assert names == modules | bench | tables | {"reidlab/evaluation/protocols.yaml"}


def test_papermill_finds_its_engine(installed):
    with zipfile.ZipFile(installed.wheel) as wheel:
        (points,) = [n for n in wheel.namelist() if n.endswith("entry_points.txt")]
        text = wheel.read(points).decode()
    assert "[papermill.engine]\nreidlab = reidlab.jobs.console:PageEngine" in text


def test_it_trains_in_a_workbench_of_its_own(installed):
    desk, path = installed.place, [installed.bin]
    call("reidlab", "new", "lab", cwd=desk, path=path)
    lab = desk / "lab"
    words = ["nbs/train.ipynb", "out.ipynb", "--no-progress-bar", "-p", "run", "mine"]
    given = ["-p", "overrides", json.dumps(TINY | {"train.epochs": 1})]
    call(installed.python, "-m", "papermill", *words, *given, cwd=lab, path=path)
    assert "mine on synthetic: mAP " in call(
        "reidlab", "evaluate", "mine", cwd=lab / "recipes", path=path
    )
    run = json.loads((lab / "runs/mine/environment.json").read_text())
    assert (run["commit"], run["dirty"]) == (f"reidlab {reidlab.__version__}", False)
    assert (lab / "out.ipynb").is_file() and (lab / "runs/mine/evaluate/synthetic").is_dir()


ASKED = """
import sys, reidlab
heavy = [m for m in ("torch", "pandas", "numpy", "pydantic") if m in sys.modules]
from reidlab.core.run import commit
print(heavy, reidlab.__file__, *commit())
"""


def test_it_is_imported_light_and_knows_when_it_was_edited(installed):
    first = call(installed.python, "-c", ASKED, cwd=installed.place)
    where = installed.site / "reidlab" / "__init__.py"
    assert first.split() == ["[]", str(where), "reidlab", reidlab.__version__, "False"]
    where.write_text(where.read_text() + "# mine\n")
    assert call(installed.python, "-c", ASKED, cwd=installed.place).split()[-1] == "True"
