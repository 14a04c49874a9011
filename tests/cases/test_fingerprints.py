"""Photos, weights and tables that were exchanged under their old name: nothing kept answers for them."""

import hashlib
import json
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_recipe
from PIL import Image

from reidlab.core.identity import file_digest, rules_of, same_data
from reidlab.core.recipe import load_recipe
from reidlab.core.run import RunFolder, open_run, read_json, write_json
from reidlab.core.settings import project_root
from reidlab.data import contents as content
from reidlab.data.contents import memory_of, remember, remembered
from reidlab.data.doctor import examine
from reidlab.data.joined import join
from reidlab.data.loaders import open_data, open_test
from reidlab.data.manifest import read_manifest, write_manifest
from reidlab.data.packed import pack_photos
from reidlab.evaluation.embeddings import Embeddings, load_embeddings, save_embeddings
from reidlab.evaluation.evaluate_classes import evaluate_classes
from reidlab.evaluation.evaluate_run import evaluate_run
from reidlab.evaluation.lists import ranking_of
from reidlab.training.classify import fit_classes
from reidlab.training.distill import check_teacher

WHO = {"train": (1, 2, 3, 4), "query": (5, 6), "gallery": (5, 6, 7)}


def paint(path, seed):
    "A picture of noise: with bmp, as many bytes whatever it shows."
    noise = np.random.default_rng(seed).integers(0, 256, (24, 12, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).save(path)


def rows_of():
    "Two photos of each person, by two cameras."
    rows = [
        (f"{split}/{pid}_c{cam}.bmp", pid, cam, split)
        for split, pids in WHO.items()
        for pid in pids
        for cam in (0, 1)
    ]
    return pd.DataFrame(rows, columns=["path", "pid", "camid", "split"])


def prepare(data, name="mine"):
    "What a page of data_prep does, at its shortest."
    return write_manifest(data / name, name, rows_of(), data / "photos" / name)


@pytest.fixture
def data(tmp_path, monkeypatch):
    "A data_dir with one small set of one's own, its memory beside the manifest."
    monkeypatch.delenv("REIDLAB_CACHE_DIR")
    for i, path in enumerate(rows_of()["path"]):
        paint(tmp_path / "photos" / "mine" / path, i)
    prepare(tmp_path)
    return tmp_path


def rest(folder):
    "Let every photo of a set have come to rest, as if an hour had passed since it was read."
    memory = memory_of(folder)
    seen = {path: s._replace(at=s.at + 3600 * 10**9) for path, s in remembered(memory).items()}
    remember(memory, seen)


MINE = {
    "data.name": "mine",
    "data.height": 32,
    "data.width": 16,
    "data.sampler.pk.p": 2,
    "data.sampler.pk.k": 2,
}
RECIPE = load_recipe("smoke", overrides=MINE | {"data.val_fraction": 0.5})


def opened(data):
    return open_data(RECIPE.data, 0, data)


def old_rule(frame, root):
    "The fingerprint of the time before contents counted, as that code made it."
    digest = hashlib.sha256()
    for row in frame[["path", "pid", "camid", "split"]].itertuples(index=False):
        size = (root / row.path).stat().st_size
        digest.update(f"{row.path}\t{row.pid}\t{row.camid}\t{row.split}\t{size}\n".encode())
    return digest.hexdigest()


def make_old(data, name="mine"):
    "Turn a manifest into one of that time; its fingerprint."
    manifest = read_manifest(data / name)
    about = {k: v for k, v in manifest.about.items() if k not in ("rows", "contents", "drawn")}
    about["fingerprint"] = old_rule(manifest.frame, manifest.root)
    write_json(data / name / "manifest.json", about)
    (data / name / "contents.jsonl").unlink(missing_ok=True)
    return about["fingerprint"]


# --- photos ----------------------------------------------------------------------------------


def in_place(path, other):
    path.write_bytes(other.read_bytes())


def dated_back(path, other):
    times = path.stat()
    path.write_bytes(other.read_bytes())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def copied_over(path, other):
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    shutil.copy2(other, path)  # as `cp -p` does


def renamed_over(path, other):
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(other, path)


def linked(path, other):
    path.unlink()
    path.symlink_to(other)


WAYS = [in_place, dated_back, copied_over, renamed_over, linked]


@pytest.mark.parametrize("rested", [True, False], ids=["at rest", "just written"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_replaced_photo_is_noticed(way, rested, data, tmp_path):
    before = opened(data).fingerprint
    if rested:
        rest(data / "mine")
    path = data / "photos" / "mine" / "gallery" / "5_c0.bmp"
    paint(tmp_path / "other.bmp", 77)
    way(path, tmp_path / "other.bmp")
    for job in (opened, lambda d: open_test(RECIPE.data, d)):
        with pytest.raises(ValueError, match=r"'mine' has changed.*1 of its 18 photos") as wrong:
            job(data)
        told = str(wrong.value)
        assert "gallery/5_c0.bmp" in told and "Prepare it again" in told and "\n" not in told
    (found,) = [f for f in examine(read_manifest(data / "mine")) if f.code == "files-changed"]
    assert found.paths == ("gallery/5_c0.bmp",) and found.count == 1
    prepare(data)
    now = opened(data).fingerprint
    assert not same_data(before, now)
    assert not [f for f in examine(read_manifest(data / "mine")) if f.code == "files-changed"]


def test_what_the_file_system_vouches_for_is_not_read_again(data, monkeypatch):
    opened(data)
    rest(data / "mine")
    touched = data / "photos" / "mine" / "train" / "1_c0.bmp"
    touched.touch()  # another date, the same photo
    read = []

    def counting(file, *args, **more):
        read.append(str(file))
        return open(file, *args, **more)

    monkeypatch.setattr(content, "open", counting, raising=False)
    opened(data)
    assert read == [str(touched)]


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff\xfe\0", lambda b: b"[1]\n[2]"]
    + [lambda b: b.replace(b"train", b"brain"), lambda b: b'{"format": 9}\n{}'],
)
def test_a_memory_that_cannot_be_trusted_is_made_anew(damage, data):
    memory, before = memory_of(data / "mine"), opened(data).fingerprint
    memory.write_bytes(damage(memory.read_bytes()))
    assert remembered(memory) == {}
    assert opened(data).fingerprint == before
    assert len(remembered(memory)) == 18 and not list(memory.parent.glob("*.part"))


def test_a_folder_that_cannot_be_written_is_said_and_does_no_harm(data, monkeypatch):
    (data / "wall").write_text("a file where a folder should be")
    monkeypatch.setenv("REIDLAB_CACHE_DIR", str(data / "wall"))
    with pytest.warns(UserWarning, match=r"cannot be remembered.*Set cache_dir"):
        opened(data)


def test_there_are_so_many_memories_at_most(data, monkeypatch):
    monkeypatch.setenv("REIDLAB_CACHE_DIR", str(data / "caches"))
    monkeypatch.setattr(content, "MEMORIES", 3)
    seen = remembered(data / "mine" / "contents.jsonl")
    for i in range(5):
        remember(memory_of(data / f"set{i}"), seen)
    assert len(list((data / "caches" / "contents").iterdir())) == 3


def test_a_part_of_a_joined_set_that_changed(data):
    for i, path in enumerate(rows_of()["path"]):
        paint(data / "photos" / "other" / path, 100 + i)
    parts = [read_manifest(data / "mine"), prepare(data, "other")]
    join(parts, "mine", data / "both")
    recipe = load_recipe("smoke", overrides=MINE | {"data.name": "both"})
    assert open_test(recipe.data, data).fingerprint == read_manifest(data / "both").fingerprint
    paint(data / "photos" / "other" / "train" / "2_c1.bmp", 7)
    with pytest.raises(
        ValueError, match=r"'both' has changed.*1 of its 26 photos, first: other/train/2"
    ):
        open_test(recipe.data, data)
    with pytest.raises(ValueError, match=r"'other' has changed"):
        join(parts, "mine", data / "again")


def test_drawn_sets_are_known_by_their_settings_and_watched_all_the_same(photos, tmp_path):
    recipe = tiny_recipe()
    shutil.copytree(photos, tmp_path / "a")
    one = open_data(recipe.data, 0, tmp_path / "a").manifest
    assert one.fingerprint == open_data(recipe.data, 0, photos).fingerprint
    changed = one.root / one.photos("query").paths[0]
    Image.new("RGB", (64, 128)).save(changed, "JPEG", quality=90)  # an encoder of another kind
    by = {"more": {"drawn": one.about["drawn"]}}
    elsewhere = write_manifest(tmp_path / "c", "synthetic", one.frame, one.root, **by)
    assert same_data(elsewhere.fingerprint, one.fingerprint)
    assert elsewhere.about["contents"] != one.about["contents"]
    with pytest.raises(ValueError, match=rf"has changed.*Delete {one.folder}; it is drawn again"):
        open_data(recipe.data, 0, tmp_path / "a")


# --- what is kept ----------------------------------------------------------------------------


@pytest.fixture
def run(finished, tmp_path):
    "A finished run of its own."
    shutil.copytree(finished[0], tmp_path / "runs" / "done")
    return tmp_path / "runs" / "done"


def worth(run, data, **more):
    return evaluate_run(run, "mine", workers=0, data_dir=data, **more)


def features(run):
    return load_embeddings(run / "evaluate" / "mine" / "embeddings.npz").g_feats


@pytest.mark.parametrize("old", [False, True], ids=["now", "manifest of before"])
def test_features_of_photos_that_are_gone_are_not_ranked(old, data, run):
    if old:
        make_old(data)
    first, feats = worth(run, data), features(run)
    assert worth(run, data) == first  # answered from its files
    for i, path in enumerate(sorted((data / "photos/mine/gallery").iterdir())):
        paint(path, 500 + i)
    if not old:
        with pytest.raises(ValueError, match=r"6 of its 18 photos"):
            worth(run, data)
        prepare(data)
    with pytest.raises(ValueError, match=r"other photos than mine has now. Evaluate it again"):
        ranking_of(run, "mine", data_dir=data)
    again = worth(run, data)
    assert not np.array_equal(features(run), feats)
    assert again["protocol"]["times_opened"] == 2
    shutil.rmtree(run / "evaluate")
    assert worth(run, data)["metrics"] == again["metrics"]


@pytest.mark.parametrize("said", ["no reader", "nothing"])
@pytest.mark.parametrize("odd", [False, True], ids=["plain photos", "a turned photo"])
def test_features_by_the_first_reader_hold_for_plain_photos_alone(odd, said, data, run):
    "Kept before readers were named: the first one did not turn photos."
    if odd:
        exif = Image.Exif()
        exif[0x0112] = 6
        path = data / "photos" / "mine" / "gallery" / "5_c0.bmp"
        Image.open(path).save(path, "JPEG", exif=exif)
        prepare(data)
    worth(run, data)
    about, folder = run / "evaluate" / "mine" / "features.json", run / "evaluate" / "mine"
    told = read_json(about)
    q_feats, *rest = load_embeddings(folder / "embeddings.npz")
    save_embeddings(folder / "embeddings.npz", Embeddings(q_feats + 1, *rest))  # as if seen so
    told |= {"file": file_digest(folder / "embeddings.npz")}
    del told["reader"]
    about.unlink()
    if said == "no reader":
        write_json(about, told)
    worth(run, data)
    anew = np.abs(load_embeddings(folder / "embeddings.npz").q_feats - q_feats).max() < 0.5
    assert anew == odd


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "features.json lost"])
def test_another_checkpoint_of_the_same_name_is_evaluated(kept, data, run):
    first, feats = worth(run, data), features(run)
    path = run / "checkpoints" / "best.pt"
    content = torch.load(path, weights_only=True)
    content.pop("digest", None)  # made elsewhere, by another training
    for tensor in content["model"].values():
        if tensor.is_floating_point() and tensor.ndim > 1:
            tensor.mul_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(3)))
    torch.save(content, path)
    if not kept:
        (run / "evaluate" / "mine" / "features.json").unlink()
    again = worth(run, data)
    assert again["protocol"]["weights"] != first["protocol"]["weights"]
    assert not np.array_equal(features(run), feats)


