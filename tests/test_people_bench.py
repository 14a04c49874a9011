"""People-bench: the space, its file, what it answers, and that a row is what a training gives."""

import json
import random
import sys
from hashlib import sha256

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reidlab.nas.bench as bench_module
from reidlab.core.recipe import load_recipe
from reidlab.core.run import open_run
from reidlab.core.settings import project_root
from reidlab.data.loaders import open_data
from reidlab.evaluation.validators import validator
from reidlab.models.backbones import small_cnn
from reidlab.models.cost import count_macs, count_parameters
from reidlab.models.stage_net import BLOCKS, stage_net
from reidlab.nas.bench import (
    FIGURES,
    PEOPLE_SPACE,
    SETS,
    Bench,
    Row,
    people_bench,
    read_rows,
    recipe_for,
    words,
    write_rows,
)
from reidlab.nas.landscape import kendall, variance_shares
from reidlab.nas.places import Places, check_places, distance, draw, neighbours_of
from reidlab.training.fit import fit_from_recipe

sys.path.insert(0, str(project_root() / "benchmarks"))
import people_bench as script

TINY = {
    "data.synthetic.train_pids": 12,
    "data.synthetic.test_pids": 4,
    "data.synthetic.cameras": 3,
    "data.sampler": {"pk": {"p": 4}},
    "data.height": 64,
    "data.width": 32,
    "data.augment.pad_crop.pixels": 2,
    "train.epochs": 2,
}


# --- the networks ---------------------------------------------------------------------------


def test_the_small_cnn_is_one_of_the_frames():
    cnn, net = small_cnn(), stage_net()
    assert cnn.state_dict().keys() == net.state_dict().keys()
    net.load_state_dict(cnn.state_dict())
    photos = torch.randn(2, 3, 64, 32)
    assert torch.equal(cnn.eval()(photos), net.eval()(photos))


@pytest.mark.parametrize("last_stride", [1, 2])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_learns_with_all_its_weights(block, last_stride):
    net = stage_net(block, block, block, depth=2, width=8, last_stride=last_stride)
    maps = net(torch.randn(4, 3, 64, 32))
    assert maps.shape == (4, 64, 8 // last_stride, 4 // last_stride) and maps.min() >= 0
    (maps * torch.randn_like(maps)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("said", [{"depth": 0}, {"width": 0}, {"last_stride": 3}])
def test_a_frame_that_is_none_is_refused_in_python_too(said):
    with pytest.raises(ValueError, match="needs depth and width of 1 or more"):
        stage_net(**said)


def test_costs_by_hand():
    plain = stage_net(width=8)  # 3×3: 3→8, 8→16, 16→32, 32→64, each with a batch norm
    weights = 9 * (3 * 8 + 8 * 16 + 16 * 32 + 32 * 64)
    assert count_parameters(plain) == weights + 2 * (8 + 16 + 32 + 64)
    places = (32 * 16, 16 * 8, 8 * 4, 8 * 4)
    macs = 9 * sum(c * p for c, p in zip((24, 128, 512, 2048), places, strict=True))
    assert count_macs(plain, (1, 3, 64, 32)) == macs
    residual = BLOCKS["residual"](8, 16)
    assert count_parameters(residual) == 9 * (8 * 16 + 16 * 16) + 8 * 16 + 3 * 2 * 16
    inverted = BLOCKS["inverted"](8, 16)
    assert count_parameters(inverted) == 8 * 16 + 9 * 16 + 16 * 16 + 2 * (16 + 16 + 16)


# --- the space ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 5), min_size=1, max_size=5), st.integers(0, 2**31))
def test_a_number_is_as_good_as_its_network(sizes, seed):
    space = Places({f"p{i}": (f"a.b{i}", range(n)) for i, n in enumerate(sizes)})
    number = random.Random(seed).randrange(len(space))
    assert space.index(space[number]) == number
    near = neighbours_of(space, space[number])
    assert len(near) == sum(n - 1 for n in sizes)
    assert {distance(space[number], other) for other in near} == {1}
    assert len({space.index(other) for other in near}) == len(near)


def test_every_choice_of_the_space_is_known_to_the_recipe():
    for recipe in SETS.values():
        check_places(PEOPLE_SPACE, recipe)
    built = draw(PEOPLE_SPACE, 0)
    said = recipe_for(built).model
    assert said.pool.name == built["pool"]
    assert {k: said.backbone.options[k] for k in built if k != "pool"} == {
        k: v for k, v in built.items() if k != "pool"
    }


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({}, "one place or more, got none"),
        ({"a": "model.pool"}, "place 'a' needs a key of a recipe and a list of choices"),
        ({"a": ("model.pool",)}, "place 'a' needs a key of a recipe and a list of choices"),
        ({"a": ("model.pool", "avg")}, "a list of choices, got ('model.pool', 'avg')"),
        ({"a": ("model.pool", {"avg", "gem"})}, "a list of choices"),  # another order every time
        ({"a": ("model.pool", ("avg", "gem")), "b": ("model.pool", ("avg", "gem"))}, "'a' and 'b'"),
        ({"a": ("model.pool", ("avg",))}, "two choices or more"),
        ({"a": ("x", (1, True))}, "has a choice twice: 1, True"),
        ({f"p{i}": (f"x.k{i}", range(8)) for i in range(21)}, "networks at most"),
    ],
)
def test_a_space_that_is_none_is_one_line(said, message):
    with pytest.raises(ValueError) as told:
        Places(said)
    assert message in str(told.value) and "\n" not in str(told.value)


