"""A search that heeds milliseconds: one table a run, the same answer for the same table."""

import json

import numpy as np
import pytest
from conftest import TINY, tiny_recipe, walk

from reidlab.core.run import open_run, read_json
from reidlab.data.loaders import open_data
from reidlab.models.genotype import read_genotype
from reidlab.models.ops import space_ops
from reidlab.nas import latency
from reidlab.nas.budget import CostTable
from reidlab.nas.latency import Latency, read_latency, run_latency, write_latency
from reidlab.nas.search import search_from_recipe

OPS = space_ops("reid")
SMALL = {
    "model__backbone": "derived",
    "model__backbone__*__genotype": "auto_reid",
    "model__backbone__*__init_channels": 6,
    "model__backbone__*__cells_per_stage": [1, 1],
    "model__backbone__*__stem": "conv3x2",
    "search__epochs": 2,
    "search__warmup": 0,
    "search__space__*__nodes": 2,
    "search__validate_every": 0,
    "search__p": 2,
    "search__k": 2,
    "data__val_fraction": 0.0,
}
TIMED = SMALL | {"search__cost": "latency", "search__cost_weight": 50.0, "search__alpha_lr": 0.2}


def handed_in(recipe, slow="", fixed=10**6):
    "A table in which one operation is slow, and every other takes a microsecond."
    about = {"device": "a clock of paper", "threads": 1, "repeats": 1}
    times = np.where(np.array(OPS) == slow, 10**6, 10**3) * np.ones((5, 1), np.int64)
    times[:, OPS.index("none")] = 0
    facts = latency._facts(recipe, OPS)
    return Latency(CostTable(fixed, times, 2 * times), about | facts)


def opened(recipe, name, root, photos, table):
    data = open_data(recipe.data, recipe.seed, photos)
    run = open_run(name, recipe, verb="search", data=data.fingerprint, root=root)
    write_latency(run.path, table)
    return run.path


def searched(recipe, path, photos, **more):
    return search_from_recipe(recipe, path, workers=0, data_dir=photos, **more)


def alphas(path):
    return read_genotype(path / "genotype.json").about["alphas"]


@pytest.fixture(scope="module")
def timed(photos, tmp_path_factory):
    "A search under a table in which separable convolutions are slow: (recipe, folder, record)."
    recipe = tiny_recipe(**TIMED)
    path = opened(
        recipe, "timed", tmp_path_factory.mktemp("runs"), photos, handed_in(recipe, "sep_conv_3x3")
    )
    return recipe, path, searched(recipe, path, photos)


@pytest.fixture(autouse=True)
def no_stopwatch(monkeypatch):
    "Nothing in these tests measures a time."
    monkeypatch.setattr(latency, "measure_latency", lambda *a, **k: pytest.fail("measured"))


def test_the_record_says_where_it_was_measured(timed):
    _, path, record = timed
    assert record["latency"] == {"device": "a clock of paper", "threads": 1, "repeats": 1}
    cost = read_genotype(path / "genotype.json").about["cost"]
    assert cost["latency_device"] == "a clock of paper"
    assert cost["latency_ms"] == record["metrics"]["latency_ms"] >= 1


def test_what_is_slow_is_avoided(timed, photos, tmp_path):
    recipe, path, _ = timed
    other = opened(recipe, "other", tmp_path, photos, handed_in(recipe, "skip_connect"))
    searched(recipe, other, photos)
    slow = {"sep_conv_3x3": path, "skip_connect": other}
    mean = lambda where, op: np.mean(np.array(alphas(where)["normal"])[:, OPS.index(op)])
    for op in slow:
        (rest,) = set(slow) - {op}
        assert mean(slow[op], op) < mean(slow[rest], op)


def test_a_stopped_search_goes_on_with_its_table(timed, photos, tmp_path):
    recipe, whole, _ = timed
    path = opened(recipe, "halves", tmp_path, photos, handed_in(recipe, "sep_conv_3x3"))
    before = (path / "latency.json").read_bytes()

    def stop(folder, record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        searched(recipe, path, photos, on_epoch=[stop])
    searched(recipe, path, photos)
    assert (path / "latency.json").read_bytes() == before
    assert alphas(path) == alphas(whole)


def test_a_limit_in_milliseconds_holds(photos, tmp_path):
    recipe = tiny_recipe(**SMALL, search__max_latency=1.02)
    table = handed_in(recipe, "sep_conv_3x3")
    path = opened(recipe, "limited", tmp_path, photos, table)
    found = searched(recipe, path, photos)
    assert found["metrics"]["latency_ms"] <= 1.02
    for file in (path / "genotypes").glob("*.json"):
        assert read_genotype(file).about["cost"]["latency_ms"] <= 1.02
    impossible = tiny_recipe(**SMALL, search__max_latency=0.5)
    path = opened(impossible, "impossible", tmp_path, photos, table)
    with pytest.raises(ValueError, match="no genotype stays within 500,000 ns of latency"):
        searched(impossible, path, photos)
    assert not list(path.rglob("*.pt"))


def test_stages_share_one_table(photos, tmp_path):
    stages = [{"epochs": 1}, {"epochs": 1, "ops": 3}]
    recipe = tiny_recipe(**TIMED, search__stages=stages)
    path = opened(recipe, "staged", tmp_path, photos, handed_in(recipe))
    record = searched(recipe, path, photos)
    assert record["latency"]["device"] == "a clock of paper"
    assert not list(path.glob("stages/*/latency.json"))


def test_a_table_is_measured_once_and_written_first(timed, tmp_path, monkeypatch):
    recipe, calls = timed[0], []
    monkeypatch.setattr(latency, "measure_latency", lambda *a: calls.append(1) or handed_in(recipe))
    first = run_latency(tmp_path, recipe)
    assert run_latency(tmp_path, recipe).about == first.about and calls == [1]
    assert read_json(tmp_path / "latency.json")["unit"] == "ns"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"nodes": 3}, "nodes is 3 there and 2 here"),
        ({"ops": ["none"]}, "ops is"),
        ({"normal": [[1]]}, "needs 5 edges of 7 times"),
    ],
)
def test_a_table_of_another_search(changes, words, timed, tmp_path):
    recipe, path, _ = timed
    content = read_json(path / "latency.json") | changes
    (tmp_path / "latency.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        read_latency(tmp_path, recipe, OPS)


@pytest.mark.parametrize(
    "search, words",
    [
        ({"cost": "latency"}, "search.cost_weight penalises, and that is 0"),
        ({"max_latency": -1}, "search.max_latency"),
        ({"memory": "0.1MiB"}, "the budget is 0.00 GiB"),
        ({"sharpness": True, "p": 10, "k": 8}, "search.sharpness needs 2 batches"),
        ({"split": "identities", "p": 8}, "search.p"),
    ],
)
def test_what_cannot_be_searched_leaves_no_folder(search, words, stocked):
    small = {k.replace("__", "."): v for k, v in SMALL.items()}
    with pytest.raises(ValueError, match=words):
        walk(
            "nbs/search.ipynb",
            overrides=TINY | small | {f"search.{k}": v for k, v in search.items()},
        )
    assert not list(stocked.runs.iterdir())


def test_a_training_without_a_batch_leaves_no_folder(stocked):
    with pytest.raises(ValueError, match="PKSampler needs 16 identities"):
        walk("nbs/train.ipynb", overrides=TINY | {"data.sampler.pk.p": 16})
    assert not list(stocked.runs.iterdir())
