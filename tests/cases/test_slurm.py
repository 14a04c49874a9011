"""Jobs in a queue: the script, what is said when SLURM is not as hoped, and a real cluster of two nodes."""

import json
import os
import shlex
import signal
import subprocess

import pytest
import torch
from conftest import TINY
from slurm import cluster, say, state, until, workers

from reidlab.core.files import read_json
from reidlab.core.run import RunFolder
from reidlab.core.settings import Profile
from reidlab.jobs.command import main
from reidlab.jobs.slurm import QueueJob, Work, batch_script
from reidlab.jobs.submit import submit

LONG = TINY | {"train.epochs": 12, "train.validate_every": 6, "data.height": 32, "data.width": 16}


@pytest.fixture(scope="module")
def queue(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("slurm")) as up:
        yield up


def last(path):
    return torch.load(path / "checkpoints" / "last.pt", weights_only=True)["model"]


def at_work(run, epoch=2):
    "A run that is past an epoch and not at its end."
    status = RunFolder(run).status()
    return status.get("state") == "running" and status.get("epoch", 0) >= epoch and status


def sent(folder):
    return read_json(folder / "submit.json")


def log(folder, name="slurm.log"):
    return (folder / name).read_text(errors="replace")


def test_two_ranks_are_stopped_requeued_and_end_with_the_same_bits(queue, stocked, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # goes with the job: other threads, other bits
    words = ["--overrides", json.dumps(LONG), "--gpus", "2", "--device", "cpu"]
    assert main(["train", "smoke", "--run", "straight", *words]) == 0
    words[3] = "1"  # of each of two nodes
    assert main(["submit", "train", "smoke", "--run", "sent", *words, "--nodes", "2"]) == 0
    folder = stocked.runs / "sent"
    number = sent(folder)["number"]
    until(lambda: at_work(folder), 90)
    say("scancel", "--batch", "--signal=USR1", number)
    assert queue.ended(number) == "COMPLETED", log(folder)
    assert state(number)["Restarts"] == "1", log(folder)
    said = log(folder)
    assert "back into the queue, restart 1 of at most 20: asked to stop (epoch" in said
    run = RunFolder(folder)
    assert run.finished and run.environment["processes"] == 2
    straight = last(stocked.runs / "straight")
    assert all(torch.equal(v, straight[k]) for k, v in last(folder).items())
    assert {p.name for p in folder.glob("*.ipynb")} == {"train.ipynb", "train-1.ipynb"}
    assert "stopped (the time of SLURM job" in (folder / "train-1.ipynb").read_text()
    assert not (folder / "stop").exists()


@pytest.mark.slow
def test_an_array_of_six_cells_survives_a_killed_task(queue, stocked):
    short = TINY | {"train.epochs": 2, "data.height": 32, "data.width": 16}
    grid = {"grid": {"train.clip": [0, 5]}, "seeds": [0, 1, 2], "overrides": short}
    it = submit("sweep", "smoke", **grid, device="cpu", tasks=3)
    task = {"SLURM_ARRAY_JOB_ID": it.number, "SLURM_ARRAY_TASK_ID": "0"}
    cells = [f"smoke-clip_{clip}-train-s{seed}" for clip in (0, 5) for seed in (0, 1, 2)]
    until(lambda: RunFolder(stocked.runs / cells[0]).status().get("state") == "running")
    (pid,) = workers(**task)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not say("squeue", "--noheader", "--jobs", it.number), 400)
    logs = [log(it.work.folder, f"slurm-{n}.log") for n in range(6)]
    assert any("back into the queue, restart 1" in said for said in logs), logs[0]
    assert "finished: exit code 0" in logs[0].split("back into the queue")[-1]
    runs = [RunFolder(stocked.runs / cell) for cell in cells]
    assert all(run.finished for run in runs)
    assert all(list(run.path.glob("evaluate/*/metrics.json")) for run in runs)


# --- without a cluster -----------------------------------------------------------------------


@pytest.fixture
def pretended(stocked, monkeypatch):
    "Programs of SLURM's that say what they are told to."
    monkeypatch.setenv("PATH", str(stocked.root / "bin"))
    (stocked.root / "bin").mkdir()

    def say_so(program, lines):
        path = stocked.root / "bin" / program
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(0o755)

    stocked.pretend = say_so
    return stocked


@pytest.mark.parametrize(
    "lines, state, told",
    [
        ("echo 7", "queued", "job 7."),
        ("echo '7;red'", "queued", "job 7."),
        ("echo Welcome to the cluster; echo 7", "queued", "job 7."),
        ("echo 'error: invalid account' >&2; exit 1", "failed", "error: invalid account"),
        ("exit 3", "failed", "exit code 3): it said nothing"),
        ("echo Submitted batch job 7", "failed", "where a job's number was expected"),
        ("echo 7; echo 8", "failed", "where a job's number was expected"),
        ("exit 0", "failed", "sbatch said ''"),
        (None, "failed", "sbatch is not on this machine"),
    ],
)
def test_what_sbatch_says(lines, state, told, pretended, capsys):
    if lines:
        pretended.pretend("sbatch", lines)
    code = main(["submit", "train", "smoke", "--run", "it", "--time", "8:00:00"])
    out, err = capsys.readouterr()
    assert code == (state == "failed") and told in out + err
    assert len((out + err).strip().splitlines()) == 1 and len(err) < 300
    record = sent(pretended.runs / "it")
    assert record["state"] == state and record["script"].startswith("#!/bin/bash\n# reidlab train")
    assert record["number"] == "7" if state == "queued" else record["why"]


