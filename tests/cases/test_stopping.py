"""Jobs that are stopped in time: what their pages and the command say, and how they go on."""

import pytest
from conftest import TINY, walk
from test_crew import SEARCH
from test_gan import PLAN

from reidlab.core.run import RunFolder

SMALL = TINY | {"data.height": 32, "data.width": 16, "train.epochs": 2, "data.val_fraction": 0.0}
PAGES = {
    "train": {},
    "search": {k.replace("__", "."): v for k, v in (SEARCH | {"search__epochs": 2}).items()},
    "generate": {"train.gan": {"only": PLAN}},
}


@pytest.mark.parametrize("verb", PAGES)
def test_a_page_that_is_stopped_says_how_far_it_came(verb, stocked):
    asked = {"recipe": "smoke", "run": "slice", "overrides": SMALL | PAGES[verb]}
    names = walk(f"nbs/{verb}.ipynb", minutes=1e-6, **asked)
    run = RunFolder(stocked.runs / "slice")
    assert run.status()["state"] == "stopped" and not (run.path / "metrics.json").exists()
    assert names["told"]["selection"].startswith("stopped (the minutes are over): ")
    assert "The same call continues it" in names["told"]["selection"]
    names = walk(f"nbs/{verb}.ipynb", **asked)
    assert names["done"] and "stopped" not in names["told"]["selection"]
