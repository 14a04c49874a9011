"""The input benchmark runs, its sides make the same bits, and its plain sampler makes P×K batches."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_input.py"


def test_the_plain_sampler_makes_batches_of_people():
    spec = importlib.util.spec_from_file_location("bench_input", SCRIPT)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    pids = np.random.default_rng(0).integers(0, 30, 400)
    batches = bench.listed(pids, 4, 4)
    assert len(batches) > 10
    for batch in batches:
        people = pids[batch].reshape(4, 4)
        assert (people == people[:, :1]).all() and len(set(people[:, 0])) == 4


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
    assert all(row["benchmark"] == "bench_input.py" and row["date"] for row in rows)
    (same,) = (row["value"] for row in rows if row["measure"].startswith("same bits"))
    assert float(same) == 1
