"""CPU seconds until a training finds again whom it never saw: ours and torchreid's, one judge.

    python benchmarks/bench_train.py --accuracy   # all of it, through the table
    python benchmarks/time_to_accuracy.py ours synthetic 0 '{"epochs": 12, "lr": 0.01}'

A training is a process of its own. Its clock begins when the libraries are imported and stops at
the first validation that reaches the goal: opening and reading the photos, training and validating
are all in it. Both sides see the same training photos, validate after the same epochs, on the test
identities, and are judged by reidlab's ranking of what their networks say of those photos.
"""

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # the checkout's library, installed or not

import torchreid_peer  # noqa: E402
from bench_retrieval import Row  # noqa: E402

from reidlab.core.recipe import Recipe  # noqa: E402
from reidlab.core.run import open_run  # noqa: E402
from reidlab.core.settings import settings  # noqa: E402
from reidlab.data.loaders import DataSet, open_data  # noqa: E402
from reidlab.data.manifest import Photos  # noqa: E402
from reidlab.evaluation.embeddings import Embeddings, rank_embeddings  # noqa: E402
from reidlab.evaluation.evaluate import embed_split, own_camids  # noqa: E402
from reidlab.evaluation.rules import plain_rules  # noqa: E402
from reidlab.training.fit import builder, work_through  # noqa: E402

Setting = dict[str, Any]
Curve = list[tuple[float, float]]  # CPU seconds, mAP in per cent


class Goal(NamedTuple):
    "How a set is trained on, and what is to be reached."

    size: tuple[int, int]  # height, width
    mAP: float  # per cent, on the test identities
    every: int  # epochs from one validation to the next
    pad: int  # pixels of the random crop
    people: Setting = {}  # of the drawn ones


GOALS = {
    "vehicles8": Goal((48, 48), 60.0, 2, 3),
    "synthetic": Goal((64, 32), 30.0, 2, 4),
    "tiny": Goal((32, 16), 0.0, 1, 2, {"train_pids": 16, "test_pids": 4, "cameras": 2}),
}
TUNING_SEED = 9
# by set and side: settings tried on another seed than those that count, the chosen one first
TRIED: dict[str, dict[str, list[Setting]]] = {
    "vehicles8": {
        "ours": [{"epochs": 30, "lr": 0.015, "triplet": 0.1}],
        "torchreid": [{"epochs": 60, "lr": 0.003, "triplet": 0.1}],
    },
    "synthetic": {
        "ours": [
            {"epochs": 10, "lr": 0.015, "triplet": 0.1},
            {"epochs": 10, "lr": 0.03, "triplet": 0.0},
            {"epochs": 8, "lr": 0.015, "triplet": 0.1},
            {"epochs": 16, "lr": 0.01, "triplet": 1.0},
        ],
        "torchreid": [
            {"epochs": 24, "lr": 0.003, "triplet": 0.1},
            {"epochs": 18, "lr": 0.003, "triplet": 0.1},
            {"epochs": 16, "lr": 0.005, "triplet": 0.03},
            {"epochs": 16, "lr": 0.003, "triplet": 0.1, "optim": "amsgrad"},
        ],
    },
    "tiny": {"ours": [{"epochs": 1, "lr": 0.01}]},
}
OSNET = {"osnet_published": {"width": 0.25}}


def recipe_of(name: str, setting: Setting, seed: int) -> Recipe:
    "Our training of a set."
    goal = GOALS[name]
    varied = {"flip": {"probability": 0.5}, "pad_crop": {"pixels": goal.pad}}
    data = {"name": "synthetic" if goal.people else name, "synthetic": goal.people}
    data |= {"height": goal.size[0], "width": goal.size[1], "augment": varied, "val_fraction": 0.0}
    data["sampler"] = {"pk": {"p": setting.get("people", 16), "k": 4}}
    pace = {"precision": "auto", "layout": "auto"} if setting.get("auto", True) else {}
    train = {"epochs": setting["epochs"], "optimizer": {"adamw": {"lr": setting["lr"]}}}
    train |= {"warmup": {"linear": {"epochs": 1}}, "validate_every": goal.every} | pace
    triplet = {"margin": "soft", "weight": setting.get("triplet", 1.0)}
    return Recipe(
        name="accuracy",
        seed=seed,
        data=data,
        model={"backbone": setting.get("backbone", OSNET), "neck": setting.get("neck", "bnneck")},
        loss={"softmax": {"smoothing": 0.1}, "triplet": triplet},
        train=train,
        evaluate=pace,
    )


