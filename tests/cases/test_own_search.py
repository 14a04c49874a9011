"A space and a strategy of one's own are searched like those of the house."

from pathlib import Path

import pytest
from conftest import tiny_recipe
from test_own import bench  # noqa: F401

from reidlab.nas.checks import check_search
from reidlab.nas.strategies import search_card, search_model, search_strategy
from reidlab.nas.supernet import search_space, supernet_of

MINE = """from functools import partial

from reidlab.nas.cdnet_space import LAYER_SPACES, SEARCH_SPACES, of_cells, of_layers
from reidlab.nas.strategies import STRATEGIES, Strategy
from reidlab.nas.supernet import Supernet


def plainly(
    loud: float = 1.0,  # how loud
) -> Strategy:
    "All at once, and no more."
    return Strategy("first order", cells=Supernet, layers="it knows no layers.")


SEARCH_SPACES["short"] = partial(of_cells, ("skip_connect", "sep_conv_3x3", "none"))
SEARCH_SPACES["three"] = partial(
    of_layers, LAYER_SPACES["cnet"]._replace(candidates=LAYER_SPACES["cnet"].candidates[:3])
)
STRATEGIES["plainly"] = plainly
"""


def test_a_space_and_a_strategy_of_ones_own(bench):  # noqa: F811
    Path(bench / "own.py").write_text(MINE)
    shape = {"stem": "conv3x2", "init_channels": 4, "cells_per_stage": [1, 1], "nodes": 2}
    cells = tiny_recipe(search__space={"short": shape}, search__strategy="plainly")
    check_search(cells, 54)
    net = supernet_of(search_model(cells, 54))
    assert net.space == ("skip_connect", "sep_conv_3x3", "none")
    assert search_space(cells).name == ""  # a genotype notes its ops one by one
    small = {"search__space": {"three": {"width": 0.0625}}, "search__strategy": "topk"}
    layers = tiny_recipe(**small, model__backbone={"cnet": {"width": 0.0625}})
    check_search(layers, 54)
    assert supernet_of(search_model(layers, 54)).alpha.shape == (6, 3)
    assert search_card(layers).loc["space", ""] == "three, 3 layers at a place"
    with pytest.raises(ValueError, match=r"strategy plainly .*space three: it knows no layers"):
        search_strategy(tiny_recipe(**small | {"search__strategy": "plainly"}))
