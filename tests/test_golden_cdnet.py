"""CDNet, CNet and what they were compared with, against what the authors' public code computes.

Numbers lie in data/cdnet_golden.json and data/cdnet_golden.npz; weights are filled by a rule of their names.
"""

import json
import math
from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from closeness import DEEP, assert_same_formula
from torch import nn
from torch.testing import assert_close

from reidlab.core.recipe import load_recipe, recipe_names
from reidlab.losses.catalogue import weighted_sum
from reidlab.losses.softmax import softmax_loss
from reidlab.losses.triplet import hardest_pairs, pairwise_distances, triplet_loss
from reidlab.models.cblock import CBlock, FusionGate, down_sample, light3x3, pointwise
from reidlab.models.cdnet import (
    cdnet,
    load_reference_state,
    reference_key,
    strip_training_layers,
)
from reidlab.models.cost import count_macs, count_parameters
from reidlab.models.fblneck import balanced_parts, class_scores
from reidlab.models.layered import find_layers, stdnet_maps
from reidlab.models.reid import ReIDModel
from reidlab.models.small_networks import gdasnet, mobilenetv2, osnet
from reidlab.nas.cdnet_space import LAYER_SPACES, derive_layers, layer_supernet
from reidlab.nas.topk import select
from reidlab.training.checks import check_model
from reidlab.training.optim import learning_rate

DATA = Path(__file__).parent / "data"
GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "cdnet"
KEPT = json.loads((DATA / "cdnet_golden.json").read_text())
shared = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared/golden/cdnet")
NECKS = {"fblneck_global_only": "fblneck_global", "stdneck (USE_BNNECK False)": "stdneck"}


@cache
def arrays():
    with np.load(DATA / "cdnet_golden.npz", allow_pickle=False) as stored:
        return dict(stored)


@shared
def test_kept_numbers_are_the_golden_ones():
    for name, kept in KEPT.items():
        there = json.loads((GOLDEN / f"{name}.json").read_text())
        assert {k: v for k, v in kept.items() if k != "origin"} == there
    with np.load(GOLDEN / "forward.npz", allow_pickle=False) as stored:
        for key in stored:
            np.testing.assert_array_equal(stored[key], arrays()[key])
    for net in ("cdnet", "cnet"):
        table = json.loads((GOLDEN / f"state_dict_{net}_fblneck_751.json").read_text())
        rows = [" ".join([key, *map(str, shape)]) for key, shape, _ in table["tensors"]]
        assert rows == arrays()[f"keys_{net}"].tolist()


# --- networks by their golden names ---------------------------------------------------------


def built(net, neck="fblneck", n_pids=751, **options):
    "A network of ours for a golden name such as cdnet:width0.75."
    name, _, kind = net.partition(":")
    neck = NECKS.get(neck, neck)
    if kind.startswith("width"):
        options["width"] = float(kind.removeprefix("width"))
    if kind == "cifar_stem":
        options["stem"] = "cifar"
    if name in ("cdnet", "cnet"):
        return cdnet(name, n_pids, neck, **options)
    taps = {} if name == "mobilenetv2" else {"taps": neck == "fblneck"}
    build = {"stdnet": stdnet_maps, "osnet": osnet, "mobilenetv2": mobilenetv2, "gdasnet": gdasnet}
    maps = build[name](**taps)
    parts = balanced_parts(neck, maps.tap_channels, n_pids, options.get("dropout", 0.2))
    space = {"space": "cdnet"}  # whose list of layers STDNet reads
    return ReIDModel(maps, *parts, {"backbone": name, "genotype": space, "neck": neck})


def on_paper(*names, **options):
    with torch.device("meta"):
        return built(*names, **options)


# --- counts ---------------------------------------------------------------------------------

LAYERED = [name for name, row in KEPT["params"]["networks"].items() if "totals" in row]


@pytest.mark.parametrize("net", LAYERED)
def test_parameters_of_every_head_and_number_of_classes(net):
    row = KEPT["params"]["networks"][net]
    models = {}
    for n_pids, totals in row["totals"].items():
        for neck, expected in totals.items():
            if neck.endswith("_embed"):
                light = strip_training_layers(models[neck.removesuffix("_embed")])
                assert count_parameters(light) == expected
            elif neck not in models:
                model = models[neck] = on_paper(net, neck, int(n_pids))
                assert count_parameters(model) == expected
                assert count_parameters(model.backbone) == row["backbone"]
            else:  # the same backbone, parts for other people
                channels = models[neck].backbone.tap_channels
                with torch.device("meta"):
                    parts = balanced_parts(NECKS.get(neck, neck), channels, int(n_pids))
                assert row["backbone"] + sum(map(count_parameters, parts)) == expected
    assert len(models) == 4 and len(row["totals"]) == 5
    assert model.backbone.stem[0].out_channels == row["planes"][0]
    assert list(model.backbone.tap_channels) == row["planes"][1:]


