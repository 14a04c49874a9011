"""Which strategy pays: every one of them on people-bench, many seeds, in seconds.

    python benchmarks/bench_nas.py                 # 50 searches of each
    python benchmarks/bench_nas.py --partial       # while the table is being filled

Costs are counted in full trainings. A strategy is shown the held-out figures of what it pays for; the
table below judges its answers by test mAP, averaged over the seeds that a network has. The goal: an
answer among the best hundredth, at the cost of three hundredths of the table, in 80 of 100 searches.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # the checkout's library, installed or not

from reidlab.nas.bench import SETS, Bench, people_bench  # noqa: E402
from reidlab.nas.halving import PROPOSERS  # noqa: E402
from reidlab.nas.regret import hits, race, regret_curve, true_scores  # noqa: E402

STRATEGIES = {
    **{name: (name, {}) for name in PROPOSERS},
    "evolution, 10 members": ("evolution", {"population": 10, "sample": 3}),
    "halving from 81": ("halving", {"start": 81}),
}
COST, TOP = 0.03, 0.01


def trained(bench: Bench) -> int:
    "Networks of the table that have the first seed."
    return len(bench.frame())


def shares(bench: Bench, seeds: int) -> pd.DataFrame:
    "A row a strategy: true mAP and hits at a third of the cost, at the cost and at twice as much."
    true, cost = true_scores(bench), round(COST * trained(bench))
    rows = {}
    for title, answered in race(bench, STRATEGIES, 2 * cost, seeds).items():
        curve, found = regret_curve(answered, true), hits(answered, true, TOP)
        rows[title] = {
            (f"after {at} trainings", what): value
            for at in (cost // 3, cost, 2 * cost)
            for what, value in (
                ("mAP", f"{100 * curve['mean'][at]:.1f}"),
                ("1 in 40 has less than", f"{100 * curve['low'][at]:.1f}"),
                (f"in the best {TOP:.0%}", f"{found[at]:.0%}"),
            )
        }
    return pd.DataFrame(rows).T


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--set", default="people", choices=SETS)
    ask.add_argument("--seeds", type=int, default=50)
    ask.add_argument("--partial", action="store_true", help="search around what is missing")
    said = ask.parse_args()
    bench = people_bench(said.set)
    have, want = trained(bench), len(bench.places)
    if have < want and not said.partial:
        ask.error(
            f"the table has {have} of {want} networks. Train the others (benchmarks/people_bench.py), "
            "or say --partial to search among those that there are."
        )
    true = true_scores(bench)
    print(f"{have} of {want} networks, test mAP {100 * true.min():.1f} to {100 * true.max():.1f}\n")
    with pd.option_context("display.width", 250, "display.max_columns", None):
        print(shares(bench, said.seeds).to_string())


if __name__ == "__main__":
    main()
