"""What the warden asks of the world. Small Protocols; parts that implement them meet in ``daemon.py`` alone."""

from pathlib import Path
from typing import Literal, Protocol

import msgspec

from skerry.wire.messages import Rung, Server

MODEL_DIR, MODEL_FILE = "/model", "model.onnx"
SOCKET_DIR, SOCKET_NAME, CONTROL_NAME = "/run/skerry", "worker.sock", "control.sock"
"""Where a sandbox finds its model and its sockets, and what those are called on both sides."""
NOBODY = 65534
"""Whom a sandbox runs as where its specification leaves that open and the driver may choose."""
LAST_LINES = 20
"""How much of what a sandbox wrote is kept with its ending."""
LOAD_FAILED = "load failed: "
"""How a worker's last line begins where it could not load its model; its exit status is 3."""
SIGSYS = 31
"""The signal by which the kernel ends a process for a system call that is never allowed."""


class SandboxSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The policy of one sandbox, whatever the driver: what it runs and what it may use. Everything that is not named here it may not.

    Fixed, for every driver: no network but a loopback of its own; a read-only root; no capability and no way to gain one; the
    system calls of ``skerry.confine``; a /proc of its own with masked paths; no device but /dev/null and its like and ``gpus``.

    ``model_dir`` is seen read-only at /model, ``socket_dir`` is the one writable directory that outside and inside share (/run/skerry).
    Both exist before a driver is asked to start; anyone may write to the latter, and what is above it keeps strangers out.
    ``uid`` is whom it runs as where the driver may choose; 0 leaves it to the driver, which never makes it root.
    """

    name: str
    argv: list[str]
    environment: dict[str, str] = {}
    model_dir: Path
    socket_dir: Path
    memory_bytes: int
    cpus: float
    uid: int = 0
    pids_max: int = 128
    files_max: int = 256
    file_max_bytes: int = 64 * 2**20
    tmp_max_bytes: int = 64 * 2**20
    log_max_bytes: int = 8 * 2**20
    gpus: list[str] = []
    """NVIDIA GPUs by UUID, MIG slices by theirs."""
    image: str = ""
    """An image of the engine by id; empty: the host's interpreter and libraries, read-only."""
    server: Server | None = None
    """Where ``image`` is a model server of its own: how to speak to it."""


class Ending(msgspec.Struct, frozen=True):
    """How a sandbox ended. ``exit_code`` is the shell's: 128 and the signal's number for one that was killed; None where nobody saw it."""

    exit_code: int | None = None
    oom_killed: bool = False
    lines: list[str] = []
    """The last of what it wrote."""
    was_cut_off: bool = False
    """Whether it never came to be all there, since whoever started it died at that; parts of it may run until it is stopped."""

    @property
    def cause(self) -> Literal["oom", "refused_call", "load_failed", "killed", "exited"]:
        """What kind of end it was, as far as can be told."""
        if self.oom_killed:
            return "oom"
        if self.exit_code == 128 + SIGSYS:
            return "refused_call"
        if any(LOAD_FAILED in line for line in self.lines[-3:]):
            return "load_failed"
        return "killed" if self.exit_code is not None and self.exit_code > 128 else "exited"

    @property
    def reason(self) -> str:
        """The same for people."""
        said = "; ".join(self.lines[-3:])
        match self.cause:
            case "oom":
                return "killed: out of memory"
            case "refused_call":
                return "killed: it made a system call that no model server has a use for (SIGSYS)"
            case "killed":
                return f"killed by signal {(self.exit_code or 0) - 128}" + (f": {said}" if said else "")
            case "load_failed" | "exited":
                code = "" if self.exit_code is None else f"exit code {self.exit_code}"
                return said or code or "ended without a word"


class Sandbox(msgspec.Struct, frozen=True):
    """A sandbox that exists; ``ending`` is None while it runs."""

    name: str
    ending: Ending | None = None

    @property
    def running(self) -> bool:
        """Whether it runs."""
        return self.ending is None

    @property
    def exit_reason(self) -> str:
        """Why it does not run, for people; empty while it does."""
        return "" if self.ending is None else self.ending.reason


class Usage(msgspec.Struct, frozen=True):
    """What a running sandbox uses now; ``cpu_seconds`` counts from its start.

    ``oom_kills`` and ``pids_refused`` count processes ended for want of memory and refused at the limit, where the driver can tell.
    """

    memory_bytes: int
    cpu_seconds: float
    oom_kills: int = 0
    pids_refused: int = 0


class LogLines(msgspec.Struct, frozen=True):
    """What a sandbox wrote, oldest line first, and the position to ask on from."""

    lines: list[str]
    position: str = ""


class DriverFailed(Exception):
    """The driver could not do what was asked; the text says why and the caller may try again."""


class Driver(Protocol):
    """One kind of sandbox. Every method is safe to repeat; sandboxes outlive the process that started them."""

    name: str
    rung: Rung
    limits: str
    """What holds memory, processors and processes to the policy: engine, cgroup2, cgroup1 or rlimits. Known once probed."""

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

    async def logs(self, name: str, *, lines: int, after: str = "") -> LogLines:
        """The last ``lines`` of what it wrote, of that what follows the position ``after``; empty where it is unknown."""
