"""Networks of timm behind our pools and heads: against timm's own answers, and files that do not fit."""

import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.testing import assert_close
from torchvision.models import resnet18

from reidlab.core.recipe import validated
from reidlab.core.seed import seed_all
from reidlab.jobs.starting_point import starting_point
from reidlab.models.catalogue import build_model
from reidlab.models.cost import count_parameters
from reidlab.models.finetune import take_weights
from reidlab.models.timm_backbone import TimmBackbone, plan_of, read_timm, resized_positions
from reidlab.training.network import architecture_of, costs_of, model_from_recipe, without_memory

PHOTO = (128, 64)


def twins(name, photo=PHOTO, **options):
    "Our backbone and timm's network with the same weights, and two photos."
    seed_all(0)
    ours = TimmBackbone(name, photo, **options).eval()
    whole = plan_of(name, photo, tokens=options.get("tokens", False)).options
    theirs = timm.create_model(name, **whole).eval()
    theirs.load_state_dict(ours.net.state_dict(), strict=False)
    return ours, theirs, torch.randn(2, 3, *photo)


def recipe(photo=PHOTO, pool="avg", neck="bnneck", head="linear", **backbone):
    "A recipe with a network of timm."
    size = {"height": photo[0], "width": photo[1]}
    parts = {"backbone": {"timm": backbone}, "pool": pool, "neck": neck, "head": head}
    return validated("timm", {"model": parts, "data": size})


# --- against timm ------------------------------------------------------------------------------

AVERAGED = (  # timm's head averages the map: conv, norm behind the pool, channels last, transformers
    *("test_resnet", "test_convnext", "test_efficientnet", "swin_tiny_patch4_window7_224"),
    *("test_vit2", "test_vit4", "test_vit_relpos", "test_coatnet"),
)


@pytest.mark.parametrize("name", AVERAGED)
@torch.no_grad()
def test_the_average_of_the_map_is_timms_own_answer(name):
    ours, theirs, photos = twins(name)
    maps = ours(photos)
    assert maps.dim() == 4 and maps.shape[1] == ours.out_channels
    assert maps.shape[2] == 2 * maps.shape[3], "rows before columns"
    assert_close(maps.mean((2, 3)), theirs(photos), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_eva_averages_behind_its_norm():
    ours, theirs, photos = twins("eva02_tiny_patch14_224", (112, 56), tokens=True)
    seen = ours(photos)
    assert_close(seen.maps.mean((2, 3)), theirs(photos), rtol=1e-5, atol=1e-5)
    assert ours.token_dims == (192,) and seen.maps.shape == (2, 192, 8, 4)
    assert_close(seen.tokens[0], theirs.fc_norm(theirs.forward_features(photos)[:, 0]))


@pytest.mark.parametrize(
    ("name", "first", "n_tokens"),  # prefix tokens, of which the last are registers
    [("test_vit", 1, 1), ("deit_tiny_distilled_patch16_224", 2, 2), ("test_vit3", 1, 0)],
)
@torch.no_grad()
def test_a_map_is_the_sequence_of_patches_row_by_row(name, first, n_tokens):
    ours, theirs, photos = twins(name, tokens=n_tokens > 0)
    seen, sequence = ours(photos), theirs.forward_features(photos)
    maps, tokens = seen if n_tokens else (seen, ())
    first = theirs.num_prefix_tokens
    assert maps.shape[2:] == (8, 4) and len(tokens) == n_tokens
    assert torch.equal(maps.flatten(2).transpose(1, 2), sequence[:, first:])
    for k, each in enumerate(tokens):
        assert torch.equal(each, sequence[:, k])


@torch.no_grad()
def test_what_a_head_makes_of_the_map_is_the_token():
    ours, theirs, photos = twins("mobilenetv3_small_050", tokens=True)
    assert ours.token_dims == (1024,)
    assert torch.equal(ours(photos).tokens[0], theirs(photos))
    bare = TimmBackbone("mobilenetv3_small_050", PHOTO)
    assert bare.token_dims == () and not any("conv_head" in key for key in bare.state_dict())


@torch.no_grad()
def test_earlier_stages_and_the_same_last_map():
    for name, channels in (("test_convnext", (24, 32, 48, 64)), ("test_vit", None)):
        ours, _, photos = twins(name)
        last = ours(photos)
        ours.taps = True
        *earlier, again = ours(photos)
        assert torch.equal(again, last) and len(earlier) == (3 if channels else len(earlier))
        assert getattr(ours, "tap_channels", None) == channels


def test_two_builds_of_a_seed_agree_and_gradients_reach_all():
    nets = []
    for _ in range(2):
        seed_all(5)
        with torch.no_grad():  # a trial of gradients goes on within
            plan_of.cache_clear()
            nets.append(
                build_model({"timm": {"name": "test_vit"}}, "token_gem", n_pids=4, photo=PHOTO)
            )
    for a, b in zip(*(net.state_dict().values() for net in nets), strict=True):
        assert torch.equal(a, b)
    (branch,) = nets[0](torch.randn(4, 3, *PHOTO))
    (branch.logits.square().sum() + branch.feat.square().sum()).backward()
    assert all(p.grad is not None for p in nets[0].parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "params"),  # without the classifier; a ViT has 68 patches fewer than at 224×224
    [
        *(
            ("resnet50", 23_508_032),
            ("convnext_tiny", 27_820_128),
            ("swin_tiny_patch4_window7_224", 27_519_354),
        ),
        *(
            ("vit_small_patch16_224", 21_665_664 - 68 * 384),
            ("vit_small_patch16_dinov3", 21_586_944),
        ),
        *(("efficientnet_lite0", 3_371_008), ("repvit_m1", 4_713_712)),
    ],
)
def test_parameters_at_256_by_128(name, params):
    with torch.device("meta"):
        assert count_parameters(TimmBackbone(name)) == params


