"Sets joined, tests on other sets, and evaluation by the protocol that a manifest names."

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from labelled import sides

from reidlab.core.recipe import Data, Evaluate, Recipe, Train
from reidlab.core.run import open_run
from reidlab.core.settings import project_root
from reidlab.data.joined import join
from reidlab.data.loaders import open_data, train_loader
from reidlab.data.manifest import read_manifest, write_manifest
from reidlab.data.synthetic import write_synthetic
from reidlab.evaluation.baselines import BASELINES
from reidlab.evaluation.by_protocol import manifest_protocol, rank_by_protocol
from reidlab.evaluation.embeddings import Embeddings, load_embeddings, rank_embeddings
from reidlab.evaluation.evaluate_run import evaluate_run
from reidlab.evaluation.lists import ranking_of
from reidlab.evaluation.protocols import protocols
from reidlab.evaluation.rules import ranking_rules
from reidlab.retrieval.distance import distances
from reidlab.retrieval.features import l2_normalise
from reidlab.retrieval.gallery_draws import GalleryDraws
from reidlab.retrieval.metrics import evaluate_rank
from reidlab.retrieval.rerank import rerank
from reidlab.retrieval.single_shot import evaluate_single_shot
from reidlab.retrieval.tracks import evaluate_tracks
from reidlab.training.fit import fit_from_recipe

