"""Bytes and time of a search supernet, plain and lean, on one CPU thread.

    python benchmarks/bench_supernet.py                    # some minutes, prints one table last
    python benchmarks/bench_supernet.py --out results.csv  # appends the numbers
    python benchmarks/bench_supernet.py --tiny             # seconds: does the script still run?

The peer, `published`, is the supernet as its authors define it: on every edge every operation of
the space is computed, `none` included (zeros), each output is multiplied by its softmax weight, and
the products are added. `plain` is this library's own, which leaves `none` out. The network is the
public re-implementation's: full-resolution stem, 8 cells, 16 channels, 4 nodes, 7 operations.

Bytes are what autograd keeps, by storage, at the worst moment of a step (what is computed again
included); `alive` adds outputs and gradients. Both are the same on every machine. Times are ratios
of processor time, the best of five pairs taken one after the other in one process.
"""

import argparse
import csv
import math
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout's library, installed or not

from reidlab.models.ops import SPACES  # noqa: E402
from reidlab.nas.cdnet_space import LayerSupernet  # noqa: E402
from reidlab.nas.footprint import Footprint, footprint  # noqa: E402
from reidlab.nas.gdas import GumbelSupernet  # noqa: E402
from reidlab.nas.lean import LEVELS, make_lean, measure  # noqa: E402
from reidlab.nas.pcdarts import PartialSupernet  # noqa: E402
from reidlab.nas.supernet import Mixed, Supernet  # noqa: E402

RESULTS = ["date", "commit", "benchmark", "device", "torch"]  # columns of results.csv
RESULTS += ["case", "measure", "value", "ratio", "against"]
MIB, GIB = 2**20, 2**30
# level → (bytes, time) as shares of the published net's: what this benchmark calls a pass
GOALS = {"lean": (0.46, 0.75), "cell": (1 / 8, 1.1), "edge": (1 / 25, 1.35)}


class Published(Mixed):
    "A mixed edge by its definition: all operations, all products."

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        s = self.stride
        outs = [
            self.ops[name](x) if name in self.ops else x[:, :, ::s, ::s] * 0.0
            for name in self.names
        ]
        return sum(w * y for w, y in zip(weights, outs, strict=True))


def published(net: Supernet) -> Supernet:
    "The same net, each edge by its definition."
    for cell in net.stack.cells:
        for row, edge in enumerate(cell.edges):
            edge.__class__, edge.stride = Published, cell.edges[row].ops["max_pool_3x3"].pool.stride
    return net


