"""Protocols: single shot against published code, other rules against slow definitions, counts against data."""

import re
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled import sides

from reidlab.core.seed import rng
from reidlab.data.archives import find_raw
from reidlab.evaluation.by_protocol import protocol_rules
from reidlab.evaluation.card import protocol_counts
from reidlab.evaluation.counts import check_counts
from reidlab.evaluation.protocols import RULES, find_protocol, protocols
from reidlab.retrieval.distance import distances
from reidlab.retrieval.gallery_draws import GalleryDraws
from reidlab.retrieval.metrics import evaluate_rank
from reidlab.retrieval.rank import rank
from reidlab.retrieval.rerank import rerank
from reidlab.retrieval.rules import KReciprocal, Rules
from reidlab.retrieval.single_shot import evaluate_single_shot
from reidlab.retrieval.tracks import evaluate_tracks

DATA = Path(__file__).parent / "data"


@st.composite
def scenes(draw):
    "A small ranking with ties, junk, distractors, unknown cameras and lonely queries."
    g = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    q, n = draw(st.integers(1, 6)), draw(st.integers(1, 30))
    people, cameras = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    dist = g.integers(0, draw(st.integers(1, 12)), (q, n)).astype(np.float32)
    labels = [g.integers(0, people, q), g.integers(-1, people + 2, n)]
    return dist, *labels, g.integers(-1, cameras, q), g.integers(-1, cameras, n)


def slow_places(dist, q_pids, g_pids, q_camids, g_camids, repeats, seed, draw):
    "Single-shot places straight from the rule."
    everybody = sorted(set(g_pids.tolist()) - {-1})
    places = np.full((len(q_pids), repeats), -1)
    for q in range(len(q_pids)):
        u = rng(seed, -1 if draw == "gallery" else q).random((repeats, len(everybody)))
        for t in range(repeats):
            parade = []
            for i, person in enumerate(everybody):
                photos = [
                    g
                    for g in range(len(g_pids))
                    if g_pids[g] == person
                    and not (person == q_pids[q] and -1 != q_camids[q] == g_camids[g])
                ]
                if photos:
                    parade.append(photos[int(u[t, i] * len(photos))])
            parade.sort(key=lambda g: (dist[q, g], g))
            hits = [place for place, g in enumerate(parade) if g_pids[g] == q_pids[q]]
            places[q, t] = hits[0] if hits else -1
    return places


@settings(max_examples=60, deadline=None)
@given(scenes(), st.sampled_from(["query", "gallery"]), st.integers(0, 5))
def test_single_shot_is_its_definition(scene, draw, seed):
    slow = slow_places(*scene, repeats=3, seed=seed, draw=draw)
    draws = GalleryDraws(repeats=3, seed=seed, draw=draw)
    if (slow < 0).all():
        with pytest.raises(ValueError, match="no match in the gallery"):
            evaluate_single_shot(scene[0], *sides(*scene[1:]), draws)
        return
    result = evaluate_single_shot(scene[0], *sides(*scene[1:]), draws, max_rank=4)
    np.testing.assert_array_equal(result.ranks, slow)
    valid = slow[slow[:, 0] >= 0]
    assert result.mAP == pytest.approx((1 / (valid + 1)).mean())
    np.testing.assert_allclose(result.cmc, [(valid < k).mean() for k in (1, 2, 3, 4)])
    by_repeat = (1 / (valid + 1)).mean(0)
    assert result.mAP_std == pytest.approx(by_repeat.std(ddof=1), abs=1e-12)


def test_single_shot_is_what_the_published_code_draws():
    with np.load(DATA / "golden_eval_single_shot.npz", allow_pickle=False) as stored:
        g = dict(stored)
    runs = 100  # of ten repeats each, as the golden means are of 150 such runs
    labels = [g[name] for name in ("q_pid", "g_pid", "q_cam", "g_cam")]
    draws = GalleryDraws(repeats=10 * runs)
    result = evaluate_single_shot(g["distmat"], *sides(*labels), draws, max_rank=10)
    share = 4 / np.sqrt(runs) + 4 / np.sqrt(150)
    assert abs(result.mAP - g["map_mean"]) < share * g["map_std_per_run"]
    assert (np.abs(result.cmc - g["cmc_mean"]) < share * g["cmc_std_per_run"]).all()
    ours = result.mAP_std / np.sqrt(10)  # of one run of ten
    assert ours == pytest.approx(float(g["map_std_per_run"]), rel=0.3)  # one of 150, one of 1000
    whole = evaluate_rank(g["distmat"], *labels)
    assert abs(whole.mAP - g["map_mean"]) > 10 * share * g["map_std_per_run"]  # the test can fail


