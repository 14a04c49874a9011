"""Ranking against a definition that is slow and plain, on galleries drawn to be awkward."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from labelled import sides
from PIL import Image
from torch import nn

from reidlab.core.recipe import Data
from reidlab.data.manifest import Photos
from reidlab.evaluation.embed import dealt, embed_photos
from reidlab.evaluation.lists import AP_QUERIES, ranking_record
from reidlab.retrieval.distance import GEMM_ROWS, distance_blocks, distances
from reidlab.retrieval.matches import by_identity, matches_by_sorting
from reidlab.retrieval.metrics import evaluate_rank
from reidlab.retrieval.rank import rank_features
from reidlab.retrieval.scan import scan_rows

ARRAYS = ("cmc", "ap", "ap_trapezoidal", "inp", "valid", "first_hit", "top")


def plain_list(dist, pid, camid, g_pids, g_camids):
    "The filtered list of one query, entry by entry: gallery positions, nearest first."
    kept = []
    for g in range(len(g_pids)):
        if g_pids[g] == -1:
            continue
        if g_pids[g] == pid and g_camids[g] == camid and camid != -1:
            continue
        kept.append(g)
    return sorted(kept, key=lambda g: (dist[g], g))


def plain_scores(hits):
    "AP, trapezoidal AP, INP and first hit of one list of booleans that holds a True."
    ap, trapezoid, found, last = 0.0, 0.0, 0, None
    for position, hit in enumerate(hits):
        if hit:
            before = 1.0 if position == 0 else found / position
            found += 1
            here = found / (position + 1)
            ap += here
            trapezoid += (before + here) / 2
            last = position
    return ap / found, trapezoid / found, found / (last + 1), hits.index(True)


def plain_evaluation(dist, q_pids, g_pids, q_camids, g_camids, max_rank):
    "Means over valid queries (None without any), CMC by counting, and the queries left out."
    scores, lost = [], []
    for q in range(len(q_pids)):
        order = plain_list(dist[q], q_pids[q], q_camids[q], g_pids, g_camids)
        hits = [bool(g_pids[g] == q_pids[q]) for g in order]
        if any(hits):
            scores.append(plain_scores(hits))
        else:
            lost.append((q, int(q_pids[q]), int(q_camids[q])))
    if not scores:
        return None, None, lost
    columns = list(zip(*scores, strict=True))
    cmc = [sum(first < k for first in columns[3]) / len(scores) for k in range(1, max_rank + 1)]
    return [sum(c) / len(scores) for c in columns[:3]], cmc, lost


def same_bits(a, b):
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert a.summary() == b.summary()
    assert a.without_match == b.without_match


@st.composite
def cases(draw):
    """Few people, few cameras, few distances: ties, junk, unknown cameras and distractors abound."""
    n_query, n_gallery = draw(st.integers(1, 5)), draw(st.integers(1, 14))
    n_cameras = draw(st.integers(0, 3))  # with 0 every camera is unknown
    pids, cams = st.integers(1, 3), st.integers(-1, n_cameras - 1)

    def row(values, n):
        return np.array(draw(st.lists(values, min_size=n, max_size=n)))

    levels = draw(st.sampled_from([1, 4, 1000]))
    dist = np.array([row(st.integers(0, levels), n_gallery) for _ in range(n_query)]) / 8
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    g_pids = row(st.one_of(pids, st.sampled_from([-1, 0, 9])), n_gallery)
    return dist.astype(dtype), row(pids, n_query), g_pids, row(cams, n_query), row(cams, n_gallery)


def lucky(case, sign):
    "Distances whose ties are broken against the matches (sign 1) or for them (-1)."
    dist, q_pids, g_pids, *_ = case
    levels = np.unique(dist, return_inverse=True)[1].reshape(dist.shape)
    return levels + 0.25 * sign * (q_pids[:, None] == g_pids)


@settings(max_examples=200, deadline=None)
@given(cases(), st.integers(1, 20))
def test_scores_follow_the_definition(case, max_rank):
    means, cmc, lost = plain_evaluation(*case, max_rank)
    if means is None:
        with pytest.raises(ValueError, match="With no query left there is no mean"):
            evaluate_rank(*case, max_rank=max_rank)
        return
    r = evaluate_rank(*case, max_rank=max_rank)
    np.testing.assert_allclose([r.mAP, r.mAP_trapezoidal, r.mINP], means, rtol=1e-12)
    np.testing.assert_allclose(r.cmc, cmc, rtol=1e-12)
    assert r.cmc.shape == (max_rank,)
    assert r.without_match == lost
    assert r.n_valid == len(r.valid) - len(lost)
    order = [  # both ends of luck: equal distances before or behind the matches
        evaluate_rank(lucky(case, sign), *case[1:], max_rank=max_rank).summary() for sign in (1, -1)
    ]
    bounds = r.tie_bounds()
    for row, summary in zip(("worst", "best"), order, strict=True):
        for name, value in bounds.loc[row].items():
            assert value == pytest.approx(summary[name], rel=1e-12), (row, name)
    for k in (1, 5, 10):  # the headline does not depend on where the curve was cut
        assert r.summary()[f"R{k}"] == pytest.approx(
            np.mean([0 <= first < k for first in r.first_hit[r.valid]])
        )


@settings(max_examples=80, deadline=None)
@given(cases())
def test_top_is_the_head_of_the_plain_list(case):
    dist, q_pids, g_pids, q_camids, g_camids = case
    try:
        r = evaluate_rank(*case, top=6)
    except ValueError:
        assume(False)
    for q in range(len(q_pids)):
        order = plain_list(dist[q], q_pids[q], q_camids[q], g_pids, g_camids)[:6]
        assert list(r.top[q]) == order + [-1] * (6 - len(order))


@settings(max_examples=200, deadline=None)
@given(cases(), st.integers(0, 6), st.booleans())
def test_counting_and_sorting_find_the_same_places(case, top, infinite):
    dist, *labels = case
    if infinite:  # the nearest third of the levels becomes the farthest of all
        dist = np.where(dist < dist.max() / 3, np.inf, dist)
    labels = [np.asarray(x, dtype=np.int64) for x in labels]
    dist = dist.astype(np.float32) if dist.dtype == np.float16 else dist
    asked, there = sides(*labels)
    want = matches_by_sorting(torch.from_numpy(dist), asked, there, top=top)
    for dear in (0, 10**9):  # by slots, by comparing
        grouped = by_identity(asked, there)
        found, _ = scan_rows(dist, grouped, asked, there, top=top, dear=dear)
        for ours, theirs in zip(found, want, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dear", [0, 10**9])
def test_many_matches_and_blocks_are_counted_alike(dear):
    g = np.random.default_rng(3)
    labels = (
        g.integers(0, 3, 90),
        g.integers(-1, 4, 2500),
        g.integers(-1, 3, 90),
        g.integers(0, 3, 2500),
    )
    dist = g.integers(0, 900, (90, 2500)).astype(np.float32)
    asked, there = sides(*labels)
    want = matches_by_sorting(torch.from_numpy(dist), asked, there)
    assert np.diff(want.start).max() > 300 and want.tied.all()
    for threads in (1, 2, 5):
        grouped = by_identity(asked, there)
        found, _ = scan_rows(dist, grouped, asked, there, threads=threads, dear=dear)
        for ours, theirs in zip(found, want, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_number_of_threads_cannot_be_seen():
    q, g, *labels = features(n_query=300)
    before = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(evaluate_rank(distances(q, g), *labels))
        dist = distances(q, g)
    finally:
        torch.set_num_threads(before)
    mixed = evaluate_rank(
        dist.numpy()[:, ::-1], labels[0], labels[1][::-1], labels[2], labels[3][::-1]
    )
    for other in results[1:]:
        same_bits(results[0], other)
    np.testing.assert_array_equal(mixed.ap, results[0].ap)  # a view is as good as a copy


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(0, 100))
def test_cosine_does_not_see_the_length_of_features(scale, seed):
    q, g, *labels = features(n_query=40, n_gallery=90)
    lengths = np.random.default_rng(seed).uniform(0.5, 2, (len(g), 1)).astype(np.float32)
    plain = rank_features(q, g, *labels, metric="cosine")
    scaled = rank_features(q * np.float32(scale), g * lengths, *labels, metric="cosine")
    np.testing.assert_allclose(
        scaled.ap, plain.ap, atol=1e-9
    )  # the ranks are integers: no tie here
    np.testing.assert_array_equal(scaled.first_hit, plain.first_hit)


def named_photos(side, pids, camids):
    return Photos(Path(), [f"{side}{i}" for i in range(len(pids))], pids, camids)


@settings(max_examples=80, deadline=None)
@given(cases(), st.integers(1, 4))
def test_the_record_keeps_the_ends_of_the_plain_ranking(case, n):
    dist, q_pids, g_pids, q_camids, g_camids = case
    try:
        r = evaluate_rank(*case)
    except ValueError:
        assume(False)
    query, gallery = named_photos("q", q_pids, q_camids), named_photos("g", g_pids, g_camids)
    record = ranking_record(query, gallery, r, n, dataset="awkward")
    lists = [
        plain_list(dist[q], q_pids[q], q_camids[q], g_pids, g_camids) for q in range(len(q_pids))
    ]
    hits = [[bool(g_pids[g] == q_pids[q]) for g in order] for q, order in enumerate(lists)]
    ap = {q: plain_scores(h)[0] for q, h in enumerate(hits) if any(h)}
    assert record["ap"] == [
        pytest.approx(ap[q], abs=6e-5) if q in ap else None for q in range(len(q_pids))
    ]
    for end, sign in (("best", -1), ("worst", 1)):
        order = sorted(ap, key=lambda q: (sign * r.ap[q], q))[:n]
        assert [shown["path"] for shown in record[end]] == [f"q{q}" for q in order]
        for shown, q in zip(record[end], order, strict=True):
            assert [e["path"] for e in shown["ranks"]] == [f"g{g}" for g in lists[q][:10]]
            assert [e["match"] for e in shown["ranks"]] == hits[q][:10]
    json.dumps(record, allow_nan=False)  # plain values alone


@pytest.mark.parametrize(("n", "kept"), [(AP_QUERIES, True), (AP_QUERIES + 1, False)])
def test_a_record_of_many_queries_stays_small(n, kept):
    ones, query = np.ones(n, dtype=int), named_photos("q", np.ones(n, int), np.zeros(n, int))
    r = evaluate_rank(np.zeros((n, 1)), ones, [1], 0 * ones, [1])
    record = ranking_record(query, named_photos("g", np.array([1]), np.array([1])), r)
    assert (record["ap"] == [1.0] * n) if kept else record["ap"] is None
    assert len(json.dumps(record, indent=1)) < 50_000


@settings(max_examples=60, deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_shuffling_the_gallery_changes_nothing_without_ties(case, random):
    _, q_pids, g_pids, q_camids, g_camids = case
    q, g = len(q_pids), len(g_pids)
    dist = np.array([random.sample(range(g), g) for _ in range(q)], dtype=np.float32)
    try:
        plain = evaluate_rank(dist, q_pids, g_pids, q_camids, g_camids)
    except ValueError:
        assume(False)
    order = np.array(random.sample(range(g), g))
    mixed = evaluate_rank(dist[:, order], q_pids, g_pids[order], q_camids, g_camids[order])
    for name in ("cmc", "ap", "ap_trapezoidal", "inp", "first_hit"):
        np.testing.assert_array_equal(getattr(mixed, name), getattr(plain, name))
    np.testing.assert_array_equal(np.where(mixed.top < 0, -1, order[mixed.top]), plain.top)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_duplicated_photos_rank_side_by_side(case):
    dist, q_pids, g_pids, q_camids, g_camids = case
    try:
        twice = evaluate_rank(
            np.repeat(dist, 2, 1), q_pids, np.repeat(g_pids, 2), q_camids, np.repeat(g_camids, 2)
        )
    except ValueError:
        assume(False)
    once = evaluate_rank(*case)
    if (np.diff(np.sort(dist, 1), axis=1) > 0).all():  # without other ties: first hits move to 2r
        np.testing.assert_array_equal(
            twice.first_hit, np.where(once.first_hit < 0, -1, 2 * once.first_hit)
        )
    means, _, _ = plain_evaluation(
        np.repeat(dist, 2, 1), q_pids, np.repeat(g_pids, 2), q_camids, np.repeat(g_camids, 2), 5
    )
    np.testing.assert_allclose([twice.mAP, twice.mAP_trapezoidal, twice.mINP], means, rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_unknown_cameras_leave_nothing_out(case):
    dist, q_pids, g_pids, q_camids, g_camids = case
    nowhere = np.full_like(q_camids, -1)
    try:
        r = evaluate_rank(dist, q_pids, g_pids, nowhere, g_camids)
    except ValueError:
        assert not np.isin(q_pids, g_pids).any()
        return
    np.testing.assert_array_equal(r.valid, np.isin(q_pids, g_pids))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_strict_refuses_what_is_otherwise_counted(case):
    try:
        r = evaluate_rank(*case)
    except ValueError:
        assume(False)
    if r.without_match:
        _, pid, camid = r.without_match[0]
        with pytest.raises(ValueError, match=f"first: pid {pid}, camid {camid}. Raised because"):
            evaluate_rank(*case, strict=True)
    else:
        same_bits(evaluate_rank(*case, strict=True), r)


def features(n_query=150, n_gallery=400, dims=24, dtype=np.float32):
    rng = np.random.default_rng(7)
    people = rng.normal(size=(40, dims))
    q_pids, g_pids = rng.integers(0, 30, n_query), rng.integers(-1, 40, n_gallery)
    q, g = (people[p] + rng.normal(size=(len(p), dims)) for p in (q_pids, g_pids))
    cams = rng.integers(0, 4, n_query), rng.integers(0, 4, n_gallery)
    return q.astype(dtype), g.astype(dtype), q_pids, g_pids, *cams


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("tile", [1, 33, 128, 129, 300, 10_000])
def test_streaming_equals_the_whole_matrix_to_the_bit(metric, tile):
    q, g, *labels = features(n_query=300)
    whole = evaluate_rank(distances(q, g, metric), *labels)
    same_bits(rank_features(q, g, *labels, metric=metric, tile=tile), whole)
    blocks = list(distance_blocks(q, g, metric, tile))
    assert max(len(block) for _, block in blocks) <= max(tile, 1)
    assert torch.equal(torch.cat([b for _, b in blocks]), distances(q, g, metric))
    assert [start for start, _ in blocks] == list(
        np.cumsum([0] + [len(block) for _, block in blocks[:-1]])
    )
    assert len(q) > GEMM_ROWS  # or this test shows nothing


def test_no_block_holds_more_than_its_tile():
    "Peak of live distance storage stays near one tile, however many queries there are."
    q, g, *_ = features(n_query=2000)
    sizes = [block.untyped_storage().nbytes() for _, block in distance_blocks(q, g, tile=128)]
    assert max(sizes) <= GEMM_ROWS * len(g) * 4
    places = {block.data_ptr() for _, block in distance_blocks(q, g, tile=GEMM_ROWS, reuse=True)}
    assert len(places) == 1 < len(q) // GEMM_ROWS


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
def test_distances_against_float64(metric):
    q, g, *_ = (torch.tensor(x, dtype=torch.float64) for x in features()[:2])
    if metric == "cosine":
        exact = 1 - (q / q.norm(dim=1, keepdim=True)) @ (g / g.norm(dim=1, keepdim=True)).T
    else:
        exact = (q[:, None] - g[None]).norm(dim=2)
        exact = exact if metric == "euclidean" else exact**2
    ours = distances(q, g, metric)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=2e-6)


def test_half_precision_features_are_promoted():
    q, g, *labels = features(dtype=np.float16)
    promoted = rank_features(q.astype(np.float32), g.astype(np.float32), *labels)
    same_bits(rank_features(q, g, *labels), promoted)
    same_bits(rank_features(torch.tensor(q), torch.tensor(g), *map(torch.tensor, labels)), promoted)


def test_bfloat16_distance_matrix_and_lists_are_accepted():
    r = evaluate_rank(torch.tensor([[0.5, 0.25]]).bfloat16(), [1], [1, 2], [0], [1, 1])
    assert r.first_hit.tolist() == [1]


def test_distractors_cost_and_junk_does_not():
    dist = np.array([[0.1, 0.2, 0.3]])
    cams = ([0], [1, 1, 1])
    clean = evaluate_rank(dist[:, 2:], [5], [5], [0], [1])
    junk = evaluate_rank(dist, [5], [-1, -1, 5], *cams)
    distractors = evaluate_rank(dist, [5], [0, 0, 5], *cams)
    assert junk.mAP == clean.mAP == 1
    assert distractors.mAP == pytest.approx(1 / 3)
    assert distractors.mINP == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_pids": [1, 2, 3]}, r"q_pids needs shape \(2,\) beside 2 queries × 3 gallery photos"),
        ({"g_camids": [[0, 0, 0]]}, r"g_camids needs shape \(3,\)"),
        ({"distmat": np.zeros(3)}, r"distmat needs shape \(Q, G\), got \(3,\)"),
        ({"distmat": np.zeros((0, 3))}, "0 queries, 3 gallery"),
        (
            {"distmat": np.full((2, 3), np.nan)},
            "hold NaN in 2 of 2 rows; first: query 0, gallery 0",
        ),
        ({"max_rank": 0}, "max_rank is 1 or more"),
        ({"g_camids": [0, 0, 0], "q_camids": [0, 0]}, "2 of 2 queries have no match"),
    ],
)
def test_bad_input_has_one_clear_line(change, message):
    good = {
        "distmat": np.arange(6.0).reshape(2, 3),
        "q_pids": [1, 2],
        "g_pids": [1, 2, 3],
        "q_camids": [0, 0],
        "g_camids": [1, 1, 1],
    }
    evaluate_rank(**good)
    with pytest.raises(ValueError, match=message):
        evaluate_rank(**(good | change))


def test_float_labels_are_refused():
    with pytest.raises(TypeError, match="g_pids needs integers, got float64"):
        evaluate_rank(np.zeros((1, 1)), [1], [1.0], [0], [1])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 5))
def test_every_photo_is_dealt_once_and_batches_stay_whole(n, batch_size, world):
    hands = [dealt(n, batch_size, rank, world) for rank in range(world)]
    assert sorted(sum(hands, [])) == list(range(n))  # noqa: RUF017
    single = [tuple(range(i, min(i + batch_size, n))) for i in range(0, n, batch_size)]
    cut = [
        tuple(hand[i : i + batch_size]) for hand in hands for i in range(0, len(hand), batch_size)
    ]
    assert sorted(cut) == single


def some_photos(folder, n):
    rng = np.random.default_rng(0)
    paths = [f"{i:02}.png" for i in range(n)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (32, 16, 3), dtype=np.uint8)).save(folder / path)
    return Photos(folder, paths, np.arange(n), np.zeros(n, dtype=np.int64))


def embed_all(folder, n, batch_size):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 30 * 14, 5)
    )
    photos = Photos(folder, [f"{i:02}.png" for i in range(n)], np.arange(n), np.zeros(n, int))
    size = Data(height=32, width=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    return embed_photos(model, photos, size, batch_size, workers=0)


SIZES = (11, 3)  # three batches of four for two processes; one batch, so that one has nothing


def worker(rank, world, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    torch.save({n: embed_all(folder, n, 4) for n in SIZES}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_embed_the_same_bits_as_one(tmp_path):
    some_photos(tmp_path, max(SIZES))
    threads = torch.get_num_threads()
    alone = {n: embed_all(tmp_path, n, 4) for n in SIZES}
    torch.set_num_threads(threads)
    torch.multiprocessing.spawn(worker, (2, tmp_path), nprocs=2)
    for rank in range(2):
        shared = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for n in SIZES:
            assert alone[n].shape == (n, 5)
            assert torch.equal(shared[n], alone[n])
