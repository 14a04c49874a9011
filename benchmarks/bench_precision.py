"""What fewer bits cost and save: each of some finished runs in fp32, fp16 and int8, on people nobody trained on.

    python benchmarks/bench_precision.py RUN [RUN ...] [--out results/precision.json]

The ways to calibrate int8 are compared on held-out identities; the test is measured for all rows, and chooses
nothing. Milliseconds are onnxruntime's on one thread, the rows in turn; the ratio to fp32 is what to read.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # the checkout's library, installed or not

from reidlab.core.files import write_json  # noqa: E402
from reidlab.core.meter import measure_in_turn  # noqa: E402
from reidlab.core.run import environment  # noqa: E402
from reidlab.data.loaders import open_data  # noqa: E402
from reidlab.deploy.contract import open_network, run_of  # noqa: E402
from reidlab.deploy.export import calibration_batches  # noqa: E402
from reidlab.deploy.onnx import OnnxNetwork, example_of, write_onnx  # noqa: E402
from reidlab.deploy.parity import both, gate_photos, pair_of, ranked_by_both  # noqa: E402
from reidlab.deploy.quantise import library, quiet, to_fp16, to_int8  # noqa: E402
from reidlab.evaluation.evaluate import split_photos  # noqa: E402
from reidlab.retrieval.distance import distances  # noqa: E402

PHOTOS = 256  # to calibrate with


def by_dynamic(whole, out):
    "Weights in eight bits; the range of what goes through is found anew for each batch."
    with quiet():
        library("onnxruntime.quantization").quantize_dynamic(
            str(whole), str(out), per_channel=True, op_types_to_quantize=["MatMul", "Gemm"]
        )
    return out


def files_of(run, folder):
    "The run's graph at every precision, by name."
    model, contract = open_network(run.path)
    whole = write_onnx(model, contract, folder / "fp32.onnx")
    batches = [*calibration_batches(run, contract, photos=PHOTOS)]
    made = {"fp32": whole, "fp16": to_fp16(whole, folder / "fp16.onnx")}
    for method in ("minmax", "entropy", "percentile"):
        made[f"int8, {method}"] = to_int8(whole, folder / f"{method}.onnx", batches, method)
    made["int8, first layer float"] = to_int8(
        whole, folder / "first.onnx", batches, keep=[first_layer(whole)]
    )
    if run.recipe.model.backbone.name == "timm":
        made["int8, dynamic"] = by_dynamic(whole, folder / "dynamic.onnx")
    return made, contract


def first_layer(path):
    "The name of a graph's first convolution, which reads the photo."
    return next(n.name for n in library("onnx").load(path).graph.node if n.op_type == "Conv")


def shared(query, gallery, first=10):
    "The share of the first ten that run and file have in common, in whatever order."
    lists = [distances(F.normalize(q), F.normalize(g)) for q, g in zip(query, gallery, strict=True)]
    tops = [found.topk(first, largest=False).indices for found in lists]
    return float((tops[0][:, :, None] == tops[1][:, None, :]).any(2).float().mean())


def row(name, path, run, sides):
    "A file's size and what it loses."
    held, test = sides
    pair = pair_of(OnnxNetwork(path, threads=1), run, "", test[1])
    seen = [ranked_by_both(pair, *side[:2], run.recipe, side[2]) for side in (held, test)]
    found = {"run": run.name, "precision": name, "bytes": path.stat().st_size}
    found["overlap"] = shared(*(both(pair, side) for side in test[:2]))
    for where, parity in zip(("held_out", "test"), seen, strict=True):
        found[where] = parity._asdict() | {"loss": parity.loss}
    return found


def measured(run, seconds):
    "The rows of one run."
    data = open_data(run.recipe.data, run.recipe.seed)
    held = (*split_photos(data, "val"), 0)
    sides = held, gate_photos(run.recipe)
    with tempfile.TemporaryDirectory() as folder:
        made, contract = files_of(run, Path(folder))
        rows = [row(name, path, run, sides) for name, path in made.items()]
        networks = {name: OnnxNetwork(path, threads=1) for name, path in made.items()}
        for photos in (1, 32):
            batch = example_of(contract, photos=photos)
            times = measure_in_turn(networks, batch, seconds=seconds, threads=1)
            for line in rows:
                line[f"ms_{photos}"] = round(times[line["precision"]].middle, 3)
                line[f"busy_{photos}"] = round(times[line["precision"]].busy, 2)
    return rows


def main():
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("runs", nargs="+", help="finished trainings, by name or folder")
    words.add_argument("--out", type=Path, help="a JSON file for the record")
    words.add_argument(
        "--seconds", type=float, default=3.0, help="of counted calls, a row and batch"
    )
    asked = words.parse_args()
    runs = [run_of(name) for name in asked.runs]
    rows = [line for run in runs for line in measured(run, asked.seconds)]
    for line in rows:
        print(
            f"{line['run']:24} {line['precision']:24} {line['bytes'] / 1e3:9.0f} kB  mAP "
            f"{100 * line['test']['map_file']:.2f} ({-line['test']['loss']:+.2f}), the first ten "
            f"{100 * line['overlap']:.0f} %, {line['ms_1']:.2f} and {line['ms_32']:.1f} ms; "
            f"held out {-line['held_out']['loss']:+.2f}, cosine {line['held_out']['cosine']:.4f}"
        )
    if asked.out:
        versions = {name: library(name).__version__ for name in ("onnx", "onnxruntime")}
        trained = {run.name: run.recipe.model_dump(mode="json") for run in runs}
        about = environment("cpu", 1, "") | {"versions": versions, "photos": PHOTOS}
        write_json(asked.out, {"made": about, "recipes": trained, "rows": rows})


if __name__ == "__main__":
    main()
