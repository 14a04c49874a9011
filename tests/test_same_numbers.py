"""The comparison of same_numbers.py sees a single bit; and small runs still give the numbers on record."""

import json
import subprocess
import sys
import tempfile
from copy import deepcopy
from pathlib import Path

import pytest
import same_numbers
import torch
from conftest import tiny_recipe
from same_numbers import ENTRIES, Entry, compared, differences, digest, facts, machine, numbers
from torch import Tensor

from reidlab.core.recipe import load_recipe
from reidlab.core.run import commit, open_run
from reidlab.data.class_loaders import open_classes
from reidlab.data.loaders import find_manifest, open_data
from reidlab.nas.search import search_from_recipe
from reidlab.training.checkpoint import weights_digest
from reidlab.training.classify import fit_classes
from reidlab.training.fit import fit_from_recipe
from reidlab.training.generate import generate_from_recipe

RECORD = Path(__file__).parent / "data" / "same_numbers.json"
BRIEF = {  # at the size they are drawn: how a photo is resized depends on the processor
    **{
        "data__height": 128,
        "data__width": 64,
        "data__val_fraction": 0.0,
        "data__sampler": {"pk": {"p": 4, "k": 2}},
    },
    **{"train__epochs": 1, "train__validate_every": 0},
}
SHAPES = {
    **{"data.shapes.classes": 4, "data.shapes.train_photos": 12, "data.shapes.test_photos": 2},
    **{"data.batch_size": 12, "train.epochs": 1, "train.validate_every": 0},
    **{"data.val_fraction": 0.0, "train.select": "last"},
}
CELLS = {
    **{
        "search__space__*__cells_per_stage": [1, 1],
        "search__space__*__nodes": 3,
        "search__space__*__init_channels": 4,
    },
    **{"search__epochs": 2, "search__warmup": 1, "search__validate_every": 0},
}
LAYERS = {
    **{"model__backbone": {"cnet": {"width": 0.0625}}, "search__space__*__width": 0.0625},
    **{"search__space": "cnet", "search__strategy": "topk"},
    **{"search__epochs": 2, "search__warmup": 1},
}
SMALL = {  # verb, how it is done, its recipe
    "smoke": ("train", fit_from_recipe, lambda: tiny_recipe(**BRIEF)),
    "cdnet": (
        *("train", fit_from_recipe),
        lambda: tiny_recipe(
            **BRIEF, model__backbone={"cdnet": {"width": 0.25}}, model__neck="fblneck"
        ),
    ),
    "pcb": (
        *("train", fit_from_recipe),
        lambda: tiny_recipe(
            **BRIEF, model__head={"pcb": {"stripes": 2}}, model__neck={"bn": {"embedding": 8}}
        ),
    ),
    "classes": ("train", fit_classes, lambda: load_recipe("shapes", overrides=SHAPES)),
    "generator": (
        *("generate", generate_from_recipe),
        lambda: tiny_recipe(
            **BRIEF,
            train__gan={"only": {"input_dim": 8, "ngf": 4, "ndf": 4, "batch_size": 16}},
        ),
    ),
    "cells": ("search", search_from_recipe, lambda: tiny_recipe(**BRIEF | CELLS)),
    "layers": ("search", search_from_recipe, lambda: tiny_recipe(**BRIEF | LAYERS)),
}


def first_losses(patch, seen):
    "Note every loss that is learned from."
    learn = Tensor.backward

    def noted(loss, *more, **options):
        seen.append(float(loss.detach().sum()))
        return learn(loss, *more, **options)

    patch.setattr(Tensor, "backward", noted)


def small_run(name, photos, root):
    "Weights, alphas and first loss of one of the small runs."
    verb, fit, recipe = SMALL[name]
    recipe, seen = recipe(), []
    opened = open_data
    if fit is fit_classes:  # draws its own, apart from the shared ones
        opened, photos = open_classes, root / "shapes"
    data = opened(recipe.data, recipe.seed, photos)
    run = open_run(name, recipe, verb=verb, data=data.fingerprint, root=root)
    with pytest.MonkeyPatch.context() as patch:
        first_losses(patch, seen)
        fit(recipe, run.path, workers=0, data_dir=photos)
    found = facts(run.path)
    return {key: found[key] for key in ("weights", "alphas") if key in found} | {"loss": seen[0]}


@pytest.mark.parametrize("name", SMALL)
def test_a_small_run_gives_the_numbers_on_record(name, photos, tmp_path):
    "To the bit where torch, processor and threads are the record's; the first batch's loss anywhere."
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    ours, stored = small_run(name, photos, tmp_path), record["runs"][name]
    assert ours["loss"] == pytest.approx(stored["loss"], rel=1e-5)
    if machine() == record["machine"]:
        assert ours == stored


def write_record():
    "Make the record again: python tests/test_same_numbers.py, with one thread."
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        find_manifest(tiny_recipe().data, photos)
        runs = {name: small_run(name, photos, Path(folder) / name) for name in SMALL}
    record = {"commit": commit()[0], "machine": machine(), "runs": runs}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


# --- the comparison --------------------------------------------------------------------------


@pytest.fixture
def left(finished):
    "What a finished run left, to be changed."
    return deepcopy(facts(finished[0]))


def verdicts(one, other):
    return {row["what"]: row["verdict"] for row in compared(one, other)}


def test_a_run_is_as_itself(left):
    assert {"weights", "state", "metrics", "recipe", "photos"} <= left.keys()
    assert set(verdicts(left, left).values()) == {"same"}
    assert any(key.endswith("metrics.mAP") or ".loss" in key for key in left["metrics"])
    assert not [key for key in left["metrics"] if "seconds" in key or "images_per_s" in key]


