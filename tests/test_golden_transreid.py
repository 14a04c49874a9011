"""TransReID and its family against the outputs of the authors' code, on weights filled by a rule of their names.

Outputs and names lie in data/golden_transreid.npz, copied from the golden data of the interchange.
"""

import json
import math
from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from test_golden_cdnet import MASK, fill, hashed, waves
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from reidlab.interchange.key_rules import load_family, told_of
from reidlab.interchange.transreid import TRANSREID_FAMILY
from reidlab.models.catalogue import build_model
from reidlab.models.cost import count_macs
from reidlab.models.timm_backbone import resized_positions
from reidlab.models.token_heads import side_by_side
from reidlab.models.vit import jigsaw

DATA = Path(__file__).parent / "data"
GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "interchange"
shared = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared/golden/interchange")
REDUCED = {"heads": 3, "height": 64, "width": 32}
CASES = {  # what is told; photos; parameters that the embedding needs; MACs
    "transreid_reduced_s16": (REDUCED, 2, 410_688, 3_622_464),
    "transreid_reduced_s16_jpm": (REDUCED, 2, 523_488, 4_956_480),
    "transreid_reduced_s16_sie_cam": (REDUCED, 2, 411_264, 3_622_464),
    "pass_reduced": (REDUCED, 2, 411_840, 4_654_080),
    "transreid_vit_base_s16": ({}, 2, 85_747_968, 11_338_795_008),
    "personvit_vit_small": ({}, 1, 21_640_320, 2_930_254_848),
    "pass_vit_small": ({}, 1, 21_644_928, 3_001_171_968),
}
SMALL = [case for case, (told, *_) in CASES.items() if told]
each_case = pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in SMALL else pytest.mark.slow) for c in CASES]
)


@cache
def arrays():
    with np.load(DATA / "golden_transreid.npz", allow_pickle=False) as stored:
        return dict(stored)


def golden_fill(name, shape):
    "The rule of the golden data: float64 values that float32 can hold."
    if name.rpartition(".")[2] in ("weight", "bias", "running_mean", "running_var") or not shape:
        value = fill(name, shape, torch.float64)
    else:  # tokens and tables
        i = np.arange(math.prod(shape), dtype=np.uint64)
        u = hashed((i * 2654435761 + crc32(name.encode())) & MASK)
        value = torch.tensor(0.2 * (2 * u - 1)).reshape(shape)
    return value.float().double() if value.is_floating_point() else value


@cache
def published(case):
    "A file with the names and shapes of a published one, filled by the rule."
    rows = [row.split() for row in arrays()[f"{case}__keys"].tolist()]
    return {name: golden_fill(name, tuple(map(int, shape))) for name, *shape in rows}


def read(case, dtype=torch.float64, **more):
    "Its network, and where every tensor went."
    state, told = published(case), CASES[case][0] | more
    facts = TRANSREID_FAMILY.facts(state)
    parts = TRANSREID_FAMILY.parts(facts, told_of(TRANSREID_FAMILY, told))
    model = build_model(**parts, n_pids=facts["n_pids"]).to(dtype).eval()
    return model, load_family(model, state, TRANSREID_FAMILY, told)


def photos(case, dtype=torch.float64):
    "The golden data's input: a slow wave and noise."
    n, (height, width) = CASES[case][1], (64, 32) if case in SMALL else (256, 128)
    shape = (n, 3, height, width)
    i = np.arange(math.prod(shape), dtype=np.uint64)
    noise = hashed((i * 2654435761 + crc32(b"input")) & MASK) - 0.5
    return (waves(shape, torch.float64) + torch.tensor(noise.reshape(shape))).to(dtype)


def embedded(model, case, dtype=torch.float64):
    cameras = torch.tensor([1, 3]) if case.endswith("cam") else None
    with torch.no_grad():
        return model(photos(case, dtype), cameras)


def both_sides(model, case, dtype=torch.float64):
    "Embeddings before and after the neck."
    found = []
    for model.head.neck_feat in ("before", "after"):
        found.append(embedded(model, case, dtype))
    return found


@each_case
@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_embeddings(case, dtype, share):
    model = read(case, dtype)[0]
    for seen, side in zip(both_sides(model, case, dtype), ("emb", "emb_after_bn"), strict=True):
        expected = torch.tensor(arrays()[f"{case}__{side}"]).to(dtype)
        assert_close(seen, expected, rtol=0, atol=share * float(expected.abs().max()))