def test_a_space_as_large_as_a_number_can_say_is_drawn_from():
    space = Places({f"p{i}": (f"x.k{i}", range(8)) for i in range(20)} | {"q": ("x.q", range(7))})
    last = space[len(space) - 1]
    assert set(last.values()) == {7, 6} and space.index(last) == len(space) - 1
    assert draw(space, 0) != draw(space, 1) and space.index(draw(space, 0)) > 2**32


def test_an_equal_value_is_said_as_the_space_says_it():
    said = PEOPLE_SPACE.overrides({**PEOPLE_SPACE[0], "width": 8.0, "depth": True})
    assert [repr(v) for k, v in said.items() if k.endswith(("width", "depth"))] == ["1", "8"]


@pytest.mark.parametrize("answer", [5, None, "plain", ["plain"], [("pool", "avg")]])
def test_what_is_no_network_is_one_line(answer):
    with pytest.raises(ValueError, match="a network is one choice a place"):
        PEOPLE_SPACE.index(answer)


@pytest.mark.parametrize(
    ("key", "choices", "message"),
    [
        ("model.backbone.stage_net.stage2", ("plain", "residul"), "Close names: residual"),
        ("model.backbone.stage_net.depth", (1, 0), "place 'one', choice 0"),
        ("model.pool", ("avg", "gme"), "Close names: gem"),
        ("train.optimizer.adamw.lr", (0.1, "fast"), "place 'one', choice 'fast'"),
        ("data.height", (64, 8), "place 'one', choice 8"),  # no map is left
    ],
)
def test_a_choice_that_no_network_can_have_is_found_before_it_is_trained(key, choices, message):
    with pytest.raises(ValueError) as told:
        check_places(Places({"one": (key, choices)}), "people_bench")
    assert message in str(told.value) and "\n" not in str(told.value)


# --- the file -------------------------------------------------------------------------------


def row(number, seed=0, epochs=3):
    figures = tuple(tuple(10 * number + e for e in range(epochs)) for _ in FIGURES)
    return Row(number, seed, "a desk", 3.0, 100 + number, 1000, 0.5, 0.1, figures)


@pytest.fixture
def table(tmp_path):
    rows = [row(n, s) for n in range(5) for s in range(1 + (n == 2))]
    return write_rows(tmp_path / "t.jsonl", rows, set="people", epochs=3)


def test_a_file_holds_what_was_written(table):
    head, rows = read_rows(table)
    assert [(r.number, r.seed) for r in rows] == [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0), (4, 0)]
    assert rows[3] == row(2, 1) and head["set"] == "people" and head["rows"] == 6
    again = write_rows(table.with_name("u.jsonl"), rows[::-1], set="people", epochs=3)
    assert again.read_bytes() == table.read_bytes()


def resealed(path, change):
    "A file whose lines were changed by somebody who also mended the digest."
    head = read_rows(path)[0]
    _, *lines = path.read_text().splitlines(keepends=True)
    text = "".join(change(lines))
    head["sha256"] = sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(head) + "\n" + text)


