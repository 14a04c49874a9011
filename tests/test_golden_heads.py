"""Stripes and the spectral transform against the published baselines (origin: tests/data/README.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import SUMS
from closeness import assert_same_formula as close

from reidlab.models.spectral import spectral_transform, transition
from reidlab.models.stripes import pcb_parts

DATA = Path(__file__).parent / "data"


def golden(name):
    with np.load(DATA / f"golden_{name}.npz", allow_pickle=False) as stored:
        return {key: torch.from_numpy(np.asarray(value)) for key, value in stored.items()}


@pytest.fixture
def pcb():
    "Six stripes with the weights of the vectors, and the vectors."
    g = golden("pcb_head")
    pool, neck, head = pcb_parts(12, 7, pool="max", embedding=4)
    with torch.no_grad():
        for i in range(6):
            neck.embeds[i].weight.copy_(g[f"conv_w{i}"].flatten(1))
            neck.embeds[i].bias.copy_(g[f"conv_b{i}"])
            neck.norms[i].weight.copy_(g[f"bn_w{i}"])
            neck.norms[i].bias.copy_(g[f"bn_b{i}"])
            neck.norms[i].running_mean.copy_(g[f"bn_m{i}"])
            neck.norms[i].running_var.copy_(g[f"bn_v{i}"])
            head.classifiers[i].weight.copy_(g[f"cls_w{i}"])
            head.classifiers[i].bias.copy_(g[f"cls_b{i}"])
    neck, head = neck.double(), head.double()
    return g, lambda x: head(*neck(pool(x.double()))), (neck, head)


def test_stripes_in_evaluation(pcb):
    g, run, parts = pcb
    for part in parts:
        part.eval()
    close(run(g["x"]), g["feature"], SUMS)


def test_stripes_in_training_without_dropout(pcb):
    g, run, _ = pcb
    *stripes, joined = run(g["x"])
    assert joined.name == "stripes" and joined.logits is None
    close(joined.feat, g["train_feature_nodrop"], SUMS)
    assert [b.name for b in stripes] == [f"stripe_{i + 1}" for i in range(6)]
    for i, branch in enumerate(stripes):
        assert branch.feat is None
        close(branch.logits, g[f"train_logits{i}"], SUMS)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("batch", ["4x2x16", "8x4x32"])
def test_spectral_transform(batch, sigma):
    g = golden("spectral")
    feats = g[f"{batch}/feat"].double()
    for norm, name in (("row", "paper"), ("col", "lite")):
        expected = g[f"{batch}/st_{name}_{sigma}"]
        close(spectral_transform(feats, sigma, norm), expected, SUMS)
    kept = transition(feats, sigma, "col").diag().mean()
    close(kept.double(), g[f"{batch}/st_lite_{sigma}_diagmean"], SUMS)
