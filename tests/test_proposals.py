"""Strategies that ask: each finds what was planted, is the same for the same seed, and continues from any kill."""

import importlib.util
import sys
from collections import defaultdict
from functools import cache
from itertools import count
from math import log10
from pathlib import Path

import numpy as np
import pytest

from reidlab.nas.bench import PEOPLE_SPACE, Bench, write_rows
from reidlab.nas.optuna_search import PROPOSERS, front, proposer
from reidlab.nas.planted import planted, planted_worth
from reidlab.nas.proposals import Problem, Search
from reidlab.nas.regret import by_chance, least_of_top, regret_runs, worth_of
from reidlab.nas.resuming import log_of, run_search

needs_optuna = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None,
    reason='needs optuna: pip install -e ".[optuna]"',
)
BY_OPTUNA = ("tpe", "nsga2")
each_strategy = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_optuna if n in BY_OPTUNA else ()) for n in PROPOSERS]
)
LANDSCAPES = range(3)
table = cache(planted)


def costs(answer):
    return log10(table(0).ask(answer).macs)


def problem(budget=12, seed=0, **facts):
    return Problem(PEOPLE_SPACE, 9, budget, seed, **{"price": costs, **facts})


def trained(trial):
    return table(0).ask(trial.answer, trial.epochs).val_mAP


def trials(search):
    return [(PEOPLE_SPACE.index(s.answer), s.epochs, s.score) for s in search.told]


@cache
def outcome(name):
    "Of eight searches on each of three landscapes, 46 networks each: share among the best 1 %, mean regret."
    found, lost = [], []
    for seed in LANDSCAPES:
        worth = worth_of(table(seed))
        ends = regret_runs(table(seed), proposer(name), 46, seeds=8)[46]
        found.append((ends >= least_of_top(worth)).mean())
        lost.append(100 * (worth.max() - ends).mean())
    return np.mean(found), np.mean(lost)


@each_strategy
def test_what_was_planted_is_found(name):
    share, regret = outcome(name)
    least = {"random": 0.15, "hyperband": 0.3, "nsga2": 0.15}.get(name, 0.6)
    assert share >= least, f"{name} found {share:.2f}, regret {regret:.2f}"


@pytest.mark.parametrize(
    "name", ["evolution", "local", "halving", "guided", pytest.param("tpe", marks=needs_optuna)]
)
def test_who_learns_beats_who_draws(name):
    share, regret = outcome(name)
    drawn, lost = outcome("random")
    assert share > drawn + 0.2 and regret < 0.75 * lost


@needs_optuna
def test_who_weighs_two_aims_has_the_better_front():
    "The area between a front and 0.3 mAP at 10 million MACs, the mean of six searches."
    areas = defaultdict(list)
    for name in ("random", "nsga2"):
        for seed in range(6):
            edge = front(run_search(problem(60, seed), proposer(name), trained))
            ends = [cost for cost, _ in edge[1:]] + [7.0]
            steps = zip(edge, ends, strict=True)
            areas[name].append(sum((s.score - 0.3) * (end - cost) for (cost, s), end in steps))
    assert np.mean(areas["nsga2"]) > np.mean(areas["random"])


@each_strategy
def test_the_same_seed_proposes_the_same(name):
    one, two = (run_search(problem(), proposer(name), trained) for _ in range(2))
    assert trials(one) == trials(two) and log_of(one) == log_of(two)
    other = run_search(problem(seed=1), proposer(name), trained)
    assert trials(one) != trials(other)


@each_strategy
def test_killed_at_ten_points_it_ends_the_same(name, tmp_path):
    few = problem(4 if name in ("halving", "hyperband", "guided") else 12)
    whole = run_search(few, proposer(name), trained)
    points = np.random.default_rng(7).choice(len(whole.told), size=10, replace=False)
    for point in points.tolist():
        log, turn = tmp_path / f"{point}.json", count()

        def killed(trial, turn=turn, point=point):
            if next(turn) == point:
                raise KeyboardInterrupt
            return trained(trial)

        with pytest.raises(KeyboardInterrupt):
            run_search(few, proposer(name), killed, log=log)
        ended = run_search(few, proposer(name), lambda t, turn=turn: next(turn) and trained(t), log)
        assert next(turn) == len(whole.told) + 1, "nothing but the killed one is trained twice"
        assert trials(ended) == trials(whole) and ended.best == whole.best


