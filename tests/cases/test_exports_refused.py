"""Exports that went wrong as exports do, each refused with its own reason, over one tiny run."""

import copy
import json
import shlex
import shutil
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reidlab import Embedder
from reidlab.core.recipe import Data, Evaluate, Model, Recipe, Synthetic, Train, load_recipe
from reidlab.core.run import open_run
from reidlab.data.loaders import open_test
from reidlab.deploy.contract import open_network
from reidlab.deploy.export import export_run
from reidlab.deploy.latency import latency_table
from reidlab.deploy.onnx import KEY, Deployed, OnnxNetwork, write_onnx
from reidlab.deploy.parity import (
    EXACT,
    LOOSE,
    Refused,
    both,
    check_export,
    gate_photos,
    pair_of,
    parity_of,
)
from reidlab.deploy.slips import first_apart
from reidlab.interchange.baseline_weights import baseline_key
from reidlab.jobs.export import COMPANION, usage
from reidlab.training.adopt import adopt
from reidlab.training.fit import fit_from_recipe
from reidlab.training.network import model_from_recipe

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
M, S = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))


def trained(home, name, seed=0, flip=True):
    "A run of drawn people at 32 by 16."
    few = Synthetic(train_pids=10, test_pids=6, cameras=3)
    look = {"height": 32, "width": 16, "mean": MEAN, "std": STD}
    about = Data(synthetic=few, **look, sampler={"pk": {"p": 4, "k": 4}})
    rules = Evaluate(flip=flip)
    rate = Train(epochs=2, validate_every=1, ema=0.5)
    recipe = Recipe(name="t", seed=seed, data=about, train=rate, evaluate=rules)
    data = open_test(about, home)
    run = open_run(name, recipe, verb="train", data=data.fingerprint, root=home)
    fit_from_recipe(recipe, run.path, workers=0, data_dir=home)
    return run


@pytest.fixture(scope="module")
def tiny():
    "A run, its network and an export that is right."
    home = Path(tempfile.mkdtemp())
    run, other = trained(home, "mine"), trained(home, "another", seed=1)
    model, contract = open_network(run.path)
    good = write_onnx(model, contract, home / "good.onnx")
    theirs, _ = open_network(other.path)
    return SimpleNamespace(
        home=home, run=run, model=model, contract=contract, good=good, theirs=theirs
    )


class Around(nn.Module):
    "The right network with something wrong before it or after it."

    def __init__(self, t, before=lambda x: x, after=lambda x: x, model=None, flip=True):
        super().__init__()
        rules = replace(t.contract, flip=flip)
        self.inner, self.before, self.after = Deployed(model or t.model, rules), before, after

    def forward(self, images):
        return self.after(self.inner(self.before(images)))


class Learning(nn.Module):
    "A batch norm that was written down as it learns."

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x):
        axes = [0, *range(2, x.ndim)]
        mean, square = x.mean(axes, keepdim=True), (x * x).mean(axes, keepdim=True)
        scale, shift = (p.view(1, -1, *[1] * (x.ndim - 2)) for p in (self.weight, self.bias))
        return (x - mean) / (square - mean * mean + self.eps).sqrt() * scale + shift


def learning(t):
    "The network in training mode but for its head."
    model = copy.deepcopy(t.model)
    for name, part in [*model.named_modules()]:
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            home = model.get_submodule(name.rpartition(".")[0])
            setattr(home, name.rpartition(".")[2], Learning(part))
    return Around(t, model=model)


def before(f):
    return lambda t: Around(t, before=f)


def after(f):
    return lambda t: Around(t, after=f)


def plain(x):  # numbers in 0…1 out of normalised ones
    return x * S + M


ORDER = torch.arange(256).roll(64)  # as if its parts had been joined in another order


