"""The search: two processes like one, run after run the same, and it finds what was hidden for it."""

import csv
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, facts, tiny_recipe, walk
from searching import two_steps
from test_bad_input import CELLS, TRAIN, empty, refused
from test_repeatable import different, last, leaves
from torch import nn

from reidlab.core.recipe import Model, Recipe, Search
from reidlab.core.run import open_run
from reidlab.data.loaders import Batch, open_data
from reidlab.models.blocks import Zero
from reidlab.models.genotype import genotypes_of
from reidlab.models.ops import build_op
from reidlab.nas.darts import SearchTrainer
from reidlab.nas.derive import derive
from reidlab.nas.search import search_from_recipe, weight_plan
from reidlab.nas.strategies import search_model, search_trainer
from reidlab.training import epoch
from reidlab.training.launch import launch

SEARCH = "nbs/search.ipynb"
TABLE = Path(__file__).parent / "data" / "planted_search.csv"
OTHERS = TABLE.with_name("planted_strategies.csv")


def small(seed=0, **more):
    "A recipe whose search takes a second an epoch: eight people, four batches, two cells."
    shape = {
        "data__height": 32,
        "data__width": 16,
        "model__backbone": {
            "derived": {"stem": "conv3x2", "init_channels": 6, "cells_per_stage": [1, 1]}
        },
        "search__space__*__init_channels": 6,
        "search__space__*__cells_per_stage": [1, 1],
        "search__space__*__nodes": 2,
        "search__optimizer": {"sgd": {"lr": 0.05, "weight_decay": 5e-5}},
        "search__p": 4,
        "search__k": 2,
        "search__epochs": 3,
        "search__warmup": 1,
    }
    return tiny_recipe(seed=seed, **shape | more)


STRATEGIES = ("darts", "darts2", "pcdarts", "gdas")
HOW = {  # what has to be the same in two processes, in two runs, and in pieces
    "darts": {},
    "darts2": {"search__strategy": "darts2"},
    "pcdarts": {"search__strategy": {"pcdarts": {"partial": 2}}},
    "gdas": {"search__strategy": {"gdas": {"tau": [5.0, 0.5]}}},
    "options": {  # all else at once
        "search__strategy": {
            "darts": {"mixing": "sigmoid", "zero_one": 1.0, "auxiliary_skip": True}
        },
        "search__cost_weight": 0.5,
        "search__split": "identities",
        "search__rule": {"usual": {"max_skips": 1}},
    },
}
# --- two processes and one -------------------------------------------------------------------


def furthest(one, other):
    "The largest difference of any tensor of two networks, as a share of its largest entry."
    assert one.keys() == other.keys()
    ends = ((one[k].double(), other[k].double()) for k in one)
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-6)) for a, b in ends)


@pytest.fixture(scope="module")
def both_worlds(photos, tmp_path_factory):
    "Every strategy after two steps: of one process, of each of two, and of two without joint norms."
    ops = ["skip_connect", "sep_conv_3x3", "part_aware", "none"]  # each norm is an exchange
    more = {"search__warmup": 0, "search__space__*__ops": ops, "data__val_fraction": 0.0}
    recipes = {name: small(**more, **HOW[name]) for name in HOW}
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    two_steps(recipes, one, photos, "cpu")
    recipes["local"] = small(train__sync_bn=False, **more)
    launch(two_steps, gpus=2, device="cpu", recipes=recipes, folder=two, data_dir=photos)
    read = lambda path: torch.load(path, weights_only=True)
    found = {name: [read(two / f"{name}{rank}.pt") for rank in (0, 1)] for name in recipes}
    return {name: read(one / f"{name}0.pt") for name in HOW}, found


@pytest.mark.parametrize("how", HOW)
def test_two_processes_equal_one_on_the_joint_batch(how, both_worlds):
    alone, pair = both_worlds[0][how], both_worlds[1][how]
    assert alone["backbone.alpha_normal"].dtype == torch.float64
    names = [key for key in alone if key.startswith(("backbone.alpha", "backbone.beta"))]
    assert len(names) == (4 if how == "pcdarts" else 2)
    for name in names:
        assert torch.equal(*(state[name] for state in pair))  # to the bit
        assert alone[name].abs().max() > 0.02  # they learned
    for key, value in pair[0].items():
        if "running" not in key:
            assert torch.equal(value, pair[1][key]), key
    for state in pair:
        assert furthest(alone, state) < 1e-6


def test_two_processes_without_joint_norms_do_not(both_worlds):
    assert furthest(both_worlds[0]["darts"], both_worlds[1]["local"][0]) > 1e-3


