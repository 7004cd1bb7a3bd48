"""Control groups of our own for sandboxes whose driver brings none: memory, processors and processes held by the kernel.

Version 2 where a subtree was delegated to the warden or it is root, else version 1 where it is root, else none: then resource limits
are all there is, and ``Driver.limits`` says so.
Files and their units: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of the kernel.
"""

import contextlib
import os
from pathlib import Path
from typing import Protocol

import msgspec

PERIOD_US = 100_000
_MOUNTS = Path("/proc/self/mounts")
_OWN = Path("/proc/self/cgroup")


class Counters(msgspec.Struct, frozen=True):
    """What a group used and what it was refused, since it was made."""

    memory_bytes: int
    cpu_seconds: float
    oom_kills: int
    pids_refused: int


class Cgroups(Protocol):
    """The groups of one warden, by sandbox name."""

    kind: str

    def create(self, name: str, *, memory_bytes: int, cpus: float, pids_max: int) -> list[Path]:
        """Make a group; returns the files to write a pid to. Raises OSError."""

    def counters(self, name: str) -> Counters | None:
        """What the group used, or None where it is gone."""

    def remove(self, name: str) -> None:
        """Remove a group whose processes have ended; one that is absent or still busy is left."""

    def names(self) -> set[str]:
        """Groups that exist."""


def _number(path: Path, key: str = "") -> int:
    """A number in a file of one, or of ``key number`` lines; 0 where there is none."""
    try:
        text = path.read_text()
    except OSError:
        return 0
    if not key:
        return int(text) if text.strip().isdigit() else 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{key} ")), 0)


