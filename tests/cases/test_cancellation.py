"""Rankings where a product in float32 cancels, against distances from differences in float64."""

import numpy as np
import pytest
import torch
from labelled import sides

from reidlab.core.recipe import Evaluate
from reidlab.evaluation.embeddings import Embeddings, rank_embeddings
from reidlab.evaluation.rules import ranking_rules
from reidlab.retrieval.cancellation import finish_on_device
from reidlab.retrieval.distance import METRICS, distances, product_blocks
from reidlab.retrieval.expansion import augment_gallery, expand_queries, first_answers
from reidlab.retrieval.features import l2_normalise
from reidlab.retrieval.gallery_draws import GalleryDraws
from reidlab.retrieval.index import GalleryIndex
from reidlab.retrieval.matches import matches_by_sorting
from reidlab.retrieval.neighbours import distance_strips, nearest
from reidlab.retrieval.rank import rank, rank_features
from reidlab.retrieval.rerank import rerank, rerank_blocks
from reidlab.retrieval.rules import Rules
from reidlab.retrieval.scan import find_matches

SHARE = 1e-4  # by which two distances must differ, as the chapter promises
LEAST = 3e-45  # twice the step between the smallest numbers that float32 has
Q, G, D = 7, 61, 67


def drawn(seed=0):
    "Queries; a gallery of their near copies from 1e-6 to 1 away, strangers, and photos twice."
    g = np.random.default_rng(seed)
    query = g.normal(size=(Q, D))
    away = g.normal(size=(G, D)) * np.logspace(-6, 0, G)[:, None] / np.sqrt(D)
    gallery = query[g.integers(0, Q, G)] + away
    gallery[::9] = g.normal(size=gallery[::9].shape)
    return query, gallery


def mixed(x):
    return x * 10.0 ** np.random.default_rng(5).integers(-3, 4, (len(x), 1))


KINDS = {
    "plain": lambda x: x,
    "a mean of 100": lambda x: x + 100,
    "a mean of 1e4 in one direction": lambda x: x + 1e4 * (np.arange(D) == 3),
    "as after a ReLU": lambda x: np.maximum(x + 1.5, 0),
    "norms of 1e15": lambda x: 1e15 * x,
    "mixed norms": mixed,
    "two far clusters": lambda x: x + 1e3 * (np.arange(len(x))[:, None] % 2),
    "norms of 1e-20": lambda x: 1e-20 * x,
    "subnormal": lambda x: 1e-40 * x,
}


def features(kind, seed=0):
    "Float32 features of a kind, in which every query has copies and two photos in five are twins."
    query, gallery = (KINDS[kind](x).astype(np.float32) for x in drawn(seed))
    gallery[5::8] = query[np.arange(len(gallery[5::8])) % Q]
    gallery[2::5] = gallery[len(gallery[2::5]) :: -1][: len(gallery[2::5])]
    return query, gallery


def true_distances(query, gallery, metric):
    if metric == "cosine":
        query, gallery = (l2_normalise(x).numpy() for x in (query, gallery))
    gap = np.square(query[:, None].astype(np.float64) - gallery[None]).sum(2)
    return np.sqrt(gap) if metric == "euclidean" else gap


def misplaced(order, true):
    "Places at which somebody stands behind another who is farther by more than the share."
    found = np.take_along_axis(true, np.asarray(order), 1)
    return int((found * (1 + SHARE) ** 2 + LEAST < np.maximum.accumulate(found, 1)).sum())


def by_stream(query, gallery, metric):
    labels = np.zeros(Q, int), np.ones(G, int), np.zeros(Q, int), np.ones(G, int)
    labels[1][0] = 0
    return rank_features(query, gallery, *labels, metric=metric, top=G).top


def by_matrix(query, gallery, metric):
    return np.argsort(distances(query, gallery, metric).numpy(), axis=1, kind="stable")


def by_parts(query, gallery, metric):
    parts = [by_matrix(query[i : i + 1], gallery, metric) for i in range(Q)]
    return np.concatenate(parts)


def by_sorting(query, gallery, metric):
    labels = np.zeros(Q, int), np.zeros(G, int), np.zeros(Q, int), np.ones(G, int)
    return matches_by_sorting(distances(query, gallery, metric), *sides(*labels), top=G).top


