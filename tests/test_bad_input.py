"""Bad input, where a user meets it: one clear line each, and nothing that lay there is touched."""

import json
import shutil
from contextlib import contextmanager

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from conftest import TINY, facts, run_job, tiny_recipe, walk

from reidlab.core.recipe import load_recipe
from reidlab.core.run import RunFolder, open_run, read_json, write_json
from reidlab.core.settings import settings
from reidlab.data import loaders
from reidlab.data.loaders import open_data
from reidlab.data.manifest import COLUMNS, read_manifest, write_manifest
from reidlab.evaluation.evaluate import evaluate_split
from reidlab.models.genotype import PUBLISHED
from reidlab.nas.derive import derive
from reidlab.nas.supernet import supernet_from_recipe
from reidlab.training.checkpoint import read_last
from reidlab.training.fit import fit_from_recipe
from reidlab.training.trained import keep_genotype

TRAIN, EVALUATE, MARKET = "nbs/train.ipynb", "nbs/evaluate.ipynb", "data_prep/market1501.ipynb"


def clear(text, *words):
    "Assert that a message is one short line with all that the reader needs."
    assert "\n" not in text.strip(), text
    assert len(text) < 400, text
    assert all(word in text for word in words), (text, words)


@contextmanager
def refused(*words):
    "The block must raise, and say these words in one line."
    try:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            yield caught
    finally:
        plt.close("all")
    clear(str(caught.value), *words)


def empty(folder):
    return not list(folder.iterdir())


@pytest.fixture
def done(stocked, finished):
    "A laboratory with a finished run: (its folder, the overrides that it ran with)."
    shutil.copytree(finished[0], stocked.runs / "done")
    return stocked.runs / "done", finished[1].overrides


# --- parameters, recipes, settings -----------------------------------------------------------


def test_unknown_parameter_ends_the_job(lab, tmp_path):
    job = run_job(TRAIN, tmp_path / "out.ipynb", gpu=4)
    assert job.rc != 0
    clear(job.last, "parameter 'gpu' not found", "Close names: gpus")
    assert empty(lab.runs) and empty(lab.data)


@pytest.mark.parametrize(
    "page, wrong, words",
    [
        (TRAIN, {"gpus": "four"}, ("gpus", "'four'")),
        (TRAIN, {"overrides": "train.clip=0.1"}, ("overrides", "JSON")),
        (TRAIN, {"overrides": '{"train.epoch": 5}'}, ("train.epoch", "Close names: train.epochs")),
        (TRAIN, {"overrides": '{"trian.clip": 5}'}, ("trian.clip", "Close names: train")),
        (TRAIN, {"overrides": TINY, "run": "../elsewhere"}, ("run", "'../elsewhere'")),
        (EVALUATE, {"recipe": "smoke"}, ("parameter 'recipe' not found", "run, dataset")),
        (EVALUATE, {"run": "smoke-train-s1"}, ("run 'smoke-train-s1' not found", "train.ipynb")),
        (MARKET, {"sorce": "x.zip"}, ("parameter 'sorce' not found", "Close names: source")),
    ],
)
def test_wrong_values_are_named(page, wrong, words, stocked):
    with refused(*words):
        walk(page, **wrong)
    assert empty(stocked.runs) and empty(stocked.results)


def test_misspelt_recipe(lab):
    with refused("recipe 'smoek' not found in recipes/", "Close names: smoke"):
        walk(TRAIN, recipe="smoek")
    assert empty(lab.runs) and empty(lab.data)