# --- parts and recipes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("test_vit", {"pool": "token"}),
        ("test_vit", {"pool": "token_avg"}),
        ("test_vit", {"pool": "gem", "neck": {"bn": {"embedding": 16}}}),
        ("test_vit", {"head": {"pcb": {"stripes": 2}}, "neck": {"bn": {"embedding": 8}}}),
        ("test_convnext", {"neck": "fblneck"}),
        ("test_vit", {"neck": "blneck"}),
    ],
)
def test_every_part_works_behind_it(name, parts):
    r = recipe(name=name, drop_path=0.1, **parts)
    model = model_from_recipe(r, 4)
    branches = model(torch.randn(4, 3, *PHOTO))
    sum(b.logits.square().mean() for b in branches if b.logits is not None).backward()
    assert model.eval()(torch.randn(2, 3, *PHOTO)).shape == (2, model.feature_dim)
    costs, light = costs_of(model, r), costs_of(without_memory(r, 4), r)
    assert costs == light and costs["params"] == count_parameters(model)
    again = model_from_recipe(r, 4)
    again.load_state_dict(model.state_dict())
    assert architecture_of(again, r) == architecture_of(model, r)


def test_a_start_from_another_network_of_timm_is_refused():
    models = [build_model({"timm": {"name": n}}, n_pids=4) for n in ("test_vit", "test_resnet")]
    with pytest.raises(
        ValueError, match=r"backbone\.name is 'test_vit' there and 'test_resnet' here"
    ):
        take_weights(models[1], models[0].state_dict(), models[0].architecture)


@pytest.mark.parametrize(
    ("backbone", "photo", "message"),
    [
        (
            {"name": "vit_small_patch14_dinov2"},
            (256, 128),
            "4 rows and 2 columns .* 252×126 or 266×140",
        ),
        ({"name": "eva02_tiny_patch14_224"}, (256, 128), "would not be read"),
        ({"name": "test_convnext"}, (120, 64), "would not be read.* 96×64 or 128×64"),
        (
            {"name": "vit_small_patch16_dinov3"},
            (250, 125),
            "timm network 'vit_small_patch16_dinov3' at 250×125",
        ),
        ({"name": "test_vit", "drop_path": 1.0}, PHOTO, "less than 1"),
        ({"name": "repvit_m1", "drop_path": 0.1}, PHOTO, "takes no drop_path"),
        ({"name": "resnet5O"}, PHOTO, "timm network 'resnet5O' not found. Close names: resnet50"),
        ({"name": "resnet50.a1_in2k"}, PHOTO, "Close names: a1_in1k"),
        ({"name": "hf-hub:timm/resnet50"}, PHOTO, "not found"),
        ({"name": "local-dir:/tmp"}, PHOTO, "not found"),
        ({"name": "pit_s_224"}, PHOTO, "timm network 'pit_s_224' at 128×64"),
    ],
)
def test_what_cannot_be_built_is_said_in_a_line(backbone, photo, message):
    with pytest.raises(ValueError, match=message) as error:
        model_from_recipe(recipe(photo, **backbone), 4)
    assert "\n" not in str(error.value)


