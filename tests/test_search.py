"""The search: two processes like one, run after run the same, and it finds what was hidden for it."""

import csv
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, facts, tiny_recipe, walk
from searching import four_steps
from test_bad_input import CELLS, TRAIN, empty, refused
from test_repeatable import different, last, leaves
from torch import nn

from reidlab.core.recipe import Model, Recipe, Search
from reidlab.core.run import open_run
from reidlab.data.loaders import Batch, open_data
from reidlab.losses.catalogue import weighted_sum
from reidlab.models.bricks import Zero
from reidlab.models.genotype import genotypes_of
from reidlab.models.ops import build_op
from reidlab.nas.darts import SearchTrainer
from reidlab.nas.derive import derive
from reidlab.nas.search import search_from_recipe, weight_plan
from reidlab.nas.supernet import supernet_from_recipe
from reidlab.training import loop
from reidlab.training.launch import launch

SEARCH = "nbs/search.ipynb"
TABLE = Path(__file__).parent / "data" / "planted_search.csv"


def small(seed=0, **more):
    "A recipe whose search takes a second an epoch: eight people, four batches, two cells."
    shape = {
        "data__height": 32,
        "data__width": 16,
        "model__stem": "conv3x2",
        "model__init_channels": 6,
        "model__cells_per_stage": [1, 1],
        "search__init_channels": 6,
        "search__cells_per_stage": [1, 1],
        "search__nodes": 2,
        "search__optimizer": "sgd",
        "search__lr": 0.05,
        "search__p": 4,
        "search__k": 2,
        "search__epochs": 3,
        "search__warmup": 1,
    }
    return tiny_recipe(seed=seed, **shape | more)


# --- two processes and one -------------------------------------------------------------------


def furthest(one, other):
    "The largest difference of any tensor of two networks, as a share of its largest entry."
    assert one.keys() == other.keys()
    ends = ((one[k].double(), other[k].double()) for k in one)
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-6)) for a, b in ends)


def test_two_processes_equal_one_on_the_joint_batch(photos, tmp_path):
    ops = ["skip_connect", "sep_conv_3x3", "part_aware", "none"]  # each norm is an exchange
    more = {"search__warmup": 0, "search__ops": ops, "data__val_fraction": 0.0}
    joint = small(**more)
    recipes = {"joint": joint, "local": small(train__sync_bn=False, **more)}
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    four_steps({"joint": joint}, one, photos, "cpu")
    launch(four_steps, gpus=2, device="cpu", recipes=recipes, folder=two, data_dir=photos)
    alone, *pair, local = (
        torch.load(file, weights_only=True)
        for file in (one / "joint0.pt", two / "joint0.pt", two / "joint1.pt", two / "local0.pt")
    )
    assert alone["backbone.alpha_normal"].dtype == torch.float64
    for kind in ("normal", "reduce"):
        alphas = [state[f"backbone.alpha_{kind}"] for state in pair]
        assert torch.equal(*alphas)  # to the bit
        assert (alone[f"backbone.alpha_{kind}"].abs().max(1).values > 0.02).all()  # they learned
    for state in pair:
        assert furthest(alone, state) < 1e-6
    assert furthest(alone, local) > 1e-3  # the comparison above can fail


# --- again, and in pieces --------------------------------------------------------------------


def searched(recipe, name, root, photos, **more):
    "A finished search; its folder."
    path = root / name
    if not path.exists():
        data = open_data(recipe.data, recipe.seed, photos)
        open_run(name, recipe, verb="search", data=data.fingerprint, root=root)
    search_from_recipe(recipe, path, workers=0, data_dir=photos, **more)
    return path


@pytest.fixture(scope="module")
def reference(photos, tmp_path_factory):
    "A search with everything random that there is: crops, flips, erasing, dropout."
    recipe = small(model__dropout=0.3, train__checkpoint_minutes=1e-9)
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
    other = searched(small(seed=1, model__dropout=0.3), "other", tmp_path, photos)
    assert all(a != b for a, b in zip(answers(other), answers(first), strict=True))


def test_a_search_in_pieces_ends_where_the_whole_one_does(reference, photos, tmp_path, monkeypatch):
    recipe, first = reference
    monkeypatch.setattr(loop, "ASK", 1)  # with the recipe's minutes: a checkpoint after every step
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
    still = {"data__flip": 0.0, "data__pad": 0, "data__erase": 0.0}  # a photo looks alike each time
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


