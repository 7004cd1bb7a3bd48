"""Whether destroying a replica leaves anything: what there is before and after many times "start, first correct answer, stop".

``python -m bench.sandbox_leaks [--rung bubblewrap|docker|gvisor] [--cycles N]``

Counted on the whole machine, as sets of things that can be told apart: mounts, control groups of every hierarchy, processes (those in
other namespaces than this one's, and those that make sandboxes), Unix sockets with a name, shared memory, network namespaces that a process
or a mount holds; besides all open descriptors and threads of this process, all files below the warden's state directory but its journal,
and the engine's containers, images and volumes. What was not there before and stays there for as long as it is looked at (``--settle-s``)
is left: what other work on this machine makes and takes away again does not count. Exit status 1 where anything is left.
"""

import argparse
import asyncio
import contextlib
import os
import re
import sys
import time
from pathlib import Path

from bench.report import report
from bench.sandboxes import RUNGS, Box, engine_socket, first_answer, run, running, scratch, speech, summary

WARM_UP_CYCLES = 3
LOOK_EVERY_S = 0.5
NAMED = 3
MAKERS = ("bwrap", "setsid", "runsc", "containerd-shim", "docker-init", "exe")
JOURNAL = "journal.db"
_VOLATILE = re.compile(r"^\d+ \d+ \d+:\d+ ")

Seen = dict[str, set[str]]


def mounts() -> set[str]:
    """Every mount, without the numbers that the kernel gives it."""
    return {_VOLATILE.sub("", line) for line in Path("/proc/self/mountinfo").read_text().splitlines()}


def control_groups() -> set[str]:
    """Every group of every hierarchy."""
    lines = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    return {folder for fields in lines if fields[2] in ("cgroup", "cgroup2") for folder, _, _ in os.walk(fields[1])}


def processes() -> tuple[set[str], set[str]]:
    """Processes of sandboxes, by pid and start, and the network namespaces that any process is in."""
    found, networks = set(), set()
    own = Path("/proc/self/ns/pid").readlink()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            networks.add(str((entry / "ns/net").readlink()))
            name = (entry / "comm").read_text().strip()
            if (entry / "ns/pid").readlink() != own or name.startswith(MAKERS):
                started = (entry / "stat").read_text().rpartition(")")[2].split()[19]
                found.add(f"{entry.name} {started} {name}")
    networks |= {line.split()[3] for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - nsfs " in line}
    return found, networks


def named_sockets() -> set[str]:
    """Unix sockets with a name, in this network namespace."""
    lines = (line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    return {f"{fields[6]} {fields[7]}" for fields in lines if len(fields) > 7}


def shared_memory() -> set[str]:
    """System V segments, and files of POSIX ones."""
    segments = {line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]}
    return segments | {entry.name for entry in Path("/dev/shm").iterdir()}


def of_the_engine() -> Seen:
    """Its containers, images and volumes; nothing where it can't be reached."""
    import docker

    try:
        with contextlib.closing(docker.APIClient(f"unix://{engine_socket()}", version="auto")) as engine:
            return {
                "containers": {one["Id"] for one in engine.containers(all=True)},
                "images": {one["Id"] for one in engine.images(all=True)},
                "volumes": {one["Name"] for one in engine.volumes()["Volumes"] or []},
            }
    except docker.errors.DockerException:
        return {}


def look(box: Box) -> Seen:
    """Everything, once."""
    inside, networks = processes()
    state = box.config.state_dir
    return {
        "mounts": mounts(),
        "control_groups": control_groups(),
        "processes": inside,
        "unix_sockets": named_sockets(),
        "shared_memory": shared_memory(),
        "network_namespaces": networks,
        "state_files": {str(path.relative_to(state)) for path in state.rglob("*") if not path.name.startswith(JOURNAL)},
        **of_the_engine(),
    }


def own() -> dict[str, int]:
    """Of this process: descriptors and threads, the engine's client shut."""
    return {"descriptors": len(list(Path("/proc/self/fd").iterdir())), "threads": len(list(Path("/proc/self/task").iterdir()))}


async def left_behind(box: Box, before: Seen, own_before: dict[str, int], settle_s: float) -> tuple[Seen, dict[str, int]]:
    """What is new and stays, looked at until nothing is or the time is over."""
    left: Seen | None = None
    grown: dict[str, int] = {}
    deadline = time.monotonic() + settle_s
    while left is None or ((any(left.values()) or any(grown.values())) and time.monotonic() < deadline):
        await asyncio.sleep(LOOK_EVERY_S)
        now = {kind: items - before.get(kind, set()) for kind, items in look(box).items()}
        left = now if left is None else {kind: items & now.get(kind, set()) for kind, items in left.items()}
        more = {kind: max(0, count - own_before[kind]) for kind, count in own().items()}
        grown = {kind: min(count, grown.get(kind, count)) for kind, count in more.items()}
    return left, grown


async def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """A few cycles outside of the count, then all of them between two looks."""
    model, file, question = speech()
    took_s: list[float] = []

    async def cycle() -> None:
        started = time.perf_counter()
        box.want(1)
        (path,) = await box.sockets(1)
        await asyncio.to_thread(first_answer, path, question)
        await box.empty()
        took_s.append(time.perf_counter() - started)

    with scratch() as folder:
        async with running(Box(folder / "box", arguments.rung, model=model, file=file)) as box:
            for _ in range(WARM_UP_CYCLES):
                await cycle()
            await asyncio.sleep(arguments.settle_s / 4)
            before, own_before = look(box), own()
            took_s.clear()
            for index in range(arguments.cycles):
                await cycle()
                if index % 20 == 19:
                    sys.stderr.write(f"cycle {index + 1} of {arguments.cycles}\n")
            left, grown = await left_behind(box, before, own_before, arguments.settle_s)
    counts = {kind: len(items) for kind, items in left.items()} | grown
    return {
        "rung": arguments.rung,
        "cycles": arguments.cycles,
        "cycle": summary(took_s),
        "left": counts,
        "such_as": {kind: sorted(items)[:NAMED] for kind, items in left.items() if items},
        "bar_left": 0,
        "reached": not any(counts.values()),
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rung", choices=RUNGS, default="bubblewrap")
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--settle-s", type=float, default=20.0)
    arguments = parser.parse_args()
    found = run(lambda: measure(arguments))
    report("sandbox_leaks", **found)
    sys.exit(0 if found["reached"] else 1)


if __name__ == "__main__":
    main()