IM, IS = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
BY_HAND = {  # what was written wrongly, in which form, and what is said of it
    "normalised twice": (before(lambda x: (x - M) / S), {}, "normalises photos twice"),
    "twice, as bytes": (before(lambda x: (x / 255 - M) / S), {}, "the second time as bytes"),
    "BGR": (before(lambda x: (plain(x).flip(1) - M) / S), {}, "order blue, green, red"),
    "BGR late": (before(lambda x: x.flip(1)), {}, "turned after the mean was taken off"),
    "another size": (after(lambda f: f), {"size": (48, 16)}, "another size, [3, 48, 16] where"),
    "training mode": (learning, {}, "it was written in training mode"),
    "dropout": (
        after(lambda f: f * (torch.rand_like(f) > 0.5)),
        {},
        "other vectors each time: it was written in training mode",
    ),
    "batch of 1": (after(lambda f: f), {"free": False}, "it takes 1 photos at once and no others"),
    "batch of 1 inside": (after(lambda f: f.reshape(1, 256)), {}, "it takes no batch of 2 ("),
    "one row for all": (after(lambda f: f.reshape(1, -1)), {}, "it gives [1, 512] for 2 photos"),
    "first photo for all": (
        after(lambda f: f[:1] + 0 * f),
        {},
        "right for one photo and wrong for several",
    ),
    "transposed": (after(lambda f: f), {"size": (16, 32)}, "photos transposed, [3, 16, 32] where"),
    "colours last": (
        before(lambda x: x.permute(0, 3, 1, 2)),
        {"shape": (1, 32, 16, 3)},
        "photos transposed, colours last",
    ),
    "grey": (
        before(lambda x: x.expand(-1, 3, -1, -1)),
        {"shape": (1, 1, 32, 16)},
        "other colours than three",
    ),
    "another run": (lambda t: Around(t, model=t.theirs), {}, "Are these the weights of this run?"),
    "no mirror image": (lambda t: Around(t, flip=False), {}, "it adds no mirror image"),
    "never normalised": (before(plain), {}, "it does not normalise"),
    "numbers of 0…255": (before(lambda x: plain(x) * 255), {}, "takes numbers of 0…255"),
    "no deviation": (before(lambda x: x * S), {}, "does not divide by the deviation"),
    "no mean": (before(lambda x: x + M / S), {}, "takes no mean off"),
    "−1…1": (before(lambda x: plain(x) * 2 - 1), {}, "it normalises to −1…1"),
    "ImageNet's": (before(lambda x: (plain(x) - IM) / IS), {}, "by ImageNet's mean and deviation"),
    "upside down": (before(lambda x: x.flip(2)), {}, "photos upside down"),
    "too long": (after(lambda f: f * 3), {}, "its vectors are not brought to length 1"),
    "other order": (after(lambda f: f[:, ORDER]), {}, "its numbers stand in another order"),
    "before the neck": (
        lambda t: Around(t, model=nn.Sequential(t.model.backbone, t.model.pool)),
        {},
        "it gives what comes out of pool, not the embedding",
    ),
    "classes": (
        lambda t: Around(t, model=nn.Sequential(t.model, t.model.head.classifier)),
        {},
        "as many as head.classifier has classes, and the embedding has 256",
    ),
    "half of it": (after(lambda f: f[:, :128]), {}, "it gives 128 numbers a photo, and the embed"),
    "no numbers": (after(lambda f: f / (f - f)), {}, "it gives what is no number"),
}


def written(t, network, size=(32, 16), shape=None, free=True):
    "A file of torch's older exporter, as scripts on the web have it."
    path = t.home / "hand.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            (torch.randn(shape or (1, 3, *size), generator=torch.Generator().manual_seed(0)),),
            path,
            dynamo=False,
            input_names=["images"],
            output_names=["embedding"],
            dynamic_axes={"images": {0: "batch"}, "embedding": {0: "batch"}} if free else None,
        )
    t.model.eval()
    return path


@pytest.mark.parametrize("slip", BY_HAND)
def test_a_wrong_export_is_refused_with_its_reason(slip, tiny):
    wrong, form, words = BY_HAND[slip]
    path = written(tiny, wrong(tiny), **form)
    with pytest.raises(Refused, match="is not run 'mine'") as said:
        check_export(path, tiny.run.path, data_dir=tiny.home)
    assert words in str(said.value)