# --- again, and in pieces --------------------------------------------------------------------


def searched(recipe, name, root, photos, **more):
    "A finished search; its folder."
    path = root / name
    if not path.exists():
        data = open_data(recipe.data, recipe.seed, photos)
        open_run(name, recipe, verb="search", data=data.fingerprint, root=root)
    search_from_recipe(recipe, path, workers=0, data_dir=photos, **more)
    return path


@pytest.fixture(scope="module", params=HOW)
def reference(request, photos, tmp_path_factory):
    "A search with everything random that there is: crops, flips, erasing, dropout, draws."
    how = HOW[request.param]
    recipe = small(model__head={"linear": {"dropout": 0.3}}, train__checkpoint_minutes=1e-9, **how)
    return recipe, searched(recipe, "first", tmp_path_factory.mktemp("runs"), photos)


def answers(path):
    return [(g.plain(), g.about["alphas"]) for g in genotypes_of(path)]


def test_two_searches_of_one_recipe_and_seed_are_equal(reference, photos, tmp_path):
    recipe, first = reference
    torch.rand(7)  # whatever was drawn before does not count
    again = searched(recipe, "again", tmp_path, photos)
    kept = leaves(last(first))
    assert len(kept) > 100 and ".model.backbone.alpha_reduce" in kept
    assert different(kept, leaves(last(again))) == []
    assert answers(again) == answers(first) and len(answers(first)) == 4


def test_another_seed_searches_elsewhere(photos, tmp_path):
    one, other = (searched(small(seed=s), f"seed{s}", tmp_path, photos) for s in (0, 1))
    assert all(a != b for a, b in zip(answers(other), answers(one), strict=True))


def test_a_search_in_pieces_ends_where_the_whole_one_does(reference, photos, tmp_path, monkeypatch):
    recipe, first = reference
    monkeypatch.setattr(epoch, "ASK", 1)  # with the recipe's minutes: a checkpoint after every step
    whole, left = SearchTrainer.step, [4, 2]  # steps until the power goes: at an end, in the middle

    def step(self, *given):
        if left and not left[0]:
            left.pop(0)
            raise OSError("the power went out")
        left[:1] = [n - 1 for n in left[:1]]
        return whole(self, *given)

    monkeypatch.setattr(SearchTrainer, "step", step)
    stands = []
    while left:
        with pytest.raises(OSError, match="power"):
            searched(recipe, "pieces", tmp_path, photos)
        progress = last(tmp_path / "pieces")["progress"]
        stands.append((progress["epoch"], progress["step"]))
    assert stands == [(1, 0), (1, 2)]  # the second with alphas and their circle under way
    pieces = searched(recipe, "pieces", tmp_path, photos)
    assert different(leaves(last(first)), leaves(last(pieces))) == []
    assert answers(pieces) == answers(first)


def test_alphas_and_weights_never_learn_from_one_photo(photos, tmp_path, monkeypatch):
    still = {"data__augment__pad_crop__pixels": 0, "data__augment": {}}  # a photo looks alike
    seen, plain = {"weights": set(), "alphas": set()}, SearchTrainer.forward

    def forward(self, batch, network=None):
        who = "weights" if network is None else "alphas"
        seen[who] |= {image.numpy().tobytes() for image in batch.images}
        return plain(self, batch, network)

    monkeypatch.setattr(SearchTrainer, "forward", forward)
    searched(small(**still), "run", tmp_path, photos)
    assert min(map(len, seen.values())) > 15
    assert not seen["weights"] & seen["alphas"]


# --- hidden, and found -----------------------------------------------------------------------
#
# A planted problem: one op of the space works, all others give zeros, so that a search that
# works must name it. It can only do so where the size of a cell's output matters, since that is
# all that a zero beside the useful op takes away. Batch norms without weights, with which each
# cell greets its inputs, forget that size for every cell but the last; a bnneck would forget it
# for the last one as well. So the cell that is asked about stands last, before neck "none":
# a net of one cell asks about `normal`, one of two cells, the second at half size, about
# `reduce`. There a larger feature is a more certain softmax and a wider triplet, on the
# alphas' half as well, as soon as the features tell people apart. The margin is soft because a
# hinge is flat once it is met.
#
# An edge may fail honestly: two contributions to a node can point against each other, and then
# one of them is better silent. Hence the bar: most of the eight edges that the cell keeps. By
# chance, one op of six in each, that happens once in two hundred searches.

