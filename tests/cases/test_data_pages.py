"""A broken photo does not stop a data page: the doctor comes first, and what is written is whole."""

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import walk
from PIL import Image
from test_house import JOBS, shown

import reidlab.data.manifest as manifest_chapter
from reidlab.core.run import read_json
from reidlab.data.manifest import Photos, load_manifest, write_manifest
from reidlab.viz.photos import read_thumbs

PAGES = [p for p in JOBS if p.parent.name == "data_prep"]


def photo(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(0, 256, (32, 16, 3), dtype="uint8")
    Image.fromarray(noise).save(path)
    return path


def market(root):
    for pid, folder in (
        (1, "bounding_box_train"),
        (2, "bounding_box_train"),
        (3, "query"),
        (3, "bounding_box_test"),
    ):
        for cam in (1, 2):
            photo(root / folder / f"{pid:04}_c{cam}s1_000001_00.jpg", 10 * pid + cam + len(folder))
    return root / "bounding_box_train" / "0001_c1s1_000001_00.jpg"


def own(root):
    files = [
        photo(root / who / f"{k}.jpg", 10 * i + k) for i, who in enumerate("abcd") for k in range(3)
    ]
    return files[0]


def classes(root):
    files = [
        photo(root / s / k / f"{i}.jpg", 100 * len(s) + 10 * ord(k) + i)
        for s in ("train", "test")
        for k in "ab"
        for i in (0, 1)
    ]
    return files[0]


HARM = {
    "truncated-image": lambda p: p.write_bytes(p.read_bytes()[:700]),
    "empty-file": lambda p: p.write_bytes(b""),
    "unreadable-file": lambda p: p.write_text("<html>404</html>"),
    "oversized-image": lambda p: Image.new("1", (20000, 10000)).save(p, "PNG"),
}


@pytest.mark.parametrize("code", HARM)
@pytest.mark.parametrize(
    "page, build", [("market1501", market), ("own", own), ("classes", classes)]
)
def test_a_broken_photo_is_found_and_the_page_ends(page, build, code, lab):
    broken = build(lab.raw / "x")
    HARM[code](broken)
    walk(f"data_prep/{page}.ipynb", name="x", source=str(lab.raw / "x"))
    about = read_json(lab.data / "x" / "manifest.json")
    found = {f["code"]: f["paths"] for f in about["findings"]}
    assert [load_manifest("x").root / p for p in found[code]] == [broken]


def test_a_person_of_broken_photos_alone_is_shown_as_tiles(tmp_path):
    paths = [f"{'long_name_of_a_photo' * i}{i}.jpg" for i in range(2)]
    for path in paths:
        (tmp_path / path).write_bytes(b"")
    photos = Photos(tmp_path, [*paths, "gone.jpg"], np.zeros(3, int), np.zeros(3, int))
    tiles = read_thumbs(photos, [0, 1, 2])
    assert tiles.shape == (3, 128, 64, 3) and (tiles.min(axis=(1, 2, 3)) < 60).all()


def test_a_doctor_who_stops_leaves_nothing(tmp_path):
    photo(tmp_path / "0.jpg", 0)
    rows = pd.DataFrame({"path": ["0.jpg"], "pid": 1, "camid": 0, "split": "train"})

    def stops(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_manifest(tmp_path / "m", "x", rows, tmp_path, examine=stops)
    assert not (tmp_path / "m").exists()


def test_a_kill_between_the_two_files_leaves_no_set(tmp_path, monkeypatch):
    photo(tmp_path / "0.jpg", 0)
    rows = pd.DataFrame({"path": ["0.jpg"], "pid": 1, "camid": 0, "split": "train"})
    write_manifest(tmp_path / "m", "x", rows, tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest_chapter, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        write_manifest(tmp_path / "m", "x", rows.assign(pid=7), tmp_path)
    with pytest.raises(FileNotFoundError, match="To prepare it"):
        load_manifest("m", tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_on_every_page_the_doctor_comes_before_the_figures(page):
    sources = [c.source for c in nbformat.read(page, as_version=4).cells if c.cell_type == "code"][
        1:
    ]
    first = {
        word: min((i for i, s in enumerate(sources) if word in s and "import" not in s), default=99)
        for word in ("= prepare", "look.use", "findings_table")
    }
    assert first["= prepare"] < first["findings_table"] < first["look.use"]
