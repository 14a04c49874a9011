"""The search for layers: every strategy that is promised, two processes like one, and what was hidden is found."""

import csv
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_job, tiny_recipe, walk
from searching import three_candidates, two_steps_of_three
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_bad_input import TRAIN, empty, refused
from test_jobs import EVALUATE, done, pictures
from test_repeatable import different, last, leaves
from test_search import N_PIDS, SEARCH, Drawn, answers, furthest, searched, two_of_three, write_csv
from torch import nn

from reidlab.core.recipe import Recipe, Search
from reidlab.core.run import RunFolder
from reidlab.models.cblock import pointwise
from reidlab.models.genotype import find_genotype, genotypes_of, read_genotype
from reidlab.models.layered import random_layers
from reidlab.nas.cdnet_space import MixedLayer
from reidlab.nas.checks import check_search
from reidlab.nas.darts import SearchTrainer
from reidlab.nas.search import search_from_recipe, weight_plan
from reidlab.nas.strategies import kinds_of_spaces, search_model, search_trainer, strategy_table
from reidlab.training import epoch
from reidlab.training.launch import launch
from reidlab.viz.layers import selection_history

TABLE = Path(__file__).parent / "data" / "planted_layers.csv"
STRATEGIES = strategy_table().index.tolist()
SHAPE = {  # photos of 32 × 16, at the least width that a gate can stand
    "data.height": 32,
    "data.width": 16,
    "model.backbone": "cnet",
    "model.backbone.*.width": 0.0625,
    "search.space.*.width": 0.0625,
}


def small(space="cnet", seed=0, **more):
    "A recipe whose search for layers takes two seconds an epoch."
    own = {"search.space": space, "search.optimizer": {"sgd": {"lr": 0.05, "weight_decay": 5e-5}}}
    own |= {"search.p": 4, "search.k": 2, "search.epochs": 3, "search.warmup": 1}
    more = {key.replace("__", "."): value for key, value in more.items()}
    changes = SHAPE | own | more
    return tiny_recipe(seed=seed, **{key.replace(".", "__"): v for key, v in changes.items()})


HOW = {
    "darts": {},
    "darts2": {"search__strategy": "darts2"},
    "gdas": {"search__strategy": {"gdas": {"tau": [5.0, 0.5]}}},
    "topk": {"search__strategy": "topk", "search__space__*__alpha_noise": 1e-3},
    "explore": {
        "search__strategy": {"topk": {"preset": "explore"}},
        "search__cost_weight": 0.5,
        "search__split": "overlapping",
        "search__alpha_milestones": [2],
        "search__max_macs": 126_000,  # of 123,664 to 134,288 that three candidates can cost
    },
}


# --- what is promised, and what is refused ---------------------------------------------------


def cells_of_the_table():
    for strategy in STRATEGIES:
        for space, kind in kinds_of_spaces().items():
            yield pytest.param(strategy, space, kind, id=f"{strategy}-{space}")


@pytest.mark.parametrize("strategy, space, kind", list(cells_of_the_table()))
def test_the_table_of_strategies_and_spaces_is_kept(strategy, space, kind):
    told = strategy_table().loc[strategy, space]
    more = {"search.strategy": strategy, "search.optimizer": "sgd", "search.p": 4, "search.k": 2}
    if kind == "layers":
        more |= SHAPE
        more["model.backbone"] = "cnet" if space == "cnet" else "cdnet"
    else:
        more |= {
            "search.space.*.nodes": 2,
            "search.space.*.init_channels": 16,
            "search.space.*.cells_per_stage": [1, 1],
        }
    more |= {"search.space": space}
    recipe = tiny_recipe(**{key.replace(".", "__"): value for key, value in more.items()})
    if told != "yes":
        with pytest.raises(ValueError) as wrong:
            check_search(recipe, N_PIDS)
        both = f"search.strategy {strategy} does not search search.space {space}: "
        assert str(wrong.value) == both + told and "Choose search.strategy" in told
        return
    check_search(recipe, N_PIDS)
    model = search_model(recipe, N_PIDS)
    trainer = search_trainer(recipe, model, weight_plan(recipe), Drawn(0, 2, 1))
    trainer.begin(1)
    before = [a.clone() for a in trainer.net.alphas]
    losses = [float(trainer.step(batch)["loss"]) for batch in Drawn(0, 1, 1)]
    assert np.isfinite(losses).all()
    assert all(not torch.equal(a, b) for a, b in zip(before, trainer.net.alphas, strict=True))


