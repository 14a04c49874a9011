"A sweep is ranked by validation, its intervals stay within 0 to 100 and need three seeds, and one test figure is shown."

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from reidlab.evaluation.groups import group_table

PAGE = Path(__file__).parents[2] / "nbs" / "sweep.ipynb"


def numbers(text):
    return [float(n) for n in re.findall(r"-?\d+\.\d+|-?\d+", text.replace("−", "-"))]


@pytest.mark.parametrize("values", [[0.93, 0.999, 0.999], [0.0, 0.001, 0.05], [1.0, 1.0, 0.2]])
def test_an_interval_of_a_share_stays_a_share(values):
    told = group_table({"one": pd.DataFrame({"mAP": values})}).loc["one", "mAP (%)"]
    value, low, high = numbers(told)
    assert 0 <= low <= value <= high <= 100


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_there_is_an_interval_from_three_seeds_on(n):
    told = group_table({"one": pd.DataFrame({"mAP": np.linspace(0.4, 0.6, n)})})
    assert len(numbers(told.loc["one", "mAP (%)"])) == (3 if n >= 3 else 1)


def test_figures_that_are_no_shares_are_not_cut():
    told = group_table({"one": pd.DataFrame({"seconds": [10.0, 90.0, 200.0]})}, metric="seconds")
    assert min(numbers(told.loc["one", "seconds (%)"])) < 0


def test_the_better_test_is_not_chosen():
    from reidlab.jobs.choice import choose
    from reidlab.jobs.grid import plan_cells, varied

    cells = plan_cells("smoke", grid={"train.clip": [0, 5]}, seeds=[0, 1, 2])
    one, two = varied(cells)
    shown = pd.DataFrame({"val_mAP": [0.6, 0.7, 0.8], "mAP": [0.99, 0.98, 0.97]})
    better = pd.DataFrame({"val_mAP": [0.7, 0.8, 0.9], "mAP": [0.1, 0.2, 0.3]})
    choice = choose(cells, {one: shown, two: better})
    text = choice.table().to_string() + str(choice) + choice.test().to_string()
    assert choice.group == two and "clip" in choice.table().columns
    assert "20.0" in text and not re.search(r"9[789]\.\d", text), "the loser's test is not shown"
    sources = "".join("".join(c["source"]) for c in json.loads(PAGE.read_text())["cells"])
    assert "group_table" not in sources and "choice.test()" in sources
