"""What an agent keeps for a link that is cut for longer than anybody would notice late, and what it says when the link is back."""

import asyncio
import contextlib
import socket
import time
from pathlib import Path

import aiomqtt
import pytest

from edge_agent.link.outbox import Outbox
from edge_agent.link.session import Reach, Session
from skerry.demo.broker import find_mosquitto
from skerry.demo.fleet import free_ports
from skerry.runtime import mqtt
from skerry.runtime.proved_time import uptime_ms
from skerry.runtime.settings import Broker
from skerry.wire import codec
from skerry.wire.messages import Ack, Birth, EventBatch, MetricsBatch, Sample
from tests.conftest import need
from tests.integration.test_enrolment import Program

NODE = "cut"


def session_of(outbox: Outbox, port: int) -> Session:
    return Session(
        reach=Reach(Broker("127.0.0.1", port, keepalive_s=4), 1, (0.05, 0.2)), fleet="f", node=NODE, outbox=outbox,
        birth=lambda epoch: Birth("edge", {}, "u", "b", epoch, "v", 1, 1, outbox_epoch=outbox.epoch),
        on_desired=lambda _: None, on_command=lambda *_: None,
    )  # fmt: skip


def sample(outbox: Outbox) -> Sample:
    return Sample(outbox.epoch, outbox.next_sample_seq(), 7, 0.5, 1)


def test_what_was_sent_just_before_the_link_died_is_kept_for_however_long_it_is_dead(tmp_path):
    outbox = Outbox(tmp_path / "o.db", most_bytes=2**23)
    outbox.add_sample(sample(outbox), sent_at_ms=uptime_ms() - 3_600_000)

    async def scene() -> None:
        session = session_of(outbox, free_ports(1)[0])
        for _ in range(3):
            await session.offer(sample(outbox), None)

    asyncio.run(scene())
    assert [one.seq for one in outbox.samples_after(0, 10)] == [1, 2, 3, 4]
    outbox.close()


