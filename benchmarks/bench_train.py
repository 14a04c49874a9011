"""Images per CPU second of training and embedding, and CPU seconds to an accuracy, against torchreid.

    python benchmarks/bench_train.py --install   # the peer, into --peer, once
    python benchmarks/bench_train.py             # rates: about 5 minutes on one core
    python benchmarks/bench_train.py --accuracy  # time to accuracy: about 15 minutes more
    python benchmarks/bench_train.py --tiny      # seconds: does the script still run?

One thread, CPU seconds, all sides of a case one after the other in one process, on one batch of 16
people x 4 photos that lies in memory. Ours is the trainer's own step. The peers: torchreid's OSNet
x0.25 in its own triplet engine, and the loop that everybody writes around our network (AdamW, label
smoothing and batch-hard triplet of a few lines). Embedding begins at JPEG files, decoding included;
its peer is the loop of Pillow, torchvision and torch, batches of 32.
"""

import argparse
import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # the checkout's library, installed or not

import time_to_accuracy as race  # noqa: E402
import torchreid_peer  # noqa: E402
from bench_deploy import files_of, plain_loop  # noqa: E402
from bench_retrieval import Row, append, best_ratio, paired, table  # noqa: E402

from reidlab.core.recipe import Recipe  # noqa: E402
from reidlab.core.run import environment, open_run  # noqa: E402
from reidlab.core.settings import settings  # noqa: E402
from reidlab.data.loaders import Batch, open_data  # noqa: E402
from reidlab.deploy.embedder import Embedder  # noqa: E402
from reidlab.training.checkpoint import save_checkpoint  # noqa: E402
from reidlab.training.network import (  # noqa: E402
    architecture_of,
    loss_from_recipe,
    model_from_recipe,
)
from reidlab.training.pace import (  # noqa: E402
    Pace,
    Question,
    network_facts,
    settled_training,
)
from reidlab.training.step import Trainer  # noqa: E402

N_PIDS, PEOPLE, PHOTOS = 100, 16, 4
OSNET = {"backbone": {"osnet_published": {"width": 0.25}}, "neck": "fc"}  # torchreid's own
NETWORKS = {"osnet x0.25": OSNET, "small_cnn": {}, "resnet18": {"backbone": "resnet18"}}
CASES = [("osnet x0.25", (64, 64)), ("osnet x0.25", (128, 64))]
CASES += [("small_cnn", (128, 64)), ("resnet18", (128, 64))]
SETS = ["synthetic", "vehicles8"]
EMBEDDED = [("osnet x0.25", (256, 128), 256), ("small_cnn", (128, 64), 512)]
EMBEDDED += [("resnet18", (256, 128), 128)]
PACES = {  # what a recipe's train section says
    "plain": {},
    "nhwc": {"layout": "nhwc"},
    "bf16 nhwc": {"precision": "bf16", "layout": "nhwc"},
    "auto": {"precision": "auto", "layout": "auto"},
    "compiled": {"precision": "bf16", "layout": "nhwc", "compiler": "inductor"},
}
Step = Callable[[], object]


def recipe_of(name: str, size: tuple[int, int], pace: dict[str, str]) -> Recipe:
    "A training of a network at a size, at a pace."
    data, model = {"height": size[0], "width": size[1]}, NETWORKS[name]
    return Recipe(name="bench", data=data, model=model, train=pace)


def batch_of(size: tuple[int, int]) -> Batch:
    "Sixteen people, four photos each, drawn at random."
    torch.manual_seed(0)
    n, pids = PEOPLE * PHOTOS, torch.arange(PEOPLE).repeat_interleave(PHOTOS)
    return Batch(torch.randn(n, 3, *size), pids, pids % 6, index=torch.arange(n))


def our_step(name: str, size: tuple[int, int], pace: dict[str, str]) -> tuple[Step, str]:
    "The trainer's step, and the pace that it runs at."
    recipe, batch = recipe_of(name, size, pace), batch_of(size)
    torch.manual_seed(0)
    model = model_from_recipe(recipe, N_PIDS)
    loss = loss_from_recipe(recipe, N_PIDS, model)
    make = lambda train: Trainer(deepcopy(model), deepcopy(loss), train)
    facts = network_facts(model, "bench_train") | {"photos": list(batch.images.shape)}
    question = Question(recipe.train, model, make, batch, facts)
    train = settled_training(None, recipe.train, lambda: question)
    trainer = Trainer(model, loss, train)
    trainer.begin(0)
    words = str(Pace(train.precision, train.layout, train.compiler))
    return lambda: float(trainer.step(batch)["loss"]), words


def hard_triplet(feats: torch.Tensor, pids: torch.Tensor, margin: float = 0.3) -> torch.Tensor:
    "Batch-hard triplet as it is usually written."
    dist, same = torch.cdist(feats, feats), pids[:, None] == pids[None, :]
    far = dist.masked_fill(~same, 0).amax(1)
    near = dist.masked_fill(same, math.inf).amin(1)
    return F.relu(margin + far - near).mean()


