"""Damaged, foreign and doubly used run folders: one line that names the file, and never other bits."""

import json
import os
import shutil
import signal
import socket
import threading
import time
import warnings
from contextlib import suppress

import pytest
import torch
from conftest import tiny_recipe
from test_gan import PLAN

from reidlab.core import files
from reidlab.core.files import SEAL, clear_parts, hold, holder, holding, let_go, seal_of
from reidlab.core.run import RunFolder, load_runs, open_run
from reidlab.core.sealed import content_digest
from reidlab.data.loaders import open_data
from reidlab.evaluation import evaluate_run as evaluation
from reidlab.evaluation.evaluate_run import evaluate_run
from reidlab.evaluation.openings import count_opening, stored_result
from reidlab.jobs.grid import plan_cells
from reidlab.jobs.sweep import cell_state
from reidlab.nas.search import search_from_recipe
from reidlab.training.fit import fit_from_recipe
from reidlab.training.generate import generate_from_recipe, load_generator
from reidlab.training.trained import load_model

SMALL = {
    "data__height": 32,
    "data__width": 16,
    "data__val_fraction": 0.0,
    "train__epochs": 3,
    "data__synthetic__train_pids": 4,
}


class Killed(BaseException):
    "The process is gone: nothing of it runs any more."


def stop_after(epoch):
    "An on_epoch function that ends a training."

    def stop(path, record):
        if record["epoch"] == epoch:
            raise Killed

    return stop


def trained(root, photos, recipe, name="run", stop=0, work=fit_from_recipe, verb="train"):
    "A run's folder, opened and worked on until it ends or is stopped."
    data = open_data(recipe.data, recipe.seed, photos)
    path = open_run(name, recipe, verb, data.fingerprint, root=root).path
    with suppress(Killed):
        work(recipe, path, workers=0, data_dir=photos, on_epoch=[stop_after(stop)])
    return path


def bits(path):
    "A name for all that last.pt holds, but how long it took."
    content = torch.load(path / "checkpoints" / "last.pt", weights_only=True)
    content["progress"] |= {"seconds": 0}
    return content_digest({k: v for k, v in content.items() if k != "digest"})


WORK = {"train": fit_from_recipe, "search": search_from_recipe, "generate": generate_from_recipe}


def three_runs(root, photos, other, verb="train", **more):
    "Runs of one recipe: whole, stopped after two epochs, and one that another recipe made."
    recipe, about = tiny_recipe(**SMALL | more), {"work": WORK[verb], "verb": verb}
    found = {"photos": photos, "recipe": recipe, "about": about}
    found |= {"whole": trained(root, photos, recipe, "whole", **about)}
    found |= {"stopped": trained(root, photos, recipe, "stopped", stop=2, **about)}
    foreign = tiny_recipe(**SMALL | more | other)
    found |= {"foreign": trained(root, photos, foreign, "foreign", **about)}
    return found | {"bits": bits(found["whole"])}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Trainings, made once and evaluated."
    folders = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("few")
    found = three_runs(*folders, {"train__optimizer__adamw__lr": 0.5})
    for name in ("whole", "foreign"):
        evaluate_run(found[name], workers=0, data_dir=found["photos"])
    return found


@pytest.fixture(scope="module")
def drawing(made, tmp_path_factory):
    "The same of generators."
    root, other = tmp_path_factory.mktemp("runs"), {"train__gan__only__lr": 0.5}
    return three_runs(root, made["photos"], other, "generate", train__gan={"only": PLAN})


FIXTURES = {"train": "made", "generate": "drawing"}


def flipped(body, share):
    place = int(len(body) * share)
    return body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]