def changed(left, what, key, value):
    "One value of one fact put, or with None taken away."
    found = deepcopy(left)
    if value is None:
        found[what].pop(key)
    else:
        found[what][key] = value
    return found


@pytest.mark.parametrize(
    ("what", "key", "value"),
    [
        ("metrics", "epoch 1.loss", 1.0),
        ("metrics", "epoch 1.loss", None),
        ("metrics", "epoch 1.loss", float("nan")),
        ("state", "random", "another"),
        ("recipe", "seed", 1),
        ("recipe", "overrides", {}),
        ("recipe", "train", None),
    ],
)
def test_one_changed_number_is_seen(left, what, key, value):
    other = changed(left, what, key, value)
    assert [w for w, v in verdicts(left, other).items() if v != "same"] == [what]
    assert key in "".join(row["where"][0] for row in compared(left, other) if row["where"])


def test_a_new_number_does_no_harm_and_a_missing_fact_does(left):
    assert verdicts(left, changed(left, "metrics", "new", 1.0))["metrics"] == "same"
    less = {key: fact for key, fact in left.items() if key != "state"}
    assert verdicts(left, less)["state"] == "different"
    assert verdicts(less, left)["state"] == "new"


def test_undefined_is_undefined():
    assert differences({"a": float("nan")}, {"a": float("nan")}) == []
    assert differences({"a": 0}, {"a": float("nan")}) == ["a: 0 → nan"]


def test_one_bit_gives_another_digest():
    weights = {"b": torch.zeros(3), "a": torch.tensor(1)}
    assert digest(weights) == weights_digest(weights)
    assert digest(weights) == digest(dict(reversed(weights.items())))
    for other in (torch.tensor([0.0, 0.0, -0.0]), torch.zeros(3, 1), torch.zeros(3).double()):
        assert digest(weights | {"b": other}) != digest(weights)
    assert digest({"model": [weights]}) != digest(weights)


def test_times_are_no_numbers_of_a_run():
    said = {"loss": 1.5, "seconds": 3.0, "ranks": [{"rank": 0, "name": "x"}], "ok": True}
    assert dict(numbers(said)) == {"loss": 1.5, "ranks.0.rank": 0, "ok": True}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("ab", "ab", True),
        ("ab", "2:cd 1:ab", True),  # one rule more
        ("2:cd 1:ab", "2:cd 1:ef", False),
        ("1:ab", "2:ab", False),  # no rule in common
    ],
)
def test_photos_are_compared_by_rules_both_know(one, other, same):
    found = verdicts({"photos": one}, {"photos": other})["photos"]
    assert found == ("same" if same else "different")


def test_what_did_not_run_is_no_match():
    ran, failed, skipped = {"weights": "ab"}, {"failed": "no such key"}, {"skipped": "no photos"}
    for pair in ((ran, failed), (failed, failed), (skipped, ran)):
        assert verdicts(*pair) == {"run": "NOT RUN"}
    assert verdicts(skipped, skipped) == {"run": "skipped"}


def test_entries_bring_what_they_need():
    assert same_numbers.chosen(["vehicles8, r"]) == [n for n in ENTRIES if n.startswith("vehi")]
    assert same_numbers.chosen([]) == list(ENTRIES)
    with pytest.raises(SystemExit, match="no entry begins with cdnt; there are: smoke"):
        same_numbers.chosen(["cdnt"])


def test_a_newer_tree_is_asked_in_its_own_words():
    entry = Entry("p", "r", "n", {"a.b": 1}, {"a": {"b": 1}}, short={"e": 2})
    assert entry.parameters(newer=False, full=False)["overrides"] == {"a.b": 1, "e": 2}
    assert entry.parameters(newer=True, full=True) == {
        **{"recipe": "r", "run": "n"},
        "overrides": {"a": {"b": 1}},
    }


def test_older_recipes_are_upgraded_by_the_newer_tree(tmp_path, monkeypatch):
    (tmp_path / "younger.py").write_text("def upgrade(r): return {'seed': r['place'] * 2}")
    monkeypatch.setattr(same_numbers, "UPGRADE", "younger:upgrade")
    before = {"entries": {"one": {"recipe": {"place": 1}, "weights": "ab"}, "two": {"failed": "x"}}}
    found = same_numbers.upgraded(before, tmp_path)["entries"]
    recipe = found["one"].pop("recipe")  # complete, as the newer tree resolves it
    assert recipe["seed"] == 2 and recipe["train"]["epochs"]
    assert found == {"one": {"weights": "ab"}, "two": {"failed": "x"}}


def test_a_page_that_ran_other_code_is_no_result(tmp_path):
    page = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": ["given = 0\n"]}
    check = {"cell_type": "code", "metadata": {}, "source": ["assert given['run'] == 'one', given"]}
    (tmp_path / "page.ipynb").write_text(json.dumps({"cells": [page, check]}))
    entry = Entry("page.ipynb", given={"given": {"run": "one"}})
    about = same_numbers.called(tmp_path, tmp_path, entry, full=False)  # a tree without a package
    assert about["failed"].startswith("ran the code of") and str(tmp_path) in about["failed"]


def test_it_does_not_import_what_it_compares():
    code = "import same_numbers, sys; print([m for m in sys.modules if m.startswith('reidlab')])"
    words = [sys.executable, "-c", code]
    said = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert said.stdout.strip() == "[]", said.stderr


if __name__ == "__main__":
    write_record()
