"""A trained run leaves as a file that other tools read: whole, to the bit, over nothing, or refused in one line."""

import importlib
import json
import os
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import from_facts, laboratory, tiny_recipe
from safetensors import safe_open

from reidlab.core.run import open_run
from reidlab.data.loaders import open_data
from reidlab.interchange.baseline_weights import (
    baseline_facts,
    baseline_parts,
    load_baseline,
    read_state,
)
from reidlab.interchange.families import foreign_network, read_foreign
from reidlab.interchange.weights_out import check_form, outward, timm_call, write_weights
from reidlab.jobs.command import main
from reidlab.jobs.weights import export_weights
from reidlab.models.catalogue import build_model
from reidlab.models.weight_files import weights_of
from reidlab.training.fit import fit_from_recipe
from reidlab.training.trained import load_model

OSNET = {
    "model.backbone": {"osnet_published": {"width": 0.25}},
    "model.neck": "fc",
    "train.epochs": 1,
}


def same(one, other):
    "Whether two state dicts are equal in names, order and bits."
    return list(one) == list(other) and all(torch.equal(v, other[k]) for k, v in one.items())


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    "A laboratory with a trained OSNet, run 'omni'."
    with pytest.MonkeyPatch.context() as patch:
        lab = laboratory(tmp_path_factory.mktemp("lab"), patch)
        recipe = tiny_recipe(**{k.replace(".", "__"): v for k, v in OSNET.items()})
        data = open_data(recipe.data, recipe.seed, photos)
        run = open_run("omni", recipe, verb="train", data=data.fingerprint)
        fit_from_recipe(recipe, run.path, workers=0, data_dir=photos)
        yield lab


def package():
    "The folder of pyppbox-torchreid, installed or beside; a test that needs it is skipped without."
    place = os.environ.get("PYPPBOX_TORCHREID", "")
    spec = None if place else find_spec("pyppbox_torchreid")
    found = Path(place) / "pyppbox_torchreid" if place else spec and Path(spec.origin).parent
    if not found or not found.is_dir():
        pytest.skip(
            "needs pyppbox-torchreid 1.4.1.0, without its dependencies, at PYPPBOX_TORCHREID"
        )
    return found


def their_network(name, n_pids, patch):
    "A network by pyppbox-torchreid's own code; the package's front, which imports a lot, is passed by."
    for module, folder in (("pyppbox_torchreid", ""), ("pyppbox_torchreid.models", "models")):
        empty = types.ModuleType(module)
        empty.__path__ = [str(package() / folder)]
        patch.setitem(sys.modules, module, empty)
    code = importlib.import_module(
        f"pyppbox_torchreid.models.osnet{'_ain' if '_ain_' in name else ''}"
    )
    return getattr(code, name)(num_classes=n_pids, pretrained=False)


def test_a_trained_run_is_loaded_by_pyppbox_torchreid(trained, tmp_path, monkeypatch, capsys):
    assert not main(
        ["weights", "export", "omni", "--as", "torchreid", "--out", f"{tmp_path}/o.pth"]
    )
    said = capsys.readouterr().out
    assert "567 tensors" in said and "size 64×32" in said
    model, content = load_model(trained.runs / "omni")
    theirs = their_network("osnet_x0_25", content["architecture"]["n_pids"], monkeypatch).eval()
    theirs.load_state_dict(torch.load(tmp_path / "o.pth", weights_only=True), strict=True)
    images = torch.randn(3, 3, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), model(images), rtol=1e-5, atol=1e-5)
        assert model(images).abs().max() > 0


@pytest.mark.parametrize("name", ["osnet_x0_25", "osnet_ibn_x1_0", "osnet_ain_x0_25"])
def test_their_file_is_ours_and_goes_back_to_the_bit(name, tmp_path, monkeypatch):
    theirs = their_network(name, 6, monkeypatch).eval()
    wrapped = {"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}, "epoch": 3}
    torch.save(wrapped, tmp_path / "model.pth.tar-3")
    state = read_state(tmp_path / "model.pth.tar-3")
    model = build_model(**baseline_parts(baseline_facts(state)), n_pids=6).eval()
    assert not load_baseline(model, state, "torchreid").fresh
    assert same(outward(model, "torchreid").tensors, theirs.state_dict())
    images = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), model(images), rtol=1e-5, atol=1e-5)