def zeroed(body):
    size = min(65536, len(body) // 3)
    return body[: len(body) // 2] + bytes(size) + body[len(body) // 2 + size :]


BODIES = {  # what became of a file's bytes
    "empty": lambda body: b"",
    "one byte": lambda body: body[:1],
    "half": lambda body: body[: len(body) // 2],
    "end cut off": lambda body: body[:-30],
    "begin cut off": lambda body: body[30:],
    "bit in the first third": lambda body: flipped(body, 0.3),
    "bit in the middle": lambda body: flipped(body, 0.5),
    "bit near the end": lambda body: flipped(body, 0.9),
    "64 kB of zeros": zeroed,
    "all zeros": lambda body: bytes(len(body)),
    "noise": lambda body: bytes((i * 89 + 41) % 256 for i in range(len(body))),
    "text": lambda body: b"hello, world\n",
    "a list": lambda body: b"[1, 2]",
    "null": lambda body: b"null",
    "nothing in it": lambda body: b"{}",
    "brackets": lambda body: b"[" * 50_000,
    "twice": lambda body: body + body,
    "UTF-16": lambda body: "héllo: {}".encode("utf-16"),
}


def harm(kind, file, foreign):
    "Damage a file."
    if kind in BODIES:
        file.write_bytes(BODIES[kind](file.read_bytes()))
    elif kind == "another run's":
        shutil.copy(foreign, file)
    else:
        file.unlink()
        if kind == "a folder":
            file.mkdir()


KINDS = [*BODIES, "another run's", "missing", "a folder"]
RUNNING = ["checkpoints/last.pt", "status.json", "environment.json", "recipe.yaml", "metrics.jsonl"]


def heard(work):
    "What a piece of work said: its error, or its warnings; and whether it came to its end."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            work()
        except (ValueError, FileNotFoundError) as wrong:
            said.append(wrong)
            ended = False
        else:
            ended = True
    lines = [str(getattr(each, "message", each)) for each in said]
    assert all("\n" not in line and len(line) < 900 for line in lines), lines
    return " | ".join(lines), ended


AT_DOOR = ("environment.json", "recipe.yaml")  # refused before anything is trained


def later(verb, i, file):
    "CI trains after every fourth damage, with a generator every eighth; the readers see all, below."
    if file in AT_DOOR:  # the same lines refuse both
        return verb != "train"
    return i % (4 if verb == "train" else 8) != 0


HARM = [
    pytest.param(verb, kind, file, marks=[pytest.mark.slow] if later(verb, i, file) else [])
    for verb in FIXTURES
    for i, kind in enumerate(KINDS)
    for file in RUNNING
]


@pytest.mark.parametrize(("verb", "kind", "file"), HARM)
def test_a_damaged_run_says_so_and_ends_with_the_same_bits_or_not_at_all(
    verb, kind, file, request, tmp_path
):
    made = request.getfixturevalue(FIXTURES[verb])
    path = shutil.copytree(made["stopped"], tmp_path / "stopped")
    harm(kind, path / file, made["foreign"] / file)

    def again():
        trained(tmp_path, made["photos"], made["recipe"], "stopped", **made["about"])

    said, ended = heard(again)
    name = file.rpartition("/")[2]
    assert name in said, said
    if ended:
        assert bits(path) == made["bits"]


TEST = "evaluate/synthetic/"
READERS = {
    "checkpoints/best.pt": load_model,
    "checkpoints/last.pt": lambda run: load_model(run, "last"),
    "metrics.jsonl": lambda run: RunFolder(run).history(),
    "metrics.json": lambda run: load_runs(roots=[run.parent]),
    "environment.json": lambda run: load_runs(roots=[run.parent]),
    "recipe.yaml": lambda run: load_runs(roots=[run.parent]),
    "status.json": lambda run: load_runs(roots=[run.parent]),
    f"{TEST}metrics.json": lambda run: stored_result(run / TEST),
    f"{TEST}opened.json": lambda run: count_opening(run / TEST),
}
FITS = ("metrics.json", "status.json", "metrics.jsonl", f"{TEST}metrics.json", f"{TEST}opened.json")
NOTHING = (*FITS, "recipe.yaml")
READ = [
    (kind, file)
    for kind in KINDS
    for file in READERS
    if not (kind == "another run's" and file in FITS)  # as whole as ours
    and not (kind in ("missing", "a folder") and file in NOTHING)  # a run that never got there
    and (kind, file) != ("twice", "metrics.jsonl")  # the later of two lines counts
]


@pytest.mark.parametrize(("kind", "file"), READ)
def test_readers_of_a_damaged_run_name_the_file(kind, file, made, tmp_path):
    path = shutil.copytree(made["whole"], tmp_path / "run")
    harm(kind, path / file, made["foreign"] / file)
    said, _ = heard(lambda: READERS[file](path))
    assert file.rpartition("/")[2] in said, said


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_generator_draws_nothing(kind, drawing, tmp_path):
    path = shutil.copytree(drawing["whole"], tmp_path / "run")
    file = "checkpoints/best.pt"
    harm(kind, path / file, drawing["foreign"] / file)
    said, ended = heard(lambda: load_generator(path))
    assert "best.pt" in said and not ended, said


def test_one_bad_folder_ends_no_table(made, tmp_path):
    for name in ("one", "two", "three"):
        shutil.copytree(made["whole"], tmp_path / name)
    (tmp_path / "two" / "metrics.json").write_bytes(b"{")
    with pytest.warns(UserWarning, match=r"run 'two' is left out: metrics.json in"):
        assert list(load_runs(roots=[tmp_path]).index) == ["one", "three"]
    with pytest.raises(ValueError, match=r"metrics\.json in"), pytest.warns(UserWarning):
        load_runs(["two"], [tmp_path])  # nothing else is left
    (cell,) = plan_cells("smoke", seeds=[0], overrides=made["recipe"].overrides)
    shutil.copytree(made["whole"], tmp_path / cell.name)
    assert cell_state(cell, tmp_path) == ("finished", "")
    (tmp_path / cell.name / TEST / "metrics.json").write_bytes(b"{")
    assert cell_state(cell, tmp_path)[0] == "damaged"


# --- whose is it -----------------------------------------------------------------------------


def changed(path, change):
    "Write a checkpoint as it was before there were digests, with something changed."
    content = torch.load(path, weights_only=True)
    content.pop("digest", None)
    change(content)
    torch.save(content, path)


def cut(part):
    "Half of every tensor of one dimension in a nested content."
    if isinstance(part, torch.Tensor):
        return part[: len(part) // 2] if part.dim() == 1 else part
    if isinstance(part, dict):
        return {key: cut(value) for key, value in part.items()}
    return [cut(value) for value in part] if isinstance(part, list) else part


CHANGES = {
    "epoch 99": (lambda c: (c["progress"].update(epoch=99), c.update(epoch=99)), "epoch 99"),
    "epoch -1": (lambda c: (c["progress"].update(epoch=-1), c.update(epoch=-1)), "epoch -1"),
    "step beyond the last": (lambda c: c["progress"].update(step=10_000), "step 10000"),
    "no progress": (lambda c: c.pop("progress"), "KeyError"),
    "no optimizer": (lambda c: c.pop("optimizer"), "KeyError"),
    "no weights": (lambda c: c.pop("model"), "holds no model"),
    "a weight short": (lambda c: c["model"].pop(next(iter(c["model"]))), "Missing key"),
    "a wider weight": (
        lambda c: c["model"].update(
            {k: v.repeat(2) for k, v in c["model"].items() if v.dim() == 1}
        ),
        "size mismatch",
    ),
    "moments of another shape": (
        lambda c: [s.update(exp_avg=torch.zeros(3)) for s in c["optimizer"]["state"].values()],
        "exp_avg has shape",
    ),
    "two processes": (lambda c: c.update(random=c["random"] * 2), "is of 2 processes"),
    "another data set": (lambda c: c.update(data="2:" + "0" * 64), "the data's fingerprint"),
    "another seed": (lambda c: c["recipe"].update(seed=7), "seed is 0 here and 7 there"),
    "a newer format": (lambda c: c.update(format=9), "has format 9"),
}


OF_A_GENERATOR = {key: CHANGES[key] for key in CHANGES if "optimizer" not in key} | {
    "no optimizers": (lambda c: c.pop("optimizers"), "KeyError"),
    "no baselines": (lambda c: c.pop("baselines"), "KeyError"),
    "one optimizer": (lambda c: c["optimizers"].pop(), "shorter"),
    "moments of another shape": (lambda c: c.update(optimizers=cut(c["optimizers"])), "has shape"),
    "an optimizer of nobody": (lambda c: c["optimizers"][1].update(param_groups=[]), "group"),
    "its optimizers the other way round": (lambda c: c["optimizers"].reverse(), "shape"),
}
CASES = [(FIXTURES["train"], k, *CHANGES[k]) for k in CHANGES]
CASES += [(FIXTURES["generate"], k, *OF_A_GENERATOR[k]) for k in OF_A_GENERATOR]


@pytest.mark.parametrize(
    ("runs", "kind", "change", "word"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES]
)
def test_a_checkpoint_that_cannot_be_this_runs_is_refused_by_name(
    runs, kind, change, word, request, tmp_path
):
    made = request.getfixturevalue(runs)
    path = shutil.copytree(made["stopped"], tmp_path / "stopped")
    (path / "checkpoints/previous.pt").unlink()
    if kind == "another data set":
        rule = made["recipe"] and RunFolder(path).environment["data"].rpartition(":")[0]
        other = f"{rule}:{'0' * 64}".removeprefix(":")
        change = lambda c: c.update(data=other)
    changed(path / "checkpoints/last.pt", change)
    again = (tmp_path, made["photos"], made["recipe"], "stopped")
    said, ended = heard(lambda: trained(*again, **made["about"]))
    assert not ended and "last.pt" in said and word in said, said


def as_before(path):
    "Take from a run all that its files say of themselves: a folder of an earlier reidlab."
    for file in path.glob("checkpoints/*.pt"):
        changed(file, lambda c: (c.pop("data", None), c.get("progress", {}).pop("loss", None)))
    for file in path.glob("*.json"):
        values = {k: v for k, v in json.loads(file.read_text()).items() if k != SEAL}
        values = {k: v for k, v in values.items() if k not in ("began", "recipe")}
        file.write_text(json.dumps(values))
    lines = (path / "metrics.jsonl").read_text().splitlines()
    plain = [json.dumps({k: v for k, v in json.loads(x).items() if k != "check"}) for x in lines]
    (path / "metrics.jsonl").write_text("\n".join(plain) + "\n")
    (path / ".lock").unlink()


def test_a_run_of_an_earlier_reidlab_goes_on_without_a_word(made, tmp_path):
    path = shutil.copytree(made["stopped"], tmp_path / "stopped")
    as_before(path)
    said, ended = heard(lambda: trained(tmp_path, made["photos"], made["recipe"], "stopped"))
    assert ended and not said
    assert bits(path) == made["bits"]
    assert list(RunFolder(path).history().epoch) == [1, 2, 3]


def test_a_run_keeps_its_number_of_processes(made, tmp_path):
    shutil.copytree(made["stopped"], tmp_path / "stopped")
    data = RunFolder(made["stopped"]).environment["data"]
    asked = ("stopped", made["recipe"], "train", data, "cpu")
    with pytest.raises(ValueError, match="the number of processes is 2 here and 1 there"):
        open_run(*asked, processes=2, root=tmp_path)
    shutil.copytree(made["whole"], tmp_path / "whole")
    assert open_run("whole", *asked[1:], processes=2, root=tmp_path).finished  # shown as it is


# --- two at once -----------------------------------------------------------------------------


def at_once(*works):
    "Begin all at the same moment; what each raised, or None."
    gate, ends = threading.Barrier(len(works)), [None] * len(works)

    def one(i):
        gate.wait()
        try:
            works[i]()
        except Exception as wrong:
            ends[i] = wrong

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def test_of_two_jobs_in_one_new_folder_one_works(made, tmp_path):
    both_ran = threading.Barrier(2)

    def job():
        with open_run("new", made["recipe"], "train", "abc", root=tmp_path).working():
            RunFolder(tmp_path / "new").log("epoch", epoch=1)
            with suppress(threading.BrokenBarrierError):
                both_ran.wait(0.5)  # the other comes while this one is at work, or not at all

    refused = [end for end in at_once(job, job) if end]
    assert len(refused) == 1 and "is being written by process" in str(refused[0])
    assert len(RunFolder(tmp_path / "new").events()) == 1


def test_of_two_recipes_under_one_new_name_one_is_refused(made, tmp_path):
    other = tiny_recipe(**SMALL, train__optimizer__adamw__lr=0.5)
    for i in range(10):
        tasks = [
            lambda r=r, i=i: open_run(f"new{i}", r, "train", root=tmp_path)
            for r in (made["recipe"], other)
        ]
        (refused,) = [end for end in at_once(*tasks) if end]
        assert "train.optimizer.adamw.lr is" in str(refused)


def test_two_evaluations_with_different_rules_keep_both(made, tmp_path, monkeypatch):
    path = shutil.copytree(made["whole"], tmp_path / "run")
    gate, embed = threading.Barrier(2), evaluation.embed_split

    def together(*args, **named):
        gate.wait(30)
        return embed(*args, **named)

    monkeypatch.setattr(evaluation, "embed_split", together)
    (path / TEST / "features.json").unlink()  # so that both take features
    rules = [{"evaluate.metric": "cosine", "evaluate.flip": flip} for flip in (True, False)]
    how = {"workers": 0, "data_dir": made["photos"]}
    seen = [None, None]

    def judge(i):
        seen[i] = evaluate_run(path, overrides=rules[i], **how)

    assert at_once(lambda: judge(0), lambda: judge(1)) == [None, None]
    records = [json.loads(f.read_text()) for f in (path / TEST).glob("metrics*.json")]
    assert sorted(r["protocol"]["times_opened"] for r in records) == [1, 2, 3]
    assert [r["protocol"]["flip"] for r in seen] == [True, False]


def test_who_waits_says_for_whom_and_gives_signs_of_life(tmp_path, monkeypatch, capsys):
    "Until the holder is gone: here a process that is killed when it has been waited for twice."
    ready, signs = os.pipe(), []
    if (child := os.fork()) == 0:
        hold(tmp_path / ".lock")
        os.write(ready[1], b"1")
        signal.alarm(60)  # whatever becomes of the parent
        signal.pause()
    os.read(ready[0], 1)

    def sign(words):
        signs.append(words)
        if len(signs) == 2:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    monkeypatch.setattr(files, "TURN", 0.0)
    with holding(tmp_path / ".lock", "evaluating run a", sign):
        assert len(signs) == 2 and hold(tmp_path / ".lock") is None
    who = f"process {child} on {socket.gethostname()}, since 20"
    assert capsys.readouterr().err.startswith(f"evaluating run a waits for {who}")
    assert all(words.startswith(f"waiting for {who}") for words in signs)
    assert holder(tmp_path / ".lock").startswith(f"process {os.getpid()} ")


@pytest.mark.parametrize("content", [b"", b"\xff\0", b"process 1\nfailed", b"x" * 10**6])
def test_a_lock_in_which_something_else_is_written_is_a_lock(content, tmp_path):
    (tmp_path / ".lock").write_bytes(content)
    assert holder(tmp_path / ".lock") == "another process"
    held = hold(tmp_path / ".lock")
    assert held is not None and hold(tmp_path / ".lock") is None
    let_go(held)


def test_an_evaluation_that_has_to_wait_says_for_whom(made, tmp_path, monkeypatch, capsys):
    path, signs = shutil.copytree(made["whole"], tmp_path / "run"), []
    mine = hold(path / ".lock")

    def sign(words="", limit=0.0):
        signs.append(words)
        if words.startswith("waiting"):
            let_go(mine)

    monkeypatch.setattr(evaluation, "alive", sign)
    rules = {"evaluate.max_rank": 7}
    evaluate_run(path, overrides=rules, workers=0, data_dir=made["photos"])
    assert f"evaluating run waits for process {os.getpid()} on " in capsys.readouterr().err
    assert any(words.startswith("waiting for process") for words in signs)


def test_a_copy_of_a_run_that_is_being_written_is_a_run_of_its_own(made, tmp_path):
    path = shutil.copytree(made["stopped"], tmp_path / "stopped")
    os.utime(path / ".lock")
    data = RunFolder(path).environment["data"]
    child, go = os.pipe(), os.pipe()
    if (writer := os.fork()) == 0:
        RunFolder(path).beat("running")
        os.write(child[1], b"1")
        os.read(go[0], 1)
        os._exit(0)
    os.read(child[0], 1)
    shutil.copytree(path, tmp_path / "copy" / "stopped")
    with pytest.raises(ValueError, match=f"is being written by process {writer} on"):
        open_run("stopped", made["recipe"], "train", data, root=tmp_path)
    said, ended = heard(
        lambda: trained(tmp_path / "copy", made["photos"], made["recipe"], "stopped")
    )
    os.write(go[1], b"1")
    os.waitpid(writer, 0)
    assert ended and not said and bits(tmp_path / "copy" / "stopped") == made["bits"]


NOW = {"state": "running", "pid": os.getppid(), "host": socket.gethostname()}


@pytest.mark.parametrize(
    "pulse",
    [
        NOW | {"began": "00000000-0000-0000-0000-000000000000 17"},  # another boot's
        NOW | {"beat": -300.0},  # of an earlier reidlab, and long silent
        NOW | {"host": "elsewhere", "beat": 3e7},
        NOW | {"host": "elsewhere", "beat": 130.0},
        NOW | {"host": "elsewhere", "beat": -130.0},
        NOW | {"pid": 2**22 + 1},  # more than there are
        NOW | {"pid": -1},
        NOW | {"pid": 0},
    ],
)
def test_a_pulse_of_the_dead_locks_no_run(pulse, made, tmp_path):
    path = shutil.copytree(made["stopped"], tmp_path / "stopped")
    told = pulse | {"beat": time.time() + pulse.get("beat", 0.0)}
    (path / "status.json").write_text(json.dumps(told))
    data = RunFolder(path).environment["data"]
    open_run("stopped", made["recipe"], "train", data, root=tmp_path)


def test_a_run_on_another_host_that_beats_is_left_alone(made, tmp_path):
    path = shutil.copytree(made["stopped"], tmp_path / "stopped")
    for ahead in (-60, 0, 60):  # clocks differ a little
        told = NOW | {"host": "elsewhere", "beat": time.time() + ahead}
        (path / "status.json").write_text(json.dumps(told))
        with pytest.raises(ValueError, match=f"process {os.getppid()} on elsewhere"):
            open_run(
                "stopped",
                made["recipe"],
                "train",
                RunFolder(path).environment["data"],
                root=tmp_path,
            )


# --- what a crash leaves ---------------------------------------------------------------------


@pytest.mark.parametrize("torn", [b'{"event": "epoch", "epo', b'{"event": "epoch", "epoch": 3}'])
def test_a_torn_last_line_takes_no_other_with_it(torn, tmp_path):
    run = RunFolder(tmp_path / "run")
    run.log("epoch", epoch=1)
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    run.log("epoch", epoch=2)
    whole = [1, 3, 2] if torn.endswith(b"}") else [1, 2]  # a line that lacks its end alone
    assert [e["epoch"] for e in run.events()] == whole


def test_half_written_files_of_the_dead_are_cleared_and_the_others_are_not(made, tmp_path):
    path = shutil.copytree(made["stopped"], tmp_path / "stopped")
    left = [path / f".recipe.yaml.{pid}.part" for pid in (os.getpid(), 999_999)]
    left += [path / "checkpoints" / ".last.pt.12.part"]
    for file in left:
        file.write_bytes(b"half")
    mine = path / ".metrics.json.17.part"
    held = hold(mine)
    assert mine not in clear_parts(path) and mine.is_file()
    assert not any(file.exists() for file in left)
    let_go(held)
    left[0].write_bytes(b"half")
    trained(tmp_path, made["photos"], made["recipe"], "stopped")
    assert not list(path.rglob("*.part")) and bits(path) == made["bits"]


def kill_at(number, patch):
    "From the given rename on, nothing of this process happens any more."
    left, real = iter(range(number)), os.replace

    def replace(*names):
        if next(left, None) is None:
            raise Killed
        real(*names)

    patch.setattr(os, "replace", replace)


SEARCH = {
    "search__epochs": 2,
    "search__warmup": 0,
    "data__sampler__pk__p": 4,
    "search__space__*__nodes": 1,
    "search__space__*__init_channels": 4,
}


@pytest.fixture(scope="module")
def searched(tmp_path_factory, made):
    "A search that was never interrupted."
    recipe = tiny_recipe(**SMALL | {"data__height": 64, "data__width": 32}, **SEARCH)
    data, root = tmp_path_factory.mktemp("few"), tmp_path_factory.mktemp("runs")
    path = trained(root, data, recipe, "whole", 0, search_from_recipe, "search")
    return {"photos": data, "recipe": recipe, "bits": bits(path)}


POINTS = [("train", n) for n in (1, 2, 4, 5, 7, 9, 12, 15, 18)] + [
    ("search", n) for n in (5, 9, 13)
]
POINTS += [("generate", n) for n in (8, 14)]
MORE = [(verb, n) for verb in WORK for n in range(32) if (verb, n) not in POINTS]


@pytest.mark.parametrize(
    ("verb", "number"), POINTS + [pytest.param(*p, marks=pytest.mark.slow) for p in MORE]
)
def test_a_kill_at_a_rename_changes_no_bit(verb, number, request, tmp_path, monkeypatch):
    kept = request.getfixturevalue((FIXTURES | {"search": "searched"})[verb])
    asked = (tmp_path, kept["photos"], kept["recipe"], "run", 0, WORK[verb], verb)
    with monkeypatch.context() as patch:
        kill_at(number, patch)
        with suppress(Killed):
            trained(*asked)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert bits(trained(*asked)) == kept["bits"]
    assert not RunFolder(tmp_path / "run").history().epoch.duplicated().any()


REST = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "another run's"]


@pytest.mark.parametrize("kind", ["another run's", *REST])
def test_a_search_falls_back_too(kind, searched, made, tmp_path):
    asked = (tmp_path, searched["photos"], searched["recipe"], "run")
    path = trained(*asked, 1, search_from_recipe, "search")
    last = path / "checkpoints/last.pt"
    shutil.copy(last, last.with_name("previous.pt"))
    harm(kind, last, made["foreign"] / "checkpoints/last.pt")
    said, ended = heard(lambda: trained(*asked, 0, search_from_recipe, "search"))
    assert ended and "last.pt" in said, said
    assert bits(path) == searched["bits"]
    assert len(RunFolder(path).events("warning")) == 1


def test_a_search_that_may_stop_from_its_first_epoch_does(searched, tmp_path):
    recipe = tiny_recipe(
        **SMALL | {"data__height": 64, "data__width": 32},
        **SEARCH
        | {"search__stop": True, "search__space__*__ops": ["max_pool_3x3", "skip_connect", "none"]},
    )
    path = trained(tmp_path, searched["photos"], recipe, "run", 0, search_from_recipe, "search")
    assert "alphas after epoch" in RunFolder(path).metrics()["selection"]


def test_a_seal_says_nothing_of_blanks_and_order(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.beat("stopped", epoch=2)
    values = json.loads((run.path / "status.json").read_text())
    mixed = json.dumps(dict(reversed(values.items())), indent=7)
    (run.path / "status.json").write_text(mixed)
    assert heard(run.status) == ("", True) and values[SEAL] == seal_of(values)
