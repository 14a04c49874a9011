"Recipes of another time come out as today's: the committed ones, the recorded ones, and the single key."

import gzip
import json
from pathlib import Path

import pytest

from reidlab.core.parts import KINDS, part
from reidlab.core.recipe import load_recipe, overridden, read_recipe, recipe_names, validated
from reidlab.core.upgrade import MOVES, new_form, old_keys, upgrade

HERE = Path(__file__).parent
BEFORE = json.loads(gzip.decompress((HERE / "data" / "recipes_before.json.gz").read_bytes()))


def resolved_before(name):
    "A committed recipe as it was resolved before parts brought their options."
    full = json.loads(json.dumps(BEFORE["usual"])) | {"name": name}
    for dotted, value in BEFORE["recipes"][name].items():
        *path, last = dotted.split(".")
        inner = full
        for key in path:
            inner = inner[key]
        inner[last] = value
    return full


FOLLOWED = {  # what a search took from the training and the network, and how it is where none is said
    "optimizer": {"bias_lr_factor": 1.0, "head_lr_factor": 1.0, "weight_decay_bias": None},
    "space": {"macro": "resnet", "last_stride": 1},
}


def of_search(recipe, slot):
    "What a search has of its own today, and took from elsewhere before."
    return {key: getattr(recipe.search, slot).get(key) for key in FOLLOWED[slot]}


def without(recipe, slots):
    "A recipe as plain values, but for those: one that only trains says none."
    plain = json.loads(recipe.model_dump_json())
    for slot in slots:
        for options in plain["search"][slot].values():
            for key in FOLLOWED[slot]:
                options.pop(key, None)
    return plain


def test_every_recipe_and_row_is_still_there():
    assert set(BEFORE["recipes"]) <= set(recipe_names(HERE.parent / "recipes"))


@pytest.mark.parametrize("name", BEFORE["recipes"])
def test_the_old_resolved_recipe_is_the_new_one(name):
    old = validated(name, upgrade(resolved_before(name)))
    new = load_recipe(name, folder=HERE.parent / "recipes")
    cells = new.model.backbone.name in ("derived", "small_cnn")
    slots = ["optimizer"] if cells else ["optimizer", "space"]
    for slot in slots:
        assert of_search(new, slot) in (of_search(old, slot), FOLLOWED[slot])
    old, new = without(old, slots), without(new, slots)
    assert old == new and json.dumps(old) == json.dumps(new)  # in the same order, too


def test_what_is_of_today_is_left_alone():
    plain = json.loads(load_recipe("first_look").model_dump_json())
    assert upgrade(plain) == plain and old_keys(plain) == []


@pytest.mark.parametrize("path", sorted((HERE.parent / "results").glob("*/recipe.yaml")), ids=str)
def test_every_record_is_read(path):
    recipe = read_recipe(path)
    written = validated(recipe.name, json.loads(recipe.model_dump_json()))
    assert written == recipe


@pytest.mark.parametrize("old", MOVES)
def test_a_key_of_another_time_gets_one_line(old, tmp_path):
    section, *path = old.split(".")
    value = BEFORE["usual"]
    for key in old.split("."):
        value = value[key]
    line, gone = new_form({}, old), f"{old} is no {'number' if old in KINDS else 'key'} any more; "
    assert line.startswith(gone) and "\n" not in line
    with pytest.raises(ValueError, match=gone):
        load_recipe("smoke", overrides={old: value})
    nested = value
    for key in reversed(path):
        nested = {key: nested}
    (tmp_path / "mine.yaml").write_text(json.dumps({section: nested}))
    with pytest.raises(ValueError, match=gone):
        load_recipe("mine", folder=tmp_path)


@pytest.mark.parametrize(
    "search, rule",
    [
        ({"strategy": "pcdarts", "rule": "edge_norm", "max_skips": 2}, {"usual": {"max_skips": 2}}),
        ({"strategy": "pcdarts", "rule": "softmax", "partial": 2}, "softmax"),
        ({"strategy": "darts", "rule": "sigmoid", "mixing": "sigmoid"}, "usual"),
        ({"strategy": "darts", "rule": "raw_logit", "tau": [5, 1]}, "raw_logit"),
        ({"max_skips": 1}, {"usual": {"max_skips": 1}}),
    ],
    ids=str,
)
def test_a_rule_that_the_strategy_had_brought_is_the_usual_one(search, rule):
    assert upgrade({"search": search})["search"]["rule"] == rule


@pytest.mark.parametrize("backbone", ["resnet50", "small_cnn", "derived", "osnet", "cdnet"])
def test_a_search_had_the_layout_of_the_network_whichever_it_was(backbone):
    model = {"backbone": backbone, "last_stride": 2, "macro": "darts", "stem": "conv3x2"}
    found = upgrade({"model": model, "search": {"space": "reid", "nodes": 3, "stem": ""}})
    layout = {"macro": "darts", "last_stride": 2, "nodes": 3, "stem": "conv3x2"}
    assert found["search"]["space"]["reid"] == layout


