"How photos are varied: the old keys' photos to the bit, orders that cannot be, members of one's own."

import hashlib

import numpy as np
import pytest
import torch
from conftest import tiny_recipe

from reidlab.core.recipe import Data, first_difference, load_recipe
from reidlab.core.seed import rng
from reidlab.core.upgrade import upgrade
from reidlab.data.augmentations import draw_part
from reidlab.data.loaders import open_data, train_loader
from reidlab.data.transforms import normalise, resize
from reidlab.data.variation import Variation
from reidlab.training.checks import check_batches

# data sections of another time, and a digest of the photos that they made then (592fcb3)
BEFORE = {
    "usual": ({}, "26e0e94d220b"),
    "shifted far": ({"pad": 30, "flip": 1.0, "erase": 0.0}, "a5384c83cf36"),
    "read larger": ({"crop_from": [144, 72], "pad": 4, "erase_fill": "black"}, "aade67b6abf2"),
    "lite": (
        {
            "pad": 0,
            "erase": 0.6,
            "erase_area": [0.02, 0.1],
            "erase_fill": "black",
            "brightness": 0.1,
            "contrast": 0.1,
        },
        "e7e9b878ba1a",
    ),
    "noise": (
        {"flip": 0.0, "noise": 20.0, "erase_fill": "noise", "erase_aspect": 0.5},
        "b3bbf9c102be",
    ),
    "constant": (
        {"pad": 0, "erase_fill": "constant", "erase_value": [0.5, 0.4, 0.3], "brightness": 0.5},
        "f9c6f2514114",
    ),
    "cutout": (
        {
            "task": "classification",
            "height": 32,
            "width": 32,
            "pad": 4,
            "erase": 0.0,
            "cutout": 8,
            "brightness": 0.2,
        },
        "fb1ce75d1a6b",
    ),
}


def varied(vary, size):
    "A digest of 24 photos; none of it is resized or tinted, which depends on the processor."
    photo = torch.from_numpy(rng(7).integers(256, size=(3, *size), dtype=np.uint8))
    seen = [vary(photo, e, i).contiguous().numpy().tobytes() for e in (0, 3) for i in range(12)]
    return hashlib.sha256(b"".join(seen)).hexdigest()[:12]


@pytest.mark.parametrize("name", BEFORE)
def test_old_keys_make_the_photos_they_made(name):
    said, digest = BEFORE[name]
    vary = Variation(Data(**upgrade({"data": {"flip": 0.5, **said}})["data"]), 5)
    assert varied(vary, vary.read) == digest


def test_a_resized_crop_is_cut_from_the_whole_photo():
    old = {
        "task": "classification",
        "crop": "resized",
        "pad": 10,
        "erase": 0.0,
        "crop_area": [0.2, 0.5],
    }
    data = Data(**upgrade({"data": old | {"height": 24, "width": 20}})["data"])
    assert list(data.augment) == ["resized_crop", "flip"]  # such a photo was never padded
    vary = Variation(data, 5)
    photo = torch.from_numpy(rng(8).integers(256, size=(3, 70, 50), dtype=np.uint8))
    for i in range(8):
        top, left, h, w = draw_part(rng(5, 203, 1, i), 70, 50, area=(0.2, 0.5))
        part = resize(photo[:, top : top + h, left : left + w], 24, 20)
        mirrored = rng(5, 202, 1, i).random() < 0.5
        wanted = normalise(part.flip(-1) if mirrored else part, data.mean, data.std)
        assert torch.equal(vary(photo, 1, i), wanted)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"erase": 0.0}, ["flip", "pad_crop"]),
        ({"pad": 0, "crop_from": [144, 72]}, ["flip", "pad_crop", "erase"]),
        ({"flip": 0.0, "pad": 0, "erase": 0.0}, []),
        ({"hue": 0.1, "brightness": 0.2}, ["flip", "pad_crop", "brightness", "hue", "erase"]),
    ],
)
def test_an_old_section_lists_what_applied(old, new):
    assert list(upgrade({"data": old})["data"]["augment"]) == new


def test_recorded_overrides_go_where_they_applied():
    old = {"data": {"pad": 5, "erase": 0.0}, "overrides": {"data.pad": 5, "data.erase": 0.0}}
    assert upgrade(old)["overrides"] == {"data.augment.pad_crop.pixels": 5}


def test_the_order_is_part_of_the_recipe():
    one, two = ({"pad_crop": {}, "flip": {}}, {"flip": {}, "pad_crop": {}})
    recipes = [load_recipe("smoke", overrides={"data.augment": said}) for said in (one, two)]
    assert "data.augment is" in first_difference(*recipes)


ORDERS = [
    ("erase, flip", "flip stands after erase, which .* comes last. The order that works: flip, erase"),
    ("flip, cutout, hue, erase", "hue stands after cutout.* works: flip, hue, cutout, erase"),
    ("pad_crop, resized_crop, erase", "resized_crop stands after pad_crop.*: resized_crop, pad_crop, erase"),
    ("flip@global", "an augmentation has no branch. Write flip"),
]  # fmt: skip


@pytest.mark.parametrize(("order", "words"), ORDERS)
def test_an_order_that_cannot_be_is_refused_before_a_run_begins(order, words, photos):
    usual = tiny_recipe()
    data = Data(**usual.data.model_dump() | {"augment": {n: {} for n in order.split(", ")}})
    with pytest.raises(ValueError, match=words) as caught:
        check_batches(usual.model_copy(update={"data": data}), open_data(usual.data, 0, photos))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", ["reid", "classification"])
def test_every_member_serves_both_tasks(task):
    every = {
        "resized_crop": {},
        "flip": {},
        "pad_crop": {},
        "contrast": {},
        "noise": {},
        "erase": {},
    }
    data = Data(task=task, height=32, width=16, augment=every | {"cutout": {"side": 4}})
    photo = torch.from_numpy(rng(9).integers(256, size=(3, 50, 40), dtype=np.uint8))
    image = Variation(data, 1)(photo, 0, 0)
    assert image.shape == (3, 32, 16) and image.isfinite().all()


def test_one_pass_and_step_by_step_agree_wherever_brightness_stands(photos):
    for order in (
        "brightness, flip, pad_crop, erase",
        "flip, brightness, pad_crop",
        "pad_crop, flip",
    ):
        usual = tiny_recipe(data__val_fraction=0.0).data
        said = usual.model_dump() | {"augment": {name: {} for name in order.split(", ")}}
        train = open_data(usual, 0, photos).train
        fast, slow = (train_loader(train, Data(**said | {"cache": c})) for c in ("auto", "off"))
        assert fast.dataset.one_pass == (order != "pad_crop, flip") and not slow.dataset.one_pass
        assert torch.equal(next(iter(fast)).images, next(iter(slow)).images)
