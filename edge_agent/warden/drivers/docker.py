"""The ``container`` rung: a program in a container of the box's Docker Engine; with the runtime runsc the ``gvisor`` rung.

No image is needed from anywhere: ours holds nothing but the links of a merged /usr, and the host's interpreter and libraries are
bound over it read-only (``host_runtime``); a specification may name another image of the engine by its id, or a model server of its own,
which is two containers (``docker_server``). A container has no network,
no capability and no way to gain one, a read-only root, the system calls of ``skerry.confine``, a user id of its own, bounded memory
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
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from edge_agent.warden.drivers import docker_profile, docker_server, host_runtime, probe
from edge_agent.warden.ports import LAST_LINES, MODEL_DIR, NOBODY, SOCKET_DIR, DriverFailed, Ending, LogLines, Sandbox, SandboxSpec, Usage
from skerry.runtime import unix_socket
from skerry.wire.messages import Rung

if TYPE_CHECKING:  # the SDK is imported on first use: a box without an engine does not pay memory for it
    from docker import APIClient
    from docker.types import DeviceRequest

T = TypeVar("T")

IMAGE = "skerry-host-runtime"
IMAGE_TAG = "1"
CALL_TIMEOUT_S = 30
CONNECT_TIMEOUT_S = 0.5
GVISOR_PIDS = 256
"""What gVisor's own kernel takes of a limit of processes, with room."""
LOG_READ_MAX_BYTES = 256 * 1024
GVISOR_ADVICE = "the engine's runtime runsc needs the arguments --host-uds=all, --oci-seccomp and, on newer kernels, --network=none"

_OWNER, _NAME, _PART, _PARTS, _CONTENTS = "skerry.owner", "skerry.name", "skerry.part", "skerry.parts", "skerry.contents"