def test_a_right_export_passes_whoever_wrote_it(tiny):
    for path in (tiny.good, written(tiny, Around(tiny))):
        found = check_export(path, tiny.run.path, data_dir=tiny.home)
        assert found.difference < 1e-5 and found.lists == 1 and found.photos == found.of


def rarely_nothing(t):
    "The right network, which gives no number for a photo or two that the first look does not see."
    query, gallery, _ = gate_photos(t.run.recipe, t.home)
    pair = pair_of(t.good, t.run, "", gallery)
    most = float(pair.ours()[:, 0].max())
    found = torch.cat([both(pair, side)[0][:, 0] for side in (query, gallery)])
    bound = max(most, float(found.sort().values[-3])) + 1e-6
    assert (found > bound).any()
    return Around(t, after=lambda f: f + (f[:, :1] > bound).float() * 1e38 * 1e38)


@pytest.mark.parametrize("allowed", [EXACT, LOOSE])
def test_a_file_that_gives_no_number_for_some_photos_is_refused_by_name(allowed, tiny):
    path = written(tiny, rarely_nothing(tiny))
    words = r"hand.onnx is not run 'mine': .* \(NaN or infinite\) for [12] of \d+ photos"
    with pytest.raises(Refused, match=words):
        check_export(path, tiny.run.path, data_dir=tiny.home, allowed=allowed)


@pytest.mark.parametrize("name", ["a_run", "weights.pt", "net.tflite"])
def test_what_is_no_exported_file_is_said_to_be_none(name, tiny):
    words = f"{name} is no exported file: those end in .onnx or .xml"
    with pytest.raises(ValueError, match=words):
        check_export(tiny.home / name, tiny.run.path, data_dir=tiny.home)
    table = latency_table(tiny.run.path, {"x": str(tiny.home / name)}, batches=[1], threads=[1])
    assert words in table.set_index("runtime")["note"]["x"]


def noted(t, name, notes=None, weights=None):
    "The right export with other notes, or with other weights."
    loaded = onnx.load(t.good)
    for note in loaded.metadata_props:
        note.value = (notes or {}).get(note.key, note.value)
    for weight in loaded.graph.initializer:
        if weights and weight.name.endswith(weights):
            changed = np.frombuffer(weight.raw_data, np.float32) * np.float32(1.2)
            weight.raw_data = changed.tobytes()
    onnx.save(loaded, t.home / name)
    return t.home / name


NOTES = {  # rules that a file carries, and what is said of them
    "another run": ({"run": "x"}, "run is 'x', not 'mine'"),
    "other weights": ({"run": "x", "weights": "0" * 64}, "made of other weights: run 'x', best.pt"),
    "other mean": ({"mean": (0.1, 0.1, 0.1)}, "mean is (0.1, 0.1, 0.1), not (0.5, 0.4, 0.3)"),
    "interpolation": ({"interpolation": "bicubic"}, "interpolation is 'bicubic', not 'bilinear'"),
    "no mirror image": ({"flip": False}, "flip is False, not True"),
    "size": ({"height": 48}, "height is 48, not 32"),
}


@pytest.mark.parametrize("rule", NOTES)
def test_notes_of_another_network_are_refused(rule, tiny):
    change, words = NOTES[rule]
    path = noted(tiny, "noted.onnx", notes={KEY: replace(tiny.contract, **change).to_json()})
    with pytest.raises(Refused, match="is not run 'mine'") as said:
        check_export(path, tiny.run.path, data_dir=tiny.home)
    assert words in str(said.value)


@pytest.mark.parametrize("layer", ["stem.0.weight", "layer2.1.0.weight", "layer3.1.0.weight"])
def test_the_first_layer_that_differs_is_named(layer, tiny):
    path = noted(tiny, "heavier.onnx", weights=layer)
    with pytest.raises(Refused, match="the first layer that differs is") as said:
        check_export(path, tiny.run.path, data_dir=tiny.home)
    assert layer.rpartition(".")[0].removesuffix(".0") in str(said.value)
    assert "the weights of this run?" in str(said.value)


