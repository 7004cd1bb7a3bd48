"""A fleet on a virtual clock: the decisions are the product's own, and everything between them is pretended.

Its own are the planner and what it holds of silence (coordinator/core), the box's steps (edge_agent/core/diff.py), how events are numbered,
kept and acknowledged (coordinator/registry/events.py, on a registry in memory). Pretended are programs, sandboxes, links, broker and time.
What befalls it is the same schedule that real fleets are put through (tests/chaos), and the same checker judges it.
"""

import random
import sqlite3
from collections.abc import Callable

import msgspec
from sqlite_utils import Database

from coordinator.core.deployment import Deployment, Policy, Replicas
from coordinator.core.fit import Node
from coordinator.core.liveness import Contact, Ear, counts_again_at_ms
from coordinator.core.planner import BoxPlan, Wanted, is_doubled, plan
from coordinator.registry import events
from coordinator.registry.migrations import migrate
from sim.checker import BoxState, Kept, Request
from sim.faults import LINK, Fault
from sim.virtual_box import MEMORY_BYTES, PROGRAMS, RESTART_S, Box
from sim.virtual_clock import Clock
from sim.virtual_link import KEEPALIVE_S, RECONNECT_S, WILL_DELAY_S, Link
from skerry.wire.messages import Event, ModelRef

WATCHDOG_S = 10.0
GATHER_S = 0.02
ASK_EVERY_S = 0.5
PATIENCE_S = 6.0
LOST_MS = 4_000
SETTLE_S = 60.0
BOXES = {"edge-1": "edge", "edge-2": "edge", "edge-3": "edge", "cloud-1": "cloud"}


