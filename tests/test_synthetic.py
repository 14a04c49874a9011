"""Synthetic people as a data set: what no single cell of the chapter can say."""

import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from hashlib import sha256

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from reidlab.data import synthetic
from reidlab.data.manifest import read_manifest
from reidlab.data.people import draw_person
from reidlab.data.synthetic import draw_photo, make_camera, plan_shots, prepare_synthetic, take

SMALL = dict(train_pids=3, test_pids=4, distractors=4, junk=4)
NAME = re.compile(r"(?P<pid>-1|\d{4})_c(?P<cam>\d)s\d_\d{6}_\d\d\.jpg")


def digests(root):
    files = sorted(root.rglob("*.jpg"))
    return {str(f.relative_to(root)): sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare_synthetic(tmp_path_factory.mktemp("data"), **SMALL)


def test_two_calls_give_the_same_bytes(folder, tmp_path):
    twin = prepare_synthetic(tmp_path, **SMALL)
    assert twin.name == folder.name
    assert digests(twin) == digests(folder)
    for name in ("manifest.csv", "manifest.json"):
        assert (twin / name).read_bytes() == (folder / name).read_bytes()


def test_a_photo_does_not_know_what_was_taken_before():
    shots = plan_shots(3, 3, 6, 3, seed=0, distractors=3, junk=3)
    order = np.random.default_rng(0).permutation(len(shots))
    straight = [take(s, 0, 0.7, 6) for s in shots]
    draw_person.cache_clear()
    synthetic.paint_scene.cache_clear()
    shuffled = {i: take(shots[i], 0, 0.7, 6) for i in order}
    assert all(np.array_equal(straight[i], photo) for i, photo in shuffled.items())


def test_more_people_leave_the_first_ones_as_they_were(folder, tmp_path):
    more = prepare_synthetic(tmp_path, **SMALL | {"test_pids": 5, "distractors": 0, "junk": 0})
    few, many = digests(folder), digests(more)
    people = {k: v for k, v in few.items() if int(k.split("/")[1].split("_")[0]) > 0}
    assert people.items() <= many.items() and len(many) > len(people)


def test_seed_and_dial_change_every_photo(folder, tmp_path):
    for change in ({"seed": 1}, {"difficulty": 0.6}):
        other = prepare_synthetic(tmp_path, **SMALL | change)
        assert other.name != folder.name
        assert not set(digests(other).values()) & set(digests(folder).values())


def test_the_tree_parses_as_market_and_agrees_with_its_manifest(folder):
    found = []
    for split, where in synthetic.FOLDERS.items():
        for file in sorted((folder / where).iterdir()):
            m = NAME.fullmatch(file.name)
            assert m, file.name
            found.append((f"{where}/{file.name}", int(m["pid"]), int(m["cam"]) - 1, split))
            with Image.open(file) as photo:
                assert (photo.size, photo.mode, photo.format) == ((64, 128), "RGB", "JPEG")
    frame = read_manifest(folder).frame[["path", "pid", "camid", "split"]]
    told = frame.sort_values("path").values.tolist()
    assert told == sorted(map(list, found))


@pytest.mark.parametrize("cameras", [2, 6])
def test_the_protocol_holds(cameras):
    shots = pd.DataFrame(plan_shots(20, 20, cameras, 3, seed=4, distractors=7, junk=5))
    train, query, gallery = (shots[shots.split == s] for s in ("train", "query", "gallery"))
    assert set(train.pid) == set(range(1, 21)) and set(query.pid) == set(range(21, 41))
    assert not query.duplicated(["pid", "camid"]).any()
    assert not shots.path.duplicated().any()
    for q in query.itertuples():
        others = gallery[(gallery.pid == q.pid) & (gallery.camid != q.camid)]
        assert len(others) > 0, q
    assert (gallery.pid == 0).sum() == 7 and (gallery.pid == -1).sum() == 5
    assert shots.camid.max() == cameras - 1
    if cameras > 2:  # nobody is seen everywhere
        assert shots[shots.pid > 0].groupby("pid").camid.nunique().max() < cameras


def test_orientation_changes_the_figure_and_the_dial_the_photo():
    person, g = draw_person(0, 43), synthetic.rng
    views = [draw_photo(person, make_camera(0, 0, 0.0), k, g(0, 1)).astype(int) for k in range(8)]
    for i in range(8):
        for j in range(i):
            assert (abs(views[i] - views[j]).max(2) > 40).sum() > 200, (i, j)
    cameras = [make_camera(0, 1, d) for d in (0.0, 0.5, 1.0)]
    casts = [max(c.cast) - min(c.cast) for c in cameras]
    assert casts == sorted(casts) and [c.crowd for c in cameras] == sorted(c.crowd for c in cameras)


def test_an_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
    taken = []

    def tire(*arguments, **named):
        taken.append(arguments)
        if len(taken) > 5:
            raise KeyboardInterrupt
        return take(*arguments, **named)

    monkeypatch.setattr(synthetic, "take", tire)
    with pytest.raises(KeyboardInterrupt):
        prepare_synthetic(tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_not_taken_as_finished(folder, tmp_path):
    shutil.copytree(folder, tmp_path / f".{folder.name}-0.partial")
    (tmp_path / f".{folder.name}-0.partial" / "manifest.json").unlink()
    done = prepare_synthetic(tmp_path, **SMALL)
    assert digests(done) == digests(folder)


def test_a_finished_folder_is_not_drawn_again(folder, monkeypatch):
    monkeypatch.setattr(synthetic, "take", lambda *_: pytest.fail("drew a photo again"))
    assert prepare_synthetic(folder.parent, **SMALL) == folder


def test_processes_that_race_both_end_well(folder, tmp_path):
    work = partial(prepare_synthetic, **SMALL)
    with ProcessPoolExecutor(2) as pool:
        first, second = pool.map(work, [tmp_path, tmp_path])
    assert first == second and [p.name for p in tmp_path.iterdir()] == [folder.name]
    assert digests(first) == digests(folder)


def test_a_stranger_in_the_way_is_left_alone(folder, tmp_path):
    (tmp_path / folder.name).mkdir()
    (tmp_path / folder.name / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="Delete it and try again"):
        prepare_synthetic(tmp_path, **SMALL)
    assert [p.name for p in tmp_path.rglob("*")] == [folder.name, "mine.txt"]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"difficulty": -0.1}, "difficulty to be a number from 0 to 1, got -0.1"),
        ({"difficulty": float("nan")}, "difficulty to be a number from 0 to 1, got nan"),
        ({"difficulty": "hard"}, "difficulty to be a number from 0 to 1, got 'hard'"),
        ({"train_pids": 1}, "train_pids to be a whole number of 2 or more, got 1"),
        ({"test_pids": 2.5}, "test_pids to be a whole number of 2 or more, got 2.5"),
        ({"cameras": 10}, "cameras to be a whole number from 2 to 9, got 10"),
        ({"photos_per_camera": True}, "photos_per_camera to be a whole number"),
        ({"junk": -1}, "junk to be a whole number from 0 to 9999, got -1"),
        ({"seed": -1}, "seed to be a whole number of 0 or more, got -1"),
        ({"train_pids": 9000, "test_pids": 1000}, "at most 9999 identities"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(bad, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        prepare_synthetic(tmp_path / "new", **bad)
    assert not (tmp_path / "new").exists()
