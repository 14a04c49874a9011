"""Scores before training: each by its definition written anew, and a network that stays as it was."""

import random

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from torch import nn

from reidlab.core.recipe import load_recipe
from reidlab.data.loaders import Batch, open_data
from reidlab.nas import retrieval_proxies
from reidlab.nas.bench import PEOPLE_SPACE
from reidlab.nas.places import Places
from reidlab.nas.proxies import Glance, grad_norm, naswot, snip, synflow, zen
from reidlab.nas.retrieval_proxies import (
    PROXIES,
    rank_average,
    score_network,
    score_networks,
    settled_features,
    twins,
)
from reidlab.training.network import loss_from_recipe, model_from_recipe

NUMBERS = (0, 1535)  # the first and the last of the space


def glance(photos=8, height=64, width=32):
    "Drawn noise for four people, two photos each, and twins that are the same photos a little dimmed."
    draws = torch.Generator().manual_seed(3)
    images = torch.randn(photos, 3, height, width, generator=draws)
    pids = torch.arange(photos) // 2
    sides = [Batch(images[i::2], pids[i::2], torch.full((photos // 2,), i), pids) for i in (0, 1)]
    return Glance(images, pids, None, 0.9 * images, *sides)


def network_and_glance(number, seed=0):
    recipe = load_recipe(
        "people_bench", seed=seed, overrides=PEOPLE_SPACE.overrides(PEOPLE_SPACE[number])
    )
    network = model_from_recipe(recipe, 4)
    return network, glance()._replace(loss=loss_from_recipe(recipe, 4, network))


def everything(network):
    "What a proxy must not change, as bytes."
    state = {k: v.numpy().tobytes() for k, v in network.state_dict().items()}
    grads = {k: p.grad.numpy().tobytes() for k, p in network.named_parameters()}
    rest = [(p.requires_grad, p.stride()) for p in network.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()]
    return state, grads, rest, hooks, [m.training for m in network.modules()]


def streams():
    "The states of all random generators."
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_leaves_the_network_as_it_was(name):
    network, shown = network_and_glance(700)
    network.train().backbone.eval()  # a mixture of modes
    for p in network.parameters():
        p.grad = torch.full_like(p, 0.5)
    images = shown.images.clone()
    before, drawn = everything(network), streams()
    strict = torch.are_deterministic_algorithms_enabled()
    value = PROXIES[name](network, shown)
    assert everything(network) == before and streams() == drawn
    assert torch.equal(shown.images, images)
    assert torch.are_deterministic_algorithms_enabled() == strict and torch.is_grad_enabled()
    torch.manual_seed(99)  # another state of the stream, other modes, no gradients
    network.eval().zero_grad()
    assert PROXIES[name](network, shown) == value
    assert isinstance(value, float) and np.isfinite(value)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    one, two = (score_network(*network_and_glance(1535)) for _ in range(2))
    other = score_network(*network_and_glance(1535, seed=1))
    assert one == two and list(one) == list(PROXIES)
    same = {name for name in PROXIES if one[name] == other[name]}
    assert same == {"parameters", "macs", "zen"}  # zen draws weights of its own


def test_slopes_by_finite_differences():
    "How the loss answers when one weight at a time is taken a little larger and smaller."
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)
    )
    net, images = net.double(), torch.randn(6, 3, 1, 1).double()
    shown = Glance(images, torch.arange(6) % 2, lambda out, pids: (F.cross_entropy(out, pids), {}))
    missed, lengths, step = 0.0, 0.0, 1e-6
    for layer in (net[1], net[4]):
        slopes = []
        for i in range(layer.weight.numel()):
            losses = []
            for sign in (1, -1):
                layer.weight.data.view(-1)[i] += sign * step
                losses.append(shown.loss(net(images), shown.pids)[0].item())
                layer.weight.data.view(-1)[i] -= sign * step
            slopes.append((losses[0] - losses[1]) / (2 * step))
        missed += np.abs(slopes * layer.weight.detach().flatten().numpy()).sum()
        lengths += np.linalg.norm(slopes)
    assert snip(net, shown) == pytest.approx(missed, rel=1e-5)
    assert grad_norm(net, shown) == pytest.approx(lengths, rel=1e-5)


def test_synflow_of_a_chain_is_the_flow_once_a_layer():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)
    )
    net[0].bias.data.zero_()
    net[4].bias.data.zero_()
    sizes = nn.Sequential(
        *[(type(m) is nn.BatchNorm2d and nn.Identity()) or m for m in net]
    ).double()
    flow = F.linear(
        F.conv2d(torch.ones(1, 3, 4, 2).double(), sizes[0].weight.abs()).flatten(1),
        sizes[4].weight.abs(),
    ).sum()
    shown = Glance(torch.zeros(2, 3, 4, 2), torch.tensor([0, 1]))
    assert synflow(net.float(), shown) == pytest.approx(np.log(2 * flow.item()), rel=1e-6)


