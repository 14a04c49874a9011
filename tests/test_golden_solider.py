"""SOLIDER's Swin against the outputs of the authors' code, on weights filled by a rule of their names.

Outputs and the names of two files lie in data/golden_solider.npz, copied from the golden data of the interchange.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from filling import filled_state, photos
from torch.testing import assert_close

from reidlab.interchange.key_rules import load_family
from reidlab.interchange.solider import SOLIDER
from reidlab.models.catalogue import build_model
from reidlab.models.cost import count_macs, count_parameters
from reidlab.models.semantic_swin import attended, solider_swin

DATA = Path(__file__).parent / "data"
GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "interchange"
shared = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared/golden/interchange")
REDUCED, TINY = "solider_reduced_128x64", "solider_swin_tiny_384x128"
SIZES = {REDUCED: (2, 3, 128, 64), TINY: (1, 3, 384, 128)}
PARAMETERS = {
    REDUCED: 1_291_590,
    TINY: 27_528_954,
}  # that the embedding sees, the neck's among them
MACS = {REDUCED: 61_629_024, TINY: 5_514_506_496}  # with the dial behind the feature: 2 · 2 · C
CASES = [REDUCED, pytest.param(TINY, marks=pytest.mark.slow)]


@cache
def arrays():
    with np.load(DATA / "golden_solider.npz", allow_pickle=False) as stored:
        return dict(stored)


@cache
def file_of(case):
    "A file as it was published, of golden weights."
    return filled_state(arrays()[f"keys_{case}"].tolist())


def read(state, **told):
    "A network of ours, built for a file and filled with it; and the account of every tensor."
    facts, told = SOLIDER.facts(state), SOLIDER.asks | told
    model = build_model(**SOLIDER.parts(facts, told), n_pids=facts["n_pids"] or 10).double()
    return model.eval(), load_family(model, state, SOLIDER, told)


def embedded(model, case, side="before", dtype=torch.float64):
    "The test embedding, before or after the neck's norm."
    with torch.no_grad():
        maps = model.to(dtype).backbone(photos(*SIZES[case]).to(dtype))
        before, after = model.neck(model.pool(maps))
    return before if side == "before" else after


def expected(case, side="before"):
    return torch.tensor(arrays()[f"{case}__emb{'_after_bn' if side == 'after' else ''}"])


@pytest.mark.parametrize("case", CASES)
def test_embeddings(case):
    model, _ = read(file_of(case))
    for side in ("before", "after"):
        there = expected(case, side)
        assert_close(
            embedded(model, case, side), there, rtol=0, atol=1e-9 * float(there.abs().max())
        )
    with torch.no_grad():
        assert torch.equal(
            model(photos(*SIZES[case])), embedded(model, case)
        )  # the neck's norm is not asked
    there = expected(case).float()
    here = embedded(model, case, dtype=torch.float32)
    assert_close(here, there, rtol=0, atol=1e-3 * float(there.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_has_a_place_and_the_costs_are_the_published_ones(case):
    state = file_of(case)
    model, report = read(state)
    assert set(report.loaded) == set(model.state_dict()) and not report.fresh
    assert set(report.loaded.values()) | set(report.left) == set(state)
    assert len(set(report.loaded.values())) == len(report.loaded)
    why = {
        name.split(".")[1] if "index" not in name else "index": reason
        for name, reason in report.left.items()
    }
    assert set(why) == {"index", "norm0", "norm1", "norm2", "semantic_embed_w", "semantic_embed_b"}
    classifier = count_parameters(model.head)
    assert count_parameters(model) - classifier == PARAMETERS[case]
    dead = 2 * 2 * model.feature_dim
    assert count_macs(model, (1, *SIZES[case][1:])) == MACS[case] - dead


def test_wrong_readings_are_told_apart(monkeypatch):
    "Each is another network with the same names and shapes; 1e-9 would see them all."
    state, there, seen = file_of(REDUCED), expected(REDUCED), {}
    off = lambda model: float((embedded(model, REDUCED) - there).abs().max())
    for weight in (-1, 0.0, 1.0):
        seen[f"semantic weight {weight}"] = off(read(state, semantic_weight=weight)[0])
    key = "base.stages.0.downsample.reduction.weight"
    turned = state[key].view(48, 24, 2, 2).transpose(2, 3).reshape(48, 96)
    seen["rows and columns exchanged"] = off(read(state | {key: turned})[0])
    monkeypatch.setattr("reidlab.models.semantic_swin.attended", lambda block, x: block._attn(x))
    seen["shifted before it is padded, as in timm"] = off(read(state)[0])
    assert min(seen.values()) > 0.01, seen
    assert abs(seen["shifted before it is padded, as in timm"] - 0.4934453466) < 1e-9


def test_dividing_windows_agree_with_timm():
    torch.manual_seed(0)
    net = solider_swin(semantic_weight=-1, dim=8, depths=(2, 2), heads=(1, 2)).double().eval()
    block, x = net.net.layers[0].blocks[1], torch.randn(1, 14, 21, 8, dtype=torch.float64)
    with torch.no_grad():
        assert_close(attended(block, x), block._attn(x), rtol=0, atol=1e-12)
        images = torch.randn(1, 3, 56, 56, dtype=torch.float64)
        theirs = net.net.forward_features(images).permute(0, 3, 1, 2)
        assert_close(net(images), theirs, rtol=0, atol=1e-12)


def test_pre_trained_files_hold_the_same_backbone():
    "Below teacher beside a student, as training saved it, and the teacher alone."
    state = file_of(REDUCED)
    teacher = {
        k.replace("base.", "backbone.", 1): v for k, v in state.items() if k.startswith("base.")
    }
    teacher |= {"head.mlp.0.weight": torch.ones(2, 2), "head.last_layer.weight_g": torch.ones(2, 1)}
    model, report = read(teacher)
    assert torch.equal(embedded(model, REDUCED), embedded(read(state)[0], REDUCED))
    assert {k for k in report.left if k.startswith("head.")} == {
        k for k in teacher if k[:5] == "head."
    }
    assert all(k.startswith(("neck.", "head.")) for k in report.fresh)


def test_a_narrower_feature_is_read():
    "REDUCE_FEAT_DIM of its settings: a linear layer without bias before the neck."
    state = {k: v for k, v in file_of(REDUCED).items() if k.startswith("base.")}
    parts = ("weight", "bias", "running_mean", "running_var")
    state |= {f"bottleneck.{x}": torch.rand(6).double() for x in parts}
    state |= {"fcneck.weight": torch.rand(6, 192).double()}
    model, report = read(state)
    assert set(report.fresh) == {"neck.norm.num_batches_tracked", "head.classifier.weight"}
    with torch.no_grad():
        maps = model.backbone(photos(*SIZES[REDUCED])).mean((2, 3))
    assert_close(embedded(model, REDUCED), maps @ state["fcneck.weight"].T)


def test_windows_that_differ_between_blocks_are_refused():
    state = dict(file_of(REDUCED))
    table = "base.stages.2.blocks.1.attn.w_msa.relative_position_bias_table"
    state[table] = state[table][:81]
    with pytest.raises(ValueError, match=r"1 of 137 tensors.* is \(81, 4\), not \(169, 4\)"):
        read(state)


@shared
def test_kept_numbers_are_the_golden_ones():
    with np.load(GOLDEN / "outputs.npz", allow_pickle=False) as stored:
        for key in [k for k in stored if k.startswith("solider_")]:
            np.testing.assert_array_equal(stored[key], arrays()[key])
    cases = json.loads((GOLDEN / "cases.json").read_text())
    for case, size in SIZES.items():
        there = json.loads((GOLDEN / f"keys/{case}.json").read_text())
        rows = [" ".join([key, *map(str, shape)]) for key, shape, _ in there]
        assert rows == arrays()[f"keys_{case}"].tolist()
        assert cases[case]["macs"] == {f"{size[2]}x{size[3]}": MACS[case]}
        assert cases[case]["params_used_for_embedding"] == PARAMETERS[case]