def by_index(query, gallery, metric, kind="exact"):
    index = GalleryIndex(D, kind=kind, metric=metric, n_lists=3, n_probe=3)
    index.add(gallery, np.zeros(G, int), np.zeros(G, int))
    return index.search(query, G).positions


def by_lists(query, gallery, metric):
    return by_index(query, gallery, metric, "ivf")


def by_tracks(query, gallery, metric):
    labels = np.zeros(Q, int), np.zeros(G, int), np.zeros(Q, int), np.ones(G, int)
    rules = Rules(metric, tracks=True, top=G)
    return rank(query, gallery, *sides(*labels, np.arange(G)), rules=rules).top


WAYS = (by_stream, by_matrix, by_parts, by_sorting, by_index, by_lists, by_tracks)


VANISH = ("norms of 1e-20", "subnormal")  # their squared distances, in float32
CASES = [(k, m) for k in KINDS for m in METRICS if m != "sqeuclidean" or k not in VANISH]


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("kind", "metric"), CASES)
def test_every_way_ranks_as_differences_in_float64_do(kind, way, metric):
    query, gallery = features(kind)
    order, true = way(query, gallery, metric), true_distances(query, gallery, metric)
    np.testing.assert_array_equal(np.sort(order, 1), np.tile(np.arange(G), (Q, 1)))
    assert misplaced(order, true) == 0
    place, dist = np.argsort(order, 1), distances(query, gallery, metric).numpy()
    _, which, counts = np.unique(gallery, axis=0, return_inverse=True, return_counts=True)
    assert counts.max() > 1
    for same in (np.flatnonzero(which.ravel() == w) for w in np.flatnonzero(counts > 1)):
        assert (np.diff(place[:, same], axis=1) > 0).all(), "twins stand in gallery order"
        assert (dist[:, same] == dist[:, same[:1]]).all(), "twins are equally far"
    assert (dist[(query[:, None] == gallery[None]).all(2)] == 0).all(), "a copy is at 0"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_a_matrix_and_a_device_agree(kind, metric):
    query, gallery = features(kind)
    g = np.random.default_rng(1)
    labels = (g.integers(0, 9, Q), g.integers(-1, 9, G), g.integers(0, 3, Q), g.integers(0, 3, G))
    whole = distances(query, gallery, metric)
    ours = rank_features(query, gallery, *labels, metric=metric, tile=3, top=G)
    found = find_matches(whole, *sides(*labels), top=G)
    np.testing.assert_array_equal(ours.top, found.top)
    (block,) = product_blocks(query, gallery, metric)
    there = finish_on_device(
        block.rows, block.kind, block.q_square, block.g_square, block.query, block.gallery
    )
    np.testing.assert_allclose(there, whole, rtol=3e-7)


def test_ties_counted_at_best_and_at_worst_are_those_of_equal_features():
    query, gallery = features("a mean of 100")
    g_pids = np.where(np.arange(G) % 3, 1, 2)
    labels = sides(np.ones(Q, int), g_pids, [0] * Q, [1] * G)
    found = find_matches(distances(query, gallery), *labels)
    true = true_distances(query, gallery, "euclidean")
    near = np.sort(true[:, g_pids == 1], 1)
    tied = [
        [int((row[g_pids == 2] == d).sum()) for d in own]
        for row, own in zip(true, near, strict=True)
    ]
    seen = (found.pessimistic - found.optimistic).reshape(Q, -1)
    assert (seen.sum(1) >= np.sum(tied, 1)).all() and np.sum(tied) > 0


@pytest.mark.parametrize("kind", ["plain", "a mean of 100", "mixed norms", "two far clusters"])
def test_neighbours_of_everyone_and_their_strips(kind):
    x = np.concatenate(features(kind))
    true = true_distances(x, x, "sqeuclidean")
    block = np.empty((Q, G), np.float32)
    near = nearest(x, Q + G, block)
    assert misplaced(near.who, true) == 0
    np.testing.assert_allclose(near.far, true.max(1), rtol=SHARE)
    np.testing.assert_allclose(block, true[:Q, Q:], rtol=2 * SHARE)
    ((_, strip),) = distance_strips(x, Q)
    np.testing.assert_array_equal(strip, block)


