"""The retrieval benchmark runs, and its peers compute what it says they compute."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np

from reidlab.retrieval.rank import rank_features
from reidlab.retrieval.rerank import rerank

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_retrieval.py"


def loaded():
    spec = importlib.util.spec_from_file_location("bench_retrieval", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_peers_are_what_they_are_called():
    bench = loaded()
    inputs = bench.street(80, 700, 32)
    assert (inputs[3] == -1).mean() > 0.1  # junk, or the peer's filter is not tried
    np.testing.assert_allclose(bench.sorted_rank(*inputs), rank_features(*inputs).mAP, rtol=1e-6)
    ours, theirs = rerank(*inputs[:2]), bench.dense_rerank(*inputs[:2], dtype=np.float64)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_script_prints_its_table_last_and_appends(tmp_path):
    out = tmp_path / "results.csv"
    command = [sys.executable, SCRIPT, "--tiny", "--pairs", "1", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["case", "measure", "value", "ratio", "against"]
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(lines) - 1
    assert all(row["benchmark"] == "bench_retrieval.py" and row["date"] for row in rows)
    assert {"rank", "distances", "re-rank"} <= {row["case"].split()[0] for row in rows}
