"""Every kind of wrong file of weights, through every door: one clear line, nothing loaded in part, nothing left on disk."""

import argparse
import gzip
import io
import json
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_bad_input import clear, refused

from reidlab.core.recipe import Recipe, load_recipe, validated
from reidlab.core.run import open_run
from reidlab.core.seed import seed_all
from reidlab.interchange.baseline_weights import baseline_state, load_baseline
from reidlab.interchange.clip import clip_photo
from reidlab.interchange.families import (
    FAMILIES,
    family_of,
    foreign_network,
    read_foreign,
    recognise,
)
from reidlab.interchange.key_rules import load_family
from reidlab.interchange.transreid import UNTOLD, photo_of
from reidlab.jobs.bring_in import bring_in, told_words
from reidlab.jobs.command import main
from reidlab.jobs.starting_point import starting_point
from reidlab.models.backbones import load_weight_file
from reidlab.models.catalogue import build_model
from reidlab.models.weight_files import weights_of
from reidlab.training.adopt import adopt
from reidlab.training.network import build_network
from reidlab.training.parts import note_weights
from reidlab.training.trained import load_model

OSNET = {"osnet_published": {"width": 0.25, "norm": "bn"}}
DATA = Path(__file__).parents[1] / "data"
FIRST = "conv1.conv.weight"


def osnet(n_pids=5, **more):
    return build_model(
        {"osnet_published": OSNET["osnet_published"] | more}, neck="fc", n_pids=n_pids
    )


@pytest.fixture(scope="module")
def good():
    "The state dict of a small OSNet, as torchreid saves it."
    seed_all(0)
    return baseline_state(osnet(), "torchreid")