@pytest.fixture
def port(tmp_path) -> int:
    need("mosquitto", "" if find_mosquitto() else "not installed")
    port = free_ports(1)[0]
    (tmp_path / "m.conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    program = Program(tmp_path / "m.log", find_mosquitto() or "", "-c", tmp_path / "m.conf")
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
            break
        time.sleep(0.05)
    yield port
    program.end()


class Coordinator:
    """Hears what the box says, and acknowledges as the real one."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.events: list[tuple[str, int, str, str]] = []
        self.samples: list[Sample] = []
        self.spent_after: int | None = None
        self.is_listening = asyncio.Event()

    async def run(self) -> None:
        async with mqtt.connected(Broker("127.0.0.1", self.port), "coordinator", last_will=None, queue=1000) as client:
            await client.subscribe(f"skerry/v1/f/{NODE}/#", qos=1)
            self.is_listening.set()
            async for message in client.messages:
                branch = str(message.topic).split("/", 4)[-1]
                if branch == "metrics":
                    self.samples += codec.decode(bytes(message.payload), MetricsBatch).samples
                if branch == "events":
                    await self._take(client, codec.decode(bytes(message.payload), EventBatch))

    async def _take(self, client: aiomqtt.Client, batch: EventBatch) -> None:
        self.events += [(event.epoch, event.seq, event.kind, event.text) for event in batch.events]
        ack = Ack(batch.events[-1].epoch, batch.events[-1].seq)
        if self.spent_after is not None:
            ack, self.spent_after = Ack(batch.events[0].epoch, self.spent_after, is_spent=True), None
        await client.publish(f"skerry/v1/f/{NODE}/command/ack", codec.encode(ack), qos=1)


async def conversing(outbox: Outbox, coordinator: Coordinator, until) -> None:
    stop = asyncio.Event()
    hearing = asyncio.create_task(coordinator.run())
    await asyncio.wait_for(coordinator.is_listening.wait(), 10)
    running = asyncio.create_task(session_of(outbox, coordinator.port).run(stop))
    try:
        async with asyncio.timeout(30):
            while not until():
                await asyncio.sleep(0.05)
    finally:
        stop.set()
        await running
        hearing.cancel()


def filled(folder: Path, *, samples: int, events: int) -> Outbox:
    """One of a box that was cut off."""
    outbox = Outbox(folder / "o.db", most_bytes=2**22)
    for number in range(samples):
        outbox.add_sample(Sample(outbox.epoch, outbox.next_sample_seq(), number * 1000, 0.5, 1), sent_at_ms=0)
    for number in range(events):
        outbox.add_event("kind", "s", f"{number} {'x' * 1000}", at_ms=7)
    return outbox


def test_after_a_long_cut_every_event_that_is_held_arrives_and_what_was_given_up_is_told_in_numbers(tmp_path, port):
    outbox, coordinator = filled(tmp_path, samples=5000, events=3200), Coordinator(port)
    lost_events, lost_samples = outbox.lost()
    assert lost_events > 0
    assert lost_samples == 5000, "events go last"
    asyncio.run(conversing(outbox, coordinator, lambda: outbox.depth()[0] == 0))
    numbers = [seq for _, seq, _, _ in coordinator.events]
    assert sorted(set(numbers)) == list(range(lost_events + 1, max(numbers) + 1))
    told = [text for _, _, kind, text in coordinator.events if kind == "outbox.dropped"]
    assert told == [f"{lost_events} events and {lost_samples} readings did not fit and are gone"]
    outbox.close()


def test_after_a_long_cut_every_reading_arrives_by_itself_or_in_one_for_several(tmp_path, port):
    outbox, coordinator = filled(tmp_path, samples=30_000, events=0), Coordinator(port)
    assert outbox.lost() == (0, 0)

    def is_done() -> bool:
        return bool(coordinator.samples) and max(one.seq for one in coordinator.samples) >= 30_000 and outbox.depth()[0] == 0

    asyncio.run(conversing(outbox, coordinator, is_done))
    reached = 0
    for one in sorted({one.seq: one for one in coordinator.samples}.values(), key=lambda one: one.seq):
        assert one.first == reached + 1
        assert one.readings == one.seq - one.first + 1
        reached = one.seq
    (told,) = [text for _, _, kind, text in coordinator.events if kind == "outbox.thinned"]
    assert int(told.split()[0]) == sum(one.readings for one in {one.seq: one for one in coordinator.samples}.values() if one.readings > 1)
    outbox.close()


def test_a_box_whose_numbers_are_spent_goes_on_under_others_and_says_so(tmp_path, port):
    outbox, coordinator = Outbox(tmp_path / "o.db", most_bytes=2**23), Coordinator(port)
    for number in range(5):
        outbox.add_event("kind", "s", f"{number}", at_ms=7)
    before, coordinator.spent_after = outbox.epoch, 2
    asyncio.run(conversing(outbox, coordinator, lambda: outbox.epoch != before and outbox.depth()[0] == 0))
    anew = [(seq, kind) for epoch, seq, kind, _ in coordinator.events if epoch == outbox.epoch]
    assert anew[:3] == [(3, "kind"), (4, "kind"), (5, "kind")]
    assert "outbox.renumbered" in [kind for _, kind in anew]
    outbox.close()


class Deaf(Coordinator):
    """Its first message went to nobody, as where a broker lost its sessions: it has a gap, and says so with all that it acknowledges."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.missed: set[int] = set()

    async def _take(self, client: aiomqtt.Client, batch: EventBatch) -> None:
        seqs = {event.seq for event in batch.events}
        if not self.missed:
            self.missed = seqs
            return
        self.events += [(event.epoch, event.seq, event.kind, event.text) for event in batch.events]
        held = {seq for _, seq, _, _ in self.events}
        settled = next(seq for seq in range(len(held) + len(self.missed) + 1) if seq + 1 not in held)
        await client.publish(f"skerry/v1/f/{NODE}/command/ack", codec.encode(Ack(batch.events[0].epoch, settled)), qos=1)


def test_what_went_to_nobody_is_sent_again_although_news_go_on_and_are_acknowledged(tmp_path, port):
    outbox, coordinator = filled(tmp_path, samples=0, events=2), Deaf(port)

    async def scene() -> None:
        stop, session = asyncio.Event(), session_of(outbox, port)
        hearing = asyncio.create_task(coordinator.run())
        await asyncio.wait_for(coordinator.is_listening.wait(), 10)
        running = asyncio.create_task(session.run(stop))
        async with asyncio.timeout(8):  # news come all the time: to wait for silence would be to wait for ever
            while not coordinator.missed or not coordinator.missed <= {seq for _, seq, _, _ in coordinator.events}:
                await asyncio.sleep(0.3)
                session.say_event("news")
        stop.set()
        await running
        hearing.cancel()

    asyncio.run(scene())
    outbox.close()
