"""The MQTT session: connect with a Last Will, say what this box is and does, send what the outbox holds, hear what is wanted.

Everything here may be cut at any moment; what matters is in the outbox or is said again after the next connect.
"""

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import Callable
from typing import TypeVar

import aiomqtt
import msgspec

from edge_agent.link.outbox import Outbox, OutboxFailed
from skerry.runtime import backoff, lifecycle, log, mqtt, refusals, tls
from skerry.runtime.proved_time import uptime_ms
from skerry.runtime.settings import Broker
from skerry.wire import codec, topics
from skerry.wire.box import GatewayTotals
from skerry.wire.messages import Ack, Birth, Event, EventBatch, MetricsBatch, Presence, Reported, Sample

T = TypeVar("T", Event, Sample)

logger = log.get("agent.session")

QUEUE = 256
BATCH_BYTES = 16 * 1024
EVENTS_UNDER_WAY = 2000
RESEND_EVENTS_S = 10.0
"""Without a confirmation that is one more than the last."""
GAP_S = 1.0
"""A confirmation that says no more than the last one did means that something is missing there; it is sent again so often at the most."""
MOST_IN_A_MESSAGE = 100
REPLAY_PAUSE_S = 0.05
"""Between two messages of a backlog at the least, and as long as the last one took: it has half of a thin link, what is live the rest."""
BACKLOG_EVENTS = 200
"""More of them that are not confirmed are a backlog."""
REFRESH_S = 60.0
"""How often presence and report are said again although nothing changed: a lost one is made up for by the next."""
MAX_CORRELATION_BYTES = 64
STEADY_S = 5.0
SUSPICIOUS_FLAPS = 3
"""Brokers throw the older of two clients with one id off without a word (mosquitto 2.0, rumqttd): it looks like this."""


class Reach(msgspec.Struct, frozen=True):
    """How the broker is reached: the first and the longest pause between two tries, who says whether its certificate is over, and where
    else it may be, in the order in which that is tried."""

    broker: Broker
    will_delay_s: int
    backoff_s: tuple[float, float]
    judge: tls.Judge | None = None
    others: Callable[[], list[Broker]] = list

    def candidates(self) -> list[Broker]:
        """All that are known of."""
        return self.others() or [self.broker]


