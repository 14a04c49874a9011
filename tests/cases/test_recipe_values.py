"""Every number of a recipe is finite and within reach, and what is written reads back as it was."""

import json
import math
from functools import partial
from typing import Literal, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt, MaxLen
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from reidlab.core.parts import KINDS, builders_of, members, options_model, resolved, shelf
from reidlab.core.recipe import (
    SECTION_NAMES,
    TASK_KEYS,
    Recipe,
    first_difference,
    load_recipe,
    read_recipe,
    set_here,
    validated,
)
from reidlab.jobs.grid import plan_cells
from reidlab.jobs.parameters import RecipeJob, check_parameters

# --- random valid recipes ----------------------------------------------------------------------

LOOKS = ["1e3", "5e-4", "007", "0x1F", "1:30", "2024-01-01", "on", "No", "~", "null", "nan", ".inf"]
LOOKS += [
    "-",
    "=",
    "<<",
    "",
    " a",
    "a: b",
    "# c",
    "é ü",
    "名前",
    "'",
    '"',
    "1_000",
    "!t",
    "&a",
    "*a",
    "%",
]
TEXT = st.sampled_from(LOOKS) | st.text(
    st.characters(exclude_categories=("C", "Zl", "Zp")), max_size=20
)
TEXT = TEXT.filter(str.isprintable)
WORD = st.from_regex(r"[a-z_@*]{1,12}", fullmatch=True).filter(
    lambda w: w not in ("nan", "inf", "infinity")
)
OPTION = st.booleans() | WORD | st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9)


def bounds(metadata, whole):
    "min_value, max_value and the open ends that a field's metadata asks for."
    said = {type(inner): inner for m in metadata for inner in getattr(m, "metadata", [m])}
    low = said[Ge].ge if Ge in said else said[Gt].gt if Gt in said else -(10**9)
    high = said[Le].le if Le in said else said[Lt].lt if Lt in said else 10**9
    if whole:
        return {"min_value": low + (Gt in said), "max_value": high - (Lt in said)}
    return {
        "min_value": low,
        "max_value": high,
        "exclude_min": Gt in said,
        "exclude_max": Lt in said,
    }


def strategy(kind, metadata=()):
    "Random values of an annotation."
    if hasattr(kind, "__metadata__"):
        return strategy(kind.__origin__, [*metadata, *kind.__metadata__])
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        return st.sampled_from(inside)
    if origin is tuple and inside[-1] is Ellipsis:
        most = min([m.max_length for m in metadata if isinstance(m, MaxLen)] + [3])
        return st.lists(strategy(inside[0]), max_size=most)
    if origin is tuple:
        return st.tuples(*map(strategy, inside)).map(list)
    if inside:  # what has a name, as a genotype, is said by it
        named = [k for k in inside if k in (str, type(None))] if str in inside else inside
        return st.one_of(*map(strategy, named))
    if kind in (int, float):
        numbers = st.integers if kind is int else st.floats
        return numbers(**bounds(metadata, kind is int))
    plain = {bool: st.booleans(), str: TEXT, type(None): st.none()}
    return plain[kind] if kind in plain else section(kind)


def of_kind(kind):
    "Random parts of a kind, with some of their options."
    also = [resolved(KINDS[kind].also)] if KINDS[kind].also else []
    each = {n: section(options_model(*also, builder)) for n, builder in shelf(kind).items()}
    if KINDS[kind].many:
        return st.fixed_dictionaries({}, optional=each).filter(bool)
    return st.one_of(
        *(part.map(lambda said, name=name: {name: said}) for name, part in each.items())
    )


def value_of(field):
    "Random values of a field: from its shelf if it has one, else of its type."
    kinds = [m for m in field.metadata if isinstance(m, str)]
    return of_kind(kinds[0]) if kinds else strategy(field.annotation, field.metadata)


def section(schema, without=()):
    "Random values of some of a section's keys."
    fields = {
        key: value_of(field) for key, field in schema.model_fields.items() if key not in without
    }
    needed = {k: v for k, v in fields.items() if schema.model_fields[k].is_required()}
    return st.fixed_dictionaries(
        needed, optional={k: v for k, v in fields.items() if k not in needed}
    )