@pytest.mark.parametrize(
    "text, words",
    [
        ("train: {epochs: many}", ("train.epochs", "integer", '"many"')),
        ("train: {epochs: true}", ("train", "epochs needs a number", "true")),
        ("train: {epochs: 0}", ("train.epochs", "greater than or equal to 1", "got 0")),
        ("data: {name: [market1501]}", ("data.name", "string", "market1501")),
        ("model: 50", ("model", "got 50")),
        ("train: {epoch: 3}", ("key 'train.epoch' not found", "Close names: train.epochs")),
        ("trian: {epochs: 3}", ("key 'trian' not found", "Close names: train")),
        ("seed: 3", ("seed", "comes from the job")),
        ("base: smok", ("recipe 'smok' not found", "Known: mine")),
        ("- train", ("mine.yaml", "sections")),
        ("train: {epochs: 3", ("mine.yaml is not YAML",)),
    ],
)
def test_wrong_type_or_unknown_key_in_a_recipe(text, words, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with refused("mine", *words):
        load_recipe("mine", folder=tmp_path)


@pytest.mark.parametrize("model", [{"backbone": "resnet5O"}, {"pool": "averge"}, {"neck": "bnnek"}])
def test_unknown_part_of_a_network(model, stocked, tmp_path):
    changes = {f"model.{key}": value for key, value in model.items()}
    with refused(*model, *model.values(), "Close names"):
        walk(TRAIN, overrides=TINY | changes)


def test_unknown_setting(lab, monkeypatch, tmp_path):
    monkeypatch.setenv("REIDLAB_DATADIR", "elsewhere")
    with refused("setting 'datadir' not found", "REIDLAB_DATADIR", "Close names: data_dir"):
        walk(TRAIN)
    monkeypatch.delenv("REIDLAB_DATADIR")
    (tmp_path / "settings.ini").write_text("[reidlab]\nrun_dir = runs\n")
    with refused("setting 'run_dir' not found in settings.ini", "Close names: runs_dir"):
        settings(tmp_path)
    monkeypatch.setenv("REIDLAB_WORKERS", "two")
    with refused("workers", "REIDLAB_WORKERS", "'two'"):
        walk(TRAIN)
    assert empty(lab.runs)


@pytest.mark.parametrize("page", [TRAIN, EVALUATE])
def test_too_many_gpus(page, lab):
    here = torch.cuda.device_count()
    with refused(f"{here + 1} GPUs", f"{here} visible", f"-p gpus {here}", "-p device cpu"):
        walk(page, gpus=here + 1)
    with refused("'cuda'", "-p gpus 1", "-p device cpu"):
        walk(page, device="cuda")
    assert empty(lab.runs) and empty(lab.data)


# --- data ------------------------------------------------------------------------------------


def test_missing_data_set(lab):
    with refused(
        "data set 'market1501' not found in data/", "data_prep/market1501.ipynb", "source"
    ):
        walk(TRAIN, overrides={"data.name": "market1501"})
    assert empty(lab.runs) and empty(lab.data)


def test_missing_source(lab):
    with refused("'market1501' is not here", "Market-1501-v15.09.15.zip", "raw", "-p source"):
        walk(MARKET)
    with refused("source 'nowhere.zip' does not exist", "Market-1501-v15.09.15.zip"):
        walk(MARKET, source="nowhere.zip")
    assert empty(lab.data)


def test_source_that_is_no_data_set(lab):
    (lab.raw / "mine" / "photos").mkdir(parents=True)
    with refused("mine", "bounding_box_train, query, bounding_box_test", "-p source"):
        walk(MARKET, name="mine")
    (lab.raw / "torn.zip").write_bytes(b"PK\x03\x04 and then the line went dead")
    with refused("torn.zip", "neither a zip nor a tar", "download it again"):
        walk(MARKET, name="torn")
    assert not list(lab.data.rglob("manifest.*"))


def without(split, name, lab, photos):
    "The tiny photos as a data set of its own that lacks a split."
    whole = read_manifest(next(photos.iterdir()))
    rows = whole.frame[whole.frame["split"] != split]
    write_manifest(lab.data / name, name, rows[list(COLUMNS)], whole.root)


def test_empty_split(lab, photos, finished):
    without("train", "untaught", lab, photos)
    with refused("'untaught' has no train photos", "'query': 8", "Prepare it again"):
        walk(TRAIN, overrides=TINY | {"data.name": "untaught"})
    assert empty(lab.runs)
    without("query", "unasked", lab, photos)
    shutil.copytree(finished[0], lab.runs / "done")
    before = facts(lab.runs)
    with refused("'unasked' has no query photos", "'gallery': 124", "Prepare it again"):
        walk(EVALUATE, run="done", dataset="unasked")
    assert facts(lab.runs) == before


def test_empty_split_of_a_download(lab, photos):
    tree = next(photos.iterdir())
    for folder in ("bounding_box_train", "bounding_box_test"):
        shutil.copytree(tree / folder, lab.raw / "half" / folder)
    (lab.raw / "half" / "query").mkdir()
    with refused("half has no photos for query", "whole?"):
        walk(MARKET, name="half")
    assert not list(lab.data.rglob("manifest.*"))


def test_no_held_out_people(photos):
    recipe = tiny_recipe(data__val_fraction=0.0)
    data = open_data(recipe.data, recipe.seed, photos)
    with refused("val split", "0 queries", "Set data.val_fraction above 0"):
        evaluate_split(None, recipe, "val", data=data)


def test_fewer_people_than_a_batch_needs(lab, stocked):
    with refused("PKSampler needs 16 identities", "the training set has 8", "data.sampler"):
        walk(TRAIN, overrides=TINY | {"data.sampler.pk.p": 16})


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kept", [True, False], ids=["memory", "disk"])
def test_unreadable_photo_is_named(workers, kept, stocked, monkeypatch):
    monkeypatch.setattr(loaders, "KEEP_BYTES", 2**29 if kept else 0)
    recipe = tiny_recipe()
    data = open_data(recipe.data, recipe.seed)
    torn = data.train.root / data.train.paths[5]
    torn.write_bytes(torn.read_bytes()[:300])
    run = open_run("torn", recipe, verb="train", data=data.fingerprint)
    with pytest.raises(ValueError) as caught:
        fit_from_recipe(recipe, run.path, workers=workers)
    clear(str(caught.value), torn.name, "cannot be read", "Replace the file")
    status = run.status()
    assert status["state"] == "crashed" and torn.name in status["error"]
    assert not list(run.path.rglob("*.pt"))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_query_is_named(workers, done, stocked, monkeypatch):
    monkeypatch.setenv("REIDLAB_WORKERS", str(workers))
    torn = next(stocked.data.glob("*/query/*.jpg"))
    torn.write_bytes(b"not a photo")
    before = facts(stocked.runs)
    with refused(torn.name, "cannot be read", "Replace the file"):
        walk(EVALUATE, run="done")
    assert facts(stocked.runs) == before


# --- runs and checkpoints --------------------------------------------------------------------


def test_finished_run_with_another_recipe(done, stocked):
    ran = done[1]
    before = facts(stocked.runs)
    with refused("'done'", "train.epochs is 3 here and 1 there", "-p run NAME"):
        walk(TRAIN, run="done", overrides=ran | {"train.epochs": 3, "train.clip": 0.5})
    with refused("'done'", "seed is 1 here and 0 there"):
        walk(TRAIN, run="done", overrides=ran, seed=1)
    assert facts(stocked.runs) == before


def test_finished_run_with_other_data(done, stocked):
    ran = done[1]
    before = facts(stocked.runs)
    made = done[0] / "environment.json"
    write_json(made, read_json(made) | {"data": "f00d" * 16})
    before = facts(stocked.runs)
    with refused("'done'", "the data's fingerprint is 2:", "f00df00df00d there", "-p run NAME"):
        walk(TRAIN, run="done", overrides=ran)
    assert facts(stocked.runs) == before


def test_run_that_is_not_finished_is_not_evaluated(done):
    path = done[0]
    RunFolder(path).beat("crashed")
    with refused("'done' is crashed, not finished", "continues"):
        walk(EVALUATE, run="done")
    assert not (path / "evaluate").exists()


def continued(done, **changes):
    "A run folder that begins with another run's checkpoints; (its folder, its overrides)."
    path, ran = done
    overrides = ran | {key.replace("__", "."): value for key, value in changes.items()}
    recipe = load_recipe("smoke", overrides=overrides)
    data = open_data(recipe.data, recipe.seed)
    run = open_run("other", recipe, verb="train", data=data.fingerprint)
    shutil.copytree(path / "checkpoints", run.path / "checkpoints")
    return run.path, overrides


def test_checkpoint_of_another_architecture_is_not_continued(done):
    path, overrides = continued(done, model__pool="max", data__height=80)
    before = facts(path / "checkpoints")
    words = "pool is 'avg' there and 'max' here", "size is [64, 32] there and [80, 32] here"
    with refused("last.pt", *words, "its own recipe"):
        walk(TRAIN, run="other", overrides=overrides)
    assert facts(path / "checkpoints") == before
    assert RunFolder(path).status()["state"] == "crashed"


def test_checkpoint_of_another_architecture_is_not_evaluated(done):
    path = done[0]
    recipe = path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("neck_feat: after", "neck_feat: before"))
    before = facts(path)
    with refused("best.pt of done", "neck_feat is 'after' there and 'before' here"):
        walk(EVALUATE, run="done")
    assert facts(path) == before


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def foreign(file):
    torch.save({"state_dict": {"fc.weight": torch.zeros(2, 2)}}, file)


