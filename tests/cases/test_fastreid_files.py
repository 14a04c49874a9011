"""Files as users of fast-reid have them, each read or refused in a line; and photos resized as such a network learned."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_recipe
from PIL import Image
from torch.testing import assert_close

from reidlab.core.seed import seed_all
from reidlab.data.loaders import eval_loader, open_data, open_photos
from reidlab.data.packed import packed_files
from reidlab.data.transforms import normalise, read_photo
from reidlab.interchange.families import (
    FAMILIES,
    Foreign,
    family_of,
    foreign_network,
    read_foreign,
    recognise,
)
from reidlab.interchange.fast_reid import (
    FAST_REID_ASKS,
    fast_reid_data,
    fast_reid_facts,
    fast_reid_parts,
    fast_reid_rules,
)
from reidlab.interchange.key_rules import rename_state
from reidlab.interchange.weights_out import unsaid
from reidlab.models.catalogue import build_model
from reidlab.models.weight_files import state_of
from reidlab.training.adopt import adopt
from reidlab.training.network import build_network
from reidlab.training.trained import load_model

THEIRS = (
    ("neck.norm.", "heads.bottleneck.0."),
    ("head.classifier.weight", "heads.weight"),
    ("pool.p", "heads.pool_layer.p"),
    (".bn2.gate.fc1.", ".se.fc.0."),
    (".bn2.gate.fc2.", ".se.fc.2."),
)
PIXELS = {"pixel_mean": (123.675, 116.28, 103.53), "pixel_std": (58.395, 57.12, 57.375)}
PHOTOS = torch.linspace(-2, 2, 2 * 3 * 64 * 32).reshape(2, 3, 64, 32).sin() * 2


def published(names=THEIRS, depth=18, pool="avg", n_pids=7, **options):
    "A small network, and its tensors as fast-reid names them today."
    seed_all(0)
    options = {"resnet_fastreid": {"depth": depth, **options}}
    model = build_model(options, pool=pool, n_pids=n_pids).eval()
    state = model.state_dict()
    for ours, theirs in names:
        state = {key.replace(ours, theirs): value for key, value in state.items()}
    return model, state


@pytest.fixture(scope="module")
def plain():
    "One network and its file's tensors, for whoever changes nothing in them."
    return published()


def old(state, neck="heads.bnneck."):
    "The same file as it was written before March 2021."
    found = {k.replace("heads.bottleneck.0.", neck): v for k, v in state.items()}
    found["heads.classifier.weight"] = found.pop("heads.weight")
    return found | {k: torch.tensor(v).view(1, 3, 1, 1) for k, v in PIXELS.items()}


def saved(tmp_path, content):
    torch.save(content, tmp_path / "model_final.pth")
    return tmp_path / "model_final.pth"


def opened(content):
    "What read_foreign gives of a file with this content."
    state = state_of(content, "model_final.pth").state
    name = family_of(state)
    return Foreign(Path("model_final.pth"), name, state, facts=FAMILIES[name].facts(state))


def answer(model):
    with torch.no_grad():
        return model.eval()(PHOTOS)


WRAPPED = {
    "as it is": lambda s: s,
    "under model": lambda s: {"model": s},
    "data parallel": lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    "beside a training": lambda s: {
        "model": s,
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.ones(3)}},
            "param_groups": [{"lr": 1}],
        },
        "scheduler": {"last_epoch": 3},
        "iteration": 7,
    },
    "arrays": lambda s: {
        "model": {k: v.numpy() for k, v in s.items()},
        "__author__": "someone",
        "matching_heuristics": True,
    },
    "half": lambda s: {
        "model": {k: v.half() if v.is_floating_point() else v for k, v in s.items()}
    },
}


@pytest.mark.parametrize("form", WRAPPED)
def test_whatever_is_around_the_tensors(form, plain, tmp_path):
    source, state = plain
    content = WRAPPED[form](dict(state))
    found = read_foreign(saved(tmp_path, content)) if form == "arrays" else opened(content)
    assert found.name == "fastreid" and found.facts["n_pids"] == 7
    model, report = foreign_network(found)
    assert list(report.left) == ["heads.weight"]
    assert all(v.dtype in (torch.float32, torch.int64) for v in model.state_dict().values())
    close = {"rtol": 0, "atol": 0.05} if form == "half" else {"rtol": 0, "atol": 0}
    assert_close(answer(model), answer(source), **close)


@pytest.mark.parametrize(
    ("era", "told", "stem"),
    [
        ("heads.bnneck.", {}, "padded"),
        ("heads.bottleneck.0.", {"stem_pool": "padded"}, "padded"),
        ("heads.bottleneck.0.", {"stem_pool": "ceil"}, "ceil"),
    ],
)
def test_every_era_has_its_stem(era, told, stem):
    source, state = published(stem_pool=stem)
    found = opened({"model": old(state, era)})
    model, report = foreign_network(found, told)
    assert set(report.left) == {"heads.classifier.weight", *PIXELS}
    assert_close(answer(model), answer(source), rtol=0, atol=0)
    data = fast_reid_data(found.facts, FAST_REID_ASKS | told)
    assert data["data.mean"] == [0.485, 0.456, 0.406] and data["data.interpolation"] == "bicubic"


def test_a_person_decides_where_no_key_does_and_is_warned_where_one_does(plain):
    _, state = plain
    between, new = fast_reid_facts(old(state, "heads.bottleneck.0.")), fast_reid_facts(state)
    for said in ("", "same"):
        with pytest.raises(ValueError, match=r"^stem_pool needs padded .* or ceil [^\n]*$"):
            fast_reid_parts(between, FAST_REID_ASKS | {"stem_pool": said})
    with pytest.warns(
        UserWarning, match="by its names the file had stem_pool ceil; padded is used"
    ):
        parts = fast_reid_parts(new, FAST_REID_ASKS | {"stem_pool": "padded"})
    assert parts["backbone"]["resnet_fastreid"]["stem_pool"] == "padded"


VARIANTS = {
    "instance norms": {"ibn": True},
    "gates": {"squeeze": True},
    "a learned exponent": {"pool": {"gem": {"p": 2.6}}},
    "many people": {"n_pids": 4101},
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_what_names_and_shapes_say(kind):
    source, state = published(**VARIANTS[kind])
    model, report = foreign_network(opened({"model": state}))
    assert list(report.left) == ["heads.weight"]
    assert_close(answer(model), answer(source), rtol=0, atol=0)


def test_a_reduced_embedding_is_a_convolution_in_the_neck(plain):
    source, state = plain
    reduce = torch.randn(32, 512, 1, 1) / 20
    neck = {f"heads.bottleneck.1.{k}": v for k, v in torch.nn.BatchNorm1d(32).state_dict().items()}
    state = {k: v for k, v in state.items() if not k.startswith("heads.")}
    state |= neck | {"heads.bottleneck.0.weight": reduce, "heads.weight": torch.zeros(7, 32)}
    model, _ = foreign_network(opened({"model": state}))
    with torch.no_grad():
        pooled = source.pool(source.backbone(PHOTOS))
    expected = pooled @ reduce[..., 0, 0].T / (1 + 1e-5) ** 0.5
    assert_close(answer(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("non_local", ["one", "half"])
@pytest.mark.parametrize("depth", [50, 101])
def test_non_local_blocks_have_their_place_and_width(depth, non_local):
    with torch.device("meta"):
        _, state = published(depth=depth, non_local=non_local, pool={"gem": {"learned": False}})
        mixed = [k for k in state if re.fullmatch(r"backbone\.NL_\d\.\d+\.W\.1\.running_mean", k)]
        assert len(mixed) == {50: 5, 101: 11}[depth]
        facts = fast_reid_facts(state)
        parts = fast_reid_parts(facts, FAST_REID_ASKS)
        assert (facts["depth"], facts["non_local"]) == (depth, non_local)
        assert parts["pool"] == {"gem": {"learned": False}}
        shapes = {k: v.shape for k, v in build_model(**parts, n_pids=7).state_dict().items()}
    found = rename_state(state, fast_reid_rules(facts, FAST_REID_ASKS))
    assert {k: v.shape for k, v in found.state.items()} == {
        k: v for k, v in shapes.items() if not k.startswith("head.")
    }


def blank(*names, shape=(4, 4)):
    return {name: torch.zeros(shape) for name in names}


ODD = {  # what a file holds → what its one line says
    "heads alone": (blank("heads.weight", "heads.bottleneck.0.weight"), "heads alone"),
    "MGN": (
        blank("backbone.0.weight", "b1.0.conv1.weight", "b1_head.bottleneck.0.weight"),
        "eight heads on three branches",
    ),
    "ResNeSt": (blank("backbone.conv1.0.weight", "heads.weight"), "no plain ResNet"),
    "OSNet": (blank("backbone.conv1.conv.weight", "heads.weight"), "no plain ResNet"),
    "RepVGG": (blank("backbone.stage0.rbr_dense.conv.weight", "heads.weight"), "no plain ResNet"),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_file_that_is_not_read_says_what_it_is(kind, tmp_path):
    state, words = ODD[kind]
    assert recognise(state) == ["fastreid"]
    with pytest.raises(ValueError, match=words) as said:
        read_foreign(saved(tmp_path, {"model": state}))
    assert "\n" not in str(said.value) and "model_final.pth, of fast-reid" in str(said.value)


def grouped(state):
    key = "backbone.layer3.0.conv2.weight"
    return state | {key: state[key][:, :8].clone()}


BROKEN = {
    "ResNeXt": (grouped, "no plain ResNet"),
    "without a tensor": (
        lambda s: {k: v for k, v in s.items() if k != "backbone.layer4.1.bn2.bias"},
        r"backbone\.layer4\.1\.bn2\.bias is missing",
    ),
    "without a stage": (
        lambda s: {k: v for k, v in s.items() if "layer4" not in k},
        "backbone.layer4.0.bn1.bias is missing",
    ),
    "a neck of another width": (
        lambda s: {
            k: v[:100].clone() if "bottleneck" in k and v.dim() else v for k, v in s.items()
        },
        r"heads\.bottleneck\.0\.bias is \(100,\), not \(512,\)",
    ),
    "a branch more": (
        lambda s: s | blank("attribute.weight"),
        "attribute.weight has no place here",
    ),
    "both necks": (
        lambda s: (
            s | {k.replace("bottleneck.0", "bnneck"): v for k, v in s.items() if "bottle" in k}
        ),
        "reduction head of 2020",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_does_not_fit_is_refused_in_a_line(kind, plain):
    change, words = BROKEN[kind]
    with pytest.raises(ValueError, match=words) as said:
        foreign_network(opened({"model": change(dict(plain[1]))}))
    assert "\n" not in str(said.value)


def test_an_adopted_run_sees_photos_as_fast_reid_did(plain, photos, tmp_path):
    _, state = plain
    recipe = tiny_recipe()
    told = {"height": 48, "width": 24}
    run, _ = adopt(saved(tmp_path, {"model": state}), recipe, "theirs", root=tmp_path, **told)
    data = run.recipe.data
    assert (data.interpolation, data.height, data.width) == ("bicubic", 48, 24)
    assert run.recipe.evaluate.metric == "cosine"
    model, content = load_model(run.path)
    assert content["architecture"]["interpolation"] == "bicubic"
    assert "interpolation bicubic" in unsaid(
        "strong", content["architecture"]
    )  # if it leaves again
    some = open_data(recipe.data, 0, photos).train.take(np.arange(3))
    seen = next(iter(eval_loader(some, data))).images
    for image, path in zip(seen, some.paths, strict=True):
        with Image.open(some.root / path) as picture:
            pixels = picture.convert("RGB").resize((24, 48), Image.Resampling.BICUBIC)
        by_hand = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
        assert_close(image, normalise(by_hand, data.mean, data.std), rtol=0, atol=1e-6)
    assert model(seen).shape == (3, 512)


def test_a_pack_made_by_one_rule_is_not_used_by_another(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("REIDLAB_CACHE_DIR", str(tmp_path))
    recipe = tiny_recipe()
    train = open_data(recipe.data, 0, photos).train
    some = train.take(np.arange(4))._replace(whole=None)
    for cache in ("on", "auto", "off"):  # the second time both packs are there
        for rule in ("bilinear", "bicubic"):
            files = open_photos(some, 40, 24, cache, interpolation=rule)
            path = some.root / some.paths[1]
            assert torch.equal(files[1], read_photo(path, 40, 24, rule)), (cache, rule)
            assert files.place == ("files" if cache == "off" else "disk")
    assert len(packed_files(tmp_path)) == 2
    both = [open_photos(some, 40, 24, "on", interpolation=r)[1] for r in ("bilinear", "bicubic")]
    assert not torch.equal(*both)


def test_a_backbone_begins_with_a_file_and_no_look_alike_does(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("REIDLAB_WEIGHTS_DIR", str(tmp_path))
    source, state = plain
    begun = lambda backbone, **options: build_network(
        tiny_recipe(model__backbone={backbone: {"weights": "model_final.pth", **options}}), 5
    )
    for content in (state, old(state, "heads.bottleneck.0.")):
        saved(tmp_path, {"model": content})
        with pytest.raises(
            ValueError, match="it holds resnet_fastreid, and the recipe's backbone is"
        ):
            begun("resnet18")  # whose stem is another, though every name and shape agrees
        model = begun("resnet_fastreid", depth=18).eval()
        with torch.no_grad():
            assert torch.equal(model.backbone(PHOTOS), source.backbone(PHOTOS))
