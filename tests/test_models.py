"""Networks against published counts, and what only several chapters of the models room can say together."""

import inspect
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import from_facts

from reidlab.core.parts import options_of
from reidlab.core.recipe import validated
from reidlab.core.seed import seed_all
from reidlab.models.catalogue import BACKBONES, HEADS, NECKS, POOLS
from reidlab.models.cdnet import cdnet, reference_key, strip_training_layers
from reidlab.models.cost import count_macs, count_parameters
from reidlab.models.fblneck import BALANCED
from reidlab.models.token_heads import TOKEN_HEADS, TOKEN_NECK
from reidlab.models.token_pool import TOKEN_POOLS
from reidlab.training.checks import check_model

LITE = {"backbone": "resnet50", "neck": "bn", "embedding": 256, "dropout": 0.5}

PCB = {"backbone": "resnet50", "head": "pcb", "neck": "bn", "embedding": 256, "pool": "max"}


def on_paper(**names):
    "A model without numbers: built in no time, whatever its size."
    with torch.device("meta"):
        return from_facts(**names)


# counts published for 751 training people (Market-1501)
def test_parameter_counts_are_the_published_ones():
    assert count_parameters(on_paper(backbone="resnet50").backbone) == 23_508_032
    assert count_parameters(on_paper(backbone="resnet101").backbone) == 42_500_160
    assert count_parameters(on_paper(backbone="resnet50").backbone.layer4) == 14_964_736
    assert count_parameters(on_paper(backbone="resnet50")) == 25_050_176
    assert count_parameters(on_paper(**LITE)) == 24_226_095
    assert count_parameters(on_paper(backbone="resnet50_ibn").backbone) == 23_508_032
    stripe = on_paper(**PCB, stripes=1)
    assert count_parameters(stripe) - count_parameters(stripe.backbone) == 718_063
    assert count_parameters(on_paper(**PCB, global_branch=256)) == 28_534_473
    forked = on_paper(**PCB, global_branch=256, copied_stage=1)
    assert count_parameters(forked) == 28_534_473 + 14_964_736
    middle = on_paper(backbone="resnet50_middle", neck="bn", embedding=512)  # with bias, by hand
    assert count_parameters(middle) == 23_508_032 + 3072 * 512 + 512 + 1024 + 512 * 751 + 751


def test_only_the_bias_of_the_bnneck_is_frozen():
    model = on_paper(backbone="resnet50")
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["neck.norm.bias"]
    assert count_parameters(model) - count_parameters(model, trainable=True) == 2_048


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [
        ((256, 128), 2, (2048, 8, 4)),
        ((256, 128), 1, (2048, 16, 8)),
        ((384, 128), 2, (2048, 12, 4)),
        ((384, 128), 1, (2048, 24, 8)),
        ((224, 224), 2, (2048, 7, 7)),
        ((224, 224), 1, (2048, 14, 14)),
        ((384, 384), 2, (2048, 12, 12)),
        ((384, 384), 1, (2048, 24, 24)),
    ],
)
def test_shapes_of_the_literature(size, stride, expected):
    model = on_paper(backbone="resnet50", last_stride=stride).eval()
    images = torch.zeros(1, 3, *size, device="meta")
    assert model.backbone(images).shape[1:] == expected
    assert model(images).shape == (1, 2048)


def strides(backbone):
    return [1, 2] if "last_stride" in inspect.signature(BACKBONES[backbone]).parameters else [1]


def for_photos(backbone, height, width):
    "A backbone as a recipe says it; a transformer is built for photos of one size."
    few = {"dim": 24, "depth": 2, "heads": 2} if backbone == "transreid_vit" else {}
    takes = options_of(BACKBONES[backbone])
    return {backbone: few | {"photo": [height, width]}} if "photo" in takes else backbone