def pickled(file):
    torch.save({"architecture": {}, "model": pd.DataFrame({"a": [1]})}, file)


@pytest.mark.parametrize("harm", [cut, foreign, pickled])
def test_unreadable_checkpoint(harm, done):
    path, overrides = continued(done, train__epochs=3)
    harm(path / "checkpoints" / "last.pt")
    before = facts(path / "checkpoints")
    with refused("last.pt", "not written by reidlab"):
        walk(TRAIN, run="other", overrides=overrides)
    assert facts(path / "checkpoints") == before


def test_checkpoint_cut_off_gives_way_to_the_one_before(done):
    folder = done[0] / "checkpoints"
    shutil.copy(folder / "last.pt", folder / "previous.pt")
    cut(folder / "last.pt")
    with pytest.warns(
        UserWarning, match=r"last\.pt cannot be read .* Continuing from previous\.pt"
    ):
        assert read_last(folder)["epoch"] == 1


def test_checkpoint_of_a_newer_format(done):
    file = done[0] / "checkpoints" / "best.pt"
    torch.save(torch.load(file, weights_only=True) | {"format": 9}, file)
    before = facts(done[0])
    with refused("best.pt", "format 9", "up to 1", "Update reidlab"):
        walk(EVALUATE, run="done")
    assert facts(done[0]) == before


