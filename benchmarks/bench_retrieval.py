"""Ranking and re-ranking against the matrix product, one read of the matrix, and the plain peers.

    python benchmarks/bench_retrieval.py            # two sizes, the larger one Market-1501's
    python benchmarks/bench_retrieval.py --peer     # and the peers: minutes, about 12 GB
    python benchmarks/bench_retrieval.py --msmt     # and MSMT17's size: a minute or two more
    python benchmarks/bench_retrieval.py --tiny     # seconds: does the script still run?

One thread, CPU seconds, both sides of a ratio one after the other in one process. Floors: the
product of all queries with all gallery photos; one read of the finished matrix; for re-ranking the
upper triangle of the product of all photos with all photos, in the faster of two forms. The peers
are written anew from their published definitions: the whole matrix and a sort of every row; for
re-ranking full matrices. Memory is the peak above the inputs, in a process of its own.
"""

import argparse
import contextlib
import csv
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout's library, installed or not

from reidlab.core.run import environment  # noqa: E402
from reidlab.retrieval.distance import distances  # noqa: E402
from reidlab.retrieval.metrics import evaluate_rank  # noqa: E402
from reidlab.retrieval.rank import rank_features  # noqa: E402
from reidlab.retrieval.rerank import rerank  # noqa: E402

MARKET = (3368, 19732)  # queries and gallery files of Market-1501
HALF = (1684, 9866)
MSMT = (11659, 82161)
SMALL = (875, 5125)  # where the dense definition of re-ranking is compared with
TINY = (60, 540)
MIB, GIB = 2**20, 2**30


def street(
    n_query: int,
    n_gallery: int,
    dims: int = 512,
    noise: float = 1.8,
    n_pids: int = 750,
    n_camids: int = 6,
    seed: int = 0,
) -> list[np.ndarray]:  # unit features (Q, D), (G, D) float32; q_pids, g_pids, q_camids, g_camids
    "People seen by six cameras, each camera with a shift of its own; a fifth of the gallery is junk."
    g = np.random.default_rng(seed)
    people = g.standard_normal((n_pids, dims), dtype=np.float32)
    shift = g.standard_normal((n_camids, dims), dtype=np.float32) / 2
    feats, pids, camids = [], [], []
    for n, junk in ((n_query, 0.0), (n_gallery, 0.2)):
        who, where = g.integers(0, n_pids, n), g.integers(0, n_camids, n)
        x = np.float32(noise) * g.standard_normal((n, dims), dtype=np.float32)
        x += people[who]
        x += shift[where]
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        feats.append(x)
        pids.append(np.where(g.random(n) < junk, -1, who))
        camids.append(where)
    return [*feats, *pids, *camids]


# --- floors ----------------------------------------------------------------------------------


def product(query: np.ndarray, gallery: np.ndarray, room: torch.Tensor) -> None:
    "The product of all queries with the whole gallery, in one call."
    torch.mm(torch.from_numpy(query), torch.from_numpy(gallery).T, out=room)


def triangle_strips(x: np.ndarray, rows: int = 256) -> None:
    "The upper triangle of x xᵀ, some rows at a time, each from the diagonal to the end."
    x, n = torch.from_numpy(x), len(x)
    room = torch.empty(rows * n)
    for start in range(0, n, rows):
        part, rest = x[start : start + rows], x[start:]
        torch.mm(part, rest.T, out=room[: len(part) * len(rest)].view(len(part), len(rest)))


def triangle_tiles(x: np.ndarray, size: int = 512) -> None:
    "The same in square tiles that stay in the cache."
    tiles = torch.from_numpy(x).split(size)
    room = torch.empty(size * size)
    for s, rows in enumerate(tiles):
        for columns in tiles[s:]:
            out = room[: len(rows) * len(columns)].view(len(rows), len(columns))
            torch.mm(rows, columns.T, out=out)


# --- peers, written anew from their published definitions --------------------------------------


