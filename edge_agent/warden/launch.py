"""From what a replica asks for to a sandbox's policy, and the first words with the worker in it."""

import asyncio
import contextlib
import os
from pathlib import Path

import msgspec

from edge_agent.core.pool import Kind
from edge_agent.warden.drivers import host_runtime
from edge_agent.warden.ports import CONTROL_NAME, SOCKET_NAME, Driver, SandboxSpec
from edge_agent.warden.slots import Slot, Slots
from skerry.runtime import unix_socket
from skerry.wire import codec, ipc
from skerry.wire.messages import RUNGS, ModelRef, ReplicaSpec, Server

HELLO_TIMEOUT_S = 2.0
TELL_TIMEOUT_S = 2.0
IMAGE_INTERPRETER = "python3"
"""A worker's image brings its own interpreter and finds our code by its own PYTHONPATH."""


def kind_of(spec: ReplicaSpec, driver: Driver) -> Kind:
    """What a warm sandbox must equal to become this replica."""
    return Kind(driver.name, spec.memory_bytes, spec.cpus, spec.image)


def unable(driver: Driver, spec: ReplicaSpec) -> str:
    """Why this driver can't run that replica; empty where it can."""
    if RUNGS.index(driver.rung) < RUNGS.index(spec.isolation_at_least):
        return f"isolation.at_least: {spec.isolation_at_least} is asked for"
    if spec.server is not None and driver.rung != "container":
        return "server: an image of one's own runs on the rung container alone"
    if spec.image and driver.rung == "process":
        return "image: the rung process runs the box's own interpreter"
    return ""


def sandbox_spec(name: str, slot: Slot, slots: Slots) -> SandboxSpec:
    """The policy of the sandbox in ``slot``: of its replica, or of its kind where it is warm."""
    kind, replica = slot.kind, slot.replica
    argv = host_runtime.worker_argv(kind.cpus, interpreter=IMAGE_INTERPRETER) if kind.image else host_runtime.worker_argv(kind.cpus)
    environment = host_runtime.image_environment(kind.cpus) if kind.image else host_runtime.worker_environment(kind.cpus)
    if replica is not None:
        argv = host_runtime.with_model(
            argv, replica.model.warmup, replica.model.state, gpu_memory_bytes=replica.gpu_memory_bytes if slot.gpu else 0
        )
    return SandboxSpec(
        name=name,
        argv=argv,
        environment=environment,
        model_dir=slots.model_dir(name),
        socket_dir=slots.socket_dir(name),
        memory_bytes=kind.memory_bytes,
        cpus=kind.cpus,
        uid=slot.uid,
        log_max_bytes=slot.log_max_bytes,
        gpus=[slot.gpu] if slot.gpu else [],
        image=kind.image,
        server=_server_of(replica),
    )


def _server_of(replica: ReplicaSpec | None) -> Server | None:
    """The server of one's own, if any; it knows the model by the deployment's name for it, where it was given no other."""
    if replica is None or replica.server is None:
        return None
    return msgspec.structs.replace(replica.server, model=replica.server.model or replica.model.name)


def is_waiting(socket_dir: Path) -> bool:
    """Whether the worker waits to be told its model."""
    try:
        with unix_socket.pinned(socket_dir / CONTROL_NAME):
            return True
    except OSError:
        return False


async def tell(socket_dir: Path, model: ModelRef) -> None:
    """Tell a worker that waits to load ``model``, which lies in its model directory. Raises OSError."""
    async with asyncio.timeout(TELL_TIMEOUT_S):
        with unix_socket.pinned(socket_dir / CONTROL_NAME) as control:
            _, writer = await asyncio.open_unix_connection(control)
        try:
            writer.writelines(ipc.frame(ipc.Load(model.warmup, model.state), []))
            await writer.drain()
        finally:
            writer.close()


class Line:
    """A connection to a worker, held so that its end tells at once of the worker's."""

    def __init__(self, hello: ipc.Hello, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.hello = hello
        self._reader = reader
        self._writer = writer

    async def ended(self) -> None:
        """Until it ends. A worker has nothing to say unasked: one that does counts as ended too."""
        try:
            with contextlib.suppress(OSError):
                await self._reader.read(1)
        finally:
            self.close()

    def close(self) -> None:
        """Hang up."""
        self._writer.close()


async def connect(socket_dir: Path) -> Line | None:
    """A connection whose worker said what it serves, or None while there is none that answers."""
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            with unix_socket.pinned(socket_dir / SOCKET_NAME) as socket:
                reader, writer = await asyncio.open_unix_connection(socket)
            try:
                header_bytes, body_bytes = ipc.parse_prefix(await reader.readexactly(ipc.PREFIX.size))
                header = await reader.readexactly(header_bytes)
                if body_bytes == 0:
                    return Line(ipc.parse_header(header, ipc.Hello), reader, writer)
            except BaseException:
                writer.close()
                raise
            writer.close()
    except (OSError, TimeoutError, asyncio.IncompleteReadError, codec.Malformed):
        pass
    return None


def new_name(prefix: str) -> str:
    """A sandbox's name: what it is for, short enough for a socket's path, and a few digits that tell two of a kind apart."""
    return f"{prefix[:40]}-{os.urandom(3).hex()}"


def in_words(kind: Kind) -> str:
    """A kind, for the journal."""
    return f"{kind.driver}, {kind.memory_bytes // 2**20} MiB, {kind.cpus:g} cpus" + (f", {kind.image[:19]}" if kind.image else "")
