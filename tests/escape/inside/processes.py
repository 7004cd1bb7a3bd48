"""Reaching other processes: those of the host, and what they hold in memory."""

import contextlib
import ctypes
import errno
import os
import signal
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .calls import all_refused, call, is_refused
from .verdict import NOT_THERE, Verdict, World, attempt, try_each

PTRACE_ATTACH = 16
PTRACE_SEIZE = 0x4206


@attempt("processes")
def trace_a_process(world: World) -> Verdict:
    """Attaches to a process outside by ptrace."""
    return all_refused(
        *(is_refused("ptrace", how, world.victim_pid, None, None, also=(errno.ESRCH,)) for how in (PTRACE_SEIZE, PTRACE_ATTACH))
    )


@attempt("processes")
def read_memory_of_a_process(world: World) -> Verdict:
    """Opens /proc/PID/mem of a process outside."""
    return try_each([("open", lambda: os.open(f"/proc/{world.victim_pid}/mem", os.O_RDWR) and "opened for writing")], held=NOT_THERE)


@attempt("processes")
def copy_memory_of_a_process(world: World) -> Verdict:
    """Copies memory of a process outside by process_vm_readv."""
    buffer = ctypes.create_string_buffer(8)
    vector = ctypes.create_string_buffer(struct.pack("=QQ", ctypes.addressof(buffer), 8), 16)
    return is_refused("process_vm_readv", world.victim_pid, vector, 1, vector, 1, 0, also=(errno.ESRCH,))


@attempt("processes")
def take_a_descriptor_of_a_process(world: World) -> Verdict:
    """Takes a file descriptor of a process outside by pidfd_getfd."""

    def take() -> str:
        process = call("pidfd_open", world.victim_pid, 0)
        call("pidfd_getfd", process, 0, 0)
        return "taken"

    return try_each([("pidfd_open", take)], held=NOT_THERE)


@attempt("processes")
def signal_a_process(world: World) -> Verdict:
    """Sends SIGTERM to a process outside."""

    def send() -> str:
        os.kill(world.victim_pid, signal.SIGTERM)
        return "the signal was sent"

    return try_each([("kill", send)], held=NOT_THERE)


def _pids() -> Iterator[str]:
    return (entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit())


@attempt("processes")
def see_processes_of_the_host(world: World) -> Verdict:
    """Looks in /proc for a process outside, and in every environment there for a secret."""

    def look(pid: str) -> str:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        return "a secret in an environment" if world.secret.encode() in environment else ""

    pids = list(_pids())
    if str(world.victim_pid) in pids:
        return Verdict(False, f"{len(pids)} processes are seen, one of the host's among them")
    return try_each((("open environ", partial(look, pid)) for pid in pids), held=NOT_THERE)


@attempt("processes")
def reach_the_root_of_a_process(world: World) -> Verdict:
    """Goes through /proc/PID/root and /proc/PID/cwd of every process it sees to a file of the host."""
    paths = [f"/proc/{pid}/{link}{world.secret_file}" for pid in [*_pids(), str(world.victim_pid)] for link in ("root", "cwd", "cwd/..")]
    return try_each((("open a file below it", Path(path).read_bytes) for path in paths), held=NOT_THERE)


@attempt("processes")
def escape_the_memory_killer(world: World) -> Verdict:
    """Lowers its oom_score_adj below that of the host's programs, so that they are killed before it."""
    path = Path("/proc/self/oom_score_adj")
    before = int(path.read_text())
    undone = ""
    with contextlib.suppress(OSError):
        path.write_text(str(world.oom_score_adj))
        undone = f"; {before} could be undone" if before > world.oom_score_adj else ""

    def lower() -> str:
        path.write_text(str(world.oom_score_adj - 1))
        return f"it is {path.read_text().strip()}, the host's {world.oom_score_adj}"

    verdict = try_each([("oom_score_adj", lower)], held=NOT_THERE)
    return Verdict(verdict.held, verdict.how + undone)


@attempt("processes")
def raise_its_priority(_: World) -> Verdict:
    """Asks for a better priority and for real-time scheduling."""

    def real_time() -> str:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        return "runs in real time"

    def nice() -> str:
        os.setpriority(os.PRIO_PROCESS, 0, -20)
        return f"priority {os.getpriority(os.PRIO_PROCESS, 0)}"

    return try_each([("setpriority", nice), ("sched_setscheduler", real_time)], held=NOT_THERE | {errno.EINVAL})
