"""Options that change what a run draws, how fast it learns and what it keeps: repeatable, and resumed exactly."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_recipe
from test_repeatable import different, fitted, last, leaves, opened

from reidlab.core.run import RunFolder
from reidlab.data import loaders
from reidlab.training.fit import fit_from_recipe

SMALL = {"data__height": 32, "data__width": 16, "data__val_fraction": 0.0}
VARIED = {
    "data__augment": {
        "flip": {},
        "pad_crop": {"read_at": [36, 18]},
        "contrast": {"strength": 0.2},
        "saturation": {"strength": 0.3},
        "hue": {"strength": 0.1},
        "noise": {"deviation": 4.0},
        "erase": {"fill": "noise"},
    },
    "data__sampler": {"camera": {"p": 4}},
    "train__ema": 0.9,
    "train__freeze_epochs": 1,
}


class PowerCut(BaseException):
    pass


def cut_after(epoch):
    def draw(folder, record):
        if record["epoch"] == epoch and not (folder / "cut").exists():
            (folder / "cut").touch()
            raise PowerCut

    return draw


def test_everything_switched_on_is_repeatable(photos, tmp_path, monkeypatch):
    recipe = tiny_recipe(model__head={"linear": {"dropout": 0.3}}, **SMALL, **VARIED)
    one = leaves(fitted(recipe, "one", tmp_path, photos))
    assert ".ema.model.head.classifier.weight" in one
    monkeypatch.setattr(loaders, "KEEP_BYTES", 0)
    path = opened(recipe, "two", tmp_path, photos)
    with pytest.raises(PowerCut):
        fit_from_recipe(recipe, path, workers=2, data_dir=photos, on_epoch=[cut_after(1)])
    resting = leaves(last(path)["model"])
    fit_from_recipe(recipe, path, workers=2, data_dir=photos)
    assert different(one, leaves(last(path))) == []
    moved = set(different(resting, leaves(last(path)["model"])))
    assert {k for k in resting if k.startswith(".backbone") and k.endswith("weight")} <= moved


def test_stages_at_rest_open_again_after_a_stop_at_either_border(photos, tmp_path):
    resting = {"freeze_epochs": 1, "freeze_stages": 2, "freeze_stages_epochs": 2, "epochs": 3}
    recipe = tiny_recipe(
        **SMALL | {f"train__{key}": value for key, value in resting.items()},
        train__optimizer={
            "sgd": {"layer_decay": 0.5, "weight_decay": 0.1, "no_weight_decay": True}
        },
    )
    path, kept = opened(recipe, "whole", tmp_path, photos), []
    keep = lambda folder, record: kept.append(leaves(last(folder)["model"]))
    fit_from_recipe(recipe, path, workers=0, data_dir=photos, on_epoch=[keep])
    one = leaves(last(path))
    assert sorted(k for k in one if "momentum" in k) == sorted(
        f".optimizer.state.{n}.momentum_buffer" for n in range(14)
    )
    names = [k for k in kept[0] if k.startswith(".backbone")]
    moved = [set(different(a, b)) & set(names) for a, b in pairwise(kept)]
    assert moved[0] == {k for k in names if k.startswith(".backbone.layer3")}
    assert moved[1] == set(names)
    learned = [event["trainable"] for event in RunFolder(path).events("epoch")]
    total = sum(v.numel() for k, v in kept[0].items() if k.endswith((".weight", ".bias"))) - 256
    assert learned[0] < learned[1] < learned[2] == total  # the neck's bias never learns
    assert RunFolder(path).metrics()["metrics"]["trainable"] in learned
    for epoch in (1, 2):
        again = opened(recipe, f"cut-{epoch}", tmp_path, photos)
        with pytest.raises(PowerCut):
            fit_from_recipe(recipe, again, workers=0, data_dir=photos, on_epoch=[cut_after(epoch)])
        fit_from_recipe(recipe, again, workers=0, data_dir=photos)
        assert different(one, leaves(last(again))) == []


PLAIN = {**SMALL, "train__epochs": 1, "data__augment__erase__probability": 1.0}


@pytest.fixture(scope="module")
def plain(photos, tmp_path_factory):
    "What a short training without any of the options ends with."
    folder = tmp_path_factory.mktemp("runs")
    return fitted(tiny_recipe(**PLAIN), "plain", folder, photos)["model"]


@pytest.mark.parametrize(
    "key", [k for k in VARIED if k.startswith("data")] + ["train__freeze_epochs"]
)
def test_each_option_takes_effect(key, plain, photos, tmp_path):
    changed = tiny_recipe(**PLAIN, **{key: VARIED[key]})
    other = fitted(changed, "other", tmp_path, photos)["model"]
    name = "head.classifier.weight"
    assert not torch.equal(plain[name], other[name])


def test_the_average_is_kept_and_judged(photos, tmp_path):
    more = SMALL | {"data__val_fraction": 0.2, "train__ema": 0.9, "train__epochs": 3}
    judged = []

    def judge(model, recipe, data, device):
        judged.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"mAP": (0.2, 0.9, 0.1)[len(judged) - 1]}

    recipe = tiny_recipe(**more)
    path = opened(recipe, "judged", tmp_path, photos)
    fit_from_recipe(recipe, path, workers=0, data_dir=photos, validate=judge)
    best = torch.load(path / "checkpoints" / "best.pt", weights_only=True)
    assert best["epoch"] == 2 and different(leaves(best["model"]), leaves(judged[1])) == []
    end = last(path)
    assert different(leaves(end["ema"]["model"]), leaves(judged[2])) == []
    assert not torch.equal(
        end["model"]["head.classifier.weight"], judged[2]["head.classifier.weight"]
    )


def test_the_published_rates_survive_a_stop_in_mid_warmup(photos, tmp_path):
    golden = json.loads((Path(__file__).parent / "data" / "lr_schedules.json").read_text())
    g = golden["lite_default_random"]
    recipe = tiny_recipe(
        **SMALL,
        train__epochs=6,
        train__optimizer={"sgd": {"lr": g["base_lr"], "head_lr_factor": 10.0}},
        train__schedule={
            "multistep": {"milestones": [g["warmup_epoch"] + s for s in g["decay_step"]]}
        },
        train__lr_per="epoch",
        train__warmup={"ladder": {"epochs": g["warmup_epoch"]}},
    )
    path = opened(recipe, "lite", tmp_path, photos)
    for epoch in (2, 4):
        (path / "cut").unlink(missing_ok=True)
        with pytest.raises(PowerCut):
            fit_from_recipe(recipe, path, workers=0, data_dir=photos, on_epoch=[cut_after(epoch)])
    fit_from_recipe(recipe, path, workers=0, data_dir=photos)
    theirs = np.array(g["lr_base_fc_per_epoch"])[:6]
    np.testing.assert_allclose(RunFolder(path).history().lr, theirs[:, 0], rtol=1e-9)
    groups = last(path)["optimizer"]["param_groups"]
    rates = sorted({round(group["lr"], 9) for group in groups})
    np.testing.assert_allclose(rates, theirs[5], rtol=1e-6)