def test_another_classifier_of_the_same_name_is_evaluated(tmp_path):
    few = {"data.shapes.classes": 3, "data.shapes.train_photos": 4, "data.shapes.test_photos": 4}
    few |= {"data.batch_size": 6, "data.val_fraction": 0.0, "train.epochs": 1}
    few |= {"model.backbone": "cdnet", "model.backbone.*.width": 0.25}
    recipe = load_recipe("shapes", overrides=few)
    run = open_run("", recipe, "train", root=tmp_path)
    fit_classes(recipe, run.path, workers=0, data_dir=tmp_path)
    first = evaluate_classes(run.path, workers=0, data_dir=tmp_path)
    assert evaluate_classes(run.path, workers=0, data_dir=tmp_path) == first
    path = run.path / "checkpoints" / "best.pt"
    content = torch.load(path, weights_only=True)
    content.pop("digest", None)  # made elsewhere, by another training
    weight = next(k for k in content["model"] if "classifier" in k)
    content["model"][weight].neg_()
    torch.save(content, path)
    again = evaluate_classes(run.path, workers=0, data_dir=tmp_path)
    assert again["protocol"]["times_opened"] == 2


@pytest.mark.parametrize("way", [dated_back, copied_over], ids=lambda way: way.__name__)
def test_packed_photos_are_of_the_photos_there_are(way, data, tmp_path):
    photos = read_manifest(data / "mine").photos("train")
    before = pack_photos(photos, 24, 12, tmp_path / "packed").copy()
    paint(tmp_path / "other.bmp", 99)
    way(photos.root / photos.paths[3], tmp_path / "other.bmp")
    after = pack_photos(photos, 24, 12, tmp_path / "packed")
    assert [np.array_equal(*pair) for pair in zip(before, after, strict=True)].count(False) == 1
    assert not np.array_equal(before[3], after[3])


