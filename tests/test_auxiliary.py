"""A derived network with an auxiliary classifier, and one that goes on from another's weights, as runs."""

import pytest
import torch
from conftest import TINY, tiny_recipe, walk
from torch.testing import assert_close

from reidlab.core.run import RunFolder, open_run
from reidlab.data.loaders import open_data
from reidlab.models.genotype import PUBLISHED
from reidlab.nas.budget import derived_cost
from reidlab.training.checks import check_model
from reidlab.training.fit import fit_from_recipe
from reidlab.training.launch import launch
from reidlab.training.trained import load_model

CELLS = {
    "data__height": 32,
    "data__width": 16,
    "model__backbone": "derived",
    "model__backbone__*__genotype": "auto_reid",
    "model__backbone__*__init_channels": 4,
    "model__backbone__*__cells_per_stage": [1, 1, 1],
    "model__backbone__*__stem": "conv3x2",
    "data__val_fraction": 0.0,
}
AIDED = CELLS | {"model__backbone__*__auxiliary": 0.4}


def opened(recipe, name, root, photos):
    data = open_data(recipe.data, recipe.seed, photos)
    return open_run(name, recipe, verb="train", data=data.fingerprint, root=root).path


def fitted(recipe, name, root, photos, **more):
    path = opened(recipe, name, root, photos)
    return path, fit_from_recipe(recipe, path, workers=0, data_dir=photos, **more)


def last(path):
    return torch.load(path / "checkpoints" / "last.pt", weights_only=True)["model"]


@pytest.fixture(scope="module")
def aided(photos, tmp_path_factory):
    "A training with an auxiliary classifier and dropped paths: (its folder, its recipe, its record)."
    recipe = tiny_recipe(**AIDED, **{"model__backbone__*__drop_path": 0.2})
    path, record = fitted(recipe, "aided", tmp_path_factory.mktemp("aided"), photos)
    return path, recipe, record


@pytest.fixture(scope="module")
def plain(photos, tmp_path_factory):
    "One without: (its folder, its record)."
    return fitted(tiny_recipe(**CELLS), "plain", tmp_path_factory.mktemp("plain"), photos)


def test_auxiliary_trains_and_stays_behind(aided, plain):
    (aided, _, record), (plain, bare) = aided, plain
    figures = record["metrics"]
    assert (figures["params"], figures["macs"]) == (
        bare["metrics"]["params"],
        bare["metrics"]["macs"],
    )
    with_it, without = last(aided), last(plain)
    extra = {k: v for k, v in with_it.items() if k not in without}
    assert extra and all(k.startswith("auxiliary.") for k in extra)
    tower = {k: v for k, v in extra.items() if "running" not in k and "num_batches" not in k}
    assert figures["auxiliary_params"] == sum(v.numel() for v in tower.values())
    assert "auxiliary_params" not in bare["metrics"]
    assert not torch.equal(
        with_it["backbone.stack.stem.0.weight"],
        without["backbone.stack.stem.0.weight"],
    )
    network, _ = load_model(aided)
    x = torch.randn(2, 3, 64, 32)
    assert network(x).shape == (2, network.feature_dim)


def test_its_weight_counts(photos, tmp_path):
    first = {}
    for weight in (0.4, 0.8):
        recipe = tiny_recipe(
            **AIDED | {"model__backbone__*__auxiliary": weight},
            train__epochs=1,
            train__optimizer__adamw__lr=1e-12,
        )
        path, _ = fitted(recipe, f"w{weight}", tmp_path, photos)
        first[weight] = RunFolder(path).events("epoch")[0]["softmax"]
    plain, _ = fitted(
        tiny_recipe(**CELLS, train__epochs=1, train__optimizer__adamw__lr=1e-12),
        "p",
        tmp_path,
        photos,
    )
    alone = RunFolder(plain).events("epoch")[0]["softmax"]
    assert first[0.8] - alone == pytest.approx(2 * (first[0.4] - alone), rel=1e-4)
    assert first[0.4] - alone == pytest.approx(0.4 * torch.tensor(8.0).log(), rel=0.5)