@pytest.mark.parametrize(
    "net", [name for name in LAYERED if "cells" in KEPT["params"]["networks"][name]]
)
def test_parameters_module_by_module(net):
    row, maps = KEPT["params"]["networks"][net], on_paper(net).backbone
    assert count_parameters(maps.stem) == row["stem"]
    assert [count_parameters(cell) for cell in maps.cells] == row["cells"]


# the original counts a classifier that OSNet never runs, and in GDASNet a convolution of 1,024 by 1,024
# channels with its norm
UNUSED = {"osnet": 512 * 751 + 751, "mobilenetv2": 0, "gdasnet": 1024 * 1024 + 2 * 1024}


@pytest.mark.parametrize("name", UNUSED)
def test_parameters_of_the_comparison_networks(name):
    row = KEPT["params"]["networks"][f"{name}:baseline"]
    model = on_paper(f"{name}:baseline", row["neck"], row["num_classes"])
    assert count_parameters(model) + UNUSED[name] == row["total"]
    assert count_parameters(model.backbone) + UNUSED[name] == row["base_module"]
    never_run = UNUSED[name] if name == "gdasnet" else 0
    assert count_parameters(strip_training_layers(model)) + never_run == row["embed"]


def labelled(row):
    return "-".join(str(row[key]).replace(" ", "") for key in ("net", "input", "neck", "mode"))


@pytest.mark.parametrize("row", KEPT["macs"]["entries"], ids=labelled)
def test_multiply_accumulates(row):
    classes = {"num_classes": 100} | row if "cifar" in row["net"] else {"num_classes": 751} | row
    model = on_paper(row["net"], row["neck"], classes["num_classes"])
    asked = row["mode"] == "classification"
    macs = count_macs(model, (1, 3, *row["input"]), classifier=asked)
    if row["net"].startswith("mobilenetv2"):  # there the original runs its layers in retrieval, too
        macs += 1024 * 512 + 512 * 751
    assert macs == row["mac"]
    if "per_module" in row:
        assert module_costs(model, row["input"], asked) == row["per_module"]


def module_costs(model, size, asked):
    "Of every module by its golden name, in its place; these entries count biases as well."
    parts = {"base.stem": model.backbone.stem}
    parts |= {
        f"base.cells.{i}": cell for i, cell in enumerate(getattr(model.backbone, "cells", ()))
    }
    parts |= {"neck.squeeze": model.pool.squeeze} if hasattr(model.pool, "squeeze") else {}
    shapes = {}
    for name, part in parts.items():
        note = lambda _, given, name=name: shapes.update({name: tuple(given[0].shape)})
        part.register_forward_pre_hook(note)
    model.eval()(torch.zeros(1, 3, *size, device="meta"))
    costs = {}
    for name, part in parts.items():
        gates = [m for m in part.modules() if isinstance(m, FusionGate)]
        biases = sum(gate.fc1.out_channels + gate.fc2.out_channels for gate in gates)
        costs[name] = count_macs(part, shapes[name]) + 2 * biases  # one gate, two stacks
    if asked:
        parts = zip(("global", "local"), model.head.fcs, model.head.classifiers, strict=True)
        for branch, fc, last in parts:
            costs[f"neck.{branch}_fcs"] = fc[0].weight.numel() + fc[0].bias.numel()
            costs[f"neck.{branch}_classifier"] = last.weight.numel() + last.bias.numel()
    return costs


def test_the_published_numbers():
    "Told apart from the table, since pages quote them."
    size = (1, 3, 256, 128)
    assert count_macs(on_paper("cdnet"), size) == 955_063_296
    assert count_macs(on_paper("cnet"), size) == 821_422_080
    light = strip_training_layers(on_paper("cdnet"))
    assert count_parameters(light) == 1_796_600
    assert count_macs(light, size) == 955_063_296


