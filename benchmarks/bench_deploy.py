"""onnxruntime and OpenVINO against torch, network by network; and ten thousand photos end to end.

    python benchmarks/bench_deploy.py            # about 6 minutes on two cores
    python benchmarks/bench_deploy.py --tiny     # seconds: does the script still run?
    python benchmarks/bench_deploy.py --part fast --threads 1   # about 8 minutes: Embedder(fast=…)

Networks: the peer is the same network in torch, eager, on the same batch of normalised photos and
as many threads, measured in turn by the library's meter (`core.meter`). A runtime that is not
installed says so in its row. Photos: the peer is the loop that everybody writes, one file after the
other opened by Pillow, resized and normalised by torchvision, batches of 32 through the network.
Ours is an `Embedder` of the exported file. Both read the same JPEG files; the thousands are taken
in turn, and the ratio is the median of the pairs. Fast: the same loop against what `Embedder(run,
fast=…)` chooses by the clock, for each number of bits that may be allowed.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms as T

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # the checkout's library, installed or not

from bench_retrieval import Row, append, table  # noqa: E402

from reidlab.core.meter import Times, measure_in_turn  # noqa: E402
from reidlab.core.recipe import Data, Model, Recipe  # noqa: E402
from reidlab.data.synthetic import prepare_synthetic  # noqa: E402
from reidlab.data.transforms import normalise  # noqa: E402
from reidlab.deploy.contract import Contract  # noqa: E402
from reidlab.deploy.embedder import Embedder  # noqa: E402
from reidlab.deploy.engine import LEAST, Engine, quick_photo  # noqa: E402
from reidlab.deploy.latency import RUNTIMES, made_files, rules_of  # noqa: E402
from reidlab.deploy.onnx import example_of, open_exported  # noqa: E402
from reidlab.evaluation.embed import embed  # noqa: E402
from reidlab.training.network import model_from_recipe  # noqa: E402

NETWORKS = {
    "small_cnn": {"backbone": "small_cnn"},
    "osnet x0.25": {"backbone": {"osnet_published": {"width": 0.25}}},
    "searched cells": {"backbone": {"derived": {"genotype": "auto_reid"}}},
    "resnet18": {"backbone": "resnet18"},
    "vit_tiny": {"backbone": {"timm": {"name": "vit_tiny_patch16_224"}}, "pool": "token"},
    "resnet50": {"backbone": "resnet50"},
}
Settings = tuple[tuple[int, int], ...]
SETTINGS = ((1, 1), (8, 1), (8, 2))  # photos, threads
LOOP = 32  # photos at a time of the peer's loop
FAST = {  # network and size: photos
    ("osnet x0.25", (256, 128)): 1024,
    ("osnet x0.25", (64, 64)): 2048,
    ("small_cnn", (128, 64)): 2048,
    ("resnet18", (256, 128)): 256,
}


def network_of(name: str, size: tuple[int, int]) -> tuple[torch.nn.Module, Contract]:
    "A network with random weights, and what it expects."
    data = Data(height=size[0], width=size[1])
    recipe = Recipe(name="bench", data=data, model=Model(**NETWORKS[name]))
    model = model_from_recipe(recipe, 100).eval()
    return model, rules_of(recipe, model.feature_dim)


def rows_of(case: str, seen: dict[str, Times]) -> list[Row]:
    "Milliseconds of each runtime, and how often it does what torch does once."
    torchs = seen["torch"]
    rows: list[Row] = [(case, "ms a batch, torch", torchs.middle, math.nan, "")]
    for name in [n for n in seen if n != "torch"]:
        wall, work = torchs.middle / seen[name].middle, torchs.work / seen[name].work
        rows.append((case, f"times as fast, {name}", wall, math.nan, "torch"))
        rows.append((case, f"times as fast by CPU ms, {name}", work, math.nan, "torch"))
    return rows


def networks(
    names: Iterable[str], size: tuple[int, int], seconds: float, settings: Settings = SETTINGS
) -> list[Row]:
    "Every runtime against torch."
    rows: list[Row] = []
    for name in names:
        model, contract = network_of(name, size)
        with tempfile.TemporaryDirectory() as folder:
            files = made_files(model, contract, folder)
            for photos, threads in settings:
                batch = example_of(contract, "images", photos)
                calls = {"torch": model}
                absent = {k: v for k, v in files.items() if isinstance(v, Exception)}
                for runtime in files.keys() - absent.keys():
                    calls[runtime] = open_exported(files[runtime], threads)
                pace = {"repeats": (6, 2000), "uncounted": 1, "threads": threads}
                case = f"{name} {size[0]}x{size[1]}, batch {photos}, {threads} threads"
                rows += rows_of(case, measure_in_turn(calls, batch, seconds, **pace))
        for runtime, why in absent.items():
            rows.append((name, f"{runtime}: {why}", math.nan, math.nan, ""))
        print(f"{name}: done after {time.process_time():.0f} CPU s", file=sys.stderr, flush=True)
    return rows


def plain_loop(model: torch.nn.Module, contract: Contract) -> Callable[[list[Path]], torch.Tensor]:
    "The loop that everybody writes."
    size = (contract.height, contract.width)
    chain = T.Compose([T.Resize(size), T.ToTensor(), T.Normalize(contract.mean, contract.std)])

    def work(paths: list[Path]) -> torch.Tensor:
        parts = [paths[i : i + LOOP] for i in range(0, len(paths), LOOP)]
        with torch.no_grad():
            made = (
                torch.stack([chain(Image.open(p).convert("RGB")) for p in part]) for part in parts
            )
            return torch.cat([model(images) for images in made])

    return work


def files_of(folder: str, n: int) -> list[Path]:
    "JPEG files of drawn people, 128×64 as Market-1501's."
    root = prepare_synthetic(folder, train_pids=max(4, n // 8), test_pids=2, cameras=4)
    return sorted(root.rglob("*.jpg"))[:n]


def spent(work: Callable[[list[Path]], object], paths: list[Path]) -> tuple[float, float]:
    "Seconds on the wall and of the processor."
    wall, cpu = time.perf_counter(), time.process_time()
    work(paths)
    return time.perf_counter() - wall, time.process_time() - cpu


def end_to_end(name: str, size: tuple[int, int], photos: int, parts: int) -> list[Row]:
    "Files to vectors, ours and the loop in turn."
    model, contract = network_of(name, size)
    case = f"{photos} photos, {name} {size[0]}x{size[1]}, {torch.get_num_threads()} threads"
    with tempfile.TemporaryDirectory() as folder:
        file = made_files(model, contract, folder, RUNTIMES[:1])["onnxruntime"]
        if isinstance(file, Exception):
            return [(case, str(file), math.nan, math.nan, "")]
        embedder = Embedder(file)
        embedder.model = open_exported(file, torch.get_num_threads())  # as many as the loop has
        return compared(case, embedder, plain_loop(model, contract), Path(folder), (photos, parts))


def fast(name: str, size: tuple[int, int], photos: int, parts: int, bits: str) -> list[Row]:
    "Files to vectors by the way that an engine chooses, and the loop in turn."
    model, contract = network_of(name, size)
    threads = torch.get_num_threads()
    case = f"fast={bits}, {photos} photos, {name} {size[0]}x{size[1]}, {threads} threads"
    colours = contract.mean, contract.std
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REIDLAB_CACHE_DIR"] = folder  # the clock is asked anew
        embedder = object.__new__(Embedder)  # of no run: the weights are random
        embedder.contract, embedder.readers, embedder.quick = contract, 1, quick_photo
        plain = lambda images, camids: embed(model, [normalise(images, *colours)])
        embedder.engine = Engine(plain, model, contract, bits)
        loop = plain_loop(model, contract)
        rows = compared(case, embedder, loop, Path(folder), (photos, parts))
        way = embedder.engine.choice
    return [*rows, (case, f"way: {way.pace}", math.nan, math.nan, "")]


def compared(
    case: str, embedder: Embedder, loop: Callable, folder: Path, amount: tuple[int, int]
) -> list[Row]:
    "An embedder and the loop, on the same files in turn."
    photos, parts = amount
    distinct, share = files_of(str(folder), min(512, photos // parts)), photos // parts
    paths = (distinct * -(-share // len(distinct)))[:share]
    ours = lambda part: embedder.embed(part, batch_size=LOOP, progress=False)
    sides = {"ours": ours, "plain": loop}
    first = [torch.as_tensor(side(paths[:LOOP])) for side in sides.values()]
    least = F.cosine_similarity(*first).min().item()
    taken: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for _ in range(parts):
        for side, work in sides.items():
            taken[side].append(spent(work, paths))
    return [
        *_speeds(case, taken, photos),
        (case, "least cosine", least, math.nan, "the loop"),
    ]


def _speeds(case: str, taken: dict[str, list[tuple[float, float]]], photos: int) -> list[Row]:
    rows: list[Row] = []
    for i, clock in enumerate(("", " by CPU s")):
        pairs = [p[i] / o[i] for o, p in zip(taken["ours"], taken["plain"], strict=True)]
        for side, times in taken.items():
            speed = photos / sum(t[i] for t in times)
            rows.append((case, f"photos/s{clock}, {side}", speed, math.nan, ""))
        rows.append((case, f"times as fast{clock}", statistics.median(pairs), math.nan, "the loop"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="seconds: does the script run?")
    parser.add_argument("--photos", type=int, default=10_000, help="of the end-to-end part")
    parser.add_argument("--threads", type=int, default=2, help="of the end-to-end part")
    parser.add_argument("--part", choices=("all", "networks", "photos", "fast"), default="all")
    parser.add_argument("--out", type=Path, help="results.csv, to append to")
    asked = parser.parse_args()
    wanted, rows = lambda part: asked.part in ("all", part), []
    if asked.tiny:
        torch.set_num_threads(1)
        rows = networks(["small_cnn"], (32, 16), 0, SETTINGS[:1])
        rows += end_to_end("small_cnn", (32, 16), 64, 2)
        rows += fast("small_cnn", (32, 16), 64, 2, "bf16")
    elif wanted("networks"):
        rows = networks(NETWORKS, (256, 128), 0.5)
    torch.set_num_threads(1 if asked.tiny else asked.threads)
    if wanted("photos") and not asked.tiny:
        rows += end_to_end("osnet x0.25", (256, 128), asked.photos, 10)
        rows += end_to_end("small_cnn", (128, 64), asked.photos, 10)
    if wanted("fast") and not asked.tiny:
        for (name, size), photos in FAST.items():
            for bits in LEAST:
                rows += fast(name, size, photos, 8, bits)
                print(
                    f"{name}, {bits}: {time.process_time():.0f} CPU s", file=sys.stderr, flush=True
                )
    if asked.out:
        append(asked.out, rows, Path(__file__).name)
    print(table(rows))


if __name__ == "__main__":
    main()
