"""What lies among people's photos and is none, and photos that only seem to be missing."""

import io
import os
import zipfile
from pathlib import Path

import pytest
from conftest import walk
from PIL import Image

from reidlab.data.archives import unpack
from reidlab.data.classes import folder_rows, prepare_classes
from reidlab.data.layouts import append_gallery, find_top
from reidlab.data.manifest import tree_rows, write_manifest
from reidlab.data.own import own_rows
from reidlab.viz.data_set import closing_line

FORK = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(60)  # an AppleDouble header
NAMED = r"(?P<pid>-?\d+)_c(?P<cam>\d+)"
LEFT = [  # macOS, notebooks, file managers, network disks, Windows, version control
    "anna/._0.jpg",
    "__MACOSX/anna/._0.jpg",
    "anna/.ipynb_checkpoints/0-checkpoint.jpg",
    ".thumbnails/0.jpg",
    "@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg",
    "anna/@eaDir/0.jpg",
    "#recycle/0.jpg",
    "@Recycle/eve/0.jpg",
    "$RECYCLE.BIN/S-1-5/$R0.jpg",
    "System Volume Information/0.png",
    "lost+found/0.jpg",
    ".git/lfs/0.jpg",
    ".Trash-1000/files/0.jpg",
    "Thumbs.db",
    "anna/Thumbs.db",
    "desktop.ini",
    ".DS_Store",
]


def photo(path, number=0, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 16), (9 * number % 256, 90, 120)).save(path, **how)
    return path


def people(root, names=("anna", "bob", "cy", "dora"), endings=("jpg",)):
    "Three photos of each."
    for i, name in enumerate(names):
        for k in range(3):
            photo(root / name / f"{k}.{endings[i % len(endings)]}", 10 * i + k)
    return root


def spoil(root):
    "Everything that systems and programs leave, real pictures among it."
    for i, path in enumerate(LEFT):
        if path.endswith((".jpg", ".png")) and "._" not in path:
            photo(root / path, 100 + i)
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(FORK)
    return root


def own(root):
    frame, top = own_rows(root)
    return sorted(set(frame["identity"])), len(frame), top


def test_what_systems_leave_is_nobody(tmp_path):
    root = spoil(people(tmp_path / "set"))
    assert own(root) == (["anna", "bob", "cy", "dora"], 12, root)
    line = closing_line(
        write_manifest(tmp_path / "m", "x", own_rows(root)[0].assign(split="train"), root)
    )
    assert "12 photos" in line and "0 files left out" in line


def test_a_hidden_folder_above_the_set_changes_nothing(tmp_path):
    root = people(tmp_path / ".cache" / "@eaDir" / "set")
    assert own(root)[:2] == (["anna", "bob", "cy", "dora"], 12)


@pytest.mark.parametrize("beside", ["__MACOSX/set/anna/._0.jpg", ".DS_Store", "README.txt"])
def test_a_set_packed_inside_a_folder_is_found(beside, tmp_path):
    root = people(tmp_path / "packed" / "set")
    (tmp_path / "packed" / beside).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "packed" / beside).write_bytes(FORK)
    assert own(tmp_path / "packed") == (["anna", "bob", "cy", "dora"], 12, root)


def test_classes_distractors_and_layouts_take_the_same_walk(tmp_path):
    for split in ("train", "test"):
        people(spoil(tmp_path / "cls" / split), ("anna", "cat"))
    assert folder_rows(tmp_path / "cls", {"train": "train", "test": "test"})[1] == ["anna", "cat"]
    photo(spoil(tmp_path / "partial") / "whole" / "001_001.jpg")
    (tmp_path / "partial" / "whole" / "._001_001.jpg").write_bytes(FORK)
    rows, odd = tree_rows(tmp_path / "partial", {"gallery": "whole"}, r"\D*(?P<pid>(?P<cam>\d+))")
    assert list(rows["path"]) == ["whole/001_001.jpg"] and odd == []
    base = write_manifest(tmp_path / "m", "x", rows, tmp_path / "partial")
    added, _ = append_gallery(base, spoil(photo(tmp_path / "far" / "d0.jpg").parent))
    assert sorted(p for p in added["path"] if p.startswith("far")) == ["far/d0.jpg"]
    for name in ("__MACOSX/set", "low/set", "low/.git"):
        (tmp_path / "top" / name / "train").mkdir(parents=True)
    assert find_top(tmp_path / "top", ["train"]) == tmp_path / "top" / "low" / "set"


def test_a_zip_as_macos_packs_it(tmp_path):
    "Archive Utility: folders first, each file's shadow after it, under __MACOSX."
    content = io.BytesIO()
    Image.new("RGB", (8, 16)).save(content, "JPEG")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as box:
        box.writestr("animals/", b"")
        box.writestr("animals/.DS_Store", b"\0\0\0\1Bud1")
        box.writestr("__MACOSX/animals/._.DS_Store", FORK)
        for path in (
            f"{s}/{k}/{i}.jpg" for s in ("train", "test") for k in ("cat", "dog") for i in (0, 1)
        ):
            box.writestr(f"animals/{path}", content.getvalue())
            folder, name = os.path.split(path)
            box.writestr(f"__MACOSX/animals/{folder}/._{name}", FORK)
    manifest = prepare_classes("a", unpack(tmp_path / "a.zip", tmp_path / "u"), tmp_path / "m")
    assert manifest.root == tmp_path / "u" / "animals" and len(manifest.frame) == 8
    assert manifest.about["classes"] == ["cat", "dog"]


