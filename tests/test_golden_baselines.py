"""Losses and metrics against what the published baselines compute (origin: tests/data/README.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from reidlab.losses.centre import CentreLoss
from reidlab.losses.cluster import cluster_loss, local_cluster_loss, stripe_distances
from reidlab.losses.focal import focal_loss
from reidlab.losses.margin import am_logits, lite_logits
from reidlab.losses.range import person_means, range_loss, range_parts
from reidlab.losses.softmax import softmax_loss
from reidlab.losses.triplet import hardest_pairs, triplet_loss, triplet_stats
from reidlab.losses.weighted import weighted_pairs
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


# the remaining losses: (feat, labels, …) and what the published code made of them
@pytest.fixture(params=BATCHES)
def metric(request):
    g = golden(f"metric_losses_{request.param}")
    return {k: torch.tensor(v) if v.ndim else float(v) for k, v in g.items()}


@pytest.mark.parametrize("margin", [0.16, 0.3, "soft"])
def test_soft_mined_triplet(metric, margin):
    name = f"trip_weighted_{'soft' if margin == 'soft' else f'm{margin}'}"
    feats = metric["feat"].requires_grad_()
    loss = triplet_loss(feats, metric["labels"], margin, pairs=weighted_pairs)
    loss.backward()
    assert_close(loss.item(), metric[name], rtol=1e-4, atol=0)
    assert_close(feats.grad, metric[f"{name}_grad"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("margin", [0.16, 0.3])
@pytest.mark.parametrize(
    ("kind", "pairs"), [("weighted", weighted_pairs), ("lite_hard", hardest_pairs)]
)
def test_statistics_of_both_minings(metric, kind, pairs, margin):
    loss, in_order, active, d_an, d_ap = metric[f"trip_{kind}_m{margin}_stats"].tolist()
    stats = triplet_stats(metric["feat"], metric["labels"], margin, pairs)
    wanted = [in_order / 100, active / len(metric["feat"]), d_an, d_ap]
    ours = [stats[name].item() for name in ("in_order", "active", "d_an", "d_ap")]
    np.testing.assert_allclose(ours, wanted, rtol=1e-5)
    assert_close(
        triplet_loss(metric["feat"], metric["labels"], margin, pairs=pairs).item(),
        loss,
        rtol=1e-4,
        atol=0,
    )


@pytest.mark.parametrize("gamma", [0.5, 2])
def test_focal(metric, gamma):
    ours = focal_loss(metric["logits"], metric["labels"], gamma).item()
    assert_close(ours, metric[f"focal_g{gamma}"], rtol=1e-4, atol=0)


def test_centre_loss_gradients_and_step(metric):
    "One step as published: the whole loss counts 5e-4, the centres learn as if it counted 1."
    feats = metric["feat"].requires_grad_()
    centre = CentreLoss(*metric["centers"].shape, weight=5e-4)
    centre.centres.data.copy_(metric["centers"])
    loss = centre(feats, metric["labels"])
    (5e-4 * loss).backward()
    for name in ("center_masked", "center_clampall"):
        assert_close(loss.item(), metric[name], rtol=1e-4, atol=0)
    assert_close(feats.grad, 5e-4 * metric["center_masked_grad_feat"], rtol=0, atol=5e-8)
    assert_close(centre.centres.grad, metric["center_masked_grad_centers"], rtol=0, atol=1e-4)
    torch.optim.SGD(centre.parameters(), lr=0.5).step()
    assert_close(centre.centres.detach(), metric["centers_after_step"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("k", "margin", "alpha", "beta"), [(1, 30.0, 0.5, 0.5), (2, 0.1, 0.5, 0.5), (2, 0.3, 0.0, 1.0)]
)
def test_range(metric, k, margin, alpha, beta):
    total, within, between = metric[f"range_k{k}_m{margin}_a{alpha}_b{beta}"].tolist()
    feats, labels = metric["feat"], metric["labels"]
    ours = [x.item() for x in range_parts(feats, labels, k, margin)]
    assert_close(ours[1], between, rtol=1e-4, atol=0)
    if k == 2 and len(feats) == 8:  # two photos are one pair: published code takes the diagonal too
        assert within < 1e-5
        one = metric["range_k1_m30.0_a0.5_b0.5"][1].item()
        assert_close(ours[0], one, rtol=1e-4, atol=0)
    else:
        assert_close(ours[0], within, rtol=1e-4, atol=0)
        whole = range_loss(feats, labels, k, margin, alpha, beta).item()
        assert_close(whole, total, rtol=1e-4, atol=0)


def test_cluster_and_its_local_form(metric):
    feats, labels, local = metric["feat"], metric["labels"], metric["feat_local"]
    for margin in (0.3, 10.0):
        ours = cluster_loss(feats, labels, margin).item()
        assert_close(ours, metric[f"cluster_m{margin}"], rtol=1e-4, atol=0)
    ours = local_cluster_loss(local, labels, 10.0).item()
    assert_close(ours, metric["cluster_local_m10"], rtol=1e-4, atol=0)
    # the published order of people is that of a set
    means, where, _ = person_means(feats, labels)
    widest = [(feats[where == p] - m).norm(dim=1).max() for p, m in enumerate(means)]
    assert_close(torch.stack(widest).sort()[0], metric["cluster_intra_max"].sort()[0])
    middles, where, _ = person_means(local, labels)
    aligned = stripe_distances(local, middles[where])
    widest = torch.stack([aligned[where == p].max() for p in range(len(middles))])
    assert_close(widest.sort()[0], metric["cluster_local_intra_max"].sort()[0])
    gaps = stripe_distances(middles[:, None], middles[None]).fill_diagonal_(torch.inf)
    assert_close(gaps.amin(1).sort()[0], metric["cluster_local_inter_min"].sort()[0])


def angles(metric):
    x, w = metric["feat"], metric["am_weight"]
    unit = torch.nn.functional.normalize
    return unit(x) @ unit(w).T, x.norm(dim=1), metric["labels"]


@pytest.mark.parametrize(
    ("margin", "scale", "name"),
    [
        (0.35, 30, "am_lite_m0.35_s30"),
        (0.3, 15, "am_lite_m0.3_s15"),
        (0.3, 0, "am_lite_m0.3_s0"),
        (0.3, 15, "am_lite_sched_s15_step2"),  # a margin that grows by steps, read when it is 0.3
    ],
)
def test_published_margin_head(metric, margin, scale, name):
    cosines, norms, labels = angles(metric)
    assert_close(
        lite_logits(cosines, norms, labels, margin, scale), metric[name], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(("margin", "scale"), [(0.35, 30), (0.3, 15)])
def test_am_softmax(metric, margin, scale):
    cosines, _, labels = angles(metric)
    wanted = metric[f"am_paper_m{margin}_s{scale}"]
    assert_close(am_logits(cosines, labels, margin, scale), wanted, rtol=0, atol=1e-4)


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
