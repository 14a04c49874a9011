"""A lean supernet is the plain one with less memory: gradients, statistics, precisions, processes, bytes."""

import copy
import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from leaning import two_steps
from torch.func import functional_call
from torch.testing import assert_close

from reidlab.core.recipe import Recipe, Search, Train
from reidlab.data.loaders import Batch
from reidlab.models.ops import SPACES
from reidlab.nas.darts import frozen_statistics
from reidlab.nas.footprint import footprint
from reidlab.nas.lean import LEVELS, cells_of, make_lean, make_plain, measure, plan, use_memory
from reidlab.nas.supernet import Supernet, supernet_from_recipe, supernet_of
from reidlab.training.launch import launch

OPS = {**SPACES, "seed": ("skip_connect", "part_aware_seed", "part_aware_seed_scaled", "none")}
MACROS = {
    "resnet": {"cells_per_stage": (1, 2, 1), "stem": "conv3x2"},
    "darts": {"layers": 4, "stem": "conv3_s2"},
}
SIZES = {("reid", "resnet"): ((74, 38), (64, 32)), ("seed", "resnet"): ((74, 38), (64, 32))}
MIXED = "mixed"  # a different level for every cell


def supernet(space="reid", macro="resnet", level="", nodes=2, channels=4, **more):
    "A small net with alphas that differ, in double precision."
    torch.manual_seed(0)
    net = Supernet(OPS[space], nodes, macro, channels, **MACROS[macro] | more).double()
    with torch.no_grad():
        for alpha in net.alphas:
            alpha.normal_()
    return lean(net, level)


def lean(net, level):
    if level == MIXED:
        level = ["edge", "node", "cell", "lean"]
    return make_lean(net, level) if level else net


def step(net, images, probe):
    "Loss, gradients, and the state after one step."
    net.zero_grad()
    loss = (net(images) * probe).mean()
    loss.backward()
    grads = {key: value.grad.clone() for key, value in net.named_parameters()}
    return loss.detach(), grads, {key: value.clone() for key, value in net.state_dict().items()}


def farthest(ours, theirs):
    "The largest relative error of any gradient."
    assert ours.keys() == theirs.keys()
    return max(float((ours[k] - g).norm() / g.norm()) for k, g in theirs.items())


# --- exactness ---------------------------------------------------------------------------------


@pytest.mark.parametrize("macro", MACROS)
@pytest.mark.parametrize("space", OPS)
def test_gradients_and_statistics_are_the_plain_ones(space, macro):
    for size in SIZES.get((space, macro), ((37, 19), (32, 16))):
        images = torch.randn(3, 3, *size).double()
        plain = supernet(space, macro)
        probe = torch.randn_like(plain.eval()(images))
        loss, grads, state = step(plain.train(), images, probe)
        for level in (*LEVELS, MIXED):
            ours = step(supernet(space, macro, level), images, probe)
            assert_close(ours[0], loss, rtol=1e-9, atol=0)
            # the bias in front of a norm has no gradient but rounding
            heard = {k: g for k, g in grads.items() if g.norm() > 1e-12}
            assert len(heard) > 0.8 * len(grads)
            assert farthest({k: ours[1][k] for k in heard}, heard) < 1e-9, level
            assert_close(ours[2], state, rtol=1e-9, atol=1e-12)
            assert all(n == 1 for k, n in ours[2].items() if "cells" in k and "tracked" in k)


@pytest.mark.parametrize("level", LEVELS)
def test_evaluation_frozen_statistics_and_three_steps(level):
    images = torch.randn(3, 3, 64, 32).double()
    nets = supernet(), supernet(level=level)
    probe = torch.randn_like(nets[0].eval()(images))
    for mode in ("train", "frozen", "train", "eval"):
        found = []
        for net in nets:
            net.train(mode != "eval")
            with frozen_statistics(net) if mode == "frozen" else nullcontext():
                found.append(step(net, images, probe))
        for ours, theirs in zip(*found, strict=True):
            assert_close(ours, theirs, rtol=1e-8, atol=1e-12)
        with torch.no_grad():
            assert_close(nets[1](images), nets[0](images), rtol=1e-9, atol=1e-12)