def test_naswot_is_the_determinant_of_agreeing_codes():
    "Functions, layers, in place: all ReLUs of a residual network are seen."
    network, shown = network_and_glance(
        PEOPLE_SPACE.index(
            dict.fromkeys(("stage1", "stage2", "stage3"), "residual")
            | {"depth": 1, "width": 8, "last_stride": 1, "pool": "avg"}
        )
    )
    codes, net = [], network.backbone.train()
    note = lambda x: codes.append((F.relu(x) > 0).flatten(1)) or F.relu(x)
    x = net.stem[:-1](shown.images)
    x = note(x)
    for stage in (net.layer1, net.layer2, net.layer3):
        x, block = stage[0](x), stage[1]
        inner = note(block.body[0][:-1](x))
        x = note(block.body[1](inner) + block.shortcut(x))
    note(x)  # the last one, which every network of the frame has
    code = torch.cat(codes, 1).numpy()
    apart = (code[:, None] != code[None]).sum(2)
    expected = np.linalg.slogdet((code.shape[1] - apart).astype(float))[1]
    assert naswot(network, shown) == pytest.approx(expected, rel=1e-9)


def test_zen_does_not_see_scale_where_a_norm_hides_it():
    "The weights are its own: a network that was multiplied by a hundred has the same score."
    network, shown = network_and_glance(700)
    before = zen(network, shown)
    for p in network.backbone.parameters():
        p.data.mul_(100) if p.ndim > 1 else None
    assert zen(network, shown) == before
    deeper = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    flat = nn.Sequential(deeper[0], deeper[2])  # the gain that a norm divides by is put back
    assert zen(deeper, shown) == pytest.approx(zen(flat, shown), abs=0.15)


def test_features_are_those_of_batch_statistics():
    "In evaluation after one batch, a norm does to that batch what it does in training."
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    net[1].running_mean.fill_(7.0)
    net[1].num_batches_tracked.fill_(5)  # it has seen others before
    shown = glance(height=4, width=4)
    (found,) = settled_features(net, shown, shown.images)
    x = net[0](shown.images)
    x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(found, F.normalize(x.flatten(1)).detach())


@pytest.mark.parametrize("number", NUMBERS)
def test_retrieval_scores_by_loops(number):
    network, shown = network_and_glance(number)
    found = score_network(
        network, shown, ["twins", "between_within", "alignment", "uniformity", "untrained_map"]
    )
    sets = (shown.images, shown.again, shown.query.images, shown.gallery.images)
    f, g, q, other = (x.double() for x in settled_features(network, shown, *sets))
    n, who = len(f), shown.pids.tolist()
    far = [
        (f[i] - g[j]).norm() > (f[i] - g[i]).norm() for i in range(n) for j in range(n) if i != j
    ]
    assert found["twins"] == pytest.approx(np.mean(far), abs=0.02)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    d = {(i, j): (f[i] - f[j]).norm().item() for i, j in pairs}
    between = np.mean([d[p] for p in pairs if who[p[0]] != who[p[1]]])
    within = np.mean([d[p] for p in pairs if who[p[0]] == who[p[1]]])
    assert found["between_within"] == pytest.approx(between / within, rel=1e-4)
    moved = [(f[i] - g[i]).norm().item() ** 2 for i in range(n)]
    assert found["alignment"] == pytest.approx(-np.mean(moved), rel=1e-4)
    spread = -np.log(np.mean([np.exp(-2 * x**2) for x in d.values()]))
    assert found["uniformity"] == pytest.approx(spread, rel=1e-4)
    rank = [
        1 + sum((q[i] - x).norm() < (q[i] - other[i]).norm() for x in other) for i in range(len(q))
    ]
    assert found["untrained_map"] == pytest.approx(
        np.mean([1 / r.item() if hasattr(r, "item") else 1 / r for r in rank]), rel=1e-6
    )