def test_single_shot_depends_on_the_seed_alone():
    g = np.random.default_rng(0)
    q_pids, g_pids = g.integers(0, 20, 150), g.integers(0, 25, 300)
    feats = [g.normal(size=(n, 8)).astype(np.float32) for n in (150, 300)]
    labels = q_pids, g_pids, np.zeros(150, int), np.ones(300, int)
    drawn = Rules(draws=GalleryDraws(seed=1))
    first = rank(*feats, *sides(*labels), rules=drawn)
    for tile in (1, 37, 1000):
        again = rank(*feats, *sides(*labels), rules=replace(drawn, tile=tile))
        np.testing.assert_array_equal(again.ranks, first.ranks)
    from_matrix = evaluate_single_shot(distances(*feats), *sides(*labels), drawn.draws)
    np.testing.assert_array_equal(from_matrix.ranks, first.ranks)
    other = rank(*feats, *sides(*labels), rules=Rules(draws=GalleryDraws(seed=2)))
    assert (other.ranks != first.ranks).any()
    few = [x[:60] if len(x) == 150 else x for x in labels]
    alone = rank(feats[0][:60], feats[1], *sides(*few), rules=drawn)
    np.testing.assert_array_equal(alone.ranks, first.ranks[:60])  # later queries change nothing


# --- tracks ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(scenes(), st.integers(1, 4))
def test_tracks_are_their_definition(scene, size):
    dist, q_pids, g_pids, q_camids, g_camids = scene
    g = np.random.default_rng(size)
    who = (g_pids + 1) * 10 + g_camids + 1  # photos of one pid and camid, cut into tracks
    g_tracks = who * 10 + g.integers(0, size, len(who))
    tracks = sorted(set(g_tracks.tolist()))
    slow = np.stack([dist[:, g_tracks == t].min(1) for t in tracks], 1)
    pids, camids = (np.array([x[g_tracks == t][0] for t in tracks]) for x in (g_pids, g_camids))
    try:
        wanted = evaluate_rank(slow, q_pids, pids, q_camids, camids)
    except ValueError as said:
        with pytest.raises(ValueError) as heard:
            evaluate_tracks(dist, *sides(*scene[1:], g_tracks))
        assert str(heard.value) == str(said)
        return
    result = evaluate_tracks(dist, *sides(*scene[1:], g_tracks))
    for name in ("ap", "first_hit", "top", "cmc"):
        np.testing.assert_array_equal(getattr(result, name), getattr(wanted, name))
    photos = evaluate_rank(*scene)
    np.testing.assert_array_equal(photos.valid, result.valid)  # a match is on a track of its own


def test_tracks_stream():
    g = np.random.default_rng(0)
    g_tracks = g.integers(0, 60, 500)
    g_pids, g_camids = g_tracks // 4, g_tracks % 4
    feats = [g.normal(size=(n, 16)).astype(np.float32) for n in (200, 500)]
    labels = g.integers(0, 15, 200), g_pids, g.integers(0, 4, 200), g_camids
    for metric in ("euclidean", "cosine"):
        whole = evaluate_tracks(distances(*feats, metric), *sides(*labels, g_tracks))
        for tile in (1, 64, 999):
            rules = Rules(metric, tracks=True, tile=tile)
            streamed = rank(*feats, *sides(*labels, g_tracks), rules=rules)
            np.testing.assert_array_equal(streamed.ap, whole.ap)
            np.testing.assert_array_equal(streamed.top, whole.top)


# --- protocols as data -----------------------------------------------------------------------


def test_every_protocol_is_there():
    wanted = (
        "market1501 dukemtmc msmt17_v1 msmt17_v2 cuhk03_np_detected cuhk03_np_labeled "
        "cuhk03_single_shot partial_ilids partial_reid partial_reid_single_shot veri776 "
        "veri776_track veriwild_small veriwild_medium veriwild_large vehicles8 cross_domain"
    )
    assert list(protocols()) == wanted.split()
    for name, p in protocols().items():
        assert p.name == name and find_protocol(name) is p
        assert p.rule in RULES and p.kind in ("person", "vehicle", "any") and p.title and p.notes
        assert (p.repeats > 1) == (p.rule == "single_shot")
        assert set(p.ap_rules) <= {"standard", "trapezoidal"}
        assert p.junk == (p.counts.get("junk", 0) > 0)
        assert name in repr(p) and all(note in repr(p) for note in p.notes)


def split_of(p, g):
    "Labels that hold exactly what a protocol says."
    c = p.counts
    q_pids = np.resize(np.arange(1, c["query_pids"] + 1), c["queries"])
    strangers = c["gallery_pids"] - c["query_pids"]
    own = c["gallery"] - c["junk"] - c.get("distractors", strangers)
    left = c["gallery"] - c["junk"] - own
    g_pids = np.concatenate(
        [
            np.resize(q_pids, own),
            c["query_pids"] + 1 + np.resize(np.arange(max(strangers, 1)), left),
            np.full(c["junk"], -1),
        ]
    )
    cameras = c.get("cameras", 2)
    q_camids, g_camids = (np.resize(np.arange(cameras), n) for n in (c["queries"], c["gallery"]))
    return q_pids, g.permutation(g_pids), q_camids, g_camids


FULL = [p.name for p in protocols().values() if {"gallery", "junk"} <= set(p.counts)]


