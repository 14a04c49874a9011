"""Transformers that learn cameras and jigsaws: through training, resume, evaluation and bad input."""

import json
import re
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reidlab.core.recipe import validated
from reidlab.core.run import open_run
from reidlab.data.loaders import Batch, open_data, open_test
from reidlab.data.manifest import write_manifest
from reidlab.data.synthetic import write_synthetic
from reidlab.evaluation.embed import embed
from reidlab.evaluation.evaluate_run import evaluate_run
from reidlab.interchange.families import foreign_network, read_foreign
from reidlab.interchange.key_rules import load_family, told_of
from reidlab.interchange.transreid import TRANSREID_FAMILY
from reidlab.models.catalogue import build_model
from reidlab.models.cdnet import strip_training_layers
from reidlab.models.finetune import take_weights
from reidlab.models.vit import CameraEmbedding, transreid_vit
from reidlab.training.checks import check_batches, check_model
from reidlab.training.fit import fit_from_recipe
from reidlab.training.network import build_network
from reidlab.training.step import Trainer
from reidlab.training.trained import load_model

SMALL = {"dim": 24, "depth": 2, "heads": 2, "photo": [32, 16], "cameras": 3}
WHOLE = {"pool": "token", "neck": "token_bnneck", "head": "jigsaw"}


def recipe(backbone=SMALL | {"jigsaw": True, "shift": 2, "stride": 12, "drop_path": 0.1}, **model):
    "A recipe whose backbone is told the size of the photos by the data."
    backbone = {k: v for k, v in backbone.items() if k != "photo"}
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
        said = json.loads(recipe().model_dump_json())
        said["model"]["backbone"]["transreid_vit"]["photo"] = [32, 16]
        check_model(validated("size", said | {"data": {"height": 64, "width": 32}}))


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


@pytest.mark.parametrize(
    ("about", "head"),
    [
        ({"jigsaw": True, "shift": 2}, "jigsaw"),
        ({"part_tokens": 3}, {"fused_tokens": {"fusion": "mean"}}),
    ],
)
@pytest.mark.parametrize("side", ["before", "after"])
def test_a_network_without_its_training_layers_embeds_alike(about, head, side):
    name, options = (head, {}) if isinstance(head, str) else next(iter(head.items()))
    head = {name: options | {"neck_feat": side}}
    parts = WHOLE | {"head": head}
    model = build_model({"transreid_vit": SMALL | about}, **parts, n_pids=5).eval()
    light, images = strip_training_layers(model), torch.randn(2, 3, 32, 16)
    with torch.no_grad():
        assert torch.equal(light(images), model(images))
    assert not [k for k in light.state_dict() if "classifier" in k]


def test_gradients_reach_every_weight_of_jigsaw_and_cameras():
    model = build_model({"transreid_vit": SMALL | {"jigsaw": True, "shift": 2}}, **WHOLE, n_pids=5)
    branches = model(torch.randn(4, 3, 32, 16), torch.tensor([0, 1, 2, 2]))
    sum(b.weight * (b.logits.square().mean() + b.feat.square().mean()) for b in branches).backward()
    still = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not still
    assert isinstance(model.neck.norms[0], nn.BatchNorm1d) and len(branches) == 5


# --- files of the family, against formulas ---------------------------------------------------


