"One rule for the names of runs, sets and recipes: no name leads out of its folder, or is too long for one."

import json

import pandas as pd
import pytest

from reidlab.core.names import unknown
from reidlab.core.recipe import Recipe, load_recipe, recipe_card
from reidlab.core.run import find_run, keep_run, open_run
from reidlab.data.joined import join
from reidlab.data.manifest import load_manifest, read_manifest, write_manifest
from reidlab.evaluation.lists import read_ranking
from reidlab.jobs.grid import plan_cells
from reidlab.jobs.parameters import EvaluateJob, RecipeJob, check_parameters
from reidlab.jobs.prepare import PrepareJob
from reidlab.jobs.prepare_lists import PrepareVeriwild
from reidlab.jobs.prepare_made import PrepareJoined, PrepareOwn, PrepareSynthetic

AWAY = ["../../x", "/etc/x", "a/b", "..", ".", ".hidden", "-x", "a b", "a\nb", "a\0b", "a\\b", "~"]
LONG = ["x" * 101, "ä" * 51, "y" * 300, "z" * 70_000]
OURS = ["synthetic", "Synthetic", "synthetic_shapes", "synthetic-0a1b2c3d4e", "shapes-1", "packed"]


def refused(call, name):
    "One line that stays short whatever the name is."
    with pytest.raises((ValueError, FileNotFoundError)) as said:
        call(name)
    text = str(said.value)
    assert type(said.value) in (ValueError, FileNotFoundError), "an error of our own"
    assert "\n" not in text and len(text) < 900, text[:300]
    assert "plain folder name" in text or "not found" in text or "belong to what is" in text, text


@pytest.mark.parametrize("name", [*AWAY, *LONG, *OURS, ""], ids=lambda n: ascii(n[:12]))
@pytest.mark.parametrize(
    "schema", [PrepareJob, PrepareOwn, PrepareSynthetic], ids=lambda s: s.__name__
)
def test_a_data_page_writes_nowhere_else(name, schema):
    refused(lambda n: check_parameters({"name": n}, schema), name)


@pytest.mark.parametrize("name", [*AWAY, *LONG], ids=lambda n: ascii(n[:12]))
def test_nor_does_any_other_reader_of_a_name(name, lab):
    refused(lambda n: check_parameters({"name": n}, PrepareVeriwild), name)
    refused(lambda n: check_parameters({"name": n}, PrepareJoined), name)
    refused(lambda n: check_parameters({"run": n}, RecipeJob), name)
    refused(lambda n: check_parameters({"run": n}, EvaluateJob), name)
    refused(lambda n: open_run(n, Recipe(), "train"), name)
    refused(find_run, name)
    refused(keep_run, name)
    refused(load_manifest, name)
    if name != "a/b":  # a row of a recipe
        refused(load_recipe, name)
    refused(recipe_card, name)
    refused(lambda n: read_ranking(open_run("r", Recipe(), "train").path, n), name)


def test_what_a_page_makes_itself_may_be_empty():
    assert check_parameters({"name": ""}, PrepareVeriwild).name == ""
    assert check_parameters({"name": ""}, PrepareJoined).name == ""
    assert check_parameters({"run": ""}, RecipeJob).run == ""
    assert check_parameters({"name": "x" * 100, "out": "../.."}, PrepareOwn).out == "../.."


@pytest.mark.parametrize("place", ["x" * 256, "a/" + "ö" * 128, "a\0b"])
@pytest.mark.parametrize("which", ["out", "source"])
def test_a_place_that_no_disk_can_hold(which, place):
    with pytest.raises(ValueError, match=f"parameter {which}: needs a path") as said:
        check_parameters({which: place}, PrepareOwn)
    assert len(str(said.value)) < 300


def small_set(folder, name):
    "Two people by two cameras, in every split."
    rows = [(f"{p}{c}.jpg", p, c, "train") for p in (1, 2) for c in (0, 1)]
    rows += [("q.jpg", 3, 0, "query"), ("g.jpg", 3, 1, "gallery")]
    frame = pd.DataFrame(rows, columns=["path", "pid", "camid", "split"])
    folder.mkdir(parents=True, exist_ok=True)
    for path in frame["path"]:
        (folder / path).write_bytes(f"{name}{path}".encode())
    return write_manifest(folder, name, frame, folder)


@pytest.mark.parametrize("name", ["../x", "a b", "x" * 101])
def test_a_manifest_is_written_and_read_under_a_plain_name(tmp_path, name):
    refused(lambda n: small_set(tmp_path / "bad", n), name)
    assert not (tmp_path / "bad" / "manifest.csv").exists()
    good = small_set(tmp_path / "a", "a")
    parts = [good, small_set(tmp_path / "b", "b")]
    refused(lambda n: join(parts, "a", tmp_path / "joined", n), name)
    file = tmp_path / "a" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"name": name}))
    refused(lambda n: read_manifest(tmp_path / "a"), name)


def test_a_cell_of_a_sweep_has_a_name_that_a_disk_can_take(tmp_path):
    (tmp_path / "r.yaml").write_text("train: {epochs: 3}\n")
    grid = {"model.backbone.*.weights": ["run:" + "g" * 240]}
    with pytest.raises(
        ValueError, match=r"would have 2\d\d bytes in its name, 100 allowed"
    ) as said:
        plan_cells("r", grid=grid, folder=tmp_path)
    assert len(str(said.value)) < 300


def test_a_name_that_somebody_pasted_is_shown_in_part():
    assert len(unknown("recipe", "x" * 10_000, ["smoke"])) < 150
