"""Where a training step goes: three networks in three ways, under the roofs of this machine.

    python benchmarks/bench_roofline.py [--size 64] [--steps 9] [--out results/roofline.json]

One thread, seconds of the processor, the least of the steps part by part and call by call. The page that reads the
record is nbs/06_training/28_roofline.ipynb.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # the checkout's library, installed or not

from reidlab.core.files import write_json  # noqa: E402
from reidlab.training.roofline import measured  # noqa: E402


def main(words=None):
    "Measure and write."
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--size", type=int, default=64, help="photos in a batch")
    asked.add_argument("--steps", type=int, default=9, help="of which the fastest counts")
    asked.add_argument("--out", type=Path, default=ROOT / "results" / "roofline.json")
    said = asked.parse_args(words)
    torch.set_num_threads(1)
    write_json(said.out, measured(said.size, said.steps))


if __name__ == "__main__":
    main()
