"""The training benchmark runs without its peer, says so, and counts a race as it should."""

import csv
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from reidlab.losses.triplet import triplet_loss

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_train.py"


@pytest.fixture(scope="module")
def bench():
    spec, path = importlib.util.spec_from_file_location("bench_train", SCRIPT), list(sys.path)
    module = importlib.util.module_from_spec(spec)
    threads = torch.get_num_threads()
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    torch.set_num_threads(threads)


def rows_of(bench, monkeypatch, capsys, folder, *options):
    "What the script appends, and the lines that it prints."
    out = folder / "results.csv"
    told = ["--tiny", "--pairs", "1", "--peer", folder / "none", "--data", folder, "--out", out]
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, [*told, *options])])
    bench.main()
    with out.open(newline="") as file:
        return list(csv.DictReader(file)), capsys.readouterr().out.splitlines()


def test_rates_end_with_their_table_and_say_that_the_peer_is_absent(
    bench, tmp_path, monkeypatch, capsys
):
    rows, lines = rows_of(bench, monkeypatch, capsys, tmp_path)
    assert lines[0].split() == ["case", "measure", "value", "ratio", "against"]
    assert len(rows) == len(lines) - 1
    assert all(row["benchmark"] == SCRIPT.name and row["date"] for row in rows)
    speeds = [float(row["value"]) for row in rows if row["measure"].startswith("images/s")]
    (near,) = (float(row["value"]) for row in rows if row["measure"] == "least cosine, fast")
    assert len(speeds) == 4 and min(speeds) > 0 and near > 0.99
    assert "no pyppbox_torchreid; --install" in rows[-1]["measure"]


def test_a_race_leaves_its_curves(bench, tmp_path, monkeypatch, capsys):
    curves = tmp_path / "curves.json"
    rows, _ = rows_of(bench, monkeypatch, capsys, tmp_path, "--accuracy", "--curves", str(curves))
    kept = json.loads(curves.read_text())["sets"]["tiny"]
    ((seconds, mAP),) = kept["curves"]["ours"][0]
    assert seconds > 0 and 0 < mAP <= 100 and float(rows[0]["value"]) == seconds


def test_a_race_counts_who_arrived(bench):
    curves = {
        "ours": [[(1.0, 10.0), (4.0, 31.0)], [(6.0, 30.0)], [(5.0, 33.0)]],
        "torchreid": [[(16.0, 30.5)], [(12.0, 12.0)], [(20.0, 40.0)]],
    }
    rows = bench.race.raced("synthetic", curves)
    assert [row[2] for row in rows] == [4, 6, 5, 5, 16, 12, 20, 16]
    assert [row[3] for row in rows[:4]] == [0.25, 0.5, 0.25, 5 / 16]
    assert all(math.isnan(row[3]) for row in rows[4:])
    assert [("not reached, mAP 12.0" in row[1]) for row in rows] == [False] * 5 + [True] + [
        False
    ] * 2


def test_the_loop_learns_by_the_same_triplet(bench):
    torch.manual_seed(0)
    feats, pids = torch.randn(12, 8), torch.arange(4).repeat(3)
    torch.testing.assert_close(bench.hard_triplet(feats, pids), triplet_loss(feats, pids, 0.3))


@pytest.mark.parametrize(("arrivals", "best"), [([20, 31, 35], 2), ([20, 25, 22], 1)])
def test_tuning_takes_who_arrives_first_or_comes_farthest(bench, monkeypatch, arrivals, best):
    settings = [{"epochs": 1, "lr": rate} for rate in (0.1, 0.2, 0.3)]
    monkeypatch.setitem(bench.race.TRIED, "synthetic", {"ours": settings})
    seen = []

    def train(side, name, setting, seed):
        seen.append((side, seed))
        n = settings.index(setting)
        return [(10.0 - n, float(arrivals[n]))]

    chosen, rows = bench.race.tuned("synthetic", "ours", [], train)
    assert chosen == settings[best] and len(rows) == 3 and "lr 0.1" in rows[0][1]
    assert seen == [("ours", bench.race.TUNING_SEED)] * 3