PLANTED = (
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "part_aware",
    "dil_conv_3x3",
)
CELL_KINDS = ("normal", "reduce")
N_PIDS, STEPS = 8, 60
MOST = 5  # of 8
# what a strategy needs to be asked fairly: channels enough to share, draws enough to compare
OWN = {
    "darts": {},
    "darts2": {},
    "pcdarts": {"init_channels": 12, "strategy": {"pcdarts": {"partial": 2}}},
    "gdas": {"strategy": {"gdas": {"tau": (5.0, 5.0)}}, "steps": 300},
}


class Drawn:
    "Batches of four people, each a pattern of their own under noise that is new each time."

    def __init__(self, seed, half, steps=0):
        self.steps = steps or STEPS
        self.random = torch.Generator().manual_seed(10 * seed + half)
        patterns = torch.Generator().manual_seed(10 * seed)
        self.people = torch.randn(N_PIDS, 3, 4, 2, generator=patterns)
        self.batch_sampler = SimpleNamespace(set_epoch=lambda *place: None)

    def __iter__(self):
        for _ in range(self.steps):
            pids = torch.randperm(N_PIDS, generator=self.random)[:4].repeat_interleave(4)
            images = F.interpolate(self.people[pids], size=(32, 16))
            images = images + 0.5 * torch.randn(images.shape, generator=self.random)
            yield Batch(images, pids, torch.zeros_like(pids), torch.arange(len(pids)))


def search_with(put, kind, seed, strategy="darts"):
    "The supernet after a search in which put(op, C, stride, way) stands in for ops, None: as it is."
    own = OWN[strategy]
    steps = own.get("steps", STEPS)
    recipe = Recipe(
        seed=seed,
        model=Model(neck="none"),
        search=Search(
            space={
                "reid": {
                    "stem": "conv3x2",
                    "last_stride": 2,
                    "cells_per_stage": {"normal": (1,), "reduce": (1, 1)}[kind],
                    "init_channels": own.get("init_channels", 6),
                }
            },
            strategy=own.get("strategy", strategy),
            epochs=1,
            warmup=0,
            optimizer={"sgd": {"lr": 0.05, "weight_decay": 5e-5}},
            schedule={"cosine": {"lr_min": 0.05}},
            alpha_lr=own.get("alpha_lr", 0.05),
            loss={
                "softmax": {"weight": 0.5, "smoothing": 0.0},
                "triplet": {"weight": 0.5, "margin": "soft"},
            },
        ),
    )
    model = search_model(recipe, N_PIDS)
    for cell in model.backbone.stack.cells:
        ways = [(source, node) for node in range(2, cell.nodes + 2) for source in range(node)]
        for edge, way in zip(cell.edges, ways, strict=True):
            stride = 2 if way[0] < 2 and cell.kind == "reduce" else 1
            width = cell.out_channels // cell.nodes // getattr(edge, "share", 1)
            for op in edge.ops:
                other = put(op, width, stride, way)
                edge.ops[op] = other or edge.ops[op]
    trainer = search_trainer(recipe, model, weight_plan(recipe), Drawn(seed, 2, steps))
    trainer.begin(0)
    for batch in islice(Drawn(seed, 1, steps), steps):
        trainer.step(batch)
    return trainer.net


def chosen(net, kind):
    "The ops of the edges that a cell keeps."
    betas = [net.betas[k] for k in CELL_KINDS] if net.betas else []
    rule = "edge_norm" if betas else "softmax"
    found = derive(net.alpha_normal, net.alpha_reduce, net.space, rule, *betas)
    return [op for node in getattr(found, kind) for op, _ in node]


def planted(op, kind, seed, strategy="darts"):
    "One row of the table: hide an op, search."
    put = lambda name, c, stride, way: None if name == op else Zero(stride)
    net = search_with(put, kind, seed, strategy)
    ops, p = chosen(net, kind), net.tables()[kind].softmax(1)[:, net.space.index(op)]
    return {
        "op": op,
        "cell": kind,
        "seed": seed,
        "edges": len(ops),
        "found": ops.count(op),
        "mean_probability": round(float(p.mean()), 3),
        "steps": OWN[strategy].get("steps", STEPS),
    }


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_table():
    """Make tests/data/planted_search.csv anew (five minutes):
    cd tests && OMP_NUM_THREADS=1 python -c "import test_search; test_search.write_table()"
    """
    rows = [planted(op, kind, s) for op in PLANTED for kind in CELL_KINDS for s in range(5)]
    write_csv(TABLE, rows)


