"The same habits in other readers: classes' folders, manifests edited by hand, distractors, layouts."

import pandas as pd
import pytest
from PIL import Image

from reidlab.data.classes import class_folders, folder_rows
from reidlab.data.doctor import examine_labels
from reidlab.data.layouts import append_gallery
from reidlab.data.manifest import read_manifest, tree_rows, write_manifest
from reidlab.data.repair import fix


def photos(folder, names):
    "A small photo under each name."
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 16), (9 * i % 256, 7 * i % 256, 90)).save(folder / name)
    return folder


# --- folders of classes ----------------------------------------------------------------------


@pytest.mark.parametrize("splits", [("Train", "VAL"), ("TRAIN", "Test"), ("train", "Val", "test")])
@pytest.mark.parametrize("above", ["", "Pets/"])
def test_splits_of_classes_in_any_case(tmp_path, splits, above):
    names = [f"{above}{s}/{c}/{i}.png" for s in splits for c in ("cat", "dog") for i in (0, 1)]
    frame, classes = folder_rows(*class_folders(photos(tmp_path / "own", names)))
    assert classes == ["cat", "dog"] and len(frame) == len(names)
    assert {"train", "test"} <= set(frame["split"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train/a/0.png", "valid/a/0.png"), "'valid' is no split here.*Rename it"),
        (("train/a/0.png", "Validation/a/0.png", "test/a/0.png"), "'Validation' is no split here"),
        (("train/a/0.png", "Train/a/0.png", "val/a/0.png"), "a split twice"),
        (("train/Cat/0.png", "train/cat/0.png", "val/cat/0.png"), "'Cat' and 'cat'"),
        (("train/Cat/0.png", "val/cat/0.png"), "'Cat' and 'cat'"),
        (("train/001/0.png", "train/1/0.png", "val/1/0.png"), "'001' and '1'"),
        (("train/Zo\u00e9/0.png", "val/Zoe\u0301/0.png"), "form of an accent"),
    ],
)
def test_classes_that_are_one_or_a_split(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        folder_rows(*class_folders(photos(tmp_path / "own", names)))


# --- a manifest that somebody edited ---------------------------------------------------------

ROWS = [("1a.png", 1, 0, "train"), ("1b.png", 1, 1, "train"), ("2a.png", 2, 0, "query")]
ROWS += [("2b.png", 2, 1, "gallery"), ("j.png", -1, 0, "gallery")]


def prepared(folder):
    "A set of five photos."
    frame = pd.DataFrame(ROWS, columns=["path", "pid", "camid", "split"])
    root = photos(folder / "photos", frame["path"])
    return write_manifest(folder, "mine", frame, root)


@pytest.mark.parametrize(
    "how",
    [
        lambda f: f.astype({"pid": float}),
        lambda f: f.astype({"camid": float}),
        lambda f: f.assign(identity=["007", "007", "nan", "nan", "NA"]),
    ],
)
def test_a_manifest_through_pandas_says_the_same(tmp_path, how):
    made = prepared(tmp_path)
    how(made.frame).to_csv(tmp_path / "manifest.csv", index=False)
    found = read_manifest(tmp_path).frame
    pd.testing.assert_frame_equal(found[made.frame.columns], made.frame)
    if "identity" in found:
        assert found["identity"].tolist() == how(made.frame)["identity"].tolist()


def test_a_manifest_through_a_spreadsheet_says_the_same(tmp_path):
    made = prepared(tmp_path)
    text = (tmp_path / "manifest.csv").read_text().replace(",", ";").replace("\n", "\r\n")
    (tmp_path / "manifest.csv").write_bytes(b"\xef\xbb\xbf" + text.encode() + b";;;\r\n")
    pd.testing.assert_frame_equal(read_manifest(tmp_path).frame, made.frame)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("2a.png,2,0", "2a.png,,0", r"manifest\.csv is no manifest .pid is '' in line 4"),
        ("2a.png,2,0", "2a.png,NA,0", r"pid is 'NA' in line 4"),
        ("2a.png,2,0", "2a.png,2.5,0", r"pid is '2\.5' in line 4"),
        ("2a.png,2,0", "2a.png,2,", r"camid is '' in line 4"),
        ("2a.png,2,0", "2a.png,two,0", r"pid is 'two' in line 4"),
        ("2a.png,2,0", "2a.png,2", r"line 4 has 3 cells"),
        ("0,query", "0,Query", r"split 'Query' not found"),
        ("0,query", "0,", r"split '' not found"),
    ],
)
def test_a_manifest_with_a_slip_is_refused_with_its_line(tmp_path, old, new, message):
    prepared(tmp_path)
    file = tmp_path / "manifest.csv"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path)


# --- distractors, cameras --------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1])
def test_distractors_are_nobody_who_is_trained_on(tmp_path, first):
    names = [f"{s}/{p}_c{c}.png" for s, p in (("train", 0), ("train", 1)) for c in (1, 2)]
    names += [f"{s}/2_c{c}.png" for s, c in (("query", 1), ("gallery", 2))]
    top = photos(tmp_path / "set", names)
    frame = tree_rows(
        top, {s: s for s in ("train", "query", "gallery")}, r"(?P<pid>\d+)_c(?P<cam>\d)"
    )[0]
    frame["pid"] += first
    base = write_manifest(tmp_path / "base", "base", frame, top)
    more = photos(tmp_path / "more", [f"{i}.png" for i in range(3, 6)])
    large = write_manifest(tmp_path / "large", "large", *append_gallery(base, more))
    added = large.frame[large.frame["path"].str.startswith("more/")]
    assert not set(added["pid"]) & set(frame["pid"])
    assert added["pid"].unique().tolist() == [3 if first == 0 else 0]  # 0 where it is free
    mended = fix(large, examine_labels(large), tmp_path / "mended")
    assert mended.photos("train").paths == large.photos("train").paths


def test_a_camera_below_the_first_is_not_unknown(tmp_path):
    top = photos(tmp_path / "set", ["train/7_c0.png", "train/7_c1.png"])
    with pytest.raises(
        ValueError, match=r"train/7_c0.png is of camera 0, and cameras count from 1"
    ):
        tree_rows(top, {"train": "train"}, r"(?P<pid>\d+)_c(?P<cam>\d)")
    assert (
        tree_rows(top, {"train": "train"}, r"(?P<pid>\d+)_c(?P<cam>\d)", 0)[0]["camid"].min() == 0
    )
