"""A file is never its own match: in validation, on links, on tracks, in an index; and where cameras are known nothing moves."""

import hashlib
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from torch import nn

from reidlab.core.recipe import Data, Evaluate, Recipe
from reidlab.data.archives import find_raw
from reidlab.data.joined import shared_people
from reidlab.data.loaders import DataSet, open_test
from reidlab.data.manifest import Photos, hold_out, write_manifest
from reidlab.data.synthetic import plan_shots
from reidlab.evaluation.baselines import rank_baseline
from reidlab.evaluation.breakdown import camera_matrix_features
from reidlab.evaluation.by_protocol import manifest_protocol, rank_by_protocol
from reidlab.evaluation.card import ProtocolCard, protocol_counts
from reidlab.evaluation.embeddings import rank_embeddings
from reidlab.evaluation.evaluate import embed_split
from reidlab.evaluation.lists import rank_lists
from reidlab.evaluation.rules import ranking_rules
from reidlab.retrieval.gallery_draws import GalleryDraws
from reidlab.retrieval.labels import Labels
from reidlab.retrieval.metrics import evaluate_rank
from reidlab.retrieval.multi_query import pool_queries
from reidlab.retrieval.rank import rank
from reidlab.retrieval.rules import PLAIN, Rules


def slow_map(dist, query, gallery, names):
    "mAP of a matrix, read aloud; query, gallery: (pid, camid, path) rows; names: path → file."
    found = []
    for row, (pid, camid, path) in zip(dist, query, strict=True):
        listed = [
            g
            for g in np.argsort(row, kind="stable")
            if gallery[g][0] != -1
            and not (gallery[g][0] == pid and camid != -1 and gallery[g][1] == camid)
            and names.get(gallery[g][2], gallery[g][2]) != names.get(path, path)
        ]
        good = [i for i, g in enumerate(listed) if gallery[g][0] == pid]
        if good:
            found.append(np.mean([(n + 1) / (i + 1) for n, i in enumerate(good)]))
    return float(np.mean(found))


def rows_of(photos):
    return list(zip(photos.pids.tolist(), photos.camids.tolist(), photos.paths, strict=True))


