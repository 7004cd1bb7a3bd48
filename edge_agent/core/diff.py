"""What must change on this box, given what is wanted and what is seen.

Level-triggered: there is no plan that must survive a crash. After every batch the warden looks again and asks again.

    (absent) --Fetch--> fetched --Start--> running --Drain--> draining --Remove--> (absent)
                          |                   |
                          |                   +-- exits --> dead --Remove (once its back-off is over)--> (absent)
                          +------Remove (no longer wanted)--> (absent)
"""

from collections.abc import Mapping
from typing import Literal

import msgspec

from skerry.wire.messages import ReplicaSpec

SeenPhase = Literal["fetched", "running", "draining", "dead"]


class Seen(msgspec.Struct, frozen=True):
    """A replica as the drivers and the store show it. ``retry_at`` and ``drained_at`` are seconds on the warden's clock."""

    spec: ReplicaSpec
    phase: SeenPhase
    retry_at: float = 0.0
    drained_at: float = 0.0

    @property
    def holds_memory(self) -> bool:
        """A draining sandbox still holds its memory."""
        return self.phase in ("running", "draining")


class Limits(msgspec.Struct, frozen=True):
    """What this box may give to replicas."""

    memory_bytes: int
    gpu_memory_bytes: int


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Make sure that the model's verified bytes are in the store."""

    spec: ReplicaSpec


class Start(msgspec.Struct, frozen=True, tag=True):
    """Start a sandbox whose model is in the store."""

    spec: ReplicaSpec


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Take the replica out of the route table and let it finish what it took."""

    name: str


class Remove(msgspec.Struct, frozen=True, tag=True):
    """Stop the sandbox if there is one, and forget it."""

    name: str


Step = Fetch | Start | Drain | Remove


def next_steps(want: Mapping[str, ReplicaSpec], seen: Mapping[str, Seen], *, limits: Limits, now: float) -> list[Step]:
    """Steps that are safe to run now, in any order; an empty list means converged or waiting (for time or for memory).

    ``want`` and ``seen`` are keyed by replica name; ``now`` is in seconds. Memory is granted in order of name, and never
    more than ``limits`` in all: a replica that does not fit waits until one that drains is gone.
    """
    steps: list[Step] = []
    for name, old in sorted(seen.items()):
        stale = want.get(name) != old.spec
        match old.phase:
            case "running" if stale:
                steps.append(Drain(name))
            case "draining" if now >= old.drained_at:
                steps.append(Remove(name))
            case "fetched" if stale:
                steps.append(Remove(name))
            case "dead" if stale or now >= old.retry_at:
                steps.append(Remove(name))
            case _:
                pass
    held = [old.spec for old in seen.values() if old.holds_memory]
    free_bytes = limits.memory_bytes - sum(spec.memory_bytes for spec in held)
    free_gpu_bytes = limits.gpu_memory_bytes - sum(spec.gpu_memory_bytes for spec in held)
    for name, spec in sorted(want.items()):
        if name not in seen:
            steps.append(Fetch(spec))
        elif (
            seen[name].phase == "fetched"
            and seen[name].spec == spec
            and spec.memory_bytes <= free_bytes
            and spec.gpu_memory_bytes <= free_gpu_bytes
        ):
            steps.append(Start(spec))
            free_bytes -= spec.memory_bytes
            free_gpu_bytes -= spec.gpu_memory_bytes
    return steps