SIZE = {"train_pids": 8, "test_pids": 6, "cameras": 3, "distractors": 2, "junk": 2}
NAMES = [p for p in protocols() if p != "cross_domain"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    "Two sets of drawn people, north and south, and the two joined."
    base = tmp_path_factory.mktemp("joined")
    for seed, name in enumerate(("north", "south")):
        rows = write_synthetic(base / "photos" / name, seed=seed, **SIZE)
        write_manifest(base / name, name, rows, base / "photos" / name)
    join([read_manifest(base / n) for n in ("north", "south")], "north", base / "both")
    return base


def recipe(name: str) -> Recipe:
    data = Data(
        name=name,
        height=32,
        width=16,
        sampler={"pk": {"p": 4, "k": 2}},
        augment={"flip": {}, "pad_crop": {"pixels": 2}, "erase": {}},
        val_fraction=0,
    )
    evaluate = Evaluate(checkpoint="last", baselines=False)
    return Recipe(
        name=f"on_{name}", data=data, train=Train(epochs=1, validate_every=0), evaluate=evaluate
    )


def trained(data_dir, name):
    "A run on a set, one epoch."
    r = recipe(name)
    run = open_run(
        "", r, verb="train", data=open_data(r.data, 0, data_dir).fingerprint, root=data_dir
    )
    fit_from_recipe(r, run.path, workers=0, data_dir=data_dir)
    return run.path


@pytest.fixture(scope="module")
def on_both(data_dir):
    return trained(data_dir, "both")


@pytest.fixture(scope="module")
def on_north(data_dir):
    return trained(data_dir, "north")


def test_a_joined_set_trains_on_all_and_tests_on_one(data_dir, on_both):
    data = open_data(recipe("both").data, 0, data_dir)
    assert data.n_pids == 16
    batches = list(train_loader(data.train, recipe("both").data))
    assert sorted({int(x) for b in batches for x in b.pids}) == list(range(16))
    state = torch.load(on_both / "checkpoints/last.pt", weights_only=True)["model"]
    heads = [v for k, v in state.items() if v.ndim == 2 and v.shape[0] == 16]
    assert heads, "a classifier of all 16 identities"
    found = evaluate_run(on_both, workers=0, data_dir=data_dir)
    assert found["protocol"]["counts"]["query_pids"] == 6


def test_a_joined_network_is_tested_on_each_part(data_dir, on_both):
    "Features of the same network and photos: the joined test is the north's."
    joint = evaluate_run(on_both, workers=0, data_dir=data_dir)
    alone = evaluate_run(on_both, "north", workers=0, data_dir=data_dir)
    south = evaluate_run(on_both, "south", workers=0, data_dir=data_dir)
    assert joint["metrics"] == alone["metrics"]
    assert south["protocol"]["trained_on"] == alone["protocol"]["trained_on"] == "both"
    assert joint["protocol"]["trained_on"] == ""
    for name in ("both", "north", "south"):
        assert (on_both / "evaluate" / name / "metrics.json").is_file()


def test_what_was_trained_on_is_no_test(data_dir, on_both, on_north, tmp_path):
    north = read_manifest(data_dir / "north")
    asked = north.frame["split"].map({"train": "gallery", "query": "query"})
    frame = north.frame.assign(split=asked).dropna()
    write_manifest(data_dir / "thief", "thief", frame, north.root)
    for run in (on_both, on_north):
        with pytest.raises(ValueError, match=r"the test of thief holds .* photos"):
            evaluate_run(run, "thief", workers=0, data_dir=data_dir)
        assert not (run / "evaluate/thief").exists()


def test_the_people_of_a_family_are_compared_by_number(data_dir, on_north, tmp_path):
    "The same people cut anew, from other files: north is mended from what it is."
    north = read_manifest(data_dir / "north")
    rows = write_synthetic(data_dir / "photos/again", seed=5, **SIZE)
    rows["split"] = rows["split"].replace({"train": "gallery"})
    more = {"mended_from": {"name": "north", "fingerprint": north.fingerprint}}
    write_manifest(data_dir / "cut", "cut", rows, data_dir / "photos/again", more=more)
    with pytest.raises(ValueError, match="8 identities of north"):
        evaluate_run(on_north, "cut", workers=0, data_dir=data_dir)


def test_a_run_is_tested_where_its_training_set_is_not(data_dir, on_north, tmp_path):
    (tmp_path / "south").mkdir()
    south = read_manifest(data_dir / "south")
    write_manifest(tmp_path / "south", "south", south.frame, south.root)
    write_manifest(
        tmp_path / "both",
        "both",
        south.frame,
        south.root,
        more={"parts": [{"name": "north", "family": "north", "pid_offset": 0}]},
    )
    found = evaluate_run(on_north, "south", workers=0, data_dir=tmp_path)
    assert found["protocol"]["trained_on"] == "north"
    with pytest.raises(FileNotFoundError, match="may hold the same people"):
        evaluate_run(on_north, "both", workers=0, data_dir=tmp_path)


def tracks_of(manifest):
    "Photos of a person by a camera are a track, a number each; −1 elsewhere."
    gallery = manifest.frame["split"] == "gallery"
    numbers = manifest.frame[gallery].groupby(["pid", "camid"]).ngroup()
    return manifest.frame.assign(track=numbers).fillna({"track": -1}).astype({"track": int})


def directly(p, rules, feats, labels, tracks):
    "A protocol's own function, from a distance matrix."
    dist = distances(*(l2_normalise(x) for x in feats))
    if p.rule == "single_shot":
        draw = "gallery" if p.dataset == "Partial-REID" else "query"
        return evaluate_single_shot(dist, *sides(*labels), GalleryDraws(p.repeats, draw=draw))
    if rules.rerank.name == "k_reciprocal":
        stays = labels[1] != -1
        unit = [l2_normalise(feats[0]), l2_normalise(feats[1][stays])]
        dist[:, stays] = rerank(*unit, **rules.rerank.options)
    return (
        evaluate_tracks(dist, *sides(*labels, tracks))
        if p.rule == "tracks"
        else evaluate_rank(dist, *labels)
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_is_ranked_by_its_protocol(name):
    gen = np.random.default_rng(NAMES.index(name))
    who, camera = (x.ravel() for x in np.mgrid[:20, :3])
    tracks = np.repeat(np.arange(60), 3)
    labels = [np.arange(20), who[tracks], np.zeros(20, int), camera[tracks]]
    labels[1][:6], labels[3][:6] = -1, 0  # the first two tracks are junk
    labels[3][3:6] = 1
    people = gen.normal(size=(20, 8))
    feats = [np.float32(people[pids] + gen.normal(size=(len(pids), 8))) for pids in labels[:2]]
    paths = [np.array([str(i) for i in range(len(x))]) for x in feats]
    p, given = protocols()[name], tracks if protocols()[name].rule == "tracks" else None
    for rules in (Evaluate(), Evaluate(rerank={"k_reciprocal": {"k1": 6, "k2": 3}})):
        if rules.rerank.name != "none" and p.rule == "single_shot":
            continue
        kept = Embeddings(*feats, *labels, *paths)
        found = rank_by_protocol(kept, ranking_rules(rules), name, given)
        truth = directly(p, rules, feats, labels, tracks)
        assert found.mAP == pytest.approx(truth.mAP, abs=1e-6)
        np.testing.assert_allclose(found.cmc, truth.cmc, atol=1e-6)


@pytest.mark.parametrize("name", ["veri776", "veri776_track", "partial_reid_single_shot"])
def test_evaluation_follows_the_manifest(data_dir, on_north, name):
    south = read_manifest(data_dir / "south")
    write_manifest(data_dir / name, name, tracks_of(south), south.root, protocol=name)
    found = evaluate_run(on_north, name, {"evaluate.baselines": True}, workers=0, data_dir=data_dir)
    kept = load_embeddings(on_north / "evaluate" / name / "embeddings.npz")
    manifest = read_manifest(data_dir / name)
    gallery = manifest.frame[manifest.frame["split"] == "gallery"]
    tracks = gallery["track"].to_numpy()
    p = manifest_protocol(manifest)[0]
    truth = directly(p, Evaluate(), kept[:2], kept[2:6], tracks)
    for key, value in truth.summary().items():
        assert found["metrics"][key] == pytest.approx(value, abs=1e-6), key
    assert found["protocol"]["protocol"] == name
    assert set(found["baselines"]) == set(BASELINES)
    assert all(set(b) == set(truth.summary()) for b in found["baselines"].values())
    query, shown, lists = ranking_of(on_north, name, data_dir=data_dir)
    first = lists.top[0, 0]
    assert len(query.pids) == len(lists.ap) and first < len(shown.pids)
    assert len(shown.pids) == (len(set(tracks)) if p.rule == "tracks" else len(gallery))


def test_markets_rule_is_the_one_before_to_the_bit(data_dir, on_north):
    found = evaluate_run(on_north, workers=0, data_dir=data_dir)
    kept = load_embeddings(on_north / "evaluate/north/embeddings.npz")
    before = rank_embeddings(kept, ranking_rules(Evaluate(**found["rules"])))
    assert {k: found["metrics"][k] for k in before.summary()} == before.summary()
    (south,) = [read_manifest(data_dir / "south")]
    assert (manifest_protocol(south)[0].name, manifest_protocol(south)[1]) == ("market1501", None)


def test_a_record_from_before_protocols_were_named_still_answers(data_dir, on_north):
    file = on_north / "evaluate/north/metrics.json"
    stored = evaluate_run(on_north, workers=0, data_dir=data_dir)
    old = stored | {"protocol": {k: v for k, v in stored["protocol"].items() if k != "protocol"}}
    file.write_text(json.dumps(old))
    again = evaluate_run(on_north, workers=0, data_dir=data_dir)
    assert again == old and again["protocol"]["times_opened"] == 1


def test_other_tracks_are_another_set(data_dir):
    south = read_manifest(data_dir / "south")
    rows = tracks_of(south)
    one = write_manifest(data_dir / "t1", "t", rows, south.root, protocol="veri776_track")
    two = write_manifest(
        data_dir / "t2",
        "t",
        rows.assign(track=rows["track"] + 1),
        south.root,
        protocol="veri776_track",
    )
    assert len({one.fingerprint, two.fingerprint, south.fingerprint}) == 3


def test_the_page_joins_what_is_prepared(data_dir, tmp_path):
    page, out = project_root() / "data_prep/joined.ipynb", tmp_path / "page.ipynb"
    given = {"name": "paged", "parts": "north+south"}
    done = subprocess.run(
        [sys.executable, "-m", "papermill", page, out]
        + [w for k, v in given.items() for w in ("-p", k, v)],
        env=os.environ | {"REIDLAB_DATA_DIR": str(data_dir)},
        cwd=project_root(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    paged = read_manifest(data_dir / "paged")
    assert paged.fingerprint == read_manifest(data_dir / "both").fingerprint
    assert paged.about["findings"] == []
