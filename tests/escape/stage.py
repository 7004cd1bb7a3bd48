"""The world outside that attempts aim at: listeners, a secret, a process to reach, and the sandboxes they run in."""

import asyncio
import contextlib
import ctypes
import json
import os
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import psutil

from edge_agent.core.crash import Attempts
from edge_agent.core.pool import Kind
from edge_agent.warden.ports import Driver, SandboxSpec
from edge_agent.warden.slots import Slot, Slots
from tests.escape import rungs
from tests.escape.inside.network import GREETING
from tests.escape.inside.verdict import World

INSIDE = Path(__file__).with_name("inside")
BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from inside.run import main; main(*sys.argv[2:])"
MEMORY_BYTES = 512 * 2**20
FIRST_UID = 1_879_100_000
LINE_TIMEOUT_S = 60.0
PIDS_MAX = 512
"""Where processes are not what is tried: gVisor's kernel needs about a hundred threads of the host's, which count too."""
SYSLOG_READ_ALL = 3


class Listeners:
    """TCP, UDP and Unix listeners of this machine, in a thread; ``visits`` counts who came to the Unix socket."""

    def __init__(self, folder: Path) -> None:
        self.abstract = f"skerry-escape-{uuid.uuid4().hex}"
        self.unix = folder / "host.sock"
        self.visits = 0
        self._selector = selectors.DefaultSelector()
        self._running = True
        found = [(str(a.family.name), a.address.split("%")[0]) for addresses in psutil.net_if_addrs().values() for a in addresses]
        self.tcp: list[list[Any]] = []
        self.udp: list[list[Any]] = []
        for family, address in found:
            if family in ("AF_INET", "AF_INET6") and not address.startswith("fe80"):
                number = cast(int, getattr(socket, family).value)
                self.tcp.append([number, address, self._listen(number, socket.SOCK_STREAM, (address, 0))])
                self.udp.append([number, address, self._listen(number, socket.SOCK_DGRAM, (address, 0))])
        self._listen(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + self.abstract)
        self._listen(socket.AF_UNIX, socket.SOCK_STREAM, str(self.unix))
        self.unix.chmod(0o666)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _listen(self, family: int, kind: int, address: object) -> int:
        sock = socket.socket(family, kind)
        sock.bind(cast(Any, address))
        if kind == socket.SOCK_STREAM:
            sock.listen(64)
        self._selector.register(sock, selectors.EVENT_READ)
        return 0 if family == socket.AF_UNIX else int(sock.getsockname()[1])

    def _serve(self) -> None:
        while self._running:
            for key, _ in self._selector.select(0.2):
                sock = cast(socket.socket, key.fileobj)
                with contextlib.suppress(OSError):
                    if sock.type == socket.SOCK_DGRAM:
                        sock.sendto(GREETING, sock.recvfrom(64)[1])
                        continue
                    connection, _ = sock.accept()
                    self.visits += sock.family == socket.AF_UNIX and sock.getsockname() == str(self.unix)
                    with connection:
                        connection.sendall(GREETING)

    def close(self) -> None:
        """End the thread and close all."""
        self._running = False
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            cast(socket.socket, key.fileobj).close()
        self._selector.close()


def _log_line() -> str:
    """The last line of the host's kernel log, without its head; something that is nowhere, where it can't be read."""
    libc = ctypes.CDLL(None)
    buffer = ctypes.create_string_buffer(1 << 18)
    size = libc.klogctl(SYSLOG_READ_ALL, buffer, len(buffer))
    lines = buffer.raw[: max(0, size)].decode(errors="replace").splitlines()
    return lines[-1].split("] ")[-1] if lines else uuid.uuid4().hex


def _hidden_folders() -> list[list[Any]]:
    """/root and /home with what is in them, but for the way to the interpreter, which a sandbox has to see."""
    shown = {Path(prefix) for prefix in (sys.prefix, sys.base_prefix)}
    shown |= {parent for prefix in shown for parent in prefix.parents}
    return [
        [folder, [e.name for e in Path(folder).iterdir() if e not in shown]] for folder in ("/root", "/home") if os.access(folder, os.R_OK)
    ]


def as_user(uid: int) -> list[str]:
    """What to put before a command so that it runs as an ordinary user."""
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if os.geteuid() == 0 else []