def test_photos_that_change_while_they_are_packed(data, tmp_path, monkeypatch):
    from reidlab.data import packed

    photos, real = read_manifest(data / "mine").photos("train"), packed.read_photo

    def meanwhile(path, *size):
        paint(photos.root / photos.paths[0], 5)
        return real(path, *size)

    monkeypatch.setattr(packed, "read_photo", meanwhile)
    with pytest.raises(ValueError, match=r"changed while they were packed"):
        pack_photos(photos, 24, 12, tmp_path / "packed")
    assert not list((tmp_path / "packed").glob("*.npy"))


@pytest.mark.parametrize("state", ["stopped", "finished"])
def test_a_run_does_not_go_on_with_other_photos(state, data):
    run = open_run("r", RECIPE, "train", opened(data).fingerprint, root=data / "runs")
    run.beat(state)
    paint(data / "photos" / "mine" / "train" / "1_c0.bmp", 9)
    with pytest.raises(ValueError, match=r"has changed"):
        opened(data)
    prepare(data)
    with pytest.raises(ValueError, match=r"'r' is another's.*the data's fingerprint is 2:"):
        open_run("r", RECIPE, "train", opened(data).fingerprint, root=data / "runs")


GIVEN = {
    "model.backbone.*.weights": "weights/start.pth",
    "model.backbone.*.genotype": "start.json",
    "train.distill": "runs/teacher/checkpoints/best.pt",
    "train.gan.*.features": "runs/teacher/checkpoints/best.pt",
}