# --- genotypes and search spaces -------------------------------------------------------------

CELLS = {  # the smallest network of a genotype
    "model.backbone": "derived",
    "model.backbone.*.init_channels": 4,
    "model.backbone.*.cells_per_stage": [1, 1],
    "model.backbone.*.stem": "conv3x2",
}


def written(folder, **changes):
    "The published genotype with other fields, as a file; its path."
    file = folder / "genotype.json"
    file.write_text(json.dumps(json.loads(PUBLISHED["auto_reid"].to_json()) | changes))
    return file


def with_edge(*edge):
    "The published normal cell with another first edge."
    cell = PUBLISHED["auto_reid"].plain()["normal"]
    return [[list(edge), cell[0][1]], *cell[1:]]


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"normal": with_edge("sep_conv_3x4", 0)},
            ("op 'sep_conv_3x4' not found", "Close names: sep_conv_3x3"),
        ),
        ({"normal": with_edge("sep_conv_3x3", 2)}, ("normal node 2", "from node 2", "0 to 1")),
        ({"normal": with_edge("sep_conv_3x3")}, ("normal node 2", "(op, source)", "3x3']")),
        (
            {"ops": ["sep_conv_3x3", "skip_connect", "none"]},
            ("op of space reid 'dil_conv_3x3' not found", "Close names: sep_conv_3x3"),
        ),
        ({"normal_concat": [2, 3, 6]}, ("normal_concat", "from 2 to 5", "got [2, 3, 6]")),
        ({"reduce_concat": [2, 2]}, ("reduce_concat", "different nodes", "got [2, 2]")),
        ({"format": 9}, ("format 9", "up to 1", "Update reidlab")),
    ],
    ids=["op", "source", "edge", "ops", "concat", "concat-twice", "newer"],
)
def test_wrong_genotype_file(changes, words, stocked, tmp_path):
    file = written(tmp_path, **changes)
    before = file.read_bytes()
    with refused(file.name, tmp_path.name, *words):
        walk(TRAIN, overrides=TINY | CELLS | {"model.backbone.*.genotype": str(file)})
    assert file.read_bytes() == before
    assert empty(stocked.runs)


