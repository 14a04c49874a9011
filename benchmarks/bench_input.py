"""Training input against the usual path, and P×K batches against a plain sampler and one argsort.

    python benchmarks/bench_input.py            # 256×128; a million photos for the sampler
    python benchmarks/bench_input.py --tiny     # seconds: does the script still run?

One thread, CPU seconds, both sides of a ratio one after the other in one process. The peers: each
photo opened, decoded, resized and augmented step by step (`data.transforms`, the definition, whose
bits ours must have), and the same with torchvision's usual transforms on PIL images. The floor:
writing the batch, a copy of as many floats. For the sampler: a list of photos for every identity,
written anew from the definition of P×K, and one stable argsort of as many numbers.
"""

import argparse
import math
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms as T

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # the checkout's library, installed or not

from bench_retrieval import Row, append, best_ratio, paired, table  # noqa: E402

from reidlab.data.fused_augment import fused_batch  # noqa: E402
from reidlab.data.manifest import Photos, read_manifest  # noqa: E402
from reidlab.data.packed import pack_photos  # noqa: E402
from reidlab.data.random_draws import draw_batch  # noqa: E402
from reidlab.data.samplers import epoch_batches  # noqa: E402
from reidlab.data.synthetic import prepare_synthetic  # noqa: E402
from reidlab.data.transforms import augment, draw_augmentation, read_photo  # noqa: E402

MEAN, STD, PAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 10
BATCH = 64


def photos_of(folder: str, n: int) -> Photos:
    "Drawn people, stored at 128×64 as Market-1501's photos are."
    root = prepare_synthetic(folder, train_pids=max(4, n // 8), test_pids=2, cameras=4)
    photos = read_manifest(root).photos("train")
    return photos.take(np.arange(min(n, len(photos.paths)) // BATCH * BATCH))


def step_by_step(photos: Photos, size: tuple[int, int]) -> Callable[[], list[torch.Tensor]]:
    "Every batch as the definition makes it."

    def work() -> list[torch.Tensor]:
        made = []
        for start in range(0, len(photos.paths), BATCH):
            images = []
            for i in range(start, start + BATCH):
                draw = draw_augmentation(0, 0, i, *size, pad=PAD)
                photo = read_photo(photos.root / photos.paths[i], *size)
                images.append(augment(photo, draw, MEAN, STD, PAD))
            made.append(torch.stack(images))
        return made

    return work


def usual(photos: Photos, size: tuple[int, int]) -> Callable[[], list[torch.Tensor]]:
    "Every batch by torchvision's transforms on PIL images, with draws of their own."
    chain = T.Compose(
        [
            T.Resize(size),
            T.RandomHorizontalFlip(),
            T.Pad(PAD),
            T.RandomCrop(size),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
            T.RandomErasing(),
        ]
    )

    def work() -> list[torch.Tensor]:
        paths = [photos.root / path for path in photos.paths]
        parts = (paths[i : i + BATCH] for i in range(0, len(paths), BATCH))
        return [torch.stack([chain(Image.open(p).convert("RGB")) for p in part]) for part in parts]

    return work


def one_pass(pixels: np.ndarray, size: tuple[int, int]) -> Callable[[], list[torch.Tensor]]:
    "Every batch from the packed cache; draws included."

    def work() -> list[torch.Tensor]:
        made = []
        for start in range(0, len(pixels), BATCH):
            index = range(start, start + BATCH)
            draws = draw_batch(0, 0, index, *size, pad=PAD)
            made.append(fused_batch(pixels, index, draws, MEAN, STD, PAD))
        return made

    return work


def writing(n: int, size: tuple[int, int]) -> Callable[[], list[torch.Tensor]]:
    "The floor: as many floats written, batch by batch."
    source = torch.rand(BATCH, 3, *size)
    return lambda: [source.clone() for _ in range(n // BATCH)]


def reading(size: tuple[int, int], n: int, pairs: int) -> list[Row]:
    "Images per CPU second of each path, and whether the bits are the same."
    with tempfile.TemporaryDirectory() as folder:
        photos = photos_of(folder, n)
        n = len(photos.paths)
        pixels = pack_photos(photos, *size, Path(folder) / "packed")
        sides = {
            "ours": one_pass(pixels, size),
            "step by step": step_by_step(photos, size),
            "usual": usual(photos, size),
            "writing": writing(n, size),
        }
        ours, plain = sides["ours"](), sides["step by step"]()
        same = all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
        del ours, plain
        taken = paired(sides, pairs)
    case = f"input {size[0]}x{size[1]}, {n} photos"
    rows: list[Row] = [
        (case, f"images/s, {name}", n / min(taken[name]), math.nan, "") for name in sides
    ]
    rows += [
        (case, "times as fast", 1 / best_ratio(taken, "ours", peer), math.nan, peer)
        for peer in ("step by step", "usual")
    ]
    rows.append(
        (case, "CPU s", min(taken["ours"]), best_ratio(taken, "ours", "writing"), "writing")
    )
    rows.append((case, "same bits (1: yes)", float(same), math.nan, "step by step"))
    return rows


def listed(pids: np.ndarray, p: int, k: int) -> list[list[int]]:
    "P×K batches with a list for every identity, from the definition."
    g = random.Random(0)
    photos = defaultdict(list)
    for i, pid in enumerate(pids.tolist()):
        photos[pid].append(i)
    chunks = {}
    for pid, own in photos.items():
        if len(own) < k:
            own = own + g.choices(own, k=k - len(own))
        g.shuffle(own)
        chunks[pid] = [own[i : i + k] for i in range(0, len(own) // k * k, k)]
    living, batches = list(chunks), []
    while len(living) >= p:
        batch = []
        for pid in g.sample(living, p):
            batch += chunks[pid].pop()
            if not chunks[pid]:
                living.remove(pid)
        batches.append(batch)
    return batches


def sampling(n: int, n_pids: int, pairs: int) -> list[Row]:
    "An epoch of P×K batches (16×4)."
    pids = np.random.default_rng(0).integers(0, n_pids, n)
    keys = np.random.default_rng(1).random(n)
    sides = {
        "ours": lambda: epoch_batches(pids, 16, 4, 0, 0),
        "argsort": lambda: np.argsort(keys, kind="stable"),
    }
    taken = paired(sides, pairs)
    taken |= {"listed": paired({"listed": lambda: listed(pids, 16, 4)}, 1)["listed"]}
    case = f"P×K epoch, {n} photos, {n_pids} identities"
    ours = min(taken["ours"])
    return [
        (case, "CPU s", ours, best_ratio(taken, "ours", "argsort"), "one argsort"),
        (case, "times as fast", min(taken["listed"]) / ours, math.nan, "a list an identity"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="seconds: does the script run?")
    parser.add_argument("--pairs", type=int, default=5, help="rounds of each case")
    parser.add_argument("--out", type=Path, help="results.csv, to append to")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.tiny:
        rows = reading((64, 32), 64, asked.pairs) + sampling(2000, 100, asked.pairs)
    else:
        rows = reading((128, 64), 512, asked.pairs) + reading((256, 128), 512, asked.pairs)
        rows += sampling(100_000, 5_000, asked.pairs) + sampling(1_000_000, 50_000, asked.pairs)
    if asked.out:
        append(asked.out, rows, Path(__file__).name)
    print(table(rows))


if __name__ == "__main__":
    main()
