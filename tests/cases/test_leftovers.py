"""What a killed process had half made is cleared by the next, and what a living one makes is not."""

import os
import signal
import zipfile
from contextlib import ExitStack
from itertools import count

import numpy as np
import pytest

from reidlab.core.files import clear_parts, part_of, write_bytes
from reidlab.data import archives, shapes, synthetic
from reidlab.data.archives import open_raw
from reidlab.data.shapes import prepare_shapes
from reidlab.data.synthetic import prepare_synthetic
from reidlab.retrieval.index import GalleryIndex

FEW = {"train_pids": 2, "test_pids": 2, "cameras": 2, "photos_per_camera": 2}
FEW |= {"distractors": 1, "junk": 1}


def an_index(folder):
    found = GalleryIndex(dims=4)
    found.add(np.eye(4, dtype=np.float32), pids=range(4), camids=[0] * 4)
    return found.save(folder / "index")


def unpacked(folder):
    archive = folder / "set.zip"
    with zipfile.ZipFile(archive, "w") as box:
        for n in range(4):
            box.writestr(f"{n}.jpg", b"picture")
    return open_raw(archive, folder / "set")


MAKERS = {  # who makes something, and what is called while it is half made
    "drawn people": (lambda f: prepare_synthetic(f, **FEW), synthetic, "take"),
    "drawn shapes": (lambda f: prepare_shapes(f, 2, 3, 2), shapes, "draw_shape"),
    "an unpacked archive": (unpacked, archives.shutil, "copyfileobj"),
    "an index": (an_index, os, "replace"),
    "a file": (lambda f: write_bytes(f / "one", b"1"), os, "replace"),
}


def killed(make, owner, name, at):
    "A process that dies at the n-th call of a function."
    if (child := os.fork()) == 0:
        try:
            whole, calls = getattr(owner, name), count(1)

            def call(*given, **more):
                if next(calls) == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return whole(*given, **more)

            setattr(owner, name, call)
            make()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def everything(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


@pytest.mark.parametrize("kind", MAKERS)
def test_what_the_killed_left_goes_when_the_next_one_makes_it(kind, tmp_path):
    make, owner, name = MAKERS[kind]
    for place in ("whole", "killed"):
        (tmp_path / place).mkdir()
    make(tmp_path / "whole")
    for at in (1, 3) if owner is not os else (1,):
        killed(lambda: make(tmp_path / "killed"), owner, name, at)
    assert any(p.name.startswith(".") for p in (tmp_path / "killed").rglob("*"))
    make(tmp_path / "killed")
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")


@pytest.mark.parametrize("prepare", [prepare_synthetic, prepare_shapes])
def test_what_the_killed_left_goes_with_any_later_set(prepare, tmp_path):
    kind = {prepare_synthetic: "drawn people", prepare_shapes: "drawn shapes"}[prepare]
    make, owner, name = MAKERS[kind]
    killed(lambda: make(tmp_path), owner, name, 2)
    prepare(tmp_path, **{**(FEW if "people" in kind else {"classes": 2}), "seed": 1})
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_living_process_makes_is_left_alone(folder, tmp_path):
    ready, go = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        with part_of(tmp_path / "set", folder):
            os.write(ready[1], b"1")
            os.read(go[0], 1)
            os._exit(0)
    os.read(ready[0], 1)
    with part_of(tmp_path / "set", folder):
        assert clear_parts(tmp_path) == [] and len(list(tmp_path.iterdir())) == 2
    assert len(list(tmp_path.iterdir())) == 1
    os.write(go[1], b"1")
    os.waitpid(child, 0)
    assert len(clear_parts(tmp_path)) == 1 and not list(tmp_path.iterdir())


def test_a_part_that_a_dead_process_of_our_number_left_is_emptied(tmp_path):
    left = tmp_path / f".set.{os.getpid()}.part" / "query"
    left.mkdir(parents=True)
    (left / "1.jpg").write_bytes(b"half")
    with part_of(tmp_path / "set", folder=True) as part:
        assert part.samefile(left.parent) and not any(part.iterdir())


@pytest.mark.parametrize("name", [".set.zip.part", ".part", "set.1.part", ".set.1a.part", ".s.1.part/x"])  # fmt: skip
def test_only_our_own_names_are_cleared(name, tmp_path):
    whose = tmp_path / name
    whose.parent.mkdir(exist_ok=True)
    whose.write_bytes(b"a browser's download")
    os.symlink(whose, tmp_path / ".link.7.part")
    os.mkfifo(tmp_path / ".pipe.7.part")
    cleared = {path.name for path in clear_parts(tmp_path)}
    assert cleared <= {".pipe.7.part", ".s.1.part"} and ".pipe.7.part" in cleared
    assert whose.exists() or name.startswith(".s.1.part")


def test_a_fork_of_the_maker_takes_nothing_away(tmp_path):
    with ExitStack() as stack:
        part = stack.enter_context(part_of(tmp_path / "set", folder=True))
        (part / "1.jpg").write_bytes(b"1")
        if (child := os.fork()) == 0:
            try:
                stack.close()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert (part / "1.jpg").is_file()
    assert not part.exists()
