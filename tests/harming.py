"""What the processes of cases/test_crew.py do: apart from it, so that they need not import all of it."""

import os
import signal
from contextlib import suppress
from itertools import count
from pathlib import Path

from reidlab.core.processes import descendants, processes
from reidlab.nas.search import search_from_recipe
from reidlab.training import epoch
from reidlab.training.distributed import process_rank
from reidlab.training.fit import fit_from_recipe
from reidlab.training.step import Trainer

WORK = {"train": fit_from_recipe, "search": search_from_recipe}


def readers():
    "The reading processes of this one: those that it has forked, and no tracker of resources."
    words = lambda pid: Path(f"/proc/{pid}/cmdline").read_bytes()
    return [p for p in descendants(os.getpid(), processes()) if words(p) == words(os.getpid())]


def harm(what):
    if what == "exception":
        raise ValueError("a photo of nobody")
    if what == "asked":
        return os.kill(os.getpid(), signal.SIGTERM)
    pid = readers()[0] if "reader" in what else os.getpid()
    os.kill(pid, signal.SIGSTOP if "stopped" in what else signal.SIGKILL)


def note(folder):
    "Write down who is here, and which ports these listen on beyond the loopback."
    mine = [os.getpid(), *readers()]
    found = {str(pid): "" for pid in mine}
    found |= {f"{pid}:": str(open_ports(pid)) for pid in [os.getppid(), *mine]}
    lines = "".join(f"{key} {value}\n" for key, value in found.items())
    (Path(folder) / f"who{process_rank()}").write_text(lines)


def sockets(pid):
    "The sockets that a process holds."
    with suppress(FileNotFoundError):  # it has ended
        return {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
    return set()


def here_only(address):
    "Whether an address, as /proc/net/tcp writes it, is the loopback's."
    return address.startswith(
        ("0100007F:", "0" * 24 + "01000000:", "0000000000000000FFFF00000100007F:")
    )


def open_ports(pid):
    "Listening sockets of a process that are bound to more than the loopback address."
    own, found = sockets(pid), []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            _, here, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in own and not here_only(here):
                found.append(here)
    return found


def harmed(verb, fault, folder, device="cpu", **plain):
    "A training or search; fault: (what, on which rank, at which step or rename) or None."
    what, *at = fault or ("nothing", None, None)
    steps, renames, ask = count(1), count(1), epoch.ASK
    rated, renamed = Trainer.rate, os.replace

    def rate(self, t):
        if (now := next(steps)) == 2:
            note(folder)
        if [process_rank(), now] == at and "rename" not in what:
            harm(what)
        return rated(self, t)

    def replace(*names):
        if [process_rank(), next(renames)] == at and "rename" in what:
            harm(what)
        return renamed(*names)

    Trainer.rate, os.replace = rate, replace  # the rate is asked before every step
    epoch.ASK = 2
    try:
        return WORK[verb](folder=folder, device=device, **plain)
    finally:
        Trainer.rate, os.replace, epoch.ASK = rated, renamed, ask


def surroundings(device: str = "cpu") -> tuple[str, str]:
    "What a process sees of its starter's: a variable, and the working folder."
    return os.environ.get("WORD_OF_TODAY", ""), os.getcwd()
