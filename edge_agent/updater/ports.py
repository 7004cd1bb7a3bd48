"""What the updater's loop needs of a box."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import msgspec

from edge_agent.core.update import Unit
from skerry.wire.messages import Software

AGENT, WARDEN, GATEWAY = "skerry-agent", "skerry-warden", "skerry-gateway"
PROGRAMS = (WARDEN, AGENT, GATEWAY)
"""In the order in which they start anew."""


class NotPrepared(Exception):
    """The release can't be used here; the text says why."""


class Pid(msgspec.Struct, frozen=True):
    """A program as it is now: its unit's state, and its process, 0 where there is none."""

    unit: Unit
    pid: int


class Releases(Protocol):
    """The releases on the disk."""

    def current(self) -> str:
        """The one that starts; empty where there is none."""

    async def prepare(self, software: Software, path: Path) -> None:
        """Have it unpacked beside the others and tried. Raises NotPrepared."""

    def changed(self, before: str, after: str) -> list[str]:
        """The programs that differ between the two."""

    def point(self, version: str, *, before: str) -> None:
        """Have ``version`` start, with its own unit files. ``before`` is what there was at first."""

    def prove(self, version: str) -> None:
        """It is what judges the next one."""


class Manager(Protocol):
    """Who starts and ends programs."""

    async def look(self, units: Iterable[str]) -> dict[str, Pid]:
        """Each program now."""

    async def reload(self) -> None:
        """Read unit files again."""

    async def restart(self, units: Iterable[str]) -> None:
        """Have them start anew; does not wait for it."""


class Box(Protocol):
    """What the programs say of themselves."""

    def wanted(self) -> tuple[Software | None, Path]:
        """What the box was told, and where its bytes lie."""

    async def waiting_for(self) -> frozenset[str] | None:
        """Deployments that nobody can answer for; None where the gateway does not answer."""

    def is_heard(self, version: str, pid: int) -> bool:
        """Whether the agent that is this process of this version was answered by the coordinator."""
