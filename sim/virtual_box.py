"""A pretended box: its steps are the product's own (edge_agent/core/diff.py), its programs and sandboxes are not there."""

import itertools
from typing import TYPE_CHECKING

import msgspec

from edge_agent.core import diff, predecessor
from edge_agent.core.admission import Limits
from edge_agent.core.diff import Seen
from sim.virtual_link import Link, Outbox
from skerry.wire.messages import ReplicaSpec

if TYPE_CHECKING:
    from sim.virtual_fleet import Fleet

RESTART_S = 0.5
START_S = (0.1, 0.6)
DRAIN_S = 0.5
FETCH_S = 4.0
MEMORY_BYTES = 4 * 2**30
PROGRAMS = ("agent", "warden", "gateway")


class Box:
    """One box: its disk (``told``, ``generation``, ``models``, ``served``), what runs on it, its link."""

    def __init__(self, fleet: "Fleet", name: str, tier: str) -> None:
        self.fleet, self.name, self.tier = fleet, name, tier
        self.told: list[ReplicaSpec] = []
        self.generation = 0
        self.models: set[str] = set()
        self.served: dict[str, ReplicaSpec] = {}
        self.seen: dict[str, Seen] = {}
        self.runs = {"warden": False, "gateway": False}
        self.boot = 0
        self.is_full = False
        self.link = Link(fleet, name, Outbox("0"))
        self._passed_on: tuple[int, list[ReplicaSpec]] = (0, [])
        self._is_due = False
        self._sandboxes = itertools.count()

    @property
    def is_serving(self) -> bool:
        """Whether a request here is answered here."""
        return self.runs["gateway"] and any(
            one.is_ready and one.phase == "running" and one.spec.deployment == "everywhere" for one in self.seen.values()
        )

    def start(self) -> None:
        """Power on."""
        self.boot += 1
        for part in PROGRAMS:
            self.begin(part)

    def begin(self, part: str) -> None:
        """A program starts."""
        if part == "agent":
            self.link.agent_runs = True
            self.link.say("agent.started", "")
            self.link.changed()
        else:
            self.runs[part] = True
            if part == "warden" and self.link.agent_runs:
                self.hear(*self._passed_on)
            self.wake()

    def end(self, part: str, *, again_s: float | None) -> None:
        """A program ends; systemd starts it again after so long, if at all."""
        if part == "agent":
            self.link.agent_runs = False
            self.link.changed()
        else:
            self.runs[part] = False
        if again_s is not None:
            boot = self.boot
            self.fleet.clock.after(again_s, lambda: self.begin(part) if self.boot == boot else None)

    def power_off(self) -> None:
        """Everything that runs is gone; the disk is not."""
        self.boot += 1
        self.seen = {}
        for part in PROGRAMS:
            self.end(part, again_s=None)

    def end_worker(self, which: int) -> None:
        """A sandbox ends."""
        running = sorted(name for name, one in self.seen.items() if one.phase == "running")
        if running:
            name = running[which % len(running)]
            self.seen[name] = msgspec.structs.replace(
                self.seen[name], phase="dead", is_ready=False, retry_at=self.fleet.clock.now_s + RESTART_S
            )
            self.fleet.clock.after(RESTART_S, self.wake)
            self.wake()

    def hear(self, generation: int, replicas: list[ReplicaSpec]) -> None:
        """A document, which the agent holds for a warden that is not there; it is on disk from then on, for which room is kept."""
        self._passed_on = max(self._passed_on, (generation, replicas), key=lambda one: one[0])
        if self.runs["warden"] and generation > self.generation:
            self.generation, self.told = generation, replicas
            self.say("desired.accepted", f"{generation}")
        self.wake()

    def say(self, kind: str, subject: str) -> None:
        """Through the agent, where it runs: the warden's own journal is not pretended here."""
        if self.link.agent_runs and not self.is_full:
            self.link.say(kind, subject)

    def wake(self) -> None:
        """Look soon."""
        if not self._is_due:
            self._is_due = True
            self.fleet.clock.after(0.01, self._look)

    def _look(self) -> None:
        self._is_due = False
        if not self.runs["warden"]:
            return
        now_s = self.fleet.clock.now_s
        told = {spec.name: spec for spec in self.told}
        self.served = {name: spec for name, spec in self.served.items() if name in told}
        aim = predecessor.aim(told, self.seen, served=self.served, here=self.models)
        found = diff.next_steps(aim.want, aim.shown(self.seen), warm={}, limits=Limits(MEMORY_BYTES, {}), now=now_s).steps
        moved = [self._do(step) for step in found]
        if any(moved):
            self.wake()
        self._ask_for({spec.model.sha256 for spec in self.told} - self.models)
        self.report()

    def _ask_for(self, missing: set[str]) -> None:
        """Models come over the link, one look after the other."""
        if missing:
            if self.link.is_open and not self.is_full:
                self.fleet.clock.after(FETCH_S, lambda: self.models.update(missing))
            self.fleet.clock.after(FETCH_S + 0.5, self.wake)

    def _do(self, step: diff.Step) -> bool:
        match step:
            case diff.Fetch(spec):
                if spec.model.sha256 not in self.models:
                    return False
                self.seen[f"{spec.name}-{next(self._sandboxes)}"] = Seen(spec, "fetched")
            case diff.Start(spec):
                self._start(spec)
            case diff.Drain(sandbox):
                now_s = self.fleet.clock.now_s
                self.seen[sandbox] = msgspec.structs.replace(
                    self.seen[sandbox], phase="draining", is_ready=False, drained_at=now_s + DRAIN_S
                )
                self.fleet.clock.after(DRAIN_S, self.wake)
            case diff.Remove(sandbox):
                self.say("replica.removed", self.seen.pop(sandbox).spec.name)
            case _:
                raise AssertionError(step)
        return True

    def _start(self, spec: ReplicaSpec) -> None:
        sandbox = next(name for name, one in self.seen.items() if one.spec == spec and one.phase == "fetched")
        self.seen[sandbox] = Seen(spec, "running")
        self.say("replica.started", spec.name)
        self.fleet.clock.after(self.fleet.chance.uniform(*START_S), lambda: self._ready(sandbox))

    def _ready(self, sandbox: str) -> None:
        one = self.seen.get(sandbox)
        if one is not None and one.phase == "running" and not one.is_ready:
            self.seen[sandbox] = msgspec.structs.replace(one, is_ready=True)
            if one.spec in self.told:
                self.served[one.spec.name] = one.spec
            self.say("replica.ready", one.spec.name)
            self.wake()

    def ready(self) -> frozenset[str]:
        """Replicas that answer as they are wanted."""
        return frozenset(one.spec.name for one in self.seen.values() if one.is_ready and one.phase == "running" and one.spec in self.told)

    def report(self) -> None:
        """Tell the coordinator how it is."""
        generation, ready = self.generation, self.ready()
        self.link.send(lambda: self.fleet.reported(self.name, generation, ready))
