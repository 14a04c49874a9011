"""Does a tree still give the numbers that another gave? The same short runs in both, on this machine, to the bit.

    python tests/same_numbers.py --before COMMIT               # a worktree of that commit, and this tree
    python tests/same_numbers.py --freeze FILE                 # one side alone, kept for later
    python tests/same_numbers.py --before-results FILE         # this tree against what was kept
    python tests/same_numbers.py --before COMMIT --only smoke  # an entry, and what it needs
    python tests/same_numbers.py --before COMMIT --full        # at the recipes' own lengths

An entry is a page of the workbench and its parameters, no more: nothing here imports reidlab, so that
rooms may be renamed and recipes said in another form without this file noticing. Each entry runs in a
process of its own, in the tree's folder with the tree's code first on the path, one thread, data and
runs in a temporary folder; the page's cells are run one after the other, as papermill runs them. What
a run left on disk is then read: weights and alphas of the last checkpoint (sha256), genotypes, every
number of its metrics but times, the resolved recipe and the fingerprint of its photos.

Where a tree has the file NEWER, it is given an entry's `newer` overrides instead of `overrides`, and
recipes of a tree without it are upgraded before they are compared: by the function UPGRADE names, from
a recipe as a mapping to a recipe as a mapping, called in the tree that has it.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
RAW = (ROOT / "../shared/data").resolve()  # downloaded sets; without them their entries are skipped
NEWER, UPGRADE = "reidlab/core/upgrade.py", "reidlab.core.upgrade:upgrade"
TIMES = {  # numbers that say when, where or how fast
    *("seconds", "seconds_left", "images_per_s", "photos_per_s", "started", "beat", "pid", "host"),
    *(
        "began",
        "check",
        "seal",
        "format",
        "version",
        "processes",
        "threads",
        "ms",
        "latency",
        "peak_bytes",
    ),
}


RENAMED = {"data.pad": "data.augment.pad_crop.pixels"}  # in trees with NEWER


@dataclass(frozen=True)
class Entry:
    "One short run: a page, a recipe, what is overridden. `short` alone is left out by --full."

    page: str
    recipe: str = ""
    run: str = ""  # the run's folder; empty: the page leaves none
    overrides: Mapping[str, Any] = field(default_factory=dict)
    newer: Mapping[str, Any] | None = None  # for trees with NEWER; None: the same
    short: Mapping[str, Any] = field(default_factory=dict)
    newer_short: Mapping[str, Any] | None = None
    needs: tuple[str, ...] = ()  # entries that come before
    given: Mapping[str, Any] = field(default_factory=dict)  # other parameters of the page
    raw: str = ""  # a downloaded set without which the entry is skipped

    def parameters(self, newer: bool, full: bool) -> dict[str, Any]:
        "What the page is called with."
        overrides = self.newer if newer and self.newer is not None else self.overrides
        short = self.newer_short if newer and self.newer_short is not None else self.short
        said = {"recipe": self.recipe, "run": self.run}
        overrides = {**overrides, **({} if full else short)}
        overrides = {RENAMED.get(k, k) if newer else k: v for k, v in overrides.items()}
        said |= {"overrides": overrides} if overrides else {}
        return {k: v for k, v in said.items() if v} | dict(self.given)


TRAIN, SEARCH, EVALUATE = "nbs/train.ipynb", "nbs/search.ipynb", "nbs/evaluate.ipynb"
FEWER = {"data.synthetic.train_pids": 24, "data.synthetic.test_pids": 10}
FEW = FEWER | {"train.epochs": 3, "train.validate_every": 2}
HALF = {"data.height": 64, "data.width": 32, "data.pad": 5}
BRIEF = FEWER | {"search.epochs": 3, "search.warmup": 1, "search.validate_every": 3}
STRIPES = {
    **{"model.head": "pcb", "model.stripes": 3, "model.embedding": 16, "model.neck": "bn"},
    "model.global_branch": 16,
}
STRIPES_NEWER = {  # the same, as a recipe made of parts says it
    "model.head": {"pcb": {"stripes": 3, "global_branch": 16}},
    "model.neck": {"bn": {"embedding": 16}},
}
MANY = {  # options that no other entry asks for
    **{
        "data.sampler": "camera",
        "data.contrast": 0.2,
        "data.hue": 0.1,
        "data.noise": 4.0,
        "data.erase_fill": "noise",
    },
    **{"model.pool": "gem", "model.dropout": 0.1, "train.ema": 0.9, "train.accumulate": 2},
    **{"train.optimizer": "adam", "train.schedule": "multistep", "train.milestones": [1, 2]},
    **{"train.warmup_form": "ladder", "train.freeze_epochs": 1, "train.head_lr_factor": 2.0},
    **{"train.clip": 5.0, "train.lr_per": "epoch", "evaluate.rerank": "k_reciprocal"},
    "loss.terms": {"softmax": {"smoothing": 0.1}, "triplet": {"margin": 0.3}, "centre": {}},
}
AUGMENT = {  # of these options, as a recipe made of parts says it
    **{"flip": {}, "pad_crop": {}, "contrast": {"strength": 0.2}, "hue": {"strength": 0.1}},
    **{"noise": {"deviation": 4.0}, "erase": {"fill": "noise"}},
}
GONE = ("loss.terms", "model.dropout", "train.optimizer", "train.head_lr_factor")
GONE += ("train.schedule", "train.milestones", "train.warmup_form")
GONE += ("data.contrast", "data.hue", "data.noise", "data.erase_fill")
MANY_NEWER = {  # the same, as a recipe made of parts says it
    **{k: v for k, v in MANY.items() if k not in GONE},
    "loss": MANY["loss.terms"],
    "train.optimizer": {"adam": {"lr": 2e-3, "head_lr_factor": 2.0}},
    "search.optimizer.adamw.head_lr_factor": 2.0,
    "train.schedule": {"multistep": {"milestones": [1, 2]}},
    "train.warmup": "ladder",
    "data.augment": AUGMENT,
    "model.head": {"linear": {"dropout": 0.1}},
}
ENTRIES = {
    "smoke": Entry(TRAIN, "smoke", "smoke-train-s0", short=FEW | HALF),
    "smoke, ranked": Entry(EVALUATE, given={"run": "smoke-train-s0"}, needs=("smoke",)),
    "first_look, search": Entry(SEARCH, "first_look", "first_look-search-s0", short=BRIEF),
    **{
        f"first_look, {row}": Entry(
            *(TRAIN, f"first_look/{row}", f"first_look.{row}-train-s0"),
            short=FEW,
            needs=("first_look, search",) if row == "searched" else (),
        )
        for row in ("searched", "random", "handmade")
    },
    "cdnet": Entry(TRAIN, "cdnet_small", "cdnet_small-train-s0", short=FEW),
    "pcb": Entry(
        *(TRAIN, "smoke", "pcb-train-s0", STRIPES | HALF), newer=STRIPES_NEWER | HALF, short=FEW
    ),
    "pcb, ranked": Entry(EVALUATE, given={"run": "pcb-train-s0"}, needs=("pcb",)),
    "many options": Entry(
        *(TRAIN, "smoke", "many-train-s0", MANY | HALF), newer=MANY_NEWER | HALF, short=FEW
    ),
    "many, ranked": Entry(EVALUATE, given={"run": "many-train-s0"}, needs=("many options",)),
    "classes": Entry(TRAIN, "shapes", "shapes-train-s0", short={"train.epochs": 3}),
    "classes, judged": Entry(EVALUATE, given={"run": "shapes-train-s0"}, needs=("classes",)),
    "generator": Entry("nbs/generate.ipynb", "gan_people/smoke", "gan_people-generate-s0"),
    "distilled": Entry(
        *(TRAIN, "smoke", "taught-train-s0"),
        {"train.distill.teacher": "run:smoke-train-s0"},
        newer={"train.distill": {"teacher_student": {"teacher": "run:smoke-train-s0"}}},
        short=FEW | HALF,
        needs=("smoke",),
    ),
    "layers, explore": Entry(SEARCH, "cdnet_search", "explore-search-s0", short=BRIEF),
    "layers, reference": Entry(
        *(SEARCH, "cdnet_search/reference", "reference-search-s0"), short=BRIEF
    ),
    "partial channels": Entry(
        *(SEARCH, "smoke", "pcdarts-search-s0"),
        {"search.strategy": "pcdarts", "search.init_channels": 12},
        newer={"search.strategy": "pcdarts", "search.space.*.init_channels": 12},
        short=BRIEF | HALF,
    ),
    "vehicles8, prepared": Entry(
        "data_prep/market1501.ipynb", given={"name": "vehicles8"}, raw="vehicles8"
    ),
    "vehicles8": Entry(
        *(TRAIN, "vehicles8", "vehicles8-train-s0"),
        short={"train.epochs": 1, "train.validate_every": 1, "data.height": 32, "data.width": 32},
        needs=("vehicles8, prepared",),
    ),
    "vehicles8, ranked": Entry(EVALUATE, given={"run": "vehicles8-train-s0"}, needs=("vehicles8",)),
}

# ---------------------------------------------------------------- one page, in the tree's process


def walk(page: str, parameters: Mapping[str, Any]) -> None:
    "Run a page's cells one after the other, and say which code and which machine it was."
    import matplotlib

    matplotlib.use("Agg")
    names = {"__name__": "page"}
    for cell in json.loads(Path(page).read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), page, "exec"), names)
            if "parameters" in cell["metadata"].get("tags", []):
                names |= parameters
            matplotlib.pyplot.close("all") if hasattr(matplotlib, "pyplot") else None
    package = find_spec("reidlab")
    about = machine() | {"code": package.origin if package else "nowhere"}
    print("\n" + json.dumps(about))


def processor() -> str:
    "Who made it, where that can be read: libraries of one capability choose their kernels by that."
    info = Path("/proc/cpuinfo")
    said = re.search(r"vendor_id\s*:\s*(\S+)", info.read_text()) if info.is_file() else None
    return said[1] if said else platform.machine()


def machine() -> dict[str, Any]:
    "What the bits of a run may depend on."
    return {
        "torch": torch.__version__,
        "processor": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


# ---------------------------------------------------------------- what a run left on disk


def tensors(content: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    "Every tensor in a tree of mappings and lists, by its dotted name."
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, Mapping | list | tuple):
        parts = content.items() if isinstance(content, Mapping) else enumerate(content)
        for key, part in parts:
            yield from tensors(part, f"{name}.{key}" if name else str(key))


def digest(content: Any) -> str:
    "sha256 of names, types, shapes and bits; of a state dict, reidlab's weights_digest."
    seen = hashlib.sha256()
    for name, value in sorted(tensors(content), key=lambda item: item[0]):
        seen.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        seen.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return seen.hexdigest()


def numbers(content: Any, name: str = "") -> Iterator[tuple[str, float]]:
    "Every number but times in a tree of mappings and lists, by its dotted name."
    if isinstance(content, Mapping | list):
        parts = content.items() if isinstance(content, Mapping) else enumerate(content)
        for key, part in parts:
            if key not in TIMES:
                yield from numbers(part, f"{name}.{key}" if name else str(key))
    elif isinstance(content, bool | int | float):
        yield name, content


def read_lines(path: Path) -> dict[str, float]:
    "The numbers of a metrics.jsonl, its lines named by event and count."
    counts: dict[str, int] = {}
    found = {}
    for line in path.read_bytes().splitlines():
        event = json.loads(line)
        name = event["event"]
        counts[name] = counts.get(name, 0) + 1
        found |= numbers(event, f"{name} {counts[name]}")
    return found


def read_json(path: Path) -> Any:
    "The content of a JSON file."
    return json.loads(path.read_text(encoding="utf-8"))


def facts(folder: Path) -> dict[str, Any]:
    "All that is compared of one run."
    found: dict[str, Any] = {"metrics": {}, "genotypes": {}}
    last = folder / "checkpoints" / "last.pt"
    if last.is_file():
        content = torch.load(last, weights_only=True, map_location="cpu")
        found["weights"] = digest(content["model"])
        alphas = {name: value for name, value in content["model"].items() if "alpha" in name}
        found["alphas"] = digest(alphas) if alphas else ""
        others = {key: part for key, part in content.items() if key != "model"}
        found["state"] = {k: digest(part) for k, part in others.items() if dict(tensors(part))}
    if (folder / "metrics.jsonl").is_file():
        found["metrics"] |= read_lines(folder / "metrics.jsonl")
    for path in [folder / "metrics.json", *sorted(folder.glob("evaluate/*/metrics.json"))]:
        if path.is_file():
            found["metrics"] |= numbers(read_json(path), str(path.relative_to(folder)))
    for path in [*sorted(folder.glob("genotypes/*.json")), folder / "genotype.json"]:
        if path.is_file():
            found["genotypes"][path.name] = read_json(path)
    if (folder / "recipe.yaml").is_file():
        found["recipe"] = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        found["photos"] = read_json(folder / "environment.json").get("data")
    return {key: value for key, value in found.items() if value}


# ---------------------------------------------------------------- one side


def chosen(only: list[str], entries: Mapping[str, Entry] = ENTRIES) -> list[str]:
    "The entries to run, in their order: those whose name begins so, and what they need."
    wanted = [name for name in entries if not only or any(name.startswith(o) for o in only)]
    if not wanted:
        raise SystemExit(f"no entry begins with {', '.join(only)}; there are: {', '.join(entries)}")
    for name in reversed(entries):
        if name in wanted:
            wanted += [need for need in entries[name].needs if need not in wanted]
    return [name for name in entries if name in wanted]


def surroundings(tree: Path, place: Path) -> dict[str, str]:
    "The environment of a side: the tree's code, folders of its own, one thread."
    kept = {k: v for k, v in os.environ.items() if not k.startswith("REIDLAB_")}
    folders = {"DATA": "data", "RUNS": "runs", "RESULTS": "results", "WEIGHTS": "weights"}
    own = {f"REIDLAB_{key}_DIR": str(place / name) for key, name in folders.items()}
    own |= {"REIDLAB_RAW_DIRS": str(RAW), "REIDLAB_WORKERS": "0", "REIDLAB_DEVICE": "cpu"}
    return kept | own | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def called(tree: Path, place: Path, entry: Entry, full: bool) -> dict[str, Any]:
    "Run an entry's page in a process of its own: which machine and code it was, or why it failed."
    parameters = entry.parameters((tree / NEWER).is_file(), full)
    words = [sys.executable, "-P", __file__, "--walk", entry.page, json.dumps(parameters)]
    done = subprocess.run(
        *(words,),
        **{"cwd": tree, "env": surroundings(tree, place), "text": True},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
    )
    if done.returncode:
        return {"failed": (done.stderr.strip() or "no word of why").splitlines()[-1]}
    about = json.loads(done.stdout.rstrip().splitlines()[-1])
    if not Path(about["code"]).is_relative_to(tree):
        return {"failed": f"ran the code of {about['code']}, not of {tree}"}
    return about


def what_it_left(place: Path, entry: Entry) -> dict[str, Any]:
    "The facts of the run that an entry made or ranked, or of the set it prepared."
    run = entry.run or entry.given.get("run")
    if run:
        return facts(place / "runs" / run)
    manifest = place / "data" / entry.given["name"] / "manifest.csv"
    return {"manifest": hashlib.sha256(manifest.read_bytes()).hexdigest()}


def one_side(tree: Path, place: Path, names: list[str], full: bool) -> dict[str, Any]:
    "Run the entries in a tree: {commit, machine, entries: {name: facts, or why there are none}}."
    commit = git(tree, "describe", "--always", "--abbrev=12", "--dirty", "--exclude", "*")
    found: dict[str, Any] = {"commit": commit, "full": full, "entries": {}}
    found["newer"] = (tree / NEWER).is_file()
    for name in names:
        entry, missing, began = ENTRIES[name], None, cpu_seconds()
        if entry.raw and not any(RAW.glob(f"{entry.raw}*")):
            missing = {"skipped": f"{entry.raw} is not in {RAW}"}
        for need in entry.needs:
            held = found["entries"][need]
            missing = missing or {k: held[k] for k in ("skipped", "failed") if k in held}
        about = missing or called(tree, place, entry, full)
        if "code" in about:
            found["machine"] = {k: v for k, v in about.items() if k != "code"}
            about = what_it_left(place, entry)
        found["entries"][name] = about
        kept(found, place.with_suffix(".json"))
        why = about.get("failed") or about.get("skipped") or "done"
        took = f"{commit} {cpu_seconds() - began:4.0f} s of CPU"
        print(f"  {took}  {name}: {why}", file=sys.stderr, flush=True)
    return found


def cpu_seconds() -> float:
    "What the pages have used so far."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def git(tree: Path, *words: str) -> str:
    "What git says."
    done = subprocess.run(["git", "-C", tree, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@contextmanager
def worktree(commit: str, place: Path) -> Iterator[Path]:
    "A worktree of a commit, gone afterwards."
    tree = place / "tree"
    git(ROOT, "worktree", "add", "--detach", str(tree), commit)
    try:
        yield tree
    finally:
        git(ROOT, "worktree", "remove", "--force", str(tree))


# ---------------------------------------------------------------- two sides


def upgraded(before: dict[str, Any], tree: Path) -> dict[str, Any]:
    "Recipes of the older form in the newer one, by the newer tree's own function."
    module, function = UPGRADE.split(":")
    recipes = {k: v["recipe"] for k, v in before["entries"].items() if "recipe" in v}
    code = f"import json, sys; from {module} import {function} as f; "
    code += "from reidlab.core.recipe import validated; "
    code += "whole = lambda v: json.loads(validated('before', f(v)).model_dump_json()); "
    code += "print(json.dumps({k: whole(v) for k, v in json.load(sys.stdin).items()}))"
    done = subprocess.run(
        *([sys.executable, "-P", "-c", code],),
        **{"cwd": tree, "env": surroundings(tree, tree), "input": json.dumps(recipes)},
        **{"check": True, "stdout": subprocess.PIPE, "text": True},
    )
    entries = dict(before["entries"])
    for name, recipe in json.loads(done.stdout.splitlines()[-1]).items():
        entries[name] = entries[name] | {"recipe": recipe}
    return before | {"entries": entries}


def leaves(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    "Every value in a tree of mappings and lists, by its dotted name."
    if isinstance(content, Mapping | list) and content:
        parts = content.items() if isinstance(content, Mapping) else enumerate(content)
        for key, part in parts:
            yield from leaves(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, content


def fingerprints(said: str) -> dict[str, str]:
    "A fingerprint of photos by the rule it follows: '2:ab… 1:cd…', or the first rule's alone."
    return dict(w.split(":") if ":" in w else ("1", w) for w in said.split())


def differences(before: Any, after: Any) -> list[str]:
    "Where two facts of one kind differ: values that changed or went; new ones do no harm."
    one, other = dict(leaves(before)), dict(leaves(after))
    gone = [f"{key} went" for key in one if key not in other]
    both = [(key, one[key], other[key]) for key in one if key in other]
    return gone + [f"{k}: {a} → {b}" for k, a, b in both if a != b and not a != a != b != b]


def compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    "One entry's facts side by side: a row a kind."
    why = {
        s: x.get("failed") or x.get("skipped") for s, x in (("before", before), ("after", after))
    }
    if any(why.values()):
        both_skipped = "skipped" in before and "skipped" in after
        said = "; ".join(f"{side}: {reason}" for side, reason in why.items() if reason)
        return [
            {"what": "run", "verdict": "skipped" if both_skipped else "NOT RUN", "where": [said]}
        ]
    rows = []
    for what in [*before, *(key for key in after if key not in before)]:
        one, other = before.get(what), after.get(what)
        if what == "photos" and one and other:  # rules that both know
            one, other = fingerprints(one), fingerprints(other)
            shared = one.keys() & other.keys()
            one, other = ({k: side[k] for k in shared} or side for side in (one, other))
        where = differences(one, other) if what in before else []
        shown = [one[:12], other[:12]] if isinstance(one, str) and isinstance(other, str) else []
        verdict = "different" if where else "same" if what in before else "new"
        size = len(dict(leaves(one)))
        rows.append(dict(what=what, verdict=verdict, where=where, shown=shown, size=size))
    return rows


def table(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    "Every entry of both sides, compared."
    rows = []
    for name, facts_after in after["entries"].items():
        missing = {"failed": "not among these results"}
        for row in compared(before["entries"].get(name, missing), facts_after):
            rows.append({"entry": name, **row})
    return rows


def lines(rows: list[dict[str, Any]], most: int = 6) -> Iterator[str]:
    "The table as text, with the first places of each difference."
    for row in rows:
        sizes = f"{row['size']} values" if row.get("size", 1) > 1 else ""
        shown = " ".join(row.get("shown") or []) or sizes
        yield f"{row['entry']:<20} {row['what']:<10} {row['verdict']:<10} {shown}"
        yield from (f"    {place[:150]}" for place in row["where"][:most])
        if len(row["where"]) > most:
            yield f"    and {len(row['where']) - most} more"


def main() -> int:
    "The command line."
    about = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    about.add_argument("--before", help="a commit, run in a worktree of its own")
    about.add_argument("--before-results", type=Path, help="a file of --freeze or --keep instead")
    about.add_argument("--after-results", type=Path, help="the same, instead of this tree")
    about.add_argument("--freeze", type=Path, metavar="FILE", help="run one side and keep it here")
    about.add_argument("--tree", type=Path, default=ROOT, help="the side after; usually this tree")
    about.add_argument("--only", action="append", default=[], help="entries that begin so")
    about.add_argument("--full", action="store_true", help="at the recipes' own lengths")
    about.add_argument("--keep", type=Path, help="a folder for runs and both results")
    about.add_argument("--json", type=Path, help="the table as a file")
    about.add_argument("--walk", nargs=2, help=argparse.SUPPRESS)
    said = about.parse_args()
    if said.walk:
        walk(said.walk[0], json.loads(said.walk[1]))
        return 0
    if sum(map(bool, (said.before, said.before_results, said.freeze))) != 1 and not (
        said.before and said.freeze
    ):
        about.error("say one of --before COMMIT, --before-results FILE, --freeze FILE")
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as scratch:
        place = (said.keep or Path(scratch)).resolve()
        if any(place.glob("*/runs")):
            about.error(f"{place} holds runs already, which a page would show again. Name another")
        return both_sides(said, place, Path(scratch))


def both_sides(said: argparse.Namespace, place: Path, scratch: Path) -> int:
    "Run what is missing, compare, tell; 1 where something differs."
    names, full = chosen(said.only), said.full
    before = read_json(said.before_results) if said.before_results else None
    if said.before:
        with worktree(said.before, scratch) as tree:
            before = one_side(tree, place / "before", names, full)
    if said.freeze:
        kept(before or one_side(said.tree.resolve(), place / "after", names, full), said.freeze)
        return 0
    tree = said.tree.resolve()
    after = read_json(said.after_results) if said.after_results else None
    after = after or one_side(tree, place / "after", names, full)
    if before["full"] != after["full"]:
        raise SystemExit("one of the two was made with --full; make both with it, or both without.")
    if before.get("machine") != after.get("machine"):
        print(f"ANOTHER MACHINE: {before.get('machine')} → {after.get('machine')}")
    if after["newer"] and not before["newer"]:
        before = upgraded(before, tree)
    rows = table(before, after)
    print(f"{before['commit']} → {after['commit']}, {after.get('machine')}")
    print("\n".join(lines(rows)))
    if said.json:
        kept({"before": before["commit"], "after": after["commit"], "rows": rows}, said.json)
    return int(any(row["verdict"] in ("different", "NOT RUN") for row in rows))


def kept(content: dict[str, Any], path: Path) -> dict[str, Any]:
    "Write it, hand it back."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")
    return content


if __name__ == "__main__":
    sys.exit(main())
