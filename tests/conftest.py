"""What several tests share: a laboratory of their own, tiny photos to fill it, a way to run jobs."""

import ast
import json
import os
import shutil
import subprocess
import sys
from base64 import b64encode
from contextlib import nullcontext, redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
from IPython.core.formatters import DisplayFormatter
from parity import Recorder
from skips import (  # noqa: F401
    pytest_runtest_logreport,
    pytest_sessionfinish,
    pytest_terminal_summary,
)

from reidlab.core.recipe import load_recipe
from reidlab.core.run import open_run
from reidlab.core.upgrade import upgrade
from reidlab.data.loaders import find_manifest, open_data
from reidlab.models.catalogue import build_model
from reidlab.training.fit import fit_from_recipe

matplotlib.use("Agg")
TINY = {  # fourteen people before three cameras; two epochs of four batches
    "data.synthetic.train_pids": 10,
    "data.synthetic.test_pids": 4,
    "data.synthetic.cameras": 3,
    "data.sampler": {"pk": {"p": 4}},
    "data.height": 64,
    "data.width": 32,
    "data.augment.pad_crop.pixels": 4,
    "data.val_fraction": 0.2,
    "train.epochs": 2,
    "train.validate_every": 1,
}


def tiny_recipe(seed=0, **more):
    "The smoke recipe at the smallest size that still trains; more overrides with __ for the dot."
    changes = {key.replace("__", "."): value for key, value in more.items()}
    return load_recipe("smoke", seed=seed, overrides=TINY | changes)


def from_facts(backbone="small_cnn", n_pids=751, **facts):
    "A model of flat facts, as a checkpoint notes them."
    usual = {"backbone": backbone, "pool": "avg", "neck": "bnneck", "head": "linear"}
    return build_model(**upgrade({"model": usual | facts})["model"], n_pids=n_pids)


