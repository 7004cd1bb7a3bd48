"""What must change on this box, given what is wanted and what is seen.

Level-triggered: there is no plan that must survive a crash. After every batch the warden looks again and asks again. One sandbox's life:

    (absent) --Fetch--> fetched --Start--> running --Drain--> draining --Remove--> (absent)
                          |                   |
                          |                   +-- exits --> dead --Remove (once its back-off is over)--> (absent)
                          +------Remove (no longer wanted)--> (absent)

A replica whose spec changes has two sandboxes for a while, by the new spec's ``update``:

    recreate            the old one is drained at once; the new one is started when it is gone
    hand_over_if_room   the old one is drained when the new one is ready; where both do not fit, one after the other
    hand_over           the old one is drained when the new one is ready; where both do not fit, the new one waits and says why

An old one that is not ready serves nobody: it is drained at once. A new one that ends is tried again beside the old.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from edge_agent.core.admission import Grant, Holding, Limits, Refusal, free, give_back, holding_of, place
from skerry.wire.messages import ReplicaSpec

SeenPhase = Literal["fetched", "running", "draining", "dead"]


class Seen(msgspec.Struct, frozen=True):
    """A sandbox as the drivers and the store show it. ``retry_at`` and ``drained_at`` are seconds on the warden's clock.

    "fetched": the model is in the store, nothing runs. "running": it exists; ``is_ready`` says whether it answers. "dead": it ended, or
    could not be started; a ``retry_at`` of math.inf is a crash loop.
    """

    spec: ReplicaSpec
    phase: SeenPhase
    retry_at: float = 0.0
    drained_at: float = 0.0
    gpu: str = ""
    is_ready: bool = False

    @property
    def holds_memory(self) -> bool:
        """A draining sandbox still holds its memory."""
        return self.phase in ("running", "draining")

    @property
    def holding(self) -> Holding:
        """What it holds while it does."""
        return holding_of(self.spec, self.gpu)


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Make sure that the model's verified bytes are in the store."""

    spec: ReplicaSpec


class Start(msgspec.Struct, frozen=True, tag=True):
    """Start a sandbox whose model is in the store, on ``gpu`` if one is named, out of the warm sandbox ``warm`` if one is named."""

    spec: ReplicaSpec
    gpu: str = ""
    warm: str = ""


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Take the sandbox out of the route table and let it finish what it took."""

    sandbox: str


class Remove(msgspec.Struct, frozen=True, tag=True):
    """Stop the sandbox if it runs, and forget it."""

    sandbox: str


class GiveBack(msgspec.Struct, frozen=True, tag=True):
    """Stop a warm sandbox, because a wanted replica needs its memory."""

    sandbox: str


def runs_alike(one: ReplicaSpec, other: ReplicaSpec) -> bool:
    """Whether a sandbox of the one is a sandbox of the other: they differ in how it is changed and for how long it stays, in whose place
    it runs, or in nothing but their generation."""
    like = msgspec.structs.replace(
        one, update=other.update, generation=other.generation, stop_after_ms=other.stop_after_ms, replaces=other.replaces
    )
    return like == other


Step = Fetch | Start | Drain | Remove | GiveBack


class Steps(msgspec.Struct, frozen=True):
    """Steps that are safe to run now, in any order, and why replicas whose model is here are not started, by replica name.

    No steps means converged or waiting (for time or for memory).
    """

    steps: list[Step]
    waiting: dict[str, str]


def next_steps(
    want: Mapping[str, ReplicaSpec],
    seen: Mapping[str, Seen],
    *,
    warm: Mapping[str, Holding],
    limits: Limits,
    now: float,
    takes: Mapping[str, Sequence[str]] | None = None,
) -> Steps:
    """What to do now. ``want`` is keyed by replica name, ``seen`` and ``warm`` by sandbox name; ``now`` is in seconds.

    Memory is granted in order of replica name, and never more than ``limits`` in all. ``takes`` names by replica the warm sandboxes that
    may become it, best first; one that holds more than the replica will is passed over. Others are given back where that makes a wanted
    replica fit, which is started once they are gone.
    """
    mine: dict[str, dict[str, Seen]] = {}
    for sandbox, one in sorted(seen.items()):
        mine.setdefault(one.spec.name, {})[sandbox] = one
    kept = {sandbox for name, spec in want.items() for sandbox in _kept(spec, mine.get(name, {}))}
    plan = _Plan(want, seen, kept, warm=warm, limits=limits, takes=takes or {})
    for name, ones in sorted(mine.items()):
        plan.steps.extend(_leaving(want.get(name), ones, kept, now=now))
    for name, spec in sorted(want.items()):
        ones = mine.get(name, {})
        phases = [one.phase for one in ones.values() if one.spec == spec]
        if not phases:
            plan.steps.append(Fetch(spec))
        elif phases.count("fetched") == 1 and not {"running", "dead"} & set(phases):
            plan.begin(spec, ones)
    return Steps(plan.steps, plan.waiting)


def _kept(spec: ReplicaSpec, ones: Mapping[str, Seen]) -> list[str]:
    """A wanted replica's sandboxes that stay for now: one of the wanted spec, and an old one that serves until that is ready."""
    running = sorted((not one.is_ready, name) for name, one in ones.items() if one.spec == spec and one.phase == "running")
    kept = [name for _, name in running[:1]]
    if not running:
        kept = [name for name, one in ones.items() if one.spec == spec and one.phase == "fetched"][:1]
    if spec.update != "recreate" and all(is_unready for is_unready, _ in running):
        ready = [(-one.spec.generation, name) for name, one in ones.items() if one.spec != spec and one.phase == "running" and one.is_ready]
        kept.extend(name for _, name in sorted(ready)[:1])
    return kept