@pytest.mark.parametrize("key", GIVEN)
@pytest.mark.parametrize("state", ["stopped", "finished"])
def test_a_file_that_a_recipe_names_is_part_of_the_run(state, key, lab):
    path = lab.root / GIVEN[key]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"one")
    named = "start.pth" if key.endswith("weights") else str(path)
    if path.name == "best.pt":
        named = "run:teacher"
        (lab.runs / "teacher" / "recipe.yaml").write_text("")
    slots = {"genotype": ("model.backbone", "derived"), "features": ("train.gan", "only")}
    cells = dict([slots[word]]) if (word := key.rsplit(".", 1)[1]) in slots else {}
    said = {"teacher_student": {"teacher": named}} if key.endswith("distill") else named
    recipe = load_recipe("smoke", overrides=cells | {key: said})
    run = open_run("r", recipe, "train")
    run.beat(state)
    assert open_run("r", recipe, "train").name == "r"
    path.write_bytes(b"two")
    with pytest.raises(ValueError, match=rf"'r' is another's.*the file of {re.escape(key)} holds"):
        open_run("r", recipe, "train")
    made = read_json(run.path / "environment.json")
    write_json(run.path / "environment.json", {k: v for k, v in made.items() if k != "given"})
    assert open_run("r", recipe, "train").name == "r"  # a run from before stays usable


def test_a_sweep_does_not_take_a_cell_of_other_photos(data, monkeypatch):
    from reidlab.jobs.grid import plan_cells
    from reidlab.jobs.sweep import run_sweep

    monkeypatch.setenv("REIDLAB_DATA_DIR", str(data))
    (cell,) = plan_cells("smoke", overrides=MINE | {"data.val_fraction": 0.5})
    recipe = cell.resolved()
    run = open_run(cell.name, recipe, "train", opened(data).fingerprint, root=data / "runs")
    run.finish({"val_mAP": 0.5}, seconds=1.0)
    write_json(run.path / "evaluate" / "mine" / "metrics.json", {"metrics": {"mAP": 0.4}})

    def look():
        return run_sweep([cell], launch=None, runs=data / "runs")[0]

    assert look().state == "finished"
    paint(data / "photos" / "mine" / "train" / "1_c0.bmp", 9)
    assert look().state == "failed" and "'mine' has changed" in look().about
    prepare(data)
    assert look().state == "failed" and "on other photos" in look().about