def facts(folder):
    "Every file under a folder, with its bytes and the time of its last change."
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def run_job(page, out, *words, **parameters):
    "Call a job as its users do, from the project's root; its exit code and all that it said."
    root = Path(__file__).parents[1]
    outside = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}  # kernels look
    given = []
    for name, value in parameters.items():
        given += ["-p", name, json.dumps(value) if isinstance(value, dict) else str(value)]
    done = subprocess.run(
        [sys.executable, "-m", "papermill", page, str(out), *words, *given, "--no-progress-bar"],
        cwd=root,
        env=outside | {"JUPYTER_PREFER_ENV_PATH": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=580,
    )
    return SimpleNamespace(rc=done.returncode, text=done.stdout, last=said(done.stdout))


def said(text):
    "The error message at the end of a traceback."
    return text.rstrip().rsplit("\n\n", 1)[-1].rsplit("Error: ", 1)[-1]


def walk(page, out=None, **parameters):
    "A job's cells one after the other in this process: as papermill runs them, in a tenth of the time; `out` gets the page as it then stands."
    notebook = nbformat.read(Path(__file__).parents[1] / page, as_version=4)
    names = {"__name__": "page"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            with redirect_stdout(StringIO()) if out else nullcontext() as said:
                value = run_cell(cell.source, page, names)
            if out:
                cell.outputs = [*figures(), *texts(said.getvalue(), value)]
            if "parameters" in cell.metadata.get("tags", []):
                names |= parameters
    if out:
        nbformat.write(notebook, out)
    plt.close("all")
    return names


def run_cell(source, page, names):
    "Run a cell; what its last line shows."
    tree = ast.parse(source, page)
    shows = tree.body and isinstance(tree.body[-1], ast.Expr)
    last = ast.Expression(tree.body.pop().value) if shows else None
    exec(compile(tree, page, "exec"), names)
    value = eval(compile(last, page, "eval"), names) if last else None
    return None if source.rstrip().endswith(";") else value


def figures():
    "The open figures as a page shows them, closed."
    shown = []
    for number in plt.get_fignums():
        plt.figure(number).savefig(png := BytesIO(), format="png")
        picture = {"image/png": b64encode(png.getvalue()).decode()}
        shown.append(nbformat.v4.new_output("display_data", picture))
    plt.close("all")
    return shown


def texts(printed, value):
    "What a cell printed, and the value it ends with in every form that a page would show."
    shown = [nbformat.v4.new_output("stream", text=printed)] if printed else []
    if value is not None:
        forms = DisplayFormatter().format(value)[0]
        shown.append(nbformat.v4.new_output("execute_result", forms, execution_count=1))
    return shown


def done(job):
    "A job that ended well."
    assert job.rc == 0, job.text[-3000:]
    return job


def pictures(page):
    "How many figures an executed page shows, once it is known to hold no error."
    outputs = [o for c in nbformat.read(page, as_version=4).cells for o in c.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error"]
    return sum("image/png" in o.get("data", {}) for o in outputs)


def laboratory(root, patch):
    "Point every setting at folders under `root`."
    for key in [k for k in os.environ if k.startswith("REIDLAB_")]:
        patch.delenv(key)
    folders = {name: root / name for name in ("data", "runs", "results", "weights")}
    for name, folder in folders.items():
        folder.mkdir()
        patch.setenv(f"REIDLAB_{name.upper()}_DIR", str(folder))
    patch.setenv("REIDLAB_RAW_DIRS", str(root / "raw"))
    patch.setenv("REIDLAB_DEVICE", "auto")
    patch.setenv("REIDLAB_WORKERS", "0")
    (root / "raw").mkdir()
    return SimpleNamespace(root=root, raw=root / "raw", **folders)


LONGEST = (  # files by the seconds of their longest tests, from 120 to 10; to renew: pytest --durations=60
    "test_slurm.py",
    "test_layers.py",
    "test_jobs.py",
    "test_vehicles8.py",
    "test_search.py",
    "test_crew.py",
    "test_site.py",
    "test_startup.py",
    "test_wheel.py",
    "test_health.py",
    "test_damaged_runs.py",
    "test_cluster.py",
    "test_browser.py",
    "test_lean.py",
    "test_classes.py",
    "test_benchmark_gpu.py",
    "test_index.py",
    "test_losses.py",
    "test_retrieval.py",
    "test_benchmark_retrieval.py",
    "test_repeatable.py",
    "test_benchmark_input.py",
    "test_joined.py",
    "test_bad_input.py",
)


def pytest_addoption(parser):
    words = "run what compares with published code alone, and write results/parity.json"
    parser.addoption("--parity", action="store_true", help=words)


def pytest_configure(config):
    if config.getoption("--parity"):
        config.pluginmanager.register(Recorder(), "parity")


def pytest_collection_modifyitems(items):
    "The longest files first: of two workers neither waits long for what the other began last."
    place = {name: n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def packed_aside(tmp_path_factory):
    "Packed photos lie apart from the shared ones; its folder. A laboratory of one's own packs at home."
    folder = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REIDLAB_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    "The tiny recipe's photos, drawn once: a data_dir to be read or copied, not written."
    folder = tmp_path_factory.mktemp("photos")
    find_manifest(tiny_recipe().data, folder)
    return folder


@pytest.fixture
def lab(tmp_path, monkeypatch):
    "Data, runs and results of this test alone, all empty."
    return laboratory(tmp_path, monkeypatch)


@pytest.fixture
def stocked(lab, photos):
    "A laboratory with its own copy of the tiny photos."
    shutil.copytree(photos, lab.data, dirs_exist_ok=True)
    return lab


@pytest.fixture(scope="session")
def finished(photos, tmp_path_factory):
    "A run that ended well, to be copied: (its folder, its recipe)."
    recipe = tiny_recipe(train__epochs=1, data__val_fraction=0.0)
    data = open_data(recipe.data, recipe.seed, photos)
    root = tmp_path_factory.mktemp("runs")
    run = open_run("done", recipe, verb="train", data=data.fingerprint, root=root)
    fit_from_recipe(recipe, run.path, workers=0, data_dir=photos)
    return run.path, recipe
