"""The containers that a sandbox is made of: one for a worker, two for a model server of one's own.

    gateway -- worker.sock -- [relay] -- 127.0.0.1 -- [server]
                               \\_______ one loopback _______/     no other interface, no route

The server's container has no network but a loopback of its own: stronger than a network without a way out, since there is nobody on it.
The relay (edge_agent/worker/relay.py) runs in a second container that shares this loopback and, unlike the server, has the socket's
directory. So nothing that speaks to a sandbox need know the difference, the server can't touch the socket, and two servers can't reach
each other. To whoever asks the driver, the two are one sandbox: it runs while both do.
"""

import sys
from collections.abc import Sequence
from typing import Literal

import msgspec

from edge_agent.warden.drivers import host_runtime
from edge_agent.warden.ports import SOCKET_DIR, SOCKET_NAME, DriverFailed, LogLines, SandboxSpec, Usage
from skerry.confine.policy import FLOOR, SERVER_FLOOR, Policy
from skerry.wire.messages import Rung, Server

PartKind = Literal["worker", "server", "relay"]

RELAY_SHARE = 4
RELAY_LEAST_BYTES, RELAY_MOST_BYTES = 48 * 2**20, 256 * 2**20
"""A relay gets a quarter of the sandbox's memory, within these bounds, and the server the rest: together they keep to the limit."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One container of a sandbox, as far as it differs from the others. ``image`` is empty where it is ours, of the host's files."""

    kind: PartKind
    image: str
    argv: list[str]
    environment: dict[str, str]
    memory_bytes: int
    policy: Policy = FLOOR
    gpus: list[str] = []
    has_model: bool = True
    has_socket: bool = True
    working_dir: str | None = "/"
    """None leaves it to the image."""

    @property
    def suffix(self) -> str:
        """What is added to the sandbox's name for the container's; a sandbox's name has no dot in it."""
        return ".relay" if self.kind == "relay" else ""


def parts_of(spec: SandboxSpec, rung: Rung) -> list[Part]:
    """What to start, in this order. Raises DriverFailed for what can't be run on this rung."""
    if spec.server is None:
        return [
            Part(
                kind="worker",
                image=spec.image,
                argv=spec.argv,
                environment=spec.environment,
                memory_bytes=spec.memory_bytes,
                gpus=spec.gpus,
            )
        ]
    if rung != "container":
        raise DriverFailed(f"a server of one's own runs on the rung container alone: on {rung} a relay would not find its loopback")
    if not spec.server.model:
        raise DriverFailed("server.model: a server must be told by which name to ask it for the model")
    relay_bytes = min(max(spec.memory_bytes // RELAY_SHARE, RELAY_LEAST_BYTES), RELAY_MOST_BYTES)
    if spec.memory_bytes < 2 * RELAY_LEAST_BYTES:
        raise DriverFailed(f"memory: a server and its relay need {2 * RELAY_LEAST_BYTES} bytes at the least")
    return [_server(spec, spec.server, spec.memory_bytes - relay_bytes), _relay(spec, spec.server, relay_bytes)]


def _server(spec: SandboxSpec, server: Server, memory_bytes: int) -> Part:
    return Part(
        kind="server",
        image=server.image,
        argv=server.argv,
        environment={"HOME": "/tmp", **server.environment},  # noqa: S108 - the sandbox's own, and all that it can write to
        memory_bytes=memory_bytes,
        policy=SERVER_FLOOR,
        gpus=spec.gpus,
        has_socket=False,
        working_dir=None,
    )


def _relay(spec: SandboxSpec, server: Server, memory_bytes: int) -> Part:
    return Part(
        kind="relay",
        image="",
        argv=[
            *(sys.executable, "-m", "edge_agent.worker.relay", "--socket", f"{SOCKET_DIR}/{SOCKET_NAME}"),
            *("--port", str(server.port), "--model", server.model, "--memory-bytes", str(memory_bytes)),
        ],
        environment=host_runtime.worker_environment(spec.cpus),
        memory_bytes=memory_bytes,
        policy=SERVER_FLOOR,
        has_model=False,
    )


def together(usages: Sequence[Usage]) -> Usage | None:
    """What the parts use in all; None where there are none."""
    if not usages:
        return None
    return Usage(memory_bytes=sum(usage.memory_bytes for usage in usages), cpu_seconds=sum(usage.cpu_seconds for usage in usages))


def merged(texts: Sequence[str], *, lines: int, after: str) -> LogLines:
    """The last ``lines`` of what the parts wrote, in order of time, each stamped as the engine does it: to the nanosecond, in one width."""
    stamped = [line.partition(" ") for text in texts for line in text.splitlines()]
    new = sorted((entry for entry in stamped if entry[0] > after), key=lambda entry: entry[0])[-lines:]
    return LogLines([line for _, _, line in new], new[-1][0] if new else after)