@pytest.mark.parametrize("case", SMALL)
def test_every_tensor_of_a_file_is_accounted_for(case):
    state, (model, report) = published(case), read(case)
    one_by_one = [name for told in report.loaded.values() for name in told.split(" + ")]
    assert sorted([*one_by_one, *report.left]) == sorted(state)
    assert set(report.fresh) <= {"backbone.cameras.seen"}
    assert {*report.loaded, *report.fresh} == set(model.state_dict())
    dead = {name for name, why in report.left.items() if "dead weight" in why}
    wanted = lambda name: name.startswith(("base.blocks.2.", "base.norm."))
    assert dead == ({name for name in state if wanted(name)} if case.endswith("jpm") else set())
    assert set(report.left) - dead == {"base.fc.weight", "base.fc.bias"}


@each_case
def test_parameters_and_macs(case):
    told, _, params, macs = CASES[case]
    facts = TRANSREID_FAMILY.facts(published(case))
    with torch.device("meta"):
        model = build_model(
            **TRANSREID_FAMILY.parts(facts, told_of(TRANSREID_FAMILY, told)), n_pids=10
        )
    used = [p.numel() for k, p in model.named_parameters() if "classifier" not in k]
    assert sum(used) == params
    with sdpa_kernel(SDPBackend.MATH):
        assert count_macs(model, (1, *photos(case).shape[1:])) == macs


def test_wrong_networks_are_told_from_the_right_one():
    case = "transreid_reduced_s16_jpm"
    expected = torch.tensor(arrays()[f"{case}__emb"])
    right = lambda **more: read(case, **more)[0]
    off = lambda model: float((embedded(model, case) - expected).abs().max())
    unshuffled, coarse = right(), right()
    unshuffled.backbone.jigsaw.shuffle = False
    for layer in coarse.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.eps = 1e-5
    whole = right()
    whole.head.join = side_by_side
    assert off(right(shift=6)) == pytest.approx(0.19, abs=0.005)  # rotated by one more
    assert off(unshuffled) == pytest.approx(0.10, abs=0.005)
    assert off(coarse) == pytest.approx(3e-4, abs=5e-5)
    assert off(whole) > 1
    assert off(right()) < 1e-9


def test_a_camera_makes_a_difference_and_the_wrong_coefficient_another():
    case = "transreid_reduced_s16_sie_cam"
    expected = torch.tensor(arrays()[f"{case}__emb"])
    off = lambda **more: float((embedded(read(case, **more)[0], case) - expected).abs().max())
    assert off() < 1e-9 and off(camera_coefficient=1.0) > 0.1
    model = read(case)[0]
    with torch.no_grad():
        assert float((model(photos(case)) - expected).abs().max()) > 0.1  # nobody said which


@pytest.mark.parametrize("n", [7, 8, 9, 210])
def test_the_jigsaw_is_the_formula(n):
    rotated = [*range(4, n), *range(4)]
    rotated += rotated[-2:-1] if n % 2 else []
    half = len(rotated) // 2
    dealt = [rotated[i + h] for i in range(half) for h in (0, half)]
    assert jigsaw(torch.arange(n).reshape(1, n, 1), 5).flatten().tolist() == dealt


@pytest.mark.parametrize("rule", ["bilinear", "timm"])
@pytest.mark.parametrize(
    "grids", ["14x14_to_16x8", "14x14_to_21x10", "16x8_to_24x8", "7x7_to_16x8"]
)
def test_position_tables_on_other_grids(rule, grids):
    old, new = (tuple(map(int, grid.split("x"))) for grid in grids.split("_to_"))
    shape = (1, 1 + math.prod(old), 4)
    i = np.arange(math.prod(shape), dtype=np.uint64)
    u = hashed((i * 2654435761 + crc32(b"pos_embed")) & MASK)
    table = torch.tensor(0.2 * (2 * u - 1)).reshape(shape)
    expected = torch.tensor(arrays()[f"{rule}_{grids}"])
    kind = {"bilinear": "bilinear", "timm": "bicubic"}[rule]
    seen = resized_positions(table.to(expected.dtype), old, new, rule=kind)
    assert_close(seen, expected, rtol=0, atol=1e-9 if rule == "bilinear" else 1e-6)


@shared
def test_kept_numbers_are_the_golden_ones():
    cases = json.loads((GOLDEN / "cases.json").read_text())
    with np.load(GOLDEN / "outputs.npz", allow_pickle=False) as stored:
        for case, (_, n, params, macs) in CASES.items():
            rows = json.loads((GOLDEN / f"keys/{case}.json").read_text())
            names = [" ".join([key, *map(str, shape)]) for key, shape, _ in rows]
            assert names == arrays()[f"{case}__keys"].tolist()
            row = cases[case]
            assert (row["batch"], row["params_used_for_embedding"]) == (n, params)
            assert list(row["macs"].values()) == [macs]
            for side in ("emb", "emb_after_bn"):
                np.testing.assert_array_equal(
                    stored[f"{case}__{side}"], arrays()[f"{case}__{side}"]
                )