LINEAR = {"linear": {"epochs": 2.5, "factor": 0.1}}
PAIR = {"input_dim": 8, "lr": 0.5, "loops": 2, "trust": 0.5, "features": "run:a"}
DESK, FOES = (
    {k: v for k, v in PAIR.items() if k not in away}
    for away in (("trust", "features"), ("features",))
)
DRAWN = {k: PAIR[k] for k in ("input_dim", "lr", "features")}
LAST = {"teacher": "run:a", "checkpoint": "last", "logits": 0.5}


@pytest.mark.parametrize(
    "slot, train, today",
    [
        ("warmup", {"warmup": 2.5, "warmup_form": "linear", "warmup_factor": 0.1}, LINEAR),
        ("warmup", {"warmup": 9, "warmup_form": "ladder"}, {"ladder": {"epochs": 9}}),
        ("warmup", {"warmup": 9, "warmup_factor": 0.5}, {"linear": {"epochs": 9, "factor": 0.5}}),
        ("warmup", {"warmup": 0.0, "warmup_form": "linear", "warmup_factor": 0.01}, "none"),
        ("warmup", {"warmup_form": "constant"}, {"constant": {"epochs": 1}}),
        ("warmup", {"warmup": LINEAR, "ema": 0.9}, LINEAR),
        ("distill", {"distill": LAST}, {"teacher_student": LAST}),
        ("distill", {"distill": {"teacher": "", "logits": 0.5}}, "none"),
        ("distill", {"distill": {"logits": 0.5}}, "none"),
        ("distill", {"distill": {"teacher_student": LAST}}, {"teacher_student": LAST}),
        ("gan", {"gan": PAIR}, {"only": DRAWN}),
        ("gan", {"gan": PAIR | {"mode": "alone"}}, {"alone": DESK}),
        ("gan", {"gan": {"mode": "adversarial"} | PAIR}, {"adversarial": FOES}),
        ("gan", {"gan": PAIR | {"input_dim": 0}}, "none"),
        ("gan", {"gan": {"only": DRAWN}}, {"only": DRAWN}),
    ],
    ids=str,
)
def test_a_slot_is_put_together_from_the_keys_before_it(slot, train, today):
    found = upgrade({"train": train, "overrides": dotted(train)})
    kind = f"train.{slot}"
    laid_on = overridden({}, found["overrides"]).get("train", {}).get(slot, "none")
    for said in (found["train"][slot], laid_on):
        assert part(kind, said) == part(kind, today)


def dotted(train):
    "Overrides that say what a section says, down to the keys of another time."
    whole = {f"train.{key}": value for key, value in train.items()}
    inner = {k: v for k, v in whole.items() if isinstance(v, dict) and old_keys({"train": train})}
    for key, value in inner.items():
        whole |= {f"{key}.{name}": v for name, v in whole.pop(key).items()} if value else {}
    return whole


@pytest.mark.parametrize(
    "train, line",
    [
        (
            {"warmup": 10},
            "warmup is no number any more; write train.warmup: {linear: {epochs: 10}}",
        ),
        ({"warmup": "1e1"}, "write train.warmup: {linear: {epochs: 1e1}}."),
        ({"warmup": 0}, "write train.warmup: none."),
        ({"warmup": 5, "warmup_form": "ladder"}, "write train.warmup: {ladder: {epochs: 5}}."),
        (
            {"distill": LAST},
            "distill.teacher is no key any more; write train.distill: {teacher_student: {teacher: run:a}}.",
        ),
        ({"distill": LAST}, "it is an option of a part: train.distill.teacher_student.checkpoint."),
        ({"gan": {"input_dim": 8}}, "write train.gan: {only: {input_dim: 8}}."),
        ({"gan": {"mode": "alone", "input_dim": 8}}, "write train.gan: {alone: {input_dim: 8}}."),
        ({"gan": {"mode": "alone"}}, "write train.gan: alone."),
        ({"gan": {"lr": 0.1}}, "it is an option of a part: train.gan.NAME.lr."),
        ({"gan": {"trust": 0.1}}, "it is an option of a part: train.gan.adversarial.trust."),
    ],
    ids=str,
)
def test_a_flat_key_is_answered_with_the_part(train, line, tmp_path):
    (tmp_path / "mine.yaml").write_text(json.dumps({"train": train}))
    for asked in (
        {"name": "mine", "folder": tmp_path},
        {"name": "smoke", "overrides": {f"train.{key}": value for key, value in train.items()}},
        {"name": "smoke", "overrides": dotted(train)},
    ):
        with pytest.raises(ValueError, match="any more; ") as caught:
            load_recipe(**asked)
        assert line in str(caught.value)
