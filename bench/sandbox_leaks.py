"""Whether destroying a replica leaves anything: what there is before and after many times "start, first correct answer, stop".

``python -m bench.sandbox_leaks [--rung bubblewrap|docker|gvisor] [--cycles N]``

Looked at on the whole machine, as sets of things that can be told apart: mounts, control groups of every hierarchy, processes (those in
other namespaces than this one's, and those that make sandboxes), Unix sockets with a name, shared memory, network namespaces that a process
or a mount holds; besides all open descriptors and threads of this process, all files below the warden's state directory but its journal,
and the engine's containers, images and volumes. What was not there before and stays there for as long as it is looked at (``--settle-s``)
is ``left`` where it carries a mark of a sandbox of this run (our folder, the warden's owner, a container's id, a network
namespace's mount) or nothing tells whose it is; other new things are counted as ``elsewhere``: a machine does other work too.
Exit status 1 where anything is left.
"""

import argparse
import asyncio
import contextlib
import os
import re
import sys
import time
from pathlib import Path

from bench.replica_memory import processes as sandbox_processes
from bench.report import report
from bench.sandboxes import RUNGS, Box, engine_socket, first_answer, run, running, scratch, speech, summary

WARM_UP_CYCLES = 3
LOOK_EVERY_S = 0.5
POOL_MOST, POOL_FILLS_S = 32, 0.1
NAMED = 3
MAKERS = ("bwrap", "setsid", "runsc", "containerd-shim", "docker-init", "exe")
JOURNAL = "journal.db"
UNMARKED = ("shared_memory", "state_files", "containers", "images", "volumes")
"""Kinds of things in which nothing says whose they are, or all are ours."""
_CONTAINER = re.compile("[0-9a-f]{64}")
_VOLATILE = re.compile(r"^\d+ \d+ \d+:\d+ ")

Seen = dict[str, set[str]]


def mounts() -> set[str]:
    """Every mount, without the numbers that the kernel gives it."""
    return {_VOLATILE.sub("", line) for line in Path("/proc/self/mountinfo").read_text().splitlines()}


def control_groups() -> set[str]:
    """Every group of every hierarchy."""
    lines = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    return {folder for fields in lines if fields[2] in ("cgroup", "cgroup2") for folder, _, _ in os.walk(fields[1])}


def processes(folder: str) -> tuple[set[str], set[str]]:
    """Processes of sandboxes, by pid, start and what they belong to; and who holds which other network namespace."""
    found, networks = set(), set()
    own = {kind: Path(f"/proc/self/ns/{kind}").readlink() for kind in ("net", "pid")}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            name, network = (entry / "comm").read_text().strip(), (entry / "ns/net").readlink()
            is_inside = (entry / "ns/pid").readlink() != own["pid"]
            if not is_inside and network == own["net"] and not name.startswith(MAKERS):
                continue
            started = (entry / "stat").read_text().rpartition(")")[2].split()[19]
            sees = folder if folder in (entry / "mountinfo").read_text() else ""
            belongs = f"{name} {sees} {(entry / 'cgroup').read_text()} {(entry / 'cmdline').read_text()}"
            found.add(f"{entry.name} {started} {belongs}")
            if network != own["net"]:
                networks.add(f"{network} {entry.name} {belongs}")
    return found, networks | {f"{inode} {point}" for inode, point in network_mounts()}


def network_mounts() -> set[tuple[str, str]]:
    """Network namespaces that a mount holds, and where."""
    lines = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - nsfs " in line)
    return {(fields[3], fields[4]) for fields in lines}


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
    state = box.config.state_dir
    inside, networks = processes(str(state))
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


def marks_of(box: Box) -> set[str]:
    """By what things of the sandbox that runs now can be known: its container's id, and where its network namespace is mounted."""
    found: set[str] = set()
    for name in box.slots.all():
        inside, shims = sandbox_processes(box, name)
        with contextlib.suppress(OSError):
            networks = {str(Path(f"/proc/{pid}/ns/net").readlink()) for pid in inside} - {str(Path("/proc/self/ns/net").readlink())}
            found.update(point for inode, point in network_mounts() if inode in networks)
        for pid in shims:
            with contextlib.suppress(OSError):
                found.update(_CONTAINER.findall(Path(f"/proc/{pid}/cmdline").read_text()))
    return found


def split(new: Seen, marks: set[str]) -> tuple[Seen, Seen]:
    """Ours, and what is of others."""
    ours = {kind: {i for i in items if kind in UNMARKED or any(mark in i for mark in marks)} for kind, items in new.items()}
    return ours, {kind: items - ours[kind] for kind, items in new.items()}


def own() -> dict[str, int]:
    """Of this process: descriptors and threads, the engine's client shut."""
    return {"descriptors": len(list(Path("/proc/self/fd").iterdir())), "threads": len(list(Path("/proc/self/task").iterdir()))}


async def left_behind(
    box: Box, before: Seen, own_before: dict[str, int], marks: set[str], settle_s: float
) -> tuple[Seen, Seen, dict[str, int]]:
    """What is new and stays, ours and of others, looked at until nothing of ours is or the time is over."""
    left: Seen = {}
    ours: Seen = {}
    others: Seen = {}
    grown: dict[str, int] = {}
    deadline = time.monotonic() + settle_s
    while not left or ((any(ours.values()) or any(grown.values())) and time.monotonic() < deadline):
        await asyncio.sleep(LOOK_EVERY_S)
        now = {kind: items - before.get(kind, set()) for kind, items in look(box).items()}
        left = {kind: items & now.get(kind, set()) for kind, items in left.items()} if left else now
        ours, others = split(left, marks)
        more = {kind: max(0, count - own_before[kind]) for kind, count in own().items()}
        grown = {kind: min(count, grown.get(kind, count)) for kind, count in more.items()}
    return ours, others, grown


async def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """A few cycles outside of the count, then all of them between two looks."""
    model, file, question = speech()
    took_s: list[float] = []
    marks: set[str] = set()

    async def cycle() -> None:
        started = time.perf_counter()
        box.want(1)
        (path,) = await box.sockets(1)
        await asyncio.to_thread(first_answer, path, question)
        took_s.append(time.perf_counter() - started)
        marks.update(await asyncio.to_thread(marks_of, box))
        await box.empty()

    with scratch() as folder:
        async with running(Box(folder / "box", arguments.rung, model=model, file=file)) as box:
            await asyncio.gather(*(asyncio.to_thread(time.sleep, POOL_FILLS_S) for _ in range(POOL_MOST)))  # all threads it may ever have
            for _ in range(WARM_UP_CYCLES):
                await cycle()
            await asyncio.sleep(arguments.settle_s / 4)
            before, own_before = look(box), own()
            took_s.clear()
            for index in range(arguments.cycles):
                await cycle()
                if index % 20 == 19:
                    sys.stderr.write(f"cycle {index + 1} of {arguments.cycles}\n")
            marks.update({str(folder), f"{box.config.fleet}-{box.config.node}-"})
            left, others, grown = await left_behind(box, before, own_before, marks, arguments.settle_s)
    counts = {kind: len(items) for kind, items in left.items()} | grown
    return {
        "rung": arguments.rung,
        "cycles": arguments.cycles,
        "first_answer": summary(took_s),
        "left": counts,
        "such_as": {kind: [item[:200] for item in sorted(items)[:NAMED]] for kind, items in left.items() if items},
        "elsewhere": {kind: len(items) for kind, items in others.items() if items},
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