@st.composite
def recipes(draw):
    "The values of a recipe that nothing is to be said against."
    task = draw(st.sampled_from(sorted(TASK_KEYS)))
    (other,) = TASK_KEYS.keys() - {task}
    shut = {name: TASK_KEYS[other].get(name, ()) for name in SECTION_NAMES}
    shut["data"] = (*shut["data"], "task")
    values = {
        name: draw(section(Recipe.model_fields[name].annotation, shut[name]))
        for name in SECTION_NAMES
        if name != "loss"
    }
    values["loss"] = draw(of_kind("loss"))
    values["data"]["task"], values["train"]["select"] = task, "last"
    if task == "classification":
        values["train"].pop("gan", None)
        values["loss"] = {"softmax": draw(of_kind("loss")).get("softmax")}
    return values


@settings(max_examples=80, deadline=None, derandomize=True)
@given(values=recipes(), name=TEXT, overrides=st.dictionaries(TEXT, OPTION | TEXT, max_size=2))
def test_what_is_written_reads_back(values, name, overrides, tmp_path_factory):
    recipe = validated("random", values | {"name": name, "seed": 3, "overrides": overrides})
    file = tmp_path_factory.getbasetemp() / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    again = read_recipe(file)
    assert again == recipe and again.to_yaml() == recipe.to_yaml()
    assert first_difference(again, recipe) is None
    assert validated("json", json.loads(recipe.model_dump_json())) == recipe


# --- every number there is -----------------------------------------------------------------------


def numbers(schema=Recipe, place=""):
    "The dotted places of all number options, with a value that is no number yet."
    for key, field in schema.model_fields.items():
        here = f"{place}.{key}".lstrip(".")
        if any(kind == here for kind in field.metadata):
            for name in shelf(here):
                yield from numbers(options_model(*builders_of(here, name)), f"{here}.{name}")
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from numbers(field.annotation, here)
        elif str in get_args(field.annotation):  # any text is a name
            continue
        elif any(word in str(field.annotation) for word in ("int", "float", "Literal[1", "Stage")):
            yield here, field.annotation


def at(place, value):
    for part in reversed(place.split(".")):
        value = {part: value}
    return value


def spoilt(kind, value):
    "The value in the shape that an option has."
    if "Stage'" in str(kind) or "recipe.Stage" in str(kind):
        return [{"epochs": value}]
    length = len(get_args(kind)) if get_origin(kind) is tuple else 0
    open_ended = get_args(kind)[-1:] == (Ellipsis,)
    return [value, *[1] * (0 if open_ended else length - 1)] if length else value


NUMBERS = dict(numbers())
WRONG = [
    math.nan,
    math.inf,
    -math.inf,
    "nan",
    "inf",
    "-Infinity",
    ".nan",
    "1e999",
    10**400,
    1e300,
    "9" * 5000,
]


def test_there_are_many_numbers():
    assert len(NUMBERS) > 120 and "search.stages" in NUMBERS


@pytest.mark.parametrize("place", NUMBERS)
def test_no_number_is_infinite_or_absurd(place):
    for wrong in [*WRONG, 10**19]:
        with pytest.raises(ValueError) as caught:
            validated("mine", at(place, spoilt(NUMBERS[place], wrong)))
        text = str(caught.value)
        assert "\n" not in text and len(text) < 400, text
        assert "mine" in text and place.split(".")[-1] in text, text


@pytest.mark.parametrize("place", [p for p in NUMBERS if NUMBERS[p] in (int, float)])
def test_truth_is_no_number(place):
    with pytest.raises(ValueError, match="needs a number, got true"):
        validated("mine", at(place, True))


@pytest.mark.parametrize(
    "text", ["train: {clip: .nan}", "train: {clip: -.inf}", "train: {clip: 1e999}"]
)
def test_no_file_brings_in_infinity(text, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"mine.*train\.clip"):
        load_recipe("mine", folder=tmp_path)


