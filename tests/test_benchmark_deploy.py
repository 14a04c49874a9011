"""The benchmark of exported files runs, and its two sides make the same vectors."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_deploy.py"


@pytest.mark.parametrize("installed", [True, False])
def test_the_script_prints_its_table_last_and_appends(installed, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("bench_deploy", SCRIPT)
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(bench)
    if not installed:
        monkeypatch.setitem(sys.modules, "onnx", None)
    out = tmp_path / "results.csv"
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--tiny", "--out", str(out)])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["case", "measure", "value", "ratio", "against"]
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(lines) - 1
    assert all(row["benchmark"] == SCRIPT.name and row["date"] for row in rows)
    cosines = [float(row["value"]) for row in rows if row["measure"] == "least cosine"]
    missing = [row for row in rows if "needs the packages onnx" in row["measure"]]
    assert all(cosine > 0.99 for cosine in cosines) and len(cosines) == 1 + installed
    assert bool(missing) is not installed
