"What papermill makes of words on a command line, and what the pages make of that."

import json
from itertools import pairwise

import pytest
from papermill.cli import _resolve_type

from reidlab.core.names import option
from reidlab.jobs.grid import SweepCell
from reidlab.jobs.parameters import EvaluateJob, GenerateJob, RecipeJob, SweepJob, check_parameters
from reidlab.jobs.prepare import PrepareSet
from reidlab.jobs.prepare_made import PrepareDistractors, PrepareJoined, PrepareOwn
from reidlab.jobs.sets import SETS
from reidlab.jobs.sweep import page_command

LOST = ["007", "2024_01", "1e3", "1.10", "nan", "-inf", "True", "None", "٣", " 7 "]
KEPT = ["market", "1.2.3", "v1", "0x10", "true", "null", "2024-01", "1,5"]


@pytest.mark.parametrize("text", LOST)
@pytest.mark.parametrize(
    ("schema", "name"),
    [
        (PrepareSet, "name"),
        (PrepareSet, "version"),
        (PrepareOwn, "camera"),
        (PrepareDistractors, "base"),
        (PrepareJoined, "parts"),
        (EvaluateJob, "dataset"),
        (RecipeJob, "run"),
        (SweepJob, "recipe"),
    ],
)
def test_a_number_for_a_text_is_refused_with_the_way_out(text, schema, name):
    with pytest.raises(ValueError, match=f"parameter {name}: needs text.*-r {name} TEXT"):
        check_parameters({name: _resolve_type(text)}, schema)


@pytest.mark.parametrize("text", LOST + KEPT)
def test_a_text_by_r_stays_what_it_is(text):
    assert check_parameters({"version": text}, PrepareSet).version == text


def test_every_text_of_every_job_refuses_a_number():
    schemas = {EvaluateJob, GenerateJob, RecipeJob, SweepJob} | {s for _, s in SETS.values()}
    texts = [
        (s, name)
        for s in schemas
        for name, field in s.model_fields.items()
        if isinstance(field.default, str)
    ]
    assert len(schemas) > 15 and len(texts) > 60
    for schema, name in texts:
        with pytest.raises(ValueError, match=f"parameter {name}: needs text"):
            check_parameters({name: 7}, schema)


@pytest.mark.parametrize(
    ("schema", "given", "message"),
    [
        (RecipeJob, {"seed": True}, "seed: needs a number; got True"),
        (RecipeJob, {"gpus": False}, "gpus: needs a number; got False"),
        (SweepJob, {"seeds": "[true]"}, "seeds: needs a number"),
        (SweepJob, {"rows": "[7]"}, "rows: .*valid string, in quotes; got 7"),
        (PrepareOwn, {"train_share": float("nan")}, "train_share: "),
    ],
)
def test_neither_is_truth_a_number_nor_a_number_a_row(schema, given, message):
    with pytest.raises(ValueError, match=f"parameter {message}"):
        check_parameters(given, schema)


def test_numbers_that_came_as_text_are_still_numbers():
    p = check_parameters({"seed": "007", "gpus": "0"}, RecipeJob)
    assert (p.seed, p.gpus) == (7, 0)


@pytest.mark.parametrize("text", LOST + KEPT)
def test_a_word_for_papermill_arrives_as_it_was(text):
    flag, _, word = option("name", text)
    assert (word if flag == "-r" else _resolve_type(word)) == text
    assert flag == ("-r" if text in LOST else "-p")


def test_a_sweep_hands_its_names_over_as_they_are(tmp_path):
    cell = SweepCell("2024_01", "2024_01", "007", 3, {"train.epochs": 1})
    words = page_command(cell, "train", tmp_path)
    given = dict(pairwise(words))
    assert words[words.index("run") - 1] == words[words.index("recipe") - 1] == "-r"
    assert (given["run"], given["recipe"], given["seed"]) == ("2024_01", "007", "3")
    assert json.loads(given["overrides"]) == {"train.epochs": 1}
