"""Intervals and tests that promise 95 % are held to it in worlds whose truth is known."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled import sides

from reidlab.evaluation.breakdown import (
    camera_matrix,
    camera_matrix_features,
    hardest_queries,
    identity_table,
)
from reidlab.evaluation.estimate import Estimate
from reidlab.evaluation.paired import flip_p_value, flipped_sums, paired_test
from reidlab.evaluation.statistics import (
    bootstrap_interval,
    identity_sums,
    intervals,
    per_query,
    resampled_means,
    tail_share,
)
from reidlab.retrieval.metrics import evaluate_rank

WORLDS = 2000


def covered(sums, counts, truth, level=0.95):
    "Share of the worlds, one a column, whose interval holds the truth; the draws are shared."
    tail = tail_share(level, len(sums))
    low, high = np.quantile(resampled_means(sums, counts), [tail, 1 - tail], axis=0)
    return ((low <= truth + 1e-12) & (truth - 1e-12 <= high)).mean()


ALONE = {  # one value a query → what it is drawn from, and its mean
    "AP, many low and many high": (lambda g, size: g.beta(0.5, 0.5, size), 1 / 2),
    "AP, mostly high": (lambda g, size: g.beta(5, 0.5, size), 10 / 11),
    "AP, mostly low": (lambda g, size: g.beta(0.5, 5, size), 1 / 11),
    "rank-1 of 60 %": (lambda g, size: 1.0 * (g.random(size) < 0.6), 0.6),
    "rank-1 of 95 %": (lambda g, size: 1.0 * (g.random(size) < 0.95), 0.95),
}


@pytest.mark.parametrize("n", [200, 500])
@pytest.mark.parametrize("name", ALONE)
def test_the_interval_covers_the_truth(name, n):
    draw, truth = ALONE[name]
    values = draw(np.random.default_rng(1), (n, WORLDS))
    assert 0.93 <= covered(values, np.ones_like(values), truth) <= 0.97


def people(kind, m, seed=1):
    "(m, 6, worlds) values of people with 3 to 6 queries and luck in common; 0 where there is none."
    there = np.arange(6)[:, None] < np.random.default_rng(0).integers(3, 7, (m, 1, WORLDS))
    g = np.random.default_rng(seed)
    luck = g.beta(2, 1, (m, 1, WORLDS))
    own = g.random((m, 6, WORLDS))
    values = own < luck if kind == "rank-1" else (own + 2 * luck) / 3
    truth = 2 / 3 if kind == "rank-1" else (1 / 2 + 4 / 3) / 3
    return np.where(there, values, 0.0), there, truth


@pytest.mark.parametrize("kind", ["AP", "rank-1"])
@pytest.mark.parametrize("m", [60, 150])
def test_people_with_shared_luck_are_drawn_whole(kind, m):
    values, there, truth = people(kind, m)
    assert there.sum((0, 1)).min() >= 200
    assert 0.93 <= covered(values.sum(1), there.sum(1).astype(float), truth) <= 0.97


def test_drawing_their_queries_promises_too_much():
    values, _, truth = people("AP", 70)
    each = values[:, :3].reshape(210, -1)  # three queries of each person
    assert covered(each, np.ones_like(each), truth) < 0.85
    assert 0.93 <= covered(values[:, :3].sum(1), np.full((70, WORLDS), 3.0), truth) <= 0.97


@pytest.mark.parametrize("groups", [None, np.repeat(np.arange(50), 4)])
def test_the_simulations_run_the_same_code_as_one_call(groups):
    "A column of the vectorised draws gives bootstrap_interval and paired_test to rounding."
    worlds = np.random.default_rng(3).random((200, 5)) - 0.3
    columns = [identity_sums(w, groups) for w in worlds.T]
    sums, counts = (np.stack(x, axis=1) for x in zip(*columns, strict=True))
    tail = tail_share(0.95, len(sums))
    ends = np.quantile(resampled_means(sums, counts), [tail, 1 - tail], axis=0)
    for k, (w, p) in enumerate(zip(worlds.T, flip_p_value(sums, n=999), strict=True)):
        one = bootstrap_interval(w, groups=groups)
        np.testing.assert_allclose([one.low, one.high], ends[:, k], rtol=1e-10, atol=1e-12)
        assert paired_test(w, 0 * w, n=999, groups=groups).p == p


def test_false_alarms_stay_rare_when_two_runs_are_equal():
    gap = (people("AP", 60)[0] - people("AP", 60, seed=2)[0]).sum(1)
    assert 0.03 <= (flip_p_value(gap, n=2000) <= 0.05).mean() <= 0.07  # rare, and not asleep


def test_false_alarms_without_people():
    g = np.random.default_rng(1)
    hits = g.random((2, 200, WORLDS)) < 0.9  # rank-1: most differences are 0
    for gap in (g.normal(size=(200, WORLDS)), hits[0] * 1.0 - hits[1]):
        assert (flip_p_value(gap, n=2000) <= 0.05).mean() <= 0.07


@pytest.mark.parametrize("seed", range(4))
def test_tossed_signs_are_all_the_signs(seed):
    "Twelve people have 4,096 ways to be tossed; counting them all gives the p value."
    gains = np.random.default_rng(seed).normal(0.3, size=12)
    every = np.abs(np.array(list(itertools.product((-1, 1), repeat=12))) @ gains)
    exact = (every >= abs(gains.sum()) - 1e-12).mean()
    assert flip_p_value(gains, n=20_000) == pytest.approx(exact, abs=0.015)


def test_a_real_gain_is_seen():
    a, there, _ = people("AP", 60)
    better = (a - people("AP", 60, seed=2)[0] + 0.15 * there).sum(1)
    assert (flip_p_value(better, n=2000) <= 0.05).mean() > 0.8


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_order_and_names_change_nothing(seed, grouped, coarse):
    g = np.random.default_rng(seed)
    a, b = g.random((2, 60)).round(1 if coarse else 15)
    lost = g.random(60) < 0.1
    a[lost] = b[lost] = np.nan
    pids = g.integers(0, 12, 60)
    order, names = g.permutation(60), g.permutation(12)
    before, after = (pids, names[pids][order]) if grouped else (None, None)
    for values in (a, a - b):
        one = bootstrap_interval(values, n=200, groups=before)
        assert one == bootstrap_interval(values[order], n=200, groups=after)  # to the last bit
        assert one == bootstrap_interval(values, n=200, groups=before)  # and again
    one = paired_test(a, b, n=200, groups=before)
    assert one == paired_test(a[order], b[order], n=200, groups=after)
    back = paired_test(b, a, n=200, groups=before)
    assert (back.p, back.better, back.worse) == (one.p, one.worse, one.better)
    assert back.difference.value == pytest.approx(-one.difference.value, abs=1e-12)


def test_another_seed_draws_others():
    values = np.random.default_rng(0).random(100)
    one, other = bootstrap_interval(values, seed=0), bootstrap_interval(values, seed=1)
    assert one.value == other.value and one.low != other.low
    assert one.high - one.low == pytest.approx(other.high - other.low, rel=0.15)


def test_blocks_change_no_draw(monkeypatch):
    sums, counts = identity_sums(np.random.default_rng(0).random(70))
    whole = resampled_means(sums, counts, 300), flipped_sums(sums, 300)
    monkeypatch.setattr("reidlab.evaluation.statistics.BLOCK", 700 * 4)
    parts = resampled_means(sums, counts, 300), flipped_sums(sums, 300)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def ranking(seed=0, n_query=80, n_gallery=150):
    g = np.random.default_rng(seed)
    q_pids, g_pids = g.integers(0, 25, n_query), g.integers(-1, 20, n_gallery)
    means = g.normal(size=(26, 8))
    q, x = ((means[p] + g.normal(size=(len(p), 8))).astype(np.float32) for p in (q_pids, g_pids))
    return q, x, q_pids, g_pids, g.integers(-1, 3, n_query), g.integers(0, 4, n_gallery)


def matrix_by_hand(dist, q_pids, g_pids, q_camids, g_camids):
    "mAP, rank-1, queries and queries without a match of each pair, one query at a time."
    cells = {}
    for q, (pid, camid) in enumerate(zip(q_pids, q_camids, strict=True)):
        for other in np.unique(g_camids):
            alike = [
                g_pids[i] == pid
                for i in np.argsort(dist[q], kind="stable")
                if g_camids[i] == other
                and g_pids[i] != -1
                and not (g_pids[i] == pid and camid == other)
            ]
            found = [i for i, hit in enumerate(alike) if hit]
            ap = np.mean([(k + 1) / (i + 1) for k, i in enumerate(found)]) if found else None
            cells.setdefault((camid, other), []).append((ap, alike[:1] == [True]))
    for pair, each in cells.items():
        known = [(ap, hit) for ap, hit in each if ap is not None]
        means = np.mean(known, axis=0) if known else (np.nan, np.nan)
        yield pair, (*means, len(known), len(each) - len(known))


@pytest.mark.parametrize("seed", range(3))
def test_the_camera_matrix_is_its_definition(seed):
    q, x, *labels = ranking(seed)
    dist = np.linalg.norm(q[:, None] - x[None], axis=2)
    ours = camera_matrix(dist, *sides(*labels))
    for (row, column), cells in matrix_by_hand(dist, *labels):
        row = "unknown" if row == -1 else row
        np.testing.assert_allclose([t.loc[row, column] for t in ours], cells, rtol=1e-12)
    for tile in (1, 33, 500):
        streamed = camera_matrix_features(torch.tensor(q), x, *sides(*labels), tile=tile)
        for a, b in zip(ours, streamed, strict=True):
            pd.testing.assert_frame_equal(a, b)


def test_a_result_with_its_intervals_and_tables():
    q, x, *labels = ranking()
    r = evaluate_rank(np.linalg.norm(q[:, None] - x[None], axis=2), *labels)
    assert r.without_match  # or this test shows less
    every = intervals(r, labels[0], n=300)
    for name, e in every.items():
        assert e.value == pytest.approx(r.summary()[name], rel=1e-12)
        assert e.low <= e.value <= e.high
        assert (e.n, e.left_out) == (r.n_valid, len(r.without_match))
        assert e.n_pids == len(np.unique(labels[0][r.valid]))
        assert Estimate(**json.loads(json.dumps(e.to_dict(), allow_nan=False))) == e
    assert set(every) == set(per_query(r)) == set(r.summary()) - {"queries_without_match"}
    table = identity_table(r.ap, labels[0])
    for pid, row in table.iterrows():
        own = r.ap[labels[0] == pid]
        np.testing.assert_equal(row["queries"] + row["without_match"], len(own))
        if row["queries"]:
            assert row["mAP"] == pytest.approx(np.nanmean(own), rel=1e-12)
            assert row["lowest"] == np.nanmin(own)
    assert table["mAP"].dropna().is_monotonic_increasing
    assert table["mAP"].isna().to_numpy().nonzero()[0].tolist() == list(
        range(table["mAP"].count(), len(table))
    )
    hardest = hardest_queries(r, labels[0], labels[2], n=500)
    assert len(hardest) == r.n_valid
    assert hardest["AP"].is_monotonic_increasing
    assert (r.ap[hardest.index] == hardest["AP"]).all()


ONE = sides([1], [1], [0], [1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([0.5]), "2 queries or more, got 1"),
        (lambda: bootstrap_interval([[0.5, 1.0]]), r"shape \(Q,\); got \(1, 2\)"),
        (lambda: bootstrap_interval([0.5, np.inf]), "inf; first: query 1"),
        (lambda: bootstrap_interval([0.5, 1.0], n=5), "100 or more; got 5"),
        (lambda: paired_test([0.5, 1, 0.5], [1, np.nan, np.nan]), "2 of 3 queries .* query 1"),
        (lambda: paired_test([0.5, 1], [1, 0.5], groups=[1]), r"shape \(2,\); got \(1,\)"),
        (lambda: camera_matrix(np.zeros(3), *ONE), r"shape \(Q, G\), got \(3,\)"),
        (
            lambda: camera_matrix([[np.nan]], *ONE),
            "NaN in 1 of 1 rows; first: query 0, gallery 0",
        ),
        (lambda: identity_table([0.5], [1, 2]), r"got \(1,\), \(2,\)"),
    ],
)
def test_bad_input_has_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()