class Fleet:
    """Boxes, broker and coordinator; ``run`` puts them through a schedule."""

    def __init__(self, seed: int, registry: Database) -> None:
        self.clock, self.chance = Clock(), random.Random(f"fleet/{seed}")
        self.registry = registry
        self.broker_runs = self.coordinator_runs = True
        self.signer_runs = True
        self.sessions: dict[str, int] = {}
        self.boxes = {name: Box(self, name, tier) for name, tier in BOXES.items()}
        self.twins: list[Link] = []
        self.asked: list[Request] = []
        self.happened: list[Fault] = []
        self._contacts: dict[str, tuple[int, Contact]] = {}
        self._reports: dict[str, tuple[int, frozenset[str]]] = {}
        self._told: dict[str, BoxPlan] = {}
        self._generations: dict[str, int] = {}
        self._ear, self._listening_ms = Ear(), self.clock.now_ms
        self._wanted = {"everywhere": (1, 1), "counted": (1, 1)}
        self._is_plan_due = False
        self._again_s = 0.0
        self._listens, self._is_forgotten = True, False
        self._queue: list[Callable[[], None]] = []

    def links_of(self, name: str) -> list[Link]:
        """Of a box, and of others of its name."""
        return [self.boxes[name].link, *(twin for twin in self.twins if twin.name == name)]

    # -- the coordinator

    def _hear(self, work: Callable[[], None]) -> None:
        """What the broker passes on; it keeps it while the coordinator is away, if it knows of it at all."""
        if self.coordinator_runs and self._listens:
            work()
        elif not self._is_forgotten:
            self._queue.append(work)

    def presence(self, name: str, number: int, *, is_online: bool) -> None:
        """A box is connected, or was."""

        def take() -> None:
            session, held = self._contacts.get(name, (0, Contact(False, self.clock.now_ms)))
            if number < session or (number == session and held.online == is_online):
                return
            first = Contact(is_online, self.clock.now_ms, 0 if is_online else self.clock.now_ms)
            self._contacts[name] = (number, held.after(online=is_online, now_ms=self.clock.now_ms) if session else first)
            self.plan_soon()

        self._hear(take)

    def will(self, name: str, number: int) -> None:
        """The broker's word for a box that is gone, unless another connection of its came."""
        if self.broker_runs and self.sessions.get(name) == number and not any(link.is_up for link in self.links_of(name)):
            self.presence(name, number, is_online=False)

    def connected(self, link: Link) -> None:
        """The broker has what the box was told last."""
        self._tell(link.name)
        box = self.boxes[link.name]
        if link is box.link:
            box.report()

    def reported(self, name: str, generation: int, ready: frozenset[str]) -> None:
        """How a box is."""

        def take() -> None:
            if self._reports.get(name) != (generation, ready):
                self._reports[name] = (generation, ready)
                self.plan_soon()

        self._hear(take)

    def take_events(self, link: Link, batch: list[Event], oldest: int, nonce: str) -> None:
        """Keep them, and say so."""

        def take() -> None:
            kept = events.save_events(self.registry, link.name, batch, oldest=oldest, dropped=0, now_ms=self.clock.now_ms, nonce=nonce)
            for each in self.links_of(link.name):
                if each.is_up:
                    each.send(lambda each=each: each.confirm(batch[0].epoch, kept.settled, nonce, is_spent=kept.is_spent))

        self._hear(take)

    def plan_soon(self) -> None:
        """Plan what there is."""
        if not self._is_plan_due:
            self._is_plan_due = True
            self.clock.after(GATHER_S, self._plan)

    def _plan(self) -> None:
        self._is_plan_due = False
        if not self.coordinator_runs:
            return
        now_ms = self.clock.now_ms
        listening_ms = self._listening_ms if self.broker_runs else 0
        self._ear = self._ear.after(listening_since_ms=listening_ms, now_ms=now_ms)
        nodes = [
            Node(
                name, box.tier, {}, f"http://{name}", contact.online, MEMORY_BYTES, 0, ["process"],
                silent_ms=contact.silent_ms(self._ear.heard_until_ms), ready=self._reports.get(name, (0, frozenset()))[1],
            )
            for name, box in self.boxes.items()
            if (contact := self._contacts.get(name, (0, None))[1]) is not None
        ]  # fmt: skip
        made = plan(nodes, self._deployments(), self._told)
        for name, part in made.boxes.items():
            if part != self._told.get(name, BoxPlan()):
                self._generations[name] = self._generations.get(name, 0) + 1
                self._told[name] = part
                self._tell(name)
        times_s = [2.0] if any(is_doubled(outcome) for outcome in made.outcomes.values()) else []
        if counts_again_at_ms(listening_since_ms=listening_ms, now_ms=now_ms) != now_ms:
            times_s.append(1.0)
        else:
            changes = (contact.next_change_ms(self._ear.heard_until_ms, [LOST_MS]) for _, contact in self._contacts.values())
            times_s += [max(0.1, (at_ms - now_ms) / 1000) for at_ms in changes if at_ms is not None]
        if times_s:
            self._plan_again(min(times_s))

    def _plan_again(self, seconds: float) -> None:
        at_s = self._again_s = self.clock.now_s + seconds
        self.clock.after(seconds, lambda: self.plan_soon() if self._again_s == at_s else None)

    def _deployments(self) -> list[Wanted]:
        found = []
        for name, (version, count) in self._wanted.items():
            replicas = Replicas(per_node=2) if name == "everywhere" else Replicas(count=count)
            tiers = ["edge", "cloud"] if name == "everywhere" else ["edge"]
            spec = Deployment(
                name, "scale", version, replicas, {}, tiers, "any", 2**27, 1.0, 0, "process", 1500, 0.99, "overflow",
                disconnect=Policy(lost_after_ms=LOST_MS, replace=True),
            )  # fmt: skip
            found.append(Wanted(spec, 10 * version + count, ModelRef("scale", version, f"{version}", 1)))
        return found

    def _tell(self, name: str) -> None:
        if name in self._told and self.signer_runs:
            part, generation = self._told[name], self._generations[name]
            self.boxes[name].link.send(lambda: self.boxes[name].hear(generation, part.replicas))

    def change(self) -> None:
        """An operator changes something."""
        name = self.chance.choice(list(self._wanted))
        version, count = self._wanted[name]
        self._wanted[name] = (self.chance.choice((1, 2)), count) if name == "everywhere" else (version, self.chance.choice((1, 2)))
        self.plan_soon()

    # -- what befalls it

    def befall(self, fault: Fault) -> None:
        """Bring it about now, and its end later."""
        begun_s = self.clock.now_s
        self.happened.append(msgspec.structs.replace(fault, at_s=begun_s))
        if not fault.box:
            over = self._befall_centre(fault)
        elif fault.kind in LINK:
            over = self._befall_link(self.boxes[fault.box].link, fault)
        else:
            over = self._befall_machine(self.boxes[fault.box], fault)
        self.clock.after(fault.lasts_s, over)

    def _befall_link(self, link: Link, fault: Fault) -> Callable[[], None]:
        if fault.kind in ("cut", "one_way"):  # either way shut is no way for TCP
            link.shut.add(fault.kind)
        else:
            link.latency_s = 2.0
        link.changed()

        def over() -> None:
            link.shut.discard(fault.kind)
            link.latency_s = 0.0
            link.changed()

        return over

    def _befall_machine(self, box: Box, fault: Fault) -> Callable[[], None]:  # noqa: C901, PLR0912 - one case for each kind
        over: Callable[[], None] = lambda: None  # noqa: E731 - nothing is to be ended
        match fault.kind:
            case "kill" if fault.part == "worker":
                box.end_worker(int(fault.at_s * 1000))
            case "freeze" if fault.part == "worker":
                pass  # hedged: another of the two answers
            case "kill":
                box.end(fault.part, again_s=RESTART_S)
            case "freeze":
                box.end(fault.part, again_s=min(fault.lasts_s, WATCHDOG_S))
            case "disk_full":
                box.is_full = True

                def over() -> None:
                    box.is_full = False
                    box.wake()
            case "disk_read_only" | "reboot":
                if fault.kind == "reboot":
                    box.power_off()

                def over() -> None:
                    box.power_off()
                    box.start()
            case "memory":
                for part in PROGRAMS:
                    box.end(part, again_s=RESTART_S)
            case "disk_stuck":
                for part in ("agent", "warden"):  # they wait for it; the watchdog can end them, and they begin once it moves again
                    box.end(part, again_s=fault.lasts_s + (RESTART_S if fault.lasts_s > WATCHDOG_S else 0.0))
            case "twin":
                twin = Link(self, box.name, box.link.outbox.copy(), is_twin=True)
                self.twins.append(twin)
                twin.agent_runs = True
                twin.say("agent.started", "")
                twin.changed()

                def over() -> None:
                    twin.agent_runs = False
                    twin.changed()
                    self.twins.remove(twin)
            case _:
                pass  # a clock that jumps: nothing here goes by it
        return over

    def _befall_centre(self, fault: Fault) -> Callable[[], None]:
        part = fault.part or "broker"
        lasts_s = max(fault.lasts_s, RESTART_S)
        if part == "broker":
            self.broker_runs = self._listens = False
            if fault.kind == "broker_wipe":
                self._queue, self._is_forgotten = [], True
            self._links_changed()
        elif part == "coordinator":
            self.coordinator_runs = self._listens = False
        else:
            self.signer_runs = False
        self.clock.after(lasts_s, lambda: self._centre_is_back(part))
        return lambda: None

    def _centre_is_back(self, part: str) -> None:
        self.broker_runs = self.coordinator_runs = self.signer_runs = True
        if part == "broker":
            self._links_changed()
        if part == "signer":
            for name in self.boxes:
                self._tell(name)
        else:
            self.clock.after(self.chance.uniform(*RECONNECT_S), self._listen)

    def _links_changed(self) -> None:
        for name in self.boxes:
            for link in self.links_of(name):
                link.changed()

    def _listen(self) -> None:
        """The coordinator is connected again: it hears what was kept for it, and who is there, and tells all boxes."""
        if self._listens or not (self.coordinator_runs and self.broker_runs):
            return
        self._listens, self._is_forgotten = True, False
        self._listening_ms = self.clock.now_ms
        queue, self._queue = self._queue, []
        for work in queue:
            work()
        for name, box in self.boxes.items():
            up = [link for link in self.links_of(name) if link.is_up]
            for link in up:  # retained
                self.presence(name, link.number, is_online=True)
            session, contact = self._contacts.get(name, (0, Contact(False, 0)))
            if contact.online and not up:
                self.clock.after(WILL_DELAY_S + KEEPALIVE_S, lambda name=name, session=session: self.will(name, session))
            if box.link.is_up:
                box.report()
            self._tell(name)
        self.plan_soon()

    # -- load

    def ask(self, box: Box) -> None:
        """A caller beside a box, with its patience."""
        sent_s = self.clock.now_s

        def look() -> None:
            now_s = self.clock.now_s
            cloud = self.boxes["cloud-1"]
            is_near = box.is_serving
            is_afar = box.runs["gateway"] and box.link.is_open and cloud.link.is_open and cloud.is_serving
            if is_near or is_afar or now_s - sent_s >= PATIENCE_S:
                is_answered = is_near or is_afar
                self.asked.append(Request(sent_s, now_s, [box.name], True, is_answered, error="" if is_answered else "nobody"))
            else:
                self.clock.after(0.1, look)

        look()

    def run(self, schedule: list[Fault], *, seconds: float) -> None:
        """All of it, and the time that it takes to be whole again."""
        for box in self.boxes.values():
            box.start()
        self.clock.run(8.0)
        for fault in schedule:
            self.clock.after(fault.at_s, lambda fault=fault: self.befall(fault))
        steps = int(seconds / ASK_EVERY_S)
        for step in range(steps):
            for box in self.boxes.values():
                self.clock.after(step * ASK_EVERY_S, lambda box=box: self.ask(box))
        for step in range(int(seconds / 6)):
            self.clock.after(6 * step + self.chance.random(), self.change)
        self.clock.run(8.0 + seconds + SETTLE_S)

    def states(self) -> list[BoxState]:
        """Every box, as the coordinator takes it to be and as it is."""
        found = []
        for name, box in self.boxes.items():
            generation, ready = self._reports.get(name, (0, frozenset()))
            contact = self._contacts.get(name, (0, Contact(False, 0)))[1]
            wanted = [replica.name for replica in self._told.get(name, BoxPlan()).replicas]
            running = sum(one.phase in ("running", "draining") for one in box.seen.values())
            told = self._generations.get(name, 0)
            found.append(BoxState(name, contact.online, told, generation, "", wanted, sorted(ready), running))
        return found

    def arrived(self) -> list[Kept]:
        """Every event in the registry."""
        rows = self.registry.query("SELECT node, seq, at_ms, kind, subject, text FROM events")
        return [Kept(**row) for row in rows]


def empty_registry() -> Database:
    """In memory; ``clear`` makes it empty again, sooner than another is made."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute("PRAGMA synchronous = OFF")
    migrate(connection)
    return Database(connection)


def clear(registry: Database) -> None:
    """Nothing was ever said."""
    for table in ("events", "numberings", "heard"):
        registry.execute(f"DELETE FROM {table}")  # noqa: S608 - names from above
