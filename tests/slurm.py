"""A cluster of two nodes on this machine: SLURM's own daemons, as children of the test that asks for it."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
CONF = """\
ClusterName=little
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
AuthInfo=socket={root}/munge.socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/ctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/ctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
KillWait=5
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(n):
    "Ports of this machine that nobody uses."
    doors = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    found = [door.getsockname()[1] for door in doors]
    for door in doors:
        door.close()
    return found


def until(true, seconds=120, every=0.2):
    "Wait for something to become true, and give it back."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(ValueError, OSError):
            if found := true():
                return found
        time.sleep(every)
    raise AssertionError(f"in vain for {seconds} s: {true}")


def program(name):
    "Where a program of SLURM's is; daemons lie beside the usual path."
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _daemons(root, conf):
    "What a cluster consists of, in the order in which it has to start."
    kept = ("socket", "pid-file", "log-file", "seed-file")
    munge = [f"--{k}={root}/munge.{k.removesuffix('-file')}" for k in kept]
    yield "munged", ["-F", "--force", f"--key-file={root}/munge.key", *munge]
    yield "slurmctld", ["-D", "-c", "-f", conf]
    for node in ("n1", "n2"):
        yield "slurmd", ["-D", "-N", node, "-f", conf]


def say(*words, text=None):
    "What a program of SLURM's prints."
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@contextmanager
def cluster(root):
    "Two nodes with two cores each, up within the block."
    if missing := [name for name in NEEDED if not program(name)]:
        pytest.skip(f"needs slurm-wlm and munge: {missing[0]} is not here")
    user, host = getpass.getuser(), socket.gethostname()
    ports = dict(zip(("ctld", "n1", "n2"), free_ports(3), strict=True))
    conf = root / "slurm.conf"
    conf.write_text(CONF.format(root=root, user=user, host=host, **ports))
    (root / "munge.key").write_bytes(os.urandom(128))
    (root / "munge.key").chmod(0o400)
    for name in ("state", "spool-n1", "spool-n2"):
        (root / name).mkdir()
    running = []
    with pytest.MonkeyPatch.context() as patch, (root / "said").open("w") as said:
        patch.setenv("SLURM_CONF", str(conf))
        try:
            for name, words in _daemons(root, str(conf)):
                command = [program(name), *words]
                running.append(subprocess.Popen(command, stdout=said, stderr=said))
                if name == "munged":
                    until((root / "munge.socket").exists, seconds=10)
            until(lambda: say("sinfo", "-h", "-o", "%T %D") == "idle 2", seconds=30)
            yield SimpleNamespace(root=root, ended=ended, state=state)
            with suppress(subprocess.CalledProcessError):
                say("scancel", "--user", user)
                until(lambda: not say("squeue", "-h"), seconds=20)
        finally:
            for process in reversed(running):
                process.terminate()
            for process in running:
                process.wait(10)


def state(number):
    "What the controller knows of a job: {'JobState': …}."
    said = say("scontrol", "show", "job", number, "--oneliner")
    return dict(word.split("=", 1) for word in said.split() if "=" in word)


def ended(number, seconds=180):
    "The state in which a job ends, once it has."
    done = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
    return until(lambda: done & {state(number)["JobState"]}, seconds).pop()


def workers(**said):
    "The processes of the command whose environment says so: SLURM_ARRAY_TASK_ID='0'."
    wanted = {f"{key}={value}".encode() for key, value in said.items()}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            line = (process / "cmdline").read_bytes().split(b"\0")
            env = set((process / "environ").read_bytes().split(b"\0"))
            if b"reidlab.jobs.command" in line and wanted <= env:
                yield int(process.name)