def _rmdir(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()


class CgroupV1:
    """Groups below ``<mount>/skerry-<owner>`` in the hierarchies memory, pids and cpu(acct).

    The one in the memory hierarchy is made first and removed last: while there is any, it is seen.
    """

    kind = "cgroup1"

    def __init__(self, mounts: dict[str, Path], owner: str) -> None:
        self._roots = {controller: mounts[controller] / f"skerry-{owner}" for controller in ("memory", "pids", "cpu", "cpuacct")}

    def create(self, name: str, *, memory_bytes: int, cpus: float, pids_max: int) -> list[Path]:
        """See Cgroups."""
        memory, pids, cpu = (self._roots[controller] / name for controller in ("memory", "pids", "cpu"))
        folders = list(dict.fromkeys(root / name for root in self._roots.values()))
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        with_swap = memory / "memory.memsw.limit_in_bytes"
        if with_swap.exists():
            with_swap.write_text("-1")  # of a group that was left: memory alone may never be more than both together
        (memory / "memory.limit_in_bytes").write_text(str(memory_bytes))
        if with_swap.exists():
            with_swap.write_text(str(memory_bytes))  # memory and swap together: no swap
        (memory / "memory.swappiness").write_text("0")
        (pids / "pids.max").write_text(str(pids_max))
        (cpu / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (cpu / "cpu.cfs_quota_us").write_text(str(max(1000, int(cpus * PERIOD_US))))
        return [folder / "cgroup.procs" for folder in folders]

    def counters(self, name: str) -> Counters | None:
        """See Cgroups; the page cache that the kernel can take back is not counted."""
        memory = self._roots["memory"] / name
        if not memory.is_dir():
            return None
        cache = _number(memory / "memory.stat", "total_inactive_file")
        return Counters(
            memory_bytes=max(0, _number(memory / "memory.usage_in_bytes") - cache),
            cpu_seconds=_number(self._roots["cpuacct"] / name / "cpuacct.usage") / 1e9,
            oom_kills=_number(memory / "memory.oom_control", "oom_kill"),
            pids_refused=_number(self._roots["pids"] / name / "pids.events", "max"),
        )

    def remove(self, name: str) -> None:
        """See Cgroups."""
        memory, *others = dict.fromkeys(self._roots.values())
        for root in others:
            _rmdir(root / name)
        if not any((root / name).is_dir() for root in others):
            _rmdir(memory / name)
        for root in (memory, *others):
            _rmdir(root)  # the last one out

    def names(self) -> set[str]:
        """See Cgroups."""
        root = self._roots["memory"]
        return {folder.name for folder in root.iterdir() if folder.is_dir()} if root.is_dir() else set()


class CgroupV2:
    """Groups below ``base``, a delegated group in which no process of its own may stay."""

    kind = "cgroup2"

    def __init__(self, base: Path) -> None:
        self._base = base

    def create(self, name: str, *, memory_bytes: int, cpus: float, pids_max: int) -> list[Path]:
        """See Cgroups."""
        folder = self._base / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(str(memory_bytes))
        if (folder / "memory.swap.max").exists():
            (folder / "memory.swap.max").write_text("0")
        (folder / "memory.oom.group").write_text("1")
        (folder / "pids.max").write_text(str(pids_max))
        (folder / "cpu.max").write_text(f"{max(1000, int(cpus * PERIOD_US))} {PERIOD_US}")
        return [folder / "cgroup.procs"]

    def counters(self, name: str) -> Counters | None:
        """See Cgroups; the page cache that the kernel can take back is not counted."""
        folder = self._base / name
        if not folder.is_dir():
            return None
        return Counters(
            memory_bytes=max(0, _number(folder / "memory.current") - _number(folder / "memory.stat", "inactive_file")),
            cpu_seconds=_number(folder / "cpu.stat", "usage_usec") / 1e6,
            oom_kills=_number(folder / "memory.events", "oom_kill"),
            pids_refused=_number(folder / "pids.events", "max"),
        )

    def remove(self, name: str) -> None:
        """See Cgroups."""
        _rmdir(self._base / name)

    def names(self) -> set[str]:
        """See Cgroups."""
        return {folder.name for folder in self._base.iterdir() if folder.is_dir()} if self._base.is_dir() else set()


NEEDED = ("cpu", "memory", "pids")


def _version_2(owner: str) -> CgroupV2 | None:
    """A version 2 group that is ours to divide, with the controllers that limits need.

    As root, one of our own at the top. Else what systemd delegated, if it put the warden into the subgroup ``warden`` of that
    (``DelegateSubgroup=``): a group that hands controllers down may hold no process itself, so that without the subgroup systemd
    could not start the next warden beside sandboxes that run.
    """
    mount = next((Path(line.split()[1]) for line in _MOUNTS.read_text().splitlines() if line.split()[2] == "cgroup2"), None)
    path = next((line[3:] for line in _OWN.read_text().splitlines() if line.startswith("0::")), "/")
    if mount is None or not set(NEEDED) <= set((mount / "cgroup.controllers").read_text().split()):
        return None
    if os.geteuid() == 0:
        above, base = mount, mount / f"skerry-{owner}"
    elif path.endswith("/warden"):
        above = (mount / path.lstrip("/")).parent
        base = above / "sandboxes"
    else:
        return None
    base.mkdir(exist_ok=True)
    for folder in (above, base):
        (folder / "cgroup.subtree_control").write_text(" ".join(f"+{controller}" for controller in NEEDED))
    return CgroupV2(base)


def _version_1(owner: str) -> CgroupV1 | None:
    """Version 1, where its hierarchies are mounted and the warden may make groups in them."""
    mounts: dict[str, Path] = {}
    for line in _MOUNTS.read_text().splitlines():
        _, mount, kind, options = line.split()[:4]
        if kind == "cgroup":
            mounts |= {option: Path(mount) for option in options.split(",") if option in ("memory", "pids", "cpu", "cpuacct")}
    if set(mounts) != {"memory", "pids", "cpu", "cpuacct"} or not all(os.access(mount, os.W_OK) for mount in mounts.values()):
        return None
    return CgroupV1(mounts, owner)


def find(owner: str) -> Cgroups | None:
    """The best that this process may use; None where there is nothing but resource limits."""
    for look in (_version_2, _version_1):
        with contextlib.suppress(OSError):
            found: Cgroups | None = look(owner)
            if found is not None:
                found.create("probe", memory_bytes=64 * 2**20, cpus=1.0, pids_max=8)
                found.remove("probe")
                return found
    return None
