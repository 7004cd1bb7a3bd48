"""What the warden asks of the world. Small Protocols; parts that implement them meet in ``daemon.py`` alone."""

from pathlib import Path
from typing import Protocol

import msgspec

from skerry.wire.messages import Rung, WarmupTensor


class SandboxSpec(msgspec.Struct, frozen=True):
    """One sandbox, whatever the driver: what it may use. Everything that is not named here it may not.

    ``socket_dir`` is the one writable directory that outside and inside share; the worker listens in it on ``worker.sock``.
    ``label`` comes back from ``sandboxes`` as it was given, so that a restarted warden knows what it adopts.
    """

    name: str
    model: Path
    socket_dir: Path
    memory_bytes: int
    cpus: float
    warmup: list[WarmupTensor] = []
    label: str = ""


class Sandbox(msgspec.Struct, frozen=True):
    """A sandbox that exists. ``exit_reason`` is empty while it runs."""

    name: str
    label: str
    running: bool
    exit_reason: str = ""


class Usage(msgspec.Struct, frozen=True):
    """What a running sandbox uses now; ``cpu_seconds`` counts from its start."""

    memory_bytes: int
    cpu_seconds: float


class DriverFailed(Exception):
    """The driver could not do what was asked; the text says why and the caller may try again."""


class Driver(Protocol):
    """One kind of sandbox. Every method is safe to repeat; sandboxes outlive the process that started them."""

    name: str
    rung: Rung

    async def probe(self) -> str:
        """Why this driver can't run sandboxes here, found by trying; empty where it can."""

    async def start(self, spec: SandboxSpec) -> None:
        """Start the sandbox; returns once its process exists. Starting what runs already changes nothing. Raises DriverFailed."""

    async def stop(self, name: str, *, grace_s: float) -> None:
        """End the sandbox and leave nothing of it behind: asked first, killed after ``grace_s``. An absent one is fine."""

    async def sandboxes(self) -> list[Sandbox]:
        """Every sandbox of this driver, those started by an earlier process included."""

    async def stats(self, name: str) -> Usage | None:
        """What a sandbox uses, or None where it does not run."""

    async def logs(self, name: str, *, lines: int) -> list[str]:
        """The last lines of what it wrote; empty where it is unknown."""