def test_a_damaged_file_is_one_line(table):
    whole = table.read_bytes()
    for damaged, message in [
        (whole[: len(whole) // 2], "was cut or edited"),
        (whole.replace(b"1000", b"1001", 1), "was cut or edited"),
        (whole + b"\n", "was cut or edited"),
        (whole.replace(b'"sha256"', b'"sha257"'), "is no table of people-bench"),
        (b"", "is no table"),
        (b"{}\n", "is no table"),
        (b"[]\n", "is no table"),
        (b"\xff\xfe", "is no table"),
        (b'{"table": "people-bench"}\n', "is no table"),
    ]:
        table.write_bytes(damaged)
        with pytest.raises(ValueError, match=message) as told:
            read_rows(table)
        assert str(table) in str(told.value) and "\n" not in str(told.value)
    with pytest.raises(ValueError, match="is a folder") as told:
        read_rows(table.parent)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [lines[0], *lines], "line 3 is network 0 with seed 0 again"),
        (lambda lines: [lines[0], lines[1].replace("[10,11,12]", "[10,11]", 1)], "line 3"),
        (lambda lines: [lines[0], "{}\n"], "line 3"),
        (lambda lines: [lines[0], "[1, 2]\n"], "line 3"),
        (lambda lines: [lines[0].replace("[0,0,0,", '["x",0,0,')], "line 2"),
        (lambda lines: [lines[0].replace("[0,0,0,", "[0,0,7,")], "line 2"),
    ],
)
def test_a_file_that_holds_nonsense_names_the_line(table, change, message):
    resealed(table, change)
    with pytest.raises(ValueError, match=message) as told:
        read_rows(table)
    assert str(table) in str(told.value) and "\n" not in str(told.value)


# --- asking ---------------------------------------------------------------------------------


def test_it_answers_what_was_trained_and_nothing_else(table):
    bench = Bench(read_rows(table)[1])
    told = bench.ask(PEOPLE_SPACE[2], epoch=2, seed=1)
    assert (told.mAP, told.val_R1, told.seconds, told.params) == (0.0021, 0.0021, 2.0, 102)
    assert bench.seeds(PEOPLE_SPACE[2]) == [0, 1] and len(bench.frame()) == 5
    for answer, more, message in [
        (PEOPLE_SPACE[7], {}, f"The nearest that it has: {words(PEOPLE_SPACE[3])}"),
        (PEOPLE_SPACE[1], {"seed": 1}, "trained with seed 0, not with 1"),
        (PEOPLE_SPACE[1], {"epoch": 0}, "from 1 to 3, got 0"),
        (PEOPLE_SPACE[1], {"epoch": 4}, "from 1 to 3, got 4"),
        (PEOPLE_SPACE[9], {"seed": 5}, "no network of this table was trained with seed 5"),
        ({**PEOPLE_SPACE[1], "wdth": 8}, {}, "Close names: width"),
    ]:
        with pytest.raises(ValueError) as told:
            bench.ask(answer, **more)
        assert message in str(told.value) and "\n" not in str(told.value)


def test_the_shipped_table_is_whole_and_small():
    bench = people_bench()
    assert people_bench() is bench and bench.epochs == recipe_for(PEOPLE_SPACE[0]).train.epochs
    folder = project_root() / "results" / "people_bench"
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 2_000_000
    for r in bench.rows:
        assert all(len(f) == bench.epochs and 0 <= min(f) <= max(f) <= 10_000 for f in r.figures)
        assert r.params > 0 and r.macs > 0 and r.seconds > 0 and r.machine


# --- rows are trainings -----------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    "The script at its smallest, with its table elsewhere."
    recipe = lambda answer, name="people", seed=0: load_recipe(
        SETS[name], seed=seed, overrides=PEOPLE_SPACE.overrides(answer) | TINY
    )
    monkeypatch.setattr(script, "recipe_for", recipe)
    monkeypatch.setattr(script, "TABLES", tmp_path)
    monkeypatch.setattr(script, "_open", {})
    monkeypatch.setattr(script, "_held", {})
    monkeypatch.setattr(script, "rows_until", lambda tasks, *_: map(script.work, tasks))
    return recipe


def test_a_row_is_what_a_training_gives(tiny, tmp_path):
    row = script.work(("people", 966, 0))
    recipe = tiny(PEOPLE_SPACE[966])
    run = open_run("same", recipe, "train", root=tmp_path)
    done = fit_from_recipe(recipe, run.path, validate=validator(recipe.train), workers=0)
    for name, figures in zip(("val_mAP", "val_R1", "val_mINP"), row.figures, strict=False):
        assert figures == tuple(round(10_000 * e[name]) for e in run.events("epoch"))
    assert (row.params, row.macs) == (done["metrics"]["params"], done["metrics"]["macs"])
    assert script.work(("people", 966, 0)).figures == row.figures
    assert script.work(("people", 966, 1)).figures != row.figures