def _leaving(spec: ReplicaSpec | None, ones: Mapping[str, Seen], kept: set[str], *, now: float) -> list[Step]:
    """The steps by which sandboxes of one replica go, whatever the memory."""
    runs = any(one.spec == spec and one.phase == "running" for one in ones.values())
    steps: list[Step] = []
    for sandbox, one in ones.items():
        match one.phase:
            case "running" if sandbox not in kept:
                steps.append(Drain(sandbox))
            case "draining" if now >= one.drained_at:
                steps.append(Remove(sandbox))
            case "fetched" if sandbox not in kept:
                steps.append(Remove(sandbox))
            case "dead" if one.spec != spec or runs or now >= one.retry_at:
                steps.append(Remove(sandbox))
            case _:
                pass
    return steps


class _Plan:
    """The steps of one batch, and the memory as they change it.

    ``present`` is free at this moment. ``planned`` is free once all that leaves has left, less what was promised to replicas before.
    ``at_last`` is what only the wanted sandboxes that run leave free.
    """

    def __init__(
        self,
        want: Mapping[str, ReplicaSpec],
        seen: Mapping[str, Seen],
        kept: set[str],
        *,
        warm: Mapping[str, Holding],
        limits: Limits,
        takes: Mapping[str, Sequence[str]],
    ) -> None:
        self.steps: list[Step] = []
        self.waiting: dict[str, str] = {}
        self._kept, self._warm, self._takes = kept, dict(warm), takes
        staying = [one for sandbox, one in seen.items() if sandbox in kept and one.phase == "running"]
        self._present = free(limits, [*(one.holding for one in seen.values() if one.holds_memory), *warm.values()])
        self._planned = free(limits, [*(one.holding for one in staying), *warm.values()])
        self._at_last = free(limits, [one.holding for one in staying if one.spec == want[one.spec.name]])

    def begin(self, spec: ReplicaSpec, ones: Mapping[str, Seen]) -> None:
        """Start a sandbox of ``spec``, or take the steps that let it start later; ``ones`` are all of that replica."""
        may_start = sum(one.holds_memory for one in ones.values()) <= (0 if spec.update == "recreate" else 1)
        if may_start and self._start_warm(spec):
            return
        grant = place(spec, self._planned)
        if isinstance(grant, Refusal):
            grant = self._make_room(spec, ones, grant)
        if isinstance(grant, Refusal):
            self.waiting[spec.name] = grant.reason
            return
        held = holding_of(spec, grant.gpu)
        self._planned = self._planned.less(held)
        if not may_start:
            self.waiting[spec.name] = "waits until an earlier version has stopped"
        elif not self._present.has(held):
            self.waiting[spec.name] = "waits until what stops has given its memory back"
        else:
            self._present = self._present.less(held)
            self.steps.append(Start(spec, grant.gpu))

    def _start_warm(self, spec: ReplicaSpec) -> bool:
        """Start ``spec`` out of a warm sandbox, which then holds what ``spec`` does; says whether there was one with room for that."""
        for name in self._takes.get(spec.name, ()):
            warm = self._warm.get(name)
            if warm is None or warm.memory_bytes > spec.memory_bytes or warm.gpu_memory_bytes > spec.gpu_memory_bytes:
                continue  # what it would free is free once it is started, not yet in this batch
            held, present, planned = holding_of(spec, warm.gpu), self._present.plus(warm), self._planned.plus(warm)
            if present.has(held) and planned.has(held):
                self._present, self._planned = present.less(held), planned.less(held)
                del self._warm[name]
                self.steps.append(Start(spec, warm.gpu, name))
                return True
        return False

    def _make_room(self, spec: ReplicaSpec, ones: Mapping[str, Seen], refusal: Refusal) -> Grant | Refusal:
        """Take from the warm sandboxes, or else from the old version, what ``spec`` lacks, and say what comes of it."""
        given = give_back(spec, self._planned, self._warm)
        for name in given:
            self._planned = self._planned.plus(self._warm.pop(name))
            self.steps.append(GiveBack(name))
        if given:
            return place(spec, self._planned)
        old = next((name for name, one in ones.items() if name in self._kept and one.phase == "running"), None)
        if old is None:
            return refusal
        if spec.update == "hand_over":
            return Refusal(f"{refusal.reason} beside the old version: update.no_room is refuse")
        never = place(spec, self._at_last)
        if isinstance(never, Refusal):  # the old one would go for nothing
            return Refusal(f"{never.reason} even without the old version, which stays")
        self._planned = self._planned.plus(ones[old].holding)
        self.steps.append(Drain(old))
        return place(spec, self._planned)