def sorted_rank(query: np.ndarray, gallery: np.ndarray, *labels: np.ndarray) -> float:
    "The usual peer: the whole matrix, a sort of every row, and a loop over queries; mAP."
    d = query @ gallery.T
    d *= -2
    d += np.einsum("nd,nd->n", gallery, gallery)
    d += np.einsum("nd,nd->n", query, query)[:, None]
    return sorted_scores(np.sqrt(np.maximum(d, 0, out=d), out=d), *labels)


def sorted_scores(dist: np.ndarray, *labels: np.ndarray) -> float:
    "The same, distances given."
    q_pids, g_pids, q_camids, g_camids = labels
    order = np.argsort(dist, axis=1)
    aps = []
    for q in range(len(dist)):
        pids, camids = g_pids[order[q]], g_camids[order[q]]
        stays = (pids != -1) & ((pids != q_pids[q]) | (camids != q_camids[q]))
        hits = pids[stays] == q_pids[q]
        if hits.any():
            precision = hits.cumsum() / np.arange(1, len(hits) + 1)
            aps.append(precision[hits].mean())
    return float(np.mean(aps))


def dense_rerank(
    query: np.ndarray,
    gallery: np.ndarray,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    dtype: type = np.float32,
) -> np.ndarray:  # (Q, G)
    "The dense peer: the published definition with full matrices and a sort of every row."
    x = np.concatenate([query, gallery]).astype(dtype)
    n, q = len(x), len(query)
    squares = np.einsum("nd,nd->n", x, x)
    d = x @ x.T
    d *= -2
    d += squares
    d += squares[:, None]
    np.maximum(d, 0, out=d)
    d /= d.max(1, keepdims=True)
    np.fill_diagonal(d, -1)  # oneself first
    order = np.argsort(d, axis=1)
    np.fill_diagonal(d, 0)

    def mutual(i, k):
        own = order[i, : k + 1]
        return own[(order[own, : k + 1] == i).any(1)]

    v = np.zeros_like(d)
    for i in range(n):
        own = grown = mutual(i, k1)
        for j in own:
            friends = mutual(j, round(k1 / 2))
            if 3 * len(np.intersect1d(friends, own)) > 2 * len(friends):
                grown = np.append(grown, friends)
        grown = np.unique(grown)
        weight = np.exp(-d[i, grown])
        v[i, grown] = weight / weight.sum()
    d = d[:q, q:].copy()
    order = order[:, :k2].copy()
    if k2 > 1:
        v = np.stack([v[near].mean(0) for near in order])
    holders = [np.flatnonzero(column) for column in v[q:].T]
    jaccard = np.empty_like(d)
    for i in range(q):
        shared = np.zeros(n - q, dtype)
        for j in np.flatnonzero(v[i]):
            shared[holders[j]] += np.minimum(v[i, j], v[q + holders[j], j])
        jaccard[i] = 1 - shared / (2 - shared)
    return (1 - lambda_value) * jaccard + lambda_value * d


# --- measuring -------------------------------------------------------------------------------


def paired(
    sides: dict[str, Callable[[], object]],
    pairs: int,
) -> dict[str, list[float]]:  # CPU seconds of each side, round by round
    "The sides one after the other, so often; the first round is not counted."
    taken = {name: [] for name in sides}
    for turn in range(pairs + 1):
        for name, side in sides.items():
            start = time.process_time()
            side()
            if turn:
                taken[name].append(time.process_time() - start)
    return taken


def best_ratio(taken: dict[str, list[float]], side: str, floor: str) -> float:
    "The best of the paired ratios."
    return min(a / b for a, b in zip(taken[side], taken[floor], strict=True))


def seconds(work: Callable[[], object]) -> float:
    "CPU seconds of one call."
    start = time.process_time()
    work()
    return time.process_time() - start


def reset_peak() -> None:
    "Forget the highest memory so far (Linux; elsewhere the peak of the inputs stays in)."
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:  # bytes
    "The highest memory of this process since `reset_peak`."
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except OSError:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


WORK: dict[str, Callable] = {
    "rank": rank_features,
    "sorted": sorted_rank,
    "rerank": lambda query, gallery, *labels: rerank(query, gallery),
    "dense": lambda query, gallery, *labels: dense_rerank(query, gallery),
}


