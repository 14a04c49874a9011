"""Re-ranking: published vectors, a plain definition on awkward galleries, bits, memory."""

import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reidlab.retrieval import neighbours
from reidlab.retrieval.distance import distances
from reidlab.retrieval.expansion import augment_gallery, expand_queries, smooth_top
from reidlab.retrieval.features import l2_normalise
from reidlab.retrieval.metrics import evaluate_rank
from reidlab.retrieval.neighbours import nearest
from reidlab.retrieval.rerank import check_gallery, rerank, rerank_blocks

DATA = Path(__file__).parent / "data"
SETTINGS = [(20, 6, 0.3), (10, 3, 0.5), (20, 1, 0.3)]


def golden(name):
    with np.load(DATA / f"golden_{name}.npz", allow_pickle=False) as stored:
        return dict(stored)


def plain_rerank(x, n_query, k1, k2, lambda_value, power=1):
    "k-reciprocal re-ranking as written: sorted lists, sets, dictionaries, float64."
    n = len(x)
    x = [[float(value) for value in row] for row in x]
    d = [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in x] for p in x]
    order = [sorted(range(n), key=lambda j: (j != i, d[i][j], j)) for i in range(n)]
    d = [[(value / max(row)) ** power if max(row) else 0.0 for value in row] for row in d]

    def mutual(i, k):
        return {j for j in order[i][: k + 1] if i in order[j][: k + 1]}

    rows = []
    for i in range(n):
        own = mutual(i, k1)
        grown = set(own)
        for j in own:
            friends = mutual(j, round(k1 / 2))  # Python rounds halves to even
            if 3 * len(friends & own) > 2 * len(friends):
                grown |= friends
        weights = {j: np.exp(-d[i][j]) for j in grown}
        rows.append({j: w / sum(weights.values()) for j, w in weights.items()})
    if k2 > 1:
        averaged = []
        for i in range(n):
            near, mean = order[i][:k2], {}
            for j in near:
                for member, share in rows[j].items():
                    mean[member] = mean.get(member, 0) + share / len(near)
            averaged.append(mean)
        rows = averaged
    out = np.empty((n_query, n - n_query))
    for q in range(n_query):
        for g in range(n_query, n):
            shared = sum(min(share, rows[g].get(j, 0)) for j, share in rows[q].items())
            jaccard = 1 - shared / (2 - shared)
            out[q, g - n_query] = (1 - lambda_value) * jaccard + lambda_value * d[q][g]
    return out


@st.composite
def cases(draw):
    """Features on a coarse grid, exact in float16: distances tie, photos repeat, lists are short."""
    n, dims = draw(st.integers(2, 34)), draw(st.integers(1, 4))
    levels = draw(st.sampled_from([1, 3, 40]))
    seed = draw(st.integers(0, 10_000))
    x = np.random.default_rng(seed).integers(0, levels + 1, size=(n, dims)) / 4
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    n_query = draw(st.one_of(st.just(1), st.integers(1, n - 1)))
    k1, k2 = draw(st.integers(1, 40)), draw(st.integers(1, 8))
    return x.astype(dtype), n_query, k1, k2, draw(st.sampled_from([0.0, 0.3, 1.0]))


@settings(max_examples=200, deadline=None)
@given(cases(), st.integers(1, 2))
def test_rerank_follows_the_definition(case, power):
    x, n, k1, k2, share = case
    ours = rerank(x[:n], x[n:], k1, k2, share, power)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, plain_rerank(x, n, k1, k2, share, power), rtol=0, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 8), st.integers(1, 2))
def test_rerank_follows_the_definition_on_features(seed, k1, k2, power):
    g = np.random.default_rng(seed)
    x = g.normal(size=(int(g.integers(2, 70)), int(g.integers(6, 20)))).astype(np.float32)
    n = int(g.integers(1, len(x)))
    ours = rerank(x[:n], x[n:], k1, k2, 0.3, power)
    np.testing.assert_allclose(ours, plain_rerank(x, n, k1, k2, 0.3, power), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("k1", "k2", "share"), SETTINGS)
