"""Networks of timm in training: who learns how fast, who rests, what is random, what they cost."""

from copy import deepcopy

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import tiny_recipe
from test_repeatable import different, leaves
from timm.optim import param_groups_layer_decay
from torch import nn

from reidlab.core.parts import build
from reidlab.core.recipe import Train, validated
from reidlab.core.seed import seed_all
from reidlab.data.loaders import Batch
from reidlab.models.catalogue import as_part, build_model
from reidlab.models.cost import count_macs
from reidlab.models.depth import depths
from reidlab.training.checkpoint import read_checkpoint, save_checkpoint
from reidlab.training.checks import check_model
from reidlab.training.freeze import Rests
from reidlab.training.network import architecture_of, costs_of, loss_from_recipe, model_from_recipe
from reidlab.training.optim import build_optimizer, parameter_groups, set_rate
from reidlab.training.progress import Progress, resume_state, resumed
from reidlab.training.step import Trainer

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


# --- from a file to a network that goes on where it stopped -------------------------------------

SIZES = [(256, 128), (128, 64)]
SMALL = [  # of each family a network that trains in a moment
    "test_resnet",
    "test_convnext",
    "test_vit",  # a class token
    "test_vit3",  # a register, and the classifier's own attention
    "swin_nano",
    "eva02_nano",
    "test_efficientnet",
    "mobilenetv4_conv_small_035",
]
REAL = [
    "resnet50",
    "convnext_tiny",
    "vit_small_patch16_224",
    "vit_small_patch16_dinov3",  # a class token and four registers
    "swin_tiny_patch4_window7_224",
    "vit_base_patch16_clip_quickgelu_224",
    "mobilenetv4_conv_small",
    "efficientnet_lite0",
]


@pytest.fixture(scope="module")
def nano():
    "A Swin and an EVA of a size that timm does not list, listed while this file is tested."
    from timm.models import _registry, eva, swin_transformer

    swin = {"embed_dim": 12, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "window_size": 7}
    patch = {"patch_size": 16, "embed_dim": 48, "num_heads": 3, "depth": 3, "mlp_ratio": 2.0}
    turned = {"use_rot_pos_emb": True, "swiglu_mlp": True, "ref_feat_shape": (14, 14)}
    made_by = {
        "swin_nano": (swin_transformer._create_swin_transformer, swin),
        "eva02_nano": (eva._create_eva, patch | turned | {"img_size": 224}),
    }
    fixed = {"fixed_input_size": True, "input_size": (3, 224, 224)}
    cfgs = timm.models.generate_default_cfgs({f"{name}.untrained": fixed for name in made_by})
    lists = {k: v for k, v in vars(_registry).items() if k.startswith(("_model_", "_module_"))}
    before = {k: deepcopy(v) for k, v in lists.items()}
    for name, (create, usual) in made_by.items():

        def entry(pretrained=False, name=name, create=create, usual=usual, **options):
            return create(name, pretrained=pretrained, **usual | options)

        entry.__name__, entry.__module__ = name, __name__
        globals()["default_cfgs"] = cfgs
        timm.models.register_model(entry)
    yield
    for key, kept in before.items():
        lists[key].clear()
        lists[key].update(kept)


def told(name, size, **more):
    "A recipe of a network of timm, with everything random that it has."
    backbone = {"timm": {"name": name, "weights": f"{name}.pth", "drop_path": 0.2}}
    return tiny_recipe(
        data__height=size[0],
        data__width=size[1],
        model__backbone=backbone,
        model__head={"linear": {"dropout": 0.3}},
        train__optimizer={"adamw": {"layer_decay": 0.75, "no_weight_decay": True}},
        **more,
    )


def begun(recipe):
    "A training before its first step."
    model = model_from_recipe(recipe, 5)
    trainer = Trainer(model, loss_from_recipe(recipe, 5, model), recipe.train)
    trainer.begin(0)
    set_rate(trainer.optimizer, 1e-3)
    return trainer