def test_fewer_bits_are_bounded_by_what_they_lose_and_slips_are_seen_all_the_same(tiny):
    path = written(tiny, Around(tiny, after=lambda f: F.normalize((f * 16).round())))
    with pytest.raises(Refused):
        check_export(path, tiny.run.path, data_dir=tiny.home)
    found = check_export(path, tiny.run.path, data_dir=tiny.home, allowed=LOOSE._replace(loss=99))
    assert found.difference > 1e-3
    path = written(tiny, Around(tiny, before=lambda x: x.flip(1)))
    with pytest.raises(Refused, match="blue, green, red"):
        check_export(path, tiny.run.path, data_dir=tiny.home, allowed=LOOSE._replace(loss=99))


def test_layers_of_a_right_export_agree(tiny):
    gallery = open_test(tiny.run.recipe.data, tiny.home).gallery
    pair = pair_of(OnnxNetwork(tiny.good), tiny.run, "", gallery)
    assert "every layer agrees" in first_apart(pair)


@pytest.mark.parametrize(
    "change",
    [
        {"mean": (float("nan"), 0.4, 0.3)},
        {"std": (0.2, 0.0, 0.3)},
        {"std": (0.2, -0.2, 0.3)},
        {"std": (0.2, float("inf"), 0.3)},
        {"mean": (0.5,)},
        {"height": 0},
        {"width": 16.5},
        {"dim": "many"},
        {"batch_size": True},
    ],
    ids=str,
)
def test_notes_by_which_no_photo_is_made_ready_are_refused(change, tiny):
    path = noted(tiny, "noted.onnx", notes={KEY: replace(tiny.contract, **change).to_json()})
    name = next(iter(change))
    with pytest.raises(ValueError, match=rf"noted.onnx holds no rules of a network \({name} is "):
        Embedder(path)


def test_what_is_neither_run_nor_export_is_named_and_so_is_a_photo(tiny):
    inside = [tiny.run.path / "checkpoints", *tiny.run.path.glob("checkpoints/*.pt")]
    assert len(inside) > 1
    for other in [*inside, tiny.run.path / "recipe.yaml", tiny.home, "here/nobody"]:
        with pytest.raises(ValueError, match=r"is no run. Give a run's name, its folder .* \.xml"):
            Embedder(other)
    knows, torn = Embedder(tiny.good), tiny.home / "torn.jpg"
    torn.write_bytes(b"no photo")
    with pytest.raises(ValueError, match=r"torn.jpg cannot be read .* or leave it out\.$"):
        knows.embed(torn)
    with pytest.raises(FileNotFoundError, match=r"gone.jpg is not there. Look at its path; if it"):
        knows.embed(tiny.home / "gone.jpg")
    for form, ending in (("onnx", ".onnx"), ("openvino", ".xml")):
        with pytest.raises(ValueError, match=r"torn.jpg is a file, no folder to write x"):
            export_run(tiny.run.path, form, out=torn / "deeper" / f"x{ending}")


@pytest.fixture
def at_home(tiny, monkeypatch):
    "The run whose photos the settings find; its graph is not traced anew."
    monkeypatch.setenv("REIDLAB_DATA_DIR", str(tiny.home))
    graph = {"good": tiny.good}
    put = lambda model, contract, path, *more: Path(shutil.copyfile(graph["good"], path))
    monkeypatch.setattr("reidlab.deploy.export.write_onnx", put)
    return SimpleNamespace(**vars(tiny), graph=graph, place=tiny.run.path / "export/mine.onnx")