def test_slices_follow_one_another(tiny, capsys):
    script.fill("people", [0], 1, minutes=9, workers=1, limit=2)
    first = read_rows(script.table_of("people"))[1]
    script.fill("people", [0], 1, minutes=9, workers=1, limit=1)
    rows = read_rows(script.table_of("people"))[1]
    assert len(first) == 2 and len(rows) == 3
    assert {(r.number, r.seed) for r in first} < {(r.number, r.seed) for r in rows}
    assert [r for r in rows if r in first] == first
    script.repeat("people", 2, workers=1)
    assert "2 of 2 repeat every figure of every epoch" in capsys.readouterr().out


def test_two_slices_at_once_lose_nothing(tiny, monkeypatch):
    def rows(tasks, *_):
        for task in tasks:
            done = row(0)._replace(number=task[1])
            other = done._replace(number=task[1] + len(PEOPLE_SPACE))
            script.add("people", [done, other])  # by another slice
            yield done._replace(seconds=9.0)

    monkeypatch.setattr(script, "rows_until", rows)
    script.fill("people", [0], 1, minutes=9, workers=1, limit=3)
    kept = {r.number: r.seconds for r in script.kept_rows("people")}
    first = script.order()[:3]
    assert set(kept) == {n + more for n in first for more in (0, len(PEOPLE_SPACE))}
    assert set(kept.values()) == {3.0}  # what was there first stays


def test_a_row_that_fails_takes_no_other_with_it(tiny, monkeypatch):
    def rows(tasks, *_):
        yield row(0)._replace(number=tasks[0][1])
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "rows_until", rows)
    with pytest.raises(KeyboardInterrupt):
        script.fill("people", [0], 1, minutes=9, workers=1, limit=3)
    assert [r.number for r in script.kept_rows("people")] == script.order()[:1]