def kept(trainer):
    "Every tensor of a training."
    return leaves(
        {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    )


def journey(name, size, folder, monkeypatch):
    "File, network, step, evaluation, checkpoint, resume; what it costs."
    torch.manual_seed(1)
    whole = timm.create_model(name, num_classes=3)
    torch.save(whole.state_dict(), folder.weights / f"{name}.pth")
    recipe = told(name, size)
    trainer = begun(recipe)
    own, file = trainer.model.backbone.net.state_dict(), whole.state_dict()
    same = [k for k in own if k in file and own[k].shape == file[k].shape]
    unlike = [k for k in same if not torch.equal(own[k], file[k])]
    assert unlike == [] and len(same) >= 0.9 * len(own)
    photos, pids = torch.randn(4, 3, *size), torch.tensor([0, 0, 1, 1])
    batch = Batch(photos, pids, pids * 0, index=torch.arange(4))
    first = next(w for w in trainer.model.backbone.parameters() if w.dim() > 3)
    before = first.detach().clone()
    trainer.step(batch)
    assert not torch.equal(first, before)  # the gradient comes down to the first convolution
    progress, facts = Progress(step=1, sums={}), architecture_of(trainer.model, recipe)
    path = folder.runs / "last.pt"
    where = recipe.model_dump(mode="json"), 0, "last"
    save_checkpoint(path, trainer.model, facts, *where, **resume_state(trainer, progress))
    trainer.step(batch)
    again = begun(recipe)
    torch.rand(3)  # whatever was drawn in between does not count
    resumed(again, read_checkpoint(path), facts, "last.pt", steps=4)
    again.step(batch)
    assert different(kept(trainer), kept(again)) == []
    trainer.model.eval()
    with torch.no_grad():
        features = trainer.model(photos)
        assert torch.equal(features, trainer.model(photos))
    assert features.shape == (4, trainer.model.feature_dim) and features.isfinite().all()
    macs = costs_of(trainer.model, recipe)["macs"]
    hooked = counted_by_hooks(trainer.model, (1, 3, *size), monkeypatch)
    assert abs(macs / hooked - 1) < 0.02


@pytest.mark.parametrize(("name", "size"), list(zip(SMALL, SIZES * 4, strict=True)))
def test_from_a_file_to_a_training_that_goes_on(name, size, nano, lab, monkeypatch):
    journey(name, size, lab, monkeypatch)


def test_whose_paths_are_dropped_is_drawn_by_our_seed():
    torch.manual_seed(0)
    backbone = {"timm": {"name": "test_vit", "drop_path": 0.5}}
    net, photos = build_model(backbone, n_pids=5, photo=(64, 32)).train(), torch.randn(8, 3, 64, 32)
    seen = []
    for seed, epoch in ((0, 0), (0, 0), (1, 0), (0, 1)):
        seed_all(seed, epoch)
        seen.append(net.backbone(photos))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[3])
    net.eval()
    assert torch.equal(net.backbone(photos), net.backbone(photos))


RESTING = {  # network: stages that rest, weights at rest, weights that learn
    "test_vit": (
        2,
        ("cls_token", "pos_embed", "patch_embed", "blocks.0.", "blocks.1."),
        "blocks.2.",
    ),
    "test_resnet": (1, ("conv1.", "bn1.", "layer1."), "layer2."),
    "test_efficientnet": (2, ("conv_stem", "bn1", "blocks.0.", "blocks.1."), "blocks.2."),
    "test_convnext": (4, ("stem", "stages.", "norm_pre", "head.norm"), "nothing else"),
}


@pytest.mark.parametrize("name", RESTING)
def test_stages_of_timm_at_rest(name):
    stages, names, above = RESTING[name]
    model = Held(made(name)).train()
    rests = Rests(model, Train(freeze_stages=stages, freeze_stages_epochs=3))
    assert rests.begin(0) and not rests.begin(2)
    net = model.backbone.net
    asleep = {k for k, w in net.named_parameters() if not w.requires_grad}
    assert asleep == {k for k, _ in net.named_parameters() if k.startswith(names)} and asleep
    awake = {k for k, m in net.named_modules() if isinstance(m, nn.BatchNorm2d) and m.training}
    norms = {k for k, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert awake == {k for k in norms if not k.startswith(tuple(n.rstrip(".") for n in names))}
    assert all(w.requires_grad for k, w in net.named_parameters() if k.startswith(above))
    model.train()
    assert rests.begin(3) and all(w.requires_grad for w in net.parameters())
    with pytest.raises(ValueError, match="needs a backbone of as many stages"):
        Rests(model, Train(freeze_stages=99))


def test_too_many_stages_at_rest_are_refused_before_there_is_a_folder():
    said = {"data": {"height": 64, "width": 32}, "train": {"freeze_stages": 99}}
    for backbone in ("small_cnn", {"timm": {"name": "test_vit"}}):
        with pytest.raises(ValueError, match="freeze_stages 99 needs a backbone of as many stages"):
            check_model(validated("few", said | {"model": {"backbone": backbone}}))


@pytest.mark.slow  # networks of the usual size, minutes
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", REAL)
def test_a_real_network_trains_and_goes_on(name, size, lab, monkeypatch):
    journey(name, size, lab, monkeypatch)