def write_others():
    """Make tests/data/planted_strategies.csv anew (six minutes):
    cd tests && OMP_NUM_THREADS=1 python -c "import test_search; test_search.write_others()"
    """
    asked = [(s, kind, seed) for s in STRATEGIES[1:] for kind in CELL_KINDS for seed in range(5)]
    found = lambda s, kind, seed: {"strategy": s} | planted("sep_conv_3x3", kind, seed, s)
    write_csv(OTHERS, [found(*one) for one in asked])


def two_of_three(search, found):
    """Two seeds of three find it. One seed would hang on the processor's last bits; a search that draws
    blindly passes once in ten thousand. The third seed is asked where the first two disagree."""
    rows = [search(0), search(1)]
    if found(rows[0]) != found(rows[1]):
        rows.append(search(2))
    assert sum(map(found, rows)) >= 2, rows


def most_edges(row):  # its probability began at 1/7
    return row["edges"] == 8 and row["found"] >= MOST and row["mean_probability"] > 2 / 7


@pytest.mark.parametrize("op, kind", [("sep_conv_3x3", "normal"), ("max_pool_3x3", "reduce")])
def test_the_search_finds_the_only_op_that_works(op, kind):
    two_of_three(lambda seed: planted(op, kind, seed), most_edges)


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_every_strategy_finds_the_only_op_that_works(strategy):
    two_of_three(lambda seed: planted("sep_conv_3x3", "normal", seed, strategy), most_edges)


def test_the_search_finds_the_only_edges_that_work():
    chain = {(node - back, node) for node in range(2, 6) for back in (1, 2)}  # the latest two
    works = lambda op, way: op == "dil_conv_3x3" and way in chain
    net = search_with(
        lambda op, c, stride, way: None if works(op, way) else Zero(stride), "normal", seed=0
    )
    found = derive(net.alpha_normal, net.alpha_reduce, net.space).normal
    kept = [(op, (source, node)) for node, edges in enumerate(found, 2) for op, source in edges]
    assert sum(works(*edge) for edge in kept) >= MOST, kept


def test_the_kept_table_is_whole_and_above_the_bar():
    with TABLE.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    asked = {(op, kind, str(s)) for op in PLANTED for kind in CELL_KINDS for s in range(5)}
    assert {(r["op"], r["cell"], r["seed"]) for r in rows} == asked and len(rows) == len(asked)
    assert {(r["edges"], r["steps"]) for r in rows} == {("8", str(STEPS))}
    assert min(int(r["found"]) for r in rows) >= MOST


def enough(rows):
    "Whether four seeds of five found it, none of them by chance."
    return sum(int(row["found"]) >= MOST for row in rows) >= 4


def test_the_kept_table_of_the_strategies_is_whole_and_above_the_bar():
    with OTHERS.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * len(CELL_KINDS) * len(STRATEGIES[1:])
    for strategy in STRATEGIES[1:]:
        for kind in CELL_KINDS:
            mine = [r for r in rows if (r["strategy"], r["cell"]) == (strategy, kind)]
            assert {r["seed"] for r in mine} == set("01234") and enough(mine), mine