def test_genotype_of_layers_where_cells_are_needed(stocked, tmp_path):
    file = written(tmp_path, space="cdnet", layers=[[3, 5, 1]])
    with refused("'derived' needs a genotype of cells", "'cdnet'", "a list of layers"):
        walk(TRAIN, overrides=TINY | CELLS | {"model.backbone.*.genotype": str(file)})
    assert not list(stocked.runs.rglob("*.pt"))


def test_genotype_file_cut_off(stocked, tmp_path):
    file = written(tmp_path)
    cut(file)
    before = file.read_bytes()
    with refused(file.name, tmp_path.name, "JSON"):
        walk(TRAIN, overrides=TINY | CELLS | {"model.backbone.*.genotype": str(file)})
    assert file.read_bytes() == before
    assert not list(stocked.runs.rglob("genotype.json"))


def test_missing_genotype_file(stocked, tmp_path):
    with refused("no genotype file at", "elsewhere.json", "Search first"):
        walk(
            TRAIN,
            overrides=TINY
            | CELLS
            | {"model.backbone.*.genotype": str(tmp_path / "elsewhere.json")},
        )


@pytest.mark.parametrize(
    "name, words",
    [
        ("auto_ried", ("genotype 'auto_ried' not found", "Close names: auto_reid")),
        ("", ("genotype '(empty)' not found", "Known: auto_reid")),
        ("random:many", ("genotype 'random:many' not found", "random:SEED")),
    ],
)
def test_misspelt_genotype(name, words, stocked):
    with refused(*words, "run:NAME", "the path of a genotype.json"):
        walk(TRAIN, overrides=TINY | CELLS | {"model.backbone.*.genotype": name})
    assert not [*stocked.runs.rglob("*.pt"), *stocked.runs.rglob("genotype.json")]


def test_genotype_of_a_run_that_has_none(done, stocked):
    before = facts(done[0])
    with refused("run 'done' holds no genotype.json", "nbs/search.ipynb", "-p run done"):
        walk(TRAIN, overrides=TINY | CELLS | {"model.backbone.*.genotype": "run:done"})
    assert facts(done[0]) == before
    with refused("run 'dome' not found in runs/", "Close names: done"):
        walk(TRAIN, run="other", overrides=TINY | CELLS | {"model.backbone.*.genotype": "run:dome"})
    assert facts(done[0]) == before


@pytest.mark.parametrize("option", [{"genotype": "auto_reid"}, {"init_channels": 16}])
def test_genotype_without_cells_to_put_it_in(option, stocked):
    ((key, value),) = option.items()
    with refused(f"option of model.backbone.small_cnn {key!r} not found", f"{key} is an option of"):
        walk(TRAIN, overrides=TINY | {"model.backbone": {"small_cnn": {key: value}}})


def test_channels_too_few_for_part_aware(stocked):
    words = "part_aware needs 3 channels", "got 2", "Raise init_channels"
    thin = {"model.backbone.*.genotype": "auto_reid", "model.backbone.*.init_channels": 1}
    with refused(*words):
        walk(TRAIN, overrides=TINY | CELLS | thin)
    with refused(*words):
        supernet_from_recipe(tiny_recipe(**{"search__space__*__init_channels": 2}), n_pids=8)


