"""What recipe and manifest already tell is refused before there is a run folder, with the way out."""

import numpy as np
import pandas as pd
import pytest
from conftest import tiny_recipe
from PIL import Image

from reidlab.core.recipe import load_recipe
from reidlab.core.run import open_run
from reidlab.data.loaders import can_be_found, find_manifest, open_data
from reidlab.data.manifest import Photos, write_manifest
from reidlab.evaluation.evaluate import own_camids
from reidlab.evaluation.evaluate_run import evaluate_run
from reidlab.jobs.parameters import RecipeJob, check_parameters
from reidlab.jobs.tasks import plan_training
from reidlab.jobs.verbs import search, train
from reidlab.nas.checks import check_judged, check_search
from reidlab.retrieval.roles import has_match
from reidlab.training.fit import fit_from_recipe

SMALL = {
    "data__name": "own",
    "data__height": 32,
    "data__width": 16,
    "data__sampler": {"pk": {"p": 2, "k": 2}},
}
ALONE = {"data.sampler.pk.p": 1, "data.sampler.pk.k": 1, "loss.triplet.weight": 0.0}


def own_set(lab, camids, people=12, photos=4, classes=None):
    "A prepared set whose training part the cameras are given of; a picture for every row."
    root = lab.root / "photos"
    root.mkdir()
    rows = [(f"{i}.png", i // photos, camids(i), "train") for i in range(people * photos)]
    tests = [(100 + i // 4, i % 2, "query" if i % 4 == 0 else "gallery") for i in range(8)]
    rows += [(f"t{i}.png", *row) for i, row in enumerate(tests)] if classes is None else []
    for path, *_ in rows:
        Image.new("RGB", (16, 32), (hash(path) % 256, 90, 120)).save(root / path)
    frame = pd.DataFrame(rows, columns=["path", "pid", "camid", "split"])
    return write_manifest(lab.data / "own", "own", frame, root, classes=classes)


def own_recipe(**more):
    return tiny_recipe(**SMALL | {"data__val_fraction": 0.25} | more)


def one_line(error):
    "A sweep shows the first line of an error, 300 signs of it."
    text = str(error.value)
    assert "\n" not in text and len(text) <= 300, text
    return text


WAYS_OUT = ("Set data.val_fraction to 0 or train.validate_every to 0",)


@pytest.mark.parametrize(
    ("camids", "photos", "words"),
    [
        (lambda i: 0, 4, "of the 3 identities held out of 12 none was seen by a second camera"),
        (lambda i: i // 4 % 3, 4, "of the 3 identities held out of 12 none was seen by a second"),
        (lambda i: -1, 1, "of the 3 identities held out of 12 none has a second photo"),
    ],
    ids=["one camera", "each person by its own camera", "a photo each, no camera"],
)
def test_a_validation_with_nobody_to_find_is_refused(lab, camids, photos, words):
    own_set(lab, camids, photos=photos)
    pairs = {"loss": {"softmax": {}}} if photos == 1 else {}
    with pytest.raises(ValueError, match=words) as error:
        plan_training(own_recipe(**pairs))
    assert all(way in one_line(error) for way in WAYS_OUT)
    with pytest.raises(ValueError, match=words):
        train(job(SMALL | {"data__val_fraction": 0.25}))
    assert not list(lab.runs.iterdir()), "refused before there is a run folder"
    plan_training(own_recipe(data__val_fraction=0.0))
    plan = plan_training(own_recipe(train__validate_every=0, train__epochs=1))
    run = open_run("once", own_recipe(), verb="train", data=plan.data.fingerprint)
    last = own_recipe(train__validate_every=0, train__epochs=1)
    assert "last epoch" in plan.fit(recipe=last, folder=run.path, validate=plan.judge)["selection"]


def job(changes):
    "The parameters of a job on the small set."
    dotted = {k.replace("__", "."): v for k, v in changes.items()}
    dotted |= {"train.epochs": 1}
    return check_parameters({"recipe": "smoke", "device": "cpu", "overrides": dotted}, RecipeJob)


BATCHES = [
    ({"data.sampler.pk.p": 16, "data.sampler.pk.k": 4, "data.val_fraction": 0.1}, 0, r"the training set has 10. .*2 of 12 identities are held out .data.val_fraction 0.1.. p 10 with k 4 would do"),
    ({"data.sampler.pk.p": 16, "data.val_fraction": 0.0}, 0, "the training set has 12. Lower p of data.sampler. p 12 with"),
    ({"data.sampler": {"random": {"p": 9, "k": 8}}, "loss.triplet.weight": 0.0}, 0, r"needs 72 photos .*3 of 12 identities are held out.* p 4 with k 8 would do"),
    (ALONE, 0, "a batch norm cannot learn from one photo, and p × k of data.sampler is 1 for 1 process"),
    ({"data.sampler.pk.p": 2, "data.sampler.pk.k": 1, "loss.triplet.weight": 0.0, "train.sync_bn": False}, 2, "cannot learn from one photo, and p × k of data.sampler is 2 for 2 processes"),
    ({"data.sampler.pk.p": 1, "data.sampler.pk.k": 4}, 0, "the loss cannot learn from batches of p 1 × k 4"),
    ({"data.sampler.pk.p": 2, "train.gather": False}, 2, "the loss cannot learn from batches of p 2 × k 2 in 2 processes"),
    ({"data.sampler.pk.p": 3}, 2, "p = 3 people cannot be shared by 2 processes.* p 2 with k 2 would do"),
    ({"data.val_fraction": 0.9}, 0, "leaves 1 to train on; 2 are needed. Set data.val_fraction to 0"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "gpus", "words"), BATCHES)
def test_batches_that_cannot_be_had_are_refused(lab, changes, gpus, words):
    own_set(lab, lambda i: i % 3)
    recipe = own_recipe(**{k.replace(".", "__"): v for k, v in changes.items()})
    with pytest.raises(ValueError, match=words) as error:
        plan_training(recipe, gpus)
    one_line(error)


def test_what_was_trained_before_is_trained_still(lab):
    "People of one photo, a camera unknown here and there, two people in a batch."
    own_set(lab, lambda i: [0, 1, -1, 0][i % 4])
    for more in (
        {},
        {"data__sampler": {"pk": {"p": 4, "k": 3}}},
        {"train__validator": "single_shot"},
    ):
        plan_training(own_recipe(**more))


CLASSES = [
    ({"data.batch_size": 64}, 0, r"a batch needs 64 photos, the training set has 36.* 12 photos are held out"),
    ({"data.batch_size": 9}, 2, "a batch of 9 photos cannot be shared by 2 processes"),
    ({"data.batch_size": 1, "model.neck": "bnneck"}, 0, "a batch norm cannot learn from one photo, and data.batch_size is 1"),
    ({"train.distill": {"teacher_student": {"teacher": "run:a"}}}, 0, "train.distill is for task reid, .* got teacher_student. Leave it at none"),
    ({"train.validator": {"single_shot": {"draws": 3}}}, 0, "train.validator is for task reid, .* Leave it at market"),
    ({"data.resize": 20}, 0, "data.resize 20 is smaller than the photo that the network takes"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "gpus", "words"), CLASSES)
def test_classes_that_cannot_be_learned_are_refused(lab, changes, gpus, words):
    own_set(lab, lambda i: -1, people=4, photos=12, classes=list("abcd"))
    shape = {"data.name": "own", "data.height": 32, "data.width": 32, "data.val_fraction": 0.25}
    with pytest.raises(ValueError, match=words) as error:
        plan_training(load_recipe("shapes", overrides=shape | changes), gpus)
    one_line(error)


@pytest.mark.parametrize(
    ("photos", "classes", "words"),
    [(1, "abcd", "needs 2 photos of every class.*Set val_fraction to 0"), (12, "abcde", "1 of 5 classes have no photo to learn from; first: 'e'")],
)  # fmt: skip
def test_a_class_without_photos_enough_is_refused(lab, photos, classes, words):
    own_set(lab, lambda i: -1, people=4, photos=photos, classes=list(classes))
    more = {"data.name": "own", "data.val_fraction": 0.25, "data.batch_size": 2}
    with pytest.raises(ValueError, match=words):
        plan_training(load_recipe("shapes", overrides=more))


def test_a_search_is_refused_as_a_training_is(lab):
    own_set(lab, lambda i: 0)
    recipe = own_recipe()
    data = open_data(recipe.data, recipe.seed)
    words = "nobody could be found in validation.*or search.validate_every to 0"
    with pytest.raises(ValueError, match=words):
        check_judged(recipe, data)
    with pytest.raises(ValueError, match=words):
        search(job(SMALL | {"data__val_fraction": 0.25}))
    assert not list(lab.runs.iterdir())
    check_judged(own_recipe(search__validate_every=0), data)
    many = own_recipe(search__p=10, search__split="identities")
    with pytest.raises(ValueError, match=r"4 identities there are \(data.val_fraction 0.25 held out, cut in two.*search.p 4 would do"):  # fmt: skip
        check_search(many, data.n_pids, train=data.train)


def test_a_test_with_nobody_to_find_is_refused_before_it_is_opened(lab):
    manifest = own_set(lab, lambda i: i % 3)
    recipe = own_recipe(train__epochs=1, data__val_fraction=0.0)
    run = open_run("done", recipe, verb="train", data=manifest.fingerprint)
    fit_from_recipe(recipe, run.path, workers=0)
    test = manifest.frame["split"] != "train"
    blind = manifest.frame.assign(camid=manifest.frame["camid"].mask(test, 5))
    apart = manifest.frame.assign(
        pid=manifest.frame["pid"].mask(manifest.frame["split"] == "query", 900)
    )
    for name, frame in (("blind", blind), ("apart", apart)):
        write_manifest(lab.data / name, name, frame[test], manifest.root)
        with pytest.raises(
            ValueError, match=f"nobody could be found in the test of {name}.*Nothing was embedded"
        ):
            evaluate_run(run.path, name, workers=0)
    pooled = {"evaluate.multi_query": "mean"}
    with pytest.raises(ValueError, match="no multi_query photos"):
        evaluate_run(run.path, overrides=pooled, workers=0)
    assert not (run.path / "evaluate").exists(), "nothing was embedded, and no opening counted"
    assert evaluate_run(run.path, workers=0)["protocol"]["times_opened"] == 1


def test_junk_in_training_is_nobody(lab):
    manifest = own_set(lab, lambda i: i % 3)
    frame = manifest.frame.assign(pid=manifest.frame["pid"].where(manifest.frame["pid"] != 3, -1))
    write_manifest(lab.data / "own", "own", frame, manifest.root)
    data = open_data(own_recipe().data, 0)
    assert data.n_pids == 11 - 3 and (data.train.pids >= 0).all()
    assert (data.val_query.pids >= 0).all() and (data.val_gallery.pids >= 0).all()


@pytest.mark.parametrize("seed", range(20))
def test_who_can_be_found_is_what_the_protocol_finds(tmp_path, seed):
    random, sides = np.random.default_rng(seed), []
    for n in (7, 9):
        names = [f"{i}.jpg" for i in random.integers(0, 30, n)]
        sides.append(Photos(tmp_path, names, random.integers(-1, 3, n), random.integers(-1, 2, n)))
    labels = {}
    for side in sides:  # a file has one pid and one camera
        told = zip(side.paths, side.pids, side.camids, strict=True)
        rows = [labels.setdefault(path, (pid, camid)) for path, pid, camid in told]
        side.pids[:], side.camids[:] = np.array(rows).T
    query, gallery = sides
    want = has_match(query.pids, gallery.pids, *own_camids(query, gallery))
    assert can_be_found(query, gallery).tolist() == want.tolist()


def test_the_synthetic_sets_pass_the_door(photos, monkeypatch):
    "What ran before runs: the tiny recipe, with every judge."
    monkeypatch.setenv("REIDLAB_DATA_DIR", str(photos))
    find_manifest(tiny_recipe().data, photos)
    for judge in ("market", "rules", "single_shot"):
        plan_training(tiny_recipe(train__validator=judge))