@pytest.mark.parametrize("kind", ["a mean of 100", "norms of 1e15", "norms of 1e-20", "subnormal"])
def test_reranking_sees_no_mean_and_no_scale(kind):
    query, gallery = (KINDS[kind](np.round(x * 64) / 64).astype(np.float32) for x in drawn(3))
    sides = [x.astype(np.float64) - 100 * (kind == "a mean of 100") for x in (query, gallery)]
    longest = max(np.abs(x).max() for x in sides)
    wanted = rerank(*(x / longest for x in sides), 5, 3)
    np.testing.assert_allclose(rerank(query, gallery, 5, 3), wanted, rtol=1e-3, atol=1e-6)
    parts = np.concatenate([b for _, b in rerank_blocks(query, gallery, 5, 3)])
    np.testing.assert_array_equal(parts, rerank(query, gallery, 5, 3))


def near_and_same(seed, mean):
    "One query, somebody else's photo beside it, and the same photo again."
    g = np.random.default_rng(seed)
    x = g.normal(size=256) + mean
    x = (x / np.linalg.norm(x)).astype(np.float32)
    return x[None], np.stack([x + 1e-5 * g.normal(size=256), x]).astype(np.float32)


@pytest.mark.parametrize("mean", [0, 3, 100])
def test_the_same_photo_is_first_whatever_is_asked(mean):
    labels = np.array([1]), np.array([2, 1]), np.array([0]), np.array([1, 1])
    rules = {"normalised": {}, "raw": {"normalise": False}, "cosine": {"metric": "cosine"}}
    rules["smooth"] = {"rerank": {"smooth_top": {"temperature": 1e-9}}}
    for seed in range(20):
        query, gallery = near_and_same(seed, mean)
        paths = np.array(["q"]), np.array(["a", "b"])
        for name, values in rules.items():
            kept = Embeddings(query, gallery, *labels, *paths)
            found = rank_embeddings(kept, ranking_rules(Evaluate(**values)))
            assert found.rank(1) == 1 and found.top[0, 0] == 1, (name, seed)
        shot = rank(query, gallery, *sides(*labels), rules=Rules(draws=GalleryDraws(repeats=2)))
        assert shot.mAP == 1


def test_expansion_takes_the_nearest():
    for seed in range(20):
        query, gallery = near_and_same(seed, 3)
        row = distances(query, gallery, "cosine")[0].numpy()
        assert first_answers(row, 1)[0] == 1
        assert np.abs(expand_queries(query, gallery, 1) - query).max() < 1e-7
        three = np.concatenate([gallery, query])
        assert np.abs(augment_gallery(three, 1)[1] - query[0]).max() < 1e-7


def test_features_too_small_for_a_norm_in_float32_still_have_a_direction():
    x = torch.tensor([[3e-30, 4e-30], [6e-30, 8e-30], [0, 0], [3, 4]])
    torch.testing.assert_close(
        l2_normalise(x), torch.tensor([[0.6, 0.8], [0.6, 0.8], [0, 0], [0.6, 0.8]])
    )


@pytest.mark.parametrize(
    ("bad", "said"),
    [(np.nan, "hold NaN"), (np.inf, "hold NaN"), (-np.inf, "hold NaN"), (1e38, "are too long")],
)
@pytest.mark.parametrize("side", ["query", "gallery"])
def test_what_is_no_feature_is_refused_by_side_and_row(bad, said, side):
    query, gallery = features("plain")
    {"query": query, "gallery": gallery}[side][4, 2] = bad
    for call in (lambda: distances(query, gallery), lambda: by_stream(query, gallery, "cosine")):
        with pytest.raises(ValueError, match=f"{side} features {said}.*first: row 4"):
            call()


def test_ordinary_features_keep_their_distances_to_the_bit():
    g = torch.Generator().manual_seed(0)
    query, gallery = (torch.randn(n, 64, generator=g) for n in (30, 200))
    plain = torch.mm(query, gallery.T).mul_(-2)
    plain += torch.einsum("nd,nd->n", gallery, gallery)
    plain += torch.einsum("nd,nd->n", query, query)[:, None]
    assert torch.equal(distances(query, gallery, "sqeuclidean"), plain.clamp(min=0))