def test_twins_at_their_ends():
    "Everybody at home: 1; everybody at somebody else's place and away from home: below chance."
    spots = F.normalize(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
    shown = Glance(spots, torch.arange(6), None, spots)
    assert twins(nn.Identity(), shown) == 1.0
    assert twins(nn.Identity(), shown._replace(again=-spots)) < 0.2
    assert twins(nn.Identity(), shown._replace(again=torch.ones(6, 3))) == 0.0  # all in one place


def test_the_table_of_a_space_follows_its_data(photos, monkeypatch):
    "Another photo size makes another glance; the order of the networks changes no score."
    few = lambda name, seed, overrides: load_recipe(name, seed=seed, overrides=TINY | overrides)
    monkeypatch.setattr(retrieval_proxies, "load_recipe", few)
    monkeypatch.setattr(
        retrieval_proxies, "open_data", lambda data, seed: open_data(data, seed, photos)
    )
    space = Places(
        {
            "width": ("data.width", (32, 64)),
            "last": ("model.backbone.stage_net.stage3", ("plain", "inverted")),
        }
    )
    names = ["macs", "twins"]
    table = score_networks(space, list(space), "people_bench", names)
    assert list(table.index) == [0, 1, 2, 3] and list(table.columns) == names
    assert table.loc[2, "macs"] == pytest.approx(2 * table.loc[0, "macs"], rel=0.05)
    assert table["twins"].nunique() == 4
    mixed = score_networks(space, [space[i] for i in (3, 0, 2, 1)], "people_bench", names)
    pd.testing.assert_frame_equal(mixed.sort_index(), table, check_exact=True)


def test_an_average_of_ranks_does_not_see_units():
    scores = pd.DataFrame({"a": [1.0, 5.0, 2.0], "b": [10.0, 30.0, 20.0]})
    assert rank_average(scores, ["a", "b"]).tolist() == [1.0, 3.0, 2.0]
    scores["a"] *= 1e9
    assert rank_average(scores, ["a", "b"]).tolist() == [1.0, 3.0, 2.0]


@pytest.mark.parametrize(
    ("changed", "names", "message"),
    [
        ({}, ["twin"], "proxy 'twin' not found. Close names: twins"),
        ({"pids": torch.arange(8)}, ["between_within"], "one of them twice; got 8 photos of 8."),
        ({"pids": torch.zeros(8).long()}, ["between_within"], "two people or more"),
        ({"again": None}, ["alignment"], "alignment needs two photos or more"),
        ({"query": None}, ["untrained_map"], "needs held-out people"),
        ({"loss": None}, ["grad_norm"], "needs a loss"),
        (
            {"images": torch.full((8, 3, 64, 32), torch.nan)},
            ["twins", "uniformity"],
            "got nan for net 5",
        ),
        ({"images": torch.ones(8, 3, 64, 32)}, ["naswot"], "got -inf for net 5"),
    ],
)
def test_bad_input_gives_one_line(changed, names, message):
    network, shown = network_and_glance(0)
    with pytest.raises(ValueError, match=message.replace(".", r"\.")) as told:
        score_network(network, shown._replace(**changed), names, "net 5")
    assert "\n" not in str(told.value)