HW = 32 * 16
ANALYTIC = {
    "pointwise": (lambda: pointwise(24, 40), 24, 24 * 40 * HW),
    "light 3×3": (lambda: light3x3(24), 24, (24 * 24 + 9 * 24) * HW),
    "gate": (lambda: FusionGate(24), 24, 2 * 24 * 6),
    "halving": (lambda: down_sample(24), 24, 24 * 24 * HW),
    "block": (
        lambda: CBlock(64, 256, (3, 7)),
        64,
        HW * (64 * 64 + 4 * (64 * 64 + 9 * 64) + 64 * 256 + 64 * 256) + 2 * (2 * 64 * 16),
    ),
    "block without a gate": (
        lambda: CBlock(256, 256, (5, 9), "sum"),
        256,
        HW * (256 * 64 + 6 * (64 * 64 + 9 * 64) + 64 * 256),
    ),
}


@pytest.mark.parametrize("kind", ANALYTIC)
def test_multiply_accumulates_agree_with_the_formula(kind):
    build, channels, expected = ANALYTIC[kind]
    assert count_macs(build(), (1, channels, 32, 16)) == expected


@pytest.mark.parametrize("row", KEPT["shapes"]["entries"], ids=lambda r: f"{r['net']}-{r['input']}")
def test_shapes(row):
    asked = len(row["output"]) == 1 and row["output"][0] == 100
    model = on_paper(row["net"], "fblneck", 100 if asked else 751).eval()
    seen = {}
    parts = {"stem": model.backbone.stem} | {i: cell for i, cell in enumerate(model.backbone.cells)}
    for name, part in parts.items():
        part.register_forward_hook(
            lambda _, __, y, name=name: seen.update({name: list(y.shape[1:])})
        )
    images = torch.zeros(1, 3, *row["input"], device="meta")
    answer = class_scores(model, images) if asked else model(images)
    assert seen.pop("stem") == row["stem"]
    assert list(seen.values()) == row["cells"]
    assert list(answer.shape[1:]) == row["output"]


# --- the authors' keys ----------------------------------------------------------------------


@pytest.mark.parametrize("net", ["cdnet", "cnet"])
def test_keys_and_shapes_are_those_of_the_published_checkpoints(net):
    rows = [row.split() for row in arrays()[f"keys_{net}"].tolist()]
    there = {key: tuple(map(int, shape)) for key, *shape in rows}
    ours = {
        reference_key(key, net, "fblneck"): tuple(tensor.shape)
        for key, tensor in on_paper(net).state_dict().items()
    }
    assert ours == there
    assert len(there) == {"cdnet": 493, "cnet": 403}[net]


MASK = 0xFFFFFFFF


def hashed(x):
    "The golden data's numbers in 0 … 1, from 32-bit integers."
    x ^= x >> 16
    x = (x * 0x7FEB352D) & MASK
    x ^= x >> 15
    x = (x * 0x846CA68B) & MASK
    x ^= x >> 16
    return x / 2.0**32


@cache
def fill(name, shape, dtype=torch.float32):
    "The deterministic weights of the golden data: to be read or copied, not written."
    i = np.arange(math.prod(shape), dtype=np.uint64)
    u = hashed((i * 2654435761 + crc32(name.encode())) & MASK)
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if name.endswith(("running_mean", "bias")):
        u = 0.1 * (2 * u - 1)
    elif name.endswith("running_var"):
        u = 0.5 + u
    elif len(shape) == 1:
        u = 0.8 + 0.4 * u
    else:
        u = (2 * u - 1) * math.sqrt(3 / math.prod(shape[1:]))
    return torch.tensor(u.reshape(shape)).to(dtype)


def filled(net, neck="fblneck", n_pids=751, dtype=torch.float32, **options):
    "A network with the golden weights, brought in as a published checkpoint is."
    model = built(net, neck, n_pids, **options).to(dtype)
    about = model.architecture
    own = model.state_dict()
    names = [reference_key(key, about["genotype"]["space"], about["neck"]) for key in own]
    pairs = zip(names, own.values(), strict=True)
    state = {name: fill(name, tuple(tensor.shape), dtype) for name, tensor in pairs}
    report = load_reference_state(model, state)
    assert not report.left and not report.fresh and len(report.loaded) == len(own)
    return model


def waves(shape, dtype):
    return (
        torch.sin(0.001 * torch.arange(math.prod(shape), dtype=torch.float64)).view(shape).to(dtype)
    )


FORWARD = KEPT["forward"]["checks"]