def test_two_processes_equal_one_with_an_auxiliary(photos, tmp_path):
    recipe = tiny_recipe(
        **AIDED, train__epochs=1, train__optimizer={"sgd": {"lr": 0.001}}, train__warmup="none"
    )
    one, _ = fitted(recipe, "one", tmp_path, photos)
    two = opened(recipe, "two", tmp_path, photos)
    launch(fit_from_recipe, 2, "cpu", recipe=recipe, folder=two, workers=0, data_dir=photos)
    assert_close(last(two), last(one), rtol=1e-5, atol=1e-5)


def test_a_stopped_run_goes_on_to_the_same_bits(aided, photos, tmp_path):
    whole, recipe, _ = aided

    def stop(folder, record):
        raise KeyboardInterrupt

    halves = opened(recipe, "halves", tmp_path, photos)
    with pytest.raises(KeyboardInterrupt):
        fit_from_recipe(recipe, halves, workers=0, data_dir=photos, on_epoch=[stop])
    fit_from_recipe(recipe, halves, workers=0, data_dir=photos)
    pieces = last(halves)
    assert all(torch.equal(v, pieces[k]) for k, v in last(whole).items())


def test_what_a_search_counts_has_no_tower():
    genotype = PUBLISHED["auto_reid"]
    assert derived_cost(genotype, tiny_recipe(**AIDED)) == derived_cost(
        genotype, tiny_recipe(**CELLS)
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model.backbone.*.auxiliary": 0.4}, "auxiliary is an option of derived"),
        (
            {k.replace("__", "."): v for k, v in AIDED.items()}
            | {"model.backbone.*.cells_per_stage": [1, 1]},
            "needs 3 cells or more",
        ),
    ],
)
def test_auxiliary_where_there_is_no_place(changes, words, stocked):
    with pytest.raises(ValueError, match=words):
        walk("nbs/train.ipynb", overrides=TINY | changes)
    assert not list(stocked.runs.iterdir())


# --- going on from a run's weights -----------------------------------------------------------


def test_retrain_from_a_run(aided, photos, tmp_path):
    best = aided[0] / "checkpoints" / "best.pt"
    own = {"model__backbone__*__weights": str(best), "model__backbone__*__drop_path": 0.1}
    recipe = tiny_recipe(**CELLS, **own, train__epochs=1, train__optimizer__adamw__lr=1e-12)
    check_model(recipe, 10)
    second, _ = fitted(recipe, "second", tmp_path, photos)
    (told,), after = RunFolder(second).events("weights"), last(second)
    there = torch.load(best, weights_only=True)["model"]
    assert told["loaded"] + len(told["left"]) == len(there)
    assert {k.split(".")[0] for k in told["left"]} == {
        "head",
        "auxiliary",
    }  # other names' classifiers
    assert told["fresh"] == [k for k in after if "classifier" in k]
    weights = [k for k in there if k.startswith(("backbone.", "neck.")) and k.endswith("weight")]
    for key in weights:
        assert_close(after[key], there[key], rtol=0, atol=1e-6)


def test_weights_that_do_not_fit_end_the_job(stocked, plain):
    best = str(plain[0] / "checkpoints" / "best.pt")
    cells = {k.replace("__", "."): v for k, v in CELLS.items()} | {"model.backbone.*.weights": best}
    before = sorted(stocked.runs.iterdir())
    for changes, words in [
        ({"model.backbone.*.genotype": "random:1"}, "holds another backbone: genotype is"),
        ({"model.backbone.*.init_channels": 8}, "holds another backbone: init_channels is 4 there"),
        ({"model.backbone.*.weights": "nowhere.pt"}, "weights 'nowhere.pt' not found"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            walk("nbs/train.ipynb", overrides=TINY | cells | changes)
    assert sorted(stocked.runs.iterdir()) == before
