"""Transformers that learn cameras and jigsaws: through training, resume, evaluation and bad input."""

import json
import re

import pytest
import torch
from torch import nn

from reidlab.core.recipe import validated
from reidlab.core.run import open_run
from reidlab.data.loaders import Batch, open_data, open_test
from reidlab.data.manifest import write_manifest
from reidlab.data.synthetic import write_synthetic
from reidlab.evaluation.embed import embed
from reidlab.evaluation.evaluate_run import evaluate_run
from reidlab.models.catalogue import build_model
from reidlab.models.finetune import take_weights
from reidlab.models.vit import CameraEmbedding
from reidlab.training.checks import check_batches, check_model
from reidlab.training.fit import fit_from_recipe
from reidlab.training.network import build_network
from reidlab.training.step import Trainer
from reidlab.training.trained import load_model

SMALL = {"dim": 24, "depth": 2, "heads": 2, "photo": [32, 16], "cameras": 3}
WHOLE = {"pool": "token", "neck": "token_bnneck", "head": "jigsaw"}


def recipe(backbone=SMALL | {"jigsaw": True, "shift": 2, "stride": 12, "drop_path": 0.1}, **model):
    return validated(
        "cameras",
        {
            "data": {
                "synthetic": {"train_pids": 6, "test_pids": 3, "cameras": 3},
                **{"height": 32, "width": 16, "sampler": {"pk": {"p": 2, "k": 2}}},
                **{"val_fraction": 0.0, "mean": [0.5] * 3, "std": [0.5] * 3},
            },
            "model": {"backbone": {"transreid_vit": backbone}, **WHOLE, **model},
            "evaluate": {"baselines": False},
            "train": {"epochs": 2, "optimizer": {"sgd": {"lr": 0.01}}, "ema": 0.5},
        },
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run of two epochs, and the cameras that its steps were told."
    root, r, told = tmp_path_factory.mktemp("cameras"), recipe(), []

    class Listening(Trainer):
        def see(self, batch, network=None):
            hook = self.model.backbone.register_forward_pre_hook(
                lambda _, args, kwargs: told.append(kwargs.get("cameras")), with_kwargs=True
            )
            seen = super().see(batch, network)
            hook.remove()
            assert torch.equal(told[-1], batch.camids)
            return seen

    data = open_test(r.data, root)
    check_batches(r, open_data(r.data, r.seed, root))
    run = open_run("", r, verb="train", data=data.fingerprint, root=root)
    fit_from_recipe(r, run.path, workers=0, data_dir=root, make=Listening)
    return root, run, told


class Stop(Exception):
    pass


def test_training_tells_the_cameras_and_a_stopped_run_ends_with_the_same_bits(trained):
    root, run, told = trained
    assert {int(c) for cameras in told for c in cameras} == {0, 1, 2}
    whole = load_model(run.path, "last")[0].state_dict()
    r = recipe()
    other = open_run("again", r, verb="train", data=open_test(r.data, root).fingerprint, root=root)

    def stop(folder, record):
        if record["epoch"] == 1:
            raise Stop

    with pytest.raises(Stop):
        fit_from_recipe(r, other.path, workers=0, data_dir=root, on_epoch=[stop])
    fit_from_recipe(r, other.path, workers=0, data_dir=root)
    again = load_model(other.path, "last")[0].state_dict()
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    vectors = whole["backbone.cameras.vectors"]
    assert float(vectors.std(0).max()) > 0 and whole["backbone.cameras.seen"].all()


def test_the_record_says_what_the_network_was_and_which_cameras_it_never_saw(trained):
    root, run, _ = trained
    facts = load_model(run.path, "last")[1]["architecture"]
    assert facts["backbone.cameras"] == 3 and facts["backbone.jigsaw"] is True
    result = evaluate_run(run.path, workers=0, data_dir=root)
    assert "unseen_cameras" not in result
    written = json.loads((run.path / "evaluate/synthetic/metrics.json").read_text())
    assert written["metrics"]["mAP"] == result["metrics"]["mAP"]


def test_cameras_of_another_set_are_unseen(trained):
    root, run, _ = trained
    rows = write_synthetic(root / "photos", train_pids=2, test_pids=3, cameras=2, seed=9)
    test = rows[rows["split"] != "train"]
    write_manifest(root / "south", "south", test, root / "photos")
    there = evaluate_run(run.path, "south", workers=0, data_dir=root)
    n = len(test)
    assert there["unseen_cameras"] == {"photos": n, "of": n, "added": "none"}


def test_too_few_or_too_many_cameras_are_one_line(trained):
    root = trained[0]
    for n in (2, 4):
        r = recipe(SMALL | {"cameras": n}, neck="bnneck", head="linear")
        check_model(r)
        with pytest.raises(ValueError, match=f"the backbone has {n} cameras, .* set has 3") as told:
            check_batches(r, open_data(r.data, r.seed, root))
        assert "\n" not in str(told.value)


def test_photos_of_another_size_are_one_line():
    with pytest.raises(ValueError, match="built for photos of 32×16, got 64×32"):
        check_model(
            validated(
                "size",
                json.loads(recipe().model_dump_json()) | {"data": {"height": 64, "width": 32}},
            )
        )


def test_without_cameras_nothing_changes_and_unseen_ones_are_as_if_there_were_none():
    torch.manual_seed(0)
    plain = build_model({"transreid_vit": SMALL | {"cameras": 0}}, "token", n_pids=5).eval()
    told = build_model({"transreid_vit": SMALL}, "token", n_pids=5).eval()
    told.load_state_dict(plain.state_dict(), strict=False)
    assert (plain.takes_cameras, told.takes_cameras) == (False, True)
    images = torch.randn(2, 3, 32, 16)
    with torch.no_grad():
        assert torch.equal(plain(images), told(images))
        assert torch.equal(plain(images), told(images, torch.tensor([3, -1])))
        cameras = torch.tensor([2, -1])
        assert not torch.equal(plain(images), told(images, cameras))
        batch = Batch(images, cameras, cameras, index=cameras)
        assert torch.equal(embed(told, [batch]), told(images, cameras))
        assert torch.equal(embed(plain, [batch]), plain(images))


@pytest.mark.parametrize("at", ["tokens", "class"])
def test_a_camera_is_added_where_it_says(at):
    side = CameraEmbedding(4, 6, coefficient=2.0, at=at)
    added = side(torch.zeros(1, 3, 6), torch.tensor([2])).detach()[0] / 2
    rows = side.vectors[2].detach().expand(3, 6).clone()
    rows[1:] *= at == "tokens"
    torch.testing.assert_close(added, rows)


STARTS = {  # what a file holds; where its last block and its norm go
    "plain": ({"cameras": 0}, ["jigsaw.global_branch", "jigsaw.local_branch"]),
    "cameras": ({"cameras": 5}, ["jigsaw.global_branch", "jigsaw.local_branch"]),
    "jigsaw": ({"cameras": 3, "jigsaw": True, "shift": 2}, ["net"]),
}


@pytest.mark.parametrize("held", STARTS)
def test_weights_of_another_form_start_a_network(held, tmp_path):
    about, places = STARTS[held]
    file, wanted = tmp_path / "vit.pth", places != ["net"]
    photo = {"photo": [32, 32] if held == "plain" else [32, 16]}
    parts = WHOLE if "jigsaw" in about else {"pool": "token"}
    there = build_model({"transreid_vit": SMALL | about | photo}, **parts, n_pids=4)
    names = ((r"^net\.", "base."), (r"^jigsaw\.global_branch\.block\.", "b1.0."))
    names += (
        (r"^jigsaw\.global_branch\.norm\.", "b1.1."),
        (r"^cameras\.vectors", "base.sie_embed"),
    )
    names += (
        (r"^jigsaw\.local_branch\.block\.", "b2.0."),
        (r"^jigsaw\.local_branch\.norm\.", "b2.1."),
    )
    state = {}
    for key, tensor in there.backbone.state_dict().items():
        for ours, theirs in names:
            key = re.sub(ours, theirs, key)
        state[key] = tensor
    state.pop("cameras.seen", None)
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, file)
    said = SMALL | {"jigsaw": wanted, "shift": 2, "weights": str(file)}
    r = recipe(said, **({} if wanted else {"neck": "bnneck", "head": "linear"}))
    net = build_network(r, 6).backbone
    last = "base.blocks.1" if held != "jigsaw" else "b1.0"
    for place in places:
        block = net.get_submodule(f"{place}.block" if wanted else f"{place}.blocks.1")
        assert torch.equal(block.mlp.fc1.weight, state[f"{last}.mlp.fc1.weight"])
    assert torch.equal(net.net.blocks[0].attn.qkv.bias, state["base.blocks.0.attn.qkv.bias"])
    same = torch.equal(net.cameras.vectors, state.get("base.sie_embed", torch.zeros(0)))
    assert same == (about["cameras"] == 3)


def test_a_run_starts_from_one_with_other_cameras():
    parts = {"pool": "token", "n_pids": 4}
    one, other = (build_model({"transreid_vit": SMALL | {"cameras": n}}, **parts) for n in (3, 5))
    vectors = other.backbone.cameras.vectors.clone()
    report = take_weights(other, one.state_dict(), one.architecture)
    assert {k for k in report.fresh if "classifier" not in k} == {
        "backbone.cameras.vectors",
        "backbone.cameras.seen",
    }
    assert torch.equal(other.backbone.cameras.vectors, vectors)
    assert torch.equal(other.backbone.net.pos_embed, one.backbone.net.pos_embed)


def test_gradients_reach_every_weight_of_jigsaw_and_cameras():
    model = build_model({"transreid_vit": SMALL | {"jigsaw": True, "shift": 2}}, **WHOLE, n_pids=5)
    branches = model(torch.randn(4, 3, 32, 16), torch.tensor([0, 1, 2, 2]))
    sum(b.weight * (b.logits.square().mean() + b.feat.square().mean()) for b in branches).backward()
    still = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not still
    assert isinstance(model.neck.norms[0], nn.BatchNorm1d) and len(branches) == 5