def formula(state, images, heads, scale):
    "A vision transformer written out: the class token after the last norm."
    g, dim = state.__getitem__, state["cls_token"].shape[-1]
    norm = lambda x, at: F.layer_norm(x, (dim,), g(f"{at}.weight"), g(f"{at}.bias"), 1e-6)
    linear = lambda x, at: F.linear(x, g(f"{at}.weight"), state.get(f"{at}.bias"))
    weight = g("patch_embed.proj.weight")
    x = F.conv2d(images, weight, g("patch_embed.proj.bias"), stride=weight.shape[-1])
    x = torch.cat([g("cls_token").expand(len(images), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + g("pos_embed")
    for i in range(2):
        at = f"blocks.{i}"
        parts = linear(norm(x, f"{at}.norm1"), f"{at}.attn.qkv").unflatten(2, (3, heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        seen = (q @ k.transpose(2, 3) * scale).softmax(3) @ v
        x = x + linear(seen.transpose(1, 2).flatten(2), f"{at}.attn.proj")
        inside = F.gelu(linear(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1"))
        x = x + linear(inside, f"{at}.mlp.fc2")
    return norm(x, "norm")[:, 0]


def stem_formula(state, images):
    "The ICS stem written out."
    x = images
    for conv, norm, stride, pad in ((0, 1, 2, 3), (3, 4, 1, 1), (6, 7, 1, 1)):
        at = f"patch_embed.conv.{norm}"
        x = F.conv2d(x, state[f"patch_embed.conv.{conv}.weight"], stride=stride, padding=pad)
        bn = lambda x, at: F.batch_norm(
            x, *(state[f"{at}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        )
        if norm == 7:
            x = bn(x, at)
        else:
            one, other = x[:, :32], x[:, 32:]
            one = F.instance_norm(one, weight=state[f"{at}.IN.weight"], bias=state[f"{at}.IN.bias"])
            x = torch.cat([one, bn(other, f"{at}.BN")], 1)
        x = x.relu()
    return x


def random_file(**options):
    "Tensors under the names that timm and the family share."
    torch.manual_seed(1)
    few = {k: v for k, v in SMALL.items() if k != "cameras"}
    net = transreid_vit(**few | options).net
    draw = lambda v: torch.rand(v.shape, dtype=torch.float64) * 0.5 + 0.1
    return {k: draw(v) for k, v in net.state_dict().items() if v.is_floating_point()}


TOLD = {"heads": 2, "height": 32, "width": 16}


def embedded(state, family, images, **told):
    facts, told = family.facts(state), TOLD | told
    model = build_model(**family.parts(facts, told_of(family, told)), n_pids=3).double()
    load_family(model, state, family, told)
    with torch.no_grad():
        return model.eval()(images)


@pytest.mark.parametrize("size", ["small", "transreid_small"])
def test_the_old_small_network_scales_its_attention_by_its_whole_width(size):
    state, images = random_file(size=size), torch.randn(2, 3, 32, 16).double()
    scale = (24 if size == "transreid_small" else 12) ** -0.5
    file = {f"base.{k}": v for k, v in state.items()}
    seen = embedded(file, TRANSREID_FAMILY, images)
    torch.testing.assert_close(seen, formula(state, images, 2, scale))


def test_the_stem_of_transreid_ssl_and_its_generalised_mean():
    state, images = random_file(stem="ics"), torch.randn(2, 3, 32, 16).double()
    file = {f"base.{k}": v for k, v in state.items()}
    expected = formula(state, stem_formula(state, images), 2, 12**-0.5)
    torch.testing.assert_close(embedded(file, TRANSREID_FAMILY, images), expected)
    model = build_model(
        **TRANSREID_FAMILY.parts(
            TRANSREID_FAMILY.facts(file), told_of(TRANSREID_FAMILY, TOLD | {"gem": True})
        ),
        n_pids=3,
    ).double()
    load_family(model, file, TRANSREID_FAMILY, TOLD)
    with torch.no_grad():
        maps, tokens = model.eval().backbone(images)
    mean = maps.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)
    torch.testing.assert_close(tokens[0], expected + mean)


def test_a_file_fine_tuned_without_labels_is_compared_after_its_neck():
    state, images = random_file(), torch.randn(2, 3, 32, 16).double()
    neck = {
        k: torch.rand(24).double() + 0.5 for k in ("weight", "bias", "running_mean", "running_var")
    }
    file = state | {f"bottleneck.{k}": v for k, v in neck.items()}
    before = formula(state, images, 2, 12**-0.5)
    order = (neck[k] for k in ("running_mean", "running_var", "weight", "bias"))
    expected = F.batch_norm(before, *order)
    torch.testing.assert_close(embedded(file, TRANSREID_FAMILY, images), expected)
    seen = embedded(file, TRANSREID_FAMILY, images, neck_feat="before")
    torch.testing.assert_close(seen, before)


def test_a_file_of_pre_training_is_its_teachers_backbone(tmp_path):
    state, images = random_file(), torch.randn(2, 3, 32, 16).double()
    teacher = {f"module.backbone.{k}": v for k, v in state.items()}
    teacher["module.head.mlp.0.weight"] = torch.ones(2, 24)
    student = {k: v + 1 for k, v in teacher.items()}
    content = {"student": student, "teacher": teacher, "epoch": 3, "args": Namespace(arch="vit")}
    torch.save(content | {"optimizer": {"state": {}, "param_groups": []}}, tmp_path / "ssl.pth")
    with pytest.warns(UserWarning, match="teacher is read"):
        found = read_foreign(tmp_path / "ssl.pth")
    assert found.name == "transreid" and found.facts["kind"] == "pretrained"
    model, report = foreign_network(found, TOLD)
    assert list(report.left) == ["head.mlp.0.weight"]
    assert all(k.startswith(("neck.", "head.")) for k in report.fresh)
    with torch.no_grad():
        seen = model.double().eval().backbone(images).tokens[0]
    torch.testing.assert_close(seen, formula(state, images, 2, 12**-0.5), atol=1e-4, rtol=1e-4)