class _Listed(msgspec.Struct, frozen=True, rename="pascal"):
    """A container as the engine lists it."""

    id: str
    state: str
    labels: dict[str, str]

    @property
    def is_running(self) -> bool:
        return self.state in ("running", "paused")


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
        if reason := unix_socket.unreachable(self._socket, within_s=CONNECT_TIMEOUT_S):
            raise DriverFailed(f"no Docker Engine can be reached at {self._socket}: {reason}")

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

    def _host_config(self, engine: "APIClient", spec: SandboxSpec, part: docker_server.Part, *, beside: str) -> dict[str, Any]:
        """The policy as the engine has it. ``beside`` is the container whose loopback is shared; empty for one of its own."""
        from docker.types import LogConfig, Mount, Ulimit

        host_mounts = [] if part.image else host_runtime.system_mounts()
        own_mounts = [
            *([Mount(MODEL_DIR, str(spec.model_dir.absolute()), type="bind", read_only=True)] if part.has_model else []),
            *([Mount(SOCKET_DIR, str(spec.socket_dir.absolute()), type="bind")] if part.has_socket else []),
        ]
        syscalls = docker_profile.profile(part.policy, platform.machine(), is_gvisor=self.rung == "gvisor")
        config: dict[str, Any] = engine.create_host_config(
            network_mode=f"container:{beside}" if beside else "none",
            ipc_mode="private",
            read_only=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges:true", f"seccomp={syscalls}"],
            pids_limit=spec.pids_max + (GVISOR_PIDS if self.rung == "gvisor" else 0),
            mem_limit=part.memory_bytes,
            memswap_limit=part.memory_bytes,  # memory and swap together: no swap
            nano_cpus=int(spec.cpus * 1_000_000_000),
            ulimits=[
                Ulimit(name="nofile", soft=spec.files_max, hard=spec.files_max),
                Ulimit(name="fsize", soft=spec.file_max_bytes, hard=spec.file_max_bytes),
                Ulimit(name="core", soft=0, hard=0),
            ],
            shm_size=spec.tmp_max_bytes,
            tmpfs={"/tmp": f"size={spec.tmp_max_bytes},mode=1777,nosuid,nodev,noexec"},  # noqa: S108 - the sandbox's own
            # The engine mounts shallow paths first: an installation below /tmp is seen.
            mounts=[*(Mount(path, path, type="bind", read_only=True) for path in host_mounts), *own_mounts],
            device_requests=_device_requests(engine, part.gpus),
            init=True,  # forwards SIGTERM, which a process with pid 1 would not hear
            log_config=LogConfig(type="json-file", config={"max-size": str(spec.log_max_bytes), "max-file": "1"}),
            restart_policy={"Name": "no"},  # the warden decides, with its back-off
            runtime=self._runtime or None,
        )
        return config

    def _create(self, engine: "APIClient", spec: SandboxSpec, part: docker_server.Part, *, beside: str, parts: int) -> str:
        """Make one of the ``parts`` containers of a sandbox, not started; returns its id."""
        import docker

        if not part.image:
            self._ensure_image(engine)
        uid = spec.uid or NOBODY
        try:
            created = engine.create_container(
                part.image or f"{IMAGE}:{IMAGE_TAG}",
                part.argv[1:] if part.kind != "server" else part.argv or None,
                # A worker's command is given whole, whatever its image would run; a server's is its image's, with arguments of its own.
                entrypoint=part.argv[:1] if part.kind != "server" else None,
                name=f"skerry-{self._owner}-{spec.name}{part.suffix}",
                hostname=None if beside else "sandbox",
                user=f"{uid}:{uid}",
                working_dir=part.working_dir,
                environment=part.environment,
                labels={_OWNER: self._owner, _NAME: spec.name, _PART: part.kind, _PARTS: str(parts)},
                host_config=self._host_config(engine, spec, part, beside=beside),
                use_config_proxy=False,
            )
        except docker.errors.ImageNotFound as exc:
            raise DriverFailed(f"image {part.image or IMAGE} is not on this box: 'skerry image load' it") from exc
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

        parts = docker_server.parts_of(spec, self.rung)

        def work(engine: "APIClient") -> None:
            present = self._listed(engine, spec.name)
            if len(present) == len(parts) and all(listed.is_running for listed in present):
                return
            for listed in present:
                self._remove(engine, listed.id)
            made: list[str] = []
            try:
                for part in parts:
                    made.append(self._create(engine, spec, part, beside=made[0] if made else "", parts=len(parts)))
                    engine.start(made[-1])
            except BaseException:
                for container in made:
                    self._remove(engine, container)
                raise

        await self._call(work)

    async def stop(self, name: str, *, grace_s: float) -> None:
        """See Driver. The engine counts grace in whole seconds: it is rounded up."""

        def work(engine: "APIClient") -> None:
            for listed in self._listed(engine, name):
                if listed.state == "running" and grace_s > 0 and listed.labels.get(_PART) != "relay":
                    engine.stop(listed.id, timeout=math.ceil(grace_s))
                self._remove(engine, listed.id)

        await self._call(work, timeout_s=grace_s + 2.0 * CALL_TIMEOUT_S)

    async def sandboxes(self) -> list[Sandbox]:
        """See Driver."""

        def work(engine: "APIClient") -> list[Sandbox]:
            present = self._listed(engine)
            self._endings = {listed.id: self._endings[listed.id] for listed in present if listed.id in self._endings}
            by_name: dict[str, list[_Listed]] = {}
            for listed in present:
                by_name.setdefault(listed.labels.get(_NAME, ""), []).append(listed)
            found = [Sandbox(name, self._ending_of(engine, parts)) for name, parts in by_name.items()]
            return sorted(found, key=lambda sandbox: sandbox.name)

        return await self._call(work)

    def _ending_of(self, engine: "APIClient", parts: list[_Listed]) -> Ending | None:
        """How a sandbox ended: as its first part that does not run, the relay last. None where all of it runs."""
        ended = sorted((part for part in parts if not part.is_running), key=lambda part: part.labels.get(_PART) == "relay")
        if ended:
            return self._ending(engine, ended[0])
        whole = int(parts[0].labels.get(_PARTS, "1"))
        return None if len(parts) == whole else Ending(lines=[f"{len(parts)} of its {whole} containers are there"])

    def _ending(self, engine: "APIClient", listed: _Listed) -> Ending:
        """How a sandbox ended. Kept once known: the warden may look many times a second while it waits for another one."""
        import docker

        if listed.state == "created":
            return Ending(lines=["made, but not started"], was_cut_off=True)
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
            return docker_server.together([self._usage(engine, container) for container in running])

        return await self._call(work)

    @staticmethod
    def _usage(engine: "APIClient", container: str) -> Usage:
        stats = msgspec.convert(engine.stats(container, stream=False, one_shot=True), _Stats)
        memory = stats.memory_stats
        cache = memory.stats.get("total_inactive_file", memory.stats.get("inactive_file", 0))  # control groups v1, v2
        return Usage(memory_bytes=max(0, memory.usage - cache), cpu_seconds=stats.cpu_stats.cpu_usage.total_usage / 1e9)

    async def logs(self, name: str, *, lines: int, after: str = "") -> LogLines:
        """See Driver. A position is the time of the last line, as the engine stamps it: to the nanosecond, in one width."""

        def work(engine: "APIClient") -> LogLines:
            found = self._listed(engine, name)
            if not found or lines <= 0:
                return LogLines([])
            texts = [engine.logs(part.id, stdout=True, stderr=True, stream=False, timestamps=True, tail=lines) for part in found]
            return docker_server.merged([text[-LOG_READ_MAX_BYTES:].decode(errors="replace") for text in texts], lines=lines, after=after)

        return await self._call(work)


def _device_requests(engine: "APIClient", gpus: list[str]) -> list["DeviceRequest"]:
    """GPUs and MIG slices by id, through the NVIDIA runtime where the engine has it, else by CDI (Container Device Interface)."""
    from docker.types import DeviceRequest

    if not gpus:
        return []
    if "nvidia" in msgspec.convert(engine.info(), _Info).runtimes:
        return [DeviceRequest(driver="nvidia", device_ids=gpus, capabilities=[["gpu", "compute", "utility"]])]
    return [DeviceRequest(driver="cdi", device_ids=[f"nvidia.com/gpu={gpu}" for gpu in gpus])]
