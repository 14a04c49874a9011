"""Training speed and peak memory of a re-ID network on this GPU, with input from memory.

    python benchmarks/gpu.py                      # about 8 minutes, prints its four tables last
    python benchmarks/gpu.py --out results.csv    # appends to a table; .json keeps everything
    python benchmarks/gpu.py --tiny               # seconds on a CPU: does the script still run?

One step is what the trainer does: forward, label-smoothed cross-entropy plus batch-hard triplet,
backward, Adam. Photos are random numbers that already lie on the device, so neither disk nor
decoder is measured. Needs torch, torchvision, numpy and pydantic (a part
checks its options with it), and of reidlab only models and losses; the rows of the search supernet
also pandas, those of the transformers timm, and say so where it is missing.
"""

import argparse
import csv
import json
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout's library, installed or not

from reidlab.losses.catalogue import weighted_sum  # noqa: E402
from reidlab.models.catalogue import as_part, assemble, build_model  # noqa: E402

TERMS = {"softmax": {"smoothing": 0.1}, "triplet": {"margin": 0.3}}
N_PIDS = 751  # training identities of Market-1501
TRANSFORMERS = ("vit_small_patch16_224", "vit_base_patch16_224")  # of timm
SEARCHED = "cdnet"  # a searched network, by its published list of layers
TRAINED = {  # those of bench_train.py
    "osnet x0.25": {"osnet_published": {"width": 0.25}},
    "small_cnn": {"small_cnn": {}},
    "resnet18": {"resnet18": {}},
}
SUPERNET = "supernet "  # a model's name begins so; then plain, or a level of nas.lean
COLUMNS = ["model", "size", "stride", "precision", "layout", "compiled"]
COLUMNS += ["images/s", "peak MiB", "ratio"]
RESULTS = ["date", "commit", "benchmark", "device", "torch"]  # columns of results.csv
RESULTS += ["case", "measure", "value", "ratio", "against"]


@dataclass(frozen=True)
class Case:
    "One row of the table."

    model: str
    height: int
    width: int
    stride: int  # of the backbone's last stage; 0: it has no such option
    precision: str  # fp32 (TF32 off), tf32 (fp32 with TF32 on), bf16 (autocast)
    layout: str  # nchw, or nhwc (channels_last)
    compiled: str  # "no", or the backend of torch.compile

    @property
    def shape(self) -> tuple:
        "What a row shares with the fp32 row that it is compared with."
        return self.model, self.height, self.width, self.stride

    @property
    def plain(self) -> bool:
        "Whether this is the row that the others of its shape are compared with."
        return (self.precision, self.layout, self.compiled) == ("fp32", "nchw", "no")


@dataclass
class Result:
    "What became of a case."

    images_per_s: float | None = None  # from the median step
    peak_mib: float | None = None  # allocated on the device during the timed steps
    steps: int = 0  # timed
    seconds: float = 0.0  # for the whole row, building and warm-up included
    note: str = ""  # why there is no number


class OutOfTime(BaseException):
    "The alarm rang; not an Exception, so that no compiler backend swallows it."


def cases(tiny: bool) -> list[Case]:
    "All rows in the order of the table."
    if tiny:
        shapes, backend = [("small_cnn", 64, 32, 1)], "aot_eager"  # needs no compiler
    else:
        sizes, backend = ((256, 128), (384, 128)), "inductor"
        shapes = [("resnet50", *size, stride) for size in sizes for stride in (1, 2)]
    variants = [("fp32", "nchw", "no"), ("tf32", "nchw", "no"), ("bf16", "nchw", "no")]
    variants += [("bf16", "nhwc", "no"), ("bf16", "nhwc", backend)]
    if tiny:
        variants = [v for v in variants if v[0] != "tf32"]  # a CPU has none
    return [Case(*shape, *variant) for shape in shapes for variant in variants]


def supernet_cases(tiny: bool) -> list[Case]:
    "Rows of the search supernet: 384×128, 8 cells, 16 channels, by level of recomputation."
    size = (32, 16) if tiny else (384, 128)
    levels = ["plain", "lean", "cell", "node", "edge"]
    shapes = [(SUPERNET + level, *size, 2) for level in levels]
    rows = [(shape, "fp32", "nchw", "no") for shape in shapes]
    rows += [(shape, "bf16", "nchw", "no") for shape in shapes[1:]]
    rows += [(shape, "bf16", "nhwc", "no") for shape in (shapes[1], shapes[-1])]
    if not tiny:  # a minute and more of compilation
        rows.append((shapes[1], "bf16", "nchw", "inductor"))
    return [Case(*shape, *variant) for shape, *variant in rows]


