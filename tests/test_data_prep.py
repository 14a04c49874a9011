"""The pages of data_prep, each on a miniature of its set with the traps that the real one has."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, facts, walk
from PIL import Image
from test_bad_input import empty, refused

from reidlab.core.identity import same_data
from reidlab.core.run import read_json
from reidlab.core.settings import settings
from reidlab.data.archives import DOWNLOADS
from reidlab.data.manifest import load_manifest, read_manifest
from reidlab.evaluation.evaluate_run import evaluate_run
from reidlab.evaluation.lists import ranking_of
from reidlab.evaluation.protocols import find_protocol, protocols

ROOT = Path(__file__).parents[1]


def page(name):
    return f"data_prep/{name}.ipynb"


def grow(root, files):
    "A tree: photos of different sizes in bytes, and text where the value is text."
    for i, (path, content) in enumerate(
        files.items() if isinstance(files, dict) else zip(files, files, strict=True)
    ):
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.suffix in (".jpg", ".png", ".JPG"):
            Image.new("RGB", (16 + i, 32), (20 * i % 255, 90, 120)).save(place, "PNG")
        else:
            place.write_text(content)
    return root


def rows(manifest):
    "path: (pid, camid, split)"
    return {r.path: (r.pid, r.camid, r.split) for r in manifest.frame.itertuples()}


def prepared(name, protocol, expected):
    "The manifest of a set, which must hold these rows and name this protocol."
    manifest = load_manifest(name)
    assert rows(manifest) == expected
    about = read_json(settings().data_dir / name / "manifest.json")
    assert about["protocol"] == protocol and find_protocol(protocol).name == protocol
    assert {"name", "version", "counts", "fingerprint", "findings"} <= set(about)
    return manifest


# --- Market-1501's layout --------------------------------------------------------------------

DUKE = {
    "bounding_box_train/0001_c2_f0046302.jpg": (1, 1, "train"),
    "bounding_box_train/0001_c8_f0046985.jpg": (1, 7, "train"),
    "query/0005_c2_f0046985.jpg": (5, 1, "query"),
    "bounding_box_test/0005_c1_f0051341.jpg": (5, 0, "gallery"),
    "bounding_box_test/4096_c1_f0051341.jpg": (4096, 0, "gallery"),  # only the gallery knows it
}


def test_duke_from_an_archive_inside_a_folder(lab):
    tree = grow(lab.root / "tree" / "DukeMTMC-reID", DUKE)
    (tree / "bounding_box_test" / "notes_c1.jpg").write_bytes(b"named by nobody's rule")
    with zipfile.ZipFile(lab.raw / "dukemtmc.zip", "w") as box:
        for file in sorted(p for p in tree.rglob("*") if p.is_file()):
            box.write(file, file.relative_to(tree.parent).as_posix())
    before = facts(lab.raw)
    names = walk(page("dukemtmc"))
    assert facts(lab.raw) == before
    manifest = prepared("dukemtmc", "dukemtmc", DUKE)
    assert names["made"].odd == ["bounding_box_test/notes_c1.jpg"]
    assert manifest.about["counts"]["train photos"] == {"ours": 2, "published": 16522}
    assert {f.count for f in names["made"].findings} >= {"train", "queries", "gallery", "cameras"}


def test_counts_that_differ_are_flagged_and_strict_writes_nothing(lab):
    grow(lab.raw / "dukemtmc", DUKE)
    with refused("counts differ", "first: dukemtmc: queries is 1, published 2,228", "strict"):
        walk(page("dukemtmc"), strict=True)
    assert not list(lab.data.rglob("manifest.*"))
    names = walk(page("dukemtmc"))
    assert "DIFFERS" in names["made"].counts()["verdict"].tolist()
    line = names["made"].closing()
    assert "**dukemtmc: queries is 1, published 2,228." in line


CUHK = {
    "detected/bounding_box_train/0001_c1_1.png": (1, 0, "train"),
    "detected/bounding_box_train/0001_c2_6.png": (1, 1, "train"),
    "detected/query/0022_c1_3.png": (22, 0, "query"),
    "detected/bounding_box_test/0022_c2_8.png": (22, 1, "gallery"),
}


def test_cuhk03_np_has_two_kinds_of_boxes(lab):
    tree = grow(lab.raw / "cuhk03_np" / "cuhk03-np", CUHK)
    grow(tree, [p.replace("detected", "labeled") for p in CUHK])
    walk(page("cuhk03np"))
    walk(page("cuhk03np"), boxes="labeled")
    for boxes in ("detected", "labeled"):
        expected = {p.removeprefix("detected/"): row for p, row in CUHK.items()}
        manifest = prepared(f"cuhk03_np_{boxes}", f"cuhk03_np_{boxes}", expected)
        assert manifest.root.name == boxes and manifest.about["version"] == boxes


def test_cuhk03_in_matlab_is_refused(lab):
    (lab.raw / "cuhk03_np").mkdir()
    mat = lab.raw / "cuhk03_np" / "cuhk-03.mat"
    mat.write_bytes(b"MATLAB 7.3 MAT-file")
    for source in ("", str(mat), str(mat.parent)):
        with refused("cuhk-03.mat is CUHK03's original file", "new-protocol release", "-p source"):
            walk(page("cuhk03np"), source=source)
    assert empty(lab.data)


# --- lists -----------------------------------------------------------------------------------

MSMT = {  # camera: the third field, from 1; person 0 is a person
    "train/0000/0000_000_01_0303morning_0008_0_ex.jpg": (0, 0, "train"),
    "train/0000/0000_001_15_0303noon_0008_1.jpg": (0, 14, "train"),
    "train/0001/0001_002_03_0303noon_0009_1.jpg": (1, 2, "train"),  # from list_val
    "test/0000/0000_000_05_0303morning_0020_0.jpg": (0, 4, "query"),
    "test/0000/0000_001_06_0303morning_0021_0.jpg": (0, 5, "gallery"),
    "test/0001/0001_001_07_0303morning_0022_0.jpg": (1, 6, "gallery"),
}
MSMT_LISTS = {"list_train": [0, 1], "list_val": [2], "list_query": [3], "list_gallery": [4, 5]}


def msmt(root, version):
    "MSMT17 with a photo that no list names, under the folder names of a version."
    homes = {"V1": ("train", "test"), "V2": ("mask_train_v2", "mask_test_v2")}[version]
    paths = list(MSMT)
    moved = [
        p.replace("train/", homes[0] + "/", 1).replace("test/", homes[1] + "/", 1) for p in paths
    ]
    grow(root, [*moved, f"{homes[0]}/0002/0002_000_01_0303morning_0008_0.jpg"])
    for name, index in MSMT_LISTS.items():
        lines = [
            f"{paths[i].split('/', 1)[1]} {paths[i].split('/')[1].lstrip('0') or 0}" for i in index
        ]
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return dict(zip(moved, MSMT.values(), strict=True))


@pytest.mark.parametrize("version", ["V1", "V2"])
def test_msmt17_is_told_apart_by_its_folders(version, lab):
    expected = msmt(lab.raw / "msmt17" / f"MSMT17_{version}", version)
    walk(page("msmt17"))
    manifest = prepared("msmt17", f"msmt17_{version.lower()}", expected)
    assert manifest.about["version"] == f"MSMT17_{version}"
    assert manifest.about["counts"]["train photos"]["published"] == 32621
    walk(page("msmt17"), join_val="False")
    alone = load_manifest("msmt17")
    assert len(alone.photos("train").paths) == 2 and "list_train alone" in alone.about["version"]
    assert alone.about["counts"]["train photos"]["published"] == 30248


def test_msmt17_whose_train_list_has_the_validation_photos_too(lab):
    root = lab.raw / "msmt17" / "MSMT17_V1"
    msmt(root, "V1")
    with (root / "list_train.txt").open("a") as file:
        file.write((root / "list_val.txt").read_text())
    with refused("1 of 1 photos of list_val.txt stand in list_train.txt", "-p join_val False"):
        walk(page("msmt17"))
    walk(page("msmt17"), join_val=False)
    assert len(load_manifest("msmt17").photos("train").paths) == 3


def test_msmt17_in_both_versions_asks_which(lab):
    for version in ("V1", "V2"):
        msmt(lab.raw / "msmt17" / f"MSMT17_{version}", version)
    with refused("holds MSMT17_V1 and MSMT17_V2", "-p version"):
        walk(page("msmt17"))
    walk(page("msmt17"), version="MSMT17_V1")
    assert load_manifest("msmt17").about["protocol"] == "msmt17_v1"


@pytest.mark.parametrize(
    "file, text, words",
    [
        ("list_val.txt", None, ("is nearest and lacks list_val.txt", "-p source")),
        ("list_query.txt", " \n", ("list_query.txt is empty", "whole?")),
        ("list_query.txt", "../0000_000_05_a_0_0.jpg 0", ("list_query.txt", "no path inside")),
        ("list_query.txt", "/0000/0000_000_05_a.jpg 0", ("list_query.txt", "no path inside")),
        ("list_query.txt", "0000/0000_000_05_a.jpg 0", ("0000_000_05_a.jpg", "is not in")),
        (
            "list_query.txt",
            "0000/0000_000_05_a.jpg 7",
            ("1 lines", "not the label's", "list_query"),
        ),
        (
            "list_query.txt",
            "0000/picture.jpg 0",
            ("1 lines", "no identity and camera", "picture.jpg"),
        ),
        (
            "list_query.txt",
            "0000/0000_000_00_a.jpg 0",
            ("0000_000_00_a.jpg is of camera 00", "cameras count from 1"),
        ),
        (
            "list_query.txt",
            "0000/0000_000_05_a.jpg 0",
            ("list_query.txt names 'mask_test_v2/0000/0000_000_05_a.jpg'",),
        ),
        (
            "list_query.txt",
            f"0000/{'9' * 30}_000_05_a.jpg {'9' * 30}",
            ("1 lines", "no identity and camera"),
        ),
    ],
)
def test_msmt17_with_a_bad_list(file, text, words, lab):
    root = lab.raw / "msmt17"
    msmt(root, "V2")
    (root / file).unlink() if text is None else (root / file).write_text(text)
    with refused(*words):
        walk(page("msmt17"))
    assert empty(lab.data)


VERI = {
    "image_train/0001_c001_00016450_0.jpg": (1, 0, "train"),
    "image_train/0001_c020_00016455_0.jpg": (1, 19, "train"),
    "image_query/0002_c002_00030600_0.jpg": (2, 1, "query"),
    "image_test/0002_c002_00030600_0.jpg": (2, 1, "gallery"),  # the query once more
    "image_test/0002_c003_00030605_0.jpg": (2, 2, "gallery"),
    "image_test/0002_c003_00030610_0.jpg": (2, 2, "gallery"),
    "image_test/0005_c004_00030610_0.jpg": (5, 3, "gallery"),
}


def veri(root):
    "VeRi-776 with a photo that its list does not name."
    grow(root, [*VERI, "image_train/0001_c005_00016499_0.jpg"])
    for split in ("train", "query", "test"):
        names = [p.split("/")[1] for p in VERI if p.startswith(f"image_{split}/")]
        (root / f"name_{split}.txt").write_text("\r\n".join(names) + "\r\n")
    g = [p.split("/")[1] for p in VERI if p.startswith("image_test/")]
    (root / "test_track.txt").write_text(f"0002_c002 {g[0]} \n0002_c003 {g[1]} {g[2]}\n")
    return root


def test_veri776_lists_and_tracks(lab):
    veri(lab.raw / "veri776" / "VeRi")
    names = walk(page("veri776"))
    manifest = prepared("veri776", "veri776", VERI)
    assert names["made"].odd == ["image_train/0001_c005_00016499_0.jpg"]
    track = dict(zip(manifest.frame["path"], manifest.frame["track"], strict=True))
    assert [track[p] for p in VERI] == [-1, -1, -1, 0, 1, 1, 2]  # the last is on no line
    walk(page("veri776"), protocol="veri776_track")
    again = prepared("veri776", "veri776_track", VERI)
    assert again.fingerprint == manifest.fingerprint


def test_veri776_with_bad_lists(lab):
    root = veri(lab.raw / "veri776")
    (root / "image_test" / "0005_c004_00030610_0.jpg").unlink()
    with refused("1 of 7 listed photos are not there", "image_test/0005_c004_00030610_0.jpg"):
        walk(page("veri776"))
    (root / "name_test.txt").unlink()
    with refused("is nearest and lacks name_test.txt", "name_*.txt"):
        walk(page("veri776"))
    shutil.rmtree(root)
    (veri(root) / "test_track.txt").unlink()
    with refused("test_track.txt is not in veri776", "veri776_track needs it"):
        walk(page("veri776"), protocol="veri776_track")
    assert empty(lab.data)
    walk(page("veri776"))
    assert "track" not in load_manifest("veri776").frame


WILD = {
    "images/00001/000001.jpg": (1, 0, "train"),
    "images/00001/000002.jpg": (1, 173, "train"),
    "images/31388/000010.jpg": (31388, 60, "query"),
    "images/31388/000011.jpg": (31388, 61, "gallery"),
    "images/31389/000012.jpg": (31389, 0, "gallery"),
}


def wild(root, n="3000", info="id/image;Camera ID;Time;Model;Type;Color"):
    "VeRI-WILD; its gallery list repeats the query."
    grow(root, WILD)
    (root / "train_test_split").mkdir()
    cut = [p.removeprefix("images/").removesuffix(".jpg") for p in WILD]
    lists = {"train_list": cut[:2], f"test_{n}_query": cut[2:3], f"test_{n}": cut[2:]}
    for name, photos in lists.items():
        (root / "train_test_split" / f"{name}.txt").write_text("\n".join(photos) + "\n")
    told = [
        f"{c};{camid + 1};2018-03-11 08:18:23;a;b;red"
        for c, (_, camid, _) in zip(cut, WILD.values(), strict=True)
    ]
    (root / "train_test_split" / "vehicle_info.txt").write_text("\n".join([info, *told]))
    return root


@pytest.mark.parametrize("size, n", [("small", "3000"), ("medium", "5000"), ("large", "10000")])
def test_veriwild_has_three_sizes(size, n, lab):
    wild(lab.raw / "veriwild", n)
    walk(page("veriwild"), size=size)
    manifest = prepared(f"veriwild_{size}", f"veriwild_{size}", WILD)
    assert manifest.about["counts"]["query photos"]["published"] == int(n)
    other = {"small": "large"}.get(size, "small")
    with refused("test_", "_query.txt is not in train_test_split"):
        walk(page("veriwild"), size=other)
    assert not (lab.data / f"veriwild_{other}").exists()
    (load_manifest(f"veriwild_{size}").root / next(iter(WILD))).unlink()
    with refused("train_list.txt names 'images/", "is the download whole?"):
        walk(page("veriwild"), size=size)


def test_veriwild_with_other_names_and_bad_cameras(lab):
    root = wild(lab.raw / "veriwild")
    lists = root / "train_test_split"
    for name in ("test_3000", "test_3000_query"):  # as some copies call and write them
        text = (lists / f"{name}.txt").read_text().split()
        (lists / f"{name}.txt").unlink()
        renamed = name.replace("test_3000", "test_3000_id")
        (lists / f"{renamed}.txt").write_text("\n".join(f"{t}.jpg {int(t[:5])} 1" for t in text))
    walk(page("veriwild"))
    prepared("veriwild_small", "veriwild_small", WILD)
    (lists / "vehicle_info.txt").write_text("id/image;Camera ID\n00001/000001;1\n")
    with refused("4 listed photos have no camera in vehicle_info.txt", "00001/000002"):
        walk(page("veriwild"), name="again")
    (lists / "vehicle_info.txt").write_text("00001/000001;one\n00001/000002;two\n")
    with refused("gives a camera on 0 of 2 lines"):
        walk(page("veriwild"), name="again")
    assert not (lab.data / "again").exists()


# --- sets that only test ---------------------------------------------------------------------


@pytest.mark.parametrize("probe, gallery", [("Probe", "Gallery"), ("query", "gallery")])
def test_partial_ilids(probe, gallery, lab):
    tail = "" if probe == "Probe" else "_c1_0001"
    expected = {f"{probe}/{i:03}{tail}.jpg": (i, 0, "query") for i in (1, 2)}
    expected |= {f"{gallery}/{i:03}{tail}.jpg": (i, 1, "gallery") for i in (1, 2)}
    grow(lab.raw / "partial_ilids" / "Partial_iLIDS", expected)
    walk(page("partial_ilids"))
    prepared("partial_ilids", "partial_ilids", expected)


def test_partial_reid_asks_with_parts_or_with_hidden_people(lab):
    kinds = {"partial": 0, "whole": 1, "occluded": 0}
    tree = {
        f"{k}_body_images/00{i}_00{i}.jpg": (i, c, "gallery" if c else "query")
        for k, c in kinds.items()
        for i in (1, 2)
    }
    grow(lab.raw / "partial_reid", tree)
    shutil.copytree(lab.raw / "partial_reid", lab.raw / "hidden")
    walk(page("partial_reid"), protocol="partial_reid_single_shot")
    partial = {p: row for p, row in tree.items() if "occluded" not in p}
    prepared("partial_reid", "partial_reid_single_shot", partial)
    with refused("occluded queries make another set"):
        walk(page("partial_reid"), query="occluded")
    walk(page("partial_reid"), query="occluded", name="hidden")
    hidden = prepared(
        "hidden", "partial_reid", {p: r for p, r in tree.items() if "partial" not in p}
    )
    assert all(c["published"] is None for c in hidden.about["counts"].values())


def test_a_set_that_only_tests_is_evaluated_and_not_trained_on(lab, photos, finished):
    whole = read_manifest(next(photos.iterdir()))
    gallery = whole.photos("gallery")
    seen = [np.flatnonzero(gallery.pids == pid)[:2] for pid in np.unique(gallery.pids)]
    for side, pick in (("Probe", 0), ("Gallery", 1)):
        (lab.raw / "partial_ilids" / side).mkdir(parents=True)
        for number, (i, *_) in enumerate(pair[[pick]] for pair in seen if len(pair) == 2):
            place = lab.raw / "partial_ilids" / side / f"{number + 1:03}.jpg"
            shutil.copy(gallery.root / gallery.paths[i], place)
    walk(page("partial_ilids"))
    shutil.copytree(finished[0], lab.runs / "done")
    result = evaluate_run(lab.runs / "done", dataset="partial_ilids")
    counts = result["protocol"]["counts"]
    assert counts["queries"] == counts["gallery"] > 2 and counts["cameras"] == 2
    assert result["protocol"]["queries_without_match"] == 0
    assert len(ranking_of(lab.runs / "done", "partial_ilids")[2].ap) == counts["queries"]
    with refused("'partial_ilids' has no train photos"):
        walk("nbs/train.ipynb", overrides=TINY | {"data.name": "partial_ilids"})


# --- sets made from others -------------------------------------------------------------------


def test_distractors_make_a_new_set_and_leave_the_old(lab):
    walk(
        page("synthetic"),
        name="market1501",
        train_pids=4,
        test_pids=2,
        cameras=2,
        photos_per_camera=2,
        distractors=1,
        junk=1,
    )
    old = load_manifest("market1501")
    grow(lab.raw / "market1501_500k", [f"distractors_500k/{i:08}.jpg" for i in range(3)])
    before = facts(lab.data)
    walk(page("distractors"))
    assert {k: v for k, v in facts(lab.data).items() if k in before} == before
    new = load_manifest("market1501_500k")
    assert len(new.frame) == len(old.frame) + 3 and new.about["protocol"] == "market1501"
    added = new.frame[new.frame["path"].str.contains("distractors_500k")]
    assert added[["pid", "camid", "split"]].drop_duplicates().values.tolist() == [
        [0, -1, "gallery"]
    ]
    for split in ("train", "query"):
        a, b = old.photos(split), new.photos(split)
        assert np.array_equal(a.pids, b.pids) and np.array_equal(a.camids, b.camids)
        assert [(a.root / p).samefile(b.root / q) for p, q in zip(a.paths, b.paths, strict=True)]
    with refused("needs a name of its own"):
        walk(page("distractors"), name="market1501")
    with refused("'nobody' not found", "To prepare it: papermill data_prep/"):
        walk(page("distractors"), base="nobody")


def test_drawn_people_walk_the_same_road(lab):
    few = {
        "train_pids": 5,
        "test_pids": 3,
        "cameras": 2,
        "photos_per_camera": 2,
        "distractors": 2,
        "junk": 1,
    }
    walk(page("synthetic"), seed=3, **few)
    (tree,) = lab.data.glob("synthetic-*")
    drawn, made = load_manifest("drawn"), load_manifest(tree.name)
    assert rows(drawn) == rows(made) and same_data(drawn.fingerprint, made.fingerprint)
    assert all(c["published"] in (None, c["ours"]) for c in drawn.about["counts"].values())
    walk(page("market1501"), name="reread", source=str(tree))
    assert rows(load_manifest("reread")) == rows(drawn)
    with refused("choose another name"):
        walk(page("synthetic"), name="synthetic")


# --- photos of one's own ---------------------------------------------------------------------

OWN = [
    f"{who}/c{cam}_{i}.jpg"
    for who in ("ada", "ben", "cem", "dee")
    for cam in (1, 2)
    for i in (0, 1)
]


def test_own_photos_in_folders(lab):
    grow(lab.raw / "own", OWN)
    walk(page("own"), camera=r"/c(?P<cam>\d)_", seed=5)
    manifest = load_manifest("own")
    frame = manifest.frame
    assert len(frame) == len(OWN) and sorted(set(frame["camid"])) == [1, 2]
    assert frame[["pid", "identity"]].drop_duplicates().sort_values("pid")["identity"].tolist() == [
        "ada",
        "ben",
        "cem",
        "dee",
    ]
    taught = set(frame.loc[frame["split"] == "train", "pid"])
    assert len(taught) == 2 and not taught & set(frame.loc[frame["split"] != "train", "pid"])
    assert manifest.counts()["photos"].to_dict() == {"train": 8, "query": 4, "gallery": 4}
    assert manifest.about["protocol"] == "market1501" and "seed 5" in manifest.about["version"]
    walk(page("own"), seed=5)
    unseen = load_manifest("own")
    assert set(unseen.frame["camid"]) == {-1}
    assert unseen.counts()["photos"].to_dict() == {"train": 8, "query": 2, "gallery": 6}


def test_own_photos_in_lists(lab):
    root = grow(lab.root / "mine", OWN)
    (root / "class_mapping.json").write_text(
        json.dumps({w: [p for p in OWN if p[:3] == w] for w in ("ada", "ben", "cem", "dee")})
    )
    walk(page("own"), name="mapped", source=str(root / "class_mapping.json"))
    walk(page("own"), name="found", source=str(root))
    assert rows(load_manifest("mapped")) == rows(load_manifest("found"))
    (root / "class_mapping.json").unlink()
    split = {"ada": "train", "ben": "train", "cem": "query", "dee": "gallery"}
    lines = [f"{p},{'cem' if p[:3] == 'dee' else p[:3]},{p[5]},{split[p[:3]]}" for p in OWN]
    (root / "photos.csv").write_text("\n".join(["path,pid,camid,split", *lines]))
    walk(page("own"), name="told", source=str(root))
    told = load_manifest("told")
    assert told.counts()["photos"].to_dict() == {"train": 8, "query": 4, "gallery": 4}
    assert told.about["version"] == "splits as given"


@pytest.mark.parametrize(
    "file, text, words",
    [
        ("own.csv", "path,camid\na.jpg,1", ("own.csv lacks the column pid", "path,pid[,camid]")),
        ("own.csv", "path,pid\n../a.jpg,1", ("own.csv, line 2 names '../a.jpg'", "no path inside")),
        ("own.csv", "path,pid,split\na.jpg,1,train\nb.jpg,2,test", ("split", "'test'")),
        ("own.csv", "path,pid,split\na.jpg,1,train\nb.jpg,2,query", ("no photos for gallery",)),
        ("class_mapping.json", '{"1": ["/etc/passwd"]}', ("class_mapping.json", "no path inside")),
        ("class_mapping.json", '{"1": "a.jpg"}', ("a list of paths for each identity",)),
        ("own.csv", "path,pid\na.jpg,1\nc.jpg,1", ("own.csv names 'c.jpg' in line 3", "not in own")),
        ("own.csv", "pid,path\r\n1,a.jpg\r\n1,own/b.jpg\r\n", ("'own/b.jpg' in line 3", "paths start")),
        ("class_mapping.json", '{"1": ["a.jpg"],\n"2": ["d.jpg"]}', ("names 'd.jpg' in line 2",)),
    ],
)  # fmt: skip
def test_own_photos_that_cannot_be_read(file, text, words, lab):
    grow(lab.raw / "own", ["a.jpg", "b.jpg"])
    (lab.raw / "own" / file).write_text(text)
    with refused(*words):
        walk(page("own"))
    assert empty(lab.data)


# --- all of them -----------------------------------------------------------------------------


def test_names_of_others_are_shown_as_they_are(lab):
    "A class called a$b$ is no formula, and a file's name no HTML."
    for split in ("train", "test"):
        grow(lab.raw / "pets" / split, [f"{kind}/0.jpg" for kind in ("a$\\frac$", "b_c^d")])
    names = walk(page("classes"), name="pets")
    drawn = names["contact_sheet"](np.zeros((1, 8, 8, 3), np.uint8), labels=["a$\\frac$"])
    drawn.figure.canvas.draw()
    grow(lab.raw / "dukemtmc", [*DUKE, "query/<b>`x`_[y](z).jpg"])
    names = walk(page("dukemtmc"))
    line = names["made"].closing()
    assert "1 files left out (first: query/&#60;b&#62;" in line and "](" not in line


def test_every_known_name_has_its_page_and_its_protocol():
    for name, download in DOWNLOADS.items():
        assert (ROOT / page(download.page)).is_file(), name
    tested = set(protocols()) - {"cuhk03_single_shot", "cross_domain"}
    renamed = {"msmt17_v1": "msmt17", "msmt17_v2": "msmt17", "veri776_track": "veri776"}
    renamed["partial_reid_single_shot"] = "partial_reid"
    assert {renamed.get(name, name) for name in tested} <= set(DOWNLOADS)


@pytest.mark.parametrize(
    "name",
    [
        "dukemtmc",
        "msmt17",
        "cuhk03np",
        "veri776",
        "veriwild",
        "partial_ilids",
        "partial_reid",
        "own",
    ],
)
def test_nothing_there_and_the_wrong_thing_there(name, lab):
    raw = {"cuhk03np": "cuhk03_np"}.get(name, name)
    with refused(f"'{raw}' is not here", "-p source"):
        walk(page(name))
    (lab.raw / raw / "holiday").mkdir(parents=True)
    words = (
        ("holds no photos",) if name == "own" else ("has no folder with", "Needed is", "-p source")
    )
    with refused(*words):
        walk(page(name))
    assert empty(lab.data)
