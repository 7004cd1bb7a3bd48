"""Runs attempts one after the other, each in a child of its own, and prints a line of JSON for each: a verdict, or what broke.

A child that dies of SIGSYS in a call that it announced was held by the system call filter. One that ends in any other way without a
verdict says nothing of the sandbox: it is broken, and so is its test.
"""

import contextlib
import json
import os
import signal
import time
import traceback
from pathlib import Path

from . import bombs, exhaustion, filesystem, hostile, kernel, network, processes
from .verdict import ATTEMPTS, Attempt, Verdict, World, said, say

MODULES = (network, filesystem, kernel, processes, exhaustion)
TIME_LIMIT_S = 20


def _work(attempt: Attempt, world: World, answer_fd: int) -> None:
    """In the child: the attempt, and its verdict into the pipe."""
    os.setsid()
    silence = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(silence, fd)
    try:
        result: dict[str, object] = attempt.run(world)._asdict()
    except BaseException:  # noqa: BLE001 - whatever it was, the attempt is broken
        result = {"broken": traceback.format_exc().strip().replace("\n", " | ")[-400:]}
    os.write(answer_fd, json.dumps(result).encode())


def _wait(pid: int) -> int | None:
    """The child's wait status, or None where it had to be ended."""
    deadline = time.monotonic() + TIME_LIMIT_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _judge(attempt: Attempt, status: int | None, answer: bytes) -> dict[str, object]:
    if answer:
        found: dict[str, object] = json.loads(answer)
        return found
    if status is None:
        return {"broken": f"did not end within {TIME_LIMIT_S} s"}
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGSYS and said():
            return Verdict(True, f"SIGSYS from {said()}")._asdict()
        if number == signal.SIGKILL and attempt.killed_ok:
            return Verdict(True, "killed: out of memory")._asdict()
        return {"broken": f"died of {signal.Signals(number).name} at {said() or 'its start'}"}
    return {"broken": f"ended with {os.WEXITSTATUS(status)} and no verdict"}


def perform(attempt: Attempt, world: World) -> dict[str, object]:
    """One attempt in a child."""
    read_fd, write_fd = os.pipe()
    say("")
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read_fd)
            _work(attempt, world, write_fd)
        finally:
            os._exit(0)
    os.close(write_fd)
    status = _wait(pid)
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)  # what the attempt left running
    os.set_blocking(read_fd, False)
    try:
        answer = os.read(read_fd, 65536)
    except BlockingIOError:
        answer = b""
    os.close(read_fd)
    return _judge(attempt, status, answer)


def main(mode: str, world_file: str, *names: str) -> None:
    """``attempts`` runs those named; any other mode is a program of its own."""
    world = World.load(Path(world_file))
    if mode == "attempts":
        for name in names:
            bombs.tell(attempt=name, **perform(ATTEMPTS[name], world))
        bombs.tell(done=len(names), filtered="\nSeccomp:\t2" in Path("/proc/self/status").read_text())
    elif mode == "hostile":
        hostile.serve(world)
    else:
        bombs.PROGRAMS[mode](world)
