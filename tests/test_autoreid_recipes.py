"""The recipes after Auto-ReID: every row can be searched on Market-1501 and trained, and says what was restored."""

import re
from functools import cache
from pathlib import Path

import pytest

from reidlab.core.recipe import first_difference, load_recipe, recipe_names
from reidlab.nas.checks import check_search
from reidlab.training.checks import check_model

FOLDER = Path(__file__).parents[1] / "recipes"
ROWS = [name for name in recipe_names(FOLDER) if name.startswith("autoreid/")]
TWINS = {  # the same search under another task name
    "autoreid/darts-deeper-viz": "autoreid/darts-deeper",
    "autoreid/retrieval-triplet": "autoreid/retrieval-classification",
    "autoreid/retrieval-trip-viz": "autoreid/retrieval-classification",
}
MARKET = 751  # training identities of Market-1501


@cache
def row(name):
    return load_recipe(name, seed=1024, folder=FOLDER)


def test_ten_searches_and_the_papers_two_rows_are_there():
    assert len(ROWS) == 12
    assert {"autoreid/paper-search", "autoreid/paper-retrain"} < set(ROWS)


@pytest.mark.parametrize("name", [name for name in ROWS if name not in TWINS])
def test_every_row_can_be_searched_and_trained(name):
    check_search(row(name), MARKET)  # builds the supernet and runs it once, without memory
    check_model(row(name), MARKET)
    assert row(name).search.strategy.name == "darts" and row(name).data.val_fraction == 0


def test_twins_are_one_search():
    for one, other in TWINS.items():
        assert first_difference(row(one), row(other)) is None, one


@pytest.mark.parametrize(
    "name, wanted",
    [  # batch, cells, channels, space, height: what the names and the paper say
        ("classification-search", (2, 3, 16, "darts", 256)),
        ("classification-search-train-all", (2, 6, 32, "darts", 256)),
        ("darts-distributed", (16, 3, 16, "darts", 256)),
        ("darts-distributed-bs32", (32, 3, 16, "darts", 256)),
        ("darts-deeper", (32, 6, 16, "darts", 256)),
        ("reid-32-l3-n4", (32, 3, 16, "reid", 256)),
        ("retrieval-classification", (32, 3, 16, "reid", 256)),
        ("paper-search", (32, 8, 16, "reid", 384)),
    ],
)
def test_what_the_names_promise_is_what_runs(name, wanted):
    r = row(f"autoreid/{name}")
    s, space = r.search, r.search.space
    shape = space.options
    cells = shape["layers"] if shape["macro"] == "darts" else sum(shape["cells_per_stage"])
    assert (s.p * s.k, cells, shape["init_channels"], space.name, r.data.height) == wanted
    assert shape["nodes"] == 4
    retrieval = name.startswith(("retrieval", "paper"))
    assert ("triplet" in s.loss, s.k) == ((True, 4) if retrieval else (False, 1))


def test_the_file_marks_what_is_published_and_what_is_not_measured():
    text = (FOLDER / "autoreid.yaml").read_text(encoding="utf-8")
    reach, costs = text.splitlines()[2:4]
    assert "as published" in reach and "classification accuracies" in reach
    assert costs.startswith("# costs: not measured here; published:")
    assert re.search(r"none of these rows has been run", text)