def test_a_seed_said_twice_is_one_and_no_time_makes_no_table(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(script, "rows_until", lambda tasks, *_: asked.extend(tasks) or ())
    script.fill("people", [1, 1, 0], 1, minutes=0, workers=1, limit=10**6)
    assert len(asked) == len(set(asked)) == 2 * len(PEOPLE_SPACE)
    assert not script.table_of("people").exists()


def test_all_seeds_are_judged_on_the_people_of_the_first(tiny):
    script.work(("people", 966, 0))
    people = script._open["people"][0]
    script.work(("people", 966, 1))
    assert script._open["people"][0] is people
    assert set(people.val_query.pids) == set(
        open_data(tiny(PEOPLE_SPACE[0]).data, 0).val_query.pids
    )


def test_the_tenth_is_fair_by_cost(monkeypatch):
    assert sorted(script.order(1)) == list(range(1536)) and script.order(1) != list(range(1536))
    small, large = (
        script.cost_of(PEOPLE_SPACE.index({**PEOPLE_SPACE[0], "width": w})) for w in (8, 16)
    )
    assert 3 * small[0] < large[0]
    monkeypatch.setattr(script, "cost_of", lambda n: (n * 7919 % 1536, n))
    tenth = script.order(10)
    assert len(tenth) == len(set(tenth)) == 154
    assert sorted(script.cost_of(n)[0] for n in tenth) == list(range(0, 1536, 10))


# --- the measures -----------------------------------------------------------------------------


def test_tau_is_that_of_counted_pairs():
    values = random.Random(0)
    for _ in range(20):
        a, b = ([values.randrange(6) for _ in range(9)] for _ in "ab")
        pairs = [(i, j) for i in range(9) for j in range(i)]
        signs = [((a[i] > a[j]) - (a[i] < a[j]), (b[i] > b[j]) - (b[i] < b[j])) for i, j in pairs]
        level = (sum(x * x for x, _ in signs) * sum(y * y for _, y in signs)) ** 0.5
        assert kendall(a, b, draws=0).value == pytest.approx(sum(x * y for x, y in signs) / level)


def test_an_interval_covers_what_it_should():
    draws, inside = random.Random(1), 0
    for _ in range(60):  # pairs whose true tau is 1/3: correlation 0.5 of normal numbers
        x = [draws.gauss(0, 1) for _ in range(60)]
        y = [0.5 * v + 0.75**0.5 * draws.gauss(0, 1) for v in x]
        found = kendall(x, y, draws=200)
        inside += found.low <= 1 / 3 <= found.high
    assert inside >= 50


def test_shares_of_a_complete_table_add_up():
    frame = people_bench().frame().iloc[:0]
    assert list(frame.columns[:7]) == list(PEOPLE_SPACE.places)
    space = Places({"a": ("x", (1, 2, 3)), "b": ("y", (0, 1)), "c": ("z", (0, 1))})
    rows = pd.DataFrame(list(space))
    rows["mAP"] = rows["a"] ** 2 + 4 * rows["b"] * rows["c"]
    shares = variance_shares(rows, ["a", "b", "c"])
    assert shares.sum() == pytest.approx(1)
    assert shares["b × c"] == pytest.approx(
        rows["mAP"].size * 1.0 / ((rows["mAP"] - rows["mAP"].mean()) ** 2).sum()
    )
    assert abs(shares["a × b"]) < 1e-9 and abs(shares["rest"]) < 1e-9


# --- what is refused before it does harm ----------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [row(1), row(1)],
            "network 1 with seed 0 again",
        ),  # `--seeds 0 0` would have shut the table
        ([row(1), row(2, epochs=4)], "another number of epochs"),
        ([row(1001)], "from 0 to 10000"),
        ([row(1)._replace(seconds=float("nan"))], "below zero or without end"),
    ],
)
def test_no_file_is_written_that_could_not_be_read(table, rows, message):
    before = table.read_bytes()
    with pytest.raises(ValueError, match=message) as told:
        write_rows(table, rows, set="people", epochs=3)
    assert str(table) in str(told.value) and "\n" not in str(told.value)
    assert table.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: ["[" * 100_000 + "\n"], "line 2"),
        (lambda lines: [lines[0].replace(",3.0,", ",NaN,")], "line 2: holds a number below zero"),
        (lambda lines: [lines[0].replace(",3.0,", ",-3.0,")], "line 2: holds a number below zero"),
        (lambda lines: [lines[0].replace("[0,0,0,", "[0,-1,0,")], "line 2: holds a number below"),
        (lambda lines: [lines[0].replace("[0,0,0,", "[0,false,0,")], "line 2: holds a value of"),
        (lambda lines: lines[1:], "says 6 rows and has 5"),
    ],
)
def test_a_sealed_file_of_nonsense_is_one_line(table, change, message):
    resealed(table, change)
    with pytest.raises(ValueError, match=message) as told:
        read_rows(table)
    assert str(table) in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("first", [b"[" * 100_000, b'{"a":' * 100_000])
def test_a_first_line_without_end_is_one_line(table, first):
    table.write_bytes(first)
    with pytest.raises(ValueError, match="is no table of people-bench"):
        read_rows(table)


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([], {}, "one row or more, got none"),
        ([row(1), row(1)], {}, "each network and seed once"),
        ([row(-1)], {}, "networks 0 to 1535 of its space, got -1"),  # the small CNN's file
        ([row(1536)], {}, "networks 0 to 1535 of its space, got 1536"),
        ([row(1)], {"epochs": 4}, "of 4 epochs needs rows as long, got 3"),
    ],
)
def test_a_benchmark_of_wrong_rows_is_refused(rows, more, message):
    with pytest.raises(ValueError, match=message):
        Bench(rows, **more)


def test_seeds_and_epochs_are_whole_numbers_of_any_kind(table):
    bench = Bench(read_rows(table)[1])
    answer = PEOPLE_SPACE[1]
    assert bench.ask(answer, np.int64(2), np.int64(0)) == bench.ask(answer, 2, 0)
    for epoch, seed in (("2", 0), (2.0, 0), ([2], 0), (2, "0"), (2, None), (2, [0])):
        with pytest.raises(TypeError, match="epoch and seed are whole numbers, got"):
            bench.ask(answer, epoch, seed)
    for question in (bench.frame, lambda s: bench.curves(seed=s)):
        with pytest.raises(ValueError, match=r"trained with seed 7\. Known: 0, 1"):
            question(7)


def test_the_file_of_another_set_is_refused(table, monkeypatch):
    write_rows(table, read_rows(table)[1], set="vehicles8", epochs=3)
    monkeypatch.setattr(bench_module, "shipped", lambda _: table)
    with pytest.raises(ValueError, match="needs the set people, got vehicles8") as told:
        people_bench.__wrapped__("people")
    assert str(table) in str(told.value)