def test_published_distances(k1, k2, share):
    g = golden("rerank_30x120x64")
    name = f"k{k1}_{k2}_l{100 * share:.0f}"
    raw = rerank(g["qf"], g["gf"], k1, k2, share)
    np.testing.assert_allclose(raw, g[f"rr_raw_{name}"], rtol=0, atol=5e-6)
    unit = [l2_normalise(g[side]) for side in ("qf", "gf")]
    ours = rerank(*unit, k1, k2, share)
    np.testing.assert_allclose(ours, g[f"rr_norm_{name}"], rtol=0, atol=5e-6)
    np.testing.assert_allclose(ours, g[f"rr_norm_f16_{name}"], rtol=0, atol=5e-3)
    labels = [g[key] for key in ("q_pid", "g_pid", "q_cam", "g_cam")]
    result = evaluate_rank(raw, *labels, max_rank=10)
    np.testing.assert_allclose(result.mAP, g[f"rr_raw_map_{name}"], atol=1e-6)
    np.testing.assert_allclose(result.cmc, g[f"rr_raw_cmc_{name}"], atol=1e-6)


@pytest.mark.parametrize("tau", [0.3, 0.5, 0.7])
def test_published_smoothing(tau):
    g, name = golden("rerank_smooth_top"), f"lbr{10 * tau:02.0f}"
    labels = [g[key] for key in ("q_pid", "g_pid", "q_cam", "g_cam")]
    result = evaluate_rank(smooth_top(g["qf"], g["gf"], temperature=tau), *labels)
    ap = np.where(result.valid, result.ap_trapezoidal, 0)
    np.testing.assert_allclose(ap, g[f"{name}_ap"], atol=1e-6)
    np.testing.assert_allclose(ap.mean(), g[f"{name}_map_all"], atol=1e-6)
    cmc = result.cmc * result.valid.mean()
    np.testing.assert_allclose(cmc, g[f"{name}_cmc_all"], atol=1e-6)


def people(n=400, dims=16, per=8, seed=0):
    g = np.random.default_rng(seed)
    pids = np.arange(n) // per
    return (g.normal(size=(n // per + 1, dims))[pids] + g.normal(size=(n, dims))).astype(np.float32)


def test_shuffling_the_gallery_permutes_the_columns():
    x = people(700)
    order = np.random.default_rng(1).permutation(650)
    plain, mixed = rerank(x[:50], x[50:]), rerank(x[:50], x[50:][order])
    np.testing.assert_allclose(mixed, plain[:, order], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dims", [1, 16, 77, 512])
def test_copies_tie_to_the_bit_across_tiles(dims):
    few = people(40, dims)
    x = np.concatenate([few, people(300, dims, seed=5), few, few])
    near, gap, far = nearest(x, 4)
    copies = np.array([np.arange(40) + start for start in (0, 340, 380)]).T
    for i, place in enumerate(copies):
        for own in place:  # oneself, then the others in the gallery's order
            assert list(near[own, :3]) == [own, *(p for p in place if p != own)]
            assert not gap[own, :3].any()
        assert len({far[p] for p in place}) == 1, i


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 420), st.integers(1, 60), st.sampled_from([1, 3, 99]))
def test_lists_are_a_stable_sort_over_strips_and_ties(seed, n, k, levels):
    x = np.random.default_rng(seed).integers(0, levels + 1, size=(n, 2)).astype(np.float32)
    d = ((x[:, None] - x[None]) ** 2).sum(2)
    order = np.argsort(d - np.eye(n), axis=1, kind="stable")[:, :k]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "TILE", 64)  # several rows and columns of tiles
        near, gap, far = nearest(x, k)
    np.testing.assert_array_equal(near, order)
    np.testing.assert_array_equal(gap, np.take_along_axis(d, order, 1))
    np.testing.assert_array_equal(far, d.max(1))


def test_two_calls_and_the_stream_give_the_same_bits():
    x = people(600)
    for n in (1, 127, 128, 300):
        once, again = rerank(x[:n], x[n:]), rerank(x[:n], x[n:])
        np.testing.assert_array_equal(once, again)
        blocks = list(rerank_blocks(x[:n], x[n:]))
        np.testing.assert_array_equal(torch.cat([b for _, b in blocks]).numpy(), once)
        assert [start for start, _ in blocks] == list(range(0, n, 128))


@pytest.mark.parametrize("shape", ["people", "all the same", "sorted on a line"])
def test_a_quarter_of_the_dense_matrix_is_never_in_memory(shape):
    n = 3000
    x = {
        "people": people(n),
        "all the same": np.ones((n, 16), np.float32),
        "sorted on a line": np.arange(n, dtype=np.float32)[:, None],
    }[shape]
    rerank(x[:20], x[20:60])
    tracemalloc.start()
    rerank(x[:100], x[100:])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < n * n * 4 / 4


def dense_rerank(x, n_query, k1, k2, lambda_value, power):
    "The definition with full matrices in float64, for sizes where sets would take too long."
    n, x = len(x), x.astype(np.float64)
    d = np.stack([((x - photo) ** 2).sum(1) for photo in x])
    order = np.argsort(d - np.eye(n), axis=1, kind="stable")
    d = (d / d.max(1, keepdims=True)) ** power

    def mutual(k):
        listed = np.zeros((n, n), bool)
        np.put_along_axis(listed, order[:, : k + 1], True, axis=1)
        return listed & listed.T

    wide, narrow = mutual(k1), mutual(round(k1 / 2))
    grown = wide.copy()
    for i in range(n):
        for j in np.flatnonzero(wide[i]):
            if 3 * (narrow[j] & wide[i]).sum() > 2 * narrow[j].sum():
                grown[i] |= narrow[j]
    v = np.where(grown, np.exp(-d), 0)
    v /= v.sum(1, keepdims=True)
    v = np.stack([v[near].mean(0) for near in order[:, :k2]])
    shared = np.stack([np.minimum(row, v[n_query:]).sum(1) for row in v[:n_query]])
    jaccard = 1 - shared / (2 - shared)
    return (1 - lambda_value) * jaccard + lambda_value * d[:n_query, n_query:]


@pytest.mark.parametrize(("unit", "power"), [(True, 1), (False, 2)])
def test_three_thousand_photos_match_the_dense_definition(unit, power):
    x = people(2900, dims=48, per=15, seed=2)
    if unit:
        x = l2_normalise(x).numpy()
    x = np.concatenate([x, x[500:600]])[np.random.default_rng(3).permutation(3000)]  # copies, too
    want = dense_rerank(x, 60, 20, 6, 0.3, power)
    ours = rerank(x[:60], x[60:], power=power)
    np.testing.assert_allclose(ours, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [255, 256, 257, 515])
def test_the_filling_of_the_last_tile_stays_unseen(n):
    """It lies at the origin: nearer to everyone than anyone else is, then farther away."""
    x = 10 * np.eye(n, dtype=np.float32)
    for shift, far in ((0, 200), (100, 200)):
        near = nearest(x + np.float32(shift), 30)
        assert near.who.max() < n and (near.gap[:, 1:] == 200).all()
        np.testing.assert_array_equal(near.far, np.full(n, far))
    halves = [rerank(x[:3] + shift, x[3:] + shift) for shift in (np.float32(0), np.float32(100))]
    np.testing.assert_array_equal(*halves)


def test_any_number_of_threads_gives_the_same_bits():
    x = people(1400, dims=33)
    x[700:720] = x[:20]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 9):
            torch.set_num_threads(threads)
            blocks = torch.cat([block for _, block in rerank_blocks(x[:300], x[300:])]).numpy()
            results.append((*nearest(x, 21), rerank(x[:300], x[300:]), blocks))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(results[0][-2], results[0][-1])