def test_an_export_is_put_in_place_with_its_figures_and_a_refused_one_leaves_it(at_home):
    left = at_home.place.with_name(".mine.onnx.999999.part")
    (left / "steps").mkdir(parents=True)  # of a process that was killed
    (left / "mine.onnx").write_bytes(b"half")
    done = export_run(at_home.run.path)
    assert done.path == at_home.place and [p.name for p in done.path.parent.iterdir()] == [
        "mine.onnx"
    ]
    assert parity_of(OnnxNetwork(done.path)) == done.parity and done.bytes > 1e5
    kept = done.path.read_bytes()
    at_home.graph["good"] = noted(at_home, "worse.onnx", weights="layer3.1.0.weight")
    with pytest.raises(Refused, match=r"layer that differs is backbone\.layer3"):
        export_run(at_home.run.path)
    assert done.path.read_bytes() == kept
    assert [p.name for p in done.path.parent.iterdir()] == ["mine.onnx"]
    with pytest.raises(Refused):
        export_run(at_home.run.path, out=at_home.home / "new" / "x.onnx")
    assert not [*(at_home.home / "new").iterdir()]


def test_a_killed_export_leaves_the_file_that_was_there(at_home, monkeypatch):
    export_run(at_home.run.path)
    kept = at_home.place.read_bytes()

    def killed(*given, **more):
        raise KeyboardInterrupt

    for step in ("check_export", "_move"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"reidlab.deploy.export.{step}", killed)
            export_run(at_home.run.path)
        assert at_home.place.read_bytes() == kept
        assert [p.name for p in at_home.place.parent.iterdir()] == ["mine.onnx"]


def test_runs_of_which_there_is_no_export(at_home, monkeypatch):
    begun = open_run("begun", at_home.run.recipe, verb="train", data="0" * 64, root=at_home.home)
    with pytest.raises(ValueError, match="run 'begun' is new, not finished"):
        export_run(begun.path)
    named = load_recipe("shapes")
    classes = open_run("names", named, verb="train", data="0" * 64, root=at_home.home)
    classes.finish({"top1": 0.5}, dataset="shapes")
    with pytest.raises(ValueError, match="run 'names' names classes; an export is an embedding"):
        export_run(classes.path)
    monkeypatch.setenv("REIDLAB_DATA_DIR", str(at_home.home / "elsewhere"))
    monkeypatch.setattr("reidlab.data.loaders.prepare_synthetic", no_photos)
    with pytest.raises(ValueError, match="compared with its run on photos of synthetic"):
        export_run(at_home.run.path)


def no_photos(*given, **more):
    raise FileNotFoundError("no such folder.")


@pytest.mark.slow
def test_a_network_of_another_project_leaves_as_a_file(tiny, monkeypatch):
    "Brought in by its weights, taken out by the same gate."
    monkeypatch.setenv("REIDLAB_DATA_DIR", str(tiny.home))
    small = Recipe(name="r", model=Model(backbone={"resnet18": {"stem_relu": False}}))
    source = model_from_recipe(small, 7).eval()
    state = {f"module.{baseline_key(k, 'strong')}": v for k, v in source.state_dict().items()}
    torch.save(state, tiny.home / "resnet18_model_120.pth")
    told = {"stem_relu": False, "last_stride": 1, "pool": "avg"}
    whose = Recipe(name="whose", data=tiny.run.recipe.data)
    run, _ = adopt(tiny.home / "resnet18_model_120.pth", whose, "bag", root=tiny.home, **told)
    assert export_run(run.path).parity.beyond() == []


@pytest.mark.parametrize("name", ["plain", "my runs", "it's", 'a "b" $c'])
def test_what_is_said_of_using_a_file_can_be_typed_wherever_it_lies(name, tmp_path):
    (tmp_path / name).mkdir()
    file, script = tmp_path / name / "x.onnx", tmp_path / name / COMPANION
    script.touch()
    lines = usage(SimpleNamespace(path=file)).split("\n")
    (opened,) = (line for line in lines if line.startswith("embedder = Embedder("))
    assert json.loads(opened.removeprefix("embedder = Embedder(")[:-1]) == str(file)
    (typed,) = (line for line in lines if line.startswith("python "))
    assert shlex.split(typed)[1:3] == [str(script), str(file)]