@pytest.mark.parametrize(("backbone", "stride"), [(b, s) for b in BACKBONES for s in strides(b)])
def test_every_backbone_keeps_its_promises(backbone, stride):
    own = {"genotype": "auto_reid"} if backbone == "derived" else {}
    said = for_photos(backbone, 64, 32)
    model = on_paper(backbone=said, last_stride=stride, n_pids=5, **own)
    maps = model.backbone(torch.zeros(2, 3, 64, 32, device="meta"))
    assert maps.dim() == 4 and maps.shape[1] == model.backbone.out_channels
    assert model.feature_dim == model.backbone.out_channels
    with torch.device("meta"):
        (branch,) = model(torch.zeros(2, 3, 64, 32))
    assert branch.logits.shape == (2, 5) and branch.feat.shape == (2, model.feature_dim)


@pytest.mark.parametrize("pool", [p for p in POOLS if p not in TOKEN_POOLS])
@pytest.mark.parametrize("neck", [n for n in NECKS if n not in (*BALANCED, TOKEN_NECK)])
@pytest.mark.parametrize("head", [h for h in HEADS if h not in ("pcb", *TOKEN_HEADS)])
@pytest.mark.parametrize("embedding", [0, 16])
def test_every_combination_trains_and_answers(pool, neck, head, embedding):
    if neck == "fc" and not embedding:
        with pytest.raises(ValueError, match="greater than or equal to 1"):
            from_facts(pool=pool, neck=neck, head=head, embedding=embedding)
        return
    seed_all(0)
    model = from_facts(pool=pool, neck=neck, head=head, embedding=embedding, n_pids=4)
    branches = model(torch.randn(4, 3, 48, 48))
    loss = sum(F.cross_entropy(b.logits, torch.arange(4)) for b in branches)
    loss = loss + sum(b.feat.square().mean() for b in branches if b.feat is not None)
    loss.backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or p.grad is not None, f"{name} learns nothing"
    features = model.eval()(torch.randn(2, 3, 48, 48))
    assert features.shape == (2, embedding or 256) and features.dtype == torch.float32


