"""The ``container`` rung: a worker in a container of the box's Docker Engine; with the runtime runsc the ``gvisor`` rung.

No image is needed from anywhere: ours holds nothing but the links of a merged /usr, and the host's interpreter and libraries are
bound over it read-only (``host_runtime``). The container has no network, no capability and no way to gain one, a read-only root,
bounded memory (no swap), processors, processes, log and ``/tmp``, and can write to its socket directory alone.

The engine is the state: what is not in its list of containers with our owner's label does not exist. A client is made for each
call, since the SDK's is not made for several threads and holds connections open; that costs well under a millisecond.
"""

import asyncio
import contextlib
import hashlib
import io
import math
import os
import socket as sockets
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from edge_agent.warden.drivers import host_runtime
from edge_agent.warden.ports import DriverFailed, Sandbox, SandboxSpec, Usage
from skerry.wire.messages import Rung

if TYPE_CHECKING:  # the SDK is imported on first use: a box without an engine does not pay memory for it
    from docker import APIClient

T = TypeVar("T")

IMAGE = "skerry-host-runtime"
IMAGE_TAG = "1"
CALL_TIMEOUT_S = 30
CONNECT_TIMEOUT_S = 0.5
PROBE_TIMEOUT_S = 20.0
LOG_MAX_BYTES = 8 * 1024 * 1024
LOG_READ_MAX_BYTES = 64 * 1024
PIDS_MAX = 256
FILES_MAX = 256
PROBE_MEMORY_BYTES = 256 * 1024 * 1024
GVISOR_ADVICE = "the engine's runtime runsc needs the arguments --host-uds=all and, on newer kernels, --network=none"
NOBODY = 65534
"""Whom a worker runs as where the warden is root."""

_OWNER, _NAME, _LABEL, _CONTENTS = "skerry.owner", "skerry.name", "skerry.label", "skerry.contents"

_PROBE = f"""
import os, socket
path = "{host_runtime.SOCKET_DIR}/{host_runtime.SOCKET_NAME}"
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(path + ".new")
    listener.listen()
    os.rename(path + ".new", path)
    listener.settimeout({PROBE_TIMEOUT_S})
    listener.accept()[0].sendall(b"works")
"""
"""What a probe container runs: all that a worker does to be reached. gVisor hides a socket made inside, unless it is told not to."""


class _Listed(msgspec.Struct, frozen=True, rename="pascal"):
    """A container as the engine lists it."""

    id: str
    state: str
    labels: dict[str, str]


class _State(msgspec.Struct, frozen=True, rename="pascal"):
    """How a container is, or how it ended."""

    exit_code: int
    error: str = ""
    oom_killed: bool = msgspec.field(name="OOMKilled", default=False)


class _Inspected(msgspec.Struct, frozen=True, rename="pascal"):
    state: _State


class _Image(msgspec.Struct, frozen=True, rename="pascal"):
    labels: dict[str, str] | None = None


class _Created(msgspec.Struct, frozen=True, rename="pascal"):
    id: str


class _Memory(msgspec.Struct, frozen=True):
    usage: int = 0
    stats: dict[str, int] = {}


class _CpuUsage(msgspec.Struct, frozen=True):
    total_usage: int = 0


class _Cpu(msgspec.Struct, frozen=True):
    cpu_usage: _CpuUsage = _CpuUsage()


class _Stats(msgspec.Struct, frozen=True):
    memory_stats: _Memory = _Memory()
    cpu_stats: _Cpu = _Cpu()