@pytest.mark.slow
@pytest.mark.parametrize("kind", CELL_KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_every_strategy_finds_it_under_four_seeds_of_five(strategy, kind):
    rows = [planted("sep_conv_3x3", kind, seed, strategy) for seed in range(5)]
    assert enough(rows), rows


@pytest.mark.slow
@pytest.mark.parametrize("kind", CELL_KINDS)
@pytest.mark.parametrize("op", PLANTED)
def test_the_search_finds_every_op_with_every_seed(op, kind):
    rows = [planted(op, kind, seed) for seed in range(5)]
    assert all(row["found"] >= MOST for row in rows), rows
    assert all(row["mean_probability"] > 1 / 7 for row in rows), rows


class Noise(nn.Module):
    "What no photo has to do with: as loud as a batch norm, and drawn anew each time."

    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        x = x[:, :, :: self.stride, :: self.stride]
        return torch.randn_like(x[:, :, :1, :1]).expand_as(x)


def test_the_search_leaves_what_does_harm():
    put = lambda op, c, stride, way: (Noise if op == "sep_conv_3x3" else Zero)(stride)
    net = search_with(put, "normal", seed=0)
    assert "sep_conv_3x3" not in chosen(net, "normal")
    assert net.mixing()["normal"][:, net.space.index("sep_conv_3x3")].max() < 1 / 14


@pytest.mark.parametrize(
    "put",
    [
        lambda op, c, stride, way: Zero(stride),
        lambda op, c, stride, way: build_op("avg_pool_3x3", c, stride, affine=False),
    ],
    ids=["useless", "useful"],
)
@pytest.mark.parametrize("kind", CELL_KINDS)
def test_the_search_tells_no_difference_where_there_is_none(put, kind):
    net = search_with(put, kind, seed=0)
    p = net.mixing()[kind].detach()[:, :-1]  # all but `none`, which may be better or worse
    assert net.space[-1] == "none"
    assert (p.amax(1) - p.amin(1)).max() < 0.02  # of 1/7; a planted op gains 0.3 and more
    ops = chosen(net, kind)
    assert max(map(ops.count, ops)) < MOST


# --- bad input of the job --------------------------------------------------------------------


@pytest.mark.parametrize(
    "search, words",
    [
        ({"p": 1}, ("2 people or more in each process", "got 1 for 1", "Raise search.p")),
        (
            {"space.*.ops": ["sep_conv_3x4", "none"]},
            ("op 'sep_conv_3x4'", "Close names: sep_conv_3x3"),
        ),
        ({"space.*.ops": ["sep_conv_3x3", "skip_connect"]}, ("needs 'none'", "add 'none'")),
        (
            {"space.*.init_channels": 2},
            ("part_aware needs 3 channels", "got 2", "Raise init_channels"),
        ),
        ({"space": "ried"}, ("search.space 'ried' not found", "Close names: reid")),
        ({"epoch": 3}, ("key 'search.epoch' not found", "Close names: search.epochs")),
        ({"strategy": "random"}, ("search.strategy 'random' not found", "Known: darts")),
        ({"strategy": "darts2"}, ("search.optimizer sgd", "got {'adamw'", "Choose sgd")),
        (
            {"strategy": "pcdarts"},
            ("a width that 4 divides", "got 6", "partial of search.strategy"),
        ),
        (
            {"split": "identities", "loss": {"softmax": {}, "triplet": {"weight": 0.0}}},
            ("only triplet", "Give search.loss.triplet a weight"),
        ),
        ({"max_macs": 1000}, ("no genotype stays within 1,000 MACs", "Raise the limit")),
    ],
    ids=["p", "op", "none", "channels", "space", "key", "strategy"]
    + ["darts2", "pcdarts", "split", "limit"],
)
def test_a_recipe_that_cannot_be_searched_leaves_no_run(search, words, stocked):
    changes = {f"search.{key}": value for key, value in search.items()}
    with refused(*words):
        walk(SEARCH, overrides=TINY | changes)
    assert empty(stocked.runs)


def test_too_few_people_for_each_process(stocked):
    with refused("2 people or more in each process", "got 2 for 2", "search.p", "lower gpus"):
        walk(SEARCH, gpus=2, device="cpu", overrides=TINY | {"search.p": 2})
    assert empty(stocked.runs)


def test_unknown_parameter_of_the_search(lab):
    with refused("parameter 'epochs' not found", "overrides"):
        walk(SEARCH, epochs=3)
    with refused("recipe 'smoek' not found in recipes/", "Close names: smoke"):
        walk(SEARCH, recipe="smoek")
    assert empty(lab.runs) and empty(lab.data)


def test_a_misspelt_genotype_leaves_no_run(stocked):
    with refused("genotype 'auto_ried' not found", "Close names: auto_reid"):
        walk(TRAIN, overrides=TINY | CELLS | {"model.backbone.*.genotype": "auto_ried"})
    assert empty(stocked.runs)


def test_a_run_of_another_verb_is_refused(stocked, finished):
    recipe = finished[1]
    data = open_data(recipe.data, recipe.seed)
    run = open_run("done", recipe, verb="train", data=data.fingerprint)
    before = facts(run.path)
    with refused("'done'", "the verb is search here and train there", "-p run NAME"):
        walk(SEARCH, run="done", overrides=recipe.overrides)
    assert facts(run.path) == before


def test_a_search_may_have_a_head_of_stripes(photos, tmp_path):
    "Stripes take part in a search, and what was found is trained with them."
    recipe = small(
        model__head={"pcb": {"stripes": 2, "cosines": "all"}},
        model__neck={"bn": {"embedding": 8}},
        search__loss={"softmax": {"weight": 0.0}, "am": {}, "triplet": {"margin": 0.3}},
        search__epochs=2,
    )
    folder = searched(recipe, "stripes", tmp_path, photos)
    assert len(genotypes_of(folder)) == 3  # before the first step, and after each epoch
