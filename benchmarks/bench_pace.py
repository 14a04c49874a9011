"""What `auto` costs in accuracy: recipes trained and judged in fp32 and at the pace that this machine chooses.

    python benchmarks/bench_pace.py RECIPE [RECIPE ...] [--seeds 0 1 2] [--epochs N] [--out results/pace.json]

Two trainings for every seed, apart in precision, layout and compiler alone; the test is asked once for each, and
nothing is chosen by it. Runs that are finished are read, not trained again: what was stopped goes on.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # the checkout's library, installed or not

from reidlab.core.files import write_json  # noqa: E402
from reidlab.core.recipe import load_recipe  # noqa: E402
from reidlab.core.run import environment, find_run  # noqa: E402
from reidlab.jobs.parameters import EvaluateJob, RecipeJob  # noqa: E402
from reidlab.jobs.verbs import evaluate, train  # noqa: E402

AUTO = {"train.precision": "auto", "train.layout": "auto", "train.compiler": "auto"}
AUTO |= {"evaluate.precision": "auto", "evaluate.layout": "auto"}
WAYS = {"fp32": {}, "auto": AUTO}


def one(recipe, seed, way, epochs):
    "A training and its judgement."
    overrides = WAYS[way] | ({"train.epochs": epochs} if epochs else {})
    name = f"pace-{recipe.replace('/', '.')}-{way}-s{seed}"
    about = {"recipe": recipe, "seed": seed, "run": name, "overrides": json.dumps(overrides)}
    told = train(RecipeJob(**about, device="cpu"))
    test = evaluate(EvaluateJob(run=name, device="cpu"))["metrics"]
    events = {e["kind"]: e for e in find_run(name).events("pace")}
    chosen = {
        kind: {k: e[k] for k in ("pace", "why", "milliseconds")} for kind, e in events.items()
    }
    figures = {
        "recipe": recipe,
        "seed": seed,
        "way": way,
        "mAP": test["mAP"],
        "R1": test["R1"],
    }
    return figures | {"seconds": told["seconds"], "chosen": chosen, "epochs": told_epochs(name)}


def told_epochs(name):
    return find_run(name).recipe.train.epochs


def table(rows):
    "Recipe by recipe: both ways, over the seeds."
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        for way in WAYS:
            found = [row for row in rows if (row["recipe"], row["way"]) == (recipe, way)]
            scores = [100 * row["mAP"] for row in found]
            spread = stdev(scores) if len(scores) > 1 else 0.0
            seconds = mean(row["seconds"] for row in found)
            print(f"{recipe:24} {way}: mAP {mean(scores):.2f} ± {spread:.2f}, {seconds:.0f} s")


def main():
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument(
        "recipes", nargs="+", help="of people or vehicles, such as first_look/handmade"
    )
    words.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    words.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    words.add_argument("--epochs", type=int, default=0, help="0: as the recipe says")
    words.add_argument("--out", type=Path, help="a JSON file for the record")
    asked = words.parse_args()
    cells = [(r, s, w) for r in asked.recipes for s in asked.seeds for w in asked.ways]
    rows = [one(*cell, asked.epochs) for cell in cells]
    table(rows)
    if asked.out:
        recipes = {r: load_recipe(r).model_dump(mode="json") for r in asked.recipes}
        write_json(asked.out, {"made": environment("cpu", 1, ""), "recipes": recipes, "rows": rows})


if __name__ == "__main__":
    main()
