"""The ``container`` rung: a program in a container of the box's Docker Engine; with the runtime runsc the ``gvisor`` rung.

No image is needed from anywhere: ours holds nothing but the links of a merged /usr, and the host's interpreter and libraries are
bound over it read-only (``host_runtime``); a specification may name another image of the engine by its id. The container has no network,
no capability and no way to gain one, a read-only root, the system calls of ``edge_agent.confine``, a user id of its own, bounded memory
(no swap), processors, processes, log and ``/tmp``, and can write to its socket directory alone.

The engine is the state: what is not in its list of containers with our owner's label does not exist. A client is made for each
call, since the SDK's is not made for several threads and holds connections open; that costs well under a millisecond.
"""

import asyncio
import contextlib
import hashlib
import io
import math
import platform
import socket as sockets
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from edge_agent.confine.policy import FLOOR
from edge_agent.warden.drivers import docker_profile, host_runtime, probe
from edge_agent.warden.ports import LAST_LINES, MODEL_DIR, SOCKET_DIR, DriverFailed, Ending, LogLines, Sandbox, SandboxSpec, Usage
from skerry.wire.messages import Rung

if TYPE_CHECKING:  # the SDK is imported on first use: a box without an engine does not pay memory for it
    from docker import APIClient
    from docker.types import DeviceRequest

T = TypeVar("T")

IMAGE = "skerry-host-runtime"
IMAGE_TAG = "1"
CALL_TIMEOUT_S = 30
CONNECT_TIMEOUT_S = 0.5
LOG_READ_MAX_BYTES = 256 * 1024
GVISOR_ADVICE = "the engine's runtime runsc needs the arguments --host-uds=all and, on newer kernels, --network=none"
NOBODY = 65534
"""Whom a program runs as where its specification leaves that open."""

_OWNER, _NAME, _CONTENTS = "skerry.owner", "skerry.name", "skerry.contents"


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