@pytest.mark.parametrize(
    "file, text", [("photos.csv", "path,pid\n{},1\n"), ("class_mapping.json", '{{"1": ["{}"]}}')]
)
@pytest.mark.parametrize(
    "left", ["anna/._0.jpg", "__MACOSX/anna/0.jpg", "anna/.ipynb_checkpoints/0.jpg"]
)
def test_a_list_that_names_them_is_refused(file, text, left, tmp_path):
    (tmp_path / file).write_text(text.format(left))
    with pytest.raises(ValueError, match="hidden file or one that a system left") as caught:
        own_rows(tmp_path / file)
    assert left in str(caught.value) and "Take such lines out" in str(caught.value)


# --- photos that seem to be missing ------------------------------------------------------------


def test_linked_folders_and_files_are_followed(tmp_path):
    near, far = people(tmp_path / "near", ("anna", "bob")), people(tmp_path / "far", ("cy", "dora"))
    (near / "cy").symlink_to(far / "cy")
    (near / "dora").mkdir()
    for file in (far / "dora").iterdir():
        (near / "dora" / file.name).symlink_to(os.path.relpath(file, near / "dora"))
    assert own(near)[:2] == (["anna", "bob", "cy", "dora"], 12)


def test_a_split_behind_a_link(tmp_path):
    names = [f"{p:04}_c{c}s1_000001_00.jpg" for p in (1, 2) for c in (1, 2, 3)]
    for i, name in enumerate(names):
        photo(tmp_path / "elsewhere" / name, i)
    (tmp_path / "market" / "bounding_box_test").mkdir(parents=True)
    (tmp_path / "market" / "bounding_box_test" / "all").symlink_to(tmp_path / "elsewhere")
    rows, odd = tree_rows(tmp_path / "market", {"gallery": "bounding_box_test"}, NAMED)
    assert [Path(p).name for p in rows["path"]] == names and odd == []


@pytest.mark.parametrize(
    "link, target",
    [
        ("anna2", "anna"),  # a folder twice
        ("anna/9.jpg", "0.jpg"),  # a photo twice
        ("0anna", "anna"),  # the link stands before the thing itself
        ("anna/again", "."),  # a circle
        ("anna/up", ".."),
        ("up", ".."),  # everything beside the set
        ("gone.jpg", "nowhere.jpg"),
    ],
)
def test_a_link_to_nothing_new_is_no_photo(link, target, tmp_path):
    root = people(tmp_path / "set")
    photo(tmp_path / "stranger" / "0.jpg")
    (root / link).symlink_to(target)
    assert own(root)[:2] == (["anna", "bob", "cy", "dora"], 12)
    line = closing_line(
        write_manifest(tmp_path / "m", "x", own_rows(root)[0].assign(split="train"), root)
    )
    assert "1 files left out" in line and "1 link to nothing new" in line


@pytest.mark.parametrize(
    "ending", ["webp", "tif", "tiff", "jfif", "gif", "jp2", "ppm", "JPE", "png"]
)
def test_what_pillow_reads_is_a_photo(ending, tmp_path):
    root = people(tmp_path / "set", endings=("jpg", ending))
    assert own(root)[:2] == (["anna", "bob", "cy", "dora"], 12)


def test_what_is_left_out_is_counted_by_its_ending(tmp_path):
    root = people(tmp_path / "set")
    for name in ("anna/3.heic", "bob/3.HEIC", "eve/0.cr2", "notes.txt", "anna/scan.pdf", "LICENSE"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"something")
    line = closing_line(
        write_manifest(tmp_path / "m", "x", own_rows(root)[0].assign(split="train"), root)
    )
    for words in ("6 files left out", "2 .heic", "1 .cr2", "1 .txt", "1 .pdf", "1 without ending"):
        assert words in line, line


@pytest.mark.parametrize(
    "page, home", [("market1501", "bounding_box_test"), ("own", ""), ("classes", "train")]
)
def test_every_page_says_it(page, home, lab):
    root = lab.raw / "x"
    if page == "market1501":
        for folder, pid in (("bounding_box_train", 1), ("query", 2), ("bounding_box_test", 2)):
            for cam in (1, 2):
                photo(
                    root / folder / f"{pid:04}_c{cam}s1_000001_00.jpg", 3 * pid + cam + len(folder)
                )
    else:
        for split in ("train", "test") if page == "classes" else ("",):
            people(root / split)
    spoil(root)
    (root / home / "late.heic").write_bytes(b"something")
    names = walk(f"data_prep/{page}.ipynb", name="x", source=str(root))
    line = names["made"].closing()
    assert "1 files left out" in line and "1 .heic" in line


def test_of_two_sets_side_by_side_none_is_chosen_in_silence(tmp_path):
    for name in ("DukeMTMC-reID", "Market-1501-v15.09.15"):
        for folder in ("bounding_box_train", "query"):
            (tmp_path / name / folder).mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"as DukeMTMC-reID, Market-1501-v15\.09\.15\. Which one\?"
    ):
        find_top(tmp_path, ["bounding_box_train", "query"])
    (tmp_path / "query").mkdir()
    (tmp_path / "bounding_box_train").mkdir()  # the highest is meant
    assert find_top(tmp_path, ["bounding_box_train", "query"]) == tmp_path
    (tmp_path / "one" / "set").mkdir(parents=True)
    (tmp_path / "one" / "set" / "query").mkdir()
    (tmp_path / "one" / "again").symlink_to("set")  # one set, by two names
    assert find_top(tmp_path / "one", ["query"]).resolve() == tmp_path / "one" / "set"