def test_a_pool_of_tokens_needs_some():
    with pytest.raises(ValueError, match=r"pool 'token' reads a token .* backbone 'timm' has none"):
        model_from_recipe(recipe(name="test_resnet", pool="token"), 4)
    with pytest.raises(ValueError, match="neck 'fblneck' looks at the maps of two stages"):
        model_from_recipe(recipe(name="test_vit", neck="fblneck"), 4)
    with pytest.raises(ValueError, match="built for photos of 128×64, got 64×64"):
        TimmBackbone("test_vit", PHOTO)(torch.zeros(1, 3, 64, 64))


# --- files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    "A network as timm trains it: square photos, 1,000 classes."
    seed_all(7)
    return timm.create_model("test_vit", num_classes=1000, img_size=224).state_dict()


@pytest.fixture
def saved(tmp_path):
    def save(state, name="file.pth"):
        path = tmp_path / name
        if name.endswith(".safetensors"):
            save_file({k: v.contiguous() for k, v in state.items()}, path)
        else:
            torch.save(state, path)
        return str(path)

    return save


@pytest.mark.parametrize("rule", ["bicubic", "bilinear"])
@pytest.mark.parametrize("form", ["bare.pth", "bare.safetensors", "wrapped.pth", "ours.pth"])
def test_a_file_is_loaded_whole(trained, saved, form, rule):
    state = {k.removeprefix("module."): v for k, v in trained.items()}
    wrap = {"wrapped.pth": "module.", "ours.pth": "backbone.net."}.get(form, "")
    state = {
        f"{wrap}{k}": v for k, v in state.items() if not wrap.endswith("net.") or "head" not in k
    }
    content = {"epoch": 3, "state_dict": state} if wrap == "module." else state
    named = {"name": "test_vit", "weights": saved(content, form), "position": rule}
    net = build_model({"timm": named}, n_pids=4, photo=PHOTO).backbone
    own = net.net.state_dict()
    for key in own.keys() - {"pos_embed"}:
        assert torch.equal(own[key], trained[key]), key
    table = resized_positions(trained["pos_embed"], (14, 14), (8, 4), rule=rule)
    assert torch.equal(own["pos_embed"], table)
    report = net.key_report(named["weights"])
    assert set(report.loaded) == {f"net.{k}" for k in own} and not report.fresh
    assert {*report.loaded.values(), *report.left} == {
        k.removeprefix("module.").removeprefix("backbone.net.") for k in state
    }


def test_timms_own_loader_agrees(trained, saved):
    path = saved(trained)
    overlay = {"file": path}
    theirs = timm.create_model(
        "test_vit", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, img_size=PHOTO
    ).state_dict()
    ours = build_model({"timm": {"name": "test_vit", "weights": path}}, n_pids=4, photo=PHOTO)
    for key, value in ours.backbone.net.state_dict().items():
        assert_close(value, theirs[key], rtol=0, atol=0)


def test_a_file_of_torchvision_and_one_of_half_precision(saved):
    seed_all(1)
    state = resnet18().state_dict()
    named = {"name": "resnet18", "weights": saved({k: v.half() for k, v in state.items()})}
    net = build_model({"timm": named}, n_pids=4).backbone
    assert torch.equal(
        net.net.layer4[1].conv2.weight, state["layer4.1.conv2.weight"].half().float()
    )
    assert net.key_report(named["weights"]).left == dict.fromkeys(
        ("fc.weight", "fc.bias"), "of the classifier"
    )


def test_a_table_that_is_no_square_needs_its_size(saved):
    tall = timm.create_model("test_vit", num_classes=0, img_size=(384, 128)).state_dict()
    named = {"name": "test_vit", "weights": saved(tall)}
    with pytest.raises(
        ValueError, match=r"192 patches, which is no square.*input_size: \[384, 128\]"
    ):
        build_model({"timm": named}, n_pids=4, photo=PHOTO)
    with pytest.raises(ValueError, match="which photos of 256×128 have not"):
        build_model({"timm": named | {"input_size": [256, 128]}}, n_pids=4, photo=PHOTO)
    told = {"timm": named | {"input_size": [384, 128], "position": "bilinear"}}
    net = build_model(told, n_pids=4, photo=PHOTO).backbone.net
    assert torch.equal(net.pos_embed, resized_positions(tall["pos_embed"], (24, 8), (8, 4)))
    same = build_model({"timm": named}, n_pids=4, photo=(384, 128)).backbone.net
    assert torch.equal(same.pos_embed, tall["pos_embed"])  # as many patches: nothing to tell