class _Info(msgspec.Struct, frozen=True, rename="pascal"):
    runtimes: dict[str, object] = {}


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
        self._endings: dict[str, Ending] = {}
        self.limits = "engine"

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

    def _create(self, engine: "APIClient", spec: SandboxSpec) -> str:
        """Make a container, not started; returns its id."""
        from docker.types import LogConfig, Mount, Ulimit

        if not spec.image:
            self._ensure_image(engine)
        uid = spec.uid or NOBODY
        host_mounts = [] if spec.image else host_runtime.system_mounts()
        limits = engine.create_host_config(
            network_mode="none",
            ipc_mode="private",
            read_only=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges:true", f"seccomp={docker_profile.profile(FLOOR, platform.machine())}"],
            pids_limit=spec.pids_max,
            mem_limit=spec.memory_bytes,
            memswap_limit=spec.memory_bytes,  # memory and swap together: no swap
            nano_cpus=int(spec.cpus * 1_000_000_000),
            ulimits=[
                Ulimit(name="nofile", soft=spec.files_max, hard=spec.files_max),
                Ulimit(name="fsize", soft=spec.file_max_bytes, hard=spec.file_max_bytes),
                Ulimit(name="core", soft=0, hard=0),
            ],
            shm_size=spec.tmp_max_bytes,
            tmpfs={"/tmp": f"size={spec.tmp_max_bytes},mode=1777,nosuid,nodev,noexec"},  # noqa: S108 - the sandbox's own
            # The engine mounts shallow paths first: an installation below /tmp is seen.
            mounts=[
                *(Mount(path, path, type="bind", read_only=True) for path in host_mounts),
                Mount(MODEL_DIR, str(spec.model_dir.absolute()), type="bind", read_only=True),
                Mount(SOCKET_DIR, str(spec.socket_dir.absolute()), type="bind"),
            ],
            device_requests=_device_requests(engine, spec.gpus),
            init=True,  # forwards SIGTERM, which a process with pid 1 would not hear
            log_config=LogConfig(type="json-file", config={"max-size": str(spec.log_max_bytes), "max-file": "1"}),
            restart_policy={"Name": "no"},  # the warden decides, with its back-off
            runtime=self._runtime or None,
        )
        created = engine.create_container(
            spec.image or f"{IMAGE}:{IMAGE_TAG}",
            spec.argv,
            name=f"skerry-{self._owner}-{spec.name}",
            hostname="sandbox",
            user=f"{uid}:{uid}",
            working_dir="/",
            environment=spec.environment,
            labels={_OWNER: self._owner, _NAME: spec.name},
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

    # -- Driver

    async def probe(self) -> str:
        """See Driver."""
        try:
            await asyncio.to_thread(self._check_listening)
            if platform.machine() not in docker_profile.ARCHITECTURES:
                return f"there is no table of system calls for {platform.machine()!r}"
            reason = await probe.tried(self, self._run_dir.parent / "probes")
        except (DriverFailed, OSError) as exc:
            return str(exc)
        return f"{reason} ({GVISOR_ADVICE})" if reason and self.name == "gvisor" else reason

    async def start(self, spec: SandboxSpec) -> None:
        """See Driver."""

        def work(engine: "APIClient") -> None:
            for listed in self._listed(engine, spec.name):
                if listed.state in ("running", "paused"):
                    return
                self._remove(engine, listed.id)
            identifier = self._create(engine, spec)
            try:
                engine.start(identifier)
            except BaseException:
                self._remove(engine, identifier)
                raise

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
            self._endings = {listed.id: self._endings[listed.id] for listed in present if listed.id in self._endings}
            for listed in present:
                running = listed.state in ("running", "paused")
                found.append(Sandbox(listed.labels.get(_NAME, ""), None if running else self._ending(engine, listed)))
            return sorted(found, key=lambda sandbox: sandbox.name)

        return await self._call(work)

    def _ending(self, engine: "APIClient", listed: _Listed) -> Ending:
        """How a sandbox ended. Kept once known: the warden may look many times a second while it waits for another one."""
        import docker

        if listed.state == "created":
            return Ending(lines=["made, but not started"])
        if listed.id not in self._endings:
            try:
                state = msgspec.convert(engine.inspect_container(listed.id), _Inspected).state
                lines = self._last_lines(engine, listed.id, LAST_LINES) or ([state.error] if state.error else [])
            except docker.errors.NotFound:
                return Ending(lines=["removed"])
            self._endings[listed.id] = Ending(state.exit_code, oom_killed=state.oom_killed, lines=lines)
        return self._endings[listed.id]

    @staticmethod
    def _last_lines(engine: "APIClient", container: str, lines: int) -> list[str]:
        text = engine.logs(container, stdout=True, stderr=True, stream=False, tail=lines)
        return text[-LOG_READ_MAX_BYTES:].decode(errors="replace").splitlines()

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

    async def logs(self, name: str, *, lines: int, after: str = "") -> LogLines:
        """See Driver. A position is the time of the last line, as the engine stamps it: to the nanosecond, in one width."""

        def work(engine: "APIClient") -> LogLines:
            found = self._listed(engine, name)
            if not found or lines <= 0:
                return LogLines([])
            text = engine.logs(found[0].id, stdout=True, stderr=True, stream=False, timestamps=True, tail=lines)
            stamped = [line.partition(" ") for line in text[-LOG_READ_MAX_BYTES:].decode(errors="replace").splitlines()]
            new = [(stamp, line) for stamp, _, line in stamped if stamp > after]
            return LogLines([line for _, line in new], new[-1][0] if new else after)

        return await self._call(work)


def _device_requests(engine: "APIClient", gpus: list[str]) -> list["DeviceRequest"]:
    """GPUs and MIG slices by id, through the NVIDIA runtime where the engine has it, else by CDI (Container Device Interface)."""
    from docker.types import DeviceRequest

    if not gpus:
        return []
    if "nvidia" in msgspec.convert(engine.info(), _Info).runtimes:
        return [DeviceRequest(driver="nvidia", device_ids=gpus, capabilities=[["gpu", "compute", "utility"]])]
    return [DeviceRequest(driver="cdi", device_ids=[f"nvidia.com/gpu={gpu}" for gpu in gpus])]
