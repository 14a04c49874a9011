"""Train every network of people-bench, a slice at a time: a row for each goes into the table.

    python benchmarks/people_bench.py --minutes 80                        # whatever is missing, two at once
    python benchmarks/people_bench.py --every 10 --seeds 1 2              # a tenth of it again, other seeds
    python benchmarks/people_bench.py --every 10 --set vehicles8          # the same tenth on vehicles8
    python benchmarks/people_bench.py --repeat 20                         # trained again: the same?
    python benchmarks/people_bench.py --handmade                          # the small CNN, three seeds

A network is trained in one process with one thread, in float32, by the recipe of the same name; after
every epoch the held-out identities and the test identities are ranked. The networks come in an order
that is shuffled once for all, so that a part of the table is a fair sample of it. What is done is
never done again; two slices may run at once. Ctrl-C loses the networks that were under way, a kill
the rows of the last two minutes as well.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # before torch counts the cores

import sys

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # the checkout's library, installed or not

from reidlab.core.files import holding  # noqa: E402
from reidlab.core.meter import measure  # noqa: E402
from reidlab.core.recipe import Recipe, load_recipe  # noqa: E402
from reidlab.core.run import arithmetic, commit, processor  # noqa: E402
from reidlab.core.seed import deterministic, rng, seed_all  # noqa: E402
from reidlab.data.loaders import DataSet, eval_loader, open_data  # noqa: E402
from reidlab.evaluation.embed import embed  # noqa: E402
from reidlab.evaluation.embeddings import Embeddings, rank_embeddings  # noqa: E402
from reidlab.evaluation.evaluate import own_camids, split_photos  # noqa: E402
from reidlab.evaluation.rules import pace_of, plain_rules  # noqa: E402
from reidlab.models.cost import count_macs  # noqa: E402
from reidlab.models.stage_net import stage_net  # noqa: E402
from reidlab.nas.bench import (  # noqa: E402
    PEOPLE_SPACE,
    SCALE,
    SETS,
    Row,
    read_rows,
    recipe_for,
    write_rows,
)
from reidlab.training.optim import set_rate  # noqa: E402
from reidlab.training.parts import loader_from_recipe, parts_from_recipe  # noqa: E402
from reidlab.training.step import Trainer  # noqa: E402

TABLES = ROOT / "results" / "people_bench"
SAVE = 120  # seconds between two writings of the table
HANDMADE = -1  # the number of a network that is not in the space


class Judge(NamedTuple):
    "Query and gallery of one split, read once."

    batches: list[list[Any]]  # of the queries, and of the gallery
    labels: tuple  # pids, camids, paths of both, as Embeddings has them

    def figures(self, model: torch.nn.Module, recipe: Recipe) -> list[int]:
        "mAP, R1 and mINP of a network, in whole parts of SCALE."
        rules = recipe.evaluate
        feats = [
            embed(model, b, flip=rules.flip, pace=pace_of(rules)).numpy() for b in self.batches
        ]
        found = rank_embeddings(Embeddings(*feats, *self.labels), plain_rules(rules)).summary()
        return [round(SCALE * found[name]) for name in ("mAP", "R1", "mINP")]


def judge_of(recipe: Recipe, data: DataSet, split: str) -> Judge:
    "The photos of a split, as an evaluation of the library reads them."
    sides = split_photos(data, split)
    pids, paths = ([np.asarray(getattr(p, n)) for p in sides] for n in ("pids", "paths"))
    size = recipe.evaluate.batch_size
    batches = [list(eval_loader(p, recipe.data, size, workers=0)) for p in sides]
    return Judge(batches, (*pids, *own_camids(*sides), *paths))


def machine() -> str:
    "What decides the last bits of a row, in words."
    return f"{processor()}, {arithmetic()['capability']}, torch {torch.__version__}, one thread"


def trained(number: int, seed: int, recipe: Recipe, data: DataSet, judges: list[Judge]) -> Row:
    "One network trained and judged after every epoch, by the steps of `reidlab train`."
    parts = parts_from_recipe(recipe, data, workers=0)
    trainer = Trainer(parts.model, parts.loss, recipe.train)
    steps, seconds, epochs = len(parts.loader.batch_sampler.batches), 0.0, []
    with deterministic():
        for epoch in range(recipe.train.epochs):
            parts.loader.batch_sampler.set_epoch(epoch, 0)
            seed_all(recipe.seed, epoch, 0)
            began = time.process_time()
            trainer.begin(epoch)
            for step, batch in enumerate(parts.loader):
                set_rate(trainer.optimizer, trainer.rate(epoch + step / steps))
                trainer.step(batch)
            seconds += time.process_time() - began
            epochs.append([f for judge in judges for f in judge.figures(trainer.judged, recipe)])
    net = trainer.judged.eval()
    photo = torch.zeros(1, 3, recipe.data.height, recipe.data.width)
    many = photo.expand(64, -1, -1, -1).contiguous()
    with torch.inference_mode():
        one_ms = measure(net, photo, seconds=0.15, repeats=(9, 200)).work
        many_ms = measure(net, many, seconds=0.15, repeats=(5, 200)).work / 64
    figures = tuple(map(tuple, zip(*epochs, strict=True)))
    about = (machine(), round(seconds, 2), parts.costs["params"], parts.costs["macs"])
    return Row(number, seed, *about, round(one_ms, 3), round(many_ms, 4), figures)


_open: dict[str, tuple[DataSet, list[Judge]]] = {}  # of this process
_held: dict[str, Any] = {}  # a loader of each set: while one is there, photos are not read again


def work(task: tuple[str, int, int]) -> Row:
    "What a process does for a row."
    torch.set_num_threads(1)
    name, number, seed = task
    recipe = recipe_for(PEOPLE_SPACE[number], name, seed) if number >= 0 else handmade(name, seed)
    if name not in _open:
        data = open_data(recipe.data, 0)
        _open[name] = data, [judge_of(recipe, data, split) for split in ("val", "test")]
        _held[name] = loader_from_recipe(recipe, data, workers=0)
    return trained(number, seed, recipe, *_open[name])


def handmade(name: str, seed: int) -> Recipe:
    "The recipe with the network that it has of its own: the small CNN, as stages of plain blocks."
    return load_recipe(SETS[name], seed=seed)


def order(every: int = 1) -> list[int]:
    "The networks in the order in which they are trained; every tenth by cost, with every=10."
    costs = {n: cost_of(n) for n in range(len(PEOPLE_SPACE))} if every > 1 else {}
    numbers = sorted(costs, key=costs.__getitem__)[::every] if costs else range(len(PEOPLE_SPACE))
    return [numbers[i] for i in rng(0, 720).permutation(len(numbers))]


def cost_of(number: int) -> tuple[int, int]:
    "Multiply-accumulates of a network's maps, and its number, so that no two are equal."
    said = {k: v for k, v in PEOPLE_SPACE[number].items() if k != "pool"}
    with torch.device("meta"):
        return count_macs(stage_net(**said), (1, 3, 64, 32)), number


def rows_until(tasks: list, seconds: float, workers: int) -> Iterator[Row]:
    "Rows as they come, until the tasks or the time are used up."
    context, end = multiprocessing.get_context("spawn"), time.monotonic() + seconds
    with context.Pool(workers) as pool:
        ahead, waiting = iter(tasks), []
        while True:
            while len(waiting) < workers and time.monotonic() < end:
                task = next(ahead, None)
                if task is None:
                    break
                waiting.append(pool.apply_async(work, (task,)))
            if not waiting:
                return
            for done in [job for job in waiting if job.ready()]:
                waiting.remove(done)
                yield done.get()
            time.sleep(0.02)


def table_of(name: str) -> Path:
    "Where the rows of a set are kept."
    return TABLES / f"{name}.jsonl"


def kept_rows(name: str) -> list[Row]:
    "The rows that there are."
    path = table_of(name)
    return read_rows(path)[1] if path.exists() else []


def keep(name: str, rows: list[Row], end: str = "") -> Path:
    "Write what there is, complete at any time."
    epochs = recipe_for(PEOPLE_SPACE[0], name).train.epochs
    about = {"set": name, "recipe": SETS[name], "epochs": epochs, "commit": commit()[0]}
    return write_rows(table_of(name + end), rows, **about, day=date.today().isoformat())


def add(name: str, rows: list[Row]) -> int:
    "Rows into the table beside those that are there, which another slice may have written meanwhile."
    with holding(TABLES / f".{name}.lock"):
        all_rows = {(row.number, row.seed): row for row in [*rows, *kept_rows(name)]}
        if rows:
            keep(name, list(all_rows.values()))
    return len(all_rows)


def fill(name: str, seeds: list[int], every: int, minutes: float, workers: int, limit: int) -> None:
    "Train what is missing, for so many minutes."
    there = {(row.number, row.seed) for row in kept_rows(name)}
    wanted = [(name, n, seed) for seed in dict.fromkeys(seeds) for n in order(every)]
    tasks = [task for task in wanted if task[1:] not in there][:limit]
    print(f"{len(there)} rows there, {len(tasks)} to come", flush=True)
    fresh: list[Row] = []
    saved = began = time.monotonic()
    try:
        for done, row in enumerate(rows_until(tasks, 60 * minutes, workers), 1):
            fresh.append(row)
            if time.monotonic() - saved > SAVE:
                saved = time.monotonic()
                count, pace = add(name, fresh), (saved - began) / done
                fresh.clear()
                mAP = row.figures[3][-1] / 100
                print(f"{count} rows, {pace:.1f} s each, mAP {mAP}", flush=True)
    finally:  # a row that fails, or Ctrl-C, loses no other
        print(f"{add(name, fresh)} rows in {table_of(name)}")


def compare(name: str, workers: int) -> None:
    "Train the small CNN three times, for a file of its own."
    rows = list(rows_until([(name, HANDMADE, seed) for seed in range(3)], 1e9, workers))
    path = keep(name, rows, "_small_cnn")
    print(path, *(row.figures[3][-1] / 100 for row in rows))


def repeat(name: str, count: int, workers: int) -> None:
    "Train some rows again, and tell how they differ."
    rows = kept_rows(name)
    chosen = [rows[i] for i in rng(0, 721).permutation(len(rows))[:count]]
    by = {(row.number, row.seed): row for row in chosen}
    same = 0
    for again in rows_until([(name, *key) for key in by], 1e9, workers):
        before = by[again.number, again.seed]
        gap = max(abs(a[-1] - b[-1]) for a, b in zip(again.figures, before.figures, strict=True))
        where = "here" if again.machine == before.machine else f"there: {before.machine}"
        same += again.figures == before.figures
        print(again.number, again.seed, f"furthest apart at the end {gap / 100} points", where)
    print(f"{same} of {len(by)} repeat every figure of every epoch")


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--set", default="people", choices=SETS)
    ask.add_argument("--seeds", type=int, nargs="+", default=[0])
    ask.add_argument("--every", type=int, default=1, help="of the networks by cost, one in so many")
    ask.add_argument("--minutes", type=float, default=80)
    ask.add_argument("--workers", type=int, default=2)
    ask.add_argument("--limit", type=int, default=10**6, help="rows at most")
    ask.add_argument("--repeat", type=int, default=0, help="train so many rows again")
    ask.add_argument("--handmade", action="store_true", help="train the small CNN instead")
    said = ask.parse_args()
    if said.handmade:
        compare(said.set, said.workers)
    elif said.repeat:
        repeat(said.set, said.repeat, said.workers)
    else:
        fill(said.set, said.seeds, said.every, said.minutes, said.workers, limit=said.limit)