class Drawn:
    "Batches of four people, each a pattern of their own under noise that is new each time."

    def __init__(self, seed, half):
        self.random = torch.Generator().manual_seed(10 * seed + half)
        patterns = torch.Generator().manual_seed(10 * seed)
        self.people = torch.randn(N_PIDS, 3, 4, 2, generator=patterns)
        self.batch_sampler = SimpleNamespace(set_epoch=lambda *place: None)

    def __iter__(self):
        for _ in range(STEPS):
            pids = torch.randperm(N_PIDS, generator=self.random)[:4].repeat_interleave(4)
            images = F.interpolate(self.people[pids], size=(32, 16))
            images = images + 0.5 * torch.randn(images.shape, generator=self.random)
            yield Batch(images, pids, torch.zeros_like(pids), torch.arange(len(pids)))


def search_with(put, kind, seed):
    "The supernet after a search in which put(op, C, stride, way) stands in for ops, None: as it is."
    recipe = Recipe(
        seed=seed,
        model=Model(stem="conv3x2", neck="none", last_stride=2),
        search=Search(
            init_channels=6,
            cells_per_stage={"normal": (1,), "reduce": (1, 1)}[kind],
            epochs=1,
            warmup=0,
            lr=0.05,
            lr_min=0.05,
            alpha_lr=0.05,
            loss={
                "softmax": {"weight": 0.5, "smoothing": 0.0},
                "triplet": {"weight": 0.5, "margin": "soft"},
            },
        ),
    )
    model = supernet_from_recipe(recipe, N_PIDS)
    for cell in model.backbone.stack.cells:
        ways = [(source, node) for node in range(2, cell.nodes + 2) for source in range(node)]
        for edge, way in zip(cell.edges, ways, strict=True):
            stride = 2 if way[0] < 2 and cell.kind == "reduce" else 1
            for op in edge.ops:
                other = put(op, cell.out_channels // cell.nodes, stride, way)
                edge.ops[op] = other or edge.ops[op]
    loss, plan = weighted_sum(recipe.search.loss), weight_plan(recipe)
    trainer = SearchTrainer(model, loss, plan, recipe.search, Drawn(seed, 2))
    trainer.begin(0)
    for batch in islice(Drawn(seed, 1), STEPS):
        trainer.step(batch)
    return trainer.net


def chosen(net, kind):
    "The ops of the edges that a cell keeps."
    found = derive(net.alpha_normal, net.alpha_reduce, net.space)
    return [op for node in getattr(found, kind) for op, _ in node]


def planted(op, kind, seed):
    "One row of the table: hide an op, search."
    net = search_with(lambda name, c, stride, way: None if name == op else Zero(stride), kind, seed)
    ops, p = chosen(net, kind), net.mixing()[kind][:, net.space.index(op)]
    return {
        "op": op,
        "cell": kind,
        "seed": seed,
        "edges": len(ops),
        "found": ops.count(op),
        "mean_probability": round(float(p.mean()), 3),
        "steps": STEPS,
    }


def write_table():
    """Make tests/data/planted_search.csv anew (five minutes):
    cd tests && OMP_NUM_THREADS=1 python -c "import test_search; test_search.write_table()"
    """
    rows = [planted(op, kind, s) for op in PLANTED for kind in CELL_KINDS for s in range(5)]
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("op, kind", [("sep_conv_3x3", "normal"), ("max_pool_3x3", "reduce")])
def test_the_search_finds_the_only_op_that_works(op, kind):
    row = planted(op, kind, seed=0)
    assert row["edges"] == 8 and row["found"] >= MOST, row
    assert row["mean_probability"] > 2 / 7, row  # it began at 1/7


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
        ({"ops": ["sep_conv_3x4", "none"]}, ("op 'sep_conv_3x4'", "Close names: sep_conv_3x3")),
        ({"ops": ["sep_conv_3x3", "skip_connect"]}, ("needs 'none'", "add 'none'")),
        ({"init_channels": 2}, ("part_aware needs 3 channels", "got 2", "Raise init_channels")),
        ({"space": "ried"}, ("search space 'ried' not found", "Close names: reid")),
        ({"epoch": 3}, ("key 'search.epoch' not found", "Close names: search.epochs")),
        ({"strategy": "random"}, ("search.strategy", "'darts'", '"random"')),
    ],
    ids=["p", "op", "none", "channels", "space", "key", "strategy"],
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
        walk(TRAIN, overrides=TINY | CELLS | {"model.genotype": "auto_ried"})
    assert empty(stocked.runs)


def test_a_run_of_another_verb_is_refused(stocked, finished):
    recipe = finished[1]
    data = open_data(recipe.data, recipe.seed)
    run = open_run("done", recipe, verb="train", data=data.fingerprint)
    before = facts(run.path)
    with refused("'done'", "the verb is search here and train there", "-p run NAME"):
        walk(SEARCH, run="done", overrides=recipe.overrides)
    assert facts(run.path) == before
