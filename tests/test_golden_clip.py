"""CLIP's towers as CLIP-ReID uses them: the ResNet against outputs of the authors' code, the transformer against its formula.

Outputs, probes and the names of two files lie in data/golden_clip.npz, copied from the golden data of the interchange; of
the transformer no outputs are stored, so it is written out here under the file's own names.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filling import filled, filled_state, photos
from torch.testing import assert_close

from reidlab.interchange.clip import CLIP_FAMILY, CLIP_REID_FAMILY
from reidlab.interchange.families import fill_backbone, read_foreign
from reidlab.interchange.key_rules import load_family
from reidlab.models.catalogue import build_model
from reidlab.models.clip_towers import clip_vit
from reidlab.models.cost import count_macs, count_parameters
from reidlab.models.weight_files import weights_of

DATA = Path(__file__).parent / "data"
GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "interchange"
shared = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared/golden/interchange")
REDUCED, WHOLE = "clip_rn_reduced", "clip_rn50"
SIZES = {REDUCED: (2, 3, 64, 32), WHOLE: (1, 3, 256, 128)}
PARAMETERS = {REDUCED: 1_630_424, WHOLE: 38_484_832}  # that the embedding sees, necks among them
MACS = {REDUCED: 18_510_848, WHOLE: 6_624_645_120}
PROBES = {  # theirs → ours
    "conv1": lambda net: net.stem.conv1.conv,
    "avgpool": lambda net: net.stem,
    **{f"layer{i + 1}": lambda net, i=i: net.stages[i] for i in range(4)},
}
CASES = [REDUCED, pytest.param(WHOLE, marks=pytest.mark.slow)]


@cache
def arrays():
    with np.load(DATA / "golden_clip.npz", allow_pickle=False) as stored:
        return dict(stored)


@cache
def file_of(case):
    "A file as it was published, of golden weights."
    return filled_state(arrays()[f"keys_{case}"].tolist())


def read(state, family=CLIP_REID_FAMILY, **told):
    "A network of ours, built for a file and filled with it; and the account of every tensor."
    facts, told = family.facts(state), family.asks | told
    model = build_model(**family.parts(facts, told), n_pids=facts["n_pids"] or 10).double()
    return model.eval(), load_family(model, state, family, told)


def read_case(case, **told):
    height, width = SIZES[case][2:]
    return read(file_of(case), height=height, width=width, **told)


def near(seen, there, share=1e-9):
    assert_close(seen, there, rtol=0, atol=share * float(there.abs().max()))


def golden(name):
    return torch.tensor(arrays()[name])


@pytest.mark.parametrize("case", CASES)
def test_embeddings(case):
    model, _ = read_case(case)
    images = photos(*SIZES[case])
    with torch.no_grad():
        near(model(images), golden(f"{case}__emb"))
        _, after = model.neck(model.pool(model.backbone(images)))
        near(torch.cat(after, 1), golden(f"{case}__emb_after_bn"))
        near(model.float()(images.float()), golden(f"{case}__emb").float(), 1e-3)
    beside, _ = read_case(case, neck_feat="after")
    if case == REDUCED:
        near(beside(images), golden(f"{case}__emb_after_bn"))


@pytest.mark.parametrize("case", CASES)
def test_inner_outputs(case):
    "Mean, deviation and largest magnitude of each stage: the first that differs would name the fault."
    model, _ = read_case(case)
    net, images, seen = model.backbone.net, photos(*SIZES[case]), {}
    for name, place in PROBES.items():
        note = lambda _, __, out, name=name: seen.update({name: out})
        place(net).register_forward_hook(note)
    with torch.no_grad():
        model(images)
    probes = json.loads(str(arrays()["probes"]))[case]
    for name, out in seen.items():
        there = probes[f"image_encoder.{name}"]
        assert list(out.shape) == there["shape"]
        found = [out.mean(), out.std(correction=0), out.abs().max()]
        assert_close(
            torch.stack(found),
            torch.tensor([there["mean"], there["std"], there["absmax"]]).double(),
            rtol=1e-7,  # the largest magnitude is stored in single precision
            atol=1e-9,
        )
    assert len(seen) == len(PROBES)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_has_a_place_and_the_costs_are_the_published_ones(case):
    state = file_of(case)
    model, report = read_case(case)
    assert set(report.loaded) == set(model.state_dict()) and not report.fresh and not report.left
    assert sorted(report.loaded.values()) == sorted(state)
    assert count_parameters(model) - count_parameters(model.head) == PARAMETERS[case]
    assert count_macs(model, (1, *SIZES[case][1:])) == MACS[case]


def test_wrong_readings_are_told_apart():
    "Each is another network with the same names and shapes."
    images, there, seen = photos(*SIZES[REDUCED]), golden(f"{REDUCED}__emb"), {}

    def off(name, state=None, **told):
        height, width = SIZES[REDUCED][2:]
        model, _ = read(state or file_of(REDUCED), height=height, width=width, **told)
        with torch.no_grad():
            seen[name] = float((model(images) - there).abs().max())

    state = dict(file_of(REDUCED))
    q, k = (f"image_encoder.attnpool.{x}_proj.weight" for x in "qk")
    off("query and key exchanged", state | {q: state[k], k: state[q]})
    table = "image_encoder.attnpool.positional_embedding"
    off("positions column by column", state | {table: state[table][[0, 1, 3, 5, 7, 2, 4, 6, 8]]})
    assert min(seen.values()) > 1e-6, seen


# --- the transformer, written out -----------------------------------------------------------


def vit_names(dim=64, depth=2, projected=32, positions=11, cameras=0, pids=5):
    "Names and shapes of a file of CLIP-ReID's with a transformer."
    found = {"class_embedding": (dim,), "positional_embedding": (positions, dim)}
    found |= {"proj": (dim, projected), "conv1.weight": (dim, 3, 16, 16)}
    for i in range(depth):
        block = {f"ln_{j}.{x}": (dim,) for j in (1, 2) for x in ("weight", "bias")}
        block |= {"attn.in_proj_weight": (3 * dim, dim), "attn.in_proj_bias": (3 * dim,)}
        block |= {"attn.out_proj.weight": (dim, dim), "attn.out_proj.bias": (dim,)}
        block |= {"mlp.c_fc.weight": (4 * dim, dim), "mlp.c_fc.bias": (4 * dim,)}
        block |= {"mlp.c_proj.weight": (dim, 4 * dim), "mlp.c_proj.bias": (dim,)}
        found |= {f"transformer.resblocks.{i}.{k}": v for k, v in block.items()}
    found |= {f"ln_{at}.{x}": (dim,) for at in ("pre", "post") for x in ("weight", "bias")}
    found = {f"image_encoder.{k}": v for k, v in found.items()}
    for name, width in (("", dim), ("_proj", projected)):
        found |= {f"classifier{name}.weight": (pids, width)}
        norm = ("weight", "bias", "running_mean", "running_var")
        found |= {f"bottleneck{name}.{x}": (width,) for x in norm}
    return found | ({"cv_embed": (cameras, dim)} if cameras else {})


def vit_file(**numbers):
    return {name: filled(name, shape) for name, shape in vit_names(**numbers).items()}


def by_hand(state, images, stride, cameras=None, coefficient=1.0):
    "CLIP's transformer in the words of its own names; the feature beside its projection."
    at = {k.removeprefix("image_encoder."): v for k, v in state.items()}
    norm = lambda x, name: F.layer_norm(
        x, x.shape[-1:], at[f"{name}.weight"], at[f"{name}.bias"], 1e-5
    )
    x = F.conv2d(images, at["conv1.weight"], stride=stride).flatten(2).transpose(1, 2)
    first = at["class_embedding"].expand(len(x), 1, -1)
    if cameras is not None:
        first = first + coefficient * at["cv_embed"][cameras][:, None]
    x = norm(torch.cat([first, x], 1) + at["positional_embedding"], "ln_pre")
    depth, dim = len({k.split(".")[2] for k in at if "resblocks" in k}), x.shape[-1]
    for i in range(depth):
        block = f"transformer.resblocks.{i}"
        own = lambda name, block=block: at[f"{block}.{name}"]
        y = norm(x, f"{block}.ln_1") @ own("attn.in_proj_weight").T + own("attn.in_proj_bias")
        q, k, v = (z.unflatten(2, (-1, 64)).transpose(1, 2) for z in y.split(dim, 2))
        weights = (q @ k.transpose(2, 3) / 8).softmax(3)
        y = (weights @ v).transpose(1, 2).flatten(2)
        x = x + y @ own("attn.out_proj.weight").T + own("attn.out_proj.bias")
        y = norm(x, f"{block}.ln_2") @ own("mlp.c_fc.weight").T + own("mlp.c_fc.bias")
        y = y * torch.sigmoid(1.702 * y)
        x = x + y @ own("mlp.c_proj.weight").T + own("mlp.c_proj.bias")
    feature = norm(x[:, 0], "ln_post")
    return torch.cat([feature, feature @ at["proj"]], 1)


@pytest.mark.parametrize(("stride", "positions"), [(16, 9), (12, 11)])
def test_the_transformer_is_its_formula(stride, positions):
    "Alone and with cameras, with patches that overlap and patches that do not."
    told = {"height": 64, "width": 32, "stride": stride, "camera_coefficient": 1.5}
    images, cameras = photos(3, 3, 64, 32), torch.tensor([2, 0, 1])
    for n in (0, 3):
        state = vit_file(positions=positions, dim=128, cameras=n)
        model, report = read(state, **told)
        assert set(report.loaded.values()) == set(state) and not report.left
        where = (cameras, 1.5) if n else ()
        with torch.no_grad():
            seen = model(images, cameras) if n else model(images)
            there = by_hand(state, images, stride, *where)
            near(seen, there)
            plain, _ = read(state, activation="gelu", **told)
            assert (plain(images, cameras) - there).abs().max() > 1e-3


def test_the_transformer_is_timms():
    from timm import create_model

    torch.manual_seed(0)
    shape = {"embed_dim": 64, "depth": 2, "num_heads": 1, "img_size": (64, 32), "num_classes": 32}
    net = create_model("vit_base_patch16_clip_quickgelu_224", pretrained=False, **shape)
    net = net.double().eval()
    ours = clip_vit(64, 2, projected=32, photo=(64, 32), tokens=True).double().eval()
    state = net.state_dict()
    state.pop("head.bias")  # CLIP's projection has none
    ours.net.load_state_dict(state)
    with torch.no_grad():
        net.head.bias.zero_()
        images = photos(2, 3, 64, 32)
        maps, (feature, projection) = ours(images)
        z = net.forward_features(images)
        near(feature, z[:, 0])
        near(projection, net(images))
        near(maps.flatten(2).transpose(1, 2), z[:, 1:])


@pytest.mark.slow
def test_the_published_transformer_is_timms():
    "ViT-B/16 in whole; the sibling without quickgelu in its name takes the same weights and is another."
    from timm import create_model

    state = vit_file(dim=768, depth=12, projected=512, positions=129)
    model, _ = read(state)
    assert count_parameters(model) - count_parameters(model.head) == 86_142_976
    images = photos(1, 3, 256, 128)
    with torch.no_grad():
        near(model(images), by_hand(state, images, 16))
        ours, off = model(images)[:, 768:], {}
        for name in ("vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_clip_224"):
            net = create_model(
                name, pretrained=False, num_classes=512, img_size=(256, 128)
            ).double()
            theirs = model.backbone.net.state_dict()
            net.load_state_dict(theirs | {"head.bias": torch.zeros(512).double()})
            off[name] = float((net.eval()(images) - ours).abs().max() / ours.abs().max())
    assert (
        off["vit_base_patch16_clip_quickgelu_224"] < 1e-9
        and off["vit_base_patch16_clip_224"] > 1e-3
    )


# --- files ----------------------------------------------------------------------------------


def clips_own(**numbers):
    "A plain file of CLIP's: its tower in half precision, the side that reads, three numbers."
    tower = {k: v for k, v in vit_file(**numbers).items() if k.startswith("image_encoder.")}
    state = {k.replace("image_encoder.", "visual."): v.half() for k, v in tower.items()}
    state |= {"positional_embedding": torch.ones(77, 8), "token_embedding.weight": torch.ones(9, 8)}
    state |= {
        "transformer.resblocks.0.ln_1.weight": torch.ones(8),
        "text_projection": torch.ones(8, 8),
    }
    numbers = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}
    return state | {k: torch.tensor(v) for k, v in numbers.items()}


def test_clips_own_file_in_half_precision(tmp_path):
    state = clips_own(positions=197)
    torch.save(state, tmp_path / "clip.pt")
    state = weights_of(tmp_path / "clip.pt").state
    model, report = read(state, CLIP_FAMILY, height=64, width=32)
    assert set(report.left) == {k for k in state if not k.startswith("visual.")}
    assert all(k.startswith(("neck.", "head.")) for k in report.fresh)
    tower = {k: v for k, v in state.items() if k.startswith("visual.")}
    single = {k.replace("visual.", "image_encoder."): v.double() for k, v in tower.items()}
    square = single["image_encoder.positional_embedding"]
    picture = square[1:].T.reshape(1, 64, 14, 14)
    resized = F.interpolate(picture, (4, 2), mode="bilinear").flatten(2)[0].T
    single["image_encoder.positional_embedding"] = torch.cat([square[:1], resized])
    images = photos(2, 3, 64, 32)
    with torch.no_grad():
        near(model(images), by_hand(single, images, 16))


def as_module(state):
    "A module with these names, as an archive is made of one."
    root = torch.nn.Module()
    for key, value in state.items():
        *path, last = key.split(".")
        inner = root
        for name in path:
            if not hasattr(inner, name):
                inner.add_module(name, torch.nn.Module())
            inner = getattr(inner, name)
        inner.register_buffer(last, value)
    return root


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_clips_own_archive_is_read_as_its_tensors_are(tmp_path):
    "Its downloads are TorchScript: the tensors are read, the code is not run."
    state = clips_own(positions=9, depth=1)
    torch.jit.script(as_module(state)).save(str(tmp_path / "ViT-B-16.pt"))
    found = weights_of(tmp_path / "ViT-B-16.pt").state
    assert found.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in found.items())
    model, _ = read(found, CLIP_FAMILY, height=64, width=32)
    plain, _ = read(state, CLIP_FAMILY, height=64, width=32)
    with torch.no_grad():
        assert torch.equal(model(photos(1, 3, 64, 32)), plain(photos(1, 3, 64, 32)))


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_clips_own_tower_starts_a_network_of_another_size(tmp_path, pool):
    torch.save(clips_own(positions=197), tmp_path / "clip.pt")
    found = read_foreign(tmp_path / "clip.pt")
    tower = {"clip_vit": {"dim": 64, "depth": 2, "projected": 32, "photo": [64, 32]}}
    model = build_model(tower, pool=pool, n_pids=5)
    report = fill_backbone(model, found)
    assert found.name == "clip" and all(k.startswith(("neck.", "head.")) for k in report.fresh)
    assert model.backbone.net.pos_embed.shape == (1, 9, 64)
    assert model.backbone.net.head.weight.requires_grad == (pool == "token")
    model(photos(2, 3, 64, 32).float())[0].logits.sum().backward()
    idle = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle


def test_the_side_that_reads_stays_behind():
    state = vit_file(positions=9) | {"text_encoder.ln_final.weight": torch.ones(8)}
    state |= {
        "prompt_learner.cls_ctx": torch.ones(5, 4, 8),
        "prompt_learner.token_prefix": torch.ones(5),
    }
    _, report = read(state, height=64, width=32)
    assert set(report.left) == {k for k in state if k.startswith(("text_", "prompt_"))}
    numbers = {"bottleneck.num_batches_tracked", "bottleneck_proj.num_batches_tracked"}
    assert len(report.fresh) == len(numbers)


@shared
def test_kept_numbers_are_the_golden_ones():
    with np.load(GOLDEN / "outputs.npz", allow_pickle=False) as stored:
        for key in [k for k in stored if k.startswith("clip_")]:
            np.testing.assert_array_equal(stored[key], arrays()[key])
    cases = json.loads((GOLDEN / "cases.json").read_text())
    probes = json.loads((GOLDEN / "probes.json").read_text())
    for case, size in SIZES.items():
        assert json.loads(str(arrays()["probes"]))[case] == probes[case]
        there = json.loads((GOLDEN / f"keys/{case}.json").read_text())
        rows = [" ".join([key, *map(str, shape)]) for key, shape, _ in there]
        assert rows == arrays()[f"keys_{case}"].tolist()
        assert cases[case]["macs"] == {f"{size[2]}x{size[3]}": MACS[case]}
        assert cases[case]["params_used_for_embedding"] == PARAMETERS[case]