STRIPED = {"head": "pcb", "embedding": 8, "stripes": 3, "n_pids": 4}
VARIANTS = {
    "plain": {},
    "max, no norm": {"pool": "max", "neck": "none"},
    "bias-free norm, before": {"neck": "bnneck", "neck_feat": "before"},
    "global": {"global_branch": 16, "neck": "bn"},
    "own stage 4": {"backbone": "resnet18", "global_branch": 16, "copied_stage": 2},
    "concatenated": {"concat_classifier": True, "pooled_dropout": 0.5},
    "masked and erased": {
        "neck": "bn",
        "feature_mask": True,
        "feature_erasing": 0.4,
        "dropout": 0.5,
    },
    "random update": {"branch_update": 5, "global_branch": 16, "neck": "bn"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stripes_train_answer_and_rebuild(variant):
    seed_all(0)
    model = from_facts(**STRIPED | VARIANTS[variant])
    images, pids = torch.randn(4, 3, 64, 48), torch.arange(4)
    branches = model(images)
    wide = bool(VARIANTS[variant].get("global_branch"))
    names = ["stripe_1", "stripe_2", "stripe_3", "stripes"] + ["global"] * wide
    assert [b.name for b in branches] == names
    assert [b.feat is not None for b in branches] == [False] * 3 + [True] * (1 + wide)
    loss = sum(F.cross_entropy(b.logits, pids) for b in branches if b.logits is not None)
    (loss + sum(b.feat.square().mean() for b in branches if b.feat is not None)).backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or p.grad is not None, f"{name} learns nothing"
    assert json.loads(json.dumps(model.architecture)) == model.architecture
    twin = from_facts(**model.architecture).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(images), twin(images))
        assert model(images).shape == (4, 24 + 16 * wide) == (4, model.feature_dim)


def test_a_stripped_model_answers_from_the_same_side():
    for side in ("before", "after"):
        model = from_facts(**STRIPED, neck="bn", neck_feat=side, feature_mask=True)
        model(torch.randn(4, 3, 64, 48))  # running statistics other than 0 and 1
        images = torch.randn(2, 3, 64, 48)
        with torch.no_grad():
            assert torch.equal(strip_training_layers(model)(images), model.eval()(images))


def test_options_beyond_the_usual_leave_old_fingerprints_alone():
    late = {"stripes", "global_branch", "branch_update", "feature_erasing", "spectral_gate"}
    assert not late & on_paper().architecture.keys()
    assert on_paper(feature_erasing=0.3).architecture["feature_erasing"] == 0.3


@pytest.mark.parametrize("neck", BALANCED)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_balanced_necks_train_and_answer(backbone, neck):
    own = {"genotype": "auto_reid", "init_channels": 8} if backbone == "derived" else {}
    own |= {"width": 0.25} if "width" in inspect.signature(BACKBONES[backbone]).parameters else {}
    own |= (
        {"width": 16} if backbone in ("clip_resnet", "stage_net") else {}
    )  # channels there, no factor
    seed_all(0)
    if neck == "fblneck" and "taps" not in inspect.signature(BACKBONES[backbone]).parameters:
        with pytest.raises(ValueError, match="looks at the maps of two stages"):
            from_facts(backbone, neck=neck, n_pids=4, **own)
        return
    said = for_photos(backbone, 64, 48)
    model = from_facts(said, neck=neck, n_pids=4, dropout=0.1, **own)
    branches = model(torch.randn(4, 3, 64, 48))
    assert len(branches) == (2 if neck == "fblneck" else 1)
    loss = sum(
        F.cross_entropy(b.logits, torch.arange(4)) + b.feat.square().mean() for b in branches
    )
    loss.backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or p.grad is not None, f"{name} learns nothing"
    with torch.no_grad():
        feature = model.eval()(torch.randn(2, 3, 64, 48))
    assert feature.shape == (2, model.feature_dim)


@pytest.mark.parametrize("backbone", ["cdnet", "cnet", "stdnet", "osnet", "mobilenetv2", "gdasnet"])
def test_an_architecture_of_layers_rebuilds_its_model(backbone):
    own = {"width": 0.25} if backbone != "gdasnet" else {}
    neck = "blneck" if backbone == "mobilenetv2" else "fblneck"
    seed_all(0)
    model = from_facts(backbone, neck=neck, n_pids=4, dropout=0.2, **own).eval()
    assert json.loads(json.dumps(model.architecture)) == model.architecture
    twin = from_facts(**model.architecture).eval()
    twin.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        assert torch.equal(model(images), twin(images))


def test_a_recipe_and_a_call_build_the_same_cdnet():
    for genotype in ("cdnet", "cnet"):
        seed_all(0)
        one = from_facts(genotype, neck="fblneck", dropout=0.2, width=0.25, n_pids=4)
        seed_all(0)
        two = cdnet(genotype, 4, width=0.25)
        assert all(torch.equal(two.state_dict()[k], v) for k, v in one.state_dict().items())
        shared = one.architecture.keys() & two.architecture.keys()
        assert shared == two.architecture.keys()
        assert all(one.architecture[k] == two.architecture[k] for k in shared)


def test_published_weights_by_recipe(tmp_path):
    seed_all(0)
    source = cdnet(n_pids=9, width=0.25)
    keys = {k: reference_key(k, "cdnet", "fblneck") for k in source.state_dict()}
    torch.save({keys[k]: v for k, v in source.state_dict().items()}, tmp_path / "w.pth")
    options = {"neck": "fblneck", "dropout": 0.2, "width": 0.25, "n_pids": 4}
    model = from_facts("cdnet", weights=str(tmp_path / "w.pth"), **options)
    assert torch.equal(model.head.fcs[1][0].weight, source.head.fcs[1][0].weight)
    assert "weights" not in model.architecture
    with pytest.raises(ValueError, match="of another network"):
        from_facts("cnet", weights=str(tmp_path / "w.pth"), **options)


def test_the_stem_relu_changes_the_answer_and_no_key():
    seed_all(0)
    models = [from_facts("resnet18", stem_relu=relu, n_pids=4).eval() for relu in (True, False)]
    assert list(models[0].state_dict()) == list(models[1].state_dict())
    models[1].load_state_dict(models[0].state_dict())
    images = F.interpolate(torch.randn(2, 3, 4, 2), scale_factor=16, mode="bilinear")
    with torch.no_grad():
        one, other = (model(images) for model in models)
    assert (one - other).norm() > 0.1 * one.norm()
    assert models[0].architecture != models[1].architecture


def test_weights_are_a_pure_function_of_the_global_seed():
    def built(seed, **names):
        torch.manual_seed(seed)
        return from_facts(**names, n_pids=7).state_dict()

    for names in ({}, {"backbone": "resnet18", "pool": "gem"}, {"neck": "bn", "embedding": 8}):
        one, again, other = built(3, **names), built(3, **names), built(4, **names)
        assert all(torch.equal(one[key], again[key]) for key in one)
        assert not all(torch.equal(one[key], other[key]) for key in one)


def test_keys_say_whose_they_are():
    keys = list(on_paper(pool="gem", **LITE).state_dict())
    assert {key.split(".")[0] for key in keys} == {"backbone", "pool", "neck", "head"}
    assert "backbone.layer4.0.downsample.0.weight" in keys
    assert [k for k in keys if not k.startswith("backbone.") and "num_batches" not in k] == [
        "pool.p",
        "neck.embed.weight",
        "neck.embed.bias",
        "neck.norm.weight",
        "neck.norm.bias",
        "neck.norm.running_mean",
        "neck.norm.running_var",
        "head.classifier.weight",
        "head.classifier.bias",
    ]


def test_the_architecture_rebuilds_the_model():
    seed_all(0)
    model = from_facts(pool="gem", neck="bn", embedding=16, neck_feat="before", n_pids=4).eval()
    twin = from_facts(**model.architecture).eval()
    twin.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(model(images), twin(images))


def test_bfloat16_autocast_stays_near_and_ends_in_float32():
    seed_all(0)
    model = from_facts(pool="gem", n_pids=4)
    images = torch.randn(8, 3, 64, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (branch,) = model(images)
    assert branch.feat.dtype == torch.float32
    F.cross_entropy(branch.logits.float(), torch.arange(8) % 4).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        full = model.eval()(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(images)
    assert half.dtype == torch.float32
    assert F.cosine_similarity(full, half).min() > 0.999


@pytest.mark.parametrize("options", [{"pool": "gem"}, {"head": {"spectral": {"gate": 0.9}}}])
def test_a_recipe_is_checked_without_memory(options):
    check_model(validated("checked", {"model": options}))


def test_channels_last_gives_the_same_features():
    seed_all(0)
    model = from_facts("resnet18", n_pids=4).eval()
    images = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        plain = model(images)
        last = model.to(memory_format=torch.channels_last)(
            images.contiguous(memory_format=torch.channels_last)
        )
    torch.testing.assert_close(plain, last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_one_graph_without_breaks(training):
    seed_all(0)
    model = from_facts(pool="gem", n_pids=4).train(training)
    traced = torch.compile(model, backend="eager", fullgraph=True)
    images = torch.randn(4, 3, 48, 48)
    with torch.no_grad():
        ours, theirs = model(images), traced(images)
    if training:
        ours, theirs = ours[0].logits, theirs[0].logits
    torch.testing.assert_close(ours, theirs)


def test_macs_of_resnet50_are_the_known_ones():
    for size, stride, billions in [((256, 128), 2, 2.67), ((384, 128), 2, 4.00)]:
        model = on_paper(backbone="resnet50", last_stride=stride)
        assert count_macs(model, (1, 3, *size)) / 1e9 == pytest.approx(billions, abs=0.005)
        assert model.training