def _image_tar() -> bytes:
    """The image's one layer, the same bytes for the same host."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for folder, target in sorted(host_runtime.system_links().items()):
            entry = tarfile.TarInfo(folder.lstrip("/"))
            entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, target, 0o777
            tar.addfile(entry)
    return buffer.getvalue()


class DockerDriver:
    """Containers of one ``owner``; several wardens can share an engine. See Driver for what each method promises."""

    def __init__(self, run_dir: Path, *, socket: Path = Path("/var/run/docker.sock"), runtime: str = "", owner: str) -> None:
        self.name = "gvisor" if runtime == "runsc" else "docker"
        self.rung: Rung = "gvisor" if runtime == "runsc" else "container"
        self._run_dir = run_dir
        self._socket = socket
        self._runtime = runtime
        self._owner = owner
        self._api_version = ""
        self._reasons: dict[str, str] = {}
        uid = os.geteuid()
        self._uid, self._gid = (uid, os.getegid()) if uid else (NOBODY, NOBODY)

    # -- the engine

    def _check_listening(self) -> None:
        """Raises DriverFailed at once, and says why, where no engine can be reached; the SDK's own words are of no help."""
        try:
            with sockets.socket(sockets.AF_UNIX) as probe:
                probe.settimeout(CONNECT_TIMEOUT_S)
                probe.connect(str(self._socket))
        except OSError as exc:
            raise DriverFailed(f"no Docker Engine can be reached at {self._socket}: {exc.strerror or exc}") from exc

    @contextlib.contextmanager
    def _engine(self) -> Iterator["APIClient"]:
        """A client for one thread; what the SDK raises becomes DriverFailed."""
        self._check_listening()
        import docker
        import requests

        try:
            client = docker.APIClient(f"unix://{self._socket}", version=self._api_version or "auto", timeout=CALL_TIMEOUT_S)
            with contextlib.closing(client):
                client.trust_env = False  # proxies and .netrc are not for a Unix socket
                self._api_version = client.api_version
                yield client
        except docker.errors.APIError as exc:
            raise DriverFailed(f"the Docker Engine refused: {exc.explanation or exc}") from exc
        except (docker.errors.DockerException, requests.RequestException, msgspec.ValidationError) as exc:
            raise DriverFailed(f"the Docker Engine at {self._socket} does not answer as it should: {exc}") from exc

    async def _call(self, work: Callable[["APIClient"], T], *, timeout_s: float = 2.0 * CALL_TIMEOUT_S) -> T:
        """``work`` in a thread. One that is late is left to the SDK's own timeout, and nobody waits for it."""

        def run() -> T:
            with self._engine() as engine:
                return work(engine)

        try:
            return await asyncio.wait_for(asyncio.to_thread(run), timeout_s)
        except TimeoutError as exc:
            raise DriverFailed(f"the Docker Engine at {self._socket} did not answer within {timeout_s:.0f} s") from exc

    def _listed(self, engine: "APIClient", name: str = "") -> list[_Listed]:
        labels = [f"{_OWNER}={self._owner}", *([f"{_NAME}={name}"] if name else [])]
        return msgspec.convert(engine.containers(all=True, filters={"label": labels}), list[_Listed])

    @staticmethod
    def _ensure_image(engine: "APIClient") -> None:
        """Import the image where it is absent, or was made before the host's layout changed."""
        tar = _image_tar()
        contents = hashlib.sha256(tar).hexdigest()
        present = msgspec.convert(engine.images(f"{IMAGE}:{IMAGE_TAG}"), list[_Image])
        if not any((image.labels or {}).get(_CONTENTS) == contents for image in present):
            engine.import_image_from_data(tar, IMAGE, IMAGE_TAG, changes=[f"LABEL {_CONTENTS}={contents}"])

    def _create(self, engine: "APIClient", spec: SandboxSpec, *, container: str, argv: list[str], labels: dict[str, str]) -> str:
        """Make a container, not started; returns its id."""
        from docker.types import LogConfig, Mount, Ulimit

        self._ensure_image(engine)
        limits = engine.create_host_config(
            network_mode="none",
            ipc_mode="private",
            read_only=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges:true"],
            pids_limit=PIDS_MAX,
            mem_limit=spec.memory_bytes,
            memswap_limit=spec.memory_bytes,  # memory and swap together: no swap
            nano_cpus=int(spec.cpus * 1_000_000_000),
            ulimits=[Ulimit(name="nofile", soft=FILES_MAX, hard=FILES_MAX), Ulimit(name="core", soft=0, hard=0)],
            tmpfs={"/tmp": f"size={host_runtime.TMP_MAX_BYTES},mode=1777,nosuid,nodev,noexec"},  # noqa: S108 - the sandbox's own
            # The engine mounts shallow paths first: an installation below /tmp is seen.
            mounts=[
                *(Mount(path, path, type="bind", read_only=True) for path in host_runtime.system_mounts()),
                Mount(host_runtime.MODEL, str(spec.model.absolute()), type="bind", read_only=True),
                Mount(host_runtime.SOCKET_DIR, str(spec.socket_dir.absolute()), type="bind"),
            ],
            init=True,  # forwards SIGTERM, which a process with pid 1 would not hear
            log_config=LogConfig(type="json-file", config={"max-size": str(LOG_MAX_BYTES), "max-file": "1"}),
            restart_policy={"Name": "no"},  # the warden decides, with its back-off
            runtime=self._runtime or None,
        )
        created = engine.create_container(
            f"{IMAGE}:{IMAGE_TAG}",
            argv,
            name=container,
            hostname="sandbox",
            user=f"{self._uid}:{self._gid}",
            working_dir="/",
            environment=host_runtime.worker_environment(spec),
            labels=labels,
            host_config=limits,
            use_config_proxy=False,
        )
        return msgspec.convert(created, _Created).id

    @staticmethod
    def _remove(engine: "APIClient", container: str) -> None:
        """Kill and remove; one that is gone, or going, is fine."""
        import docker

        try:
            engine.remove_container(container, force=True, v=True)
        except docker.errors.NotFound:
            pass
        except docker.errors.APIError as exc:
            if exc.status_code != 409:  # "removal ... is already in progress"
                raise

    def _start_container(self, engine: "APIClient", spec: SandboxSpec, *, container: str, argv: list[str], labels: dict[str, str]) -> None:
        identifier = self._create(engine, spec, container=container, argv=argv, labels=labels)
        try:
            engine.start(identifier)
        except BaseException:
            self._remove(engine, identifier)
            raise

    # -- Driver

    async def probe(self) -> str:
        """See Driver."""
        try:
            await asyncio.to_thread(self._check_listening)
            reason = await self._run_probe()
        except (DriverFailed, OSError) as exc:
            return str(exc)
        return f"{reason} ({GVISOR_ADVICE})" if reason and self.name == "gvisor" else reason

    async def _run_probe(self) -> str:
        """A container with all that a sandbox's has must run the interpreter and be reached on its socket."""
        folder = self._run_dir / "probe"
        container = f"skerry.probe-{self._owner}"  # without the owner's label, so that nobody takes it for a sandbox
        spec = SandboxSpec("probe", model=Path(__file__), socket_dir=folder, memory_bytes=PROBE_MEMORY_BYTES, cpus=1.0)

        def begin(engine: "APIClient") -> None:
            self._remove(engine, container)  # left by a warden that was killed in the middle
            self._start_container(engine, spec, container=container, argv=[sys.executable, "-I", "-S", "-c", _PROBE], labels={})

        await asyncio.to_thread(host_runtime.make_socket_dir, folder, owner_uid=self._uid)
        try:
            await self._call(begin)
            return await self._probe_answer(folder / host_runtime.SOCKET_NAME, container)
        except DriverFailed as exc:
            return str(exc)
        finally:
            await self._call(lambda engine: self._remove(engine, container))

    async def _probe_answer(self, path: Path, container: str) -> str:
        """Empty once the probe container was heard, else why it was not."""
        deadline = time.monotonic() + PROBE_TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                reader, writer = await asyncio.wait_for(asyncio.open_unix_connection(str(path)), 1.0)
                try:
                    await asyncio.wait_for(reader.readexactly(5), PROBE_TIMEOUT_S)
                finally:
                    writer.close()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()
                return ""
            reason = await self._call(lambda engine: self._ended(engine, container))
            if reason:
                return f"a probe container ended: {reason}"
            await asyncio.sleep(0.02)
        return f"a probe container runs, and its socket could not be reached within {PROBE_TIMEOUT_S:.0f} s"

    def _ended(self, engine: "APIClient", container: str) -> str:
        """Why the probe container no longer runs; empty while it does."""
        found = msgspec.convert(engine.containers(filters={"name": f"^/{container}$"}), list[_Listed])
        return "" if found else self._exit_reason(engine, container)

    async def start(self, spec: SandboxSpec) -> None:
        """See Driver."""

        def work(engine: "APIClient") -> None:
            for listed in self._listed(engine, spec.name):
                if listed.state in ("running", "paused"):
                    return
                self._remove(engine, listed.id)
            try:
                host_runtime.make_socket_dir(spec.socket_dir, owner_uid=self._uid)
            except OSError as exc:
                raise DriverFailed(f"{spec.socket_dir}: {exc.strerror}") from exc
            labels = {_OWNER: self._owner, _NAME: spec.name, _LABEL: spec.label}
            container = f"skerry-{self._owner}-{spec.name}"
            self._start_container(engine, spec, container=container, argv=host_runtime.worker_argv(spec), labels=labels)

        await self._call(work)

    async def stop(self, name: str, *, grace_s: float) -> None:
        """See Driver. The engine counts grace in whole seconds: it is rounded up."""

        def work(engine: "APIClient") -> None:
            for listed in self._listed(engine, name):
                if listed.state == "running" and grace_s > 0:
                    engine.stop(listed.id, timeout=math.ceil(grace_s))
                self._remove(engine, listed.id)

        await self._call(work, timeout_s=grace_s + 2.0 * CALL_TIMEOUT_S)

    async def sandboxes(self) -> list[Sandbox]:
        """See Driver."""

        def work(engine: "APIClient") -> list[Sandbox]:
            found, present = [], self._listed(engine)
            self._reasons = {listed.id: self._reasons[listed.id] for listed in present if listed.id in self._reasons}
            for listed in present:
                running = listed.state in ("running", "paused")
                reason = "" if running else self._reason_of(engine, listed)
                found.append(Sandbox(listed.labels.get(_NAME, ""), listed.labels.get(_LABEL, ""), running=running, exit_reason=reason))
            return sorted(found, key=lambda sandbox: sandbox.name)

        return await self._call(work)

    def _reason_of(self, engine: "APIClient", listed: _Listed) -> str:
        """Why a sandbox does not run. Kept once known: the warden may look many times a second while it waits for another one."""
        import docker

        if listed.state == "created":
            return "made, but not started"
        if listed.id not in self._reasons:
            try:
                self._reasons[listed.id] = self._exit_reason(engine, listed.id)
            except docker.errors.NotFound:
                return "removed"
        return self._reasons[listed.id]

    @staticmethod
    def _last_lines(engine: "APIClient", container: str, lines: int) -> list[str]:
        text = engine.logs(container, stdout=True, stderr=True, stream=False, tail=lines)
        return text[-LOG_READ_MAX_BYTES:].decode(errors="replace").splitlines()

    def _exit_reason(self, engine: "APIClient", container: str) -> str:
        state = msgspec.convert(engine.inspect_container(container), _Inspected).state
        if state.oom_killed:
            return "killed: out of memory"
        return "; ".join(self._last_lines(engine, container, 3)) or state.error or f"exit code {state.exit_code}"

    async def stats(self, name: str) -> Usage | None:
        """See Driver; the page cache that the kernel can take back is not counted."""

        def work(engine: "APIClient") -> Usage | None:
            running = [listed.id for listed in self._listed(engine, name) if listed.state == "running"]
            if not running:
                return None
            stats = msgspec.convert(engine.stats(running[0], stream=False, one_shot=True), _Stats)
            memory = stats.memory_stats
            cache = memory.stats.get("total_inactive_file", memory.stats.get("inactive_file", 0))  # control groups v1, v2
            return Usage(memory_bytes=max(0, memory.usage - cache), cpu_seconds=stats.cpu_stats.cpu_usage.total_usage / 1e9)

        return await self._call(work)

    async def logs(self, name: str, *, lines: int) -> list[str]:
        """See Driver."""

        def work(engine: "APIClient") -> list[str]:
            found = self._listed(engine, name)
            return self._last_lines(engine, found[0].id, lines) if found else []

        return await self._call(work)
