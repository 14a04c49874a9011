"""Graphs in half precision, in eight bits and in OpenVINO's form: what survives, what is refused, what is lost."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reidlab.core.run import open_run
from reidlab.core.settings import project_root
from reidlab.deploy.contract import Contract, run_of
from reidlab.deploy.embedder import Embedder
from reidlab.deploy.export import calibration_batches, export_run
from reidlab.deploy.onnx import OnnxNetwork, example_of, write_onnx
from reidlab.deploy.parity import PARITY, parity_of
from reidlab.deploy.quantise import CALIBRATION, PRECISION, to_fp16, to_int8
from reidlab.models.catalogue import build_model
from reidlab.training.fit import fit_from_recipe

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None,
    reason='needs openvino: pip install -e ".[openvino]"',
)
SIZE = {"height": 32, "width": 16, "mean": (0.5, 0.4, 0.4), "std": (0.2, 0.2, 0.3)}
BACKBONES = {  # what each has that could go wrong
    "small_cnn": {"pool": "gem"},  # powers
    "osnet": {"backbone": {"osnet": {"width": 0.25}}},  # depthwise convolutions, gates
    "stripes": {"head": "pcb", "neck": {"bnneck": {"embedding": 16}}},  # parts, joined
    "vit": {"backbone": {"timm": {"name": "vit_tiny_patch16_224"}}, "photo": (32, 16)},  # attention
}


def written(tmp_path, name, takes="photos", **contract):
    "A graph of an untrained network."
    torch.manual_seed(0)
    model = build_model(**({"backbone": "small_cnn"} | BACKBONES[name]), n_pids=8).eval()
    rules = SIZE | {"flip": True} | contract
    contract = Contract("tiny", "best", "0" * 64, **rules, dim=model.feature_dim)
    return write_onnx(model, contract, tmp_path / f"{name}.onnx", takes), contract


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    "The small network: as images and alone, as photos and with the mirror image."
    root = tmp_path_factory.mktemp("graphs")
    return {
        takes: written(root / takes, "small_cnn", takes, flip=takes == "photos")
        for takes in ("images", "photos")
    }


def check_fewer(whole, contract, takes, tmp_path):
    "Both ways to fewer bits; the sizes of the files."
    import onnx

    given = [example_of(contract, takes, photos=8)]
    files = to_fp16(whole, tmp_path / "half.onnx"), to_int8(whole, tmp_path / "few.onnx", given)
    asked, sizes = example_of(contract, takes, photos=7), [whole.stat().st_size]
    right = OnnxNetwork(whole)(asked)
    for file, cosine in zip(files, (0.998, 0.9), strict=True):
        onnx.checker.check_model(str(file), full_check=True)
        network = OnnxNetwork(file)
        assert (network.contract, network.takes) == (contract, takes)
        assert network.shape[0] == "batch"
        assert F.cosine_similarity(network(asked), right).min() > cosine
        torch.testing.assert_close(network(asked[:1]), network(asked)[:1], rtol=1e-3, atol=1e-4)
        sizes.append(file.stat().st_size)
    return sizes


def test_fewer_bits_are_the_same_function(graphs, tmp_path):
    sizes = [check_fewer(*graphs[takes], takes, tmp_path) for takes in ("images", "photos")]
    for whole, half, few in sizes:
        assert half < 0.55 * whole
        assert few < 0.3 * whole
    assert sizes[1][2] < 1.1 * sizes[0][2]  # the mirror image does not double the weights


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "small_cnn"])
def test_fewer_bits_of_other_networks(name, tmp_path):
    size = {"height": 128, "width": 64} if name == "stripes" else {}  # six strips need six rows
    check_fewer(*written(tmp_path, name, **size), "photos", tmp_path)


def test_notes_go_along_and_figures_of_another_file_do_not(graphs, tmp_path):
    import onnx

    whole, contract = graphs["photos"]
    model = onnx.load(whole)
    notes = {p.key: p.value for p in model.metadata_props} | {PARITY: "{}", "mine": "ä"}
    onnx.helper.set_model_props(model, notes)
    onnx.save(model, noted := tmp_path / "noted.onnx")
    given = [example_of(contract, "photos", photos=n) for n in (8, 3)]  # batches need not be alike
    half = OnnxNetwork(to_fp16(noted, tmp_path / "half.onnx"))
    few = OnnxNetwork(to_int8(noted, tmp_path / "few.onnx", iter(given)))
    for network, precision in ((half, "fp16"), (few, "int8")):
        left = {k: v for k, v in notes.items() if k != PARITY}
        assert network.notes.items() >= (left | {PRECISION: precision}).items()
        assert network.notes[f"{PARITY}.fp32"] == "{}"
        assert parity_of(network) is None
    assert json.loads(few.notes[CALIBRATION])["photos"] == 11


def test_layers_that_stay_in_float(graphs, tmp_path):
    import onnx

    whole, contract = graphs["images"]
    given = [example_of(contract, photos=8)]
    one = next(node.name for node in onnx.load(whole).graph.node if node.op_type == "Conv")
    counts = []
    for keep in ((), (one,), ("Conv",)):
        few = onnx.load(to_int8(whole, tmp_path / "a.onnx", given, keep=keep))
        counts.append(sum(node.op_type == "DequantizeLinear" for node in few.graph.node))
    assert counts[0] > counts[1] > counts[2]


def other_quantised(tmp_path, how, whole):
    "Files that the library's own program makes, without this book."
    import onnx
    from onnxruntime.quantization import QuantFormat, quantize_dynamic, quantize_static

    file = tmp_path / f"{how}.onnx"
    if how == "dynamic":
        quantize_dynamic(whole, file)
    elif how == "half":
        from onnx import TensorProto, numpy_helper

        model = onnx.load(whole)
        for weight in model.graph.initializer:  # stored in half, widened where it is used
            if weight.data_type == TensorProto.FLOAT and len(weight.dims) == 4:
                name = weight.name
                small = numpy_helper.to_array(weight).astype("float16")
                weight.CopyFrom(numpy_helper.from_array(small, f"{name}.half"))
                cast = onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT)
                model.graph.node.insert(0, cast)
        onnx.save(model, file)
    else:

        class Reader:
            left = iter([{"images": torch.zeros(2, 3, 32, 16).numpy()}])

            def get_next(self):
                return next(self.left, None)

        quantize_static(whole, file, Reader(), quant_format=QuantFormat.QOperator)
    return file


@pytest.mark.parametrize("how", ["dynamic", "operators", "half"])
def test_what_another_program_quantised_is_refused(graphs, tmp_path, how):
    whole, contract = graphs["images"]
    file = other_quantised(tmp_path, how, whole)
    out = tmp_path / "out.onnx"
    with pytest.raises(ValueError, match=rf"{how}\.onnx is in .* already\. Start from"):
        to_int8(file, out, [example_of(contract, photos=4)])
    with pytest.raises(ValueError, match=rf"{how}\.onnx is in .* already\. Start from"):
        to_fp16(file, out)
    assert not out.exists()


class Wide(nn.Module):
    "Whose squares are beyond half precision, and whose answer is not."

    feature_dim = 3

    def forward(self, images):
        far = images.mean((2, 3)) * 1000
        return far / far.pow(2).sum(1, keepdim=True).sqrt()


def test_squares_stay_in_full_precision(tmp_path):
    import onnx

    contract = Contract("wide", "best", "0" * 64, **SIZE, dim=3)
    whole = write_onnx(Wide(), contract, tmp_path / "wide.onnx")
    model = onnx.shape_inference.infer_shapes(onnx.load(to_fp16(whole, tmp_path / "half.onnx")))
    kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    wide = [n for n in model.graph.node if n.op_type in ("Pow", "Sqrt", "ReduceSum")]
    assert [kinds[n.output[0]] for n in wide] == [onnx.TensorProto.FLOAT] * 3


def test_the_record_says_what_eight_bits_lose():
    record = json.loads((project_root() / "results" / "precision.json").read_text())
    smoke = {r["precision"]: r for r in record["rows"] if r["run"].startswith("smoke")}
    assert {"fp32", "fp16", "int8, percentile"} <= smoke.keys()
    assert abs(smoke["int8, percentile"]["test"]["loss"]) <= 1
    assert record["made"]["device"]
    assert {r["run"] for r in record["rows"]} == record["recipes"].keys()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of two epochs on a handful of people, tested with the mirror image."
    from conftest import tiny_recipe

    root = tmp_path_factory.mktemp("lab")
    patch = pytest.MonkeyPatch()
    patch.setenv("REIDLAB_DATA_DIR", str(root / "data"))
    recipe = tiny_recipe(
        data__height=32, data__width=16, evaluate__flip=True, train__validate_every=0
    )
    folder = open_run("tiny", recipe, "train", root=root)
    fit_from_recipe(recipe, folder.path, workers=0)
    yield run_of(folder.path)
    patch.undo()


def test_calibration_is_the_same_each_time(run, graphs, tmp_path):
    whole, contract = graphs["images"]
    batches = [*calibration_batches(run, contract, photos=20)]
    files = [
        to_int8(whole, tmp_path / "few.onnx", some).read_bytes() for some in (batches, batches)
    ]
    assert files[0] == files[1]
    note = json.loads(OnnxNetwork(tmp_path / "few.onnx").notes[CALIBRATION])
    to_int8(whole, tmp_path / "few.onnx", batches[:1])
    fewer = json.loads(OnnxNetwork(tmp_path / "few.onnx").notes[CALIBRATION])
    assert (note["photos"], fewer["photos"]) == (20, 16)
    assert note["digest"] != fewer["digest"]


@needs_openvino
@pytest.mark.parametrize("precision", ["fp32", pytest.param("int8", marks=pytest.mark.slow)])
def test_openvino_passes_the_gate(run, tmp_path, precision):
    made = export_run(run.path, form="openvino", precision=precision, out=tmp_path / "a.xml")
    network = Embedder(made.path).model
    assert network.contract == Embedder(run.path).contract
    assert parity_of(network) == made.parity
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.xml"]


QUIET = """
import sys
from reidlab.deploy.openvino import OpenVinoNetwork, openvino_runtime, write_openvino
seen = []
names = ("socket.", "os.fork", "os.posix_spawn", "subprocess.Popen", "urllib.")
told = lambda name, given: seen.append((name, str(given)[:200])) if name.startswith(names) else None
sys.addaudithook(told)
assert hasattr(openvino_runtime(), "convert_model"), "the converter is there, for who wants it"
OpenVinoNetwork(write_openvino(sys.argv[1], sys.argv[2]))
print(seen)
"""


@needs_openvino
def test_openvino_tells_nobody(graphs, tmp_path):
    "Neither a socket nor a process that would open one, and no file in the home folder."
    whole, _ = graphs["photos"]
    home = tmp_path / "home"
    home.mkdir()
    outside = {k: v for k, v in os.environ.items() if k != "CI"} | {"HOME": str(home)}
    words = [sys.executable, "-c", QUIET, str(whole), str(tmp_path / "a.xml")]
    root = Path(__file__).parents[2]
    done = subprocess.run(words, cwd=root, env=outside, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"
    assert not (home / "intel").exists()


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # begun in the background, it would be deaf
from reidlab.deploy.openvino import OpenVinoNetwork, write_openvino
path = write_openvino(sys.argv[1], sys.argv[2])
networks = [OpenVinoNetwork(path, threads=1) for _ in range(2)]
while networks:
    networks.pop(0)
held = [bytearray(1 << 22) for _ in range(20)]
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@needs_openvino
def test_ctrl_c_is_heard_after_networks_of_openvino_are_gone(graphs, tmp_path):
    whole, _ = graphs["photos"]
    command = [sys.executable, "-c", INTERRUPTED, str(whole), str(tmp_path / "a.xml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "interrupted"), done.stderr


@needs_openvino
def test_openvino_keeps_to_32_bits_and_to_its_threads(graphs, tmp_path):
    from reidlab.deploy.openvino import OpenVinoNetwork, write_openvino

    whole, _ = graphs["images"]
    network = OpenVinoNetwork(write_openvino(whole, tmp_path / "a.xml"), threads=1)
    told = network.compiled.get_property
    assert told("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert told("INFERENCE_NUM_THREADS") == 1
