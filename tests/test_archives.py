"""Archives that mean harm, or were made on another system: refused, named, and nothing left behind."""

import io
import os
import signal
import stat
import struct
import tarfile
import zipfile

import pytest

from reidlab.core.seed import rng
from reidlab.data import archives as raw
from reidlab.data.archives import ORIGIN, open_raw, unpack
from reidlab.data.files import visible, walk_tree


def zipped(path, *names, data=b"picture", how=zipfile.ZIP_STORED, edit=lambda info: None):
    with zipfile.ZipFile(path, "w", how) as box:
        for name in names:
            info = zipfile.ZipInfo("x")
            info.filename, info.compress_type = name, how
            edit(info)
            box.writestr(info, b"" if name.endswith("/") else data)
    return path


def tarred(path, *entries, mode="w"):
    "entries: names, or (name, type, fields)."
    with tarfile.open(path, mode) as box:
        for entry in entries:
            name, kind, fields = entry if isinstance(entry, tuple) else (entry, tarfile.REGTYPE, {})
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, 7 if kind == tarfile.REGTYPE else 0
            for key, value in fields.items():
                setattr(info, key, value)
            box.addfile(info, io.BytesIO(b"picture") if info.size else None)
    return path


def linked(info):
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16


def locked(path):
    "A zip whose entry says that it needs a password."
    zipped(path, "1.jpg")
    data = bytearray(path.read_bytes())
    for start, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(start) + at] |= 1
    path.write_bytes(data)
    return path


def lying(path, announced, how=zipfile.ZIP_DEFLATED):
    "A zip of 32 MiB of zeros that announces fewer, in both of its tables."
    zipped(path, "1.jpg", data=bytes(2**25), how=how)
    data = bytearray(path.read_bytes())
    for start, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", data, data.index(start) + at, announced)
    path.write_bytes(data)
    return path


def sparse(path):
    "A tar whose one file says it is mostly hole."
    tarred(path, "1.jpg")
    with tarfile.open(path, "w") as box:
        info = tarfile.TarInfo("1.jpg")
        info.type, info.size = tarfile.GNUTYPE_SPARSE, 0
        box.addfile(info)
    return path


def many(path):
    "A tar.gz of more empty files than are allowed, in few bytes."
    return tarred(
        path, *[(f"{i}.jpg", tarfile.REGTYPE, {"size": 0}) for i in range(60)], mode="w:gz"
    )


OUT = "would leave its folder"
LINK = "a link or device"
TWICE = "one place on some disks"
HARM = {
    "up": (lambda p: zipped(p, "fine.jpg", "../out.jpg"), OUT),
    "up-inside": (lambda p: zipped(p, "a/b/../../../out.jpg"), OUT),
    "up-backslash": (lambda p: zipped(p, "..\\out.jpg"), OUT),
    "absolute": (lambda p: zipped(p, "/etc/out.jpg"), OUT),
    "drive": (lambda p: zipped(p, "C:\\out.jpg"), OUT),
    "folder-up": (lambda p: zipped(p, "fine.jpg", "../out/"), OUT),
    "zip-link": (lambda p: zipped(p, "1.jpg", data=b"/etc/passwd", edit=linked), LINK),
    "password": (locked, "behind a password"),
    "bomb": (
        lambda p: zipped(p, "1.jpg", data=bytes(2**25), how=zipfile.ZIP_DEFLATED),
        "would unpack to 33554432 bytes",
    ),
    "bomb-in-parts": (
        lambda p: zipped(p, *"abcdefgh", data=bytes(2**22), how=zipfile.ZIP_DEFLATED),
        "bytes or more, 16777216 allowed",
    ),
    "lying": (lambda p: lying(p, 1000), "damaged"),
    "lying-more": (lambda p: lying(p, 2**32 - 2), "would unpack to 4294967294 bytes"),
    "twice": (lambda p: zipped(p, "a/1.jpg", "b.jpg", "A/1.jpg"), TWICE),
    "capitals": (lambda p: zipped(p, "query/1.jpg", "query/1.JPG"), TWICE),
    "sharp-s": (lambda p: zipped(p, "straße.jpg", "strasse.jpg"), TWICE),
    "file-then-folder": (lambda p: zipped(p, "query", "query/1.jpg"), TWICE),
    "folder-then-file": (lambda p: zipped(p, "query/1.jpg", "Query"), TWICE),
    "folder-entry-and-file": (lambda p: zipped(p, "query/", "query"), TWICE),
    "empty": (lambda p: zipped(p, "query/"), "holds no files"),
    "tar-up": (lambda p: tarred(p, "fine.jpg", "../out.jpg"), OUT),
    "tar-absolute": (lambda p: tarred(p, "/out.jpg"), OUT),
    "tar-link": (lambda p: tarred(p, ("a", tarfile.SYMTYPE, {"linkname": "/etc"}), "a/x"), LINK),
    "tar-hard-link": (lambda p: tarred(p, "1.jpg", ("2", tarfile.LNKTYPE, {"linkname": "1.jpg"})), LINK),
    "tar-device": (lambda p: tarred(p, ("1.jpg", tarfile.CHRTYPE, {})), LINK),
    "tar-pipe": (lambda p: tarred(p, ("1.jpg", tarfile.FIFOTYPE, {})), LINK),
    "tar-sparse": (sparse, "a file with holes"),
    "tar-nameless": (lambda p: tarred(p, "."), "a file without a name"),
    "tar-twice": (lambda p: tarred(p, "1.jpg", "1.jpg"), TWICE),
    "tar-many": (many, "more than 50 files"),
    "zip-many": (lambda p: zipped(p, *map(str, range(60))), "more than 50 files"),
    "zip-many-folders": (lambda p: zipped(p, *[f"{i}/" for i in range(200)]), "more than 50 files"),
    "deep": (lambda p: zipped(p, "a/" * 300 + "1.jpg"), "301 folders one in another"),
}  # fmt: skip


