"""How fast a network answers may be left to the clock; what it answers says how it was run."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from reidlab import Embedder
from reidlab.core.files import read_json
from reidlab.core.recipe import Data, Evaluate, Model, Recipe, Synthetic, Train
from reidlab.core.run import RunFolder, open_run
from reidlab.data.loaders import open_test
from reidlab.data.transforms import normalise, read_photo
from reidlab.deploy import engine
from reidlab.deploy.latency import rules_of
from reidlab.evaluation.embed import embed
from reidlab.evaluation.embeddings import load_embeddings
from reidlab.evaluation.evaluate_run import evaluate_run
from reidlab.evaluation.validators import validator
from reidlab.training import trained
from reidlab.training.fit import fit_from_recipe
from reidlab.training.network import model_from_recipe
from reidlab.training.pace import Choice, Pace

HALF = Pace("bf16", "nhwc")
BOUND = 2e-2  # of a number of a vector of length 1: bf16 keeps eight bits
AUTO = {"precision": "auto", "layout": "auto"}


@pytest.fixture
def asked(monkeypatch, tmp_path):
    "The clock answers bf16 nhwc at once; every question is noted."
    monkeypatch.setenv("REIDLAB_CACHE_DIR", str(tmp_path / "cache"))
    questions = []

    def answer(steps, device):
        for step in steps.values():
            step()
        questions.append([str(pace) for pace in steps])
        return Choice(HALF, {str(pace): 1.0 for pace in steps}, "by hand")

    monkeypatch.setattr(trained, "choose", answer)
    return questions


def of(rules, epochs=1, **more):
    few = Synthetic(train_pids=10, test_pids=4, cameras=3)
    about = {"height": 32, "width": 16, "sampler": {"pk": {"p": 4, "k": 2}}, "val_fraction": 0.4}
    look, model = Data(synthetic=few, **about), Model()
    rules = Evaluate(batch_size=16, baselines=False, **rules)
    return Recipe(
        name="t", data=look, model=model, train=Train(epochs=epochs, **more), evaluate=rules
    )


def trained_on(recipe, root, name="t", judge=True):
    data = open_test(recipe.data, root)
    run = open_run(name, recipe, verb="train", data=data.fingerprint, root=root)
    validate = validator(recipe.train) if judge else None
    fit_from_recipe(recipe, run.path, validate=validate, workers=0, data_dir=root)
    return run


def weights(run, which="last"):
    content = torch.load(run.path / f"checkpoints/{which}.pt", weights_only=True)
    return content["model"]


def unit(run):
    kept = load_embeddings(run.path / "evaluate/synthetic/embeddings.npz")
    return torch.nn.functional.normalize(torch.from_numpy(kept.g_feats))


def test_features_of_another_pace_are_never_taken(tmp_path, asked):
    run = trained_on(of({}), tmp_path, judge=False)
    about = {"workers": 0, "data_dir": tmp_path}
    plain, seen = evaluate_run(run.path, **about), unit(run)
    features = run.path / "evaluate/synthetic/features.json"
    assert plain["protocol"]["pace"] == "" and "pace" not in read_json(features)
    told = {"evaluate.precision": "bf16", "evaluate.layout": "nhwc"}
    half, other = evaluate_run(run.path, overrides=told, **about), unit(run)
    assert half["protocol"]["pace"] == read_json(features)["pace"] == "bf16 nhwc"
    assert half["rules"]["precision"] == "bf16" and half["protocol"]["times_opened"] == 2
    assert not other.equal(seen) and (other - seen).abs().max() < BOUND
    metric = {
        "evaluate.metric": "cosine"
    }  # another ranking of features that would have to be plain
    assert evaluate_run(run.path, overrides=metric, **about)["protocol"]["pace"] == ""
    assert unit(run).equal(seen)
    assert evaluate_run(run.path, overrides=told | metric, **about)["protocol"]["pace"]
    assert unit(run).equal(other) and not asked


def test_an_evaluation_asks_the_clock_once(tmp_path, asked):
    run = trained_on(of(AUTO), tmp_path, judge=False)
    found = evaluate_run(run.path, workers=0, data_dir=tmp_path)
    assert (found["rules"]["precision"], found["rules"]["layout"]) == ("bf16", "nhwc")
    assert evaluate_run(run.path, workers=0, data_dir=tmp_path) == found
    assert [len(paces) for paces in asked] == [4]
    kept = load_embeddings(run.path / "evaluate/synthetic/embeddings.npz")
    photos = [open_test(run.recipe.data, tmp_path).manifest.root / path for path in kept.g_paths]
    embedder = Embedder(run.path)
    assert (embedder.embed(photos) == kept.g_feats).all() and "bf16 nhwc" in repr(embedder)
    (event,) = run.events("pace")
    assert event["kind"] == "embed" and len(asked) == 1


def test_a_training_judged_at_another_pace_learns_the_same(tmp_path, asked):
    plain = trained_on(of({}, 2), tmp_path, "plain")
    half = trained_on(of(AUTO, 2), tmp_path, "half")
    mine, theirs = weights(half), weights(plain)
    assert all(mine[k].equal(v) for k, v in theirs.items()) and len(asked) == 1
    scores = [[e["val_mAP"] for e in run.events("epoch")] for run in (plain, half)]
    assert scores[0] == pytest.approx(scores[1], abs=0.1)
    assert [e["pace"] for e in half.events("pace")] == [HALF._asdict()]


def test_a_continued_training_is_judged_as_it_began(tmp_path, asked, monkeypatch):
    whole = trained_on(of(AUTO, 2), tmp_path, "whole")
    recipe = of(AUTO, 2)
    data = open_test(recipe.data, tmp_path)
    run = open_run("cut", recipe, verb="train", data=data.fingerprint, root=tmp_path)
    judge, seen = validator(recipe.train), []

    def dies(model, recipe, **about):
        seen.append(recipe.evaluate.precision)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return judge(model, recipe=recipe, **about)

    with pytest.raises(KeyboardInterrupt):
        fit_from_recipe(recipe, run.path, validate=dies, workers=0, data_dir=tmp_path)
    (tmp_path / "cache").rename(tmp_path / "elsewhere")  # another machine, which likes fp32 better
    other = lambda steps, device: Choice(Pace(), {"fp32": 1.0}, "by hand")
    monkeypatch.setattr(trained, "choose", other)
    fit_from_recipe(recipe, run.path, validate=dies, workers=0, data_dir=tmp_path)
    last = [RunFolder(r.path).events("epoch")[-1]["val_mAP"] for r in (whole, run)]
    assert set(seen) == {"bf16"} and last[0] == last[1]
    assert all(weights(run)[k].equal(v) for k, v in weights(whole).items())


class TwoUses(torch.nn.Module):
    "Its convolution goes into a norm, and past it."

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
        torch.nn.init.normal_(self.norm.bias)

    def forward(self, images):
        maps = self.conv(images)
        return (self.norm(maps) - 3 * maps).mean((2, 3))


def network(name):
    if name == "two uses":
        return TwoUses().eval(), rules_of(of({}), 4)
    recipe = of({}).model_copy(update={"model": Model(backbone=name)})
    return (model := model_from_recipe(recipe, 4).eval()), rules_of(recipe, model.feature_dim)


@pytest.mark.parametrize("name", ["small_cnn", {"osnet": {"width": 0.25}}, "two uses"], ids=str)
def test_a_fast_way_is_near_the_plain_one_or_is_not_taken(name, monkeypatch, tmp_path):
    monkeypatch.setenv("REIDLAB_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    model, rules = network(name)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.uniform_(-0.1, 0.1), norm.running_var.uniform_(0.5, 2)
        torch.nn.init.uniform_(norm.bias, -0.5, 0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    last = lambda steps, device: [step() for step in steps.values()] and Choice([*steps][-1])
    monkeypatch.setattr(engine, "choose", last)
    wanted = (Pace(), Pace("fp32", "nhwc", "folded"), Pace("bf16", "nhwc", "folded"))
    monkeypatch.setattr(engine, "ways", lambda bits, device: wanted[: 2 if bits == "fp32" else 3])
    photos = torch.randint(0, 256, (5, 3, rules.height, rules.width), dtype=torch.uint8)
    plain = lambda photos, camids: embed(model, [normalise(photos, rules.mean, rules.std)])
    expected = plain(photos, None)
    for bits in ("fp32", "bf16"):
        if name == "two uses":
            with pytest.raises(ValueError, match="a vector turns"):
                engine.Engine(plain, model, rules, bits)(photos)
            continue
        quick = engine.Engine(plain, model, rules, bits)
        near = torch.cosine_similarity(quick(photos), expected)
        assert near.min() >= engine.LEAST[bits] and bits in str(quick)
        assert quick(photos).equal(expected) is False
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
    assert plain(photos, None).equal(expected)
    assert model.training is False


def test_without_runtimes_an_embedder_still_finds_a_way(tmp_path, monkeypatch):
    monkeypatch.setenv("REIDLAB_CACHE_DIR", str(tmp_path / "cache"))
    run = trained_on(of({}), tmp_path, judge=False)

    def missing(*given, **told):
        raise ModuleNotFoundError("to write an ONNX file reidlab needs the packages onnx")

    monkeypatch.setattr(engine, "write_onnx", missing)
    data = open_test(run.recipe.data, tmp_path)
    photos = [data.manifest.root / path for path in data.gallery.paths]
    quick, plain = Embedder(run.path, fast="int8"), Embedder(run.path)
    assert "as the first photos will show" in repr(quick)
    near = (quick.embed(photos, unit=True) * plain.embed(photos, unit=True)).sum(1)
    assert near.min() > engine.LEAST["bf16"] and len(quick.engine.choice.dropped) == 5
    assert not run.events("pace")
    with pytest.raises(ValueError, match="fast"):
        Embedder(run.path, fast="int4")


TURNED = Image.Exif()
TURNED[0x0112] = 6
WIDE = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
PHOTOS = {  # how it is saved, and whether torchvision decodes it
    "plain": ("RGB", {"format": "JPEG"}, True),
    "progressive": ("RGB", {"format": "JPEG", "progressive": True, "subsampling": 0}, True),
    "grey": ("L", {"format": "JPEG"}, False),
    "four colours": ("CMYK", {"format": "JPEG"}, False),
    "turned": ("RGB", {"format": "JPEG", "exif": TURNED}, False),
    "profile": ("RGB", {"format": "JPEG", "icc_profile": WIDE}, False),
    "png": ("RGB", {"format": "PNG"}, False),
}


@pytest.mark.parametrize("name", PHOTOS)
def test_a_file_that_is_read_sooner_shows_the_same(name, tmp_path):
    mode, how, sooner = PHOTOS[name]
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype="uint8")
    photo = Image.fromarray(pixels.repeat(9, 0).repeat(9, 1)).convert(mode)
    photo.save(tmp_path / "a.jpg", **how)
    given = (tmp_path / "a.jpg", 32, 16)
    quick, usual = engine.quick_photo(*given), read_photo(*given)
    assert quick.shape == usual.shape and (quick.int() - usual.int()).abs().max() <= 2
    assert (engine._decoded(given[0]) is not None) is sooner
    with pytest.raises(FileNotFoundError, match="is not there"):
        engine.quick_photo(tmp_path / "b.jpg", 32, 16)
