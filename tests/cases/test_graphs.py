"""Every network of the catalogue as an ONNX file, against itself; and files that are no such thing."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto as Kind
from onnx import helper, numpy_helper
from torch import nn

from reidlab import Embedder
from reidlab.core.settings import package_version
from reidlab.deploy.contract import Contract
from reidlab.deploy.onnx import OPSET, Deployed, OnnxNetwork, example_of, write_onnx
from reidlab.models.catalogue import BACKBONES, HEADS, NECKS, POOLS, build_model
from reidlab.models.vit import camera_embeddings
from reidlab.training.network import Scores

VIT = {"dim": 24, "depth": 2, "heads": 2}
SWIN = {"dim": 12, "depths": [1, 1, 1, 1], "heads": [1, 2, 2, 2]}
CLIP = {"dim": 24, "depth": 2, "heads": 2, "projected": 16}
CLIP_CNN = {"width": 16, "depths": [1, 1, 1, 1], "projected": 16}
CELLS = {"init_channels": 8, "cells_per_stage": [1, 1, 1, 1]}
TOKENS = {"pool": "token", "neck": "token_bnneck"}
JIGSAW = {"transreid_vit": VIT | {"jigsaw": True, "shift": 2}}
PARTS = {"transreid_vit": VIT | {"part_tokens": 3}}
PCB = {"stripes": 2}
NARROW = {"bnneck": {"embedding": 8}}
PIDS = 101  # a number that is nobody's width

# small networks that go with every change: one a kind of thing that tracing can stumble over
FEW = {
    "stage_net": (
        {"stage_net": {"stage2": "inverted", "stage3": "part_aware", "depth": 2, "width": 8}},
        {"pool": "gem"},
    ),
    "small_cnn, gem, embedding": ("small_cnn", {"pool": "gem", "neck": {"bn": {"embedding": 8}}}),
    "cameras": ({"transreid_vit": VIT | {"cameras": 3}}, {"pool": "token"}),
    "searched cells": ({"derived": CELLS | {"genotype": "random:3"}}, {}),
    "clip": ({"clip_vit": CLIP}, {"pool": "token"}),
    "stripes": (
        "small_cnn",
        {"head": {"pcb": PCB | {"global_branch": 8}}, "neck": {"bn": {"embedding": 8}}},
    ),
}
# and all others
MANY = {
    **{f"resnet{n}": (f"resnet{n}", {}) for n in (18, 34, 50, 101, 152)},
    "stem without relu": ({"resnet18": {"stem_relu": False, "last_stride": 2}}, {}),
    "ibn": ("resnet50_ibn", {"pool": "gem"}),
    "middle": ("resnet50_middle", {"neck": {"bn": {"embedding": 8}}}),
    **{name: (name, {}) for name in BACKBONES if name.startswith("se_")},
    "fast-reid's": ("resnet_fastreid", {"pool": "gem"}),
    "non-local": ({"resnet_fastreid": {"ibn": True, "non_local": "half", "squeeze": True}}, {}),
    "non-local, one": ({"resnet_fastreid": {"non_local": "one", "stem_pool": "padded"}}, {}),
    "fast-reid's 18": ({"resnet_fastreid": {"depth": 18, "squeeze": True, "ibn": True}}, {}),
    "auto_reid": ({"derived": CELLS | {"genotype": "auto_reid", "last_stride": 2}}, {}),
    "darts": ({"derived": {"genotype": "random:5", "macro": "darts", "layers": 3} | CELLS}, {}),
    **{
        f"cells {seed}": ({"derived": CELLS | {"genotype": f"random:{seed}"}}, {})
        for seed in range(6)
    },
    "cells, second tower": ({"derived": CELLS | {"genotype": "random:1", "auxiliary": 0.4}}, {}),
    **{name: ({name: {"width": 0.25}}, {}) for name in ("cnet", "stdnet", "osnet", "mobilenetv2")},
    "cdnet": ({"cdnet": {"width": 0.25, "genotype": "random:2"}}, {"neck": "fblneck"}),
    "cdnet, published": ("cdnet", {"neck": "fblneck"}),
    "gdasnet": ("gdasnet", {}),
    **{
        f"osnet {norm} {width}": (
            {"osnet_published": {"norm": norm, "width": width}},
            {"neck": {"fc": {"embedding": 8}}},
        )
        for norm, width in (("bn", 1.0), ("ibn", 0.25), ("ain", 0.25))
    },
    "vit": ({"transreid_vit": VIT}, {}),
    "vit, overlapping": (
        {"transreid_vit": VIT | {"stride": 12, "cameras": 4, "unseen_camera": "mean"}},
        {"pool": "token_gem"},
    ),
    "vit, convolutions": (
        {"transreid_vit": VIT | {"stem": "ics", "gem": True}},
        TOKENS | {"head": "tokens"},
    ),
    "vit, cameras at the class": (
        {"transreid_vit": VIT | {"cameras": 2, "camera_at": "class"}},
        {"pool": "token_avg"},
    ),
    "jigsaw": (JIGSAW, TOKENS | {"head": "jigsaw"}),
    "jigsaw, in a row": (
        {"transreid_vit": JIGSAW["transreid_vit"] | {"shuffle": False, "cameras": 3}},
        TOKENS | {"head": "tokens"},
    ),
    "fused tokens": (PARTS, TOKENS | {"head": "fused_tokens"}),
    "fused tokens, mean": (PARTS, TOKENS | {"head": {"fused_tokens": {"fusion": "mean"}}}),
    "swin without dials": (
        {"solider_swin": SWIN | {"semantic_weight": -1, "window": 4}},
        {"pool": "gem"},
    ),
    "windows": ({"solider_swin": SWIN}, {}),
    "clip, cameras": ({"clip_vit": CLIP | {"cameras": 3, "stride": 12}}, {"pool": "token"}),
    "clip, gelu": ({"clip_vit": CLIP | {"activation": "gelu"}}, {}),
    "clip's resnet": ({"clip_resnet": CLIP_CNN}, {"pool": "token"}),
    "clip's resnet, map": ({"clip_resnet": CLIP_CNN}, {"pool": "gem"}),
    **{
        f"timm {name}": ({"timm": {"name": name}}, {})
        for name in ("resnet18", "test_resnet", "test_convnext", "test_efficientnet", "test_vit2")
    },
    "timm test_vit": ({"timm": {"name": "test_vit"}}, {"pool": "token"}),
    "timm test_vit, sides": ({"timm": {"name": "test_vit"}}, {"pool": "token_avg"}),
    **{f"pool {name}": ("small_cnn", {"pool": name}) for name in POOLS if "token" not in name},
    "pool gem, fixed": (
        "small_cnn",
        {"pool": {"gem": {"learned": False, "p": 2.5, "erasing": 0.3}}},
    ),
    **{
        f"neck {name}": ("small_cnn", {"neck": name})
        for name in NECKS
        if name not in ("token_bnneck", "fblneck")
    },
    "neck masked": ("small_cnn", {"neck": {"bn": {"feature_mask": True, "embedding": 8}}}),
    "head before": ("small_cnn", {"head": {"linear": {"neck_feat": "before"}}}),
    **{f"head {name}": ("small_cnn", {"head": name}) for name in ("cosine", "spectral")},
    "gated spectral": ("small_cnn", {"head": {"spectral": {"gate": 0.9}}}),
    "stripes, max": (
        "small_cnn",
        {"pool": "max", "head": {"pcb": PCB | {"cosines": "all"}}, "neck": NARROW},
    ),
    "stripes that do not divide": (
        "small_cnn",
        {"head": {"pcb": {"stripes": 3}}, "neck": {"none": {"embedding": 8}}},
    ),
    "stripes, forked": (
        {"resnet18": {"last_stride": 1}},
        {"head": {"pcb": PCB | {"global_branch": 8, "copied_stage": 2}}, "neck": NARROW},
    ),
    "stripes, concatenated": (
        "small_cnn",
        {
            "neck": {"bn": {"feature_mask": True, "embedding": 8}},
            "head": {"pcb": PCB | {"concat_classifier": True, "branch_update": 5}},
        },
    ),
}
NETWORKS = FEW | MANY


def network(backbone, parts, size=(64, 32)):
    "A network whose norms have seen something, so that folding them is no idle step."
    torch.manual_seed(0)
    model = build_model(backbone, **parts, n_pids=PIDS, photo=size)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model.eval()


def contract(model, size=(64, 32), flip=False):
    colours = {"mean": (0.5, 0.4, 0.4), "std": (0.2, 0.2, 0.3)}
    return Contract("t", "best", "0" * 64, *size, **colours, dim=model.feature_dim, flip=flip)


def largest_difference(model, path, rules, takes):
    "Of vectors of length 1, over batches of 1, 2 and 7, with cameras known and not."
    here, there = Deployed(model, rules, takes), OnnxNetwork(path, threads=1)
    far = []
    for n in (1, 2, 7):
        images = example_of(rules, takes, photos=n)
        told = [None, torch.arange(n) % 5 - 1] if there.takes_cameras else [None]
        for cameras in told:
            with torch.no_grad():
                ours = F.normalize(here(images, cameras))
            far.append((ours - F.normalize(there(images, cameras))).abs().max().item())
    return max(far)


def check_contents(model, path):
    "No classifier, no second tower, nothing twice: what evaluation reads, and little else."
    graph = onnx.load(str(path)).graph
    assert not any(PIDS in tensor.dims for tensor in graph.initializer)
    trained = [
        m.weight for m in model.modules() if PIDS in getattr(m, "weight", torch.zeros(1)).shape
    ]
    kept = sum(w.numel() for w in model.state_dict().values()) - sum(w.numel() for w in trained)
    tables = any("relative_position" in name for name in model.state_dict())  # of Swin's windows
    held = sum(len(tensor.raw_data) for tensor in graph.initializer) / 4
    assert held <= kept + (16384 if tables else 4096)


def goes_through(name, folder, flip=False, takes="images"):
    "Write a network of the table, and say how far the file's vectors are from its own."
    size = (96, 32) if "divide" in name else (64, 32)
    model = network(*NETWORKS[name], size)
    rules = contract(model, size, flip)
    path = write_onnx(model, rules, Path(folder) / "a.onnx", takes)
    check_contents(model, path)
    return largest_difference(model, path, rules, takes)


@pytest.mark.parametrize("name", FEW)
def test_some_networks_are_their_files(name, tmp_path):
    odd = list(FEW).index(name) % 2  # every second with its mirror image, and as bytes
    assert goes_through(name, tmp_path, flip=odd, takes="photos" if odd else "images") <= 1e-4


def test_cameras_count_after_an_evaluation_elsewhere(tmp_path):
    model = network(*FEW["cameras"])
    (side,) = camera_embeddings(model)
    side.vectors.data.normal_()
    rules, told = contract(model), torch.tensor([0, 2, -1])
    images = example_of(rules, photos=3)
    with torch.no_grad():
        here = model(images, told)
        side.strange = True
        there = OnnxNetwork(write_onnx(model, rules, tmp_path / "a.onnx"))(images, told)
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)
    assert side.strange


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY)
def test_all_networks_are_their_files(name, tmp_path):
    assert goes_through(name, tmp_path) <= 1e-4


def test_the_table_leaves_no_part_out():
    said = str(NETWORKS)
    parts = [*BACKBONES, *POOLS, *NECKS, *HEADS]
    assert [part for part in parts if f"'{part}'" not in said] == []


@pytest.mark.slow
def test_a_network_of_classes_is_a_graph_of_its_scores(tmp_path):
    model = network("small_cnn", {})
    rules = replace(contract(model), dim=PIDS)
    path = write_onnx(Scores(model).eval(), rules, tmp_path / "a.onnx")
    images = example_of(rules, photos=3)
    with torch.no_grad():
        torch.testing.assert_close(OnnxNetwork(path)(images), Scores(model)(images))


def port(name, kind, *shape):
    return helper.make_tensor_value_info(name, kind, shape)


def foreign(path, inputs, outputs, nodes=(), weights=()):
    "A file as another program writes it: Flatten, or what was asked for."
    nodes = nodes or [helper.make_node("Flatten", [inputs[0].name], [outputs[0].name])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8), path


X, Y = port("x", Kind.FLOAT, "b", 3, 4, 2), port("y", Kind.FLOAT, "b", 24)
RELU = [helper.make_node("Flatten", ["x"], ["y"]), helper.make_node("Relu", ["x"], ["w"])]
CAST = [
    helper.make_node("Flatten", ["x"], ["f"]),
    helper.make_node("Cast", ["f"], ["y"], to=Kind.FLOAT),
]
WRONG = {
    "two inputs": ([X, port("z", Kind.FLOAT, 1)], [Y], (), r"it takes x \(b, 3, 4, 2\), z \(1\)"),
    "two outputs": ([X], [Y, port("w", Kind.FLOAT, "b", 3, 4, 2)], RELU, r"it gives y .*, w .*one"),
    "float64": ([port("x", Kind.DOUBLE, "b", 3, 4, 2)], [Y], CAST, r"tensor\(double\). It needs"),
    "float16": ([port("x", Kind.FLOAT16, "b", 3, 4, 2)], [Y], CAST, r"tensor\(float16\). It needs"),
    "maps": ([X], [port("w", Kind.FLOAT, "b", 3, 4, 2)], RELU[1:], "It needs one"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_graph_of_another_kind_is_told_what_it_is(case, tmp_path):
    inputs, outputs, nodes, words = WRONG[case]
    onnx.save(*foreign(tmp_path / "a.onnx", inputs, outputs, nodes))
    with pytest.raises(ValueError, match=f"a.onnx is no network that turns photos.*{words}"):
        OnnxNetwork(tmp_path / "a.onnx")


def test_a_file_of_another_program_runs_under_rules_that_are_given(tmp_path):
    fixed = port("x", Kind.FLOAT, 1, 3, 4, 2)
    onnx.save(*foreign(tmp_path / "a.onnx", [fixed], [port("y", Kind.FLOAT, 1, 24)]))
    photos = np.random.default_rng(0).integers(0, 256, (2, 4, 2, 3), dtype="uint8")
    with pytest.raises(ValueError, match=r"a.onnx says nothing of size, colours and mean"):
        Embedder(tmp_path / "a.onnx")
    rules = Contract("x", "best", "", 4, 2, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), dim=24)
    embedder = Embedder(tmp_path / "a.onnx", contract=rules)
    seen = embedder.embed(photos, batch_size=1)
    by_hand = photos.transpose(0, 3, 1, 2).reshape(2, 24) / np.float32(255)
    np.testing.assert_allclose(seen, by_hand, atol=1e-6)
    with pytest.raises(ValueError, match="It takes 1 at a time: ask with batch_size=1"):
        embedder.embed(photos)


def test_a_damaged_file_is_one_line(tmp_path):
    weights = np.zeros((24, 2000), "float32")
    held = [numpy_helper.from_array(weights, "w")]
    nodes = [RELU[0], helper.make_node("MatMul", ["y", "w"], ["v"])]
    model, path = foreign(
        tmp_path / "apart.onnx", [X], [port("v", Kind.FLOAT, "b", 2000)], nodes, held
    )
    onnx.save(model, path, save_as_external_data=True, location="w.data", size_threshold=0)
    (tmp_path / "w.data").unlink()
    with pytest.raises(ValueError, match=r"^apart.onnx keeps .* not beside it \(w.data\). Put it"):
        OnnxNetwork(path)
    whole, path = model.SerializeToString(), tmp_path / "cut.onnx"
    for content in (
        whole[: len(whole) // 2],
        whole[:40],
        b"",
        b"PK\x03\x04" + bytes(50),
        b"<html>",
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^cut.onnx is no ONNX file, or was cut off. Export"):
            OnnxNetwork(path)
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(FileNotFoundError, match="no file at"):
        Embedder(tmp_path / "folder.onnx")


class Thick(nn.Module):
    "A network that counts its photos in Python."

    def forward(self, images):
        return images.reshape(len(images), -1)


class Moody(nn.Module):
    "A network that looks at its numbers in Python."

    def forward(self, images):
        return images.flatten(1) * (1 if images.mean() > 0 else -1)


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    small = Contract("x", "best", "", 4, 2, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), dim=24)
    write = lambda model, name: write_onnx(model, small, tmp_path / name)
    (tmp_path / "notes").write_text("a file")
    (tmp_path / "there.onnx").mkdir()
    before = sorted(tmp_path.iterdir())
    for model, name, words in (
        (Thick(), "a.onnx", "network Thick cannot be written as a graph.*batch of one size alone"),
        (Moody(), "a.onnx", "network Moody cannot be written as a graph"),
        (nn.Flatten(), "a.pt", "ends in .onnx, got a.pt"),
        (nn.Flatten(), "there.onnx", "there.onnx in .* is a folder"),
        (nn.Flatten(), "notes/a.onnx", "notes is a file, no folder to write a.onnx into"),
    ):
        with pytest.raises(ValueError, match=words) as told:
            write(model, name)
        assert "\n" not in str(told.value)
    with monkeypatch.context() as patched:
        patched.setattr("reidlab.deploy.onnx.LARGEST", 16)
        with pytest.raises(ValueError, match=r"a.onnx would hold 0.0 GB, and an ONNX file holds 2"):
            write(nn.Sequential(nn.Flatten(), nn.Linear(24, 2)), "a.onnx")
    for missing in ("onnx", "onnxscript"):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, missing, None)
            with pytest.raises(ModuleNotFoundError, match=r'pip install "reidlab\[deploy\]"'):
                write(nn.Flatten(), "a.onnx")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(ModuleNotFoundError, match=r'pip install "reidlab\[deploy\]"'):
            Embedder(tmp_path / "a.onnx")
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_keeps_its_mode_and_the_file_says_where_it_is_from(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Dropout()).train()
    small = Contract("x", "best", "", 4, 2, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), dim=24)
    notes = OnnxNetwork(write_onnx(model, small, tmp_path / "a.onnx")).notes
    assert all(part.training for part in model.modules())
    for said in (f"torch {torch.__version__}", f"opset {OPSET}", f"reidlab {package_version()}"):
        assert said in notes["reidlab.exporter"]
    assert "4 rows, 2 columns" in notes["reidlab.input"] and "OpenCV" in notes["reidlab.input"]