@pytest.mark.parametrize("cameras", ["none", "some", "all"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_validation_query_never_finds_its_own_file(cameras, seed):
    "Half the people have one photo; noise for features, so that only a photo's own copy is near it."
    pids = np.repeat(np.arange(30), [1 if i % 2 else 4 for i in range(30)])
    known = np.random.default_rng(seed).integers(0, 3, len(pids))
    share = {"none": 0.0, "some": 0.5, "all": 1.0}[cameras]
    camids = np.where(np.random.default_rng(9).random(len(pids)) < share, known, -1)
    train = Photos(Path("."), [f"{i}.jpg" for i in range(len(pids))], pids, camids)
    _, q, g = hold_out(train, 0.5, seed)
    both = set(q.paths) & set(g.paths)
    assert all(train.camids[train.paths.index(p)] >= 0 for p in both)
    feats = {p: np.random.default_rng(i).normal(size=8) for i, p in enumerate(train.paths)}
    sides = [np.stack([feats[p] for p in s.paths]) for s in (q, g)]
    dist = ((sides[0][:, None] - sides[1]) ** 2).sum(-1)
    seen = evaluate_rank(dist, q.pids, g.pids, q.camids, g.camids)
    assert seen.mAP == pytest.approx(slow_map(dist, rows_of(q), rows_of(g), {}))
    assert protocol_counts(q.pids, g.pids, q.camids, g.camids).get("lone_without_camera", 0) == sum(
        c == -1 and (train.pids[train.camids == -1] == p).sum() == 1
        for p, c in zip(g.pids, g.camids, strict=True)
    )


def digest(*sides):
    "The rows of some photos, in order, as sixteen digits."
    rows = "\n".join("\t".join(map(str, row)) for side in sides for row in rows_of(side))
    return hashlib.sha256(rows.encode()).hexdigest()[:16]


ROWS = {  # of query and gallery, computed by the code that made the committed records
    ("synthetic", 0): "ba1a5344392f809c",
    ("synthetic", 1): "4d22297ba6c49362",
    ("synthetic", 2): "d3fad3bc53539efe",
    ("vehicles8", 0): "110ee264d8d157f6",
    ("vehicles8", 1): "938ccd15e323814b",
    ("vehicles8", 2): "3f32e5cae835aff6",
}


def synthetic_train():
    "Training rows of smoke, first_look and the other recipes on synthetic people, in manifest order."
    shots = sorted(
        (s.pid, s.camid, s.path) for s in plan_shots(60, 30, 6, 4, 0, 60, 40) if s.split == "train"
    )
    return Photos(Path("."), [s[2] for s in shots], *np.array([s[:2] for s in shots]).T)


def vehicles8_train():
    "Training rows of vehicles8, in manifest order."
    try:
        archive = find_raw("vehicles8")
    except FileNotFoundError as missing:
        pytest.skip(f"vehicles8 is not on this machine: {missing}")
    if archive.is_dir():
        archive = next(archive.glob("*.zip"))
    with zipfile.ZipFile(archive) as box:
        found = [re.search(r"bounding_box_train/(\d+)_c(\d)\w*\.\w+$", n) for n in box.namelist()]
    rows = sorted((int(f[1]), int(f[2]) - 1, f[0]) for f in found if f)
    return Photos(Path("."), [r[2] for r in rows], *np.array([r[:2] for r in rows]).T)


@pytest.mark.parametrize(("name", "seed"), ROWS)
def test_validation_rows_of_the_committed_recipes_stay(name, seed):
    train = synthetic_train() if name == "synthetic" else vehicles8_train()
    _, query, gallery = hold_out(train, 0.1, seed)
    assert digest(query, gallery) == ROWS[name, seed]


def test_vehicles8_is_mostly_lone_photos_and_every_one_still_asks():
    train = vehicles8_train()
    groups = pd.Series(train.paths).groupby([train.pids, train.camids]).size()
    assert (len(groups), (groups == 1).sum()) == (2584, 2240)
    _, query, gallery = hold_out(train, 0.1, 0)
    held = groups[np.isin(groups.index.get_level_values(0), np.unique(query.pids))]
    assert len(query.paths) == len(held)
    assert len(set(query.paths) & set(gallery.paths)) == (held == 1).sum() > 100


class Bytes(nn.Module):
    "Noise that only the photo decides: equal for equal pictures."

    def forward(self, images):
        weights = np.random.default_rng(0).normal(size=(images[0].numel(), 6)).astype("float32")
        return images.flatten(1) @ images.new_tensor(weights)


def linked_set(folder, camids=(-1, -1, -1, -1, -1, -1, -1, -1), **more):
    "Two people to find; the first query is in the gallery by a symbolic link, the third by a hard one."
    from PIL import Image

    root = folder / "photos"
    root.mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    (root / "again 0.png").symlink_to("0.png")
    os.link(root / "2.png", root / "2, too.png")
    rows = [
        *[("0.png", 5, "query", 0), ("1.png", 5, "gallery", 1), ("again 0.png", 5, "gallery", 0)],
        *[("2.png", 6, "query", 2), ("3.png", 6, "gallery", 3), ("2, too.png", 6, "gallery", 2)],
        *[("4.png", 7, "gallery", 4), ("5.png", 5, "query", 5), ("6.png", -1, "gallery", 6)],
        *[("7.png", 9, "train", 7)],
    ]
    frame = pd.DataFrame(
        [(p, pid, camids[c], split) for p, pid, split, c in rows],
        columns=["path", "pid", "camid", "split"],
    )
    names = {"again 0.png": "0.png", "2, too.png": "2.png"}
    return write_manifest(folder / "own", "own", frame.assign(**more), root), names


def embedded(folder, manifest, **rules):
    "Embeddings of its test, and the recipe."
    small = Data(name="own", height=32, width=16)
    recipe = Recipe(name="own", data=small, evaluate=Evaluate(**rules))
    data = open_test(recipe.data, folder)
    return embed_split(Bytes(), recipe, data, "test"), recipe, data


@pytest.mark.parametrize(
    "camids", [(-1,) * 8, (3, 4, -1, -1, 2, 4, 0, 0), (1, 2, 1, 2, 0, 0, 0, 0)]
)
def test_a_linked_file_is_never_its_own_match(tmp_path, camids):
    manifest, names = linked_set(tmp_path, camids)
    embeddings, recipe, data = embedded(tmp_path, manifest)
    q, g = rows_of(data.query), rows_of(data.gallery)
    feats = [f / np.linalg.norm(f, axis=1, keepdims=True) for f in embeddings[:2]]
    dist = ((feats[0][:, None].astype(float) - feats[1]) ** 2).sum(-1)
    want = slow_map(dist, q, g, names)
    found = rank_embeddings(embeddings)
    assert found.mAP == pytest.approx(want)
    assert found.camids.tolist() == data.query.camids.tolist(), "shown as they were given"
    for i, (_, _, path) in enumerate(q):
        listed = [names.get(g[at][2], g[at][2]) for at in found.top[i] if at >= 0]
        assert path not in listed
    by_recipe = rank_by_protocol(embeddings, ranking_rules(recipe.evaluate))
    assert by_recipe.mAP == pytest.approx(want)
    colours = rank_baseline("histogram", data.query, data.gallery)
    assert all(
        names.get(g[at][2]) != q[i][2] for i in range(len(q)) for at in colours.top[i] if at >= 0
    )


def test_one_draw_per_person_and_pairs_of_cameras_keep_the_own_file_out(tmp_path):
    manifest, _ = linked_set(tmp_path)
    embeddings, _, data = embedded(tmp_path, manifest)
    twenty = Rules(draws=GalleryDraws(repeats=20))
    once = rank(*embeddings[:2], *embeddings.labels, rules=twenty)
    by_pairs = camera_matrix_features(*embeddings[:2], *embeddings.labels)
    assert list(by_pairs.mAP.index) == list(by_pairs.mAP.columns) == ["unknown"]
    assert by_pairs.R1.to_numpy()[0, 0] == rank_embeddings(embeddings, PLAIN).rank(1)
    q, g = data.query.paths.index("0.png"), {p: i for i, p in enumerate(data.gallery.paths)}
    far = np.linalg.norm(embeddings[1] - embeddings[0][q], axis=1)
    nearer = {p: int(far[g[p]] < far[g["1.png"]]) for p in ("4.png", "3.png", "2, too.png")}
    drawn = {nearer["4.png"] + nearer[p] for p in ("3.png", "2, too.png")}  # one photo of person 6
    assert set(once.ranks[q].tolist()) == drawn and 0 not in drawn


def test_a_track_that_holds_the_query_is_left_out(tmp_path):
    tracks = [-1, 0, 1, -1, 2, 3, 4, -1, 5, -1]
    manifest, _ = linked_set(tmp_path, track=tracks)
    more = {"protocol": "veri776_track"}
    manifest = write_manifest(tmp_path / "own", "own", manifest.frame, manifest.root, **more)
    embeddings, recipe, data = embedded(tmp_path, manifest)
    protocol = manifest_protocol(data.manifest)
    _, shown, found = rank_lists(embeddings, ranking_rules(recipe.evaluate), data, protocol)
    listed = {
        data.query.paths[q]: [shown.paths[t] for t in found.top[q] if t >= 0]
        for q in range(len(data.query.paths))
    }
    assert "again 0.png" not in listed["0.png"] and "1.png" in listed["0.png"]
    assert "again 0.png" in listed["5.png"], "to another photo of the person it is a find"
    assert "2, too.png" not in listed["2.png"] and "3.png" in listed["2.png"]


def test_the_card_says_what_was_kept_apart(tmp_path):
    manifest, _ = linked_set(tmp_path)
    embeddings = embedded(tmp_path, manifest)[0]
    counts = protocol_counts(*embeddings[2:6])
    assert (counts["queries_in_gallery"], counts["lone_without_camera"]) == (2, 1)
    shown = repr(ProtocolCard("own", "test", counts=counts))
    assert "2 queries_in_gallery" in shown and "1 lone_without_camera" in shown
    known = protocol_counts(*(np.array(x) for x in ([1, 2], [1, 2], [0, 1], [1, 0])))
    assert not {"queries_in_gallery", "lone_without_camera"} & set(known)


def test_one_file_with_two_cameras_is_refused(tmp_path):
    manifest, _ = linked_set(tmp_path)
    frame = manifest.frame.assign(camid=range(len(manifest.frame)))
    write_manifest(tmp_path / "own", "own", frame, manifest.root)
    with pytest.raises(ValueError, match="are one file, with cameras"):
        embedded(tmp_path, manifest)


def test_pooled_queries_need_cameras():
    feats, who = np.eye(3), np.ones(3, int)
    with pytest.raises(ValueError, match="1 of 2 queries have no camera"):
        pool_queries(Labels([1, 1], [0, -1]), feats, Labels(who, [0, -1, -1]))


def test_validation_of_a_joined_set_keeps_every_rule(tmp_path):
    "Cameras of one part, none of the other: as after a join."
    pids, camids = np.repeat(np.arange(8), 3), np.repeat([0, 1, 2, -1], 6)
    camids[:12] = np.tile([0, 1, 2], 4)
    train = Photos(tmp_path, [f"{i}.jpg" for i in range(24)], pids, camids)
    data = DataSet(None, *hold_out(train, 0.75, 3))
    both = set(data.val_query.paths) & set(data.val_gallery.paths)
    assert both and all(camids[int(p[:-4])] >= 0 for p in both)


def test_a_link_from_training_into_the_test_is_seen(tmp_path):
    "Two sets, one of which was filled with links to the other's photos."
    manifest, _ = linked_set(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    for name, place in (("a.png", "1.png"), ("b.png", "3.png")):
        (other / name).symlink_to(manifest.root / place)
    frame = pd.DataFrame(
        {"path": ["a.png", "b.png"], "pid": [50, 51], "camid": 0, "split": "train"}
    )
    source = write_manifest(tmp_path / "source", "source", frame, other)
    assert shared_people(source, manifest) == ["2 photos, first: 1.png"]
