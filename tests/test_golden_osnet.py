"""OSNet as torchreid publishes it, against the outputs of the authors' code, on weights filled by a rule of their names.

Outputs lie in data/golden_osnet.npz, copied from the golden data of the interchange; a wrong name is another weight.
"""

import json
import math
import os
import re
from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from test_golden_cdnet import MASK, fill, hashed, waves
from torch.testing import assert_close

from reidlab.interchange.baseline_weights import (
    Layer,
    baseline_facts,
    baseline_key,
    baseline_parts,
    baseline_state,
    load_baseline,
    onnx_module,
    read_state,
    unfolded,
)
from reidlab.models.catalogue import build_model

DATA = Path(__file__).parent / "data"
GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "interchange"
shared = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared/golden/interchange")
CASES = {"osnet_x1_0": (1.0, "bn"), "osnet_x0_25": (0.25, "bn"), "osnet_ibn_x1_0": (1.0, "ibn")}


def filled(width, norm, n_pids=751):
    "A network with the golden weights, brought in as a published file is."
    blank = build_model(
        {"osnet_published": {"width": width, "norm": norm}}, neck="fc", n_pids=n_pids
    )
    shapes = {baseline_key(k, "torchreid"): tuple(v.shape) for k, v in blank.state_dict().items()}
    state = {name: fill(name, shape, torch.float64) for name, shape in shapes.items()}
    state = {k: v.float().double() if v.is_floating_point() else v for k, v in state.items()}
    model = build_model(**baseline_parts(baseline_facts(state)), n_pids=n_pids).double()
    report = load_baseline(model, state, "torchreid")
    assert not report.left and not report.fresh
    return model.eval()


@cache
def arrays():
    with np.load(DATA / "golden_osnet.npz", allow_pickle=False) as stored:
        return dict(stored)


def photos(*shape):
    "The golden data's input: a slow wave and noise."
    i = np.arange(math.prod(shape), dtype=np.uint64)
    noise = hashed((i * 2654435761 + crc32(b"input")) & MASK) - 0.5
    return waves(shape, torch.float64) + torch.tensor(noise.reshape(shape))


@pytest.mark.parametrize("case", CASES)
def test_embeddings(case):
    model = filled(*CASES[case])
    for size in ((2, 3, 128, 64), (1, 3, 256, 128)):
        expected = torch.tensor(arrays()[f"{case}__emb_{'x'.join(map(str, (size[0], *size[2:])))}"])
        with torch.no_grad():
            seen = model(photos(*size))
        assert_close(seen, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


def test_logits():
    model = filled(0.25, "bn")
    with torch.no_grad():
        _, vector = model.neck(model.pool(model.backbone(photos(2, 3, 128, 64))))
        seen = model.head.classifier(vector)[:, :32]
    expected = torch.tensor(arrays()["osnet_x0_25__logits_2x128x64"])
    assert_close(seen, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


@shared
@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_are_those_of_a_published_file(case):
    there = {
        k: tuple(shape) for k, shape, _ in json.loads((GOLDEN / f"keys/{case}.json").read_text())
    }
    ours = {k: tuple(v.shape) for k, v in baseline_state(filled(*CASES[case]), "torchreid").items()}
    assert list(ours.items()) == list(there.items())
    with np.load(GOLDEN / "outputs.npz", allow_pickle=False) as stored:
        for key in [k for k in stored if k.startswith(f"{case}__")]:
            np.testing.assert_array_equal(stored[key], arrays()[key])


@pytest.mark.parametrize("norm", ["bn", "ibn", "ain"])
def test_a_file_shows_its_network_and_half_a_file_is_refused(norm):
    state = baseline_state(
        build_model({"osnet_published": {"width": 0.25, "norm": norm}}, neck="fc", n_pids=7),
        "torchreid",
    )
    assert {k: baseline_facts(state)[k] for k in ("width", "norm", "n_pids")} == {
        "width": 0.25,
        "norm": norm,
        "n_pids": 7,
    }
    model = build_model(**baseline_parts(baseline_facts(state)), n_pids=7)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    del state["conv4.1.gate.fc2.bias"]
    with pytest.raises(ValueError, match=r"conv4\.1\.gate\.fc2\.bias is missing"):
        load_baseline(model, state, "torchreid")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def folded(state):
    "A network's layers as an exporter leaves them: batch norms gone into the convolutions before them."
    layers = []
    for key in [k for k in state if k.endswith(".weight") and not re.search(r"bn\.|fc\.1\.", k)]:
        module, weight = key.removesuffix(".weight"), state[key]
        norm = f"{module.rpartition('.')[0]}.bn"
        if state[key].ndim < 4 or ".gate." in module or f"{norm}.weight" not in state:
            layers.append(Layer("Conv", module, (weight, state[f"{module}.bias"])))
        elif re.search(r"\.conv1$", module) and f"{module.removesuffix('1')}2.weight" in state:
            layers.append(Layer("Conv", module, (weight,)))  # of a light unit, which has no norm
        else:
            gamma, beta, mean, var = (
                state[f"{norm}.{n}"] for n in ("weight", "bias", "running_mean", "running_var")
            )
            scale = gamma / (var + 1e-5).sqrt()
            tensors = weight * scale[:, None, None, None], beta - mean * scale
            layers.append(Layer("Conv", module, tensors))
    last = [state[f"fc.1.{n}"] for n in ("weight", "bias", "running_mean", "running_var")]
    layers = [x._replace(op="Gemm") if x.module.startswith("fc.") else x for x in layers]
    return [x for x in layers if not x.module.startswith("classifier")] + [
        Layer("BatchNormalization", "fc.1", tuple(last))
    ]


def test_a_folded_network_embeds_as_it_did():
    model = filled(0.25, "bn")
    state = unfolded(folded(baseline_state(model, "torchreid")))
    assert baseline_facts(state)["n_pids"] == 0
    back = build_model(**baseline_parts(baseline_facts(state)), n_pids=3).double().eval()
    assert set(load_baseline(back, state, "torchreid").fresh.values()) == {
        "not there",
        "a counter that older files lack",
    }
    with torch.no_grad():
        expected, seen = model(photos(1, 3, 64, 32)), back(photos(1, 3, 64, 32))
    assert_close(seen, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("node", "module"),
    [
        ("/conv1/conv/Conv", "conv1.conv"),
        ("/conv2/conv2.0/conv2a/conv1/Conv", "conv2.0.conv2a.conv1"),
        ("/conv3/conv3.1/conv2d/conv2d.3/conv2/Conv_7", "conv3.1.conv2d.3.conv2"),
        ("/conv2/conv2.2/conv2.2.0/conv/Conv", "conv2.2.0.conv"),
        ("/conv4/conv4.1/gate/fc2_3/Conv", "conv4.1.gate.fc2"),
        ("/fc/fc.0/Gemm", "fc.0"),
        ("Conv_12", ""),
    ],
)
def test_a_node_names_its_place(node, module):
    assert onnx_module(node) == module


@shared
def test_the_public_onnx_file():
    pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
    file = os.environ.get("OSNET_ONNX", "")
    if not file:
        pytest.skip("needs the public osnet_x0_25_msmt17.onnx at OSNET_ONNX")
    state = read_state(file)
    model = build_model(**baseline_parts(baseline_facts(state)), n_pids=3).eval()
    load_baseline(model, state, "torchreid")
    with np.load(GOLDEN / "onnx_osnet_x0_25_msmt17.npz", allow_pickle=False) as stored:
        expected = torch.tensor(stored["output"])
    with torch.no_grad():
        seen = model(photos(2, 3, 256, 128).float())
    assert_close(seen, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