@pytest.mark.parametrize("case", HARM)
def test_harm_is_refused_and_leaves_nothing(case, tmp_path):
    make, message = HARM[case]
    (tmp_path / "in").mkdir()
    archive = make(tmp_path / "in" / "set.bin")
    with pytest.raises(ValueError, match=message) as caught:
        unpack(archive, tmp_path / "out" / "set", max_files=50)
    assert "set.bin" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir() if p.name != "out"] == ["in"]
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_download_cut_off_is_refused(kind, part, tmp_path):
    path = tmp_path / f"set.{kind}"
    data = rng(0).bytes(4000)
    if kind == "zip":
        zipped(path, "1.jpg", data=data)
    else:
        with tarfile.open(path, "w:gz") as box:
            info = tarfile.TarInfo("1.jpg")
            info.size = len(data)
            box.addfile(info, io.BytesIO(data))
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(ValueError, match="download it again"):
        unpack(path, tmp_path / "set")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_flipped_bit_is_noticed(tmp_path):
    path = zipped(tmp_path / "set.zip", "1.jpg", data=b"picture" * 100)
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged.*CRC"):
        unpack(path, tmp_path / "set")
    assert [p.name for p in tmp_path.iterdir()] == ["set.zip"]


@pytest.mark.parametrize("trial", range(20))
def test_a_killed_unpack_leaves_no_folder_that_looks_whole(trial, tmp_path, monkeypatch):
    names = [f"query/{i:02}.jpg" for i in range(12)]
    archive = zipped(tmp_path / "set.zip", *names)
    left = int(rng(8, trial).integers(len(names)))
    if (child := os.fork()) == 0:
        try:
            copy = raw.shutil.copyfileobj

            def fatal(source, file):
                nonlocal left
                left -= 1
                if left < 0:
                    file.write(b"pic")
                    os.kill(os.getpid(), signal.SIGKILL)
                copy(source, file)

            monkeypatch.setattr(raw.shutil, "copyfileobj", fatal)
            unpack(archive, tmp_path / "set")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "set").exists() and len(list(tmp_path.glob(".set.*.part"))) == 1
    folder = open_raw(archive, tmp_path / "set")
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.jpg")) == names
    assert all(p.read_bytes() == b"picture" for p in folder.rglob("*.jpg"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set", "set.zip"]


def test_two_processes_unpack_once(tmp_path):
    archive = zipped(tmp_path / "set.zip", *[f"{i}.jpg" for i in range(200)])
    children = []
    for _ in range(3):
        if (child := os.fork()) == 0:
            code = 1
            try:
                folder = open_raw(archive, tmp_path / "set")
                code = 0 if len(visible(folder)) == 200 else 2
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children] == [0, 0, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set", "set.zip"]


def one_photo(path, data):
    return tarred(path, "1.jpg") if data == b"tar" else zipped(path, "1.jpg", data=data)


@pytest.mark.parametrize("other", [b"changed", b"longer than before", b"tar"])
def test_another_archive_of_the_name_is_unpacked_beside(other, tmp_path, capsys):
    archive, target = tmp_path / "set.zip", tmp_path / "out" / "set"
    old = open_raw(one_photo(archive, b"picture"), target)
    about = archive.stat()
    one_photo(archive, other)
    os.utime(archive, ns=(about.st_atime_ns, about.st_mtime_ns))  # as cp -p or a sync leaves it
    new = open_raw(archive, target)
    said = capsys.readouterr().err
    assert old == target != new and new.parent == target.parent
    assert (old / "1.jpg").read_bytes() == b"picture"
    assert (new / "1.jpg").read_bytes() == (b"picture" if other == b"tar" else other)
    assert said.count("\n") == 1 and all(w in said for w in ("set.zip", str(old), new.name))
    assert open_raw(archive, target) == new and walk_tree(new).others == []
    one_photo(archive, b"picture")  # the first one again
    assert open_raw(archive, target) == old and capsys.readouterr().err.count("\n") == 1


def test_the_same_archive_copied_or_renamed_is_not_unpacked_again(tmp_path, capsys):
    old = open_raw(one_photo(tmp_path / "set.zip", b"picture"), tmp_path / "set")
    os.utime(tmp_path / "set.zip", (1, 1))
    (tmp_path / "set.zip").rename(tmp_path / "set-v1.zip")
    (old / "1.jpg").unlink()  # a photo that its owner took out
    again = open_raw(tmp_path / "set-v1.zip", tmp_path / "set")
    assert again == old and not (old / "1.jpg").exists() and capsys.readouterr().err == ""


def test_a_folder_that_was_unpacked_by_hand_is_read_as_it_lies(tmp_path):
    (tmp_path / "set").mkdir()
    archive = one_photo(tmp_path / "set.zip", b"picture")
    assert open_raw(archive, tmp_path / "set") == tmp_path / "set"
    (tmp_path / "set" / ORIGIN).write_text("{")
    with pytest.raises(ValueError, match=r"reidlab-origin.json in .*/set cannot be read"):
        open_raw(archive, tmp_path / "set")
