"""The gallery index against sorting everything, through its folder and after accidents to it."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reidlab.retrieval import index as module
from reidlab.retrieval.distance import METRICS, distances
from reidlab.retrieval.features import l2_normalise
from reidlab.retrieval.index import GalleryIndex, faiss_threads, import_faiss, load_index, recall
from reidlab.retrieval.roles import kept


def some(n=600, q=20, dims=16, people=40, seed=0):
    "A gallery in which every tenth photo is a copy of another, and queries near it."
    g = np.random.default_rng(seed)
    feats = g.normal(size=(n, dims)).astype(np.float32)
    feats[g.choice(n, n // 10, replace=False)] = feats[g.integers(0, 5, n // 10)]
    query = feats[g.integers(0, n, q)] + 0.2 * g.normal(size=(q, dims)).astype(np.float32)
    labels = g.integers(-1, people, n), g.integers(-1, 4, n)
    return query, feats, *labels, g.integers(0, people, q), g.integers(-1, 4, q)


def built(feats, pids, camids, **how):
    index = GalleryIndex(feats.shape[1], **how)
    index.add(feats, pids, camids, [f"g/{i:05}.jpg" for i in range(len(feats))])
    return index


def slow(query, feats, metric, k, stays=None):
    "All distances in float64, shown in float32, sorted stably; −1 and inf where nothing is left."
    if metric == "cosine":
        query, feats = (l2_normalise(x).numpy() for x in (query, feats))
    squares = ((query[:, None].astype(np.float64) - feats[None]) ** 2).sum(2)
    dist = {"euclidean": np.sqrt(squares), "sqeuclidean": squares, "cosine": squares / 2}[metric]
    dist = dist.astype(np.float32)
    if stays is not None:
        dist = np.where(stays, dist, np.inf).astype(np.float32)
    dist = np.pad(dist, ((0, 0), (0, k)), constant_values=np.inf)
    order = np.argsort(dist, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(dist, order, 1)
    return best, np.where(np.isfinite(best), order, -1)


def assert_same(hits, wanted):
    np.testing.assert_array_equal(hits.positions, wanted[1])
    np.testing.assert_array_equal(hits.distances, wanted[0])


@contextmanager
def products(always):
    "faiss by matrix products inside, or as it likes."
    faiss = import_faiss()
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 1 if always else before
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = before


# --- exact -----------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(METRICS),
    st.integers(1, 40),
    st.integers(1, 60),
    st.sampled_from(["small integers", "normal", "far away"]),
    st.booleans(),
    st.booleans(),
)
def test_exact_is_a_stable_sort_of_everything(seed, metric, k, n, values, rule, product):
    g = np.random.default_rng(seed)
    dims, q = int(g.integers(1, 6)), int(g.integers(1, 30))
    feats, query = (g.normal(size=(m, dims)) for m in (n, q))
    if values == "small integers":  # ties everywhere, also across the k-th place
        feats, query = np.round(feats), np.round(query)
    elif values == "far away":  # differences are small beside the lengths
        feats, query = feats + 50, query + 50
    feats, query = feats.astype(np.float32), query.astype(np.float32)
    if metric == "cosine":  # rows of zeros are refused
        for x in (feats, query):
            x[(x == 0).all(1), 0] = 1
    pids, camids = g.integers(-1, 4, n), g.integers(-1, 2, n)
    who, by = g.integers(0, 4, q), g.integers(-1, 2, q)
    index = built(feats, pids, camids, metric=metric)
    stays, asked = None, {}
    if rule:
        stays = np.stack([kept(p, c, pids, camids) for p, c in zip(who, by, strict=True)])
        asked = {"q_pids": who, "q_camids": by}
    with products(product):
        hits = index.search(query, k, **asked)
    assert_same(hits, slow(query, feats, metric, k, stays))
    ends = hits.positions < 0
    assert (hits.pids[ends] == -1).all() and (hits.paths[ends] == "").all()
    np.testing.assert_array_equal(hits.pids[~ends], pids[hits.positions[~ends]])
    np.testing.assert_array_equal(hits.camids[~ends], camids[hits.positions[~ends]])


def test_a_gallery_of_copies_is_in_order():
    feats = np.ones((500, 8), np.float32)
    index = built(feats, np.zeros(500, int), np.zeros(500, int))
    for product in (False, True):
        with products(product):
            hits = index.search(np.zeros((25, 8)), k=30)
        np.testing.assert_array_equal(hits.positions, np.tile(np.arange(30), (25, 1)))


def test_long_features_that_differ_little_are_found_all_the_same():
    g = np.random.default_rng(0)
    feats, query = ((g.normal(size=(n, 8)) + 4000).astype(np.float32) for n in (2000, 40))
    offered = import_faiss().IndexFlatL2(8)
    offered.add(feats)
    wanted = slow(query, feats, "euclidean", 5)
    index = built(feats, np.zeros(2000, int), np.zeros(2000, int))
    with products(True):
        first = offered.search(query, 5 + module.SPARE)[1]  # what faiss alone would offer
        hits = index.search(query, k=5)
    assert any(set(w) - set(f) for w, f in zip(wanted[1].tolist(), first.tolist(), strict=True))
    assert_same(hits, wanted)


@pytest.mark.parametrize("metric", METRICS)
def test_exact_agrees_with_the_distance_matrix(metric):
    query, feats, pids, camids, *_ = some(n=3000, q=150, dims=64)
    index = built(feats, pids, camids, metric=metric)
    hits = index.search(query, k=50)
    whole = distances(query, feats, metric)
    nearest = whole.sort(dim=1, stable=True)
    rounding = {"euclidean": 5e-5, "sqeuclidean": 2e-4, "cosine": 2e-6}  # the matrix's: |q|² is 64
    torch.testing.assert_close(
        torch.tensor(hits.distances), nearest.values[:, :50], atol=rounding[metric], rtol=0
    )
    clear = (nearest.values[:, 1:51] - nearest.values[:, :50]) > 2 * rounding[
        metric
    ]  # apart from the next one
    clear[:, 1:] &= clear[:, :-1].clone()  # and from the one before
    same = torch.tensor(hits.positions) == nearest.indices[:, :50]
    assert clear.float().mean() > 0.5 and same[clear].all()


def test_answers_do_not_depend_on_company_threads_or_batches_of_adding():
    query, feats, pids, camids, *_ = some(n=2000, q=64, dims=32)
    index = built(feats, pids, camids)
    together = index.search(query, k=12)
    with products(True):
        for a, b in zip(index.search(query, k=12), together, strict=True):
            np.testing.assert_array_equal(a, b)
    for i in range(0, 64, 7):
        alone = index.search(query[i : i + 1], k=12)
        np.testing.assert_array_equal(alone.positions[0], together.positions[i])
        np.testing.assert_array_equal(alone.distances[0], together.distances[i])
    pieces = GalleryIndex(32)
    for cut in np.array_split(np.arange(2000), 9):
        pieces.add(feats[cut], pids[cut], camids[cut], [f"g/{i:05}.jpg" for i in cut])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again = pieces.search(query, k=12)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(again, together, strict=True):
        np.testing.assert_array_equal(a, b)


def test_torch_and_faiss_share_a_process_in_either_order():
    code = (
        "import sys\n{0}\n{1}\nimport numpy as np\n"
        "x = np.random.default_rng(0).normal(size=(3000, 64)).astype('f4')\n"
        "t = torch.tensor(x, requires_grad=True)\n(t @ t.T).sum().backward()\n"
        "from reidlab.retrieval.index import GalleryIndex\n"
        "i = GalleryIndex(64, kind='ivf', n_lists=16)\ni.add(x, [0] * 3000, [0] * 3000)\n"
        "p = i.search(x[:30], k=3, n_probe=16).positions[:, 0]\n"
        "assert (p == np.arange(30)).all()\n(t @ t.T).sum().backward()\nprint('alive')"
    )
    both = ("import torch", "import faiss")
    for order in (both, both[::-1]):
        words = [sys.executable, "-c", code.format(*order)]
        env = os.environ | {"OMP_NUM_THREADS": "2"}
        done = subprocess.run(words, capture_output=True, text=True, env=env)
        assert done.stdout.strip() == "alive", done.stderr[-1000:]


def test_blocks_of_queries_change_nothing(monkeypatch):
    query, feats, pids, camids, who, by = some(q=50)
    index = built(feats, pids, camids)
    whole = index.search(query, k=9, q_pids=who, q_camids=by)
    monkeypatch.setattr(module, "TOGETHER", 7)
    for a, b in zip(index.search(query, k=9, q_pids=who, q_camids=by), whole, strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_query_has_no_answers():
    _, feats, pids, camids, *_ = some()
    hits = built(feats, pids, camids).search(np.zeros((0, 16)), k=4)
    assert [x.shape for x in hits] == [(0, 4)] * 5


def test_importing_the_chapter_does_not_import_faiss():
    code = "import sys, reidlab.retrieval.index; print('faiss' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- lists -----------------------------------------------------------------------------------


def test_ivf_is_the_same_again_and_exact_when_it_looks_everywhere():
    query, feats, pids, camids, *_ = some(n=4000, q=50, dims=24)
    how = {"kind": "ivf", "n_lists": 32, "n_probe": 2}
    threads = import_faiss().omp_get_max_threads()
    index, twin = (built(feats, pids, camids, seed=5, **how) for _ in range(2))
    with faiss_threads(2):  # whatever is set outside
        third = built(feats, pids, camids, seed=5, **how)
    for other in (twin, third):
        for a, b in zip(index.search(query), other.search(query), strict=True):
            np.testing.assert_array_equal(a, b)
    assert import_faiss().omp_get_max_threads() == threads
    different = built(feats, pids, camids, seed=6, **how)
    assert (different.search(query).positions != index.search(query).positions).any()
    assert_same(index.search(query, k=15, n_probe=32), slow(query, feats, "euclidean", 15))


def test_ivf_answers_are_the_nearest_of_what_it_looked_at():
    query, feats, pids, camids, *_ = some(n=1500, q=40, dims=12)
    index = built(feats, pids, camids, kind="ivf", n_lists=20, n_probe=3)
    faiss = import_faiss()
    lists = faiss.downcast_index(index._faiss.quantizer).search(query, 3)[1]
    cell = np.empty(1500, int)
    for i in range(20):
        ids = faiss.rev_swig_ptr(
            index._faiss.invlists.get_ids(i), index._faiss.invlists.list_size(i)
        )
        cell[ids] = i
    stays = (cell[None, :, None] == lists[:, None, :]).any(2)
    assert_same(index.search(query, k=300), slow(query, feats, "euclidean", 300, stays))


def test_recall_is_the_share_found():
    query, feats, pids, camids, *_ = some(n=2000, q=60, dims=24)
    index = built(feats, pids, camids, kind="ivf", n_lists=40, n_probe=1)
    wanted = slow(query, feats, "euclidean", 10)[1]
    found = index.search(query).positions
    by_hand = np.mean([len(set(f) & set(w)) / 10 for f, w in zip(found, wanted, strict=True)])
    assert 0.05 < by_hand < 0.95 and recall(index, query) == pytest.approx(by_hand)
    curve = [recall(index, query, n_probe=n) for n in (1, 5, 20, 40)]
    assert curve == sorted(curve) and curve[-1] == 1
    assert recall(built(feats, pids, camids), query) == 1
    assert recall(built(feats[:3], pids[:3], camids[:3]), query) == 1  # k beyond the gallery


def test_train_first_then_add():
    query, feats, pids, camids, *_ = some(n=2000)
    index = GalleryIndex(16, kind="ivf", n_lists=32)
    index.train(feats)
    for cut in (slice(0, 5), slice(5, 2000)):  # five would be too few to learn from
        index.add(feats[cut], pids[cut], camids[cut])
    at_once = built(feats, pids, camids, kind="ivf", n_lists=32)
    np.testing.assert_array_equal(index.search(query).positions, at_once.search(query).positions)


# --- the folder ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "ivf"])
def test_round_trip(kind, tmp_path):
    query, feats, pids, camids, who, by = some()
    index = built(feats, pids, camids, kind=kind, metric="cosine", n_lists=8, n_probe=3, seed=2)
    index.save(tmp_path / "new" / "index")
    read = load_index(tmp_path / "new" / "index", dims=16)
    assert repr(read) == repr(index) and (read.seed, len(read)) == (2, 600)
    for more in ({}, {"q_pids": who, "q_camids": by}):
        for a, b in zip(index.search(query, **more), read.search(query, **more), strict=True):
            np.testing.assert_array_equal(a, b)
    for grown in (index, read):
        grown.add(query, who, by)
    np.testing.assert_array_equal(read.search(query).positions, index.search(query).positions)


def test_on_disk(tmp_path):
    query, feats, pids, camids, *_ = some()
    index = built(feats, pids, camids, kind="ivf", n_lists=8, n_probe=3)
    index.save(tmp_path)
    read = load_index(tmp_path, on_disk=True)
    for a, b in zip(index.search(query, k=30), read.search(query, k=30), strict=True):
        np.testing.assert_array_equal(a, b)
    for refused in (lambda: read.add(feats, pids, camids), lambda: read.save(tmp_path)):
        with pytest.raises(ValueError, match="on_disk=True"):
            refused()
    built(feats, pids, camids).save(tmp_path)
    with pytest.raises(ValueError, match="kind 'ivf', not 'exact'"):
        load_index(tmp_path, on_disk=True)


def test_an_interrupted_save_leaves_the_old_index(tmp_path, monkeypatch):
    query, feats, pids, camids, *_ = some()
    index = built(feats[:300], pids[:300], camids[:300])
    index.save(tmp_path)
    before = index.search(query)
    index.add(feats[300:], pids[300:], camids[300:])

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, "write_json", dies)
        index.save(tmp_path)
    read = load_index(tmp_path)
    for a, b in zip(read.search(query), before, strict=True):
        np.testing.assert_array_equal(a, b)
    index.save(tmp_path)
    assert len(load_index(tmp_path)) == 600
    assert len(list(tmp_path.iterdir())) == 3, "nothing old is left"


def _damage(folder, what):
    card = folder / "index.json"
    values = json.loads(card.read_text())
    files = {name: folder / entry["name"] for name, entry in values["files"].items()}
    if what == "short vectors":
        files["vectors"].write_bytes(files["vectors"].read_bytes()[:100])
    elif what == "a changed byte":
        content = bytearray(files["labels"].read_bytes())
        content[len(content) // 2] ^= 1
        files["labels"].write_bytes(bytes(content))
    elif what == "no labels":
        files["labels"].unlink()
    elif what == "half a card":
        card.write_text(card.read_text()[:40])
    elif what == "a list for a card":
        card.write_text("[1, 2]")
    elif what == "no kind":
        del values["kind"]
        card.write_text(json.dumps(values))
    elif what == "another count":
        card.write_text(json.dumps(values | {"photos": 7}))
    elif what == "other dims":
        card.write_text(json.dumps(values | {"dims": 17}))
    elif what == "newer":
        card.write_text(json.dumps(values | {"format": 2}))


DAMAGES = {
    "short vectors": r"vectors-\w+\.faiss in .* is damaged",
    "a changed byte": r"labels-\w+\.npz in .* is damaged",
    "no labels": r"labels-\w+\.npz in .* is missing",
    "half a card": "index.json in .* cannot be read.* build the index again",
    "a list for a card": "index.json in .* needs to hold a mapping.* build the index again",
    "no kind": "index.json in .* is not whole",
    "another count": "different indexes",
    "other dims": "different indexes",
    "newer": "has format 2",
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_named(what, tmp_path):
    _, feats, pids, camids, *_ = some()
    built(feats, pids, camids).save(tmp_path)
    _damage(tmp_path, what)
    with pytest.raises(ValueError, match=DAMAGES[what]):
        load_index(tmp_path)


def test_labels_hold_no_pickles(tmp_path):
    _, feats, pids, camids, *_ = some()
    built(feats, pids, camids).save(tmp_path)
    (labels,) = tmp_path.glob("labels-*.npz")
    with np.load(labels, allow_pickle=False) as stored:
        assert {name: stored[name].dtype.kind for name in stored} == {
            "pids": "i",
            "camids": "i",
            "paths": "U",
        }


# --- what it refuses -------------------------------------------------------------------------


def test_a_refused_call_changes_nothing():
    _, feats, pids, camids, *_ = some()
    index = built(feats, pids, camids)
    broken = feats.copy()
    broken[33, 2] = np.inf
    for wrong in (
        (broken, pids, camids),
        (feats[:, :4], pids, camids),
        (feats, pids[:-1], camids),
        (feats, pids, camids.astype(float)),
        (feats, pids, camids, ["a.jpg"]),
    ):
        with pytest.raises(ValueError):
            index.add(*wrong)
        assert len(index) == len(index.labels()[0]) == 600


def test_no_faiss_is_said_plainly(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r'pip install "reidlab\[index\]"'):
        GalleryIndex(8)


def test_a_row_of_zeros_has_no_cosine():
    index = GalleryIndex(4, metric="cosine")
    with pytest.raises(
        ValueError, match="rows of zeros, which have no direction, in 1 of 3; first: row 1"
    ):
        index.add(
            np.array([[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]], np.float32), [1, 2, 3], [0, 0, 0]
        )
