"""Nothing slow is loaded before it is used: what each room may have imported, asked of fresh processes."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_start.py"
WATCHED = (
    "torch",
    "torchvision",
    "torch._dynamo",
    "pandas",
    "PIL",
    "numba",
    "matplotlib",
    "IPython",
    "lark",
)
ASK = "import sys, json; print(json.dumps([m for m in {} if m in sys.modules]))"
EVALUATES = """
import reidlab.evaluation.evaluate_run
from reidlab.core.recipe import load_recipe
from reidlab.data.loaders import open_data
from reidlab.evaluation.evaluate import evaluate_split
from reidlab.training.network import model_from_recipe
small = {f"data.synthetic.{k}": n for k, n in dict(train_pids=6, test_pids=2, cameras=2).items()}
recipe = load_recipe("smoke", overrides=small | {"data.val_fraction": 0.4})
evaluate_split(model_from_recipe(recipe, 4), recipe)
"""
MAY = {  # what runs in a fresh process: what it may have loaded of the watched
    "import reidlab.core.recipe": set(),
    "import reidlab.retrieval.scan": {"torch", "numba"},
    EVALUATES: {"torch", "pandas", "PIL", "numba"},
    "import reidlab.jobs.sweep, reidlab.jobs.views": set(WATCHED)
    - {"torchvision", "torch._dynamo", "lark"},
    "from reidlab.jobs.command import main; main(['train', '--help'])": set(),
    "import reidlab; reidlab.__version__": set(),
    "from reidlab import rank_features": {"torch", "pandas", "numba"},
    "import papermill.execute": set(),  # its own schemas want no grammar of web addresses
}


@pytest.mark.parametrize(
    "code",
    MAY,
    ids=["recipe", "ranking", "evaluation", "jobs", "command", "package", "face", "papermill"],
)
def test_nothing_slow_is_loaded_before_it_is_used(code):
    ask = [sys.executable, "-c", f"{code}\n{ASK.format(WATCHED)}"]
    done = subprocess.run(ask, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert loaded <= MAY[code], f"loaded too early: {loaded - MAY[code]}"


def test_ranking_by_its_top_level_name_brings_no_network_and_no_search():
    ask = "import sys; from reidlab import rank_features; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    rooms = ("torchvision", "reidlab.nas", "reidlab.models", "reidlab.training", "reidlab.viz")
    assert not [m for m in done.stdout.split() if m.startswith(rooms)]


def test_the_table_of_start_up_is_printed_and_appended(tmp_path):
    out = tmp_path / "results.csv"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--tiny", "--out", out], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["case"] for r in rows] == ["python", "import torch", "core"]
    assert [float(r["ratio"]) for r in rows][1] == 1