def test_a_run_comes_back_to_the_bit(trained, tmp_path):
    model, content = load_model(trained.runs / "omni")
    made = export_weights("omni", "torchreid", tmp_path / "omni.pth")
    state = read_state(made.path)
    back = build_model(
        **baseline_parts(baseline_facts(state)), n_pids=content["architecture"]["n_pids"]
    )
    report = load_baseline(back, state, "torchreid")
    assert not report.left and not report.fresh and not made.left
    assert same(back.state_dict(), model.state_dict())
    made = export_weights("omni")
    assert made.path == trained.runs / "omni" / "weights" / "safetensors_omni.safetensors"
    with safe_open(made.path, "pt") as file:
        there = {key: file.get_tensor(key) for key in model.state_dict()}
        header = file.metadata()
        assert len(file.keys()) == len(there)
    assert same(there, model.state_dict())
    assert json.loads(header["architecture"]) == content["architecture"]
    assert json.loads(header["mean"]) == content["architecture"]["mean"]
    assert header["run"] == "omni" and len(header["recipe"]) == 64 and header["commit"]
    assert export_weights("omni", out=tmp_path / "last.safetensors", checkpoint="last").tensors


REFUSED = {
    "another neck": ("torchreid", {"neck": "bnneck"}, "neck fc; this one has neck bnneck"),
    "another pool": ("torchreid", {"neck": "fc", "pool": "max"}, "this one has pool max"),
    "another width": ("torchreid", {"neck": "fc", "embedding": 64}, "this one has embedding 64"),
    "cosines": ("torchreid", {"neck": "fc", "head": "cosine"}, "this one has head cosine"),
    "another network": ("torchreid", {"backbone": "small_cnn"}, "this one has backbone small_cnn"),
    "cdnet's form": ("torchreid", {"backbone": "osnet"}, "this one has backbone osnet"),
    "stripes": (
        "strong",
        {"backbone": "resnet18", "head": "pcb", "embedding": 4},
        "this one has head pcb",
    ),
    "no resnet": (
        "lite",
        {"backbone": "small_cnn", "neck": "bn"},
        "resnet50_ibn; this one has backbone small_cnn",
    ),
    "none of timm's": ("timm", {"backbone": "small_cnn"}, "this one has backbone small_cnn"),
    "a bare stem": ("timm", {"backbone": "resnet18", "stem_relu": False}, "has stem_relu False"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_a_form_cannot_hold_is_named(why):
    form, parts, told = REFUSED[why]
    usual = {"backbone": "osnet_published", "width": 0.25} if "backbone" not in parts else {}
    with pytest.raises(ValueError, match=told) as wrong:
        outward(from_facts(**usual, **parts, n_pids=3), form)
    assert "\n" not in str(wrong.value)


@pytest.mark.parametrize("form", ["strong", "lite"])
@pytest.mark.parametrize("backbone", ["resnet_fastreid", "resnet50_middle"])
def test_a_resnet_with_another_stem_or_map_is_no_file_of_a_baseline(form, backbone):
    "Names and shapes are the same, what it sees is not: nothing else would tell its reader."
    facts = {"backbone": backbone, "pool": "avg", "head": "linear"}
    with pytest.raises(ValueError, match=f"this one has backbone {backbone}"):
        check_form(form, facts | {"neck": {"strong": "bnneck", "lite": "bn"}[form]})


def test_a_place_may_begin_at_home(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert export_weights("omni", out="~/mine.safetensors").path == tmp_path / "mine.safetensors"
    with pytest.raises(ValueError, match=r"already\. Name another file"):
        export_weights("omni", out="~/mine.safetensors")


def test_nothing_is_written_over_and_nothing_is_left(trained, tmp_path, monkeypatch):
    taken = tmp_path / "taken.pth"
    taken.write_bytes(b"somebody's")
    (tmp_path / "link.pth").symlink_to("nowhere")
    for place in ("taken.pth", "link.pth"):
        with pytest.raises(ValueError, match=r"already\. Name another file"):
            export_weights("omni", "torchreid", tmp_path / place)
    with pytest.raises(ValueError, match=r"a file of torchreid ends in \.pth or"):
        export_weights("omni", "torchreid", tmp_path / "omni.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint first\.pt"):
        export_weights("omni", out=tmp_path / "omni.safetensors", checkpoint="first")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(ValueError, match=r"Try: pip install \"reidlab\[timm\]\""):
            export_weights("omni", out=tmp_path / "omni.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
        with pytest.raises(OSError, match="disk is full"):
            export_weights("omni", "torchreid", tmp_path / "omni.pth")
    assert sorted(os.listdir(tmp_path)) == ["link.pth", "taken.pth"]
    assert taken.read_bytes() == b"somebody's"


def test_timm_reads_the_backbone_of_a_resnet(tmp_path):
    timm = pytest.importorskip("timm", reason="needs timm: pip install reidlab[timm]")
    model = from_facts(backbone="resnet18", last_stride=2, n_pids=3).eval()
    images = torch.randn(2, 3, 64, 32)
    for ending in (".pth", ".safetensors"):
        gone = outward(model, "timm")
        path = write_weights(tmp_path / f"r18{ending}", "timm", gone.tensors)
        assert weights_of(path).state.keys() == gone.tensors.keys()
        assert all(torch.equal(v, gone.tensors[k]) for k, v in weights_of(path).state.items())
        overlay = {"file": str(path)}
        there = timm.create_model(
            "resnet18", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0
        )
        assert same(there.state_dict(), model.backbone.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(
                there.eval()(images), model.backbone(images).mean((2, 3)), rtol=1e-5, atol=1e-5
            )


slow = pytest.mark.slow
NETWORKS = [
    ("vit_tiny_patch16_224", (64, 32)),
    ("mobilenetv3_small_050", (64, 32)),
    pytest.param("convnext_atto", (64, 32), marks=slow),
    pytest.param("swin_tiny_patch4_window7_224", (64, 32), marks=slow),
    pytest.param("vit_small_patch14_reg4_dinov2", (56, 28), marks=slow),
    pytest.param("eva02_tiny_patch14_224", (56, 28), marks=slow),
]


@pytest.mark.parametrize(("name", "size"), NETWORKS)
def test_timm_reads_its_own_by_the_call_that_is_told(name, size, tmp_path):
    timm = pytest.importorskip("timm", reason="needs timm: pip install reidlab[timm]")
    model = build_model({"timm": {"name": name}}, neck="bnneck", n_pids=3, photo=size).eval()
    gone = outward(model, "timm")
    path = write_weights(tmp_path / "net.safetensors", "timm", gone.tensors)
    call = timm_call(model, path)
    there = eval(call, {"timm": timm}).eval()
    own = there.state_dict()
    assert ("forward_features" in call) == (len(own) > len(gone.tensors))
    assert all(torch.equal(own[key], value) for key, value in gone.tensors.items())
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected = model.backbone.net.forward_features(images)
        assert torch.equal(there.forward_features(images), expected)
    back = build_model(
        {"timm": {"name": name, "weights": str(path)}}, neck="bnneck", n_pids=3, photo=size
    )
    assert same(back.backbone.state_dict(), model.backbone.state_dict())


def test_a_file_of_torchs_own_onnx_exporter_is_read(tmp_path, monkeypatch):
    pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
    theirs, images = their_network("osnet_x0_25", 6, monkeypatch).eval(), torch.randn(1, 3, 64, 32)
    place = str(tmp_path / "osnet.onnx")
    torch.onnx.export(theirs, (images,), place, opset_version=11, dynamo=False)
    model, report = foreign_network(read_foreign(place))  # its equal biases are kept once
    assert not report.left and model.eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), model(images), rtol=1e-4, atol=1e-5)
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "osnet.onnx").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut\.onnx is no whole ONNX file"):
        read_state(tmp_path / "cut.onnx")


def test_onnx_without_its_package_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "o.onnx").write_bytes(b"\x08\x06")
    with pytest.raises(ValueError, match=r"a package of its own: pip install onnx$"):
        read_state(tmp_path / "o.onnx")
