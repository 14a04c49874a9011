"""The packed cache under bad luck: killed builders, two at once, no room; and whole batches through the loader."""

import os
import signal

import numpy as np
import pytest
import torch
from conftest import tiny_recipe

from reidlab.core.files import part_of
from reidlab.core.parts import part
from reidlab.core.recipe import load_recipe
from reidlab.core.run import open_run
from reidlab.core.seed import rng
from reidlab.data import loaders, packed
from reidlab.data.loaders import eval_loader, open_data, open_photos, train_loader
from reidlab.data.packed import pack_photos, packed_files, packed_path
from reidlab.data.transforms import read_photo
from reidlab.training.fit import fit_from_recipe

SIZE = (32, 16)


@pytest.fixture(scope="module")
def people(photos):
    recipe = tiny_recipe()
    train = open_data(recipe.data, recipe.seed, photos).manifest.photos("train")
    return train.take(np.arange(16))._replace(whole=None)


@pytest.fixture(scope="module")
def truth(people):
    return np.stack([read_photo(people.root / path, *SIZE).numpy() for path in people.paths])


def in_a_child(work):
    "Start `work` in a forked process; its id."
    if (child := os.fork()) == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            code = work() or 0
        finally:
            os._exit(code)
    return child


def ended(child):
    "How a child ended: its exit code, or minus the signal."
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("trial", range(20))
def test_a_killed_build_leaves_no_cache(trial, people, truth, tmp_path, monkeypatch):
    left = int(rng(7, trial).integers(len(people.paths)))

    def fatal(*args):
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return read_photo(*args)

    with monkeypatch.context() as patch:
        patch.setattr(packed, "read_photo", fatal)
        assert ended(in_a_child(lambda: pack_photos(people, *SIZE, tmp_path) and 0)) == -9
    assert packed_files(tmp_path) == [] and len(list(tmp_path.glob(".*.part"))) == 1
    other = people.take(np.arange(5))._replace(whole=None)
    if trial % 2:  # whoever comes next clears up, also behind another cache's builder
        pack_photos(other, *SIZE, tmp_path)
        assert not list(tmp_path.glob(".*.part"))
    assert np.array_equal(pack_photos(people, *SIZE, tmp_path), truth)
    assert {p.suffix for p in tmp_path.iterdir()} == {".npy"}


def test_a_cache_is_not_cleared_away_under_a_living_builder(people, tmp_path):
    living = packed_path(people, *SIZE, tmp_path)
    with part_of(living) as part:
        pack_photos(people.take(np.arange(5))._replace(whole=None), *SIZE, tmp_path)
        assert part.exists()


def test_two_processes_build_one_cache(people, truth, tmp_path, monkeypatch, capfd):
    "Both ask before either has it; one reads every photo, the other waits and reads none."
    ready, go = os.pipe(), os.pipe()
    told = os.pipe()

    def work():
        read = 0

        def counted(*args):
            nonlocal read
            read += 1
            if read == 1:  # in the middle of building, until both have begun
                os.write(told[1], b"b")
                os.read(go[0], 1)
            return read_photo(*args)

        monkeypatch.setattr(packed, "read_photo", counted)
        os.write(ready[1], b"r")
        pixels = pack_photos(people, *SIZE, tmp_path)
        return 10 + bool(read) if np.array_equal(pixels, truth) and read in (0, len(truth)) else 1

    children = [in_a_child(work) for _ in range(2)]
    assert os.read(ready[0], 1) + os.read(ready[0], 1) == b"rr"
    assert os.read(told[0], 1) == b"b"
    os.write(go[1], b"gg")  # a second builder, which must not be, would wait as well
    assert sorted(map(ended, children)) == [10, 11]
    ((path, size),) = packed_files(tmp_path)
    assert list(tmp_path.iterdir()) == [path] and size == truth.nbytes + 128


def batches(recipe, photos, cache, **options):
    "Two epochs of a recipe's training batches."
    data = recipe.data.model_copy(update={"cache": cache})
    loader = train_loader(photos, data, recipe.seed, **options)
    for epoch in (0, 3):
        loader.batch_sampler.set_epoch(epoch)
        yield from loader


PEOPLE = {"data.synthetic.train_pids": 20, "data.synthetic.test_pids": 4}


@pytest.fixture(scope="module")
def more_people(tmp_path_factory):
    return tmp_path_factory.mktemp("more")


@pytest.mark.parametrize(
    "name", ["smoke", "first_look", "first_look.handmade", "vehicles8", "strong", "lite"]
)
def test_whole_batches_are_those_of_the_definition(name, more_people):
    "Sizes, colours, borders and boxes of the recipes that records were made with."
    stem, _, row = name.partition(".")
    people = tiny_recipe(**{k.replace(".", "__"): v for k, v in PEOPLE.items()}).data
    small = {
        "name": "synthetic",
        "synthetic": people.synthetic,
        "sampler": part("data.sampler", {"pk": {"p": 4, "k": 2}}),
    }
    recipe = load_recipe(f"{stem}/{row}" if row else stem)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=small)})
    photos = open_data(recipe.data, 0, more_people).train
    photos = photos.take(np.isin(photos.pids, np.unique(photos.pids)[:5]))._replace(whole=None)
    plain = list(batches(recipe, photos, "off"))
    for cache, options in [("auto", {}), ("on", {}), ("on", {"device": "cpu"})]:
        if options and "beyond" in str(train_loader(photos, recipe.data).dataset.slower):
            continue
        ours = list(batches(recipe, photos, cache, **options))
        for one, other in zip(plain, ours, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    plain, ours = (list(eval_loader(photos, recipe.data, 7, cache=c)) for c in ("off", "on"))
    for one, other in zip(plain, ours, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_one_cache_serves_every_seed_and_both_halves(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("REIDLAB_CACHE_DIR", str(tmp_path))
    recipe = tiny_recipe()
    for seed in (0, 1):
        data = open_data(recipe.data, seed, photos)
        for some in (data.train, data.val_query, data.train.take(np.arange(4))):
            files = open_photos(some, *SIZE, "on")
            assert files.place == "disk" and torch.equal(files[2], files.read(2))
    assert len(packed_files(tmp_path)) == 1


@pytest.mark.parametrize("trouble", ["full", "closed"])
def test_without_a_place_for_it_training_goes_on_and_says_so(
    trouble, photos, tmp_path, monkeypatch
):
    wall = tmp_path / "wall"
    wall.write_text("a file where the folder would be")
    monkeypatch.setenv("REIDLAB_CACHE_DIR", str(wall if trouble == "closed" else tmp_path / "c"))
    monkeypatch.setattr(loaders, "KEEP_BYTES", 0)
    monkeypatch.setattr(loaders, "_KEPT", {})  # another test may hold a copy of these photos
    if trouble == "full":
        monkeypatch.setattr(loaders, "SPARE", 2**60)
    recipe = tiny_recipe(train__epochs=1, data__val_fraction=0.0)
    data = open_data(recipe.data, recipe.seed, photos)
    run = open_run(trouble, recipe, verb="train", data=data.fingerprint, root=tmp_path / "runs")
    fit_from_recipe(recipe, run.path, workers=0, data_dir=photos)
    (told,) = run.events("input")
    assert told["photos"] == "files" and told["why"].startswith("not packed: ")
    assert ("MiB free" if trouble == "full" else "wall") in told["why"]
    if trouble == "closed":
        with pytest.raises(OSError, match="wall"):
            open_photos(data.train, *SIZE, "on")
