"""Start-up by part: what a page, a rank or a reader pays before its first photo.

    python benchmarks/bench_start.py            # a minute
    python benchmarks/bench_start.py --tiny     # seconds: does the script still run?

Each line is a fresh process of its own that does what the line says and nothing more. CPU seconds of
that process (user and system, best of the rounds), so that a busy machine matters little, and their
ratio to the floor: `import torch` alone, which every job needs.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # the checkout's library, installed or not

from bench_retrieval import Row, append, table  # noqa: E402

NETWORK = """
import torch
from reidlab.core.recipe import load_recipe
from reidlab.training.network import model_from_recipe
net = model_from_recipe(load_recipe("smoke"), 8)
images = torch.zeros(8, 3, 64, 32)
"""
BATCH = """
import tempfile
from reidlab.core.recipe import load_recipe
from reidlab.data.loaders import train_loader
from reidlab.data.manifest import read_manifest
from reidlab.data.synthetic import prepare_synthetic
made = prepare_synthetic(tempfile.mkdtemp(), train_pids=8, test_pids=2, cameras=2)
photos = read_manifest(made).photos("train")
r = load_recipe("smoke", overrides={"data.sampler.pk.p": 4, "data.sampler.pk.k": 2, "data.cache": "off"})
next(iter(train_loader(photos, r.data, 0)))
"""
STEP = (
    NETWORK
    + """
optimiser = torch.optim.Adam(net.parameters())
sum(b.feat.sum() for b in net(images)).backward()
optimiser.step()
"""
)
PARTS = {  # what a line is called: what its process runs
    "python": "",
    "import torch": "import torch",
    "import torchvision": "import torchvision",
    "import numba": "import numba",
    "import pandas, matplotlib": "import pandas, matplotlib.pyplot",
    "papermill": "import papermill.__main__",
    "a kernel": "import ipykernel.kernelapp, ipykernel.zmqshell",
    "core": "import reidlab.core.run",
    "ranking": "import reidlab.retrieval.scan",
    "a reader": "import reidlab.data.loaders",
    "training": "import reidlab.training.fit",
    "evaluation": "import reidlab.evaluation.evaluate_run",
    "the command, all jobs": "import reidlab.jobs.sweep, reidlab.jobs.views, reidlab.jobs.command",
    "first batch": BATCH,
    "network": NETWORK,
    "first step": STEP,
}
FLOOR = "import torch"


def cpu_seconds(code: str) -> float:
    "User and system time of a fresh process that runs this."
    before = os.times()
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=ROOT)
    after = os.times()
    spent = after.children_user + after.children_system
    return spent - before.children_user - before.children_system


def rows(names: list[str], rounds: int) -> list[Row]:
    "Best of several rounds; a round runs every part once."
    seconds = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            seconds[name].append(cpu_seconds(PARTS[name]))
    floor = min(seconds[FLOOR])
    best = {name: min(s) for name, s in seconds.items()}
    return [(name, "CPU s", s, s / floor, FLOOR) for name, s in best.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="three lines, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="results.csv, to append to")
    args = parser.parse_args()
    names = ["python", FLOOR, "core"] if args.tiny else list(PARTS)
    measured = rows(names, 1 if args.tiny else args.rounds)
    print(table(measured))
    if args.out:
        append(args.out, measured, Path(__file__).name)


if __name__ == "__main__":
    main()
