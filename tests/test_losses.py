"""What all terms of the catalogue share, and losses with weights and teachers in several processes."""

import pytest
import torch
from conftest import tiny_recipe
from torch.testing import assert_close

from reidlab.core.parts import options_of
from reidlab.core.run import open_run
from reidlab.data.loaders import open_data
from reidlab.losses.catalogue import LOSSES, NEEDS, Example, weighted_sum
from reidlab.training.distill import distil_from_recipe
from reidlab.training.launch import launch

PIDS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 4])
RAISES = {"triplet", "circle_pairs", "range"}  # a lone photo is refused


def example(name, pids=PIDS, dtype=torch.float32, seed=0):
    "A branch that a term can work on."
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(pids), 5, generator=draw)
    feat = torch.randn(len(pids), 12, generator=draw)
    if NEEDS.get(name) != "cosines":
        return Example(logits.to(dtype), feat.to(dtype))
    return Example(logits.tanh().to(dtype), feat.to(dtype), norm=2 * torch.ones(len(pids)))


def built(name, **options):
    return weighted_sum({name: options}, [example(name, torch.tensor([0, 0, 1, 1]))], n_pids=5)


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_a_batch_means_nothing(name):
    pids, loss = PIDS[:-1], built(name)
    order = torch.randperm(len(pids), generator=torch.Generator().manual_seed(1))
    b = example(name, pids)
    norm = None if b.norm is None else b.norm[order]
    mixed = Example(b.logits[order], b.feat[order], norm=norm)
    assert_close(loss([mixed], pids[order])[0], loss([b], pids)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_promoted(name, dtype):
    pids, loss, half = PIDS[:-1], built(name), example(name, PIDS[:-1], dtype)
    whole = Example(half.logits.float(), half.feat.float(), norm=half.norm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss([half], pids)[0]
    assert found.dtype == torch.float32
    assert_close(found, loss([whole], pids)[0])


@pytest.mark.parametrize("name", LOSSES)
def test_lone_photos_and_lone_people(name):
    lonely, alone = (PIDS, example(name)), (PIDS[:3], example(name, PIDS[:3]))
    if name in RAISES:
        with pytest.raises(ValueError, match="valid_only"):
            built(name)([lonely[1]], lonely[0])
    else:
        assert built(name)([lonely[1]], lonely[0])[0].isfinite()
    if "valid_only" not in options_of(LOSSES[name]):
        assert built(name)([alone[1]], alone[0])[0].isfinite()
        return
    with pytest.raises(ValueError, match="valid_only"):
        built(name)([alone[1]], alone[0])
    for pids, branch in (lonely, alone):
        branch.feat.requires_grad_()
        loss = built(name, valid_only=True)([branch], pids)[0]
        loss.backward()
        assert loss.isfinite() and branch.feat.grad.isfinite().all()


def fit_each(fits, data_dir, device):
    "Several trainings in one launch."
    for recipe, folder in fits:
        distil_from_recipe(recipe, folder, device=device, workers=0, data_dir=data_dir)


def test_centres_and_teachers_in_two_processes(photos, tmp_path):
    "Two processes end where one ends: network, centres and what the teacher said."
    shared = {
        "data__height": 32,
        "data__width": 16,
        "data__val_fraction": 0.0,
        "train__epochs": 1,
        "train__optimizer": {"sgd": {"lr": 0.01}},
        "train__warmup": "none",
        "train__sync_bn": True,
    }
    # no triplet, which would be mined in each process apart where they do not gather
    terms = {"softmax": {}, "triplet": {"weight": 0.0}, "centre": {"weight": 5e-4}}
    taught = {"teacher_student": {"teacher": "run:teacher", "checkpoint": "last"}}
    recipes = {
        "teacher": tiny_recipe(**shared),
        "centred": tiny_recipe(loss=terms, train__distill=taught, **shared),
        "local": tiny_recipe(loss=terms, train__gather=False, **shared),
    }
    data = open_data(recipes["teacher"].data, 0, photos)

    def opened(name, key):
        made = {"data": data.fingerprint, "root": tmp_path}
        return recipes[key], open_run(name, recipes[key], verb="train", **made).path

    for key in recipes:
        fit_each([opened(key, key)], photos, "cpu")
    fits = [opened(f"{key}-two", key) for key in ("centred", "local")]
    launch(fit_each, gpus=2, device="cpu", fits=fits, data_dir=photos)
    for name in ("centred", "local"):
        one, two = (
            torch.load(tmp_path / folder / "checkpoints/last.pt", weights_only=True)
            for folder in (name, f"{name}-two")
        )
        centres = "parts.centre.0.centres"
        assert_close(two["loss"][centres], one["loss"][centres], rtol=1e-4, atol=1e-4)
        assert_close(two["model"], one["model"], rtol=1e-4, atol=1e-4)
    history = open_run(
        "centred", recipes["centred"], verb="train", data=data.fingerprint, root=tmp_path
    )
    assert {"taught_logits", "taught_features", "centre"} <= set(history.history().columns)
    assert (two["loss"][centres] - one["loss"][centres]).abs().max() > 0  # not the same file twice
