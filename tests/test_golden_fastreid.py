"""fast-reid's networks and its way of resizing, against what the authors' code gave on weights and photos made by rule.

Outputs lie in data/golden_fastreid.npz, copied from the golden data of the interchange (of the network inputs, their
first eight rows); a wrong name is another weight.
"""

import math
from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from PIL import Image
from test_golden_cdnet import MASK, hashed
from torch.testing import assert_close

from reidlab.core.recipe import Data
from reidlab.data.transforms import normalise, read_photo, resize

DATA = Path(__file__).parent / "data"
SIZES = ((60, 27), (140, 75))
HALF = (0.5, 0.5, 0.5)


@cache
def arrays():
    with np.load(DATA / "golden_fastreid.npz", allow_pickle=False) as stored:
        return dict(stored)


def draws(name, *shape):
    "The golden data's numbers in 0 … 1 for a name."
    i = np.arange(math.prod(shape), dtype=np.uint64)
    return hashed((i * 2654435761 + crc32(name.encode())) & MASK).reshape(shape)


def picture(height, width):
    return np.floor(256 * draws("image", height, width, 3)).astype("uint8")


def golden(name):
    return torch.from_numpy(arrays()[name].astype("int16")).permute(2, 0, 1)


@pytest.mark.parametrize("size", SIZES)
def test_bicubic_is_pillows_to_the_bit(size, tmp_path):
    Image.fromarray(picture(*size)).save(tmp_path / "noise.png")
    seen = read_photo(tmp_path / "noise.png", 64, 32, "bicubic")
    assert torch.equal(seen.short(), golden(f"pil_bicubic_{size[0]}x{size[1]}"))


@pytest.mark.parametrize("size", SIZES)
def test_bilinear_is_pillows_to_a_grey_level_and_not_opencvs_when_it_shrinks(size):
    photo = torch.from_numpy(picture(*size)).permute(2, 0, 1)
    seen = resize(photo, 64, 32).short()
    name = f"{size[0]}x{size[1]}"
    apart = (seen - golden(f"pil_bilinear_{name}")).abs()
    assert apart.max() <= 1
    far = (seen - golden(f"cv2_linear_{name}")).abs().float()
    if size[0] > 64:
        assert far.mean() > 25  # OpenCV takes four pixels, however many there are
    else:
        assert far.max() <= 1


@pytest.mark.parametrize(
    ("family", "interpolation", "mean", "std"),
    [
        ("fastreid", "bicubic", Data().mean, Data().std),
        ("torchreid", "bilinear", Data().mean, Data().std),
        ("transreid", "bilinear", HALF, HALF),
    ],
)
def test_the_networks_see_what_theirs_saw(family, interpolation, mean, std):
    photo = torch.from_numpy(picture(60, 27)).permute(2, 0, 1)
    seen = normalise(resize(photo, 64, 32, interpolation), mean, std)[:, :8]
    expected = torch.from_numpy(arrays()[f"{family}_60x27"])
    step = 1 / 255 / min(std)  # a grey level, where this processor resizes in floats
    assert_close(seen, expected, rtol=0, atol=1e-5 if interpolation == "bicubic" else step + 1e-5)