def loop_step(name: str, size: tuple[int, int]) -> Step:
    "The loop that everybody writes, around the same network."
    batch = batch_of(size)
    torch.manual_seed(0)
    model: nn.Module = model_from_recipe(recipe_of(name, size, {}), N_PIDS).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> float:
        (branch,) = model(batch.images)
        loss = F.cross_entropy(branch.logits, batch.pids, label_smoothing=0.1)
        loss = loss + hard_triplet(branch.feat, batch.pids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def torchreid_step(size: tuple[int, int]) -> Step:
    "One call of its engine's own step."
    batch = batch_of(size)
    torch.manual_seed(0)
    with torchreid_peer.quiet():
        model = torchreid_peer.network(N_PIDS).train()
        manager = torchreid_peer.Batches(N_PIDS)
        engine = torchreid_peer.engine(manager, model, epochs=1)
    told = {"img": batch.images, "pid": batch.pids}
    return lambda: engine.forward_backward(told)


def compiled_first(step: Step) -> float:
    "CPU seconds of a first call, the compiler's processes included; what a later one takes taken off."
    spent = lambda: time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    start = spent()
    step()
    first, start = spent() - start, spent()
    step()
    return max(0.0, first - (spent() - start))


def sides_of(name: str, size: tuple[int, int], paces: dict, peer: bool) -> dict[str, Step]:
    "All that is timed in a case."
    made: dict[str, Step] = {}
    for pace, told in paces.items():
        step, words = our_step(name, size, told)
        made[f"auto: {words}" if pace == "auto" else pace] = step
    made["the loop"] = loop_step(name, size)
    if peer and name.startswith("osnet"):
        made["torchreid"] = torchreid_step(size)
    return made


def training(
    name: str, size: tuple[int, int], paces: dict, pairs: int, peer: bool = False
) -> list[Row]:
    "Images per CPU second of each pace, against the loop and against torchreid."
    case = f"train {name} {size[0]}x{size[1]}, batch {PEOPLE * PHOTOS}"
    sides, rows = sides_of(name, size, paces, peer), []
    if "compiled" in sides:
        try:
            rows.append((case, "CPU s to compile", compiled_first(sides["compiled"]), math.nan, ""))
        except Exception as wrong:  # no compiler, or one that cannot do it: a result as well
            rows.append((case, f"not compiled: {type(wrong).__name__}", math.nan, math.nan, ""))
            del sides["compiled"]
    taken = paired(sides, pairs)
    for side in sides:
        measure, speed = f"images/s, {side}", PEOPLE * PHOTOS / min(taken[side])
        against = [p for p in ("the loop", "torchreid") if p in sides and p != side]
        if side in ("the loop", "torchreid"):
            rows.append((case, measure, speed, math.nan, ""))
            continue
        rows += [(case, measure, speed, 1 / best_ratio(taken, side, p), p) for p in against]
    return rows


def random_run(folder: Path, name: str, size: tuple[int, int]) -> tuple[Path, nn.Module]:
    "A finished run of a network with random weights, embedding as this machine does it fastest."
    recipe = recipe_of(name, size, {})
    rules = recipe.evaluate.model_copy(update={"precision": "auto", "layout": "auto"})
    recipe = recipe.model_copy(update={"evaluate": rules})
    model, run = (
        model_from_recipe(recipe, N_PIDS).eval(),
        open_run("bench", recipe, "train", root=folder),
    )
    plain = recipe.model_dump(mode="json")
    about = {"recipe": plain, "epoch": 0, "selection": "random weights"}
    file = run.path / "checkpoints" / "best.pt"
    file.parent.mkdir(exist_ok=True)
    save_checkpoint(file, model, architecture_of(model, recipe), **about)
    run.finish({}, verb="train")
    return run.path, model


def embedding(name: str, size: tuple[int, int], photos: int, pairs: int) -> list[Row]:
    "JPEG files to vectors: photos per CPU second, against the loop; and how near the vectors are."
    case = f"embed {photos} files, {name} {size[0]}x{size[1]}, batch 32"
    with tempfile.TemporaryDirectory() as folder:
        run, model = random_run(Path(folder), name, size)
        paths, ours = files_of(folder, photos), {"auto": Embedder(run)}
        ours["fast"] = Embedder(run, fast=True)
        sides = {side: embedded(embedder, paths) for side, embedder in ours.items()}
        loop = plain_loop(model, ours["auto"].contract)
        sides["the loop"] = lambda: loop(paths)
        near = F.cosine_similarity(sides["fast"](), sides["the loop"]()).min().item()
        taken = paired(sides, pairs)
    rows: list[Row] = [(case, "least cosine, fast", near, math.nan, "the loop")]
    for side, times in taken.items():
        ratio = 1 / best_ratio(taken, side, "the loop") if side in ours else math.nan
        against = "the loop" if side in ours else ""
        rows.append((case, f"photos/s, {side}", len(paths) / min(times), ratio, against))
    return rows


def embedded(embedder: Embedder, paths: list[Path]) -> Callable[[], torch.Tensor]:
    "Files to vectors by an Embedder."
    return lambda: torch.as_tensor(embedder.embed(paths, batch_size=32, progress=False))


def rates(tiny: bool, peer: bool, pairs: int, compiler: bool) -> list[Row]:
    "The first table."
    if tiny:
        paces = {pace: PACES[pace] for pace in ("plain", "bf16 nhwc", "auto")}
        rows = training("small_cnn", (32, 16), paces, pairs)
        return rows + embedding("small_cnn", (32, 16), 16, pairs)
    rows, seen = [], set()
    for name, size in CASES:
        paces = dict(PACES)
        if not compiler or name in seen:
            del paces["compiled"]
        seen.add(name)
        rows += training(name, size, paces, pairs, peer)
        print(f"{name} {size}: {time.process_time():.0f} CPU s", file=sys.stderr, flush=True)
    for name, size, photos in EMBEDDED:
        rows += embedding(name, size, photos, pairs)
    return rows


def accuracy(asked: argparse.Namespace, peer: bool) -> list[Row]:
    "The second table: CPU seconds to an accuracy."
    rows: list[Row] = []
    kept = {}
    for name in ["tiny"] if asked.tiny else asked.sets:
        tried = {k: v for k, v in race.TRIED[name].items() if peer or k != "torchreid"}
        try:
            open_data(race.recipe_of(name, tried["ours"][0], 0).data, 0, asked.data)
        except (OSError, ValueError) as wrong:
            rows.append((name, str(wrong).splitlines()[0], math.nan, math.nan, ""))
            continue
        kept[name], told = raced(asked, name, tried)
        rows += told
    if asked.curves:
        made = environment("cpu")
        about = {key: made[key] for key in ("started", "commit", "dirty", "device", "packages")}
        asked.curves.write_text(json.dumps({**about, "sets": kept}) + "\n")
    return rows


def raced(asked: argparse.Namespace, name: str, tried: dict) -> tuple[dict, list[Row]]:
    "A set's trainings, each side tuned before where that is wanted: for the file, and for the table."
    here = lambda side, name, setting, seed, *_: race.one(side, name, setting, seed, asked.data)
    train, rows = (here if asked.tiny else race.elsewhere), []
    options = ["--data", str(asked.data), "--peer", str(asked.peer)]
    chosen = {side: settings[0] for side, settings in tried.items()}
    if asked.tune:
        for side in tried:
            chosen[side], told = race.tuned(name, side, options, train)
            rows += told
    curves = race.curves_of(name, chosen, 1 if asked.tiny else 3, options, train)
    goal = race.GOALS[name]
    about = {"goal": goal.mAP, "size": goal.size, "settings": chosen, "curves": curves}
    return about, rows + race.raced(name, curves)


def arguments() -> argparse.Namespace:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="seconds: does the script run?")
    parser.add_argument("--accuracy", action="store_true", help="time to accuracy instead of rates")
    parser.add_argument(
        "--tune", action="store_true", help="choose each side's setting anew before"
    )
    parser.add_argument("--sets", nargs="+", choices=("synthetic", "vehicles8"), default=SETS)
    parser.add_argument("--install", action="store_true", help="put torchreid into --peer first")
    parser.add_argument("--peer", type=Path, default=torchreid_peer.FOLDER, help="its folder")
    parser.add_argument("--data", type=Path, default=settings().data_dir, help="where sets lie")
    parser.add_argument("--pairs", type=int, default=5, help="rounds of each case")
    parser.add_argument("--no-compiler", action="store_true", help="leave the compiled rows out")
    parser.add_argument("--curves", type=Path, help="write mAP against CPU seconds here, as JSON")
    parser.add_argument("--out", type=Path, help="results.csv, to append to")
    return parser.parse_args()


@contextmanager
def empty_caches() -> Iterator[None]:
    "Nothing that this machine found out before: choices of a pace, compiled code."
    with tempfile.TemporaryDirectory() as room:
        mine = {"REIDLAB_CACHE_DIR": room, "TORCHINDUCTOR_CACHE_DIR": f"{room}/compiled"}
        before = {key: os.environ.get(key) for key in mine}
        os.environ.update(mine)
        try:
            yield
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})


def main() -> None:
    asked = arguments()
    torch.set_num_threads(1)
    if asked.install:
        torchreid_peer.install(asked.peer)
    absent = torchreid_peer.why_absent(asked.peer)
    with empty_caches():
        if asked.accuracy:
            rows = accuracy(asked, peer=not absent)
        else:
            rows = rates(asked.tiny, not absent, asked.pairs, not asked.no_compiler)
    if absent:
        rows.append(("osnet x0.25", absent, math.nan, math.nan, ""))
    if asked.out:
        append(asked.out, rows, Path(__file__).name)
    print(table(rows))


if __name__ == "__main__":
    main()