# --- from before contents counted --------------------------------------------------------------


def test_a_manifest_and_a_run_of_before_stay_usable(data):
    told = make_old(data)
    run = open_run("r", RECIPE, "train", told, root=data / "runs")
    now = opened(data).fingerprint
    assert same_data(told, now) and rules_of(now)[1] == told
    assert open_run("r", RECIPE, "train", now, root=data / "runs").path == run.path
    prepare(data)  # the same photos by the new rule
    assert same_data(told, opened(data).fingerprint) and opened(data).fingerprint == now
    make_old(data)
    new = open_run("new", RECIPE, "train", now, root=data / "runs").environment["data"]
    paint(data / "photos" / "mine" / "train" / "1_c0.bmp", 9)  # the old rule sees nothing,
    assert same_data(told, opened(data).fingerprint)
    with pytest.raises(ValueError, match=r"'new' is another's"):  # what began by now's rule does
        open_run("new", RECIPE, "train", opened(data).fingerprint, root=data / "runs")
    assert not same_data(new, opened(data).fingerprint)
    with (data / "photos" / "mine" / "train" / "1_c0.bmp").open("ab") as file:
        file.write(b"!")
    with pytest.raises(ValueError, match=r"has changed.*sizes of files"):
        opened(data)
    assert [f.code for f in examine(read_manifest(data / "mine"))][:1] == ["files-changed"]


@pytest.mark.slow  # it draws two thousand photos
def test_a_record_of_before_is_of_the_set_that_is_drawn_today(tmp_path):
    "The smallest set that a committed record was made on."
    run = RunFolder(project_root() / "results" / "gan_people-generate-s0")
    told = run.environment["data"]
    assert ":" not in told and not same_data(told, "2:0 1:0")
    recipe = run.recipe
    assert same_data(open_data(recipe.data, recipe.seed, tmp_path).fingerprint, told)


TAUGHT = {"teacher_student": {"teacher": "run:teacher"}}


def test_a_teacher_of_before_teaches_the_same_photos(data, monkeypatch):
    monkeypatch.setenv("REIDLAB_RUNS_DIR", str(data / "runs"))
    now = opened(data)
    run = open_run("teacher", RECIPE, "train", rules_of(now.fingerprint)[1])
    from reidlab.training.checkpoint import save_checkpoint
    from reidlab.training.network import architecture_of, model_from_recipe

    model = model_from_recipe(RECIPE, now.n_pids)
    about = architecture_of(model, RECIPE)
    save_checkpoint(run.path / "checkpoints" / "best.pt", model, about, {}, 1, "last")
    student = load_recipe("smoke", overrides=RECIPE.overrides | {"train.distill": TAUGHT})
    check_teacher(student, now)
    about = replace(now.manifest, about=now.manifest.about | {"fingerprint": "2:f00d 1:f00d"})
    with pytest.raises(ValueError, match=r"photos is '.*' there and '2:f00d"):
        check_teacher(student, replace(now, manifest=about))


# --- tables ----------------------------------------------------------------------------------


def lines_of(data):
    return (data / "mine" / "manifest.csv").read_bytes().splitlines(keepends=True)


TABLES = {
    "doubled row": (lambda t: [*t, t[3]], "19 rows, 1 of them.*18 were prepared"),
    "doubled whole": (lambda t: [*t, *t[1:]], "36 rows, 18 of them.*18 were prepared"),
    "cut": (lambda t: t[:-4], "14 rows; 18 were prepared"),
    "one photo twice": (lambda t: [*t[:-1], t[1]], "18 rows, 1 of them"),
    "other order": (lambda t: [t[0], *t[:0:-1]], "18 rows.*another order"),
    "two swapped": (lambda t: [*t[:3], t[4], t[3], *t[5:]], "18 rows.*another order"),
    "other person": (lambda t: [*t[:-1], t[-1].replace(b",7,", b",6,")], "18 rows.*edited"),
    "other camera": (lambda t: [*t[:-1], t[-1].replace(b",1,", b",0,")], "18 rows.*edited"),
    "other split": (lambda t: [x.replace(b"query\n", b"gallery\n") for x in t], "edited"),
    "torn": (lambda t: [*t[:-1], t[-1][:15]], "no manifest"),
    "blank pid": (lambda t: [*t[:-1], t[-1].replace(b",7,", b",,")], "no manifest"),
    "half a person": (lambda t: [*t[:-1], t[-1].replace(b",7,", b",7.5,")], "no manifest"),
    "empty": (lambda t: [], "no manifest"),
    "header alone": (lambda t: t[:1], "0 rows; 18 were prepared"),
    "no header": (lambda t: t[1:], "no manifest"),
    "zeros": (lambda t: [bytes(400)], "no manifest"),
    "a picture": (lambda t: [b"\x89PNG\r\n\x1a\n\0\0\xff\xfe"], "no manifest"),
    "JSON": (lambda t: [b'{"path": "a.jpg"}'], "no manifest"),
}


