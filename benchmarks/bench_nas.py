"""What every strategy that asks is worth on people-bench: fifty searches each, in a minute.

    python benchmarks/bench_nas.py                                  # all of them, up to 3 % of the table
    python benchmarks/bench_nas.py --budget 154 --seeds 20          # a tenth of it
    python benchmarks/bench_nas.py --only random evolution tpe
    python benchmarks/bench_nas.py --partial --table FILE           # a table that is not complete, among what is there

A search is told validation scores of one training seed; its answer is judged by the test mAP at the end of
training, the mean over the seeds that the table has. Costs are in trained networks. In brackets stands the band
that holds the middle four fifths of the searches; `found` is the share of searches whose answer is among the best
hundredth of the table, with Wilson's 95 % interval. The same table and seeds give the same lines.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # the checkout's library, installed or not

from reidlab.evaluation.accuracy import wilson_interval  # noqa: E402
from reidlab.nas.bench import Bench, people_bench, read_rows  # noqa: E402
from reidlab.nas.optuna_search import PROPOSERS, proposer  # noqa: E402
from reidlab.nas.regret import (  # noqa: E402
    by_chance,
    least_of_top,
    regret_runs,
    regret_table,
    worth_of,
)

SHARE = 0.03  # of the table: what a search costs where nothing is said


def opened(table):
    "The table of a file, or the package's."
    if table is None:
        return people_bench()
    head, rows = read_rows(table)
    return Bench(rows, epochs=head["epochs"])


def with_interval(found, of):
    "A share as it is printed."
    sure = wilson_interval(found, of)
    return f"{100 * found / of:.0f} % ({100 * sure.low:.0f} to {100 * sure.high:.0f})"


def main(words=None):
    "Search, and print the table last."
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--budget", type=float, help="networks; left out: 3 %% of the table")
    asked.add_argument("--seeds", type=int, default=50, help="searches of each strategy")
    asked.add_argument("--only", nargs="+", default=list(PROPOSERS), help="strategies")
    asked.add_argument("--table", type=Path, help="a file; left out: the package's people-bench")
    asked.add_argument("--partial", action="store_true", help="search among what is there")
    asked.add_argument("--out", type=Path, help="a .csv for the worth by strategy, seed and cost")
    said = asked.parse_args(words)
    try:
        strategies = {name: proposer(name) for name in said.only}
        if said.seeds < 1:
            raise ValueError(f"seeds needs a number from 1, got {said.seeds}.")
        bench = opened(said.table)
        worth = worth_of(bench)
        budget = max(3, round(SHARE * len(worth))) if said.budget is None else said.budget
        options = {"budget": budget, "seeds": said.seeds, "partial": said.partial}
        runs = {name: regret_runs(bench, one, **options) for name, one in strategies.items()}
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as wrong:
        sys.exit(str(wrong))
    if said.out:
        pd.concat(runs, names=["strategy"]).to_csv(said.out)
    last = int(budget)
    costs = sorted({max(1, last // 3), max(1, 2 * last // 3), last})
    table = regret_table(runs, worth, costs)
    table["found"] = [with_interval(*pair) for pair in zip(table.found, table.of, strict=True)]
    top = int((worth >= least_of_top(worth)).sum())
    scores = bench.frame(0).droplevel("seed")["val_mAP"]
    print(
        f"{len(worth)} networks; the best has {100 * worth.max():.1f} mAP, the best {top} have "
        f"{100 * least_of_top(worth):.1f} or more, the one of the best validation "
        f"{100 * worth[scores.idxmax()]:.1f}. One of the best {top} among {last} draws: "
        f"{100 * by_chance(len(worth), top, last):.0f} %.\n"
    )
    print(table.drop(columns="of").to_string())


if __name__ == "__main__":
    main()