class Session:
    """Keeps the box connected. ``birth`` gives the inventory for a session number; ``on_desired`` gets envelopes as they come.

    ``on_command`` gets the verb, the correlation data and the payload of a command that wants an answer. It must not wait.
    ``on_link`` gets whether the broker is there; ``on_heard`` is called when the coordinator answers on a new connection.
    """

    def __init__(
        self,
        *,
        reach: Reach,
        fleet: str,
        node: str,
        outbox: Outbox,
        birth: Callable[[int], Birth],
        on_desired: Callable[[bytes], None],
        on_command: Callable[[str, bytes, bytes], None],
        on_link: Callable[[bool], None] = lambda _: None,
        on_heard: Callable[[], None] = lambda: None,
    ) -> None:
        self._reach = reach
        self._broker = reach.broker
        self._fleet = fleet
        self._node = node
        self._outbox = outbox
        self._birth = birth
        self._on_desired = on_desired
        self._on_command = on_command
        self._on_link = on_link
        self._on_heard = on_heard
        self._client: aiomqtt.Client | None = None
        self._reported: Reported | None = None
        self._news = asyncio.Event()
        self._report_due = asyncio.Event()
        self._birth_due = asyncio.Event()
        self._moved = asyncio.Event()
        self._connected_at_ms = 0
        self._confirmed_at = 0.0
        self._confirmed_seq = 0
        self._sent_seq = 0
        self._again_at = 0.0
        self._nonce = ""
        self._is_heard = False

    @property
    def is_connected(self) -> bool:
        """Whether the broker answered and has not been lost since."""
        return self._client is not None

    def rtt_ms(self) -> float:
        """The round trip to the broker, smoothed, as the kernel measures it; 0 without a connection."""
        return mqtt.rtt_ms(self._client) if self._client is not None else 0.0

    def say_event(self, kind: str, subject: str = "", text: str = "") -> None:
        """Put an event into the outbox; on a full disk it is logged and counted by the gap in the numbers."""
        try:
            self._outbox.add_event(kind, subject, text, at_ms=time.time_ns() // 1_000_000)
        except OutboxFailed as exc:
            logger.error("event.not_kept", kind=kind, subject=subject, text=text, reason=str(exc))
        self._news.set()

    def _say_loss(self) -> None:
        """What was given up while the box was cut off, in numbers."""
        with contextlib.suppress(OutboxFailed):  # told with the next connection
            loss = self._outbox.take_loss()
            if loss.events or loss.samples:
                self.say_event("outbox.dropped", "", f"{loss.events} events and {loss.samples} readings did not fit and are gone")
            if loss.thinned:
                self.say_event("outbox.thinned", "", f"{loss.thinned} readings did not fit one by one: they stand in minutes' and hours'")

    def events_added(self) -> None:
        """The outbox holds new events."""
        self._news.set()

    def report(self, reported: Reported) -> None:
        """Say what the box does now."""
        self._reported = reported
        self._report_due.set()

    def move(self) -> None:
        """The broker is elsewhere, or will be: look there first, now."""
        if self._reach.candidates()[0] != self._broker:
            self._moved.set()

    def announce(self) -> None:
        """The inventory changed: say what the box is again."""
        self._birth_due.set()

    async def offer(self, sample: Sample, totals: GatewayTotals | None) -> None:
        """Send a sample if the link is up, and keep it until it is sure that it arrived."""
        sent_at_ms = 0
        if self._client is not None:
            try:
                await self._publish(self._client, "metrics", self._metrics([sample]), qos=0)
                sent_at_ms = uptime_ms()
            except aiomqtt.MqttError:
                pass  # the session's own loop notices and reports it
        self._outbox.add_sample(sample, sent_at_ms=sent_at_ms, totals=totals)
        unnoticed_ms = 4000 * self._broker.keepalive_s
        if self._client is not None and uptime_ms() - self._connected_at_ms > unnoticed_ms:  # else what was sent before waits for this link
            self._outbox.forget_samples(sent_before_ms=uptime_ms() - unnoticed_ms)

    async def reply(self, correlation: bytes, message: msgspec.Struct) -> None:
        """Answer a command; where the link is down the answer is dropped, and who asked asks again."""
        if self._client is None:
            return
        try:
            await self._publish(self._client, "reply", message, correlation=correlation)
        except aiomqtt.MqttError as exc:
            logger.info("reply.dropped", reason=str(exc))

    def _metrics(self, samples: list[Sample]) -> MetricsBatch:
        return MetricsBatch(samples, self._outbox.lost()[1], oldest=self._outbox.oldest_sample() or samples[0].seq)

    # -- the connection

    async def run(self, stop: asyncio.Event) -> None:
        """Stay connected until ``stop`` is set; a broker that is not there is waited for, not an error."""
        attempt, flaps, lost_at, up_at, failed = 0, 0, time.monotonic(), 0.0, 0
        while not stop.is_set():
            was_up = False
            wait_s = 0.0
            self._moved.clear()
            candidates = self._reach.candidates()
            self._broker = candidates[failed % len(candidates)]
            try:
                epoch = self._outbox.next_session()
                last_will = mqtt.will(
                    topics.up(self._fleet, self._node, "presence"),
                    codec.encode(Presence(False, self._birth(epoch).boot_id, epoch)),
                    delay_s=self._reach.will_delay_s,
                )
                async with mqtt.connected(
                    self._broker, topics.client_id(self._fleet, self._node), last_will=last_will, queue=QUEUE, judge=self._reach.judge
                ) as client:
                    was_up, up_at = True, time.monotonic()
                    self.say_event("link.up", self._broker.host, f"session {epoch}, after {time.monotonic() - lost_at:.1f} s")
                    self._say_loss()
                    await self._converse(client, epoch, stop)
                    goodbye = Presence(False, self._birth(epoch).boot_id, epoch, is_goodbye=True)
                    await self._publish(client, "presence", goodbye, retain=True)
                    lost_at = time.monotonic()
            except (aiomqtt.MqttError, OSError, TimeoutError, OutboxFailed) as exc:
                reason = str(exc) or type(exc).__name__
                if was_up:
                    lost_at = time.monotonic()
                    flaps = flaps + 1 if lost_at - up_at < STEADY_S else 0
                    if flaps == 0:
                        attempt = 0  # a link that flaps is left alone for longer and longer
                    if flaps >= SUSPICIOUS_FLAPS:
                        reason = (
                            f"{reason}; lost {flaps} times within seconds of connecting: does another agent run as node {self._node!r}? "
                            "Give each box a name of its own"
                        )
                    self.say_event("link.lost", self._broker.host, reason)
                failed = 0 if was_up else failed + 1  # after a loss from the first one on
                if was_up or attempt == 0:
                    logger.warning(
                        "link.lost" if was_up else "broker.absent", broker=self._broker.host, port=self._broker.port, reason=reason
                    )
                is_round = was_up or failed % len(candidates) == 0
                if is_round:  # all were tried
                    wait_s = backoff.delay_s(attempt, random.random(), first_s=self._reach.backoff_s[0], most_s=self._reach.backoff_s[1])
                    attempt += 1
            finally:
                self._client = None
                self._on_link(False)
            await lifecycle.sleep_until(stop, wait_s)

    async def _converse(self, client: aiomqtt.Client, epoch: int, stop: asyncio.Event) -> None:
        """Everything that happens while connected; ends when ``stop`` is set, raises when the link is lost."""
        for pattern in topics.down_filters(self._fleet, self._node):
            await client.subscribe(pattern, qos=1)
        self._confirmed_at, self._confirmed_seq, self._is_heard = time.monotonic(), 0, False
        await self._publish(client, "presence", Presence(True, self._birth(epoch).boot_id, epoch), retain=True)
        self._birth_due.set()
        self._report_due.set()
        self._client, self._connected_at_ms, self._nonce = client, uptime_ms(), secrets.token_hex(8)
        self._on_link(True)
        stopping = asyncio.create_task(lifecycle.first_of(stop, self._moved, within_s=None), name="agent.session.stop")
        loops = [
            asyncio.create_task(self._listen(client), name="agent.session.listen"),
            asyncio.create_task(self._send_births(client, epoch), name="agent.session.births"),
            asyncio.create_task(self._send_reports(client, epoch), name="agent.session.reports"),
            asyncio.create_task(self._send_events(client), name="agent.session.events"),
            asyncio.create_task(self._send_backlog(client), name="agent.session.backlog"),
        ]
        try:
            pending = {stopping, *loops}
            while not stopping.done():
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done - {stopping}:
                    task.result()
        finally:
            await lifecycle.end(stopping, *loops)

    async def _publish(
        self,
        client: aiomqtt.Client,
        branch: topics.UpBranch,
        message: msgspec.Struct,
        *,
        qos: int = 1,
        retain: bool = False,
        correlation: bytes = b"",
    ) -> None:
        topic = topics.up(self._fleet, self._node, branch)
        await client.publish(topic, codec.encode(message), qos=qos, retain=retain, properties=mqtt.stamped(correlation=correlation))

    async def _listen(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            topic = topics.parse(str(message.topic))
            payload = message.payload
            if topic is None or not isinstance(payload, bytes | bytearray):
                continue
            if len(payload) > codec.MAX_MESSAGE_BYTES:
                logger.warning("message.too_large", topic=str(message.topic)[:200], bytes=len(payload))
            elif topic.branch == "desired":
                self._on_desired(bytes(payload))
                self._report_due.set()  # whoever sends it, a coordinator that restarted mostly, wants to know
                self._birth_due.set()
            elif topic.branch == "command/ack":
                self._confirm(bytes(payload))
            elif topic.branch.startswith("command/"):
                self._hear_command(topic.branch.removeprefix("command/"), message, bytes(payload))

    def _hear_command(self, verb: str, message: aiomqtt.Message, payload: bytes) -> None:
        """Answers go to the box's own branch and nowhere else: whoever may send commands can't make the box publish elsewhere."""
        response_topic, correlation = mqtt.response_topic_of(message), mqtt.correlation_of(message)
        if response_topic != topics.up(self._fleet, self._node, "reply") or not 0 < len(correlation) <= MAX_CORRELATION_BYTES:
            said = f"answer to {response_topic[:200]!r}, correlation of {len(correlation)} bytes"
            refusals.count("command.unanswerable", said, verb=verb)
            return
        self._on_command(verb, correlation, payload)

    def _confirm(self, payload: bytes) -> None:
        try:
            ack = codec.decode(payload, Ack)
        except codec.Malformed as exc:
            refusals.count("ack.malformed", str(exc))
            return
        if ack.nonce not in ("", self._nonce):
            return  # about an earlier connection: what is held now may be something else under the same numbers
        epoch = self._outbox.epoch
        self._outbox.confirm_events(ack.epoch, ack.events_seq, is_spent=ack.is_spent)
        if ack.epoch == epoch and ack.is_spent:
            self._sent_seq = 0
            self.say_event("outbox.renumbered", "", f"the coordinator has other events under its numbers: epoch {epoch} became another")
            self._birth_due.set()
        if not self._is_heard:
            # The birth of this connection may have been sent before the coordinator was there, and no broker keeps it.
            self._is_heard = True
            self._birth_due.set()
            self._on_heard()
        if ack.epoch == self._outbox.epoch:
            self._note_confirmed(ack.events_seq)
        self._news.set()

    def _note_confirmed(self, seq: int) -> None:
        if seq > self._confirmed_seq:
            self._confirmed_at, self._confirmed_seq = time.monotonic(), seq
        elif self._sent_seq > seq:
            self._send_again(self._again_at + GAP_S)

    def _send_again(self, due_s: float) -> None:
        """All that is unconfirmed, if there is something and its time has come."""
        if time.monotonic() >= due_s and self._outbox.depth()[0]:
            self._sent_seq, self._again_at = 0, time.monotonic()

    async def _send_births(self, client: aiomqtt.Client, epoch: int) -> None:
        while True:
            await self._birth_due.wait()
            self._birth_due.clear()
            await self._publish(client, "birth", self._birth(epoch))
            await asyncio.sleep(0.2)  # a burst of changes is one birth

    async def _send_reports(self, client: aiomqtt.Client, epoch: int) -> None:
        while True:
            try:
                await asyncio.wait_for(self._report_due.wait(), REFRESH_S)
            except TimeoutError:
                await self._publish(client, "presence", Presence(True, self._birth(epoch).boot_id, epoch), retain=True)
            self._report_due.clear()
            if self._reported is not None:
                await self._publish(client, "reported", self._reported, retain=True)

    async def _send_events(self, client: aiomqtt.Client) -> None:
        """In order of number; all that is unconfirmed again when no confirmation comes for RESEND_EVENTS_S."""
        self._sent_seq = 0
        while True:
            self._news.clear()
            if self._sent_seq <= self._confirmed_seq:
                self._confirmed_at = time.monotonic()  # nothing is awaited
            has_room = self._sent_seq - self._confirmed_seq < EVENTS_UNDER_WAY
            batch = self._outbox.events_after(self._sent_seq, MOST_IN_A_MESSAGE) if has_room else []
            if batch:
                fitting, began = _fitting(batch), time.monotonic()
                self._sent_seq = fitting[-1].seq
                await self._publish(client, "events", self._batch(fitting))
                if self._outbox.depth()[0] > BACKLOG_EVENTS:
                    await asyncio.sleep(time.monotonic() - began)
                continue
            await lifecycle.first_of(self._news, within_s=RESEND_EVENTS_S)
            self._send_again(max(self._confirmed_at, self._again_at) + RESEND_EVENTS_S)

    def _batch(self, events: list[Event]) -> EventBatch:
        return EventBatch(events, self._outbox.lost()[0], oldest=self._outbox.oldest_event(), nonce=self._nonce)

    async def _send_backlog(self, client: aiomqtt.Client) -> None:
        """What was sampled while the link was down, and what may have been sent into a link that was dead already."""
        sent = 0
        while held := self._outbox.samples_after(sent, MOST_IN_A_MESSAGE):
            samples, began = _fitting(held), time.monotonic()
            await self._publish(client, "metrics", self._metrics(samples), qos=1)
            self._outbox.mark_sent([sample.seq for sample in samples], at_ms=uptime_ms())
            sent = samples[-1].seq
            await asyncio.sleep(max(REPLAY_PAUSE_S, time.monotonic() - began))
        await asyncio.Event().wait()  # the other loops go on


def _fitting(items: list[T]) -> list[T]:
    """As many of the first as one message may hold, one at least."""
    size, count = 0, 0
    for item in items:
        size += len(codec.encode(item))
        if count and size > BATCH_BYTES:
            break
        count += 1
    return items[:count]