@pytest.mark.parametrize(
    "text, word",
    [
        ('{"train.optimizer.adamw.lr": NaN}', "train.optimizer.adamw.lr"),
        ('{"loss.softmax.weight": Infinity}', "loss.softmax.weight"),
        ('{"data.std": [1, -Infinity, 1]}', "data.std.1"),
        ('{"train.clip": 1e999}', "train.clip"),
        ('{"train.clip": 1, "train.clip": 2}', "'train.clip' stands twice"),
        ('{"loss": {"softmax": {}, "softmax": {}}}', "'softmax' stands twice"),
    ],
)
def test_no_override_brings_in_infinity_or_says_a_key_twice(text, word):
    with pytest.raises(ValueError) as caught:
        check_parameters({"overrides": text}, RecipeJob)
    assert "overrides" in str(caught.value) and word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_are_numbers_however_they_are_written(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "loss: {centre: {weight: 5e-4, lr: '5E-1'}, triplet: {margin: 3e-1}}\n"
        "train: {optimizer: {adam: {lr: 1e-3}}, schedule: {multistep: {milestones: [4e1, '70']}}, epochs: 1e2}\n"
        "search: {loss: {softmax: {weight: .5}}, health: {skips: {least: 2e0}}}\n"
    )
    recipe = load_recipe("mine", folder=tmp_path)
    assert recipe.loss == whole({"centre": {"weight": 5e-4, "lr": 0.5}, "triplet": {"margin": 0.3}})
    assert recipe.train.optimizer.get("lr") == 1e-3
    assert recipe.train.schedule.get("milestones") == (40, 70) and recipe.train.epochs == 100
    assert recipe.search.loss["softmax"]["weight"] == 0.5
    assert recipe.search.health["skips"]["least"] == 2


# --- what an override means --------------------------------------------------------------------

FILE = "loss: {softmax: {weight: 2.0}, triplet: {margin: 0.3}}\n"
whole = partial(members, "loss")  # with all options
ONE, TWO = {"softmax": {"smoothing": 0.2}}, {"softmax": {"weight": 2.0}, "triplet": {"margin": 0.3}}


@pytest.mark.parametrize(
    "overrides, terms",
    [
        ({"loss": ONE}, ONE),
        ({"loss.triplet.margin": 0.5}, TWO | {"triplet": {"margin": 0.5}}),
        (
            {"loss.triplet": {"weight": 0.5}},
            TWO | {"triplet": {"margin": 0.3, "weight": 0.5}},
        ),
        ({"loss.am": {}}, TWO | {"am": {}}),
        (
            {"loss.softmax.weight": 3, "loss": ONE},
            {"softmax": ONE["softmax"] | {"weight": 3}},
        ),
        ({"loss": None}, TWO),
        ({}, TWO),
    ],
)
def test_a_set_is_replaced_and_a_dotted_key_changes_one_member(overrides, terms, tmp_path):
    (tmp_path / "mine.yaml").write_text(FILE)
    recipe = load_recipe("mine", overrides=overrides, folder=tmp_path)
    terms = whole(terms)
    assert recipe.loss == terms
    assert all(value == terms for place, value in set_here(recipe).items() if place == "loss")
    shown = [line for line in str(recipe).splitlines() if line.startswith("# set here: ")]
    assert len(shown) == len(set_here(recipe)) and all(str(terms) in line for line in shown)


@pytest.mark.parametrize(
    "overrides",
    [{"loss.triplet": None}, {"search.loss.softmax": None}],
)
def test_null_takes_nothing_away_and_says_so(overrides, tmp_path):
    (tmp_path / "mine.yaml").write_text(FILE)
    with pytest.raises(ValueError, match=r"(loss|search\.loss)\.\w+ is null, which takes nothing"):
        load_recipe("mine", overrides=overrides, folder=tmp_path)
    found = load_recipe("mine", overrides={"loss": {"circle": None}}, folder=tmp_path)
    assert found.loss == whole({"circle": {}})  # a name alone has the usual options


