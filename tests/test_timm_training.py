"""Networks of timm in training: who learns how fast, who rests, what is random, what they cost."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import nn

from reidlab.core.parts import build
from reidlab.models.catalogue import as_part
from reidlab.models.cost import count_macs
from reidlab.models.depth import depths
from reidlab.training.optim import build_optimizer, parameter_groups, set_rate

SIZED = {"img_size": (256, 128)}
NAMES = {  # of each family: how it is made, its layers, multiply-accumulates at 256×128
    "resnet50": ({}, 17, 2_669_150_208),
    "convnext_tiny": ({}, 20, 2_909_233_152),
    "convnextv2_nano": ({}, 16, 1_596_661_760),
    "vit_small_patch16_224": (SIZED, 13, 2_930_254_848),
    "vit_base_patch16_224": (SIZED, 13, 11_338_795_008),
    "vit_base_patch16_clip_quickgelu_224": (SIZED, 13, 11_338_795_008),
    "vit_small_patch14_reg4_dinov2": (SIZED, 13, 3_839_625_216),
    "vit_small_patch16_dinov3": ({}, 13, 3_024_847_872),
    "eva02_small_patch14_224": (SIZED, 14, 3_742_525_440),
    "swin_tiny_patch4_window7_224": (SIZED, 13, 3_781_665_792),
    "mobilenetv4_conv_small": ({}, 19, 121_063_424),
    "efficientnet_lite0": ({}, 17, 250_715_136),
    "tiny_vit_5m_224": ({}, 14, 1_174_077_440),
    "resnet50_clip": ({}, 18, 3_924_824_064),
    "repvit_m1": ({}, 21, 533_305_344),
    "fastvit_t8": ({}, 12, 344_727_552),
}


def made(name, **options):
    return timm.create_model(name, pretrained=False, num_classes=0, **options)


class Held(nn.Module):
    "A network of timm as our backbones hold one, and a classifier."

    def __init__(self, net):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.net = net
        self.head = nn.Linear(net.num_features, 3, bias=False)

    def forward(self, images):
        return self.head(self.backbone.net(images))


@pytest.mark.parametrize("name", NAMES)
def test_layer_decay_is_timms_own(name):
    with torch.device("meta"):
        model = Held(made(name, **NAMES[name][0]))
    net = model.backbone.net
    assert max(depths(model.backbone).values()) + 1 == NAMES[name][1]
    listed = getattr(net, "no_weight_decay", set)()
    expected = {}
    for group in param_groups_layer_decay(net, 0.05, no_weight_decay_list=listed, layer_decay=0.75):
        about = group["lr_scale"], group["weight_decay"]
        expected |= {id(weight): about for weight in group["params"]}
    seen = {}
    for group in parameter_groups(model, 0.05, layer_decay=0.75, no_weight_decay=True):
        about = group["factor"], group["weight_decay"]
        seen |= {id(weight): about for weight in group["params"]}
    assert seen.pop(id(model.head.weight)) == (1.0, 0.05)
    assert seen == expected


SMALL_VIT = {"dim": 32, "depth": 4, "heads": 2, "photo": (64, 32)}
BESIDE = {  # what re-ID adds to a network, and where it stands: backbone, layers, stages, depths
    "jigsaw": (
        {"transreid_vit": SMALL_VIT | {"jigsaw": True, "cameras": 6}},
        (4, 4),
        {"cameras.": 0, "net.pos_embed": 0, "net.blocks.2.": 3, "jigsaw.global_branch.": 4},
    ),
    "part tokens": (
        {"transreid_vit": SMALL_VIT | {"part_tokens": 3, "stem": "ics"}},
        (4, 4),
        {"net.reg_token": 0, "net.patch_embed.conv.": 0, "net.blocks.3.": 4, "net.norm.": 4},
    ),
    "non-local": (
        {"resnet_fastreid": {"non_local": "half"}},
        (16, 4),
        {"bn1.": 0, "layer2.3.": 7, "NL_2.": 7, "layer3.0.": 8, "NL_3.": 13, "layer4.2.": 16},
    ),
    "cells": (
        {"derived": {"genotype": "auto_reid"}},
        (8, 4),
        {"stack.stem.": 0, "stack.cells.7.": 8},
    ),
    "AIN": (
        {"osnet_published": {"norm": "ain"}},
        (9, 4),
        {"pool2.": 3, "conv3.0.": 4, "conv5.": 9},
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_was_added_lies_where_it_acts(case):
    said, counts, places = BESIDE[case]
    tokens = {"tokens": True} if "transreid_vit" in said else {}
    with torch.device("meta"):
        net = build("model.backbone", as_part("backbone", said), **tokens)
    deep = depths(net)
    assert (max(deep.values()), max(depths(net, coarse=True).values())) == counts
    for begin, depth in places.items():
        assert {d for name, d in deep.items() if name.startswith(begin)} == {depth}, begin


def test_layer_decay_moves_a_transformer():
    torch.manual_seed(0)
    model = Held(made("test_vit", img_size=(64, 32), depth=12))
    optimizer = build_optimizer(model, {"adam": {"layer_decay": 0.75, "weight_decay": 0}})
    set_rate(optimizer, 1e-2)
    assert min(group["lr"] for group in optimizer.param_groups) == 1e-2 * 0.75**12  # 0.0317
    watched = [model.backbone.net.patch_embed.proj, *(b.mlp.fc1 for b in model.backbone.net.blocks)]
    watched = [layer.weight for layer in (*watched, model.head)]
    before = [weight.detach().clone() for weight in watched]
    model(torch.randn(4, 3, 64, 32)).square().mean().backward()
    optimizer.step()
    steps = [float((w.detach() - b).abs().max()) for w, b in zip(watched, before, strict=True)]
    expected = [1e-2 * 0.75**d for d in range(12, -1, -1)] + [1e-2]
    torch.testing.assert_close(steps, expected, rtol=1e-2, atol=0)  # Adam's first step is its rate


@pytest.mark.parametrize("name", NAMES)
def test_cost_is_the_published_one(name):
    with torch.device("meta"):
        net = made(name, **NAMES[name][0])
    assert count_macs(net, (1, 3, 256, 128)) == NAMES[name][2]


def counted_by_hooks(net, size, monkeypatch):
    "Multiply-accumulates by what passes layers: hooks on convolutions, a word at each function."
    total, linear, attention = [], F.linear, F.scaled_dot_product_attention

    def on_linear(x, weight, bias=None):
        total.append(x[..., 0].numel() * weight.numel())
        return linear(x, weight, bias)

    def on_attention(q, k, v, **options):
        total.append(2 * q.numel() * k.shape[-2])
        return attention(q, k, v, **options)

    def on_conv(layer, given, output):
        total.append(output.numel() * layer.weight[0].numel())

    monkeypatch.setattr(F, "linear", on_linear)
    monkeypatch.setattr(F, "scaled_dot_product_attention", on_attention)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(on_conv)
        if type(layer).__name__ == "WindowAttention":  # two products, between them a dropout
            width = layer.qkv.in_features // layer.num_heads
            on_weights = lambda drop, given, w, width=width: total.append(2 * w.numel() * width)
            layer.attn_drop.register_forward_hook(on_weights)
    with torch.no_grad():
        net.eval()(torch.zeros(size))
    return sum(total)


TINY = {  # a small network of each family, at 64×32
    "test_resnet": {},
    "test_convnext": {},
    "test_vit": {"img_size": (64, 32)},
    "test_vit3": {"img_size": (64, 32)},
    "eva02_tiny_patch14_224": {"img_size": (56, 28), "depth": 2, "embed_dim": 48, "num_heads": 3},
    "swin_tiny_patch4_window7_224": {
        "img_size": (64, 32),
        "embed_dim": 12,
        "depths": (1, 2),
        "num_heads": (1, 2),
    },
    "test_efficientnet": {},
    "mobilenetv4_conv_small": {},
}


@pytest.mark.parametrize("name", TINY)
def test_cost_by_hooks(name, monkeypatch):
    net, size = made(name, **TINY[name]), (1, 3, *TINY[name].get("img_size", (64, 32)))
    computed = count_macs(net, size, device="cpu")  # fused attention is counted by its own rule
    assert computed == count_macs(net, size)
    assert abs(computed / counted_by_hooks(net, size, monkeypatch) - 1) < 0.02