@pytest.mark.parametrize("old", [False, True], ids=["now", "of before"])
@pytest.mark.parametrize("kind", TABLES)
def test_a_table_that_is_not_the_prepared_one_is_refused(kind, old, data):
    damage, said = TABLES[kind]
    if old:
        make_old(data)
    (data / "mine" / "manifest.csv").write_bytes(b"".join(damage(lines_of(data))))
    with pytest.raises(ValueError) as wrong:
        opened(data)
    told = str(wrong.value)
    assert "manifest.csv" in told and "repare" in told and "\n" not in told and len(told) < 400
    if not old:
        assert pd.Series([told]).str.contains(said).all(), told


CARDS = {
    "empty": b"",
    "torn": b'{"format": 1, "name": "mine", "ro',
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "without keys": b'{"format": 1}',
    "odd types": b'{"format": 1, "name": 3, "root": [], "fingerprint": null}',
    "no format": b'{"format": "one", "name": "a", "root": ".", "fingerprint": "b"}',
    "not UTF-8": b'{"name": "\xff"}',
    "zeros": bytes(64),
}


@pytest.mark.parametrize("kind", CARDS)
def test_a_card_that_is_none_is_refused_by_name(kind, data):
    (data / "mine" / "manifest.json").write_bytes(CARDS[kind])
    with pytest.raises(ValueError) as wrong:
        opened(data)
    told = str(wrong.value)
    assert "manifest.json" in told and "\n" not in told and len(told) < 400


@pytest.mark.parametrize("key", ["rows", "contents", "fingerprint"])
def test_a_card_of_another_set_is_refused(key, data):
    for i, path in enumerate(rows_of()["path"]):
        paint(data / "photos" / "other" / path, 100 + i)
    about = read_json(data / "mine" / "manifest.json")
    other = prepare(data, "other").about
    other = other | {"rows": {"count": 18, "sha256": "0" * 64}}
    write_json(data / "mine" / "manifest.json", about | {key: other[key]})
    with pytest.raises(ValueError, match=r"manifest.csv has 18 rows"):
        opened(data)


@pytest.mark.parametrize("lost", ["manifest.csv", "manifest.json"])
def test_a_manifest_that_lost_a_half(lost, data):
    (data / "mine" / lost).unlink()
    with pytest.raises(FileNotFoundError, match=lost):
        read_manifest(data / "mine")


@pytest.mark.parametrize("program", ["pandas", "spreadsheet"])
def test_the_same_rows_by_another_program_are_the_same(program, data):
    file, before = data / "mine" / "manifest.csv", opened(data).fingerprint
    if program == "pandas":
        pd.read_csv(file).to_csv(file)  # with a column of its own in front
    else:  # a byte order mark, quotes, carriage returns, as spreadsheets write them
        text = json.dumps(file.read_text().splitlines())
        rows = [line.split(",") for line in json.loads(text)]
        quoted = "\r\n".join(",".join(f'"{cell}"' for cell in row) for row in rows)
        file.write_bytes(quoted.encode("utf-8-sig") + b"\r\n")
    assert opened(data).fingerprint == before


def test_photos_and_people_called_na_stay_what_they_are(tmp_path):
    frame = rows_of()
    frame.loc[0, "path"] = "NA"
    for i, path in enumerate(frame["path"]):
        paint(tmp_path / "p" / f"{path}.bmp", i)
        (tmp_path / "p" / f"{path}.bmp").rename(tmp_path / "p" / path)
    write_manifest(tmp_path / "na", "na", frame, tmp_path / "p")
    assert "NA" in set(read_manifest(tmp_path / "na").frame["path"])