def network_cases(tiny: bool) -> list[Case]:
    "Rows of timm's ViT-S and ViT-B and of a searched network, at 256×128."
    size, names = (256, 128), (*TRANSFORMERS, SEARCHED)
    variants = [("fp32", "nchw", "no"), ("bf16", "nchw", "no")]
    if tiny:
        size, names = (64, 32), ("test_vit", SEARCHED)
    else:
        variants.append(("bf16", "nchw", "inductor"))
    return [Case(name, *size, 0, *variant) for name in names for variant in variants]


def trained_cases(tiny: bool) -> list[Case]:
    "Rows of the networks of bench_train.py, at 256×128."
    size, names = ((64, 32), list(TRAINED)[:1]) if tiny else ((256, 128), list(TRAINED))
    variants = [("fp32", "nchw", "no"), ("bf16", "nchw", "no"), ("bf16", "nhwc", "no")]
    if not tiny:
        variants.append(("bf16", "nhwc", "inductor"))
    return [Case(name, *size, 0, *variant) for name in names for variant in variants]


def backbone_of(case: Case) -> dict[str, dict]:
    "The backbone of a row, as a recipe says it."
    if case.stride:
        return {case.model: {"last_stride": case.stride}}
    if case.model in TRAINED:
        return TRAINED[case.model]
    if case.model == SEARCHED:
        return {SEARCHED: {"width": 0.25 if case.height < 128 else 1.0}}
    import timm  # noqa: F401  so that a missing one is named

    return {"timm": {"name": case.model}}


def build_net(case: Case) -> torch.nn.Module:
    "The network of a row."
    if not case.model.startswith(SUPERNET):
        return build_model(backbone_of(case), n_pids=N_PIDS, photo=(case.height, case.width))
    from reidlab.models.ops import SPACES
    from reidlab.nas.lean import make_lean
    from reidlab.nas.supernet import Supernet

    small = case.height < 64
    options = {"init_channels": 4 if small else 16, "layers": 3 if small else 8}
    maps = Supernet(SPACES["reid"], 1 if small else 4, "darts", **options)
    behind = {"pool": "avg", "neck": "bnneck", "head": "linear"}
    behind = {kind: as_part(kind, name) for kind, name in behind.items()}
    net, level = assemble(maps, {}, **behind, n_pids=N_PIDS), case.model.removeprefix(SUPERNET)
    return net if level == "plain" else make_lean(net, level)


def in_running_order(rows: Iterable[Case]) -> list[Case]:
    "Compiled rows last, stride 1 before stride 2: what a short budget drops is what costs most."
    return sorted(
        rows, key=lambda case: (case.compiled != "no", case.compiled != "no" and case.stride)
    )


def set_precision(precision: str) -> None:
    "TF32 on for tf32, off for everything else."
    on = precision == "tf32"
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on


def make_batches(case: Case, p: int, k: int, device: str, count: int = 4) -> list[tuple]:
    "Batches of P people with K photos each, on the device, in the row's memory layout."
    torch.manual_seed(0)
    layout = torch.channels_last if case.layout == "nhwc" else torch.contiguous_format
    made = []
    for _ in range(count):
        images = torch.randn(p * k, 3, case.height, case.width, device=device)
        pids = torch.randperm(N_PIDS, device=device)[:p].repeat_interleave(k)
        made.append((images.contiguous(memory_format=layout), pids))
    return made


