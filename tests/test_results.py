"""Every number on the front page has its run under results/."""

import re

import pytest

from reidlab.core.recipe import load_recipe
from reidlab.core.run import RunFolder, read_json
from reidlab.core.settings import project_root

# a run's name ends with its seed, which a recipe's key in another table does not
ROW = re.compile(r"^\| `(?P<run>[\w.\-]+-s\d+)` \|(?P<cells>.+)\|$", re.M)


TABLES = {"people_bench"}  # no run: see test_people_bench.py
RECORDS = sorted(
    p for p in (project_root() / "results").iterdir() if p.is_dir() and p.name not in TABLES
)
each_record = pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.name)


def rows() -> list[tuple[str, list[str]]]:
    text = (project_root() / "README.md").read_text(encoding="utf-8")
    return [(m["run"], [c.strip() for c in m["cells"].split("|")]) for m in ROW.finditer(text)]


def test_there_is_something_to_check():
    assert len(rows()) >= 8


@pytest.mark.parametrize(("run", "cells"), rows())
def test_a_row_of_the_front_page_is_its_record(run, cells):
    folder = RunFolder(project_root() / "results" / run)
    (path,) = folder.path.glob("evaluate/*/metrics.json")
    record = read_json(path)
    figures = [f"{100 * record['metrics'][key]:.1f}" for key in ("mAP", "R1", "mINP")]
    histogram = f"{100 * record['baselines']['histogram']['mAP']:.1f}"
    minutes = f"{folder.metrics()['seconds'] / 60:.1f}"
    assert cells[1:6] == [*figures, histogram, minutes]
    assert record["commit"] and record["device"] and record["seed"] == folder.recipe.seed


@each_record
def test_a_record_is_small_and_whole(path):
    files = [p for p in path.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 100_000
    assert {"recipe.yaml", "environment.json", "metrics.json", "metrics.jsonl"} <= {
        p.name for p in files
    }
    folder = RunFolder(path)
    drawn = folder.recipe.data.name == "synthetic"  # a generator's grids of drawn people may stay
    grids = [p for p in files if drawn and p.parent.name == "samples" and p.suffix == ".png"]
    assert not [p for p in {*files} - {*grids} if p.suffix in {".pt", ".npz", ".jpg", ".png"}]
    assert folder.finished and folder.environment["commit"] and not folder.environment["dirty"]


@each_record
def test_a_record_is_what_its_recipe_makes_today(path):
    "Whoever runs the recipe that a record names asks for the same thing again."
    then = RunFolder(path).recipe
    today = load_recipe(then.name, seed=then.seed, overrides=then.overrides)
    verb = RunFolder(path).status()["verb"]
    sections = (
        ("data", "model", "search") if verb == "search" else ("data", "model", "loss", "train")
    )
    for section in sections:
        assert getattr(today, section) == getattr(then, section), section