def test_what_is_in_the_queue_is_not_sent_again(pretended):
    pretended.pretend("sbatch", "echo 7")
    assert submit("train", "smoke", run="it").number == "7"
    for said in ("echo 7 RUNNING", "echo 7 PENDING"):
        pretended.pretend("squeue", said)
        with pytest.raises(ValueError, match=r"in the queue already: job 7, (RUNNING|PENDING)"):
            submit("train", "smoke", run="it")
    pretended.pretend("squeue", "echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1")
    with pytest.raises(RuntimeError, match=r"squeue refused .*Unable to contact"):
        submit("train", "smoke", run="it")
    pretended.pretend("squeue", "echo 'error: Invalid job id specified' >&2; exit 1")
    pretended.pretend("sbatch", "echo 8")
    assert submit("train", "smoke", run="it").number == "8"
    assert [e["number"] for e in sent(pretended.runs / "it")["earlier"]] == ["7"]


def test_a_dry_run_writes_nothing_and_needs_no_cluster(pretended, capsys):
    before = sorted(pretended.root.rglob("*"))
    assert main(["submit", "search", "first_look", "--gpus", "4", "--nodes", "2", "--dry-run"]) == 0
    script = capsys.readouterr().out
    for line in ("#SBATCH --nodes=2", "#SBATCH --gpus-per-node=4", "#SBATCH --signal=B:USR1@120"):
        assert f"\n{line}\n" in script
    assert "--nproc-per-node=4" in script and "#SBATCH --requeue\n" in script
    assert sorted(pretended.root.rglob("*")) == before


def test_an_export_is_no_job_for_the_queue(pretended, capsys):
    assert main(["submit", "export", "smoke-train-s0", "--dry-run"]) != 0
    assert "export" in capsys.readouterr().err
    with pytest.raises(ValueError, match="verb 'export' not found"):
        submit("export", "smoke-train-s0", dry_run=True)


HOSTILE = ["it's", 'a "b" c', "$HOME `id` $(id)", "a\\b;&|", "50% #x", "ünï ✓", "-rf", "*"]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_asked_comes_back_from_the_shell_as_it_was(text, tmp_path, monkeypatch):
    monkeypatch.setenv("REIDLAB_ROOT", str(tmp_path))
    monkeypatch.setenv("REIDLAB_OWN", text)
    said = ("train", "smoke", "--overrides", json.dumps({"data.name": text}))
    folder = tmp_path / text.replace("\\", "/")
    script = batch_script(Work("it", folder, said), QueueJob(), Profile())
    assert script.count("\n#SBATCH") == 8 and "\ntrap ask USR1\n" in script
    (line,) = [x for x in script.splitlines() if x.startswith("    exec python")]
    assert tuple(shlex.split(line)[-4:]) == said
    show = script.split("\nset -m")[1].split("\ncd ")[0].partition("\n")[2]
    done = subprocess.run(["bash", "-c", f'{show}\nprintf %s "$REIDLAB_OWN"'], capture_output=True)
    assert done.stdout.decode() == text


@pytest.mark.parametrize("where", ["command", "folder", "environment"])
def test_nothing_writes_lines_of_its_own(where, tmp_path, monkeypatch):
    evil = "a\n#SBATCH --uid=0\nrm -rf /"
    monkeypatch.setenv("REIDLAB_ROOT", str(tmp_path))
    if where == "environment":
        monkeypatch.setenv("PYTHONPATH", evil)
    folder = tmp_path / (evil.replace("/", "") if where == "folder" else "runs")
    work = Work("it", folder, ("train", evil if where == "command" else "smoke"))
    with pytest.raises(ValueError, match="words of one line"):
        batch_script(work, QueueJob(), Profile())


# --- the script itself, with a job of a line ---------------------------------------------------


def carried_out(pretended, job, verdict, restarts="0", first=":"):
    "A script run here: its job is a line of shell, and what tells how it ended says so."
    work = Work("it", pretended.runs / "it", ("train", "smoke"))
    work.folder.mkdir(exist_ok=True)
    profile = Profile(setup=(f"export PATH={pretended.root}/bin:/usr/bin:/bin", first))
    script = batch_script(work, QueueJob(restarts=2), profile)
    (line,) = [x for x in script.splitlines() if x.startswith("    exec python")]
    script = script.replace(line, f"    {job}")
    pretended.pretend("python", f"echo '{verdict}'" if verdict else "exit 1")
    pretended.pretend("scontrol", "echo scontrol $*")
    env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarts}
    bash = ["/bin/bash", "-c", script]
    done = subprocess.run(bash, env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize(
    "job, verdict, restarts, code, last",
    [
        ("true", "finished: all", "0", 0, "reidlab: finished: all"),
        ("exit 1", "failed: bad recipe", "0", 1, "reidlab: failed: bad recipe"),
        ("true", "failed: odd", "0", 1, "reidlab: failed: odd"),
        ("exit 75", "stopped: minutes", "0", 0, "reidlab: stopped: minutes"),
        ("kill -KILL $BASHPID", "again: killed", "1", 0, "scontrol requeue 7"),
        ("exit 137", "again: killed", "2", 1, "reidlab: given up after 2 restarts: killed. To go on, submit it again."),
        ("exit 3", "", "0", 3, "reidlab: failed: exit code 3, and how the run stands cannot be told"),
    ],
)  # fmt: skip
def test_how_a_script_ends(job, verdict, restarts, code, last, pretended):
    found, said = carried_out(pretended, job, verdict, restarts)
    assert (found, said[-1]) == (code, last)


def test_usr1_lays_the_file_down_and_waits(pretended):
    wait = "kill -USR1 $$; until [ -e $run/stop ]; do sleep 0.1; done; cat $run/stop; exit 75"
    code, said = carried_out(pretended, wait, "again: asked to stop")
    assert code == 0 and said[-1] == "scontrol requeue 7"
    assert "the time of SLURM job 7 was over" in said
    assert not list((pretended.runs / "it").iterdir())