class Reached(Exception):
    "The goal, or the end of one's patience."


class Clock:
    "CPU seconds since it was made, and what had been reached when."

    def __init__(self, goal: float, seconds: float):
        self.goal, self.seconds, self.began = goal, seconds, time.process_time()
        self.curve: Curve = []

    def note(self, mAP: float) -> None:
        "Write down a validation."
        self.curve.append((round(time.process_time() - self.began, 2), round(100 * mAP, 2)))
        print(*self.curve[-1], file=sys.stderr, flush=True)

    def look(self) -> None:
        "Stop where the goal is reached, or where it takes too long."
        if self.curve and (self.curve[-1][1] >= self.goal or self.curve[-1][0] > self.seconds):
            raise Reached


def ours(name: str, setting: Setting, seed: int, data_dir: Path, clock: Clock) -> None:
    "A training of the library, the test identities in the place of held-out ones."
    recipe = recipe_of(name, setting, seed)

    def opened() -> DataSet:
        data = open_data(recipe.data, seed, data_dir)
        return DataSet(data.manifest, data.train, data.query, data.gallery)

    def judge(model: torch.nn.Module, **about: Any) -> dict[str, float]:
        found = embed_split(model, about["recipe"], about["data"], split="val")
        scores = rank_embeddings(found, plain_rules(recipe.evaluate)).summary()
        clock.note(scores["mAP"])
        return scores

    with tempfile.TemporaryDirectory() as folder:
        run = open_run("accuracy", recipe, "train", root=folder)
        looked = [lambda folder, record: clock.look()]
        told = work_through(recipe, run.path, opened, builder(recipe, workers=0), judge, looked)
        if told.get("state") == "stopped":  # by somebody, and no result
            raise SystemExit(f"the training was {told['selection']}")


def listed(photos: Photos, names: dict[int, int] | None = None) -> list[tuple[str, int, int]]:
    "Photos as torchreid's sets list them."
    pids = [names[pid] if names else pid for pid in photos.pids.tolist()]
    paths = [str(photos.root / path) for path in photos.paths]
    return list(zip(paths, pids, photos.camids.tolist(), strict=True))


def theirs(name: str, setting: Setting, seed: int, data_dir: Path, clock: Clock) -> None:
    "A training of torchreid's: its data manager, transforms, engine and schedule."
    from pyppbox_torchreid.utils import set_random_seed

    goal, recipe = GOALS[name], recipe_of(name, setting, seed)
    data = open_data(recipe.data, seed, data_dir)
    set_random_seed(seed)
    names = {pid: i for i, pid in enumerate(np.unique(data.train.pids).tolist())}
    rows = {"query": listed(data.query), "gallery": listed(data.gallery)}
    torchreid_peer.photos_there({"train": listed(data.train, names), **rows})
    with torchreid_peer.quiet():
        manager = torchreid_peer.manager(goal.size, ["random_flip", "random_crop"])
        model, how = torchreid_peer.network(len(names)), {"lr": setting["lr"]}
        how |= {"optim": setting.get("optim", "adam"), "triplet": setting.get("triplet", 1.0)}
        engine = torchreid_peer.engine(manager, model, epochs=setting["epochs"], **how)
    for epoch in range(setting["epochs"]):
        engine.epoch = epoch
        with torchreid_peer.quiet():
            engine.train(print_freq=1000)
        if (epoch + 1) % goal.every == 0 or epoch + 1 == setting["epochs"]:
            clock.note(_judged(engine, manager, data, recipe))
            clock.look()


def _judged(engine: Any, manager: Any, data: DataSet, recipe: Recipe) -> float:
    "The mAP of what its network says of the test photos, by our ranking."
    engine.set_model_mode("eval")
    loaders, sides = manager.test_loader[torchreid_peer.SET], (data.query, data.gallery)
    with torch.no_grad():
        feats = [
            torch.cat([engine.extract_features(batch["img"]) for batch in loaders[side]]).numpy()
            for side in ("query", "gallery")
        ]
    pids, paths = ([np.asarray(getattr(p, n)) for p in sides] for n in ("pids", "paths"))
    found = Embeddings(*feats, *pids, *own_camids(*sides), *paths)
    return rank_embeddings(found, plain_rules(recipe.evaluate)).mAP


