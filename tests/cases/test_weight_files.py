"""A file of weights is read whatever wrapped it, or says in one line what it is instead."""

import warnings
import zipfile

import pytest
import torch
from test_bad_input import refused

from reidlab.core.seed import seed_all
from reidlab.interchange.baseline_weights import read_state
from reidlab.models.catalogue import build_model
from reidlab.models.cdnet import cdnet
from reidlab.models.weight_files import weights_of


def front(text, state):
    return {text + key: value for key, value in state.items()}


WRAPS = {
    "module.": lambda s: front("module.", s),
    "module.module.": lambda s: front("module.module.", s),
    "_orig_mod.": lambda s: front("_orig_mod.", s),
    "module._orig_mod.": lambda s: front("module._orig_mod.", s),
    "backbone.": lambda s: front("backbone.", s) | {"head.weight": torch.zeros(2)},
    "base.": lambda s: front("base.", s) | {"classifier.weight": torch.zeros(2)},
    "encoder.body._orig_mod.": lambda s: front("encoder.body._orig_mod.", s),
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "lightning": lambda s: {
        "state_dict": front("net.", s),
        "pytorch-lightning_version": "2",
        "callbacks": {},
    },
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}},
    "net": lambda s: {"net": s},
    "params": lambda s: {"params": s},
    "state_dict_ema": lambda s: {"state_dict_ema": s},
    "teacher": lambda s: {"teacher": front("module.backbone.", s), "student": {}},
    "nested": lambda s: {"checkpoint": {"model": {"state_dict": front("module.", s)}}},
    "averaged": lambda s: front("module.", s) | {"n_averaged": torch.tensor(3)},
    "beside": lambda s: s | {"epoch": 3, "arch": "net"},
    "half": lambda s: {"state_dict": {k: v.double() for k, v in s.items()}},
}


@pytest.fixture(scope="module")
def weights():
    "The weights of a backbone, drawn once."
    seed_all(5)
    return build_model(n_pids=3).backbone.state_dict()


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_backbone_is_found_in_every_wrapping(wrap, weights, tmp_path):
    torch.save(WRAPS[wrap](dict(weights)), tmp_path / "w.pth")
    net = build_model({"small_cnn": {"weights": str(tmp_path / "w.pth")}}, n_pids=3).backbone
    for key, value in net.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_the_old_way_of_saving_reads_too(weights, tmp_path):
    torch.save({"state_dict": weights}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    net = build_model({"small_cnn": {"weights": str(tmp_path / "w.pth")}}, n_pids=3).backbone
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())


def test_the_trained_network_comes_before_its_average(weights, tmp_path):
    other = {key: value + 1 for key, value in weights.items()}
    torch.save({"state_dict": weights, "state_dict_ema": other}, tmp_path / "w.pth")
    with pytest.warns(
        UserWarning, match="w.pth holds state_dict, state_dict_ema; state_dict is read"
    ):
        state = weights_of(tmp_path / "w.pth").state
    assert all(torch.equal(state[key], weights[key]) for key in weights)


def test_published_files_and_baselines_take_the_same_wrapping(tmp_path):
    seed_all(0)
    whole = cdnet(n_pids=3, width=0.25)
    torch.save({"net": front("module._orig_mod.", whole.backbone.state_dict())}, tmp_path / "b.pth")
    net = build_model({"cdnet": {"width": 0.25, "weights": str(tmp_path / "b.pth")}}, n_pids=3)
    assert torch.equal(
        net.backbone.state_dict()["stem.0.weight"], whole.backbone.state_dict()["stem.0.weight"]
    )
    state = {"model.conv1.weight": torch.ones(2), "classifier.weight": torch.zeros(2)}
    torch.save({"model": front("module.", state), "epoch": 9}, tmp_path / "lite.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_state(tmp_path / "lite.pth").keys() == state.keys()


def text(file):
    file.write_text("layer1.weight 0.1 0.2\n")


def page(file):
    file.write_text("<!DOCTYPE html>\n<html><title>404</title>")


def pointer(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 102502400\n")


def hollow(file):
    file.write_bytes(b"")


def archive(file):
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("readme.txt", "hello")


def half(file):
    torch.save({"conv1.weight": torch.zeros(9, 9)}, file)
    file.write_bytes(file.read_bytes()[:-200])


def half_of_the_old_kind(file):
    torch.save({"w": torch.zeros(99)}, file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:90])


def objects(file):
    torch.save(torch.nn.Linear(1, 1), file)


def infinite(file):
    torch.save({"state_dict": {"conv1.weight": torch.tensor([1.0, torch.inf])}}, file)


def several(file):
    torch.save({"net": {"a": torch.zeros(1)}, "model": {"a": torch.ones(1)}}, file)


def bare(file):
    torch.save(torch.zeros(3), file)


def settings_alone(file):
    torch.save({"epoch": 3, "lr": 0.1}, file)


def noise(file):
    file.write_bytes(bytes(range(256)) * 9)


def other(file):
    torch.save({"layer.weight": torch.zeros(3)}, file)


@pytest.mark.parametrize(
    "make, words",
    [
        (text, ("text", "Get it again")),
        (page, ("a page of text", "Get it again")),
        (pointer, ("Git LFS", "git lfs pull")),
        (hollow, ("empty", "Get it again")),
        (archive, ("no whole archive", "Get it again")),
        (half, ("no whole archive", "Get it again")),
        (half_of_the_old_kind, ("Get it again",)),
        (objects, ("whole Python objects", "state_dict()")),
        (infinite, ("conv1.weight is not finite", "Get the file again")),
        (several, ("several networks: net, model", "Save the one")),
        (bare, ("state dict", "holds Tensor", "torch.save")),
        (settings_alone, ("state dict", "holds epoch, lr", "torch.save")),
        (noise, ("something else", "Get it again")),
        (other, ("does not fit", "Name the backbone")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_file_of_weights_says_what_it_is(make, words, tmp_path):
    make(tmp_path / "w.pth")
    with refused("w.pth", *words):
        build_model({"small_cnn": {"weights": str(tmp_path / "w.pth")}}, n_pids=3)


def test_names_that_are_no_files(tmp_path):
    (tmp_path / "folder.pth").mkdir()
    with refused("folder.pth is a folder", "needed is a file"):
        build_model({"small_cnn": {"weights": str(tmp_path / "folder.pth")}}, n_pids=3)
    for name in ("n" * 300 + ".pth", "~nobody-here/w.pth", "nowhere.pth"):
        with refused("not found", "set weights to ''"):
            build_model({"small_cnn": {"weights": name}}, n_pids=3)