def memory_here(name: str, size: tuple[int, int], dims: int) -> int:  # bytes above the inputs
    "Peak of one call, inputs left out, after a warm-up on a small size."
    WORK[name](*street(*TINY, dims))
    inputs = street(*size, dims)
    reset_peak()
    before = peak_memory()
    WORK[name](*inputs)
    return peak_memory() - before


def memory_of(name: str, size: tuple[int, int], dims: int) -> int:  # bytes above the inputs
    "`memory_here` in a fresh process."
    command = [sys.executable, __file__, "--memory", name, *map(str, (*size, dims))]
    # every large array on pages of its own: memory that the inputs left free is not used again
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)


# --- cases: each a list of (case, measure, value, ratio, against) ------------------------------

Row = tuple[str, str, float, float, str]


Memory = Callable[[str, tuple[int, int], int], int]  # memory_of, or memory_here


def ranking(
    size: tuple[int, int],
    dims: int,
    pairs: int,
    peer: bool,
    noise: float,
    memory: Memory = memory_of,
) -> list[Row]:
    "From features to scores: against the product, and the peer."
    inputs = street(*size, dims, noise)
    room = torch.empty(size)
    sides = {"product": lambda: product(*inputs[:2], room), "ours": lambda: rank_features(*inputs)}
    taken = paired(sides, pairs)
    case = f"rank {size[0]}x{size[1]}, {dims}-d, mAP {rank_features(*inputs).mAP:.2f}"
    rows = [
        (case, "CPU s", min(taken["ours"]), best_ratio(taken, "ours", "product"), "the product")
    ]
    rows.append((case, "MiB above inputs", memory("rank", size, dims) / MIB, math.nan, ""))
    if peer:
        theirs = seconds(lambda: sorted_rank(*inputs))
        rows.append((case, "peer CPU s", theirs, min(taken["ours"]) / theirs, "ours to peer"))
        their = memory("sorted", size, dims) / MIB
        rows.append((case, "peer MiB", their, rows[1][2] / max(their, 1e-6), "ours to peer"))
    return rows


def given(size: tuple[int, int], pairs: int, peer: bool, noise: float) -> list[Row]:
    "From distances to scores: against one read of the matrix."
    inputs = street(*size, 512, noise)
    dist = distances(*inputs[:2])
    sides = {"read": lambda: dist.sum(), "ours": lambda: evaluate_rank(dist, *inputs[2:])}
    taken = paired(sides, max(pairs, 5))
    case = f"distances given {size[0]}x{size[1]}, mAP {evaluate_rank(dist, *inputs[2:]).mAP:.2f}"
    rows = [(case, "CPU s", min(taken["ours"]), best_ratio(taken, "ours", "read"), "one read")]
    if peer:
        theirs = seconds(lambda: sorted_scores(dist.numpy(), *inputs[2:]))
        rows.append((case, "peer CPU s", theirs, min(taken["ours"]) / theirs, "ours to peer"))
    return rows


def reranking(
    size: tuple[int, int], pairs: int, peer: bool, memory: Memory = memory_of
) -> list[Row]:
    "k-reciprocal distances: against the symmetric product, and the dense peer."
    query, gallery, *_ = street(*size, noise=1.2)
    x = np.concatenate([query, gallery])
    sides = {
        "strips": lambda: triangle_strips(x),
        "tiles": lambda: triangle_tiles(x),
        "ours": lambda: rerank(query, gallery),
    }
    taken = paired(sides, pairs)
    case = f"re-rank {size[0]}+{size[1]}, 512-d"
    best = min(taken["ours"])
    rows = [
        (case, "CPU s", best, best_ratio(taken, "ours", "strips"), "symmetric product, strips"),
        (case, "CPU s", best, best_ratio(taken, "ours", "tiles"), "symmetric product, tiles"),
        (case, "GiB above inputs", memory("rerank", size, 512) / GIB, math.nan, ""),
    ]
    if peer:
        theirs = seconds(lambda: dense_rerank(query, gallery))
        rows.append((case, "peer CPU s", theirs, best / theirs, "ours to peer"))
        their = memory("dense", size, 512) / GIB
        rows.append((case, "peer GiB", their, rows[2][2] / max(their, 1e-6), "ours to peer"))
    return rows


