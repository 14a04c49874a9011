"""Operations, genotypes and networks against what the public Auto-ReID and DARTS code computes.

The small numbers lie in data/autoreid_golden.json; the arrays beside the clone, in ../shared.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import SUMS, assert_same_formula
from torch import nn
from torch.testing import assert_close

from reidlab.core.recipe import Search, Train
from reidlab.data.loaders import Batch
from reidlab.losses.catalogue import weighted_sum
from reidlab.losses.softmax import softmax_loss
from reidlab.losses.triplet import hardest_pairs, pairwise_distances, triplet_loss
from reidlab.models.blocks import StdConv
from reidlab.models.cost import count_macs, count_parameters
from reidlab.models.derived import derived_network
from reidlab.models.genotype import ALIASES, PUBLISHED, Genotype, find_genotype
from reidlab.models.heads import Branch, LinearHead
from reidlab.models.neck import no_neck
from reidlab.models.ops import SPACES, build_op
from reidlab.models.part_aware import PartAware
from reidlab.models.pooling import AvgPool
from reidlab.models.reid import ReIDModel
from reidlab.nas.darts import SearchTrainer, hypergradient
from reidlab.nas.derive import derive
from reidlab.nas.gdas import gumbel_weights
from reidlab.nas.pcdarts import channel_shuffle, edge_shares
from reidlab.nas.supernet import Supernet
from reidlab.training.optim import learning_rate

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "autoreid"
DATA = Path(__file__).parent / "data"
KEPT = json.loads((DATA / "autoreid_golden.json").read_text())
KEPT_OP = "part_aware_attention_odd_s2"
shared = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared/golden/autoreid")
NAMES = {
    "RETRIEVAL_REID_SEARCH_SPACE": "auto_reid",
    "BASELINE_REID_SEARCH_SPACE": "auto_reid_classification",
    "BASELINE": "auto_reid_baseline",
    "DARTS_V1": "darts_v1",
    "DARTS_V2": "darts_v2",
}
RULES = {"softmax": "softmax", "raw_logit": "raw_logit", "edge_norm": "softmax_edge_norm"}


def golden(name):
    if name.endswith(".json"):
        return json.loads((GOLDEN / name).read_text())
    with np.load(GOLDEN / name, allow_pickle=False) as stored:
        return dict(stored)


def ours(names):
    "Operations by the names that we give them."
    return [ALIASES.get(name, name) for name in names]


def kept_hypergradients():
    "Arrays of the two toy problems, and what is said about them; their origin left out."
    with np.load(DATA / "golden_hypergrad.npz", allow_pickle=False) as stored:
        arrays = dict(stored)
    about = json.loads(str(arrays.pop("about")))
    about.pop("origin")
    return arrays, about


HYPER, ABOUT = kept_hypergradients()


@shared
def test_kept_numbers_are_the_golden_ones():
    table = dict(KEPT["params_shapes"])
    assert table.pop("origin") == "golden/autoreid/params_shapes.json"
    assert table == golden("params_shapes.json")
    assert KEPT["official"]["genotypes"] == golden("official_genotypes.json")
    misc = golden("misc.json")
    assert KEPT["cosine"]["schedules"] == {k: misc[k] for k in misc if k.startswith("cosine")}
    rest = {k: misc[k] for k in misc if not k.startswith("cosine")}
    assert KEPT["misc"] == rest | {"origin": "golden/autoreid/misc.json"}
    arrays = golden("hypergrad.npz")
    assert HYPER.keys() == arrays.keys()
    assert all(np.array_equal(HYPER[key], arrays[key]) for key in arrays)
    assert golden("hypergrad.json") == ABOUT
    assert KEPT["ops"]["names"] == {k: v["params"] for k, v in golden("ops.json").items()}
    arrays = golden("ops.npz")
    mine = {k for k in arrays if k == "x_odd" or k.startswith(f"{KEPT_OP}|")}
    assert KEPT["ops"]["arrays"].keys() == mine
    for key in mine:
        np.testing.assert_array_equal(np.float32(KEPT["ops"]["arrays"][key]), arrays[key])
    expected, alphas = golden("genotype_expected.json"), golden("genotype_alphas.npz")
    assert KEPT["genotypes"]["cases"].keys() == expected.keys()
    for case, kept in KEPT["genotypes"]["cases"].items():
        assert kept["primitives"] == expected[case]["primitives"]
        assert all(kept[rule] == expected[case][f"{rule}_rule"] for rule in RULES.values())
        for kind in ("normal", "reduce"):
            for j in range(expected[case]["n_nodes"]):
                for key, part in (("node", "alpha"), ("beta", "beta")):
                    there = alphas[f"{case}_{kind}_{key}{j}"]
                    np.testing.assert_array_equal(np.float32(kept[f"{part}_{kind}"][j]), there)


# --- operations --------------------------------------------------------------------------------


@cache
def stored_ops():
    return golden("ops.npz")


def entry(name):
    "Input, output in training and in evaluation, weights before and statistics after."
    arrays = KEPT["ops"]["arrays"] if name == KEPT_OP else stored_ops()
    tensor = lambda key: torch.tensor(np.float32(arrays[key]))
    rows = "x_rows_multiple_of_4" if "seed" in name else "x"
    parts = {"w": {}, "post": {}}
    for key in arrays:
        of, _, rest = key.partition("|")
        part, _, parameter = rest.partition("|")
        if of == name and part in parts:
            parts[part][parameter] = tensor(key)
    x = tensor("x_odd" if "_odd_" in name else rows)
    return x, tensor(f"{name}|y_train"), tensor(f"{name}|y_eval"), parts["w"], parts["post"]


def built(name):
    "Our module for a golden name, which says its stride and its affine flag."
    if name == "std_conv_1x1_to8_affine0":
        return StdConv(6, 8, affine=False)
    kind, _, rest = name.replace("_odd", "").rpartition("_s")
    kind = {"part_aware_attention": "part_aware"}.get(kind, kind)
    return build_op(kind, 6, int(rest[0]), affine=not rest.endswith("affine0"))


def renamed(values):
    "Golden parameters by our names: four lists of layers are one grouped layer of ours."
    if not any(key.startswith("op.") for key in values):
        return values
    found = {}
    swaps = {
        "W_K": "key",
        "W_Q": "query",
        "last.convs.0": "last.conv1",
        "last.convs.1": "last.conv2",
    }
    for key, value in values.items():
        key = key.removeprefix("op.")
        if not key.startswith("local_conv_list"):
            for theirs, mine in swaps.items():
                key = key.replace(theirs, mine)
            found[key] = value
    for place, mine in (("1", "body"), ("2", "norm")):
        start = f"op.local_conv_list.0.{place}."
        for kind in [key.removeprefix(start) for key in values if key.startswith(start)]:
            parts = [values[f"op.local_conv_list.{part}.{place}.{kind}"] for part in range(4)]
            whole = torch.cat(parts)
            found[f"{mine}.{kind}"] = whole[..., 0] if whole.ndim == 4 else whole
    return found


@pytest.mark.parametrize(
    "name",
    [n if n == KEPT_OP else pytest.param(n, marks=shared) for n in KEPT["ops"]["names"]],
)
def test_operation(name):
    x, y_train, y_eval, weights, after = entry(name)
    op = built(name)
    assert count_parameters(op) == KEPT["ops"]["names"][name]
    op.load_state_dict(renamed(weights))
    op, x = op.double(), x.double()
    with torch.no_grad():
        assert_same_formula(op.train()(x), y_train, SUMS)
        state = op.state_dict()
        assert after
        for key, value in renamed(after).items():
            scale = max(y_train.abs().max(), value.abs().max())
            assert_same_formula(state[key], value, SUMS, scale)
        assert_same_formula(op.eval()(x), y_eval, SUMS)


# --- genotypes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", KEPT["genotypes"]["cases"])
def test_derived_genotype(case, rule):
    g = KEPT["genotypes"]["cases"][case]
    betas = [g["beta_normal"], g["beta_reduce"]] if rule == "edge_norm" else []
    found = derive(g["alpha_normal"], g["alpha_reduce"], ours(g["primitives"]), rule, *betas)
    expected = g[RULES[rule]]
    for kind in ("normal", "reduce"):
        there = [[[*ours([op]), source] for op, source in node] for node in expected[kind]]
        assert found.plain()[kind] == there


def test_rules_disagree():
    "Cases that told no rule from another would be no test."
    for g in KEPT["genotypes"]["cases"].values():
        assert len({json.dumps(g[rule]) for rule in RULES.values()}) > 1


@pytest.mark.parametrize("name", NAMES)
def test_published_genotype(name):
    official, mine = KEPT["official"]["genotypes"][name], PUBLISHED[NAMES[name]]
    for read in (Genotype.from_json(official), mine):
        for kind in ("normal", "reduce"):
            edges = [[edge[:2] for edge in node] for node in official[kind]]
            assert read.plain()[kind] == edges
            assert read.plain()[f"{kind}_concat"] == official[f"{kind}_concat"]
            strengths = [[edge[2] for edge in node if len(edge) > 2] for node in official[kind]]
            if any(strengths):
                assert read.about["strengths"][kind] == strengths
            else:
                assert "strengths" not in read.about
    assert len(KEPT["official"]["genotypes"]) == len(PUBLISHED)


# --- networks ----------------------------------------------------------------------------------


def labelled(row):
    keys = ("ops", "genotype", "part_aware_variant", "C", "layers", "input")
    return "-".join(str(row[key]).replace(" ", "") for key in keys if key in row)


def rows(part):
    return pytest.mark.parametrize("row", KEPT["params_shapes"][part], ids=labelled)


def ops_of(row):
    "Our operations for a row; the seed's part-aware op is another one than the paper's."
    names = ours(row.get("primitives", SPACES["reid"]))
    if row["ops"] == "seed_reid":
        names = ["part_aware_seed" if name == "part_aware" else name for name in names]
    return names


def supernet(row, n_pids=751):
    "The golden supernet with its plain classifier, without numbers."
    with torch.device("meta"):
        maps = Supernet(ops_of(row), row["nodes"], "darts", row["C"], layers=row["layers"])
        head = LinearHead(maps.out_channels, n_pids, bias=True)
        return ReIDModel(maps, AvgPool(), no_neck(maps.out_channels), head, {})


@rows("supernet")
def test_supernet_counts(row):
    model = supernet(row, row["n_classes"])
    net, nodes = model.backbone, row["nodes"]
    alphas = sum(alpha.numel() for alpha in net.alphas)
    assert alphas == row["alpha_params"]
    # the golden batch norms of a part-aware op learn a scale and a shift, ours do not while searching:
    # 4h and C channels in the paper's op, C in the seed's, on every edge
    widths = [cell.out_channels // nodes for cell in net.stack.cells]
    channels = {
        "paper_reid": sum(4 * (c // 3) + c for c in widths),
        "seed_reid": sum(widths),
    }.get(row["ops"], 0)
    affine = 2 * channels * nodes * (nodes + 3) // 2
    assert count_parameters(model) - alphas + affine == row["weight_params"]
    # and four norms of h channels are one of 4h here
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    apart = sum(m.parts - 1 for m in net.modules() if isinstance(m, PartAware))
    assert bool(apart) == (row["ops"] == "paper_reid")
    assert len(norms) + apart == row["bn_layers"]
    assert net.out_channels == row["classifier_in"]
    kinds = [cell.kind for cell in net.stack.cells]
    assert [i for i, kind in enumerate(kinds) if kind == "reduce"] == row["reduction_cells"]


def stages(stack, model, images):
    "The shape behind the stem and behind every cell, and what the model says."
    seen = []
    named = [("stem", stack.stem), *((f"cell{i}", cell) for i, cell in enumerate(stack.cells))]
    for name, part in named:
        part.register_forward_hook(lambda _, __, y, name=name: seen.append([name, *y.shape]))
    with torch.no_grad():
        (branch,) = model(images)
    return seen, list(branch.logits.shape)


@rows("shapes")
def test_shapes_of_the_supernet(row):
    model = supernet(row)
    seen, logits = stages(model.backbone.stack, model, torch.zeros(row["input"], device="meta"))
    assert seen == row["stages"]
    assert logits == row["logits"]


def network(row, **options):
    genotype = find_genotype(NAMES[row["genotype"]])
    if row["part_aware_variant"] == "seed":
        swap = {"part_aware": "part_aware_seed"}
        cells = [
            [[(swap.get(op, op), source) for op, source in node] for node in cell]
            for cell in (genotype.normal, genotype.reduce)
        ]
        names = tuple(swap.get(op, op) for op in genotype.ops)
        genotype = replace(genotype, normal=cells[0], reduce=cells[1], space="seed", ops=names)
    with torch.device("meta"):
        return derived_network(genotype, n_pids=row["n_classes"], init_channels=row["C"], **options)


@rows("derived")
def test_derived_network(row):
    model = network(row, macro="darts", layers=row["layers"])
    assert count_parameters(model) == row["params"]
    assert count_parameters(model.backbone) == row["params_without_classifier"]
    if "macs_256x128" in row:
        assert count_macs(model, (1, 3, 256, 128), classifier=True) == row["macs_256x128"]


@rows("paper_style")
def test_paper_style_network(row):
    model = network(row, macro="resnet", cells_per_stage=row["cells_per_stage"])
    assert count_parameters(model) == row["params"]
    assert count_parameters(model.backbone) == row["params_without_classifier"]
    assert count_macs(model, tuple(row["input"]), classifier=True) == row["macs"]
    images = torch.zeros(2, *row["input"][1:], device="meta")  # training needs two for its norms
    seen, logits = stages(model.backbone.stack, model, images)
    assert [[name, 1, *rest] for name, _, *rest in seen] == row["stages"]
    assert logits == [2, row["n_classes"]]


def test_the_network_of_the_paper_has_its_numbers():
    "Told apart from the table, since the README quotes them."
    model = network(KEPT["params_shapes"]["paper_style"][0])
    assert count_parameters(model) == 11_420_783
    assert count_macs(model, (1, 3, 384, 128), classifier=True) == 1_934_487_560


# --- learning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KEPT["cosine"]["schedules"])
def test_cosine_rate(name):
    g = KEPT["cosine"]["schedules"][name]
    for epoch, rate in g["lr_at"].items():
        here = learning_rate(int(epoch), g["T"], g["lr0"], {"cosine": {"lr_min": g["eta_min"]}})
        np.testing.assert_allclose(here, rate, rtol=1e-12)


# test_golden_baselines.py compares the loss in float32 with other codes; here in float64, and with its sign
TRIPLETS = ("pk_4x4_d16", "pk_8x4_d32", "pk_8x2_d64_l2", "pk_16x4_d8")


def triplets(case):
    arrays = golden("triplet.npz")
    part = lambda name: torch.tensor(arrays[f"{case}_{name}"])
    return part("emb").requires_grad_(), part("label"), golden("triplet.json")[case], part


@shared
@pytest.mark.parametrize("case", TRIPLETS)
def test_triplet(case):
    x, pids, g, part = triplets(case)
    unit = g["l2_normalised_before_loss"]
    loss = triplet_loss(x, pids, g["margin"], normalize=unit)
    assert loss.dtype == torch.float64
    assert_close(loss.item(), g["batch_hard_loss"], rtol=1e-6, atol=0)
    assert abs(loss.item() - g["sign_flipped_wrong_loss"]) > 0.1
    (slope,) = torch.autograd.grad(loss, x)
    assert_close(slope, part("grad"), rtol=1e-6, atol=1e-9)
    soft = triplet_loss(x, pids, "soft", normalize=unit).item()
    assert_close(soft, g["soft_margin_loss"], rtol=1e-6, atol=0)
    rows = nn.functional.normalize(x) if unit else x
    d_ap, d_an = hardest_pairs(pairwise_distances(rows.detach()), pids)
    assert_close(d_ap, part("dist_ap"), rtol=1e-6, atol=0)
    assert_close(d_an, part("dist_an"), rtol=1e-6, atol=0)


@shared
@pytest.mark.parametrize("case", TRIPLETS)
def test_retrieval_loss(case):
    x, pids, g, part = triplets(case)
    logits = part("logits")
    assert_close(softmax_loss(logits, pids, 0.0).item(), g["cross_entropy"], rtol=1e-6, atol=0)
    options = {"margin": g["margin"], "normalize": g["l2_normalised_before_loss"]}
    for share, key in ((0.5, "combined_lambda_0_5"), (0.8, "combined_lambda_0_8")):
        loss = weighted_sum(
            {
                "softmax": {"weight": share, "smoothing": 0.0},
                "triplet": {"weight": 1 - share, **options},
            }
        )
        total, _ = loss([Branch(logits, x)], pids)
        assert_close(total.item(), g[key], rtol=1e-6, atol=0)


@shared
def test_triplet_of_people_with_one_photo():
    x, pids, g, _ = triplets("singleton")
    loss = triplet_loss(x, pids, g["margin"], valid_only=True)
    assert_close(loss.item(), g["valid_anchor_only_loss"], rtol=1e-6, atol=0)
    (slope,) = torch.autograd.grad(loss, x)
    assert slope.isfinite().all()
    with pytest.raises(ValueError, match="has one photo"):  # never counted as its own positive
        triplet_loss(x, pids, g["margin"])
    d_ap, _ = hardest_pairs(pairwise_distances(x), pids, valid_only=True)
    assert len(d_ap) == sum(g["valid_anchor_mask"])


class TwoMixtures(Supernet):
    "The golden toy problem in a supernet's place: two mixtures of ReLU, tanh, identity and nothing."

    def __init__(self, g):
        nn.Module.__init__(self)
        self.mix, self.masks = "softmax", {}
        self.alpha_normal = nn.Parameter(torch.tensor(g["mix_alpha"][:1]))
        self.alpha_reduce = nn.Parameter(torch.tensor(g["mix_alpha"][1:]))
        self.first, self.middle = (nn.Parameter(torch.tensor(g[f"mix_W{i}"])) for i in (0, 1))

    def forward(self, x):
        h = (x @ self.first).tanh()
        for p in self.mixing().values():
            y = h @ self.middle
            h = p[0, 0] * y.relu() + p[0, 1] * y.tanh() + p[0, 2] * h
        return h


class Toy(nn.Module):
    def __init__(self, g):
        super().__init__()
        self.backbone, self.last = TwoMixtures(g), nn.Parameter(torch.tensor(g["mix_W2"]))

    def forward(self, x):
        return [Branch(self.backbone(x) @ self.last, None)]


def batches_of(g):
    "The toy's batch for the weights and the one for the alphas."
    pair = lambda i: (torch.tensor(g[f"mix_{part}{i}"]) for part in "XY")
    return [Batch(*pair(i), None, None) for i in (1, 2)]


def toy_trainer(g, strategy):
    "The toy problem in the hands of the real search, its optimiser as far as the golden one."
    about = ABOUT["mix"]
    own = {key: about[key] for key in ("momentum", "weight_decay")}
    plan = Train(optimizer={"sgd": {"lr": about["xi"], **own}})
    loss = weighted_sum({"softmax": {"smoothing": 0.0}})
    trainer = SearchTrainer(Toy(g), loss, plan, Search(strategy=strategy), other=None)
    net = trainer.model.backbone
    for i, weight in enumerate((net.first, net.middle, trainer.model.last)):
        buffer = torch.tensor(g[f"mix_buf{i}"])
        trainer.optimizer.state[weight] = {"momentum_buffer": buffer}
    return trainer


def test_first_order_gradient_of_the_alphas():
    learn, held = batches_of(HYPER)
    trainer = toy_trainer(HYPER, "darts")
    found, total = trainer.alpha_gradients(held, learn)
    assert_close(total.item(), ABOUT["mix"]["val_loss"], rtol=1e-9, atol=0)
    there = torch.tensor(HYPER["mix_grad_first_order"])
    assert_close(torch.cat(found), there, rtol=1e-6, atol=1e-12)
    with torch.no_grad():
        here = trainer.forward(learn)[0].item()
    assert_close(here, ABOUT["mix"]["train_loss"], rtol=1e-9, atol=0)


def test_second_order_gradient_of_the_alphas():
    learn, held = batches_of(HYPER)
    trainer = toy_trainer(HYPER, "darts2")
    before = [weight.clone() for weight in trainer.model.parameters()]
    found, _ = trainer.alpha_gradients(held, learn)
    there = {key.removeprefix("mix_grad_"): HYPER[key] for key in HYPER if "mix_grad_" in key}
    gap = {key: float((torch.cat(found) - torch.tensor(g)).abs().max()) for key, g in there.items()}
    for kind, allowed in (("exact", 1e-6), ("finite_difference", 1e-12)):
        assert_close(torch.cat(found), torch.tensor(there[kind]), rtol=0, atol=allowed)
    assert gap["wrong_precedence"] > 1e-4 and gap["first_order"] > 1e-4
    for weight, was in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(weight, was)
        assert weight.grad is None


def test_parts_of_the_second_order_gradient():
    learn, held = batches_of(HYPER)
    trainer = toy_trainer(HYPER, "darts2")
    for alpha in trainer.net.alphas:
        alpha.requires_grad_(True)
    found = trainer.unrolled(held, learn)
    direct = torch.tensor(HYPER["mix_dalpha_direct_at_unrolled"])
    assert_close(torch.cat(found.direct), direct, rtol=1e-9, atol=1e-12)
    assert_close(torch.cat(found.hvp), torch.tensor(HYPER["mix_hvp"]), rtol=1e-6, atol=1e-9)
    assert_close(found.eps, ABOUT["mix"]["eps"], rtol=1e-9, atol=0)


def test_hypergradient_of_a_quadratic():
    g = {key.removeprefix("quad_"): torch.tensor(HYPER[key]) for key in HYPER if "quad_" in key}
    about = ABOUT["quad"]
    w, a = (g[key].clone().requires_grad_() for key in ("w0", "a0"))
    train = lambda: w @ g["A1"] @ w / 2 + w @ g["B1"] @ a + g["c1"] @ w
    val = lambda: w @ g["A2"] @ w / 2 + w @ g["B2"] @ a + g["c2"] @ w + g["d2"] @ a
    step = about["xi"], about["momentum"], about["weight_decay"], [g["buf"]]
    found = hypergradient(train, val, [w], [a], *step)
    assert_close(found.grads[0], g["grad_exact"], rtol=1e-9, atol=1e-12)
    assert_close(found.direct[0], g["dalpha_direct_at_unrolled"], rtol=1e-9, atol=1e-12)
    assert_close(found.hvp[0], g["hvp"], rtol=1e-9, atol=1e-12)
    assert_close(found.eps, about["eps"], rtol=1e-9, atol=0)
    assert (found.grads[0] - g["grad_wrong_precedence"]).abs().max() > 1e-3
    first = hypergradient(train, val, [w], [a])
    assert_close(first.grads[0], g["grad_first_order"], rtol=1e-9, atol=1e-12)
    assert torch.equal(w, g["w0"])


# --- draws, shuffles, shares -------------------------------------------------------------------


@pytest.mark.parametrize("tau", [10.0, 1.0, 0.1])
def test_straight_through_draw(tau):
    given, there = KEPT["misc"]["gumbel_inputs"], KEPT["misc"][f"gumbel_tau_{tau}"]
    part = lambda key: torch.tensor(given[key], dtype=torch.float64)
    logits = part("logits").requires_grad_()
    weights, soft = gumbel_weights(logits, part("gumbel_noise"), tau)
    assert weights.argmax(1).tolist() == there["index"]
    assert_close(weights.detach().sum(1), torch.ones(len(weights), dtype=torch.float64))
    assert (weights != 0).sum(1).tolist() == [1, 1, 1]  # a draw, not a softmax
    assert_close(soft, torch.tensor(there["soft"], dtype=torch.float64), rtol=1e-6, atol=1e-12)
    (slope,) = torch.autograd.grad((weights * part("downstream_values")).sum(), logits)
    grad = torch.tensor(there["grad_logits"], dtype=torch.float64)
    assert_close(slope, grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", KEPT["misc"]["channel_shuffle"])
def test_channel_shuffle(name):
    channels, groups = (int(part[1:]) for part in name.split("_"))
    dealt = channel_shuffle(torch.arange(float(channels)).view(1, -1, 1, 1), groups)
    assert dealt.flatten().int().tolist() == KEPT["misc"]["channel_shuffle"][name]


def test_edge_shares():
    given = KEPT["misc"]["edge_norm"]
    beta = torch.tensor([b for node in given["beta"] for b in node], dtype=torch.float64)
    there = torch.tensor([w for node in given["weights"] for w in node], dtype=torch.float64)
    assert_close(edge_shares(beta, len(given["beta"])), there, rtol=1e-6, atol=1e-9)