def test_precision_set_outside_changes_nothing():
    x = people(600)
    want = rerank(x[:200], x[200:])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu"):
            ours = rerank(x[:200], x[200:])
            blocks = torch.cat([block for _, block in rerank_blocks(x[:200], x[200:])]).numpy()
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_array_equal(ours, want)
    np.testing.assert_array_equal(blocks, want)


def test_order_that_float32_cannot_tell_is_settled_in_float64():
    x = people(700, dims=8) + np.float32(300)  # squared lengths near a million, gaps near ten
    d = np.stack([((x.astype(np.float64) - photo) ** 2).sum(1) for photo in x.astype(np.float64)])
    order = np.argsort(d - np.eye(700), axis=1, kind="stable")[:, :11]
    rough = torch.cdist(*[torch.from_numpy(x)] * 2, compute_mode="use_mm_for_euclid_dist").numpy()
    assert (np.argsort(rough - np.eye(700), axis=1)[:, :11] != order).any(1).mean() > 0.5
    np.testing.assert_array_equal(nearest(x, 11).who, order)


def test_half_precision_and_tensors():
    x = people(90).astype(np.float16)
    want = rerank(x[:9].astype(np.float32), x[9:].astype(np.float32))
    np.testing.assert_array_equal(rerank(x[:9], x[9:]), want)
    ours = rerank(torch.tensor(x[:9]), torch.tensor(x[9:]))
    assert isinstance(ours, torch.Tensor) and ours.dtype == torch.float32
    np.testing.assert_array_equal(ours.numpy(), want)
    bf16 = torch.tensor(people(90)).bfloat16()
    same = rerank(bf16[:9].float(), bf16[9:].float())
    torch.testing.assert_close(rerank(bf16[:9], bf16[9:]), same, rtol=0, atol=0)


