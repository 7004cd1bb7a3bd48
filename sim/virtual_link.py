"""A pretended agent and its way to the broker: what it says arrives in order or not at all, and what waits on its disk is said again."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from sim.checker import Kept
from skerry.wire.messages import Event

if TYPE_CHECKING:
    from sim.virtual_fleet import Fleet

KEEPALIVE_S, WILL_DELAY_S = 3.0, 1.0
"""After how long a dead link is noticed, on both sides, and how long the broker then waits."""
RECONNECT_S = (0.1, 3.0)
RESEND_S = 2.0
HOP_S = 0.005
EVENTS_AT_ONCE = 20


class Outbox(msgspec.Struct):
    """What of a box's events waits, on its disk."""

    epoch: str
    last: int = 0
    waiting: list[Kept] = []

    def copy(self) -> "Outbox":
        """As a copy of the disk has it."""
        return Outbox(self.epoch, self.last, list(self.waiting))


class Link:
    """One agent's connection. What is sent while the way is shut is there once it opens again, or gone with the connection."""

    def __init__(self, fleet: "Fleet", name: str, outbox: Outbox, *, is_twin: bool = False) -> None:
        self.fleet, self.name, self.outbox, self.is_twin = fleet, name, outbox, is_twin
        self.is_up = False
        self.agent_runs = False
        self.shut: set[str] = set()
        self.latency_s = 0.0
        self.kept: list[Kept] = []
        self.number = 0
        self._sent = 0
        self._held: list[Callable[[], None]] = []
        self._arrives_s = 0.0

    # -- the way

    @property
    def is_open(self) -> bool:
        """Whether what is sent now arrives."""
        return self.agent_runs and not self.shut and self.fleet.broker_runs

    def changed(self) -> None:
        """The way opened or shut, or one of its ends did."""
        if not self.agent_runs or not self.fleet.broker_runs:
            self.drop(has_will=self.fleet.broker_runs)
        if self.is_open and self.is_up:
            held, self._held = self._held, []
            for work in held:
                self.send(work)
        elif self.is_open:
            self._retry()
        elif self.is_up:
            number = self.number
            self.fleet.clock.after(KEEPALIVE_S, lambda: self._notice(number))

    def _notice(self, number: int) -> None:
        if self.is_up and self.number == number and not self.is_open:
            self.drop(has_will=True)

    def _retry(self) -> None:
        self.fleet.clock.after(self.fleet.chance.uniform(*RECONNECT_S), self._connect)

    def _connect(self) -> None:
        if self.is_up or not self.is_open:
            return
        for other in self.fleet.links_of(self.name):
            if other is not self and other.is_up:
                other.drop(has_will=False)
        self.fleet.sessions[self.name] = self.fleet.sessions.get(self.name, 0) + 1
        self.number, self.is_up, self._held = self.fleet.sessions[self.name], True, []
        self._sent = 0
        self.say("link.up", f"session {self.number}")
        number = self.number
        self.send(lambda: self.fleet.presence(self.name, number, is_online=True))
        self.fleet.connected(self)
        self._resend(number)

    def drop(self, *, has_will: bool) -> None:
        """The connection is over, whoever noticed; ``has_will``: the broker says so, unless another comes first."""
        if not self.is_up:
            return
        self.is_up, self._held, number = False, [], self.number
        if self.agent_runs:
            self.say("link.lost", "")
        if has_will:
            self.fleet.clock.after(WILL_DELAY_S, lambda: self.fleet.will(self.name, number))
        if self.is_open:
            self._retry()

    def send(self, work: Callable[[], None]) -> None:
        """To the other end, which does it there."""
        if not self.is_up:
            return
        if self.is_open:
            number, now_s = self.number, self.fleet.clock.now_s
            self._arrives_s = max(self._arrives_s, now_s + HOP_S + self.latency_s / 2)  # in order, as on any connection
            self.fleet.clock.after(self._arrives_s - now_s, lambda: work() if self.number == number else None)
        else:
            self._held.append(work)

    # -- events

    def say(self, kind: str, subject: str) -> None:
        """Write down that something happened, and tell of it."""
        self.outbox.last += 1
        event = Kept(self.name, self.outbox.last, self.fleet.clock.now_ms, kind, subject, "twin" if self.is_twin else "")
        self.kept.append(event)
        self.outbox.waiting.append(event)
        self._send_events()

    def _send_events(self) -> None:
        batch = [event for event in self.outbox.waiting if event.seq > self._sent][:EVENTS_AT_ONCE]
        if batch and self.is_up:
            self._sent = batch[-1].seq
            epoch, number, oldest = self.outbox.epoch, self.number, self.outbox.waiting[0].seq
            sent = [Event(epoch, e.seq, e.at_ms, e.kind, e.subject, e.text) for e in batch]
            self.send(lambda: self.fleet.take_events(self, sent, oldest, f"{number}"))
            self._send_events()

    def _resend(self, number: int) -> None:
        if self.is_up and self.number == number:
            if self.outbox.waiting:
                self._sent = 0
                self._send_events()
            self.fleet.clock.after(RESEND_S, lambda: self._resend(number))

    def confirm(self, epoch: str, settled: int, nonce: str, *, is_spent: bool) -> None:
        """What the coordinator says that it has."""
        if nonce != f"{self.number}" or epoch != self.outbox.epoch:
            return
        self.outbox.waiting = [event for event in self.outbox.waiting if event.seq > settled]
        if is_spent:
            first = self.outbox.waiting[0] if self.outbox.waiting else None
            self.outbox.epoch = f"{epoch}/{first}" if first else f"{epoch}/{self.fleet.chance.random()}"
            self._sent = 0
            self.say("outbox.renumbered", "")
