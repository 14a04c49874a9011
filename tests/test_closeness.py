"""The rule for golden comparisons refuses a planted slip in every family, however small it looks."""

import pytest
import test_golden_autoreid as autoreid
import test_golden_baselines as baselines
import test_golden_cdnet as cdnet
import test_golden_heads as heads
import torch
from closeness import ROUNDING, SUMS, assert_same_formula, doubled
from torch import nn

from reidlab.losses import focal, softmax, triplet, weighted
from reidlab.models import spectral


def test_rounding_passes_and_a_slip_does_not():
    torch.manual_seed(0)
    x, w = torch.randn(40, 32, dtype=torch.float64), torch.randn(32, 8, dtype=torch.float64)
    stored = x.float() @ w.float()
    assert_same_formula(x @ w, stored, SUMS)
    assert_same_formula((x @ w) * (1 + SUMS * ROUNDING / 2), stored, SUMS)
    for wrong in ((x @ w) * (1 + 1e-5), (x @ w) + 1e-4, (x @ w)[:, :4], (x @ w) * torch.nan):
        with pytest.raises(AssertionError):
            assert_same_formula(wrong, stored, SUMS)


def metric(batch="4x2x16"):
    g = baselines.golden(f"metric_losses_{batch}")
    return {k: doubled(v) if v.dtype.kind == "f" else torch.tensor(v) for k, v in g.items()}


def eps_of_norms(module, eps):
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.eps = eps


def slipped_triplet(patch):
    real = triplet.pairwise_distances
    patch.setattr(triplet, "pairwise_distances", lambda x, *a: real(x, *a) * (1 + 1e-4))
    baselines.test_triplet_loss_and_gradient("8x4x32", ("trip_hard_m0.3", {"margin": 0.3}))


def slipped_mining(patch):
    real = weighted.weighted_pairs
    patch.setattr(baselines, "weighted_pairs", lambda d, *a: real(d * 0.99, *a))
    baselines.test_soft_mined_triplet(metric(), 0.3)


def slipped_smoothing(patch):
    real = softmax.softmax_loss  # spread over the others alone: e / (C − 1) instead of e / C
    patch.setattr(baselines, "softmax_loss", lambda x, y, e: real(x, y, e * (1 + 1 / x.shape[1])))
    baselines.test_smoothed_cross_entropy("8x4x32", 0.1)


def slipped_focal(patch):
    real = focal.focal_loss
    patch.setattr(baselines, "focal_loss", lambda x, y, g: real(x, y, g + 1e-3))
    baselines.test_focal(metric(), 2)


def slipped_spectral(patch):
    real = spectral.spectral_transform
    patch.setattr(heads, "spectral_transform", lambda x, s, n: real(x, s * 1.0001, n))
    heads.test_spectral_transform("8x4x32", 0.3)


def slipped_stripes(patch):
    g, run, parts = heads.pcb.__wrapped__()
    for part in parts:
        eps_of_norms(part, 1e-4)
    heads.test_stripes_in_training_without_dropout((g, run, parts))


def slipped_operation(patch):
    real = autoreid.built

    def built(name):
        op = real(name)
        eps_of_norms(op, 1e-4)
        return op

    patch.setattr(autoreid, "built", built)
    autoreid.test_operation(autoreid.KEPT_OP)


def slipped_cdnet(patch):
    real = cdnet.filled

    def filled(*what):
        net = real(*what)
        eps_of_norms(net, 1.1e-5)
        return net

    patch.setattr(cdnet, "filled", filled)
    cdnet.test_embeddings_and_logits(next(iter(cdnet.FORWARD)))


SLIPS = [
    slipped_triplet,
    slipped_mining,
    slipped_smoothing,
    slipped_focal,
    slipped_spectral,
    slipped_stripes,
    slipped_operation,
    slipped_cdnet,
]


@pytest.mark.parametrize("slip", SLIPS, ids=lambda slip: slip.__name__)
def test_a_planted_slip_is_refused(slip, monkeypatch):
    with pytest.raises(AssertionError, match="allowed"):
        slip(monkeypatch)