def described(case):
    row = FORWARD[case]
    net = {"cdnet_cifar": "cdnet:cifar_stem"}.get(case, row["net"].split()[0])
    return net, NECKS.get(row["neck"], row["neck"]), row["num_classes"]


@pytest.mark.parametrize("case", FORWARD)
def test_embeddings_and_logits(case):
    row, model = FORWARD[case], filled(*described(case)).eval()
    answer = class_scores if row["mode"].startswith("classification") else lambda m, x: m(x)
    stats = {}

    def note(name):
        def hook(_, __, y):
            stats[name] = [y.mean().item(), y.std(correction=0).item(), y.abs().max().item()]

        return hook

    parts = {"stem": model.backbone.stem}
    parts |= {f"cell{i}": cell for i, cell in enumerate(model.backbone.cells)}
    hooks = [part.register_forward_hook(note(name)) for name, part in parts.items()]
    with torch.no_grad():
        single = answer(model, waves(row["input_shape"], torch.float32))
        expected = torch.tensor(arrays()[case])
        assert list(single.shape) == row["output_shape"]
        assert_same_formula(single, expected, DEEP)
        assert stats.keys() == row["activations"].keys()
        for name, there in row["activations"].items():
            assert_same_formula(stats[name], there, DEEP)
        for hook in hooks:
            hook.remove()
        double = answer(model.double(), waves(row["small_input_shape"], torch.float64))
    assert_close(double, torch.tensor(arrays()[f"{case}__f64_small"]), rtol=1e-9, atol=1e-12)


def test_a_fine_tuning_start_keeps_everything_but_the_classifiers():
    "From ImageNet's classes to Market's people, with the authors' own key list."
    rows = [row.split() for row in arrays()["keys_cdnet"].tolist()]
    wide = lambda key, shape: [1000, *shape[1:]] if "classifier" in key else shape
    state = {key: fill(key, tuple(wide(key, list(map(int, shape))))) for key, *shape in rows}
    model = cdnet()
    report = load_reference_state(model, state)
    assert len(report.loaded) == 489
    assert set(report.left) == {key for key in state if "classifier" in key}
    assert (
        all(key.startswith("head.classifiers.") for key in report.fresh) and len(report.fresh) == 4
    )
    own = model.state_dict()
    assert all(torch.equal(own[ours], state[theirs]) for ours, theirs in report.loaded.items())


# --- learning -------------------------------------------------------------------------------

STEPS = KEPT["train_step"]["cases"]


def step_of(row):
    smooth = "-smooth" if row["label_smooth"] else ""
    return f"{row['net']}-{row['neck']}-{row['loss_name']}{smooth}"


