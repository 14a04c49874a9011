"""From an archive as downloaded to a ranked test set, on vehicles8 (drawn vehicles in Market-1501's layout)."""

import numpy as np
import pytest
from conftest import walk
from PIL import Image

from reidlab.core.recipe import load_recipe
from reidlab.core.run import open_run
from reidlab.core.settings import settings
from reidlab.data.archives import find_raw
from reidlab.data.loaders import open_data
from reidlab.data.manifest import read_manifest
from reidlab.evaluation.baselines import colour_histogram, rank_baseline
from reidlab.evaluation.evaluate_run import evaluate_run
from reidlab.retrieval.rank import rank_features
from reidlab.training.fit import fit_from_recipe


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    "vehicles8 read by its data_prep page into a temporary data folder."
    try:
        find_raw("vehicles8")
    except FileNotFoundError as missing:
        pytest.skip(f"vehicles8 is not on this machine: {missing}")
    data_dir, raw = tmp_path_factory.mktemp("data"), ", ".join(map(str, settings().raw_dirs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REIDLAB_DATA_DIR", str(data_dir))
        patch.setenv("REIDLAB_RAW_DIRS", raw)
        walk("data_prep/market1501.ipynb", name="vehicles8")
    return data_dir


def test_the_manifest_counts_what_the_set_publishes(prepared):
    manifest = read_manifest(prepared / "vehicles8")
    for key, count in manifest.about["counts"].items():
        assert count["published"] in (None, count["ours"]), key


def test_a_colour_histogram_scores_what_the_set_publishes(prepared):
    "56.0 mAP, 83.7 rank-1, 30.1 mINP at 48×48, from the set's own README: data, protocol and metrics agree."
    manifest = read_manifest(prepared / "vehicles8")
    sides = [manifest.photos("query"), manifest.photos("gallery")]
    feats = []
    for photos in sides:
        small = [
            Image.open(photos.root / p).convert("RGB").resize((48, 48), Image.BILINEAR)
            for p in photos.paths
        ]
        feats.append(np.stack([colour_histogram(np.asarray(image)) for image in small]))
    q, g = sides
    result = rank_features(*feats, q.pids, g.pids, q.camids, g.camids)
    got = [result.mAP, result.rank(1), result.mINP]
    np.testing.assert_allclose(got, [0.560, 0.837, 0.301], atol=1e-3)


def test_a_short_training_beats_chance_by_far(prepared, tmp_path):
    recipe = load_recipe("vehicles8", overrides={"train.epochs": 5, "train.validate_every": 0})
    data = open_data(recipe.data, recipe.seed, prepared)
    run = open_run("", recipe, verb="train", data=data.fingerprint, root=tmp_path)
    fit_from_recipe(recipe, run.path, data_dir=prepared)
    result = evaluate_run(run.path, data_dir=prepared)
    assert result["metrics"]["mAP"] > 0.40
    assert rank_baseline("random", data.query, data.gallery).mAP < 0.02
    assert result["protocol"]["counts"]["queries"] == 430
