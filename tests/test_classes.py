"""Sets of classes, from the download to the report: what no single chapter can say."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY, facts, laboratory, pictures, walk
from PIL import Image
from test_bad_input import empty, refused
from test_jobs import EVALUATE, SEARCH, TRAIN

from reidlab.core.recipe import load_recipe
from reidlab.core.run import RunFolder, load_runs, open_run, read_json
from reidlab.data.class_loaders import open_classes
from reidlab.data.manifest import load_manifest
from reidlab.evaluation.predictions import load_predictions
from reidlab.jobs.starting_point import starting_point
from reidlab.training.checkpoint import read_checkpoint
from reidlab.training.classify import fit_classes

CLASSES, CIFAR = "data_prep/classes.ipynb", "data_prep/cifar.ipynb"
FEW = {  # four shapes, twelve photos each; two epochs of three batches
    "data.shapes.classes": 4,
    "data.shapes.train_photos": 12,
    "data.shapes.test_photos": 5,
    "data.batch_size": 12,
    "data.val_fraction": 0.2,
    "train.epochs": 2,
    "train.validate_every": 1,
}
NARROW = {"model.backbone": "cdnet", "model.backbone.*.width": 0.25}


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    "A laboratory in which the pages trained and evaluated the classification recipe."
    with pytest.MonkeyPatch.context() as patch:
        lab = laboratory(tmp_path_factory.mktemp("named"), patch)
        lab.train, lab.evaluate = lab.root / "train.ipynb", lab.root / "evaluate.ipynb"
        walk(TRAIN, lab.train, recipe="shapes", overrides=FEW)
        walk(EVALUATE, lab.evaluate, run="shapes-train-s0")
        lab.run = RunFolder(lab.runs / "shapes-train-s0")
        yield lab


def test_the_jobs_train_and_evaluate_a_classifier(named):
    run = named.run
    assert pictures(named.train) == 2 and pictures(named.evaluate) in (1, 2)
    assert "random weights, seed 0" in named.train.read_text()
    history, final = run.history(), run.metrics()
    assert history["val_top1"].between(0, 1).all() and final["classes"] == 4
    assert final["metrics"]["val_top1"] == history["val_top1"].max()
    assert "on held-out photos" in final["selection"]
    folder = run.path / "evaluate" / "synthetic_shapes"
    stored = read_json(folder / "metrics.json")
    said, truth = load_predictions(folder / "predictions.npz")
    test = load_manifest(next(named.data.iterdir()).name).photos("test")
    np.testing.assert_array_equal(truth, test.pids)
    right = int((said.predicted == truth).sum())
    assert stored["metrics"]["top1"] == right / 20 and stored["metrics"]["top5"] == 1.0
    sure = stored["intervals"]["top1"]
    assert sure["low"] <= stored["metrics"]["top1"] <= sure["high"] and sure["n"] == 20
    assert stored["protocol"]["counts"] == {"photos": 20, "classes": 4}
    assert stored["protocol"]["times_opened"] == 1
    text = named.evaluate.read_text(encoding="utf-8")
    for shown in ("top1 (%)", "largest classes", "low, high", "most often taken for"):
        assert shown in text, shown
    row = load_runs([run.name], [named.runs]).loc[run.name]
    assert row["top1"] == right / 20 and row["chance_top1"] == 0.25


def test_called_again_the_jobs_show_what_there_is(named):
    before = facts(named.run.path)
    walk(TRAIN, recipe="shapes", overrides=FEW)
    walk(EVALUATE, run=named.run.name)
    assert facts(named.run.path) == before


def test_two_processes_name_the_same_and_train(named, tmp_path):
    folder = named.run.path / "evaluate" / "synthetic_shapes"
    alone = read_json(folder / "metrics.json")
    rules = {"evaluate.batch_size": 3}
    folder.rename(tmp_path / "alone")
    walk(EVALUATE, run=named.run.name, device="cpu", gpus=2, overrides=rules)
    two = read_json(folder / "metrics.json")
    assert (alone["processes"], two["processes"]) == (1, 2)
    assert alone["metrics"] == two["metrics"] and alone["weakest"] == two["weakest"]
    walk(TRAIN, recipe="shapes", run="pair", device="cpu", gpus=2, overrides=FEW)
    pair = RunFolder(named.runs / "pair")
    assert pair.finished and pair.environment["processes"] == 2
    one, other = named.run.history(), pair.history()  # the same photos, the same draws
    np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-3)


def test_two_runs_of_one_seed_end_alike(lab):
    kept = []
    for name in ("one", "two"):
        recipe = load_recipe("shapes", overrides=FEW | NARROW | {"model.backbone.*.stem": "cifar"})
        data = open_classes(recipe.data, recipe.seed)
        run = open_run(name, recipe, verb="train", data=data.fingerprint)
        fit_classes(recipe, run.path, workers=2 if name == "two" else 0)
        kept.append(read_checkpoint(run.path / "checkpoints" / "last.pt")["model"])
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])


def test_a_classifier_is_the_start_of_a_ranking(stocked):
    stem = {
        "model.backbone.*.stem": "reid",
        "model.neck": "fblneck",
        "data.height": 64,
        "data.width": 64,
    }
    walk(TRAIN, recipe="shapes", run="eyes", overrides=FEW | NARROW | stem)
    start = TINY | NARROW | {"model.neck": "fblneck", "model.backbone.*.weights": "run:eyes"}
    recipe = load_recipe(
        "smoke", overrides=start | {"train.optimizer.adamw.lr": 1e-12, "train.epochs": 1}
    )
    told = starting_point(recipe, 8)
    assert "489 tensors loaded" in told and "a classifier of other names" in told
    walk(TRAIN, run="people", overrides=recipe.overrides)
    before, after = (
        read_checkpoint(stocked.runs / name / "checkpoints" / "best.pt")["model"]
        for name in ("eyes", "people")
    )
    weights = [k for k, w in before.items() if w.ndim == 4]
    assert weights and all(
        torch.allclose(before[k], after[k], atol=1e-6) for k in weights if "classifier" not in k
    )
    walk(EVALUATE, run="people")
    assert RunFolder(stocked.runs / "people").recipe.model.weights == "run:eyes"


@pytest.mark.parametrize(
    "page, given, words",
    [
        (TRAIN, {"recipe": "cdnet_classes/cifar100"}, ("'cifar100' not found", "data_prep/cifar")),
        (TRAIN, {"recipe": "cdnet_classes/imagenet"}, ("'imagenet' not found", "classes.ipynb")),
        (
            TRAIN,
            {"recipe": "shapes", "overrides": {"data.sampler.pk.p": 8}},
            ("data.sampler", "task reid", "'p': 8"),
        ),
        (TRAIN, {"recipe": "shapes", "overrides": {"train.select": "R1"}}, ("top1", "got R1")),
        (TRAIN, {"recipe": "shapes", "overrides": {"data.batch_size": 999}}, ("999", "384")),
        (SEARCH, {"recipe": "shapes"}, ("data.task is classification", "needs task reid")),
        (TRAIN, {"recipe": "cdnet/finetuned"}, ("'market1501' not found",)),
        (
            TRAIN,
            {"overrides": TINY | {"model.backbone.*.weights": "run:gone"}},
            ("run 'gone' not found",),
        ),
        (CIFAR, {}, ("Get cifar-100-binary.tar.gz",)),
        (CLASSES, {}, ("train/<class>/*.jpg", "'imagenet' is not here")),
    ],
)
def test_what_is_missing_is_said(page, given, words, lab):
    with refused(*words):
        walk(page, **given)


def test_people_are_no_classes_and_classes_no_people(stocked):
    recipe = load_recipe("shapes", overrides=FEW)
    folder = open_classes(recipe.data, 0).manifest.root.name
    with refused("holds classes, and data.task is reid", "Set data.task to classification"):
        walk(TRAIN, overrides={"data.name": folder})
    people = next(p.name for p in stocked.data.iterdir() if p.name.startswith("synthetic"))
    with refused("holds identities, and data.task is classification"):
        walk(TRAIN, recipe="shapes", overrides=FEW | {"data.name": people})
    assert empty(stocked.runs)


def test_an_image_folder_goes_through(lab, tmp_path):
    draw = np.random.default_rng(0)
    for split, n in (("train", 8), ("val", 3)):
        for kind, level in (("n01440764", 40), ("n01443537", 200)):
            folder = lab.raw / "imagenet" / "ILSVRC" / split / kind
            folder.mkdir(parents=True)
            for i in range(n):
                size = draw.integers(40, 90, 2)
                noise = draw.integers(level - 30, level + 30, (*size, 3))
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{i}.JPEG")
    before = facts(lab.raw)
    walk(CLASSES, tmp_path / "prepared.ipynb")
    assert facts(lab.raw) == before and pictures(tmp_path / "prepared.ipynb") == 2
    manifest = load_manifest("imagenet")
    assert manifest.counts()["photos"].to_dict() == {"train": 16, "test": 6}
    photo = {"data.height": 48, "data.width": 48, "data.resize": 56}
    photo |= {"data.augment": {"resized_crop": {}, "flip": {}}, "data.name": "imagenet"}
    photo |= {"data.batch_size": 4, "train.epochs": 3}
    walk(TRAIN, recipe="shapes", run="photos", overrides=photo)
    walk(EVALUATE, run="photos")
    stored = json.loads((lab.runs / "photos/evaluate/imagenet/metrics.json").read_text())
    assert stored["protocol"]["resize"] == 56 and stored["protocol"]["counts"]["photos"] == 6