def build(kind: str, shape: tuple[int, int, int]) -> Supernet:
    "A supernet by the name of its row and its cells, channels, nodes; the rows share their weights."
    torch.manual_seed(0)
    layers, channels, nodes = shape
    net = Supernet(SPACES["reid"], nodes, "darts", channels, layers=layers)
    if kind == "published":
        return published(net)
    if kind == "plain":
        return net
    if kind in LEVELS:
        return make_lean(net, kind)
    own = (SPACES["reid"], nodes, "darts", channels)
    if kind == "pcdarts":
        return PartialSupernet(*own, layers=layers, share=max(1, min(4, channels // 4)))
    if kind == "gdas":
        return GumbelSupernet(*own, layers=layers)
    raise ValueError(f"no such row: {kind!r}")


# PC-DARTS mixes a quarter of the channels, GDAS executes one operation an edge: other gradients,
# so their rows are what a search with that strategy costs, and no goal is set for them
ROWS = ("published", "plain", *LEVELS, "pcdarts", "gdas")
LAYERS = (
    "cdnet plain",
    "cdnet top-k",
)  # CDNet's space: all 12 candidates, or the 2 with most weight


def step_seconds(net: Supernet, images: torch.Tensor) -> float:
    "Processor time of one forward and backward pass."
    net.zero_grad(set_to_none=True)
    start = time.process_time()
    net(images).square().mean().backward()
    return time.process_time() - start


def paired(net: Supernet, peer: Supernet, images: torch.Tensor, pairs: int) -> float:
    "The best of several ratios, each of two steps one after the other."
    step_seconds(net, images)
    return min(step_seconds(net, images) / step_seconds(peer, images) for _ in range(pairs))


def run(height: int, width: int, batch: int, shape: tuple, pairs: int) -> dict[str, dict]:
    "Bytes by image and time ratio of every row at one size."
    images = torch.randn(batch, 3, height, width)
    peer = build("published", shape)
    step_seconds(peer, images)
    found = {}
    for kind in ROWS:
        net = build(kind, shape)
        bytes_ = footprint(net, images)
        seconds = 1.0 if kind == "published" else paired(net, peer, images, pairs)
        found[kind] = {"bytes": Footprint(*(n / batch for n in bytes_)), "time": seconds}
        print(f"{height}×{width} {kind}: done", file=sys.stderr, flush=True)
    return found


def run_layers(height: int, width: int, batch: int, wide: float, pairs: int) -> dict[str, dict]:
    "The same for CDNet's space of layers, against all candidates at once."
    images = torch.randn(batch, 3, height, width)
    torch.manual_seed(0)
    nets = [LayerSupernet("cdnet", mixing, width=wide) for mixing in ("plain", "topk")]
    found = {}
    for kind, net in zip(LAYERS, nets, strict=True):
        bytes_ = footprint(net, images)
        seconds = 1.0 if net is nets[0] else paired(net, nets[0], images, pairs)
        found[kind] = {"bytes": Footprint(*(n / batch for n in bytes_)), "time": seconds}
    return found


def planned(height: int, width: int, shape: tuple) -> dict[str, Footprint]:
    "What the planner says without running the net, by level and image."
    parts = measure(build("plain", shape), height, width)
    each = {level: [level] * shape[0] for level in ("plain", *LEVELS)}
    return {
        level: Footprint(parts.after_forward(ls), parts.kept(ls), parts.alive(ls))
        for level, ls in each.items()
    }


def verdict(ok: bool) -> str:
    return "PASS" if ok else "MISS"


def table_lines(head: list[str], rows: list[list[str]]) -> list[str]:
    "A table in Markdown: header, rule, one line a row."
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [[c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in (head, *rows)]
    lines.insert(1, ["-" * w for w in widths])
    return [f"| {' | '.join(line)} |" for line in lines]


def seed_setting(height: int, width: int, shape: tuple) -> list[str]:
    "The re-implementation's own search: bytes of its leanest form at two batches, and at 32."
    net = build("edge", shape)
    seen = {b: footprint(net, torch.randn(b, 3, height, width)) for b in (2, 4)}
    fixed = sum(p.numel() * p.element_size() for p in net.parameters())  # gradients of weights
    lines = []
    for what in ("peak", "alive"):
        two, four = (getattr(seen[b], what) for b in (2, 4))
        more = (four - two) / 2
        most = two + 30 * more
        says = verdict(most <= 3 * GIB)
        lines.append(
            f"{height}×{width}, {shape[0]} cells, level edge, {what}: {two / MIB:.1f} MiB at batch 2, "
            f"{four / MIB:.1f} at 4, so {more / MIB:.1f} an image and {most / GIB:.2f} GiB at 32: {says}"
        )
    lines.append(
        f"(of what is alive, {fixed / MIB:.1f} MiB are gradients of weights, at any batch)"
    )
    return lines


def provenance() -> dict:
    "When, where and with what."
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=20).stdout.strip()
    except OSError:
        commit = ""
    return {
        "benchmark": "bench_supernet",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": f"CPU, {platform.machine()}",
        "torch": torch.__version__,
        "commit": commit,
    }


def write_out(path: Path, about: dict, found: dict[tuple, dict], against: str) -> None:
    "Lines appended to a .csv with the columns of results.csv."
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, RESULTS, lineterminator="\n")
        if new:
            out.writeheader()
        for (h, w), rows in found.items():
            base = rows[against]["bytes"].peak
            for kind, row in rows.items():
                shared = {key: about[key] for key in RESULTS if key in about}
                shared |= {"case": f"supernet {h}x{w} {kind}", "against": against}
                peak = row["bytes"].peak
                value = {"value": f"{peak / MIB:.2f}", "ratio": f"{peak / base:.4f}"}
                out.writerow(shared | {"measure": "MiB kept an image"} | value)
                out.writerow(shared | {"measure": "time", "ratio": f"{row['time']:.3f}"})


def main() -> None:
    "Measure, write, print the table last."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--tiny", action="store_true", help="a small net, 32×16, one pair, no goals"
    )
    parser.add_argument("--pairs", type=int, default=5, help="pairs of steps for each ratio")
    parser.add_argument("--out", type=Path, help="append the numbers to this .csv")
    args = parser.parse_args()
    if args.pairs < 1 or (args.out and args.out.suffix != ".csv"):
        parser.error("--pairs needs 1 or more, --out a name ending in .csv")
    torch.set_num_threads(1)
    sizes = [(32, 16), (16, 16)] if args.tiny else [(192, 64), (96, 32)]
    shape, pairs = ((3, 4, 1), 1) if args.tiny else ((8, 16, 4), args.pairs)
    found = {size: run(*size, batch=2, shape=shape, pairs=pairs) for size in sizes}
    said = planned(*sizes[0], shape)
    layers_found = run_layers(*sizes[0], batch=2, wide=0.25 if args.tiny else 1.0, pairs=pairs)
    if args.out:
        write_out(args.out, provenance(), found, "published")
        write_out(args.out, provenance(), {sizes[0]: layers_found}, LAYERS[0])
    rows = []
    for size, by_kind in found.items():
        base = by_kind["published"]["bytes"].peak
        own = by_kind["plain"]["bytes"].peak
        for kind, row in by_kind.items():
            peak, seconds, says = row["bytes"].peak, row["time"], "–"
            if kind in GOALS and size == sizes[0] and not args.tiny:
                most, longest = GOALS[kind]
                says = verdict(peak <= most * base and seconds <= longest)
            told = "–"
            if size == sizes[0] and kind in said:
                told = f"{said[kind].kept / row['bytes'].kept - 1:+.1%}, {said[kind].peak / peak - 1:+.1%}"
            rows.append(
                [
                    f"{size[0]}×{size[1]}",
                    kind,
                    f"{row['bytes'].kept / MIB:.1f}",
                    f"{peak / MIB:.1f}",
                    f"{row['bytes'].alive / MIB:.1f}",
                    f"{peak / base:.3f} (1/{base / peak:.1f})",
                    f"{peak / own:.3f}",
                    f"{seconds:.2f}",
                    told,
                    says,
                ]
            )
    base = layers_found[LAYERS[0]]["bytes"].peak
    for kind, row in layers_found.items():
        kept, peak, alive = (n / MIB for n in row["bytes"])
        share = f"{peak * MIB / base:.3f} (1/{base / peak / MIB:.1f})"
        size = f"{sizes[0][0]}×{sizes[0][1]}"
        numbers = [f"{kept:.1f}", f"{peak:.1f}", f"{alive:.1f}", "–", share, f"{row['time']:.2f}"]
        rows.append([size, kind, *numbers, "–", "–"])
    large, small = (by_kind["edge"]["bytes"].peak for by_kind in found.values())
    pixels = [h * w for h, w in sizes]
    power = math.log(large / small) / math.log(pixels[0] / pixels[1])
    wrong = max(abs(said[k].peak / found[sizes[0]][k]["bytes"].peak - 1) for k in said)
    print(", ".join(f"{key} {value}" for key, value in provenance().items() if value))
    layers, channels, nodes = shape
    print(
        f"{layers} cells, {channels} channels, {nodes} nodes, reid operations, batch 2, one thread, float32"
    )
    print("\n".join(seed_setting(*((32, 16, shape) if args.tiny else (256, 128, (3, 16, 4))))))
    print(f"bytes of level edge grow with pixels to the power {power:.2f}")
    print(f"planner: peak within {wrong:.1%} of what was seen: {verdict(wrong <= 0.1)}")
    print(
        "MiB an image: kept after forward; peak: kept at worst; alive: with outputs and gradients"
    )
    print()
    head = ["size", "row", "kept", "peak", "alive", "peak/published", "peak/plain", "time"]
    print("\n".join(table_lines([*head, "planner (kept, peak)", "goal"], rows)))


if __name__ == "__main__":
    main()