@pytest.mark.parametrize("name", FULL)
def test_counts_as_published_raise_no_finding_and_each_change_does(name):
    p = protocols()[name]
    counts = protocol_counts(*split_of(p, np.random.default_rng(0)))
    assert check_counts(name, counts) == []
    for key in set(counts) & set(p.counts):
        for change in (-1, 1, 1000):
            (found,) = check_counts(name, {key: counts[key] + change})
            assert (found.count, found.seen) == (key, counts[key] + change)
            assert found.published == p.counts[key]
            near = abs(change) <= 0.01 * p.counts[key]
            assert found.level == ("close" if near and key in p.quoted else "differs")
            assert f"{found.seen:,}" in found.message and f"{found.published:,}" in found.message


def test_rules_are_dispatched():
    g = np.random.default_rng(0)
    g_tracks = np.repeat(np.arange(40), 5)
    g_pids, g_camids = g_tracks // 4, g_tracks % 4
    feats = [g.normal(size=(n, 8)).astype(np.float32) for n in (30, 200)]
    labels = g.integers(0, 10, 30), g_pids, g.integers(0, 4, 30), g_camids
    plain = evaluate_rank(distances(*feats, "cosine"), *labels)
    cosine, with_tracks = Rules("cosine"), (*feats, *sides(*labels, g_tracks))
    ranked = rank(*with_tracks, protocol_rules("market1501", cosine))
    np.testing.assert_array_equal(ranked.ap, plain.ap)
    same = rank(*with_tracks, protocol_rules("dukemtmc -> market1501", cosine))
    np.testing.assert_array_equal(same.ap, plain.ap)
    tracks = rank(*with_tracks, protocol_rules("veri776_track", tracked=True))
    dist = distances(*feats)
    np.testing.assert_array_equal(tracks.ap, evaluate_tracks(dist, *with_tracks[2:]).ap)
    for name, draw in (("cuhk03_single_shot", "query"), ("partial_reid_single_shot", "gallery")):
        rules = protocol_rules(name)
        assert rules.draws == GalleryDraws(repeats=10, draw=draw)
        drawn = rank(*with_tracks, replace(rules, draws=replace(rules.draws, seed=3)))
        alone = evaluate_single_shot(dist, *sides(*labels), GalleryDraws(10, seed=3, draw=draw))
        np.testing.assert_array_equal(drawn.ranks, alone.ranks)
    four = replace(protocol_rules("cuhk03_single_shot"), draws=GalleryDraws(repeats=4))
    assert rank(*with_tracks, four).repeats == 4


def test_reranking_leaves_junk_out_and_warns_where_it_hurts():
    g = np.random.default_rng(1)
    g_pids, g_camids = np.repeat(np.arange(-1, 9), 6), np.tile(np.arange(3), 20)
    q_pids, q_camids = np.arange(9), np.full(9, 3)
    feats = [g.normal(size=(n, 8)).astype(np.float32) for n in (9, 60)]
    clean = g_pids >= 0
    wanted = evaluate_rank(
        rerank(feats[0], feats[1][clean]), q_pids, g_pids[clean], q_camids, g_camids[clean]
    )
    labels = q_pids, g_pids, q_camids, g_camids
    again = protocol_rules("market1501", Rules(rerank=KReciprocal()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = rank(*feats, *sides(*labels), rules=again)
    np.testing.assert_array_equal(got.ap, wanted.ap)
    kept = np.flatnonzero(clean)
    np.testing.assert_array_equal(got.top, np.where(wanted.top < 0, -1, kept[wanted.top]))
    alone = [g_pids[6::6], np.zeros(9, int)]
    with pytest.warns(UserWarning, match="9 of 9 people have a single gallery photo"):
        rules = protocol_rules("partial_ilids", Rules(rerank=KReciprocal(k1=3, k2=2)))
        rank(feats[0], feats[1][6::6], *sides(q_pids, alone[0], q_camids, alone[1]), rules=rules)
    with pytest.raises(ValueError, match="lambda_value"):
        wrong = replace(again, rerank=KReciprocal(lambda_value=2))
        rank(*feats, *sides(*labels), rules=wrong)


def test_vehicles8_holds_what_its_protocol_says():
    try:
        archive = find_raw("vehicles8")
    except FileNotFoundError as missing:
        pytest.skip(f"vehicles8 is not on this machine: {missing}")
    names = zipfile.ZipFile(archive).namelist() if archive.is_file() else None
    if names is None:
        names = [p.relative_to(archive).as_posix() for p in archive.rglob("*.jpg")]
    found = re.findall(r"(\w+)/(\d+)_c(\d)s\d_\w+\.jpg", "\n".join(names))
    sides = {
        folder: np.array([(int(p), int(c)) for f, p, c in found if f == folder])
        for folder in ("query", "bounding_box_test", "bounding_box_train")
    }
    (q_pids, q_camids), (g_pids, g_camids), (t_pids, t_camids) = (x.T for x in sides.values())
    counts = protocol_counts(q_pids, g_pids, q_camids, g_camids)
    counts |= {
        "train": len(t_pids),
        "train_pids": len(set(t_pids)),
        "train_cameras": len(set(t_camids)),
    }
    assert set(counts) >= set(protocols()["vehicles8"].counts)
    assert check_counts("vehicles8", counts) == []