def test_inputs_are_left_alone():
    x = people(90)
    before = x.copy()
    for way in (rerank, smooth_top, expand_queries):
        way(x[:9], x[9:])
        way(torch.from_numpy(x[:9]), torch.from_numpy(x[9:]))
    augment_gallery(x)
    np.testing.assert_array_equal(x, before)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60), st.floats(0.05, 5))
def test_only_the_top_of_the_list_changes_places(seed, top, tau):
    g = np.random.default_rng(seed)
    query, gallery = g.normal(size=(4, 8)), g.normal(size=(int(g.integers(1, 40)), 8))
    before = distances(*map(l2_normalise, (query, gallery)), "cosine").numpy()
    after = smooth_top(query, gallery, top, tau)
    order, smoothed = before.argsort(1, kind="stable"), after.argsort(1, kind="stable")
    np.testing.assert_array_equal(order[:, top:], smoothed[:, top:])
    np.testing.assert_array_equal(np.sort(before), np.sort(after))
    unit = l2_normalise(gallery).numpy().astype(float)
    for q, first, now in zip(l2_normalise(query).numpy(), order, smoothed, strict=True):
        x = unit[first[:top]]
        share = np.exp(x @ x.T / tau)
        score = (share / share.sum(1, keepdims=True)) @ x @ q
        place = {g: score[i] for i, g in enumerate(first[:top])}
        drops = np.diff([place[g] for g in now[:top]])
        assert (drops <= 1e-9).all()


def test_a_cold_smoothing_changes_nothing():
    x = people(90)
    cold = smooth_top(x[:9], x[9:], temperature=1e-4)
    np.testing.assert_array_equal(cold, smooth_top(x[:9], x[9:], top=1))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 50), st.sampled_from([0.0, 1.0, 3.0]))
def test_expansion_follows_the_definition(seed, top, weight):
    g = np.random.default_rng(seed)
    query, gallery = g.normal(size=(3, 6)), g.normal(size=(int(g.integers(1, 40)), 6))
    q, x = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (query, gallery))

    def joined(photo, others):
        similarity = others @ photo
        near = np.argsort(-similarity, kind="stable")[:top]
        total = photo + (np.maximum(similarity[near], 0) ** weight) @ others[near]
        return total / np.linalg.norm(total)

    want = [joined(photo, x) for photo in q]
    np.testing.assert_allclose(expand_queries(query, gallery, top, weight), want, atol=2e-5)
    want = [joined(photo, np.delete(x, i, axis=0)) for i, photo in enumerate(x)]
    np.testing.assert_allclose(augment_gallery(gallery, top, weight), want, atol=2e-5)


def test_a_gallery_of_loners_is_warned_about():
    x = people(60)
    with pytest.warns(UserWarning, match="50 of 50 people have a single gallery photo"):
        rerank(x[:10], x[10:], g_pids=np.arange(50))
    with pytest.warns(UserWarning, match="3 of 4 people"):
        check_gallery([0] * 40 + [1, 2, 3, -1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rerank(x[:10], x[10:], g_pids=np.arange(50) // 2)
        rerank(x[:10], x[10:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k1": 0}, "k1 is a whole number, 1 or more; got 0"),
        ({"k1": 2.5}, "k1 is a whole number"),
        ({"k2": 0}, "k2 is a whole number, 1 or more; got 0"),
        ({"lambda_value": -0.1}, "lambda_value is the share of the original distance"),
        ({"lambda_value": 1.1}, "0 … 1; got 1.1"),
        ({"lambda_value": float("nan")}, "lambda_value is the share"),
        ({"power": 0}, "power is a whole number"),
        ({"query": np.ones(4)}, r"query features need shape \(N, D\), got \(4,\)"),
        ({"gallery": np.ones((5, 3))}, "4 dimensions, gallery features 3"),
        ({"query": np.ones((0, 4))}, "got 0 queries, 5 gallery photos"),
        ({"query": np.array([[1, 2, 3, 4], [1, np.nan, 3, 4]])}, "query features hold NaN.*row 1"),
        ({"gallery": np.diag([1, 1, np.inf, 1])}, "gallery features hold NaN.*row 2"),
        ({"gallery": np.full((5, 4), 9e18)}, "normalise the features first"),
        ({"g_pids": [1, 2]}, "g_pids needs 5 entries, one a photo; got 2"),
    ],
)
def test_bad_input_has_one_clear_line(change, message):
    good = {"query": -np.ones((2, 4)), "gallery": np.eye(5, 4)}
    rerank(**good)
    with pytest.raises(ValueError, match=message):
        rerank(**(good | change))
