"""results/parity.json says what the tests compare with published code: all of it, as it is today."""

import ast
import json
import subprocess
import sys

import numpy as np
import parity
import pytest
import torch


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