@pytest.mark.parametrize(
    "search, words",
    [
        ({"space.*.nodes": 3}, ("search.space.cnet", "nodes is an option of reid, darts")),
        ({"memory": "lean"}, ("search.memory makes cells lean", "space cnet is of layers")),
        ({"rule": "raw_logit"}, ("search.rule raw_logit is about cells", "space cnet")),
        (
            {"top_k": 3},
            ("search.top_k is no key any more", "an option of a part: search.strategy.topk.k"),
        ),
        (
            {"strategy": {"topk": {"k": 9}}},
            ("strategy topk", "space cnet", "at most the 6 candidates", "got 9"),
        ),
        ({"strategy": "topk", "sharpness": True}, ("topk may choose others",)),
        ({"health": {"skips": {}}}, ("'skips' does not speak about a search of layers",)),
        ({"max_macs": 1000}, ("no list of layers stays within 1,000 MACs", "Raise the limit")),
        ({"space.*.width": 0.01}, ("the stem needs 4 or more",)),
        ({"space.*.stem": "conv3x2"}, ("stem 'conv3x2' not found",)),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_search_for_layers_that_cannot_be_leaves_no_run(search, words, stocked):
    changes = {f"search.{key}": value for key, value in search.items()}
    with refused(*words):
        walk(SEARCH, overrides=dict(small().overrides) | changes)
    assert empty(stocked.runs)


# --- two processes, again, and in pieces -----------------------------------------------------


@pytest.fixture(scope="module")
def both_worlds(photos, tmp_path_factory):
    "Every strategy after two steps: of one process, and of each of two."
    # a low rate: the layers before the classifier begin near 0, where large steps blow rounding up
    still = {"search__warmup": 0, "search__optimizer__sgd__lr": 1e-3, "data__val_fraction": 0.0}
    recipes = {how: small(**still, **HOW[how]) for how in HOW}
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    two_steps_of_three(recipes, one, photos, "cpu")
    launch(two_steps_of_three, gpus=2, device="cpu", recipes=recipes, folder=two, data_dir=photos)
    read = lambda path: torch.load(path, weights_only=True)
    pairs = {how: [read(two / f"{how}{rank}.pt") for rank in (0, 1)] for how in HOW}
    return {how: read(one / f"{how}0.pt") for how in HOW}, pairs


@pytest.mark.parametrize("how", HOW)
def test_two_processes_equal_one_on_the_joint_batch(how, both_worlds):
    alone, pair = both_worlds[0][how], both_worlds[1][how]
    assert (alone["backbone.alpha"] - 1e-3).abs().max() > 0.02  # they learned
    assert torch.equal(pair[0]["backbone.ran"], pair[1]["backbone.ran"])  # the same path
    assert torch.equal(alone["backbone.ran"], pair[0]["backbone.ran"])
    for key, value in pair[0].items():
        if "running" not in key:
            assert torch.equal(value, pair[1][key]), key
    for state in pair:
        # second order divides a difference of two losses by a tiny step, and rounding with it
        assert furthest(alone, state) < (1e-4 if how == "darts2" else 1e-6)


@pytest.fixture(scope="module", params=("topk", "explore"))
def reference(request, photos, tmp_path_factory):
    "A search with everything random that there is, three candidates a place."
    recipe = small(
        model__head={"linear": {"dropout": 0.3}},
        train__checkpoint_minutes=1e-9,
        **HOW[request.param],
    )
    with three_candidates():
        return recipe, searched(recipe, "first", tmp_path_factory.mktemp("runs"), photos)


@pytest.fixture
def three():
    with three_candidates():
        yield


def test_two_searches_are_equal_and_a_search_in_pieces_is_too(
    reference, three, photos, tmp_path, monkeypatch
):
    recipe, first = reference
    torch.rand(7)  # whatever was drawn before does not count
    again = searched(recipe, "again", tmp_path, photos)
    assert different(leaves(last(first)), leaves(last(again))) == []
    monkeypatch.setattr(epoch, "ASK", 1)
    whole, left = SearchTrainer.step, [6]

    def step(self, *given):
        if left and not left[0]:
            left.pop(0)
            raise OSError("the power went out")
        left[:1] = [n - 1 for n in left[:1]]
        return whole(self, *given)

    monkeypatch.setattr(SearchTrainer, "step", step)
    with pytest.raises(OSError, match="power"):
        searched(recipe, "pieces", tmp_path, photos)
    pieces = searched(recipe, "pieces", tmp_path, photos)
    assert different(leaves(last(first)), leaves(last(pieces))) == []
    assert answers(pieces) == answers(first)
    told = [g.about["ran"] for g in genotypes_of(first)]
    assert [g.about["ran"] for g in genotypes_of(pieces)] == told


def test_what_a_search_for_layers_leaves(reference, three):
    recipe, first = reference
    found = find_genotype(str(first / "genotype.json"))
    assert found.space == "cnet" and len(found.layers) == 6
    said = {"rule", "candidates", "alphas", "ran", "strategy", "cost", "made_by"}
    assert set(found.about) == said and found.about["made_by"]["epoch"] == 3
    table = selection_history(genotypes_of(first))
    passes = table.groupby(["epoch", "place"]).ran.sum()
    assert (passes > 0).all() and passes.groupby("epoch").nunique().eq(1).all()
    if recipe.search.max_macs:
        assert found.about["cost"]["macs"] <= recipe.search.max_macs
    assert search_from_recipe(recipe, first)["selection"].endswith("rule argmax")


# --- the jobs --------------------------------------------------------------------------------


def test_layers_are_searched_trained_and_ranked_by_the_jobs(lab):
    own = dict(small().overrides) | {"model.neck": "fblneck", "search.epochs": 2}
    own |= {"search.strategy": {"topk": {"preset": "explore"}}, "train.epochs": 1}
    page = lab.root / "search.ipynb"
    done(run_job(SEARCH, page, overrides=own))
    run = RunFolder(lab.runs / "smoke-search-s0")
    assert pictures(page) == 6  # a batch, the answer, the curves, the alphas, who ran, health
    assert page.read_text().count("image/svg+xml") == 1  # the column of layers
    assert run.history()["val_mAP"].between(0, 1).any()
    found = genotypes_of(run.path)[-1]
    board = EventAccumulator(str(run.path)).Reload()
    assert [s.step for s in board.Images("genotype/cells")] == [1, 2]
    walk(TRAIN, overrides=own | {"model.backbone.*.genotype": f"run:{run.name}"})
    walk(EVALUATE, run="smoke-train-s0")
    trained = RunFolder(lab.runs / "smoke-train-s0")
    assert read_genotype(trained.path / "genotype.json").layers == found.layers
    assert trained.metrics()["metrics"]["macs"] == found.about["cost"]["macs"]
    with refused("is a search; its supernet", '"model.backbone": {"cnet"'):
        walk(EVALUATE, run=run.name)
    walk(TRAIN, run="drawn", overrides=own | {"model.backbone.*.genotype": "random:3"})
    drawn = read_genotype(lab.runs / "drawn" / "genotype.json")
    assert drawn.layers == random_layers(3, "cnet").layers


# --- hidden, and found -----------------------------------------------------------------------
#
# At one place of six every candidate but one hands each photo the map of another, so that
# nothing can be learned through it; the useful one is not among those that run first. Those others
# share one block, and at the other places all candidates are one pointwise convolution, each
# computed once, so that a pass is cheap. Single paths (gdas) are not asked: five steps of six would
# train on what tells nothing, under which the weights fall to chance before the alphas hear; and
# this place is one that a single gate is deaf at.

PLACE, USEFUL = 3, 4
PLANTED = {  # what a strategy needs to be asked fairly: passes enough, for who runs few of them
    "darts": {},
    "topk": {"strategy": "topk"},
    "topk, explore": {"strategy": {"topk": {"preset": "explore", "tau": (1.0, 1.0)}}},
}
STEPS = {"darts": 60, "topk": 60, "topk, explore": 60}


class Alike(nn.Module):
    "One block in place of all candidates, computed once a pass."

    def __init__(self, block):
        super().__init__()
        self.block, self.seen = block, (None, None)

    def forward(self, x):
        if self.seen[0] is not x:
            self.seen = (x, self.block(x))
        return self.seen[1]


class Exchanged(nn.Module):
    "What a block makes of the photos, each handed to another."

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x)[torch.randperm(len(x))]


def alike(ops):
    "The candidates of a place where nothing is asked."
    inside, out = ops[0][0].squeeze[0], ops[0][0].restore[0]
    return nn.ModuleList([Alike(pointwise(inside.in_channels, out.out_channels))] * len(ops))


def hidden(ops):
    "The candidates of the place that is asked about."
    rest = Exchanged(Alike(ops[0]))
    return nn.ModuleList(op if i == USEFUL else rest for i, op in enumerate(ops))


def planted(how, seed):
    "One row of the table: hide a candidate, search."
    steps = STEPS[how]
    recipe = Recipe(
        seed=seed,
        search=Search(
            space={"cnet": {"width": 0.0625}},
            epochs=1,
            warmup=0,
            alpha_lr=0.05,
            loss={
                "softmax": {"weight": 0.5, "smoothing": 0.0},
                "triplet": {"weight": 0.5, "margin": "soft"},
            },
            optimizer={"sgd": {"lr": 0.05, "weight_decay": 5e-5}},
            schedule={"cosine": {"lr_min": 0.05}},
            **PLANTED[how],
        ),
    )
    model = search_model(recipe, N_PIDS)
    places = [cell for cell in model.backbone.cells if isinstance(cell, MixedLayer)]
    for place in places:
        place.ops = (hidden if place is places[PLACE] else alike)(place.ops)
    trainer = search_trainer(recipe, model, weight_plan(recipe), Drawn(seed, 2, steps))
    trainer.begin(0)
    for batch in islice(Drawn(seed, 1, steps), steps):
        trainer.step(batch)
    p = trainer.net.alpha.detach()[PLACE].softmax(0)
    return {
        "strategy": how,
        "seed": seed,
        "steps": steps,
        "found": int(p.argmax() == USEFUL),
        "probability": round(float(p[USEFUL]), 3),
        "next": round(float(p[torch.arange(len(p)) != USEFUL].max()), 3),
        "ran": int(trainer.net.ran[PLACE, USEFUL]),
    }


def write_table():
    """Make tests/data/planted_layers.csv anew (a minute):
    cd tests && OMP_NUM_THREADS=1 python -c "import test_layers; test_layers.write_table()"
    """
    write_csv(TABLE, [planted(how, seed) for how in PLANTED for seed in range(5)])


@pytest.mark.parametrize("how", [how for how in PLANTED if how != "topk"])
def test_the_search_finds_the_only_layer_that_can_be_trusted(how):
    clear = lambda row: row["found"] and row["probability"] > 1.2 * row["next"]
    two_of_three(lambda seed: planted(how, seed), clear)


def test_published_topk_finds_it_or_never_heard_it():
    """As published, the two loudest run and so grow louder: which candidate is heard at all is luck
    (up to three seeds of six miss it, by the processor's last bits). What ran as often as its turn
    would be is found; preset explore, above, lets all of them run."""
    turn = 2 * 2 * STEPS["topk"] / 6  # weights and alphas, two of 6 candidates a pass
    for seed in (0, 4):
        row = planted("topk", seed)
        assert row["found"] or row["ran"] < turn, row


def test_the_kept_table_of_layers_is_whole_and_above_the_bar():
    with TABLE.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(r["strategy"], r["seed"]) for r in rows] == [
        (h, str(s)) for h in PLANTED for s in range(5)
    ]
    for how in PLANTED:
        assert sum(int(r["found"]) for r in rows if r["strategy"] == how) >= 4, how


@pytest.mark.slow
@pytest.mark.parametrize("how", PLANTED)
def test_every_strategy_finds_it_under_four_seeds_of_five(how):
    rows = [planted(how, seed) for seed in range(5)]
    assert sum(row["found"] for row in rows) >= 4, rows
