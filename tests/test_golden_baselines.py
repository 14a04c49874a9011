"""Losses and metrics against what the published baselines compute (origin: tests/data/README.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import ROOT, SUMS, doubled
from closeness import assert_same_formula as close

from reidlab.losses.centre import CentreLoss
from reidlab.losses.cluster import cluster_loss, local_cluster_loss, stripe_distances
from reidlab.losses.focal import focal_loss
from reidlab.losses.margin import am_logits, lite_logits
from reidlab.losses.range import person_means, range_loss, range_parts
from reidlab.losses.softmax import softmax_loss
from reidlab.losses.triplet import hardest_pairs, triplet_loss, triplet_stats
from reidlab.losses.weighted import weighted_pairs
from reidlab.retrieval.distance import distances
from reidlab.retrieval.features import l2_normalise
from reidlab.retrieval.metrics import evaluate_rank
from reidlab.retrieval.rank import rank_features

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


def distance_scale(feats):
    "The largest distance of a batch: what a loss of distances subtracts from one another."
    return torch.cdist(feats.detach(), feats.detach()).max()


def golden(name):
    with np.load(DATA / f"golden_{name}.npz", allow_pickle=False) as stored:
        return dict(stored)


@pytest.mark.parametrize("options", TRIPLETS.items(), ids=lambda item: item[0])
@pytest.mark.parametrize("batch", BATCHES)
def test_triplet_loss_and_gradient(batch, options):
    name, options = options
    g = golden(f"losses_{batch}")
    feats = torch.tensor(g["feat"]).double().requires_grad_()
    loss = triplet_loss(feats, torch.tensor(g["labels"]), **options)
    loss.backward()
    close(loss, g[name], SUMS, scale=distance_scale(feats))
    close(feats.grad, g[f"{name}_grad"], SUMS)


@pytest.mark.parametrize("batch", BATCHES)
def test_triplet_does_not_depend_on_the_order_of_the_batch(batch):
    g = golden(f"losses_{batch}")
    order = torch.randperm(len(g["labels"]), generator=torch.Generator().manual_seed(0))
    feats, pids = torch.tensor(g["feat"]).double()[order], torch.tensor(g["labels"])[order]
    close(triplet_loss(feats, pids), g["trip_hard_m0.3"], SUMS, scale=distance_scale(feats))


@pytest.mark.parametrize("batch", BATCHES)
def test_triplet_stats(batch):
    g = golden(f"losses_{batch}")
    _, in_order, _, d_an, d_ap = g["trip_lite_hard_m0.3_stats"]
    stats = triplet_stats(torch.tensor(g["feat"]).double(), torch.tensor(g["labels"]))
    ours = [stats[name].item() for name in ("in_order", "d_an", "d_ap")]
    close(ours, [in_order / 100, d_an, d_ap], SUMS)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.2])
def test_smoothed_cross_entropy(batch, smoothing):
    g = golden(f"losses_{batch}")
    logits = torch.tensor(g["logits"]).double().requires_grad_()
    loss = softmax_loss(logits, torch.tensor(g["labels"]), smoothing)
    name = f"ce_smooth_{smoothing}" if smoothing else "ce"
    close(loss, g[name], SUMS)
    if f"{name}_grad" in g:
        loss.backward()
        close(logits.grad, g[f"{name}_grad"], SUMS)


# the remaining losses: (feat, labels, …) and what the published code made of them
@pytest.fixture(params=BATCHES)
def metric(request):
    g = golden(f"metric_losses_{request.param}")
    return {k: doubled(v) if v.dtype.kind == "f" else torch.tensor(v) for k, v in g.items()}


@pytest.mark.parametrize("margin", [0.16, 0.3, "soft"])
def test_soft_mined_triplet(metric, margin):
    name = f"trip_weighted_{'soft' if margin == 'soft' else f'm{margin}'}"
    feats = metric["feat"].requires_grad_()
    loss = triplet_loss(feats, metric["labels"], margin, pairs=weighted_pairs)
    loss.backward()
    # the published code asks itself, too: its distance to itself is the root of what cancels
    close(loss, metric[name], ROOT, scale=distance_scale(feats))
    close(feats.grad, metric[f"{name}_grad"], ROOT)


@pytest.mark.parametrize("margin", [0.16, 0.3])
@pytest.mark.parametrize(
    ("kind", "pairs"), [("weighted", weighted_pairs), ("lite_hard", hardest_pairs)]
)
def test_statistics_of_both_minings(metric, kind, pairs, margin):
    loss, in_order, active, d_an, d_ap = metric[f"trip_{kind}_m{margin}_stats"].tolist()
    stats = triplet_stats(metric["feat"], metric["labels"], margin, pairs)
    wanted = [in_order / 100, active / len(metric["feat"]), d_an, d_ap]
    ours = [stats[name].item() for name in ("in_order", "active", "d_an", "d_ap")]
    terms = ROOT if kind == "weighted" else SUMS
    close(ours, wanted, terms)
    ours = triplet_loss(metric["feat"], metric["labels"], margin, pairs=pairs)
    close(ours, loss, terms, scale=distance_scale(metric["feat"]))


@pytest.mark.parametrize("gamma", [0.5, 2])
def test_focal(metric, gamma):
    ours = focal_loss(metric["logits"], metric["labels"], gamma)
    close(ours, metric[f"focal_g{gamma}"], SUMS)


def test_centre_loss_gradients_and_step(metric):
    "One step as published: the whole loss counts 5e-4, the centres learn as if it counted 1."
    feats = metric["feat"].requires_grad_()
    centre = CentreLoss(*metric["centers"].shape, weight=5e-4).double()
    centre.centres.data.copy_(metric["centers"])
    loss = centre(feats, metric["labels"])
    (5e-4 * loss).backward()
    for name in ("center_masked", "center_clampall"):
        close(loss, metric[name], SUMS)
    close(feats.grad, 5e-4 * metric["center_masked_grad_feat"], SUMS)
    close(centre.centres.grad, metric["center_masked_grad_centers"], SUMS)
    torch.optim.SGD(centre.parameters(), lr=0.5).step()
    close(centre.centres, metric["centers_after_step"], SUMS)


@pytest.mark.parametrize(
    ("k", "margin", "alpha", "beta"), [(1, 30.0, 0.5, 0.5), (2, 0.1, 0.5, 0.5), (2, 0.3, 0.0, 1.0)]
)
def test_range(metric, k, margin, alpha, beta):
    total, within, between = metric[f"range_k{k}_m{margin}_a{alpha}_b{beta}"]
    feats, labels = metric["feat"], metric["labels"]
    ours = range_parts(feats, labels, k, margin)
    close(ours[1], between, SUMS, scale=distance_scale(feats))
    if k == 2 and len(feats) == 8:  # two photos are one pair: published code takes the diagonal too
        assert within < 1e-5
        one = metric["range_k1_m30.0_a0.5_b0.5"][1]
        close(ours[0], one, SUMS, scale=distance_scale(feats))
    else:
        close(ours[0], within, SUMS, scale=distance_scale(feats))
        whole = range_loss(feats, labels, k, margin, alpha, beta)
        close(whole, total, SUMS, scale=distance_scale(feats))


def test_cluster_and_its_local_form(metric):
    feats, labels, local = metric["feat"], metric["labels"], metric["feat_local"]
    for margin in (0.3, 10.0):
        ours = cluster_loss(feats, labels, margin)
        close(ours, metric[f"cluster_m{margin}"], SUMS, scale=distance_scale(feats))
    ours = local_cluster_loss(local, labels, 10.0)
    close(ours, metric["cluster_local_m10"], SUMS, scale=distance_scale(feats))
    # the published order of people is that of a set
    means, where, _ = person_means(feats, labels)
    widest = [(feats[where == p] - m).norm(dim=1).max() for p, m in enumerate(means)]
    close(torch.stack(widest).sort()[0], metric["cluster_intra_max"].sort()[0], SUMS)
    middles, where, _ = person_means(local, labels)
    aligned = stripe_distances(local, middles[where])
    widest = torch.stack([aligned[where == p].max() for p in range(len(middles))])
    close(widest.sort()[0], metric["cluster_local_intra_max"].sort()[0], SUMS)
    gaps = stripe_distances(middles[:, None], middles[None]).fill_diagonal_(torch.inf)
    close(gaps.amin(1).sort()[0], metric["cluster_local_inter_min"].sort()[0], SUMS)


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
    close(lite_logits(cosines, norms, labels, margin, scale), metric[name], SUMS)


@pytest.mark.parametrize(("margin", "scale"), [(0.35, 30), (0.3, 15)])
def test_am_softmax(metric, margin, scale):
    cosines, _, labels = angles(metric)
    wanted = metric[f"am_paper_m{margin}_s{scale}"]
    close(am_logits(cosines, labels, margin, scale), wanted, SUMS)


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
