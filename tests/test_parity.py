"""results/parity.json says what the tests compare with published code: all of it, as it is today."""

import ast
import json
import subprocess
import sys

import numpy as np
import parity
import pytest
import torch

from reidlab.evaluation.parity import disagreeing, parity_table, read_parity


@pytest.fixture(scope="module")
def kept():
    "The committed checks by their names."
    checks = json.loads(parity.FILE.read_text(encoding="utf-8"))["checks"]
    return {check["check"]: check for check in checks}


def test_the_file_lists_the_checks_that_there_are(kept):
    files = [f"tests/{name}.py" for name in parity.CHECKS]
    words = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--parity", *files]
    done = subprocess.run(words, cwd=parity.ROOT, capture_output=True, text=True)
    there = [line.removeprefix("tests/") for line in done.stdout.splitlines() if "::" in line]
    assert set(there) == set(kept), "renew it: pytest --parity " + " ".join(files)
    assert len(there) == len(kept) > 200


def test_every_check_agrees_within_what_was_allowed(kept):
    for check in kept.values():
        assert check["passed"] and check["system"] in parity.SOURCES
        allowed = 0.0 if check["tolerance"] == "exact" else check["tolerance"]
        assert check["difference"] <= allowed, check


@pytest.mark.parametrize("file", parity.WHOLE)
def test_no_test_of_these_files_is_forgotten(file):
    tree = ast.parse((parity.ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"))
    names = {n.name for n in tree.body if getattr(n, "name", "").startswith("test_")}
    assert names == set(parity.CHECKS[file]) | (names & parity.OURS)


def test_what_a_comparison_saw_is_the_place_nearest_to_its_bound():
    theirs = np.array([1.0, 100.0])
    off, allowed = parity.measured(torch.tensor([1.001, 100.01]).double(), theirs, 1e-2, 0.0)
    np.testing.assert_allclose([off, allowed], [1e-5, 1e-4], rtol=1e-3)  # shares of 100
    assert parity.measured(theirs, theirs, 0.0, 1e-6)[0] == 0.0


def rewritten(tmp_path, kept, made=None, **change):
    "The file again, its first check changed."
    checks = [next(iter(kept.values())) | change, *list(kept.values())[1:]]
    made = made or {"commit": "0", "day": "2026-11-30", "torch": "2"}
    file = tmp_path / "parity.json"
    file.write_text(json.dumps({"made": made, "checks": checks}), encoding="utf-8")
    return file


def test_a_check_that_fails_is_named_and_is_not_equal(tmp_path, kept):
    first = next(iter(kept.values()))
    _, checks = read_parity(rewritten(tmp_path, kept, passed=False, more="of later"))
    row = parity_table(checks).loc[first["system"]]
    assert first["tolerance"] == "exact" and row["passed"] == row["checks"] - 1
    close = (checks["system"] == first["system"]) & (checks["tolerance"] != "exact")
    assert row["equal outright"] == row["checks"] - 1 - close.sum()
    assert disagreeing(checks).startswith("1 of ") and first["check"] in disagreeing(checks)


@pytest.mark.parametrize(
    "change",
    [
        {"passed": "yes"},
        {"tolerance": "1e-6"},
        {"tolerance": 0},
        {"difference": None},
        {"difference": float("nan")},
        {"system": None},
        {"made": {"day": "2026-11-30"}},
    ],
)
def test_a_damaged_file_is_refused_in_one_line(change, tmp_path, kept):
    with pytest.raises(ValueError, match=r"parity.json is damaged: .*pytest --parity$"):
        read_parity(rewritten(tmp_path, kept, **change))


def test_a_system_stands_in_one_place(kept):
    rows = parity_table(read_parity()[1], by=("system", "what")).index.get_level_values("system")
    assert (rows != rows[:1].append(rows[:-1])).sum() == rows.nunique() - 1
