"""Processes that a cluster started: who they are, and that they make one run."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import TINY
from harming import open_ports

from reidlab.core.run import RunFolder
from reidlab.jobs.command import main
from reidlab.training.distributed import Member, hosts_of, member_of, near_store
from reidlab.training.launch import launch

SMALL = TINY | {"train.epochs": 1, "data.height": 32, "data.width": 16}


def torchrun(rank, port, world=2):
    numbers = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_PORT": port}
    return {k: str(v) for k, v in numbers.items()} | {"MASTER_ADDR": "localhost"}


def slurm(rank, port, world=2):
    numbers = {"PROCID": rank, "NTASKS": world, "LOCALID": rank, "JOB_ID": port - 12000}
    return {f"SLURM_{k}": str(v) for k, v in numbers.items()} | {"SLURM_NODELIST": "localhost"}


def free_port():
    "A port between 12000 and 32000 that nobody uses."
    for port in range(12000 + os.getpid() % 15000, 32000):
        with socket.socket() as s:
            if s.connect_ex(("localhost", port)):
                return port


def commanded(words, env=None):
    "A process of the command, started."
    outside = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    return subprocess.Popen(
        [sys.executable, "-m", "reidlab.jobs.command", *words],
        env=outside | {"OMP_NUM_THREADS": "1"} | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def together(words, by):
    "Two processes of one world to their end: [(exit code, what it said)]."
    port = free_port()
    both = [commanded(words, by(rank, port)) for rank in (0, 1)]
    said = [process.communicate(timeout=300) for process in both]
    ours = lambda text: "".join(x for x in text.splitlines(True) if not x.startswith("[Gloo]"))
    return [(p.returncode, ours(out), ours(err)) for p, (out, err) in zip(both, said, strict=True)]


def words(verb, name, run, **more):
    return [verb, name, "--run", run, "--device", "cpu", "--overrides", json.dumps(SMALL | more)]


def last(path):
    return torch.load(path / "checkpoints" / "last.pt", weights_only=True)["model"]


# on one machine both meet in the same way once each knows who it is; only Slurm leaves the port to us
@pytest.mark.parametrize("by", [slurm, pytest.param(torchrun, marks=pytest.mark.slow)])
def test_two_processes_of_a_cluster_make_one_run(by, stocked, capsys):
    code = main([*words("train", "smoke", "own"), "--gpus", "2"])
    said, wrong = capsys.readouterr()
    assert code == 0 and said.startswith("own: "), wrong
    theirs = last(stocked.runs / "own")
    name = by.__name__
    (zero, out, err), (one, quiet, aside) = together(words("train", "smoke", name), by)
    assert (zero, one) == (0, 0), err + aside
    assert out.startswith(f"{name}: ") and "epoch 1" in err
    assert quiet == "" and "epoch" not in aside
    run = RunFolder(stocked.runs / name)
    assert run.finished and run.environment["processes"] == 2
    assert len(run.events("epoch")) == 1
    assert all(torch.equal(v, theirs[k]) for k, v in last(run.path).items())
    assert {p.name for p in stocked.runs.iterdir()} == {"own", name}


def test_gpus_that_contradict_the_world_leave_no_folder(stocked, monkeypatch, capsys):
    wait = lambda *_: pytest.fail("it waits for the other")
    monkeypatch.setattr("reidlab.training.launch._join", wait)
    for rank in (0, 1):
        for name, value in torchrun(rank, free_port()).items():
            monkeypatch.setenv(name, value)
        code = main([*words("train", "smoke", "joined"), "--gpus", "3"])
        err = capsys.readouterr().err
        assert code == 1
        assert "gpus is 3, and torchrun has started 2 processes" in err and "Leave gpus at 0" in err
    assert not list(stocked.runs.iterdir())


# --- who am I --------------------------------------------------------------------------------

STEP = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "77",
    "SLURM_NODELIST": "a[1-4]",
}


@pytest.mark.parametrize(
    "nodelist, hosts",
    [
        ("gpu[01-03,07]", ["gpu01", "gpu02", "gpu03", "gpu07"]),
        ("n1,n2", ["n1", "n2"]),
        ("n1", ["n1"]),
        ("a[1,3],b[9-10],c", ["a1", "a3", "b9", "b10", "c"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("node-[098-101].site.org", [f"node-{n:03}.site.org" for n in range(98, 102)]),
    ],
)
def test_node_lists(nodelist, hosts):
    assert hosts_of(nodelist) == hosts


@pytest.mark.parametrize("nodelist", ["", "gpu[", "gpu[]", "gpu[3-1]", "gpu[a-b]", "a,,b;c", "[x]"])
def test_node_lists_that_are_none(nodelist):
    with pytest.raises(ValueError, match=r"node list|range of machines"):
        hosts_of(nodelist)


@pytest.mark.parametrize(
    "changes, member",
    [
        ({}, Member(5, 8, 1, "a1", 12077, "slurm")),
        ({"SLURM_STEP_NODELIST": "a[3-4]"}, Member(5, 8, 1, "a3", 12077, "slurm")),
        ({"SLURM_STEP_NUM_TASKS": "6"}, Member(5, 6, 1, "a1", 12077, "slurm")),
        ({"SLURM_STEP_ID": "2"}, Member(5, 8, 1, "a1", 14071, "slurm")),
        ({"SLURM_JOB_ID": "20000077"}, Member(5, 8, 1, "a1", 12077, "slurm")),
        ({"MASTER_ADDR": "b", "MASTER_PORT": "9"}, Member(5, 8, 1, "b", 9, "slurm")),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "", "SLURM_PROCID": "0"}, None),  # a batch script's own shell
        ({"SLURM_PROCID": ""}, None),  # a shell in an allocation
    ],
)
def test_slurm_says_who(changes, member):
    assert member_of(STEP | changes) == member


def test_torchrun_says_who():
    assert member_of(torchrun(1, 99)) == Member(1, 2, 1, "localhost", 99, "torchrun")
    assert member_of(torchrun(0, 99, world=1)) is None
    assert member_of({"MASTER_ADDR": "a", "MASTER_PORT": "1"}) is None  # exported by a script
    same = STEP | torchrun(5, 99, world=8)
    assert member_of(same).by == "torchrun"
    groups = {"GROUP_RANK": "5", "GROUP_WORLD_SIZE": "8"}
    assert member_of(STEP | torchrun(11, 99, world=16) | groups).rank == 11


@pytest.mark.parametrize(
    "env, words",
    [
        *(
            ({k: v for k, v in torchrun(1, 99).items() if k != name}, f"{name} is missing")
            for name in torchrun(1, 99)
        ),
        ({k: v for k, v in STEP.items() if k != "SLURM_NTASKS"}, "SLURM_NTASKS is missing"),
        ({k: v for k, v in STEP.items() if k != "SLURM_LOCALID"}, "SLURM_LOCALID is missing"),
        ({k: v for k, v in STEP.items() if k != "SLURM_JOB_ID"}, "SLURM_JOB_ID is missing"),
        ({k: v for k, v in STEP.items() if k != "SLURM_NODELIST"}, "NODELIST is missing"),
        (STEP | torchrun(1, 99), "torchrun says process 1 of 2, SLURM task 5 of 8"),
        (STEP | {"SLURM_PROCID": "8"}, "a world of 8 has no process 8"),
        (STEP | {"SLURM_PROCID": "-1"}, "SLURM_PROCID needs a whole number"),
        (torchrun(1, 99) | {"RANK": "one"}, "RANK needs a whole number, got 'one'"),
    ],
)
def test_half_said_or_twice(env, words):
    with pytest.raises(ValueError, match=words) as caught:
        member_of(env)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_world_of_one_starts_its_own(monkeypatch):
    for name, value in torchrun(0, 99, world=1).items():
        monkeypatch.setenv(name, value)
    assert launch(lambda device: device) == "cpu"


def test_a_store_that_can_be_reached_from_here_alone():
    port = free_port()
    with ThreadPoolExecutor() as pool:
        sides = [member_of(torchrun(rank, port)) for rank in (0, 1)]
        ours, theirs = pool.map(near_store, sides)
        ours.set("said", "here")
        assert theirs.get("said") == b"here"
        assert open_ports(os.getpid()) == []
        with pytest.raises(RuntimeError, match=f"port {port}, where .* Export another MASTER_PORT"):
            near_store(sides[0])