def bits(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def same(net, before):
    return all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def starting(file):
    "The network of a recipe that starts from a file."
    net = {"osnet_published": OSNET["osnet_published"] | {"weights": str(file)}}
    return build_network(validated("heir", {"model": {"backbone": net}}), 3)


DOORS = {
    "recognise": lambda file: foreign_network(read_foreign(file)),
    "import": lambda file: bring_in(file, run="new"),
    "weights": starting,
}


@pytest.fixture(autouse=True)
def bench(tmp_path_factory, monkeypatch):
    "A workbench where runs and recipes would lie, away from the files."
    place = tmp_path_factory.mktemp("bench")
    monkeypatch.setenv("REIDLAB_ROOT", str(place))
    return place


def left(folder):
    "Whatever lies anywhere below a folder."
    return [path.name for path in folder.rglob("*") if path.is_file()]


# --- files that are none ------------------------------------------------------------------------


def packed(write):
    "A zip written by hand, in memory."
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as box:
        write(box)
    return held.getvalue()


def bomb(box):
    "An archive as torch's, of nothing but zeros, packed small."
    box.writestr("w/data.pkl", pickle.dumps({}), zipfile.ZIP_DEFLATED)
    box.writestr("w/data/0", bytes(2**25), zipfile.ZIP_DEFLATED)


def saved(content, **how):
    held = io.BytesIO()
    torch.save(content, held, **how)
    return held.getvalue()


def safe(header, body=b""):
    "A safetensors file with whatever header."
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def tarred(good):
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as box:
        for name in ("a.pth", "b.pth"):
            info = tarfile.TarInfo(name)
            info.size = 4
            box.addfile(info, io.BytesIO(b"data"))
    return held.getvalue()


def arrays(good):
    held = io.BytesIO()
    np.savez(held, **{key: value.numpy() for key, value in list(good.items())[:3]})
    return held.getvalue()


class Runs:
    "What would run where a pickle is read without care."

    def __reduce__(self):
        return print, ("it ran",)


F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
ONNX = b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\xbc\x05\n\x1f"
SCRIPT = ("net/data.pkl", "net/code/__torch__.py", "net/constants.pkl")
NO_FILES = {
    "a page": (lambda g: b"<!DOCTYPE html><title>404</title>", "a page of text"),
    "a pointer": (
        lambda g: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "git lfs",
    ),
    "text": (lambda g: b"resnet50, trained on Monday\n", "text"),
    "nothing": (lambda g: b"", "empty"),
    "noise": (lambda g: bytes(range(256)) * 9, "something else"),
    "half a zip": (lambda g: saved(g)[:-300], "no whole archive"),
    "half an old file": (
        lambda g: saved(g, _use_new_zipfile_serialization=False)[:2000],
        "Get it again",
    ),
    "half a safetensors": (
        lambda g: safe({"a": F32}, bytes(7)),
        "safetensors file that is cut off",
    ),
    "a header that lies": (
        lambda g: safe({"a": F32 | {"shape": [9, 9]}}, bytes(16)),
        "safetensors file that is cut off or damaged",
    ),
    "a header of no JSON": (lambda g: safe(b"{nothing", bytes(16)), "cut off or damaged"),
    "a header beyond the file": (
        lambda g: (50_000_000).to_bytes(8, "little") + b"{" + bytes(99),
        "cut off or damaged",
    ),
    "overlapping safetensors": (
        lambda g: safe({"a": F32, "b": F32}, bytes(32)),
        "cut off or damaged",
    ),
    "ONNX": (lambda g: ONNX + bytes(99), "ONNX"),
    "TorchScript": (
        lambda g: packed(lambda box: [box.writestr(name, b"x") for name in SCRIPT]),
        "TorchScript",
    ),
    "code in TorchScript": (
        lambda g: packed(
            lambda box: [box.writestr(n, pickle.dumps({"a": Runs()})) for n in SCRIPT]
        ),
        "TorchScript",
    ),
    "Keras": (lambda g: b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
    "Keras 3": (
        lambda g: packed(lambda box: box.writestr("model.weights.h5", b"x")),
        "a network of Keras",
    ),
    "TensorFlow Lite": (lambda g: b"\x1c\x00\x00\x00TFL3" + bytes(99), "TensorFlow Lite"),
    "npz": (arrays, "arrays of numpy (.npz)"),
    "npy": (lambda g: b"\x93NUMPY\x01\x00v\x00" + bytes(99), "one array of numpy"),
    "a tar": (tarred, "a tar archive. Unpack it"),
    "gzip": (lambda g: gzip.compress(saved(g)), "packed by gzip. Unpack it"),
    "a zip around it": (
        lambda g: packed(lambda box: box.writestr("best/model.pth", saved(g))),
        "a zip with best/model.pth inside. Unpack it",
    ),
    "a bomb": (lambda g: packed(bomb), "unpacks to"),
    "a zip of others": (
        lambda g: packed(lambda box: box.writestr("readme.txt", b"hello")),
        "a zip of readme.txt",
    ),
    "a picture": (lambda g: b"\x89PNG\r\n\x1a\n" + bytes(99), "a picture"),
    "GGUF": (lambda g: b"GGUF\x03" + bytes(99), "language model"),
    "code": (lambda g: saved({"state_dict": g, "hook": Runs()}), "would run their code"),
    "code in an old pickle": (
        lambda g: pickle.dumps({"a": Runs()}, protocol=2),
        "would run their code",
    ),
    "a whole network": (lambda g: saved(torch.nn.Linear(1, 1)), "whole Python objects"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_of_weights(kind, door, good, tmp_path, bench, capsys):
    write, words = NO_FILES[kind]
    file = tmp_path / "w.pth"
    file.write_bytes(write(good))
    with refused("w.pth", words):
        DOORS[door](file)
    assert left(tmp_path) == ["w.pth"] and not left(bench)
    assert "it ran" not in capsys.readouterr().out


# --- tensors that are none of this network's ----------------------------------------------------


def changed(good, key=FIRST, to=None):
    return good | {key: to(good[key])}


def filled(value):
    "The first tensor with one number in it."

    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return change


def half(good):
    return dict(list(good.items())[len(good) // 2 :])


ROW = {"exp_avg": torch.zeros(2), "step": torch.tensor(3.0)}
OPTIMISER = {"state": {0: ROW, 1: ROW}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}
TENSORS = {
    "half of it": (half, "is missing"),
    "NaN": (lambda g: changed(g, to=filled(torch.nan)), "is not finite"),
    "infinity": (lambda g: changed(g, to=filled(-torch.inf)), "is not finite"),
    "NaN in half precision": (
        lambda g: changed(g, to=lambda t: filled(torch.nan)(t).half()),
        "is not finite",
    ),
    "too large": (lambda g: changed(g, to=lambda t: filled(1e300)(t.double())), "too large"),
    "whole numbers": (lambda g: changed(g, to=lambda t: t.to(torch.int8)), "quantised"),
    "packed": (lambda g: g | {"fc._packed_params.dtype": torch.zeros(1)}, "quantised"),
    "complex": (lambda g: changed(g, to=lambda t: t.to(torch.complex64)), "complex64"),
    "eight bits": (lambda g: changed(g, to=lambda t: t.to(torch.float8_e4m3fn)), "float8"),
    "sparse": (lambda g: changed(g, to=lambda t: t.flatten(1).to_sparse()), "is sparse"),
    "shapes alone": (lambda g: changed(g, to=lambda t: t.to("meta")), "meta device"),
    "one number": (lambda g: changed(g, to=lambda t: t.sum()), "(), not"),
    "turned": (lambda g: changed(g, to=lambda t: t.transpose(0, 1)), "not (16, 3, 7, 7)"),
    "empty": (lambda g: changed(g, to=lambda t: t[:0]), "(0, 3, 7, 7), not"),
    "spread": (
        lambda g: changed(g, to=lambda t: t[:1, :1, :1, :1].expand(2**40, 3, 7, 7)),
        "declares",
    ),
    "numbers for names": (lambda g: dict(enumerate(g.values())), "by int (0), not by name"),
    "twice": (lambda g: g | {f"module.{FIRST}": g[FIRST]}, "holds conv1.conv.weight twice"),
    "something more": (lambda g: g | {"gate<b>\n</b>.weight": torch.zeros(3)}, "has no place here"),
    "an optimiser": (lambda g: OPTIMISER, "the state of an optimiser"),
    "an optimiser, wrapped": (lambda g: {"optimizer": OPTIMISER, "epoch": 3}, "it holds optimizer"),
    "a list": (lambda g: list(g.values()), "it holds list"),
    "one tensor": (lambda g: g[FIRST], "it holds Tensor"),
    "settings": (lambda g: {"epoch": 3, "lr": 0.1}, "it holds epoch, lr"),
    "an empty mapping": (lambda g: {}, "it holds nothing"),
    "two networks": (lambda g: {"net": g, "model": g}, "several networks"),
    "an array of objects": (
        lambda g: {FIRST: np.array([None, {}], dtype=object)},
        "array of object",
    ),
}
STRANGE = {
    "another network": ({"layer1.weight": torch.zeros(3)}, "of no family"),
    "a text model": ({"bert.embeddings.word_embeddings.weight": torch.zeros(3)}, "a model of text"),
    "a detector": ({"roi_heads.box.weight": torch.zeros(3)}, "a detector"),
    "an adapter": ({"q.lora_A.weight": torch.zeros(3)}, "LoRA"),
    "part of a ResNet": ({"base.conv1.weight": torch.zeros(64, 3, 7, 7)}, "no ResNet has 0"),
    "an odd OSNet": ({"conv5.conv.weight": torch.zeros(77, 3, 1, 1)}, "of 77 channels"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_do_not_fit(kind, door, good, tmp_path, bench):
    change, words = TENSORS[kind]
    file = tmp_path / "w.pth"
    torch.save(change(good), file)
    with pytest.raises(ValueError) as caught:
        DOORS[door](file)
    clear(str(caught.value), "w.pth", words)
    assert left(tmp_path) == ["w.pth"] and not left(bench)


@pytest.mark.parametrize("kind", STRANGE)
def test_whose_file_it_is_not(kind, tmp_path):
    state, words = STRANGE[kind]
    torch.save(state, tmp_path / "w.pth")
    for door in ("recognise", "import"):
        with refused("w.pth", words):
            DOORS[door](tmp_path / "w.pth")
    with refused("w.pth", "does not fit OSNet", "Name the backbone"):
        starting(tmp_path / "w.pth")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "kind", ["half of it", "too large", "turned", "one number", "something more"]
)
def test_a_network_stays_as_it_was(kind, good):
    "Bits, after a refusal in the middle of a file."
    model = osnet()
    before = bits(model)
    state = {key: value for key, value in TENSORS[kind][0](good).items()}
    with refused("file"):
        load_family(model, state, FAMILIES["torchreid"])
    assert same(model, before)


def test_a_backbone_stays_as_it_was(good, tmp_path):
    net = osnet().backbone
    before = bits(net)
    for name, content in {"half": half(good), "whole": TENSORS["infinity"][0](good)}.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with refused(f"{name}.pth"):
            load_weight_file(net, str(tmp_path / f"{name}.pth"), [])
    assert same(net, before)


def test_names_that_are_no_files(tmp_path):
    (tmp_path / "folder.pth").mkdir()
    for door in DOORS.values():
        with refused("folder.pth", "is a folder"):
            door(tmp_path / "folder.pth")
        with refused("nowhere.pth"):
            door(tmp_path / "nowhere.pth")


# --- files that are right, however they were saved ------------------------------------------------


def as_safetensors(state):
    from safetensors.torch import save

    return save({key: value.contiguous() for key, value in state.items()})


ROUND = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}
RIGHT = {
    **{
        name: lambda g, kind=kind: saved(
            {k: v.to(kind) if v.is_floating_point() else v for k, v in g.items()}
        )
        for name, kind in ROUND.items()
    },
    "numpy": lambda g: saved({"model": {k: v.numpy() for k, v in g.items()}}),
    "numpy beside": lambda g: saved({"state_dict": g, "rank1": np.float64(0.9), "epoch": 3}),
    "arguments beside": lambda g: saved({"teacher": g, "args": argparse.Namespace(lr=0.1)}),
    "parallel": lambda g: saved({f"module.{k}": v for k, v in g.items()}),
    "parameters": lambda g: saved(
        {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in g.items()}
    ),
    "the old way": lambda g: saved(g, _use_new_zipfile_serialization=False),
    "without counters": lambda g: saved({k: v for k, v in g.items() if "num_batches" not in k}),
    "shared storages": lambda g: saved(shared(g)),
    "safetensors": as_safetensors,
}


def test_a_script_gives_its_tensors_and_runs_nothing(tmp_path):
    "CLIP's own files are of this kind, in half precision."
    seed_all(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).half().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(net).save(tmp_path / "w.pt")
    state = weights_of(tmp_path / "w.pt").state
    assert state.keys() == net.state_dict().keys() and state["0.weight"].dtype == torch.float32
    assert all(torch.equal(v, state[k].to(v.dtype)) for k, v in net.state_dict().items())


def test_a_network_of_ours_in_safetensors_starts_another(tmp_path):
    "As `weights export` writes it; with another backbone it is refused, as a checkpoint is."
    from safetensors.torch import save_file

    seed_all(0)
    source = build_model("small_cnn", n_pids=9)
    told = {"architecture": json.dumps(source.architecture), "run": "first"}
    state = {key: value.contiguous() for key, value in source.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors", metadata=told)
    start = {"weights": str(tmp_path / "w.safetensors")}
    heir = build_network(validated("heir", {"model": {"backbone": {"small_cnn": start}}}), 3)
    ours = bits(source)
    assert all(torch.equal(v, ours[k]) for k, v in heir.state_dict().items() if "classif" not in k)
    with refused("another backbone", "small_cnn", "osnet"):
        build_network(validated("heir", {"model": {"backbone": {"osnet": start}}}), 3)
    with refused("w.safetensors", "is a checkpoint of reidlab"):
        bring_in(tmp_path / "w.safetensors")


# every file is of one family or of none, by its names alone
STORED = json.loads(gzip.decompress((DATA / "golden_keymaps.json.gz").read_bytes()))["keys"]
OF_FAMILY = {
    "transreid_reduced_s16": "transreid",
    "transreid_reduced_s16_jpm": "transreid",
    "transreid_reduced_s16_sie_cam": "transreid",
    "pass_reduced": "transreid",
    "solider_reduced_128x64": "solider",
    "fastreid_bot_r50": "fastreid",
    "clip_rn_reduced": "clip_reid",
}


@pytest.mark.parametrize("case", OF_FAMILY)
def test_a_file_is_of_one_family(case):
    state = {key: torch.empty(shape, device="meta") for key, shape in STORED[case].items()}
    assert recognise(state) == [OF_FAMILY[case]]


SMALL = {"heads": 3, "height": 64, "width": 32}
BECOMES = {  # case → what is told, width of the embedding
    "transreid_reduced_s16": (SMALL, 96),
    "transreid_reduced_s16_jpm": (SMALL, 480),
    "transreid_reduced_s16_sie_cam": (SMALL, 96),
    "pass_reduced": (SMALL, 192),
    "solider_reduced_128x64": ({"height": 128, "width": 64}, 192),
    "clip_rn_reduced": ({"height": 64, "width": 32}, 576),
}


def drawn(shapes):
    "Tensors of these names and shapes, as a file would hold them."
    whole = ("num_batches_tracked", "index")
    draw = lambda key, shape: torch.rand(shape) + 1 if "var" in key else torch.rand(shape) * 0.1
    return {
        key: torch.zeros(shape, dtype=torch.int64) if key.endswith(whole) else draw(key, shape)
        for key, shape in shapes.items()
    }


@pytest.mark.parametrize("case", BECOMES)
def test_a_file_of_any_family_becomes_a_run(case, tmp_path):
    told, width = BECOMES[case]
    torch.save({"state_dict": drawn(STORED[case])}, tmp_path / "w.pth")
    folder, report = adopt(tmp_path / "w.pth", Recipe(), "new", root=tmp_path, **told)
    named = {
        name for text in report.loaded.values() for name in text.split(" + ")
    } | report.left.keys()
    assert STORED[case].keys() <= named and all(report.left.values())
    model, content = load_model(folder.path)
    data = folder.recipe.data
    with torch.no_grad():
        seen = model(torch.randn(2, 3, data.height, data.width))
    assert seen.shape == (2, width) and seen.isfinite().all()
    assert (data.height, data.width) == (told["height"], told["width"])
    told_there = content["origin"]["told"]
    assert told.items() <= told_there.items()
    imagenet = case == "clip_rn_reduced"  # its ResNet is prepared so, its transformer not
    assert (data.mean == (0.485, 0.456, 0.406)) == imagenet


NETS = {
    "vit_tiny_patch16_224": ["vit"],
    "resnet18": ["torchvision"],
    "vit_small_patch14_dinov2": [],
    "mobilenetv4_conv_small": [],
    "tiny_vit_5m_224": [],
    "fastvit_t8": [],
    "repvit_m1": [],
    "eva02_tiny_patch14_224": [],
    "convnext_atto": [],
    "swin_tiny_patch4_window7_224": [],
}


@pytest.mark.parametrize("name", NETS)
def test_a_network_of_timm_is_of_one_family_at_most(name):
    from timm import create_model

    with torch.device("meta"):
        net = create_model(name, pretrained=False)
    assert recognise(net.state_dict()) == NETS[name]
    if not NETS[name]:
        with refused("of no family", "a network of timm, which model.backbone"):
            family_of(net.state_dict())


def shared(state):
    "All tensors as views of one storage."
    whole = torch.cat([v.double().flatten() for v in state.values()])
    sizes = [v.numel() for v in state.values()]
    parts = zip(state.items(), whole.split(sizes), strict=True)
    return {key: part.view(value.shape) for (key, value), part in parts}


@pytest.mark.parametrize("kind", RIGHT)
def test_a_right_file_however_it_was_saved(kind, good, tmp_path):
    file = tmp_path / "w.pth"  # told by its content, not by its ending
    file.write_bytes(RIGHT[kind](good))
    model, report = foreign_network(read_foreign(file))
    kind_there = ROUND.get(kind, torch.float32)
    expected = {k: v.to(kind_there).to(v.dtype) for k, v in good.items()}
    ours = baseline_state(model, "torchreid")
    told = {k for k in expected if k in report.loaded.values()}
    assert len(told) >= 480 and not report.left
    assert all(torch.equal(ours[k], expected[k]) for k in told)
    net = starting(file).backbone.state_dict()
    assert torch.equal(net[FIRST], expected[FIRST])


def test_a_run_notes_whose_weights_it_began_with(good, tmp_path):
    torch.save(good, tmp_path / "w.pth")
    net = {"osnet_published": OSNET["osnet_published"] | {"weights": str(tmp_path / "w.pth")}}
    recipe = validated("heir", {"model": {"backbone": net}})
    run = open_run("heir", recipe, verb="train", root=tmp_path)
    note_weights(run, recipe, build_network(recipe, 3))
    (told,) = run.events("weights")
    assert told["loaded"] == 558 and told["family"] == "torchreid (OSNet)" and told["licence"]
    assert "head.classifier.weight" in told["fresh"] and "fc.0.weight" in told["left"]
    card = starting_point(recipe, 3)
    assert "558 of the backbone's 558" in card and "WARNING" in card and "licence: Code MIT" in card


def test_people_of_another_number(good, tmp_path):
    "A file of five people becomes a run of five, and a start for three."
    torch.save(good, tmp_path / "w.pth")
    folder, report = adopt(tmp_path / "w.pth", Recipe(), "new", root=tmp_path)
    assert not report.left and not report.fresh
    assert folder.recipe.data.height == 256 and folder.metrics()["origin"]["sha256"]
    model = osnet(n_pids=3)
    report = load_family(model, good, FAMILIES["torchreid"])
    assert report.fresh == {
        "head.classifier.weight": "(5, 512) there, (3, 512) here",
        "head.classifier.bias": "(5,) there, (3,) here",
    }
    assert report.left.keys() == {"classifier.weight", "classifier.bias"}


def test_odd_names_stay_on_their_line(good):
    "A name of a file is not to be trusted with a line, or with a terminal."
    told = "classifier.<b>\n\x1b[2J</b>"
    report = load_family(osnet(), good | {told: torch.zeros(3)}, FAMILIES["torchreid"])
    assert told in report.left
    assert "\x1b" not in str(report) and len(str(report).splitlines()) == 3


@pytest.mark.parametrize("family", ["strong", "lite"])
def test_a_family_reads_what_its_dictionary_wrote(family):
    "Two tables of names, one from ours and one from theirs: the same tensors, the same account."
    striped = ({"bn": {"embedding": 4}}, {"pcb": {"stripes": 3, "global_branch": 6}})
    neck, head = {"strong": ("bnneck", "linear"), "lite": striped}[family]
    build = lambda: build_model("resnet18", neck=neck, head=head, n_pids=4)
    seed_all(0)
    state = baseline_state(build(), family)
    one, two = build(), build()
    told = {"stem_relu": True, "last_stride": 1, "pool": "avg"}
    report, other = (
        load_family(one, state, FAMILIES[family], told),
        load_baseline(two, state, family),
    )
    assert (report.loaded, report.left, report.fresh) == (other.loaded, other.left, other.fresh)
    assert same(one, bits(two))


def test_a_resnet_of_two_projects(tmp_path):
    "Keys of reid-strong-baseline and of TransReID's ResNet are the same; another stem is refused."
    seed_all(0)
    state = baseline_state(build_model("resnet18", n_pids=4), "strong")
    torch.save(state, tmp_path / "w.pth")
    told = {"stem_relu": False, "last_stride": 1, "pool": "avg"}
    with refused("pools 2x2"):
        adopt(tmp_path / "w.pth", Recipe(), "new", root=tmp_path, stem_pool="2x2", **told)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_of_another_backbone_names_it(good, tmp_path):
    torch.save(good, tmp_path / "w.pth")
    net = {"small_cnn": {"weights": str(tmp_path / "w.pth")}}
    with refused("w.pth", "torchreid", "osnet_published", "small_cnn"):
        build_network(validated("heir", {"model": {"backbone": net}}), 3)


# --- settings: told from weights by what they hold ------------------------------------------------

STRONG_TEXT = """
MODEL:
  PRETRAIN_CHOICE: 'imagenet'
  LAST_STRIDE: 1
  NAME: 'resnet50_ibn_a'
SOLVER:
  MAX_EPOCHS: 60   # of 120
  STEPS: [20, 40]
  NOTHING_OF_THE_KIND: 3
DATASETS:
  NAMES: ('market1501')
"""
AUTOREID_TEXT = "MODEL: {model_name: Darts_normal}\nTRAIN: {w_lr: 0.05}\n"
SETTINGS_FILES = {
    "Baseline.txt": (STRONG_TEXT, {"family": "strong", "stem_relu": False}, "resnet50_ibn"),
    "params": ('{"tri_loss_params": {"margin": 0.4}, "epochs": 5}', {}, "tri_loss_params.margin"),
    "search.cfg": (AUTOREID_TEXT, {"data.name": "market1501"}, "search.optimizer.sgd.lr"),
}


@pytest.mark.parametrize("name", SETTINGS_FILES)
def test_settings_become_a_recipe(name, tmp_path, bench):
    text, told, words = SETTINGS_FILES[name]
    (tmp_path / name).write_text(text)
    made = bring_in(tmp_path / name, recipe="theirs", **told)
    assert made.kind == "recipe" and left(bench) == ["theirs.yaml"]
    assert words in str(made) + made.path.read_text()
    recipe = load_recipe("theirs")
    assert recipe.data.name == told.get("data.name", recipe.data.name)
    refused_keys = [line.key for line in made.account if line.status == "refused"]
    assert ("SOLVER.NOTHING_OF_THE_KIND" in refused_keys) == (name == "Baseline.txt")
    before = made.path.read_bytes()
    with refused("'theirs' is there already"):
        bring_in(tmp_path / name, recipe="theirs", **told)
    assert made.path.read_bytes() == before


BAD_SETTINGS = {
    "of nobody": ("w.yml", "layer: 3\n", {}, "of no project"),
    "of TransReID": (
        "w.yml",
        "MODEL: {TRANSFORMER_TYPE: vit}\nSOLVER: {}\n",
        {},
        "TransReID's family",
    ),
    "of fast-reid": ("w.yml", "MODEL: {META_ARCHITECTURE: Baseline}\n", {}, "fast-reid"),
    "empty": ("w.yml", "", {}, "w.yml holds no settings"),
    "a list": ("w.yaml", "- MODEL\n- SOLVER\n", {}, "w.yaml holds no settings"),
    "a word": ("w.json", '"MODEL"', {}, "w.json holds no settings"),
    "as Windows writes it": ("w.yml", STRONG_TEXT.encode("utf-16"), {}, "is UTF-16 text"),
    "no YAML": ("w.yml", "MODEL: {a: [}\n", {}, "is not YAML"),
    "no JSON": ("w.json", '{"epochs": }', {}, "is not JSON"),
    "twice": ("w.json", '{"epochs": 1, "epochs": 2}', {}, "stands twice"),
    "untold": ("w.yml", STRONG_TEXT, {}, "does not say family, stem_relu"),
    "too much told": ("w.yml", STRONG_TEXT, {"colour": 1}, "colour is nothing"),
    "a bad value": (
        "w.json",
        '{"epochs": 5, "model_params": {}}',
        {"train.epochs": -1},
        "train.epochs",
    ),
    "an odd name": ("§§.json", '{"model_params": {}}', {}, "makes no name"),
}


@pytest.mark.parametrize("kind", BAD_SETTINGS)
def test_settings_that_are_none(kind, tmp_path, bench):
    name, text, told, words = BAD_SETTINGS[kind]
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with refused(words):
        bring_in(tmp_path / name, **told)
    assert not left(bench)


def test_a_file_may_lie_at_home(tmp_path, bench, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "params.json").write_text('{"model_params": {}, "epochs": 5}')
    assert bring_in("~/params.json").name == "params"


TOLD_WRONG = {
    "photo": (256, "photo needs height and width, got 256"),
    "height": ("abc", "height needs a whole number from 0 to 4096, got 'abc'"),
    "stride": (0.5, "stride needs a whole number from 0 to 4096, got 0.5"),
    "width": (128, "height and width belong together"),
}


@pytest.mark.parametrize("name", TOLD_WRONG)
def test_a_size_that_is_told_wrongly_is_named(name):
    "Of both families that are told a size: CLIP's tower and the transformers."
    value, words = TOLD_WRONG[name]
    facts = {"patches": 128, "stem": "patch", "tower": "vit"}
    for photo in (photo_of, clip_photo):
        with refused(words):
            photo(facts, UNTOLD | {name: value})


@pytest.mark.parametrize("name", ["file", "run", "recipe", "family", "path", "root"])
def test_a_word_of_the_job_is_not_told_of_a_file(name):
    with refused(f"{name} is nothing that a file leaves open"):
        told_words(["-p", name, "q"])


def test_what_is_no_fault_of_the_file_is_not_laid_on_it(tmp_path):
    "A file of one project, a recipe that is wrong elsewhere: the words are about the recipe."
    seed_all(0)
    net = build_model({"timm": {"name": "test_vit"}}, n_pids=3, photo=(64, 32)).backbone.net
    torch.save(net.state_dict(), tmp_path / "w.pth")
    maps = {"timm": {"name": "test_vit", "weights": str(tmp_path / "w.pth")}}
    size = {"height": 64, "width": 32}
    with pytest.raises(ValueError, match="neck 'fblneck' looks at the maps") as wrong:
        build_network(
            validated("heir", {"data": size, "model": {"backbone": maps, "neck": "fblneck"}}), 3
        )
    assert "looks like a file" not in str(wrong.value)
    maps = {"solider_swin": {"weights": str(tmp_path / "w.pth")}}
    with refused("w.pth is a file of vision transformers", "the recipe's backbone is solider_swin"):
        build_network(validated("heir", {"data": size, "model": {"backbone": maps}}), 3)


def test_the_line_brings_in_and_says_what_it_did(good, tmp_path, bench, capsys):
    torch.save({"state_dict": good}, tmp_path / "osnet.pth.tar")
    size = ["-p", "data.height", "64", "--data.width=32"]
    assert main(["import", str(tmp_path / "osnet.pth.tar"), *size]) == 0
    assert "567 tensors loaded" in (said := capsys.readouterr().out), said
    assert (bench / "runs" / "osnet" / "checkpoints" / "best.pt").is_file()
    for more, words in {
        (): "run 'osnet' is there already",
        ("--run", "b", "-p", "colour", "red"): "colour is nothing",
        ("--run", "b", "--family", "lite"): "is no file of pytorch-reid-lite",
        ("--run", "b", "--family", "fastreid9"): "family of weights 'fastreid9'",
        ("--run", "../b"): "plain folder name",
        ("--run", "b", "--recipe", "nowhere"): "recipe 'nowhere' not found",
        ("--run", "b", "-p", "data.height", "-4"): "data.height",
    }.items():
        assert main(["import", str(tmp_path / "osnet.pth.tar"), *more]) == 1
        clear(capsys.readouterr().err, words)
    assert [path.name for path in (bench / "runs").iterdir()] == ["osnet"]