@pytest.mark.parametrize("place", ["loss", "search.loss", "search.health"])
def test_parts_without_options_are_parts(place):
    one, two = ("skips", "none") if place == "search.health" else ("softmax", "circle")
    sets = [{}, {one: {}}, {one: {}, two: {}}, {two: {}, one: {}}, {two: {}}]
    found = [load_recipe("smoke", overrides={place: members}) for members in sets]
    for i, one in enumerate(found):
        for j, other in enumerate(found):
            assert (first_difference(one, other) is None) == (i == j), (sets[i], sets[j])


def test_a_dotted_key_keeps_the_usual_set_where_no_file_says_one(tmp_path):
    (tmp_path / "mine.yaml").write_text("train: {epochs: 3}\n")
    over = {"loss.triplet.margin": 0.5, "search.loss.softmax.weight": 1}
    recipe = load_recipe("mine", overrides=over, folder=tmp_path)
    assert recipe.loss["softmax"] == Recipe().loss["softmax"]
    assert recipe.loss["triplet"] == whole({"triplet": {"margin": 0.5}})["triplet"]
    assert recipe.search.loss["triplet"] == Recipe().search.loss["triplet"]


@pytest.mark.parametrize("place, one", [("search.loss", ONE), ("search.health", {"unheard": {}})])
def test_sets_of_a_search_are_replaced_too(place, one, tmp_path):
    (tmp_path / "mine.yaml").write_text("search: {health: {skips: {least: 2}, none: {times: 1}}}\n")
    recipe = load_recipe("mine", overrides={place: one}, folder=tmp_path)
    assert getattr(recipe.search, place.split(".")[1]) == members(place, one)


def test_a_value_of_a_grid_is_a_whole_set(tmp_path):
    (tmp_path / "mine.yaml").write_text(FILE)
    cells = plan_cells("mine", grid={"loss": [ONE, TWO]}, folder=tmp_path)
    assert [cell.resolved(tmp_path).loss for cell in cells] == [whole(ONE), whole(TWO)]


def test_files_and_rows_follow_the_same_rule(tmp_path):
    (tmp_path / "base.yaml").write_text(FILE)
    (tmp_path / "mine.yaml").write_text(
        "base: base\nloss.triplet.margin: 0.5\nrows: {a: {loss.am: {}}, b: {loss: {am: {}}}}\n"
    )
    terms = load_recipe("mine/a", folder=tmp_path).loss
    assert terms == whole({"softmax": {"weight": 2.0}, "triplet": {"margin": 0.5}, "am": {}})
    assert load_recipe("mine/b", folder=tmp_path).loss == whole({"am": {}})


# --- one file upon another -----------------------------------------------------------------------


def test_an_empty_section_keeps_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text("train: {epochs: 7, gan: {alone: {loops: 5}}}\n" + FILE)
    (tmp_path / "mine.yaml").write_text(
        "base: base\ntrain:\nloss:\nrows: {a: , b: {train: {gan: }}}\n"
    )
    for name in ("mine", "mine/a", "mine/b"):
        recipe = load_recipe(name, folder=tmp_path)
        assert (recipe.train.epochs, recipe.train.gan.get("loops")) == (7, 5)
        assert recipe.loss == whole(TWO)


def test_off_is_a_word(tmp_path):
    (tmp_path / "mine.yaml").write_text("data: {cache: off}\n")
    assert load_recipe("mine", folder=tmp_path).data.cache == "off"
    assert load_recipe("mine", overrides={"data.cache": True}, folder=tmp_path).data.cache == "on"


@pytest.mark.parametrize(
    "whole_first",
    [
        {"loss": {"softmax": {"weight": 2.0}}, "loss.softmax.weight": 3.0},
        {"data.sampler": {"pk": {"p": 2}}, "data.sampler.pk.p": 3},
    ],
)
def test_overrides_are_read_and_not_written_to(whole_first):
    before = json.dumps(whole_first)
    load_recipe("smoke", overrides=whole_first)
    assert json.dumps(whole_first) == before
