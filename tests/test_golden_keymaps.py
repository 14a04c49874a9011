"""Every rename rule of the golden data, run by the house's own engine, fills the network it is said to be for."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from reidlab.interchange.key_rules import KeyRules, load_renamed, rename_state

STORED = json.loads(
    gzip.decompress((Path(__file__).parent / "data" / "golden_keymaps.json.gz").read_bytes())
)
KEYMAPS, KEYS = STORED["keymaps"], STORED["keys"]
ONE_BLOCK = {"embed_dim": 768, "depth": 1, "num_heads": 8, "mlp_ratio": 3, "qkv_bias": False}
REDUCED = {"embed_dim": 96, "depth": 3, "num_heads": 3, "img_size": (64, 32), "num_classes": 0}


def rules_of(entry, last=2):
    "An entry of keymaps.json as a table of ours."
    plain = lambda pattern: pattern.replace("LAST", str(last))
    factor = lambda text: math.sqrt(96 / 768) if text == "sqrt(96/768)" else float(text)
    return KeyRules(
        drop={plain(p): "said so" for p in entry.get("drop", ())},
        rename=[tuple(pair) for pair in entry.get("rename", ())],
        ops=[(op["key"], op["op"]) for op in entry.get("ops", ())],
        scale=[
            (s["key"], tuple(s["rows"]), factor(s["factor"])) for s in entry.get("scale_rows", ())
        ],
        concat={c["to"]: (c["dim"], c["from"]) for c in entry.get("concat", ())},
        zeros=entry.get("zeros", ()),
    )


def numbered(shapes):
    "Tensors of these shapes, each of another value."
    return {k: torch.full(s, float(i)) for i, (k, s) in enumerate(shapes.items(), 1)}


def vit(**options):
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**{**REDUCED, **options})


def swin():
    from timm.models.swin_transformer import SwinTransformer

    sizes = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}
    return SwinTransformer(img_size=(128, 64), num_classes=0, always_partition=True, **sizes)


def resnet_clip():
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

    stages = zip((1, 2, 1, 2), (64, 128, 256, 512), (1, 2, 2, 1), strict=True)
    config = ByoModelCfg(
        blocks=tuple(ByoBlockCfg("bottle", d=d, c=c, s=s, br=0.25) for d, c, s in stages),
        **{"width_factor": 1.0, "stem_chs": (8, 8, 16), "stem_type": "", "stem_pool": "avg2"},
        **{"downsample": "avg", "aa_layer": "avg", "head_type": "attn_abs", "act_layer": "relu"},
    )
    return ByobNet(config, num_classes=64, img_size=(64, 32))


def resnet50():
    from torchvision.models import resnet50

    with torch.device("meta"):
        net = resnet50(num_classes=1)
    del net.fc
    return net


def clip_state():
    "The names of CLIP's own visual tower, one block of it."
    block = {f"ln_{i}.{part}": (96,) for i in (1, 2) for part in ("weight", "bias")}
    block |= {"attn.in_proj_weight": (288, 96), "attn.in_proj_bias": (288,)}
    block |= {"attn.out_proj.weight": (96, 96), "attn.out_proj.bias": (96,)}
    block |= {"mlp.c_fc.weight": (384, 96), "mlp.c_fc.bias": (384,)}
    block |= {"mlp.c_proj.weight": (96, 384), "mlp.c_proj.bias": (96,)}
    outer = {f"ln_{i}.{part}": (96,) for i in ("pre", "post") for part in ("weight", "bias")}
    outer |= {"class_embedding": (96,), "positional_embedding": (9, 96), "proj": (96, 64)}
    outer |= {"conv1.weight": (96, 3, 16, 16)}
    outer |= {f"transformer.resblocks.0.{k}": v for k, v in block.items()}
    return {f"image_encoder.{k}": v for k, v in outer.items()} | {"text_encoder.x": (1,)}


def one_block_state():
    "The names of TransReID's own small network, one block of it."
    net = vit(**ONE_BLOCK).state_dict()
    return {f"base.{k}": tuple(v.shape) for k, v in net.items()}


def pretrained_state():
    "A teacher of self-supervised training."
    own = {k: s for k, s in KEYS[S16].items() if k.startswith("base.") and ".fc." not in k}
    shapes = {f"backbone.{k.removeprefix('base.')}": s for k, s in own.items()}
    return shapes | {"head.last_layer.weight": (4, 4)}


S16 = "transreid_reduced_s16"
CASES = {
    "transreid_vit": (KEYS[S16], vit),
    "transreid_vit_cameras": (KEYS[f"{S16}_sie_cam"], vit),
    "transreid_vit_small_old": (one_block_state(), lambda: vit(**ONE_BLOCK)),
    "dino_style_pretraining": (pretrained_state(), vit),
    "pass_vit": (KEYS["pass_reduced"], lambda: vit(reg_tokens=3)),
    "solider_swin": (KEYS["solider_reduced_128x64"], swin),
    "clip_vit": (
        clip_state(),
        lambda: vit(depth=1, num_classes=64, pre_norm=True, img_size=(64, 32)),
    ),
    "clip_rn": (KEYS["clip_rn_reduced"], resnet_clip),
    "fastreid_resnet": (KEYS["fastreid_bot_r50"], resnet50),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rename_rule_fills_its_network_whole(case):
    shapes, build = CASES[case]
    entry = KEYMAPS[case.removesuffix("_cameras")]
    net, state, rules = build(), numbered(shapes), rules_of(entry)
    rules = rules._replace(fresh={"relative_position_index$": "computed"})
    report = load_renamed(net, rename_state(state, rules), rules)
    assert set(report.fresh.values()) <= {"computed"}
    named = {name for text in report.loaded.values() for name in text.split(" + ")}
    assert named - {"zeros"} | report.left.keys() == state.keys()
    assert set(report.left.values()) <= {"said so", "of other people", "a counter"}


def test_jpm_leaves_its_dead_block_and_keeps_its_branches():
    found = rename_state(numbered(KEYS[f"{S16}_jpm"]), rules_of(KEYMAPS["transreid_vit_jpm"]))
    assert "base.blocks.2.norm1.weight" in found.left and "base.norm.weight" in found.left
    assert found.origin["branch2.block.mlp.fc1.weight"] == "b2.0.mlp.fc1.weight"
    heads = {key.split(".")[0] for key in found.state}
    assert heads == {"blocks", "branch1", "branch2", "cls_token", "patch_embed", "pos_embed"}


def test_files_of_three_eras_have_one_name():
    old = {"heads.bnneck.weight": (4,), "heads.classifier.weight": (9, 4), "pixel_mean": (3,)}
    found = rename_state(numbered(old), rules_of(KEYMAPS["fastreid_old_heads"]))
    assert found.origin.keys() == {"heads.bottleneck.0.weight", "heads.weight"}
    assert list(found.left) == ["pixel_mean"]


def test_tensors_in_another_order():
    "Against the words of the golden data's README, index by index."
    state = {"reduction": torch.arange(24.0).reshape(2, 12), "norm": torch.arange(12.0)}
    rules = KeyRules(ops=[("reduction", "merge_weight"), ("norm", "merge_vector")])
    found = rename_state(state, rules).state
    for c in range(3):
        for row in range(2):
            for column in range(2):
                theirs, ours = (c * 2 + row) * 2 + column, (column * 2 + row) * 3 + c
                assert found["norm"][ours] == state["norm"][theirs]
                assert torch.equal(found["reduction"][:, ours], state["reduction"][:, theirs])


def test_an_own_network_is_the_scaled_one():
    whole = {"base.blocks.0.attn.qkv.weight": torch.ones(2304, 2)}
    found = rename_state(whole, rules_of(KEYMAPS["transreid_vit_small_old"])).state
    scaled = found["blocks.0.attn.qkv.weight"]
    assert scaled[:768].eq(math.sqrt(96 / 768)).all() and scaled[768:].eq(1).all()
    assert whole["base.blocks.0.attn.qkv.weight"].eq(1).all()  # the file's own stays
    assert isinstance(nn.Parameter(scaled), nn.Parameter)