@each_strategy
def test_every_epoch_is_paid_once(name):
    search = run_search(problem(20), proposer(name), trained)
    longest, asked = defaultdict(int), set()
    for number, epochs, score in trials(search):
        assert (number, epochs) not in asked, "asked twice"
        asked.add((number, epochs))
        longest[number] = max(longest[number], epochs)
        assert score == trained(search.told[len(asked) - 1])
    assert search.spent == pytest.approx(sum(longest.values()) / 9)
    assert 18 < search.spent <= 20
    full = [s for s in search.told if s.epochs == 9]
    assert search.best == max(full, key=lambda s: s.score)


def test_halving_by_hand():
    "80 networks to epoch 1, 26 on to 3, 8 on to 9: 80 + 52 + 48 = 180 epochs; with 81 it were 189."
    search = run_search(problem(20), PROPOSERS["halving"], trained)
    assert [sum(s.epochs == e for s in search.told) for e in (1, 3, 9)] == [80, 26, 8]
    assert search.spent == 20
    first = {n: score for n, e, score in trials(search) if e == 1}
    kept = {n for n, e, _ in trials(search) if e == 3}
    assert min(first[n] for n in kept) >= max(first[n] for n in first.keys() - kept)


@each_strategy
def test_the_test_score_is_not_looked_at(name):
    rows = table(0).rows
    order = np.random.default_rng(0).permutation(len(rows))
    mixed = Bench(
        row._replace(figures=(*row.figures[:3], *rows[i].figures[3:]))
        for row, i in zip(rows, order, strict=True)
    )
    ends = [regret_runs(b, proposer(name), 9, seeds=1)[9].item() for b in (table(0), mixed)]
    answers = np.flatnonzero(np.isclose(worth_of(table(0)), ends[0]))
    assert ends[0] != ends[1] and ends[1] in worth_of(mixed).loc[answers].tolist()


@each_strategy
def test_a_constraint_holds(name):
    light = problem(12, allowed=lambda answer: answer["width"] == 8 and answer["pool"] == "gem")
    search = run_search(light, proposer(name), trained)
    assert len(search.told) >= 12 and all(light.fits(s.answer) for s in search.told)
    with pytest.raises(ValueError, match="nothing meets the constraint"):
        Search(problem(allowed=lambda answer: False), proposer(name))


def test_draws_do_what_chance_says():
    "Without luck in the validation, the share of blind searches is known."
    quiet = planted(4, noise=0.0)
    ends = regret_runs(quiet, PROPOSERS["random"], 46, seeds=200)[46]
    assert abs((ends >= least_of_top(worth_of(quiet))).mean() - by_chance(1536, 15, 46)) < 0.1
    assert ends.max() <= planted_worth(PEOPLE_SPACE, 4).max() + 1e-4


def test_without_optuna(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    for name in BY_OPTUNA:
        with pytest.raises(ModuleNotFoundError, match=r'pip install "reidlab\[optuna\]"') as wrong:
            Search(problem(), proposer(name))
        assert "\n" not in str(wrong.value)


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_nas.py"
    spec = importlib.util.spec_from_file_location("bench_nas", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_prints_the_same_lines(script, tmp_path, capsys):
    file = write_rows(tmp_path / "table.jsonl", table(0).rows, epochs=9)
    words = ["--table", str(file), "--seeds", "4", "--only", "random", "halving"]
    said = []
    for _ in range(2):
        script.main(words)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "1536 networks" in said[0]
    assert [line.split()[0] for line in said[0].splitlines()[-2:]] == ["random", "halving"]


def test_the_benchmark_refuses_in_a_line(script, tmp_path, capsys):
    rows = [row for row in table(0).rows if row.number % 4 == 0]
    file = str(write_rows(tmp_path / "part.jsonl", rows, epochs=9))
    for words, message in [
        ([], "the table has 384 of 1536 networks"),
        (["--partial", "--budget", "0.5"], "budget of one network or more"),
        (["--partial", "--only", "halving", "--budget", "2"], "needs a budget of 2.33 networks"),
        (["--only", "evolve"], "Close names: evolution"),
        (["--seeds", "0"], "seeds needs a number from 1"),
    ]:
        with pytest.raises(SystemExit) as wrong:
            script.main(["--table", file, *words])
        assert message in wrong.value.code and "\n" not in wrong.value.code
    script.main(["--table", file, "--partial", "--seeds", "2", "--only", "evolution", "local"])
    assert "384 networks" in capsys.readouterr().out