def test_each_pooling_norm_has_its_own_statistics_in_evaluation():
    nets = supernet(), supernet(level="edge")
    for net in nets:
        net.eval()
        for i, module in enumerate(m for m in net.modules() if hasattr(m, "running_mean")):
            module.running_mean.fill_(i / 100)
    images = torch.randn(2, 3, 64, 32).double()
    for ours, theirs in zip(step(nets[1], images, 1), step(nets[0], images, 1), strict=True):
        assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_only_alphas_or_only_weights(level):
    images = torch.randn(3, 3, 64, 32).double()
    nets = supernet(), supernet(level=level)
    slopes = [torch.autograd.grad(net(images).pow(2).mean(), net.alphas) for net in nets]
    assert_close(slopes[1], slopes[0], rtol=1e-9, atol=1e-12)
    for net in nets:
        for alpha in net.alphas:
            alpha.requires_grad_(False)
        net(images).pow(2).mean().backward()
    assert all(alpha.grad is None for alpha in nets[1].alphas)
    pairs = zip(nets[1].stack.parameters(), nets[0].stack.parameters(), strict=True)
    for ours, theirs in pairs:
        assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_weights_handed_in_for_one_pass_are_those_of_the_second(level):
    images = torch.randn(3, 3, 64, 32).double()
    found = []
    for net in (supernet(), supernet(level=level)):
        other = {k: (1.5 * v).detach().requires_grad_() for k, v in net.named_parameters()}
        loss = functional_call(net, other, (images,)).pow(2).mean()
        found.append(torch.autograd.grad(loss, [*other.values()]))
    assert_close(found[1], found[0], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_single_precision_and_channels_last(level):
    images = torch.randn(4, 3, 64, 32)
    plain = supernet().float()
    probe = torch.randn_like(plain.eval()(images))
    loss, grads, state = step(copy.deepcopy(plain).train(), images, probe)
    norm = torch.cat([g.flatten() for g in grads.values()]).norm()
    for form in (torch.contiguous_format, torch.channels_last):
        net = lean(copy.deepcopy(plain).train().to(memory_format=form), level)
        ours = step(net, images.contiguous(memory_format=form), probe)
        assert_close(ours[0], loss, rtol=1e-4, atol=1e-5)
        assert_close(ours[2], state, rtol=1e-4, atol=1e-4)
        apart = torch.cat([(ours[1][k] - g).flatten() for k, g in grads.items()]).norm()
        assert apart < 1e-3 * norm


def test_autocast_is_the_same_in_the_second_run():
    images = torch.randn(4, 3, 64, 32)
    start, grads = supernet().float(), {}
    for level in ("exact", "", *LEVELS):
        net = lean(copy.deepcopy(start), level if level != "exact" else "")
        with torch.autocast("cpu", torch.bfloat16, level != "exact"):
            loss = net(images).float().pow(2).mean()
        loss.backward()
        assert all(p.grad.dtype == p.dtype for p in net.parameters())
        grads[level] = torch.cat([p.grad.flatten() for p in net.parameters()])
    apart = lambda one, two: float((grads[one] - grads[two]).norm())
    for level in LEVELS:
        assert apart(level, "lean") < 0.02 * grads["lean"].norm()
        assert apart(level, "exact") < 1.5 * apart("", "exact")  # no farther off than plain bf16


@pytest.mark.slow  # tracing takes a minute
def test_a_compiler_may_read_the_net():
    images = torch.randn(2, 3, 32, 16)
    ops = ("max_pool_3x3", "skip_connect", "sep_conv_3x3", "part_aware", "none")
    torch.manual_seed(0)
    net = Supernet(ops, 1, "resnet", 4, (1, 1), stem="conv3_s2")
    make_lean(net, ["lean", "edge"])
    expected = step(copy.deepcopy(net), images, 1)
    loss = torch.compile(net, backend="aot_eager")(images).mean()
    loss.backward()
    assert_close(loss, expected[0], rtol=1e-4, atol=1e-6)
    found = {key: value.grad for key, value in net.named_parameters()}
    assert_close(found, expected[1], rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()


# --- several processes -------------------------------------------------------------------------


def test_two_processes_with_a_joint_norm_equal_one(tmp_path):
    ops = ("max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "part_aware", "none")
    shape = {"stem": "conv3x2", "init_channels": 4, "cells_per_stage": (1, 1), "nodes": 1}
    search = Search(space={"reid": shape | {"ops": ops}}, warmup=0)
    recipe = Recipe(
        search=search,
        train=Train(optimizer={"sgd": {"lr": 0.05}}, epochs=1),
    )
    torch.manual_seed(0)
    pids = torch.arange(4).repeat_interleave(2)[torch.tensor([0, 2, 1, 3, 4, 6, 5, 7])]
    batches = [
        Batch(torch.randn(8, 3, 32, 16).double(), pids, torch.zeros(8), torch.arange(8))
        for _ in range(2)
    ]
    local = recipe.model_copy(update={"train": recipe.train.model_copy(update={"sync_bn": False})})
    names = {"plain": (recipe, ""), **{level: (recipe, level) for level in LEVELS}}
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    two_steps({"plain": names["plain"]}, batches, one, "cpu")
    names["local"] = local, "edge"
    launch(two_steps, gpus=2, device="cpu", recipes=names, batches=batches, folder=two)
    read = lambda file: torch.load(file, weights_only=True)
    alone = read(one / "plain0.pt")
    for level in ("plain", *LEVELS):
        first, second = (read(two / f"{level}{i}.pt") for i in (0, 1))
        for kind in ("normal", "reduce"):
            key = f"backbone.alpha_{kind}"
            assert torch.equal(first[key], second[key])
        for key, value in alone.items():
            assert_close(first[key], value, rtol=1e-6, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}")
    apart = read(two / "local0.pt")["backbone.alpha_normal"] - alone["backbone.alpha_normal"]
    assert apart.abs().max() > 1e-5  # the comparison above can fail


# --- bytes -------------------------------------------------------------------------------------


PLANS = {
    "darts": ({"macro": "darts", "layers": 3, "nodes": 2}, (128, 32)),
    "resnet": ({"macro": "resnet", "cells_per_stage": (1, 1), "nodes": 1}, (128, 64)),
}


@pytest.mark.parametrize("case", PLANS)
def test_the_planner_tells_the_bytes_of_a_mixed_net(case):
    options, (h, w) = PLANS[case]
    torch.manual_seed(0)
    net = Supernet(OPS["reid"], init_channels=8, **options)
    found = measure(net, h, w)
    levels = ["edge", "node", "cell", "lean"][-len(cells_of(net)) :]
    for chosen in (["plain"] * len(levels), levels):
        lone = make_plain(copy.deepcopy(net))
        seen = footprint(
            lone if chosen[0] == "plain" else make_lean(lone, chosen), torch.randn(2, 3, h, w)
        )
        assert 2 * found.kept(chosen) == pytest.approx(seen.peak, rel=0.1)
        assert 2 * found.alive(chosen) + found.weights == pytest.approx(seen.alive, rel=0.1)


def test_a_plan_fits_and_a_smaller_budget_runs_more_again():
    torch.manual_seed(0)
    net = Supernet(OPS["reid"], 2, "darts", 8, layers=3)
    found, batch = measure(net, 64, 32), 16
    needs = {level: found.alive([level] * 3) for level in LEVELS}
    efforts = []
    for share in (1.01, 0.7, 0.3, 0):  # of the way from the smallest level to lean
        photo = needs["edge"] + share * (needs["lean"] - needs["edge"])
        budget = int(batch * photo + found.weights) + 1
        made = plan(net, 64, 32, batch, budget, measured=found)
        assert made.bytes() <= budget and made.table.loc["plan", "photos that fit"] >= batch
        efforts.append(made.table.loc["plan", "run again"])
    assert efforts == sorted(efforts) and efforts[0] == 0 < efforts[-1]
    with pytest.raises(ValueError, match="photos fit"):
        plan(net, 64, 32, batch, int(0.9 * batch * needs["edge"]), measured=found)
    assert type(net.stack.cells[0]).__name__ == "SearchCell"  # a plan changes nothing


def test_a_plan_under_autocast_needs_about_half():
    torch.manual_seed(0)
    net = Supernet(OPS["reid"], 1, "darts", 8, layers=3)
    full, half = measure(net, 32, 16), measure(net, 32, 16, amp=True)
    assert 0.45 < half.kept(["lean"] * 3) / full.kept(["lean"] * 3) < 0.7


def test_a_word_in_a_recipe():
    shape = {"stem": "conv3x2", "init_channels": 4, "cells_per_stage": (1, 1), "nodes": 1}
    recipe = Recipe(search=Search(space={"reid": shape}))
    model = supernet_from_recipe(recipe, n_pids=4)
    keys = list(model.state_dict())
    for word in ("edge", "lean", "64MiB", ""):
        made = use_memory(model, word, 32, 16, 4)
        assert (made is not None) == (word == "64MiB")
        assert list(model.state_dict()) == keys
        assert supernet_of(model) is model.backbone
    assert type(model.backbone.stack.cells[0]).__name__ == "SearchCell"


# --- the benchmark -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_supernet.py"
    spec = importlib.util.spec_from_file_location("bench_supernet", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_peer_of_the_benchmark_computes_the_same_net(benchmark):
    images = torch.randn(2, 3, 32, 16)
    nets = [benchmark.build(kind, (3, 4, 2)) for kind in ("published", "plain", "edge")]
    outs = [net(images) for net in nets]
    assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-5)
    assert_close(outs[2], outs[1], rtol=1e-4, atol=1e-5)
    assert footprint(nets[0], images).kept > 1.03 * footprint(nets[1], images).kept  # `none` too


def test_the_small_form_of_the_benchmark_ends_with_its_table(
    benchmark, monkeypatch, capsys, tmp_path
):
    out = tmp_path / "out.csv"
    monkeypatch.setattr(sys, "argv", ["bench_supernet.py", "--tiny", "--out", str(out)])
    benchmark.main()
    printed = capsys.readouterr().out.rstrip("\n").splitlines()
    assert all(line.startswith("| ") for line in printed[-2 * len(benchmark.ROWS) :])
    numbers = 2 * (2 * len(benchmark.ROWS) + len(benchmark.LAYERS))
    assert len(out.read_text().splitlines()) == 1 + numbers
