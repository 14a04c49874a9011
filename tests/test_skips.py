"""A skip that nobody has agreed to fails the run."""

import subprocess
import sys
from pathlib import Path

import pytest
from skips import patterns, unlisted


def test_the_list_is_of_patterns():
    assert unlisted(["needs ../shared/golden/cdnet", "a CUDA device is here"]) == []
    assert unlisted(["it was slow", "needs ../shared/golden/cdnet of late"]) != []
    assert len(patterns()) == len(set(patterns()))


@pytest.mark.parametrize(("reason", "code"), [("not a git checkout", 0), ("it was slow", 1)])
def test_a_run_fails_by_it(reason, code, tmp_path):
    test = tmp_path / "test_one.py"
    test.write_text(f"import pytest\ndef test_it():\n    pytest.skip({reason!r})\n")
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "skips",
        "-p",
        "no:cacheprovider",
        str(test),
    ]
    done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == code, done.stdout
    assert ("does not list" in done.stdout) == bool(code)
