"""Losses and metrics against what the published baselines compute (origin: tests/data/README.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from reidlab.losses.softmax import softmax_loss
from reidlab.losses.triplet import triplet_loss, triplet_stats
from reidlab.retrieval.distance import distances, l2_normalise
from reidlab.retrieval.evaluate import rank_features
from reidlab.retrieval.metrics import evaluate_rank

DATA = Path(__file__).parent / "data"
BATCHES = ("4x2x16", "8x4x32")  # people x photos x dimensions
SETS = ("market_like", "tiny_gallery")
TRIPLETS = {
    "trip_hard_m0.1": {"margin": 0.1},
    "trip_hard_m0.16": {"margin": 0.16},
    "trip_hard_m0.3": {"margin": 0.3},
    "trip_hard_m1.0": {"margin": 1.0},
    "trip_hard_soft": {"margin": "soft"},
    "trip_hard_m0.3_normalized": {"margin": 0.3, "normalize": True},
}


def golden(name):
    with np.load(DATA / f"golden_{name}.npz", allow_pickle=False) as stored:
        return dict(stored)


@pytest.mark.parametrize("options", TRIPLETS.items(), ids=lambda item: item[0])
@pytest.mark.parametrize("batch", BATCHES)
def test_triplet_loss_and_gradient(batch, options):
    name, options = options
    g = golden(f"losses_{batch}")
    feats = torch.tensor(g["feat"], requires_grad=True)
    loss = triplet_loss(feats, torch.tensor(g["labels"]), **options)
    loss.backward()
    assert_close(loss.item(), float(g[name]), rtol=1e-4, atol=0)
    assert_close(feats.grad, torch.tensor(g[f"{name}_grad"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("batch", BATCHES)
def test_triplet_does_not_depend_on_the_order_of_the_batch(batch):
    g = golden(f"losses_{batch}")
    order = torch.randperm(len(g["labels"]), generator=torch.Generator().manual_seed(0))
    feats, pids = torch.tensor(g["feat"])[order], torch.tensor(g["labels"])[order]
    assert_close(triplet_loss(feats, pids).item(), float(g["trip_hard_m0.3"]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("batch", BATCHES)
def test_triplet_stats(batch):
    g = golden(f"losses_{batch}")
    _, in_order, _, d_an, d_ap = g["trip_lite_hard_m0.3_stats"]
    stats = triplet_stats(torch.tensor(g["feat"]), torch.tensor(g["labels"]))
    ours = [stats[name].item() for name in ("in_order", "d_an", "d_ap")]
    np.testing.assert_allclose(ours, [in_order / 100, d_an, d_ap], rtol=1e-5)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.2])
def test_smoothed_cross_entropy(batch, smoothing):
    g = golden(f"losses_{batch}")
    logits = torch.tensor(g["logits"], requires_grad=True)
    loss = softmax_loss(logits, torch.tensor(g["labels"]), smoothing)
    name = f"ce_smooth_{smoothing}" if smoothing else "ce"
    assert_close(loss.item(), float(g[name]), rtol=1e-4, atol=0)
    if f"{name}_grad" in g:
        loss.backward()
        assert_close(logits.grad, torch.tensor(g[f"{name}_grad"]), rtol=0, atol=1e-4)


def ranked(g, metric, normalise, whole):
    feats = [l2_normalise(g[side]) if normalise else torch.tensor(g[side]) for side in ("qf", "gf")]
    labels = [g[name] for name in ("q_pid", "g_pid", "q_cam", "g_cam")]
    if whole:
        return evaluate_rank(distances(*feats, metric), *labels)
    return rank_features(*feats, *labels, metric=metric)


@pytest.mark.parametrize("whole", [True, False], ids=["matrix", "stream"])
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(
    ("metric", "normalise", "key"),
    [("cosine", False, "cos"), ("sqeuclidean", True, "cos"), ("euclidean", False, "euc_raw")],
)
def test_standard_scores(name, metric, normalise, key, whole):
    g = golden(f"eval_{name}")
    r = ranked(g, metric, normalise, whole)
    np.testing.assert_array_equal(r.valid, g["valid"])
    assert abs(r.mAP - g[f"std_map_{key}"]) < 1e-6
    cmc = g[f"std_cmc_{key}"]  # ends with the shortest filtered list
    assert len(cmc) > 10
    np.testing.assert_allclose(r.cmc[: len(cmc)], cmc, atol=1e-6)
    if key == "cos":
        np.testing.assert_allclose(np.nan_to_num(r.ap), g["std_ap_cos"], atol=1e-6)
        np.testing.assert_array_equal(r.first_hit, g["first_hit_rank"])


@pytest.mark.parametrize("whole", [True, False], ids=["matrix", "stream"])
@pytest.mark.parametrize("name", SETS)
def test_trapezoidal_scores(name, whole):
    g = golden(f"eval_{name}")
    r = ranked(g, "cosine", False, whole)
    np.testing.assert_allclose(np.nan_to_num(r.ap_trapezoidal), g["trap_ap"], atol=1e-6)
    assert abs(r.mAP_trapezoidal - g["trap_map_valid"]) < 1e-6
    assert r.mAP_trapezoidal < r.mAP
    n = min(len(g["trap_cmc_valid"]), len(r.cmc))
    np.testing.assert_allclose(r.cmc[:n], g["trap_cmc_valid"][:n], atol=1e-6)


@pytest.mark.parametrize("name", SETS)
def test_queries_without_a_match_are_named(name):
    g = golden(f"eval_{name}")
    r = ranked(g, "cosine", False, whole=False)
    lost = np.flatnonzero(~g["valid"])
    assert len(lost) > 0
    assert r.without_match == [(int(q), int(g["q_pid"][q]), int(g["q_cam"][q])) for q in lost]
    assert r.summary()["queries_without_match"] == len(lost)


def test_cdnet_evaluation():
    "The evaluator of CDNet: unit features, squared distances, one query without a match skipped."
    g = golden("cdnet_evaluation")
    feats = [l2_normalise(g[f"{side}_feats"]) for side in "qg"]
    labels = [g[name] for name in ("q_pids", "g_pids", "q_camids", "g_camids")]
    r = rank_features(*feats, *labels, metric="sqeuclidean", max_rank=50)
    assert r.n_valid == len(r.valid) - 1
    assert abs(r.mAP - g["mAP"]) < 1e-6
    np.testing.assert_allclose(r.cmc, g["cmc"], atol=1e-6)