def exponents(rows: list[Row], sizes: tuple[tuple[int, int], ...]) -> list[Row]:
    "How time and memory grow with the number of photos: the exponent between the two sizes."
    found = []
    for kind, join in (("rank", "x"), ("distances given", "x"), ("re-rank", "+")):
        for measure in ("CPU s", "MiB above inputs", "GiB above inputs"):
            starts = [f"{kind} {q}{join}{g}, " for q, g in sizes]
            values = [
                next((r[2] for r in rows if r[0].startswith(s) and r[1] == measure), 0.0)
                for s in starts
            ]
            if min(values) > 0:
                power = math.log(values[1] / values[0]) / math.log(sum(sizes[1]) / sum(sizes[0]))
                found.append((kind, f"exponent of {measure}", power, math.nan, "photos"))
    return found


def table(rows: list[Row]) -> str:
    "Rows as text."
    shown = [("case", "measure", "value", "ratio", "against")]
    for case, measure, value, ratio, against in rows:
        number = f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.3f}"
        shown.append((case, measure, number, "" if math.isnan(ratio) else f"{ratio:.3f}", against))
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in shown
    )


def append(path: Path, rows: list[Row], script: str = "bench_retrieval.py") -> None:
    "Add one line for every number to results.csv."
    made = environment("cpu")
    head = (
        "date",
        "commit",
        "benchmark",
        "device",
        "torch",
        "case",
        "measure",
        "value",
        "ratio",
        "against",
    )
    new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        if new:
            out.writerow(head)
        about = (
            datetime.now(UTC).strftime("%Y-%m-%d"),
            made["commit"],
            script,
            f"{platform.machine()} CPU, 1 thread",
            torch.__version__,
        )
        for case, measure, value, ratio, against in rows:
            quotient = "" if math.isnan(ratio) else f"{ratio:.4g}"
            out.writerow((*about, case, measure, f"{value:.6g}", quotient, against))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="seconds: does the script run?")
    parser.add_argument("--peer", action="store_true", help="the peers as well")
    parser.add_argument("--msmt", action="store_true", help="ranking at MSMT17's size as well")
    parser.add_argument("--pairs", type=int, default=5, help="rounds of each case")
    parser.add_argument("--out", type=Path, help="results.csv, to append to")
    parser.add_argument(
        "--memory", nargs=4, metavar=("NAME", "Q", "G", "D"), help=argparse.SUPPRESS
    )
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.memory:
        name, q, g, d = asked.memory
        print(memory_here(name, (int(q), int(g)), int(d)))
        return
    sizes, small = ((TINY, (120, 1080)), TINY) if asked.tiny else ((HALF, MARKET), SMALL)
    # a tiny run starts a fresh process once, for the widest features, and measures the rest here
    memory = memory_here if asked.tiny else memory_of
    warm = street(*TINY)
    for name in ("rank", "rerank"):  # compiled before the clock starts
        WORK[name](*warm)
    rows: list[Row] = []
    for size in sizes:
        rows += ranking(size, 512, asked.pairs, asked.peer, 1.8, memory)
    rows += ranking(sizes[1], 2048, asked.pairs, asked.peer, 3.0)
    for size in sizes:
        rows += given(size, asked.pairs, asked.peer, 1.8)
    rows += given(sizes[1], asked.pairs, False, 3.0)  # a poor network: most counting
    if asked.msmt:
        rows += ranking(MSMT, 512, 1, False, 1.8)
    for size in sizes:
        rows += reranking(size, asked.pairs, asked.peer, memory)
    query, gallery, *_ = street(*small, noise=1.2)
    gap = np.abs(rerank(query, gallery) - dense_rerank(query, gallery, dtype=np.float64)).max()
    rows.append(
        (f"re-rank {small[0]}+{small[1]}", "largest difference", gap, math.nan, "dense, float64")
    )
    rows += exponents(rows, sizes)
    if asked.out:
        append(asked.out, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
