"A healthy set has no finding; each kind of damage is found by its code, and nothing is touched."

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageCms

from reidlab.data.doctor import KINDS, LEVELS, examine, examine_labels, open_queries
from reidlab.data.manifest import Manifest, read_manifest, write_manifest
from reidlab.data.repair import fix, keep_findings

COLUMNS = ["path", "pid", "camid", "split"]


def picture(path: Path, seed: int, **options) -> None:
    "A small picture that no other seed draws."
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture(scope="session")
def healthy(tmp_path_factory):
    "Four training and three test people before two cameras, junk and a distractor."
    base, rows = tmp_path_factory.mktemp("doctor"), []
    for pid in (2, 7, 11, 20):
        rows += [(f"train/{pid:04}_c{c}_{i}.jpg", pid, c, "train") for c in (0, 1) for i in (0, 1)]
    for pid in (3, 5, 9):
        rows.append((f"query/{pid:04}_c0.jpg", pid, 0, "query"))
        rows += [(f"test/{pid:04}_c{c}.jpg", pid, c, "gallery") for c in (0, 1)]
    rows += [("test/-1_c1.jpg", -1, 1, "gallery"), ("test/0000_c0.jpg", 0, 0, "gallery")]
    for i, row in enumerate(rows):
        picture(base / "photos" / row[0], i)
    (base / "photos" / "list.txt").write_text("\n".join(f"{r[0]} {r[1]}" for r in rows))
    frame = pd.DataFrame(rows, columns=COLUMNS)
    published = {"train photos": 16}
    return write_manifest(base / "well", "well", frame, base / "photos", published=published)


def contents(root: Path) -> dict[str, str]:
    "Every file under a folder with its digest."
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def test_a_healthy_set_has_no_finding(healthy):
    before = contents(healthy.root.parent)
    assert examine(healthy, lists=["list.txt"]) == []
    assert examine(healthy, deep=False) == []
    assert contents(healthy.root.parent) == before


TRAIN, QUERY, GALLERY = "train/0002_c0_0.jpg", "query/0003_c0.jpg", "test/0003_c1.jpg"


def at(manifest: Manifest, photo: str, **values) -> Manifest:
    "The manifest with other values in one row."
    frame = manifest.frame.copy()
    for column, value in values.items():
        frame.loc[frame["path"] == photo, column] = value
    return replace(manifest, frame=frame)


def rewritten(path: Path, **options) -> None:
    "A picture saved again as something else."
    with Image.open(path) as image:
        changed = image.convert(options.pop("mode", "RGB")).resize(options.pop("size", image.size))
    changed.save(path, **options)