@pytest.mark.parametrize("row", STEPS, ids=step_of)
def test_a_training_step(row):
    model = filled(row["net"], row["neck"], row["num_classes"], torch.float64, dropout=0.0).train()
    pids = torch.tensor(row["labels"])
    branches = model(waves(row["input_shape"], torch.float64))
    assert len(branches) == len(row["branches_in_order"])
    for branch, there in zip(branches, row["branches_in_order"], strict=True):
        assert list(branch.feat.shape) == there["feat_shape"]
        for ours, theirs in [
            (branch.logits[0], there["logits_row0"]),
            (branch.feat[0, : len(there["feat_row0_head"])], there["feat_row0_head"]),
            (softmax_loss(branch.logits, pids, 0.0), there["ce"]),
            (triplet_loss(branch.feat, pids, 0.3), there["triplet"]),
        ]:
            assert_close(
                ours.detach(), torch.tensor(theirs, dtype=torch.float64), rtol=1e-6, atol=1e-9
            )
        d_ap, d_an = hardest_pairs(pairwise_distances(branch.feat.detach()), pids)
        for ours, theirs in [(d_ap, there["dist_ap"]), (d_an, there["dist_an"])]:
            assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-6, atol=0)
    # the original forgets its smoothing where there is no triplet
    both = row["loss_name"] == "softmax_triplet"
    smoothing = 0.1 if row["label_smooth"] and both else 0.0
    terms = {"softmax": {"smoothing": smoothing}} | ({"triplet": {"margin": 0.3}} if both else {})
    total, _ = weighted_sum(terms)(branches, pids)
    assert_close(total.item(), row["total_loss"], rtol=1e-6, atol=0)
    total.backward()
    space, neck = model.architecture["genotype"]["space"], model.architecture["neck"]
    slopes = {reference_key(k, space, neck): p.grad for k, p in model.named_parameters()}
    assert len(row["grad_l2_norms"]) > 40
    for name, expected in row["grad_l2_norms"].items():
        assert_close(
            slopes[name].norm().item(),
            expected,
            rtol=1e-4,
            atol=0,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_losses():
    g = KEPT["losses"]
    feat, logits = (torch.tensor(g[key], dtype=torch.float64) for key in ("feat", "logits"))
    pids = torch.tensor(g["labels"])
    hard = triplet_loss(feat, pids, 0.3)
    assert_close(hard.item(), g["triplet_margin_0.3"]["loss"], rtol=1e-6, atol=0)
    soft = triplet_loss(feat, pids, "soft")
    assert_close(soft.item(), g["triplet_margin_0.0"]["loss"], rtol=1e-6, atol=0)
    unit = triplet_loss(feat, pids, 0.3, normalize=True)
    assert_close(unit.item(), g["triplet_margin_0.3_normalized"], rtol=1e-6, atol=0)
    for part, found in zip(
        ("dist_ap", "dist_an"), hardest_pairs(pairwise_distances(feat), pids), strict=True
    ):
        expected = torch.tensor(g["triplet_margin_0.3"][part], dtype=torch.float64)
        assert_close(found, expected, rtol=1e-6, atol=0)
    for smoothing, key in ((0.0, "cross_entropy"), (0.1, "cross_entropy_label_smooth_0.1")):
        assert_close(softmax_loss(logits, pids, smoothing).item(), g[key], rtol=1e-6, atol=0)


RECIPES = DATA.parents[1] / "recipes"


def test_the_recipe_follows_the_published_schedule():
    cases = {case["name"]: case for case in KEPT["lr_schedules"]["cases"]}
    g, t = cases["multistep_no_warmup"], load_recipe("cdnet/scratch", folder=RECIPES).train
    assert t.epochs == max(map(int, g["lr"])) + 1 and t.lr_per == "epoch"
    for epoch, expected in g["lr"].items():
        rate = learning_rate(
            int(epoch),
            t.epochs,
            t.optimizer.get("lr"),
            t.schedule,
            t.warmup,
        )
        assert_close(rate, expected, rtol=1e-9, atol=0)


ROWS = [name for name in recipe_names(RECIPES) if name.startswith("cdnet")]
READ = {  # of a recipe, by check_model
    "model": True,
    "loss": True,
    "data": {"height", "width", "sampler", "p", "k"},
}
RIGHT = set()  # what rows before this one read, and passed


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_recipes_can_be_built(row):
    recipe = load_recipe(
        row, folder=RECIPES, overrides={"model.backbone.*.weights": ""}
    )  # not here
    if recipe.model.genotype.startswith(
        "run:"
    ):  # of the same space, whether or not it has been run
        recipe = recipe.with_backbone(genotype="random:0")
    read = recipe.model_dump_json(include=READ)
    if read not in RIGHT:
        check_model(recipe, n_pids=751)
        RIGHT.add(read)


def test_first_weights_of_the_whole_network():
    torch.manual_seed(0)
    model = cdnet()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000 and module.bias is None:
            if name == "pool.squeeze":
                continue
            spread = module.weight.std().item() * (module.weight[0].numel() / 2) ** 0.5
            assert abs(spread - 1) < 0.05, name
        if isinstance(module, nn.Linear):
            assert abs(module.weight.std().item() / 0.001 - 1) < 0.05 and not module.bias.any(), (
                name
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert (module.weight == 1).all() and not module.bias.any(), name


def test_the_published_lists():
    for name, layers in KEPT["params"]["genotypes"].items():
        assert find_layers(name).plain()["layers"] == layers


# --- searching ------------------------------------------------------------------------------

SEARCHES = [
    (space, mixing, case)
    for space in ("cdnet", "cnet")
    for mixing in ("topk", "plain")
    for case in range(len(KEPT[f"search_{space}_{mixing}"]["cases"]))
]
each_search = pytest.mark.parametrize(("space", "mixing", "case"), SEARCHES)


def searching(space, mixing, case):
    g = KEPT[f"search_{space}_{mixing}"]
    return g, g["cases"][case]


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


def offering(g, space):
    "The space by our name that has the candidates of a golden search."
    offered = {name: [list(c) for c in found.candidates] for name, found in LAYER_SPACES.items()}
    (name,) = [n for n, these in offered.items() if these == g["candidates"] and space in n]
    return name


@pytest.mark.parametrize("space", ["cdnet", "cnet"])
@pytest.mark.parametrize("mixing", ["topk", "plain"])
def test_supernets_have_the_candidates_and_the_weights(space, mixing):
    g = KEPT[f"search_{space}_{mixing}"]
    with torch.device("meta"):
        model = layer_supernet(offering(g, space), mixing=mixing)
    net = model.backbone
    assert [list(layer) for layer in net.offered] == g["candidates"]
    weights = [p.numel() for name, p in model.named_parameters() if not name.endswith("alpha")]
    assert sum(weights) == g["supernet_params_751"]
    places = [cell for cell in net.cells if hasattr(cell, "ops")]
    assert [count_parameters(place) for place in places] == g["mblock_params"]


@pytest.mark.parametrize(("space", "case"), [(s, c) for s, m, c in SEARCHES if m == "topk"])
def test_selection(space, case):
    _, row = searching(space, "topk", case)
    alpha = double(row["alphas"]).requires_grad_()
    indices, gates = select(alpha, row["k"])
    assert indices.tolist() == row["topk_indices_sorted_by_prob"]
    assert_close(gates.detach(), double(row["gate_values"]), rtol=0, atol=1e-12)
    x = (np.arange(alpha.numel(), dtype=np.uint64) * 2654435761 + crc32(b"cotangent")) & MASK
    cotangent = 2 * hashed(x) - 1
    (slope,) = torch.autograd.grad(gates, alpha, double(cotangent.reshape(alpha.shape)))
    assert_close(slope, double(row["gate_vjp"]), rtol=1e-6, atol=1e-12)


def supernet_key(key, space):
    "The name under which the authors' supernet keeps a tensor of ours."
    if key.startswith("backbone.last."):
        return key.replace("backbone.last.", "conv1x1.op.")
    if key.startswith("head."):
        key = reference_key(key, "cdnet", "blneck").removeprefix("neck.")
        return key.replace("fcs.", "fc.")
    mixed = ".ops." in key  # backbone.cells.0.ops.7.1.squeeze…: candidate 7, second block
    place, candidate, rest = "", "", key
    if mixed:
        _, _, place, _, candidate, rest = key.split(".", 5)
        rest = f"backbone.cells.{place}.{rest}"
    theirs = reference_key(rest, space, "blneck").removeprefix("base.")
    return (
        theirs.replace(f"cells.{place}.", f"cells.{place}.ops.{candidate}.", 1) if mixed else theirs
    )


@each_search
def test_a_supernet_and_the_gradient_of_its_alphas(space, mixing, case):
    g, row = searching(space, mixing, case)
    options = {"k": row["k"]} if mixing == "topk" else {}
    model = layer_supernet(
        offering(g, space), row["num_classes"], 0.0, mixing=mixing, planes=row["planes"], **options
    ).double()
    net, own = model.backbone, model.state_dict()
    ours = ("alpha", "draws", "ran")  # what the authors keep elsewhere, or not at all
    names = {key: supernet_key(key, space) for key in own if not key.endswith(ours)}
    assert len(set(names.values())) == len(names) == g["tiny_state_dict_len"]
    for key, shape in g["tiny_state_dict_keys_first"]:
        (mine,) = [mine for mine, theirs in names.items() if theirs == key]
        assert list(own[mine].shape) == shape
    with torch.no_grad():
        for key, name in names.items():
            own[key].copy_(fill(name, tuple(own[key].shape), torch.float64))
        net.alpha.copy_(double(row["alphas"]))
    (branch,) = model.train()(waves((8, 3, 64, 32), torch.float64))
    pids = torch.tensor(row["labels"])
    assert_close(branch.logits[0].detach(), double(row["score_row0"]), rtol=1e-6, atol=1e-9)
    head = branch.feat.detach()[0, : len(row["feat_head"])]
    assert_close(head, double(row["feat_head"]), rtol=1e-6, atol=1e-9)
    loss = softmax_loss(branch.logits, pids, 0.0) + triplet_loss(branch.feat, pids, 0.3)
    assert_close(loss.item(), row["loss"], rtol=1e-6, atol=0)
    (slope,) = torch.autograd.grad(loss, net.alpha)
    expected = double(row["alpha_grad"])
    assert_close(slope, expected, rtol=1e-6, atol=1e-9 * expected.abs().max().item())
    assert slope.sum(1).abs().max() < 1e-9 * expected.abs().max()
    assert [list(layer) for layer in derive_layers(net).layers] == row["argmax_layers"]