def test_a_norm_before_the_pool_is_found_behind_it(saved):
    name = "eva02_tiny_patch14_224"
    state = timm.create_model(name, num_classes=0).state_dict()
    moved = {
        k.replace("fc_norm.", "norm."): v + 1 if "fc_norm" in k else v for k, v in state.items()
    }
    net = TimmBackbone(name, (112, 56))
    found, report = read_timm(net, saved(moved))
    assert torch.equal(found["fc_norm.weight"], moved["norm.weight"])
    assert report.loaded["net.fc_norm.weight"] == "norm.weight" and not report.left


WRONG = {  # what the file is → the message
    "another": "does not fit timm's test_vit.*missing",
    "half": "missing .*blocks.1",
    "patches": "its patches are of 8×8 pixels, this network's of 16×16",
    "wider": "other shapes",
    "surplus": "unexpected .*adapter",
    "nan": "not finite",
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_refused_and_nothing_is_loaded(kind, trained, saved):
    files = {
        "another": timm.create_model("test_convnext").state_dict(),
        "half": {k: v for k, v in trained.items() if "blocks.1." not in k},
        "patches": trained | {"patch_embed.proj.weight": torch.zeros(64, 3, 8, 8)},
        "wider": timm.create_model("test_vit2").state_dict() | {"cls_token": torch.zeros(1, 1, 96)},
        "surplus": trained | {"adapter.weight": torch.zeros(3)},
        "nan": trained | {"norm.weight": torch.full((64,), torch.nan)},
    }
    net = TimmBackbone("test_vit", PHOTO)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match=WRONG[kind]) as error:
        model_from_recipe(recipe(name="test_vit", weights=saved(files[kind])), 4)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=re.escape("file.pth")):
        read_timm(net, saved(files[kind]))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_the_card_says_the_licence_and_another_normalisation(trained, saved):
    path = saved(trained)
    told = starting_point(recipe(name="test_vit.r160_in1k", weights=path), 4)
    assert "licence apache-2.0; mean 0.5, 0.5, 0.5, std 0.5, 0.5, 0.5" in told
    assert "WARNING: the recipe has mean 0.485, 0.456, 0.406" in told
    assert "2 left in the file" in told


@pytest.mark.parametrize(
    ("name", "photo", "token_dims"),
    [
        ("vit_small_patch14_reg4_dinov2", (252, 126), (384,)),
        ("vit_small_patch16_dinov3", (256, 128), (384,)),
        ("vit_base_patch16_siglip_224", (256, 128), (768,)),  # of its attention pool
        ("resnet50", (256, 128), ()),
    ],
)
def test_registers_are_no_tokens_and_an_attention_pool_is_one(name, photo, token_dims):
    assert plan_of(name, photo, tokens=True).token_dims == token_dims


@pytest.mark.slow
def test_a_file_of_dinov2s_authors(saved):
    name = "vit_small_patch14_reg4_dinov2"  # its table has a row of the class token, timm's has not
    theirs = timm.create_model(name, num_classes=0, img_size=518).state_dict()
    file = {k: v for k, v in theirs.items() if k not in ("reg_token", "pos_embed")}
    file |= {"register_tokens": theirs["reg_token"], "mask_token": torch.zeros(1, 384)}
    file["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), theirs["pos_embed"]], 1)
    path = saved(file)
    net = build_model(
        {"timm": {"name": name, "weights": path}}, n_pids=4, photo=(252, 126)
    ).backbone
    assert torch.equal(net.net.reg_token, theirs["reg_token"])
    table = resized_positions(theirs["pos_embed"], (37, 37), (18, 9), 0, rule="bicubic")
    assert_close(net.net.pos_embed, table)
    report = net.key_report(path)
    assert list(report.left) == ["mask_token"] and not report.fresh
    assert report.loaded["net.reg_token"] == "register_tokens"
