"""Scores before training, for networks of people-bench: a record beside what training made of them.

    python benchmarks/bench_proxies.py                       # whatever the table has and the record lacks
    python benchmarks/bench_proxies.py --seed 1 --limit 100  # another initialisation and batch
    python benchmarks/bench_proxies.py --limit 1 --out here.csv

One thread, a quarter of a second a network. A row keeps by which call of the script it was added, so that scores
that were made up while looking at some networks can be judged on those that came later. The page that reads the
record is nbs/07_nas/41_retrieval_proxies.ipynb.
"""

import argparse
import io
import json
import os
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch counts the cores

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # the checkout's library, installed or not

from reidlab.core.files import write_bytes  # noqa: E402
from reidlab.core.run import commit, processor  # noqa: E402
from reidlab.core.seed import rng  # noqa: E402
from reidlab.nas.bench import PEOPLE_SPACE, SETS, Bench, read_rows  # noqa: E402
from reidlab.nas.landscape import kendall  # noqa: E402
from reidlab.nas.retrieval_proxies import PROXIES, score_networks  # noqa: E402

TABLES = ROOT / "results" / "people_bench"
LABELS = ["call", "number", "seed", "mAP"]


def kept(path: Path) -> tuple[list[dict], pd.DataFrame]:
    "What is known of the calls so far, and their rows."
    if not path.exists():
        return [], pd.DataFrame(columns=[*LABELS, *PROXIES])
    first = path.read_text().partition("\n")[0]
    return json.loads(first.removeprefix("# "))["calls"], pd.read_csv(path, comment="#")


def keep(path: Path, calls: list[dict], rows: pd.DataFrame) -> None:
    "A line of what the record is, then a row a network."
    text = io.StringIO()
    rows.to_csv(text, index=False, float_format="%.8g")
    about = {"record": "proxies of people-bench", "recipe": SETS["people"], "calls": calls}
    write_bytes(path, f"# {json.dumps(about)}\n{text.getvalue()}".encode())


def taus(rows: pd.DataFrame) -> pd.Series:
    "Kendall's τ of every score with test mAP."
    found = {n: kendall(rows[n], rows["mAP"]) for n in PROXIES}
    return pd.Series(found).sort_values(ascending=False, key=lambda s: s.map(lambda t: t.value))


def main(words=None):
    "Score what is missing, write the record, print what scores are worth."
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--table", type=Path, default=TABLES / "people.jsonl")
    ask.add_argument("--seed", type=int, default=0, help="of weights and batch")
    ask.add_argument("--limit", type=int, default=10**6, help="networks at most")
    ask.add_argument("--out", type=Path, default=TABLES / "proxies.csv")
    said = ask.parse_args(words)
    torch.set_num_threads(1)
    bench, (calls, rows) = Bench(read_rows(said.table)[1]), kept(said.out)
    there = set(rows.loc[rows["seed"] == said.seed, "number"])
    missing = sorted({row.number for row in bench.rows if row.seed == 0} - there)
    order = [missing[i] for i in rng(0, 725).permutation(len(missing))][: said.limit]
    if order:
        began = time.process_time()
        answers = [PEOPLE_SPACE[n] for n in order]
        found = score_networks(PEOPLE_SPACE, answers, SETS["people"], seed=said.seed)
        seconds = round(time.process_time() - began, 1)
        truth = [bench.ask(answer).mAP for answer in answers]
        found = found.reset_index().assign(call=len(calls), seed=said.seed, mAP=truth)
        rows = pd.concat([rows, found[[*LABELS, *PROXIES]]] if len(rows) else [found])
        rows = rows[[*LABELS, *PROXIES]].sort_values(["call", "number", "seed"])
        about = {"seed": said.seed, "commit": commit()[0], "machine": processor()}
        calls.append({**about, "networks": len(order), "seconds": seconds})
        keep(said.out, calls, rows)
    print(f"{len(order)} networks more, {len(rows)} rows in {said.out.name}")
    zero = rows[rows["seed"] == 0]
    if len(zero) > 2:
        for call, part in zero.groupby("call"):
            print(f"\nτ with test mAP, call {call}, {len(part)} networks")
            print(taus(part).map(str).to_string())


if __name__ == "__main__":
    main()