@pytest.mark.parametrize(
    "search, words",
    [
        (
            {"ops": ["sep_conv_3x3", "skip_connect"]},
            ("needs 'none'", "got sep_conv_3x3, skip_connect", "add 'none'"),
        ),
        ({"ops": ["none"]}, ("an op besides 'none'",)),
        ({"ops": ["none", "sep_conv_3x3", "none"]}, ("'none' stands twice", "name each once")),
        (
            {"ops": ["sep_conv_3x4", "none"]},
            ("op 'sep_conv_3x4' not found", "Close names: sep_conv_3x3"),
        ),
    ],
)
def test_wrong_operations(search, words):
    recipe = tiny_recipe(**{f"search__space__*__{key}": v for key, v in search.items()})
    with refused(*words):
        supernet_from_recipe(recipe, n_pids=8)


def test_alphas_without_none_have_no_softmax_rule():
    alpha = torch.zeros(14, 2)
    with refused("needs 'none'", "got sep_conv_3x3, skip_connect", "add 'none'"):
        derive(alpha, alpha, ("sep_conv_3x3", "skip_connect"))
    with refused("2 columns", "3 ops", "Name the ops"):
        derive(alpha, alpha, ("sep_conv_3x3", "skip_connect", "none"))


def test_genotype_that_changed_behind_its_reference(stocked, tmp_path):
    file = written(tmp_path)
    recipe = load_recipe("smoke", overrides=TINY | CELLS | {"model.backbone.*.genotype": str(file)})
    data = open_data(recipe.data, recipe.seed)
    run = open_run("begun", recipe, verb="train", data=data.fingerprint)
    keep_genotype(recipe, run.path)
    copy = (run.path / "genotype.json").read_bytes()
    written(tmp_path, normal=with_edge("dil_conv_3x3", 0))
    with refused("genotype.json", "no longer the genotype", "'begun'", "Choose a new run name"):
        fit_from_recipe(recipe, run.path, workers=0)
    assert (run.path / "genotype.json").read_bytes() == copy
    assert not list(run.path.rglob("*.pt"))


def test_run_whose_genotype_was_cut_off_is_not_evaluated(stocked):
    recipe = tiny_recipe(
        **{key.replace(".", "__"): value for key, value in CELLS.items()},
        **{"model__backbone__*__genotype": "auto_reid"},
        train__epochs=1,
        data__val_fraction=0.0,
    )
    data = open_data(recipe.data, recipe.seed)
    run = open_run("derived", recipe, verb="train", data=data.fingerprint)
    fit_from_recipe(recipe, run.path, workers=0)
    cut(run.path / "genotype.json")
    before = facts(stocked.runs)
    with refused("genotype.json", "derived", "JSON"):
        walk(EVALUATE, run="derived")
    assert facts(stocked.runs) == before


# --- tricks of the baselines, misspelt ---------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"loss.triplet.margin": "0,3"}, ("loss.triplet.margin", "'soft'", '"0,3"')),
        ({"data.augment.erase.fill": "blakc"}, ("data.augment.erase.fill", "black", "blakc")),
        ({"train.distill": {"teacher_student": {"teacher": "run:nobody"}}}, ("nobody", "runs")),
        ({"model.head": "pcb", "model.head.*.cosines": "concat"}, ("concat", "concat_classifier")),
        ({"loss.am": {}}, ("am", "model.head", "cosine")),
        ({"model.backbone": "se_resnet5"}, ("se_resnet50",)),
    ],
)
def test_a_trick_that_cannot_be_meant_leaves_no_run(lab, overrides, words):
    with refused(*words):
        walk(TRAIN, recipe="smoke", overrides=TINY | {"model.neck.*.embedding": 8} | overrides)
    assert empty(lab.runs)


def test_a_row_that_is_not_there_is_named(lab):
    with refused("row 'R99' not found in recipe 'lite'. Known: ", "recipes/lite.yaml shows all"):
        walk("nbs/sweep.ipynb", recipe="lite", rows=["R99"])
    assert empty(lab.runs)