class Stage:
    """One rung's world. Use as an async context manager; ``world`` is what attempts are told."""

    def __init__(self, rung: str) -> None:
        self.rung = rung
        self.folder = Path(tempfile.mkdtemp(prefix="skerry-"))
        self.folder.chmod(0o755)
        self.run_dir = self.folder / "run"
        self.driver: Driver = rungs.driver_of(rung if rung in rungs.RUNGS else "process", self.run_dir)
        self.listeners = Listeners(self.folder)
        self.secret = uuid.uuid4().hex
        self.slots = Slots(self.folder / "sandboxes", uid_first=FIRST_UID)
        self.uid = self._open("quiet").uid
        self._victim = self._start_victim()
        self.world = self._make_world()

    def _start_victim(self) -> "subprocess.Popen[bytes]":
        """A process outside, of the user that the sandbox of most attempts has, with a secret in its environment."""
        return subprocess.Popen([*as_user(self.uid), "sleep", "600"], env={"PATH": os.defpath, "SECRET": self.secret}, cwd="/")

    def _make_world(self) -> World:
        secret_file, state_file = self.folder / "secret", self.folder / "state" / "desired.json"
        secret_file.write_text(self.secret)
        state_file.parent.mkdir()
        state_file.write_text("{}")
        disk = Path("/").stat().st_dev
        spec = self.spec("defaults", [])
        return World(
            addresses=self.listeners.tcp,
            udp_addresses=self.listeners.udp,
            abstract_socket=self.listeners.abstract,
            unix_socket=str(self.listeners.unix),
            secret_file=str(secret_file),
            secret=self.secret,
            state_file=str(state_file),
            hidden_folders=_hidden_folders(),
            neighbour_dir=str(self.socket_dir("neighbour")),
            victim_pid=self._victim.pid,
            nameservers=["192.0.2.53"],
            log_line=_log_line(),
            block_device=[os.major(disk), os.minor(disk)],
            oom_score_adj=int(Path("/proc/self/oom_score_adj").read_text()),
            tmp_max_bytes=spec.tmp_max_bytes,
            file_max_bytes=spec.file_max_bytes,
            files_max=spec.files_max,
            pids_max=spec.pids_max,
        )

    def _open(self, name: str) -> Slot:
        """A place for a sandbox, made as the warden makes it."""
        held = self.slots.all().get(name)
        kind = Kind(driver=self.rung, memory_bytes=MEMORY_BYTES, cpus=1.0)
        return held or self.slots.open(name, driver=self.rung, kind=kind, replica=None, model=None, attempts=Attempts())

    def fill(self, model_dir: Path, world: World) -> None:
        """Put the programs, and what they are told, where a model would lie."""
        shutil.copytree(INSIDE, model_dir / "inside", ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        (model_dir / "world.json").write_text(json.dumps(world._asdict()))
        for path in model_dir.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)

    def socket_dir(self, name: str) -> Path:
        """The socket directory of a sandbox."""
        return self.slots.socket_dir(name)

    def spec(self, name: str, arguments: list[str], **changes: Any) -> SandboxSpec:
        """A sandbox that runs ``inside/run.py``."""
        spec = SandboxSpec(
            name=name,
            argv=[sys.executable, "-I", "-c", BOOT, "/model", *arguments],
            environment={"PYTHONDONTWRITEBYTECODE": "1"},
            model_dir=self.slots.model_dir(name),
            socket_dir=self.socket_dir(name),
            memory_bytes=MEMORY_BYTES,
            cpus=1.0,
        )
        return msgspec.structs.replace(spec, **changes)

    async def __aenter__(self) -> "Stage":
        if self.rung in rungs.RUNGS:
            reason = await self.driver.probe()
            if reason:
                raise RuntimeError(reason)
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            if self.rung in rungs.RUNGS:
                for sandbox in await self.driver.sandboxes():
                    await self.driver.stop(sandbox.name, grace_s=0)
        finally:
            self.close()

    def close(self) -> None:
        """Take the outside down."""
        self._victim.kill()
        self._victim.wait()
        self.listeners.close()
        subprocess.run(["rm", "-rf", str(self.folder)], check=False)  # hostile folders may be deeper than shutil goes

    def victim_lives(self) -> bool:
        """Whether the process outside was left alone."""
        return self._victim.poll() is None

    @contextlib.asynccontextmanager
    async def sandbox(self, name: str, *arguments: str, **changes: Any) -> AsyncIterator[SandboxSpec]:
        """One that runs ``run.py arguments``; it is ended at the exit."""
        spec = self.spec(name, [arguments[0], "/model/world.json", *arguments[1:]], **changes)
        spec = msgspec.structs.replace(spec, uid=self._open(name).uid)
        self.fill(spec.model_dir, self.world)
        await self.driver.start(spec)
        try:
            yield spec
        finally:
            await self.driver.stop(name, grace_s=0)
            if name in self.slots.all():
                with contextlib.suppress(RecursionError):  # a scene of its own judges that
                    self.slots.close(name)

    async def said(self, name: str) -> list[dict[str, object]]:
        """The lines of JSON that a sandbox has printed."""
        return rungs.lines_of_json((await self.driver.logs(name, lines=1000)).lines)

    async def ended(self, name: str) -> str | None:
        """Why a sandbox ended, or None while it runs."""
        for sandbox in await self.driver.sandboxes():
            if sandbox.name == name:
                return None if sandbox.running else sandbox.exit_reason or "ended"
        return "it is gone"

    async def wait_said(self, name: str, key: str, *, within_s: float = LINE_TIMEOUT_S) -> list[dict[str, object]]:
        """Until a line with ``key`` was printed, or the sandbox ended; all lines so far."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            over = await self.ended(name) is not None
            lines = await self.said(name)
            if over or any(key in line for line in lines):
                return lines
            await asyncio.sleep(0.1)
        return await self.said(name)


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Leaves in the list by how many bytes this process grew at most."""
    grown: list[int] = []
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")
    yield grown
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    grown.append(max(0, peak - before))
