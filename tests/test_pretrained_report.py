"""What the report on a pretrained file shows is what the records hold, and the comparison is a fair one."""

import itertools
import re

import nbformat
import numpy as np
import pytest

from reidlab.core.run import RunFolder, read_json
from reidlab.core.settings import project_root

RESULTS = project_root() / "results"
PAGE = nbformat.read(project_root() / "reports" / "05_pretrained.ipynb", as_version=4)
SETS = {"people": "synthetic", "vehicles8": "vehicles8"}
WAYS = {
    "people": ("scratch", "frozen", "fine_tuned", "small"),
    "vehicles8": ("scratch", "frozen", "fine_tuned"),
}
SHOWN = [(name, way) for name, ways in WAYS.items() for way in ways]
SEEDS = (0, 1, 2)
STUDENT = 4.302653  # of two degrees of freedom, 97.5 %


def run_of(name: str, way: str, seed: int) -> RunFolder:
    return RunFolder(RESULTS / f"pretrained_{name}.{way}-train-s{seed}")


def figures(name: str, way: str, key: str = "mAP") -> np.ndarray:
    "One figure a seed, in per cent, read off the records."
    paths = [run_of(name, way, s).path / "evaluate" / SETS[name] for s in SEEDS]
    return np.array([100 * read_json(p / "metrics.json")["metrics"][key] for p in paths])


def tables() -> str:
    "All cells of the page's tables and sentences, as text."
    outputs = [o for c in PAGE.cells for o in c.get("outputs", [])]
    parts = [o["data"].get("text/html") or o["data"].get("text/markdown", "") for o in outputs]
    return re.sub(r"<[^>]+>", " ", " ".join("".join(p) for p in parts)).replace("\n", " ")


def sign(x: float) -> str:
    return f"{x:+z.1f}"


@pytest.mark.parametrize(("name", "way"), SHOWN)
def test_a_mean_and_its_interval_are_those_of_the_records(name, way):
    x, text = figures(name, way), tables()
    reach = STUDENT * x.std(ddof=1) / np.sqrt(3)
    low, high = max(0.0, x.mean() - reach), min(100.0, x.mean() + reach)
    assert f"{x.mean():.1f} [{low:.1f}, {high:.1f}]" in text
    for key in ("R1", "mINP"):
        assert f" {figures(name, way, key).mean():.1f} " in text


@pytest.mark.parametrize("name", SETS)
def test_the_answer_is_the_difference_of_the_means(name):
    mean = {way: figures(name, way).mean() for way in WAYS[name]}
    line = re.search(rf"- \*\*{name}:\*\* (.+?\])\.(?: |$)", tables())[1]
    said = re.findall(r"([+-][\d.]+) \[", line)
    pairs = [("fine_tuned", "scratch"), ("fine_tuned", "small"), ("frozen", "scratch")]
    assert said == [sign(mean[a] - mean[b]) for a, b in pairs if b in mean]


@pytest.mark.parametrize("name", SETS)
def test_all_ways_have_the_same_budget_photos_and_losses(name):
    runs = [run_of(name, way, s) for way, s in itertools.product(WAYS[name], SEEDS)]
    steps: dict[int, set[int]] = {seed: set() for seed in SEEDS}
    for run in runs:
        past, data = run.history(), run.recipe.data
        taken = (past["images_per_s"] * past["seconds"]).sum() / (data.p * data.k)
        steps[run.recipe.seed].add(round(taken))
        assert run.environment["threads"] == 1 and not run.environment["dirty"]
    assert all(len(counts) == 1 for counts in steps.values())
    assert len({run.environment["data"] for run in runs}) == 1
    same = [run.recipe.model_copy(update={"model": None}) for run in runs]
    assert all(r.data == same[0].data and r.loss == same[0].loss for r in same)
    assert all(run.recipe.model.neck == runs[0].recipe.model.neck for run in runs)
    schedule = {
        str((r.train.epochs, r.train.schedule, r.train.warmup, r.train.select)) for r in same
    }
    assert len(schedule) == 1 and same[0].train.select == "last"


@pytest.mark.parametrize(("name", "way"), list(itertools.product(SETS, ("frozen", "fine_tuned"))))
def test_the_file_was_taken_whole_and_rested_where_it_should(name, way):
    file = read_json(RESULTS / "pretrained_file.json")["file"]
    for seed in SEEDS:
        run = run_of(name, way, seed)
        (event,) = run.events("weights")
        assert (event["file"], event["loaded"], event["left"]) == (file["name"], file["keys"], [])
        assert not [key for key in event["fresh"] if key.startswith("backbone.")]
        assert file["sha256"] in run.environment["given"].values()
        train = run.recipe.train
        assert train.freeze_epochs == (train.epochs if way == "frozen" else 0)


def test_a_rate_is_the_best_that_was_tried():
    tried = read_json(RESULTS / "pretrained_file.json")["rates"]["tried"]
    for name, way in itertools.product(SETS, ("scratch", "frozen", "fine_tuned")):
        best = max((t for t in tried if t["way"] == way), key=lambda t: t["val_mAP"][-1])
        own = [t for t in tried if (t["way"], t["set"]) == (way, name)]
        best = max(own, key=lambda t: t["val_mAP"][-1]) if way != "scratch" else best
        optimizer = run_of(name, way, 0).recipe.train.optimizer
        assert (optimizer.name, optimizer.get("lr")) == (best["optimizer"], best["lr"])