def make_step(case: Case, device: str) -> Callable[[torch.Tensor, torch.Tensor], None]:
    "One training step as a function of images and pids."
    torch.manual_seed(0)
    net = build_net(case).to(device).train()
    if case.layout == "nhwc":
        net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), lr=3.5e-4, weight_decay=5e-4)
    loss = weighted_sum(TERMS)
    forward = net if case.compiled == "no" else torch.compile(net, backend=case.compiled)
    autocast = case.precision == "bf16"

    def step(images: torch.Tensor, pids: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            total, _ = loss(forward(images), pids)
        total.backward()
        optimizer.step()

    return step


def step_seconds(
    step: Callable, batches: list[tuple], device: str, steps: int, limit: float
) -> list[float]:
    "Seconds of each step: CUDA events on a GPU, else the clock; at most `limit` seconds in all."
    cuda, marks, start = device == "cuda", [], time.perf_counter()
    for i in range(steps + 1):
        mark = torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter()
        if cuda:
            mark.record()
        marks.append(mark)
        if i == steps or (i >= 2 and time.perf_counter() - start > limit):
            break
        step(*batches[i % len(batches)])
    if not cuda:
        return [b - a for a, b in pairwise(marks)]
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def measure(
    case: Case, p: int, k: int, device: str, warmup: int, steps: int, limit: float
) -> Result:
    "Build, warm up, time."
    set_precision(case.precision)
    batches, step = make_batches(case, p, k, device), make_step(case, device)
    for i in range(warmup):
        step(*batches[i % len(batches)])
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    spent = step_seconds(step, batches, device, steps, limit)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    return Result(p * k / statistics.median(spent), peak, len(spent))


def compile_errors() -> tuple[type[Exception], ...]:
    "What torch.compile raises where a machine lacks what its backend needs, such as a C compiler."
    from torch._dynamo import exc as dynamo
    from torch._inductor import exc as inductor

    found = (
        getattr(dynamo, "TorchDynamoException", None),
        getattr(inductor, "InductorError", None),
    )
    return tuple(error for error in found if error)


def attempt(case: Case, **how) -> Result:
    "A row's result; no memory, or no compiler, is a result as well. Anything else is our bug."
    try:
        return measure(case, **how)
    except torch.OutOfMemoryError:
        return Result(note="out of memory")
    except OutOfTime:
        return Result(note="stopped: time is up")
    except ModuleNotFoundError as missing:
        return Result(note=f"needs the package {missing.name}")
    except Exception as wrong:
        if case.compiled != "no" and isinstance(wrong, compile_errors()):
            print(f"torch.compile failed: {wrong}", file=sys.stderr)
            return Result(note=f"not compiled: {type(wrong).__name__}")
        raise


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    "Raise OutOfTime in the block after so many seconds, where the system has such a clock."
    if not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_):
        raise OutOfTime

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run_all(rows: list[Case], budget: float, device: str, **how) -> dict[Case, Result]:
    "Every row that fits into the budget, the costliest last; the others say that they were skipped."
    start, results = time.monotonic(), {}
    longest = {
        True: 60.0 if device == "cuda" else 0.0,
        False: 0.0,
    }  # seconds of a row, compiled or not
    for case in in_running_order(rows):
        compiled, began = case.compiled != "no", time.monotonic()
        left = budget - (began - start)
        if left < max(longest[compiled], 1.0):
            results[case] = Result(note=f"skipped: {left:.0f} s left")
            continue
        try:
            with alarm(left):
                result = attempt(case, device=device, **how)
        except OutOfTime:  # it rang between the row's end and here
            result = Result(note="stopped: time is up")
        result.seconds = time.monotonic() - began
        longest[compiled] = max(longest[compiled], result.seconds)
        results[case] = result
        speed = f"{result.images_per_s:.0f} images/s" if result.images_per_s else result.note
        print(
            f"{'  '.join(map(str, asdict(case).values()))}: {speed}, {result.seconds:.1f} s",
            flush=True,
        )
        torch._dynamo.reset()
        if device == "cuda":
            torch.cuda.empty_cache()
    return results


def ratio(case: Case, results: dict[Case, Result]) -> float | None:
    "Speed relative to the fp32 row of the same model, size and stride."
    plain = [r.images_per_s for c, r in results.items() if c.plain and c.shape == case.shape]
    speed = results[case].images_per_s
    return speed / plain[0] if speed and plain and plain[0] else None


def table_lines(rows: list[Case], results: dict[Case, Result]) -> list[str]:
    "The table in Markdown: header, rule, one line a row."
    body = []
    for case in rows:
        found, times = results[case], ratio(case, results)
        body.append(
            [
                case.model,
                f"{case.height}×{case.width}",
                str(case.stride or "–"),
                case.precision,
                case.layout,
                case.compiled,
                f"{found.images_per_s:.0f}" if found.images_per_s else found.note,
                f"{found.peak_mib:.0f}" if found.peak_mib else "–",
                f"{times:.2f}" if times else "–",
            ]
        )
    widths = [max(map(len, column)) for column in zip(COLUMNS, *body, strict=True)]
    lines = [[c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in (COLUMNS, *body)]
    lines.insert(1, ["-" * w for w in widths])
    return [f"| {' | '.join(line)} |" for line in lines]


def provenance(device: str) -> dict:
    "When, where and with what."
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=20).stdout.strip()
    except OSError:
        commit = ""
    cuda = device == "cuda"
    return {
        "benchmark": "gpu",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "commit": commit,
    }