def cut(root: Path, path: str) -> None:
    "Only the first two thirds arrive."
    content = (root / path).read_bytes()
    (root / path).write_bytes(content[: 2 * len(content) // 3])


def animate(root: Path, path: str) -> None:
    with Image.open(root / path) as image:
        frames = [image.convert("RGB").rotate(180)]
        image.convert("RGB").save(root / path, "GIF", save_all=True, append_images=frames)


TURNED = Image.Exif()
TURNED[0x0112] = 6


def glass(path: Path) -> None:
    "Half transparent."
    with Image.open(path) as image:
        changed = image.convert("RGB")
    changed.putalpha(128)
    changed.save(path, "PNG")


def linear() -> bytes:
    "sRGB's profile with a straight line for its curve."
    whole = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    at = whole.index(b"para", 128)
    return whole[:at] + b"curv" + bytes(8) + whole[at + 12 :]


def copy(root: Path, source: str, target: str) -> None:
    shutil.copy(root / source, root / target)


FILES = [
    ("missing-file", lambda r: (r / TRAIN).unlink(), TRAIN),
    ("empty-file", lambda r: (r / TRAIN).write_bytes(b""), TRAIN),
    ("unreadable-file", lambda r: (r / TRAIN).write_text("<html>404</html>"), TRAIN),
    ("truncated-image", lambda r: cut(r, TRAIN), TRAIN),
    ("files-changed", lambda r: picture(r / TRAIN, 99, quality=30), None),
    ("duplicate-across-splits", lambda r: copy(r, QUERY, TRAIN), TRAIN),
    ("duplicate-other-pid-train", lambda r: copy(r, "train/0007_c0_0.jpg", TRAIN), TRAIN),
    ("duplicate-other-pid-test", lambda r: copy(r, "test/0005_c1.jpg", GALLERY), GALLERY),
    ("query-in-gallery", lambda r: copy(r, QUERY, GALLERY), GALLERY),
    ("duplicate-photo", lambda r: copy(r, "train/0002_c1_0.jpg", TRAIN), "train/0002_c1_0.jpg"),
    ("wrong-extension", lambda r: rewritten(r / TRAIN, format="PNG"), TRAIN),
    ("animated-image", lambda r: animate(r, TRAIN), TRAIN),
    ("huge-image", lambda r: rewritten(r / TRAIN, size=(8, 5000), quality=20), TRAIN),
    ("tiny-image", lambda r: rewritten(r / TRAIN, size=(8, 40)), TRAIN),
    ("oversized-image", lambda r: Image.new("1", (20000, 10000)).save(r / TRAIN, "PNG"), TRAIN),
    ("odd-mode", lambda r: rewritten(r / TRAIN, mode="L"), TRAIN),
    ("turned-photo", lambda r: rewritten(r / TRAIN, exif=TURNED), TRAIN),
    ("deep-pixels", lambda r: rewritten(r / TRAIN, mode="I;16", format="PNG"), TRAIN),
    ("transparent-photo", lambda r: glass(r / TRAIN), TRAIN),
    ("other-colours", lambda r: rewritten(r / TRAIN, icc_profile=linear()), TRAIN),
    ("odd-profile", lambda r: rewritten(r / TRAIN, icc_profile=b"torn"), TRAIN),
    ("unnamed-file", lambda r: picture(r / "train/0030_c0_0.jpg", 98), "train/0030_c0_0.jpg"),
    ("list-missing", lambda r: (r / "list.txt").unlink(), None),
    (
        "listed-photo-missing",
        lambda r: (r / "list.txt").write_text("train/0044_c0_0.jpg 44\n"),
        "0044_c0_0",
    ),
]
SHARED = {"missing-file", "files-changed"}  # of damage to bytes, beside its own code


@pytest.mark.parametrize("code, damage, path", FILES, ids=[f[0] for f in FILES])
def test_damaged_files_are_named(healthy, tmp_path, code, damage, path):
    shutil.copytree(healthy.root, tmp_path / "photos")
    damage(tmp_path / "photos")
    before = contents(tmp_path)
    found = {
        f.code: f for f in examine(replace(healthy, root=tmp_path / "photos"), lists=["list.txt"])
    }
    assert contents(tmp_path) == before
    assert code in found
    assert path is None or path in found[code].paths
    beside = set(found) - {code} - SHARED
    assert beside <= {"tiny-image", "wrong-extension", "odd-mode", "duplicate-photo"}
    assert found[code].remedy and found[code].count > 0


ROWS = [
    ("pid-in-train-and-test", lambda m: at(m, QUERY, pid=2), "train/0002_c0_0.jpg"),
    ("junk-in-train", lambda m: at(m, TRAIN, pid=-1), TRAIN),
    ("junk-in-query", lambda m: at(m, QUERY, pid=-1), QUERY),
    ("odd-pid", lambda m: at(m, TRAIN, pid=-2), TRAIN),
    ("odd-camera", lambda m: at(m, TRAIN, camid=-3), TRAIN),
    ("split-missing", lambda m: replace(m, frame=m.frame[m.frame["split"] != "query"]), None),
    ("single-camera", lambda m: replace(m, frame=m.frame.assign(camid=0)), QUERY),
    ("query-without-match", lambda m: at(m, QUERY, pid=77), QUERY),
    ("query-own-camera-only", lambda m: at(m, GALLERY, camid=0), QUERY),
    ("camera-missing", lambda m: replace(m, frame=m.frame.assign(camid=-1)), TRAIN),
    ("camera-partly-missing", lambda m: at(m, TRAIN, camid=-1), TRAIN),
    ("lone-train-identity", lambda m: at(m, TRAIN, pid=33), TRAIN),
    (
        "pid-gaps",
        lambda m: replace(m, frame=numbered(m.frame)),
        None,
    ),
    ("escaping-path", lambda m: at(m, TRAIN, path="../photos/" + TRAIN), "../photos/" + TRAIN),
    ("case-clash", lambda m: at(m, TRAIN, path=QUERY.upper()), QUERY),
    (
        "counts-differ",
        lambda m: replace(
            m, about=m.about | {"counts": {"train photos": {"ours": 16, "published": 17}}}
        ),
        None,
    ),
    ("version-folders", lambda m: replace(m, about=m.about | {"version": "MSMT17_V2"}), TRAIN),
    (
        "version-mixed",
        lambda m: replace(at(m, TRAIN, path="mask_train_v2/a.jpg"), name="msmt17"),
        "mask_train_v2/a.jpg",
    ),
]


def numbered(frame: pd.DataFrame) -> pd.DataFrame:
    "In train, people 100 to 119 instead, one of them lost."
    rows = [(f"{p}_{i}.jpg", p, i, "train") for p in range(100, 120) if p != 107 for i in (0, 1)]
    return pd.concat([frame[frame["split"] != "train"], pd.DataFrame(rows, columns=COLUMNS)])


@pytest.mark.parametrize("code, damage, path", ROWS, ids=[r[0] for r in ROWS])
def test_damaged_rows_are_named(healthy, code, damage, path):
    found = {f.code: f for f in examine(damage(healthy), deep=False)}
    assert code in found
    assert path is None or path in found[code].paths
    assert found[code].level in LEVELS and found[code].remedy == KINDS[code].remedy


def test_every_kind_of_damage_is_tried():
    assert {row[0] for row in (*FILES, *ROWS)} == set(KINDS)


MENDABLE = [(c, d) for c, d, _ in FILES if KINDS[c].mend]


@pytest.mark.parametrize("code, damage", MENDABLE, ids=[m[0] for m in MENDABLE])
def test_a_mended_manifest_passes(healthy, tmp_path, code, damage):
    root = tmp_path / "photos"
    shutil.copytree(healthy.root, root)
    shutil.copytree(healthy.root.parent / "well", tmp_path / "well")
    damage(root)
    before = contents(tmp_path)
    ill = read_manifest(tmp_path / "well")
    mended = fix(ill, examine(ill), tmp_path / "mended", level="warning")
    after = contents(tmp_path)
    assert {k: after[k] for k in before} == before
    assert set(after) - set(before) == {"mended/manifest.csv", "mended/manifest.json"}
    left = {f.code for f in examine(read_manifest(tmp_path / "mended"))}
    assert left <= {"unnamed-file", "counts-differ", "query-own-camera-only"}
    told = json.loads((tmp_path / "mended" / "manifest.json").read_text())
    assert [f["code"] for f in told["findings"]] == [f.code for f in examine_labels(mended)]
    assert code == "files-changed" or told["left_out"][0]["count"] > 0
    assert told["mended_from"]["fingerprint"] == healthy.fingerprint


def test_a_warning_stays_unless_asked(healthy, tmp_path):
    shutil.copytree(healthy.root, tmp_path / "photos")
    copy(tmp_path / "photos", "train/0002_c1_0.jpg", TRAIN)
    ill = replace(healthy, root=tmp_path / "photos")
    findings = examine(ill)
    assert len(fix(ill, findings, tmp_path / "a").frame) == len(ill.frame)
    assert len(fix(ill, findings, tmp_path / "b", level="warning").frame) == len(ill.frame) - 1


def test_junk_in_train_is_left_out_and_the_rest_stays(healthy, tmp_path):
    ill = at(healthy, TRAIN, pid=-1)
    mended = fix(ill, examine(ill, deep=False), tmp_path / "new")
    assert set(healthy.frame["path"]) - set(mended.frame["path"]) == {TRAIN}
    assert os.path.samefile(mended.root, healthy.root)


@pytest.mark.parametrize("code", ["single-camera", "version-mixed", "odd-pid", "case-clash"])
def test_what_cannot_be_left_out_is_refused(healthy, tmp_path, code):
    damage = next(d for c, d, _ in ROWS if c == code)
    ill = damage(healthy)
    with pytest.raises(ValueError, match=f"(?s)nothing was written.*{code}"):
        fix(ill, examine(ill, deep=False), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_findings_stand_in_the_manifest(healthy, tmp_path):
    shutil.copytree(healthy.root.parent, tmp_path / "all")
    (tmp_path / "all/photos" / TRAIN).write_bytes(b"")
    ill = read_manifest(tmp_path / "all/well")
    keep_findings(tmp_path / "all/well", examine(ill))
    again = read_manifest(tmp_path / "all/well")
    assert [f["code"] for f in again.about["findings"]] == ["empty-file", "files-changed"]
    assert again.about["findings"][0]["paths"] == [TRAIN]
    assert again.fingerprint == healthy.fingerprint


def test_matches_are_counted_as_the_definition_says():
    gen = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "path": [f"{i}.jpg" for i in range(300)],
            "pid": gen.integers(-1, 20, 300),
            "camid": gen.integers(-1, 4, 300),
            "split": gen.choice(["query", "gallery"], 300),
        }
    )
    query, gallery = (frame[frame["split"] == s] for s in ("query", "gallery"))
    for row, good, own in zip(query.itertuples(), *open_queries(frame), strict=True):
        mine = gallery[gallery["pid"] == row.pid]
        assert good == len(mine)
        assert own == (mine["camid"] == row.camid).sum() * (row.camid >= 0)
