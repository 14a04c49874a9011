"""Re-ranking against the matrix product that it cannot do without, and against the dense peer.

    python benchmarks/bench_rerank_part.py            # two sizes, the larger one Market-1501's
    python benchmarks/bench_rerank_part.py --peer     # and the dense peer: minutes, 10 GB
    python benchmarks/bench_rerank_part.py --tiny     # seconds: does the script still run?

One thread, CPU seconds, the sides one after the other in one process. The floor is the upper
triangle of the N x N product and nothing else, in the faster of two forms: whole strips from the
diagonal on, or tiles that stay in the cache. Both are printed.
"""

import argparse
import contextlib
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout's library, installed or not

from reidlab.retrieval.rerank import rerank  # noqa: E402

MARKET = (3368, 19732)  # queries and gallery files of Market-1501
HALF = (1684, 9866)
SMALL = (875, 5125)  # where the dense definition is compared with
TINY = (60, 540)
GIB = 2**30


def street(
    n_query: int,
    n_gallery: int,
    dims: int = 512,
    n_pids: int = 750,
    n_camids: int = 6,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:  # (Q, D), (G, D) float32, on the unit sphere
    "Features that cluster by person and, less, by camera."
    g = np.random.default_rng(seed)
    n = n_query + n_gallery
    x = np.float32(1.2) * g.standard_normal((n, dims), dtype=np.float32)
    x += g.standard_normal((n_pids, dims), dtype=np.float32)[g.integers(0, n_pids, n)]
    x += g.standard_normal((n_camids, dims), dtype=np.float32)[g.integers(0, n_camids, n)] / 2
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x[:n_query], x[n_query:]


def floor_strips(x: np.ndarray, rows: int = 256) -> None:
    "The upper triangle of x xᵀ, some rows at a time, each from the diagonal to the end."
    x, n = torch.from_numpy(x), len(x)
    room = torch.empty(rows * n)
    for start in range(0, n, rows):
        part, rest = x[start : start + rows], x[start:]
        torch.mm(part, rest.T, out=room[: len(part) * len(rest)].view(len(part), len(rest)))


def floor_tiles(x: np.ndarray, size: int = 512) -> None:
    "The same in square tiles that stay in the cache."
    tiles = torch.from_numpy(x).split(size)
    room = torch.empty(size * size)
    for s, rows in enumerate(tiles):
        for columns in tiles[s:]:
            out = room[: len(rows) * len(columns)].view(len(rows), len(columns))
            torch.mm(rows, columns.T, out=out)


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


def memory_here(work: Callable, size: tuple[int, int]) -> int:  # bytes above the inputs
    "Peak of one call, inputs left out, after a warm-up on a small size."
    work(*street(*TINY))
    inputs = street(*size)
    reset_peak()
    before = peak_memory()
    answer = work(*inputs)
    peak = peak_memory() - before
    assert len(answer) == size[0]
    return peak


def memory_of(name: str, size: tuple[int, int]) -> int:  # bytes above the inputs
    "`memory_here` in a fresh process."
    command = [sys.executable, __file__, "--memory", name, *map(str, size)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return int(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)


def measure(size: tuple[int, int], pairs: int, peer: bool) -> dict[str, object]:
    "One row of the table."
    query, gallery = street(*size)
    x = np.concatenate([query, gallery])
    sides = {
        "strips": lambda: floor_strips(x),
        "tiles": lambda: floor_tiles(x),
        "ours": lambda: rerank(query, gallery),
    }
    taken = paired(sides, pairs)
    best = {name: min(seconds) for name, seconds in taken.items()}
    row = {"photos": len(x), "pairs": pairs, "ours s": best["ours"]}
    for floor in ("strips", "tiles"):
        ratios = [a / b for a, b in zip(taken["ours"], taken[floor], strict=True)]
        row[f"x {floor}"] = min(ratios)
    row["ours GiB"] = memory_of("ours", size) / GIB
    row["peer s"] = row["ours / peer"] = row["peer GiB"] = math.nan
    if peer:
        start = time.process_time()
        dense_rerank(query, gallery)
        row["peer s"] = time.process_time() - start
        row["ours / peer"] = best["ours"] / row["peer s"]
        row["peer GiB"] = memory_of("peer", size) / GIB
    return row


def table(rows: list[dict[str, object]]) -> str:
    "Rows as text, numbers to three places."

    def shown(value):
        if isinstance(value, float):
            return "" if math.isnan(value) else f"{value:.3f}"
        return str(value)

    lines = [list(rows[0]), *([shown(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="seconds: does the script run?")
    parser.add_argument("--peer", action="store_true", help="the dense peer as well")
    parser.add_argument("--pairs", type=int, default=5, help="rounds of each size")
    parser.add_argument("--memory", nargs=3, metavar=("NAME", "Q", "G"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.memory:
        name, *size = asked.memory
        work = {"ours": rerank, "peer": dense_rerank}[name]
        print(memory_here(work, tuple(map(int, size))))
        return
    sizes, small = ((TINY, (120, 1080)), TINY) if asked.tiny else ((HALF, MARKET), SMALL)
    rerank(*street(*TINY))  # compiled before the clock starts
    rows = [measure(size, asked.pairs, asked.peer) for size in sizes]
    growth = {key: math.nan for key in rows[0]} | {"photos": "exponent", "pairs": ""}
    for key in ("ours s", "ours GiB", "peer s", "peer GiB"):
        low, high = rows[0][key], rows[1][key]
        if low > 0 and high > 0:
            growth[key] = math.log(high / low) / math.log(rows[1]["photos"] / rows[0]["photos"])
    query, gallery = street(*small)
    gap = np.abs(rerank(query, gallery) - dense_rerank(query, gallery, dtype=np.float64)).max()
    print(table([*rows, growth]))
    print(f"largest difference to the dense definition in float64, {sum(small)} photos: {gap:.1e}")


if __name__ == "__main__":
    main()