def write_out(path: Path, about: dict, rows: list[Case], results: dict[Case, Result]) -> None:
    "A new .json with everything, or lines appended to a .csv with the columns of results.csv."
    if path.suffix == ".json":
        lines = [{**asdict(c), **asdict(results[c]), "ratio": ratio(c, results)} for c in rows]
        path.write_text(json.dumps({"format": 1, **about, "rows": lines}, indent=1) + "\n")
        return
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, RESULTS, lineterminator="\n")
        if new:
            out.writeheader()
        for case in rows:
            name = f"{case.model} {case.height}x{case.width} "
            name += f"stride {case.stride} " if case.stride else ""
            name += f"{case.precision} {case.layout}" + (
                "" if case.compiled == "no" else f" {case.compiled}"
            )
            shared = {key: about[key] for key in RESULTS if key in about} | {"case": name}
            found, times = results[case], ratio(case, results)
            if found.images_per_s:
                speed = {
                    "value": f"{found.images_per_s:.1f}",
                    "ratio": f"{times:.3f}" if times else "",
                }
                out.writerow(shared | {"measure": "images/s", "against": "fp32 nchw"} | speed)
            if found.peak_mib:
                out.writerow(shared | {"measure": "peak MiB", "value": f"{found.peak_mib:.0f}"})


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    "The command line, checked."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small_cnn, 64×32, 2 steps, on the CPU")
    parser.add_argument(
        "--out", type=Path, help="write the numbers here too: .json or .csv (appends)"
    )
    parser.add_argument(
        "--seconds", type=float, default=520, help="time budget; what is left is skipped"
    )
    parser.add_argument(
        "--steps", type=int, default=40, help="timed steps a row, at most 12 s of them"
    )
    parser.add_argument("--p", type=int, default=16, help="people in a batch")
    parser.add_argument("--k", type=int, default=4, help="photos of each")
    args = parser.parse_args(argv)
    if args.out and args.out.suffix not in (".json", ".csv"):
        parser.error(f"--out needs a name ending in .json or .csv, got {args.out.name!r}")
    if args.out and not args.out.resolve().parent.is_dir():
        parser.error(f"--out names a folder that is not there: {args.out.parent}")
    if args.steps < 2 or args.p < 2 or args.k < 2:
        parser.error("--steps, --p and --k need 2 or more each")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device is visible; this benchmark needs one (--tiny runs on the CPU)")
    return args


def main() -> None:
    "Measure, write, print the table last."
    args = arguments()
    device = "cpu" if args.tiny else "cuda"
    p, k, steps, warmup = (4, 2, 2, 1) if args.tiny else (args.p, args.k, args.steps, 10)
    torch.backends.cudnn.benchmark = True
    rows, about = cases(args.tiny), provenance(device)
    began, how = time.monotonic(), {"warmup": warmup, "steps": steps}
    searched, networks = supernet_cases(args.tiny), network_cases(args.tiny)
    trained = trained_cases(args.tiny)
    half = {"p": max(p // 2, 2), "k": k}  # 32 photos, the least that a search wants
    share = args.seconds / 5
    results = run_all(searched, share, device, **half, **how | {"warmup": 2}, limit=5.0)
    results |= run_all(networks, share, device, p=p, k=k, **how, limit=8.0)
    results |= run_all(trained, share, device, p=p, k=k, **how, limit=5.0)
    left = args.seconds - (time.monotonic() - began)
    results |= run_all(rows, left, device, p=p, k=k, **how, limit=12.0)
    if args.out:
        write_out(args.out, about, [*searched, *networks, *trained, *rows], results)
    skipped = sum(bool(result.note) for result in results.values())
    print()
    print(", ".join(f"{key} {value}" for key, value in about.items() if value))
    print(
        f"batch {p}×{k}, Adam, cross-entropy (smoothing 0.1) + batch-hard triplet, input on the device."
    )
    print("fp32: TF32 off; tf32: fp32 with TF32 on; bf16: autocast; nhwc: channels_last.")
    print(
        f"images/s from the median step; ratio to the fp32 row above; rows without a number: {skipped}"
    )
    print()
    print(f"search supernet, darts macro, reid operations, batch {half['p']}×{half['k']}:")
    print("\n".join(table_lines(searched, results)))
    print()
    print("transformers and a searched network:")
    print("\n".join(table_lines(networks, results)))
    print()
    print("the networks of bench_train.py:")
    print("\n".join(table_lines(trained, results)))
    print()
    print("\n".join(table_lines(rows, results)))


if __name__ == "__main__":
    main()
