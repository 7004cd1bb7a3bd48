"""Programs that a sandbox runs alone, judged from outside: what they do may end it. Each prints how far it came.

Each stops by itself: after a number of forks, at a size, or when its time is over.
"""

import contextlib
import json
import mmap
import os
import signal
import socket
import sys
import time
from pathlib import Path

from .verdict import World, name_of

MIB = 2**20
MOST_FORKS = 2000
MOST_MIB = 4096
LIFE_S = 15


def tell(**facts: object) -> None:
    """A line for the judge outside."""
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def fork_bomb(_: World) -> None:
    """Every process forks without end. All die by their alarm."""
    life_s = 6
    count = mmap.mmap(-1, 8)
    signal.alarm(life_s)
    began = time.monotonic()
    first = os.getpid()
    refused = ""
    while time.monotonic() - began < life_s - 3:
        made = int.from_bytes(count[:8], "little")
        if made >= MOST_FORKS:
            break
        try:
            pid = os.fork()
        except OSError as exc:
            refused = exc.strerror or "refused"
            time.sleep(0.05)
            continue
        if pid == 0:
            signal.alarm(life_s)
        else:
            count[:8] = (int.from_bytes(count[:8], "little") + 1).to_bytes(8, "little")
    if os.getpid() == first:
        tell(forks=int.from_bytes(count[:8], "little"), refused=refused)
    time.sleep(2)
    os._exit(0)


def memory_bomb(_: World) -> None:
    """Touches memory without end."""
    taken = []
    for step in range(MOST_MIB // 32):
        try:
            taken.append(bytearray(b"x") * (32 * MIB))
        except MemoryError:
            tell(mib=step * 32, refused="MemoryError")
            return
        tell(mib=(step + 1) * 32)


def memory_bomb_of_many(_: World) -> None:
    """Eight processes that each touch 256 MiB and hold it, as a limit for one process does not count them together."""
    held = mmap.mmap(-1, 8)
    children = {}
    tell(mib=0)
    for number in range(8):
        pid = os.fork()
        if pid == 0:
            taken = []
            with contextlib.suppress(MemoryError):
                for step in range(8):
                    taken.append(bytearray(b"x") * (32 * MIB))
                    held[number] = step + 1
                    time.sleep(0.02)
            time.sleep(2)
            os._exit(0)
        children[pid] = number
    most, killed = 0, 0
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            killed += status == signal.SIGKILL
            held[children.pop(pid)] = 0
        mib = 32 * sum(held[:])
        if mib > most:
            most = mib
            tell(mib=most)
        time.sleep(0.002)
    tell(mib=most, refused=f"{killed} of 8 killed" if killed else "")


def zombies(_: World) -> None:
    """Processes that end and are never waited for."""
    made = 0
    try:
        while made < MOST_FORKS:
            if os.fork() == 0:
                os._exit(0)
            made += 1
            tell(made=made)
    except OSError as exc:
        tell(made=made, refused=name_of(exc))
        return
    tell(made=made, refused="")


def many_files(world: World) -> None:
    """Files in the socket directory, each within the bound of one, until the disk is full."""
    written = 0
    tell(ready=True)
    try:
        while written < 512 * MIB:
            with (Path(world.socket_dir) / f"fill-{written}").open("wb", buffering=0) as file:
                for _step in range(32):
                    written += file.write(bytes(MIB))
    except OSError as exc:
        tell(refused=name_of(exc))
    time.sleep(LIFE_S)


def deep_folders(world: World) -> None:
    """Folders in folders in the socket directory, deeper than a recursion in Python goes."""
    at = os.open(world.socket_dir, os.O_RDONLY)
    made, reason = 0, ""
    try:
        while made < 1500:
            os.mkdir("d", dir_fd=at)
            inner = os.open("d", os.O_RDONLY, dir_fd=at)
            os.close(at)
            at, made = inner, made + 1
    except OSError as exc:
        reason = name_of(exc)
    tell(ready=True, made=made, refused=reason)
    time.sleep(LIFE_S)


def memory_files(_: World) -> None:
    """Keeps memory in files without a name, which no limit of an address space counts."""
    files, mib = [], 0
    with contextlib.suppress(OSError):
        while mib < 1536:
            files.append(os.memfd_create("bomb"))
            for _step in range(48):
                os.write(files[-1], b"x" * MIB)
                mib += 1
            tell(mib=mib)
    tell(mib=mib, refused="" if mib >= 1536 else "refused")


def log_flood(_: World) -> None:
    """Writes 24 MiB to its standard output."""
    line = b"x" * 1023 + b"\n"
    for _step in range(24 * 1024):
        os.write(1, line)


def cpu_hog(_: World) -> None:
    """Two processes that compute, and tell from time to time how much processor time they had together."""
    used_ms = mmap.mmap(-1, 16)
    signal.alarm(LIFE_S)
    number = 0 if os.fork() else 1
    signal.alarm(LIFE_S)
    told = time.monotonic()
    while True:
        used_ms[8 * number : 8 * number + 8] = int(time.process_time() * 1000).to_bytes(8, "little")
        if number == 0 and time.monotonic() - told > 0.25:
            told = time.monotonic()
            tell(cpu_ms=int.from_bytes(used_ms[:8], "little") + int.from_bytes(used_ms[8:], "little"))


def ignored_signals(_: World) -> None:
    """Ignores every signal that can be."""
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN)
    tell(ready=True)
    time.sleep(LIFE_S)


def daemon(world: World) -> None:
    """Leaves its session and its parent twice, ignores signals, and goes on writing to a file."""
    if os.fork() == 0:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        if os.fork() == 0:
            beat = Path(world.socket_dir) / "beat"
            ends = time.monotonic() + LIFE_S
            while time.monotonic() < ends:
                beat.write_text(str(time.monotonic()))
                time.sleep(0.02)
        os._exit(0)
    tell(ready=True)
    time.sleep(LIFE_S)


def neighbour(world: World) -> None:
    """A replica that does nothing wrong: it listens where a worker would, and counts who comes."""
    with socket.socket(socket.AF_UNIX) as listener:
        path = Path(world.socket_dir) / "worker.sock"
        listener.bind(str(path))
        path.chmod(0o666)
        listener.listen()
        tell(ready=True)
        visits = 0
        while True:
            connection, _ = listener.accept()
            visits += 1
            tell(visits=visits)
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"reached")


PROGRAMS = {
    program.__name__.replace("_", "-"): program
    for program in (
        *(fork_bomb, memory_bomb, memory_bomb_of_many, memory_files, zombies, many_files, deep_folders, log_flood, cpu_hog),
        *(ignored_signals, daemon, neighbour),
    )
}