SIDES: dict[str, Callable] = {"ours": ours, "torchreid": theirs}


def one(
    side: str, name: str, setting: Setting, seed: int, data_dir: Path, full: bool = False
) -> Curve:
    "A training here: its curve."
    goal = 101.0 if full else GOALS[name].mAP
    clock = Clock(goal, setting.get("seconds", 1e9))
    with contextlib.suppress(Reached):
        SIDES[side](name, setting, seed, data_dir, clock)
    return clock.curve


def elsewhere(side: str, name: str, setting: Setting, seed: int, *options: str) -> Curve:
    "A training in a process of its own."
    command = [sys.executable, __file__, side, name, str(seed), json.dumps(setting), *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


Train = Callable[..., Curve]  # elsewhere, or `one` with fewer options


def tuned(name: str, side: str, options: list[str], train: Train) -> tuple[Setting, list[Row]]:
    "Of a side's settings the one that arrives first on seed 9, and how far each came."
    goal, rows, found = GOALS[name].mAP, [], []
    for setting in TRIED[name][side]:
        curve = train(maker(side), name, setting, TUNING_SEED, *options)
        seconds, mAP = curve[-1]
        words = ", ".join(f"{key} {value}" for key, value in setting.items())
        rows.append(
            (f"{name}, tuning", f"CPU s, {side}: {words}; mAP {mAP}", seconds, math.nan, "")
        )
        found.append((seconds if mAP >= goal else math.inf, -mAP))
        print(*rows[-1][:3], file=sys.stderr, flush=True)
    return TRIED[name][side][found.index(min(found))], rows


def maker(side: str) -> str:
    "Whose training a row is."
    return "torchreid" if side == "torchreid" else "ours"


def curves_of(
    name: str, chosen: dict[str, Setting], seeds: int, options: list[str], train: Train
) -> dict[str, list[Curve]]:
    "The trainings of a set: each side with its setting, some seeds, in turn."
    found: dict[str, list[Curve]] = {side: [] for side in chosen}
    for seed in range(seeds):
        for side, setting in chosen.items():
            found[side].append(train(maker(side), name, setting, seed, *options))
            print(name, side, seed, *found[side][-1][-1], file=sys.stderr, flush=True)
    return found


def raced(name: str, curves: dict[str, list[Curve]]) -> list[Row]:
    "CPU seconds of each seed, and of the middle one."
    goal, rows = GOALS[name], []
    case = f"{name} {goal.size[0]}x{goal.size[1]} to {goal.mAP:.0f} mAP"
    for side, found in curves.items():
        others = curves.get("torchreid", []) if side != "torchreid" else []
        for seed, curve in enumerate(found):
            last = curve[-1]
            measure = f"CPU s, {side}, seed {seed}"
            measure += "" if last[1] >= goal.mAP else f": not reached, mAP {last[1]:.1f}"
            ratio = last[0] / others[seed][-1][0] if others else math.nan
            rows.append((case, measure, last[0], ratio, "torchreid" if others else ""))
        middle = statistics.median(curve[-1][0] for curve in found)
        theirs = statistics.median(curve[-1][0] for curve in others) if others else math.nan
        against = "torchreid" if others else ""
        rows.append((case, f"median CPU s, {side}", middle, middle / theirs, against))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("set", choices=GOALS)
    parser.add_argument("seed", type=int)
    parser.add_argument("setting", type=json.loads)
    parser.add_argument("--full", action="store_true", help="go on to the schedule's end")
    parser.add_argument("--data", type=Path, default=settings().data_dir, help="where sets lie")
    parser.add_argument("--peer", type=Path, default=torchreid_peer.FOLDER)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.side == "torchreid" and (absent := torchreid_peer.why_absent(asked.peer)):
        parser.error(absent)
    told = one(asked.side, asked.set, asked.setting, asked.seed, asked.data, asked.full)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
