"""What an embedder says of a photo is what the evaluation of its run ranked, to the bit."""

import numpy as np
import pytest
from PIL import Image

from reidlab import Embedder
from reidlab.core.recipe import Data, Evaluate, Model, Recipe, Synthetic, Train
from reidlab.core.run import open_run
from reidlab.data.loaders import open_test
from reidlab.deploy.embedder import as_photo
from reidlab.deploy.onnx import write_onnx
from reidlab.evaluation.embeddings import load_embeddings
from reidlab.evaluation.evaluate_run import evaluate_run
from reidlab.training.fit import fit_from_recipe

VIT = {"transreid_vit": {"dim": 24, "depth": 2, "heads": 2, "cameras": 3}}


@pytest.mark.parametrize(
    ("model", "flip"),
    [
        ({"backbone": VIT, "pool": "token"}, True),
        ({"backbone": {"timm": {"name": "test_vit"}}, "pool": "token_gem"}, False),
        ({"head": {"pcb": {"stripes": 2}}, "neck": {"bn": {"embedding": 16}}}, False),
    ],
    ids=["cameras", "timm", "stripes"],
)
def test_vectors_are_those_of_the_evaluation(model, flip, tmp_path):
    few = Synthetic(train_pids=8, test_pids=4, cameras=3)
    look = {"height": 64, "width": 32, "interpolation": "bicubic", "std": (0.3, 0.2, 0.2)}
    about = Data(synthetic=few, **look, sampler={"pk": {"p": 4, "k": 2}})
    rules = Evaluate(flip=flip, batch_size=16)
    rate = Train(epochs=1, validate_every=0)
    recipe = Recipe(name="t", data=about, model=Model(**model), train=rate, evaluate=rules)
    data = open_test(about, tmp_path)
    run = open_run("t", recipe, verb="train", data=data.fingerprint, root=tmp_path)
    fit_from_recipe(recipe, run.path, workers=0, data_dir=tmp_path)
    evaluate_run(run.path, workers=0, data_dir=tmp_path)
    kept = load_embeddings(run.path / "evaluate/synthetic/embeddings.npz")
    photos, embedder = [data.manifest.root / path for path in kept.g_paths], Embedder(run.path)
    np.testing.assert_array_equal(embedder.embed(photos, cameras=kept.g_camids), kept.g_feats)
    untold = embedder.embed(photos)
    path = write_onnx(embedder.model, embedder.contract, tmp_path / "t.onnx", takes="photos")
    for told, ours in ((kept.g_camids, kept.g_feats), (None, untold)):
        there = Embedder(path).embed(photos, unit=True, cameras=told)
        unit = ours / np.linalg.norm(ours, axis=1, keepdims=True)
        np.testing.assert_allclose(there, unit, atol=1e-4)
    assert np.array_equal(untold, kept.g_feats) is ("cameras" not in str(model))
    for wrong, words in (
        (0, "a number for each photo"),
        ([0.5] * len(photos), "a whole number, got 0.5"),
    ):
        with pytest.raises(ValueError, match=words):
            embedder.embed(photos, cameras=wrong)
    with pytest.raises(ValueError, match="more cameras than photos"):
        embedder.embed(photos[:2], cameras=[0, 1, 1])


FORMS = {
    "of an array": lambda pixels: Image.fromarray(pixels),
    "a crop": lambda pixels: Image.fromarray(np.pad(pixels, ((3, 3), (2, 2), (0, 0)))).crop(
        (2, 3, 2 + pixels.shape[1], 3 + pixels.shape[0])
    ),
    "pasted": lambda pixels: Image.merge("RGB", Image.fromarray(pixels).split()),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_made_in_memory_is_a_picture(form):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 24, 3), dtype="uint8")
    assert as_photo(FORMS[form](pixels), 32, 16).equal(as_photo(pixels, 32, 16))


def test_a_device_that_is_not_there_is_no_damaged_file(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for device in ("cuda", "tpu"):
        with pytest.raises(ValueError, match=f"device needs cpu, or cuda .* got '{device}'"):
            Embedder("any", device=device)
