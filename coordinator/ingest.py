"""What boxes say, into the registry: many messages in one transaction, each event once, an acknowledgement after the commit."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

import msgspec
from sqlite_utils import Database as Tables

from coordinator.core.sequence import Numbering, begun, give_up, take_range
from coordinator.core.twins import seen
from coordinator.live import Live
from coordinator.news import News
from coordinator.registry import events, measurements, nodes
from coordinator.registry.database import Database, RegistryFailed
from coordinator.registry.measurements import BoxLoad, Served
from coordinator.session import Message, NotConnected
from skerry.runtime import lifecycle, log, refusals
from skerry.wire import codec
from skerry.wire.messages import Ack, Birth, EventBatch, MetricsBatch, Presence, Reported, Sample
from skerry.wire.topics import Topic

logger = log.get("coordinator.ingest")

KINDS: dict[str, type[msgspec.Struct]] = {
    "presence": Presence,
    "birth": Birth,
    "reported": Reported,
    "events": EventBatch,
    "metrics": MetricsBatch,
}
BATCH = 500
FLUSH_S = 2.0
RETRY_S = 1.0
TWINS_EVERY_S = 60.0
MOST_SPREAD = 20_000
"""Parts into which one reading is divided over time and deployments at the most."""
MOST_STORED_BYTES = 256 * 1024


class _Settled(msgspec.Struct):
    """What one transaction changed."""

    acks: dict[str, Ack] = {}
    topics: set[str] = set()
    replan: bool = False


class Ingest:
    """``ack`` sends a box the word that its events are safe; ``replan`` asks the planner to look again; what a box says that
    ``admits`` does not know is passed over."""

    def __init__(
        self,
        database: Database,
        *,
        live: Live,
        news: News,
        ack: Callable[[str, Ack], Awaitable[None]],
        replan: Callable[[], None],
        admits: Callable[[str], bool],
        rollup_s: int,
        keep_rollups_s: int,
    ) -> None:
        self._database = database
        self._live = live
        self._news = news
        self._ack = ack
        self._replan = replan
        self._admits = admits
        self._rollup_s = rollup_s
        self._keep_rollups_s = keep_rollups_s
        self._numberings: dict[tuple[str, str], Numbering] = {}
        self._dropped: dict[tuple[str, str], int] = {}
        self._served: dict[tuple[str, int, str], Served] = {}
        self._loads: dict[tuple[str, int], BoxLoad] = {}
        self._outboxes: dict[str, tuple[str, ...]] = {}
        self._twins_told_at: dict[str, float] = {}

    async def run(self, queue: "asyncio.Queue[Message]", stop: asyncio.Event) -> None:
        """Take messages until ``stop`` is set."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._flush_loop(stop), name="coordinator.ingest.flush")
            tasks.create_task(self._take_loop(queue, stop), name="coordinator.ingest.take")
        await self.flush()

    async def _take_loop(self, queue: "asyncio.Queue[Message]", stop: asyncio.Event) -> None:
        stopping = asyncio.create_task(stop.wait(), name="coordinator.ingest.stop")
        while not stop.is_set():
            getting = asyncio.create_task(queue.get(), name="coordinator.ingest.get")
            await asyncio.wait([getting, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not getting.done():
                getting.cancel()
                break
            batch = [getting.result()]
            while len(batch) < BATCH and not queue.empty():
                batch.append(queue.get_nowait())
            await self._take(batch, stop)

    async def _take(self, batch: list[Message], stop: asyncio.Event) -> None:
        """One batch, tried again for as long as the disk refuses: what is behind it waits in the queue, and boxes keep their events."""
        decoded = [message for entry in batch if (message := self._decode(*entry)) is not None]
        metrics = [(node, message) for node, message in decoded if isinstance(message, MetricsBatch)]
        durable = [(node, message) for node, message in decoded if not isinstance(message, MetricsBatch)]
        for node, batch_of_samples in metrics:
            await self._take_metrics(node, batch_of_samples)
        if metrics:
            self._news.tell("metrics")
        twins = self._find_twins(durable)
        while durable and not stop.is_set():
            try:
                settled = await self._database.write(lambda tables: _save(tables, durable, twins, time.time_ns() // 1_000_000))
            except RegistryFailed as exc:
                logger.error("ingest.stalled", reason=str(exc))
                await lifecycle.sleep_until(stop, RETRY_S)
                continue
            await self._after(settled)
            return

    def _find_twins(self, batch: list[tuple[str, msgspec.Struct]]) -> list[str]:
        """Names under which two boxes take turns, each told once in TWINS_EVERY_S."""
        found = []
        for node, message in batch:
            if isinstance(message, Birth) and message.outbox_epoch:
                self._outboxes[node], is_twin = seen(self._outboxes.get(node, ()), message.outbox_epoch)
                if is_twin and time.monotonic() - self._twins_told_at.get(node, -TWINS_EVERY_S) >= TWINS_EVERY_S:
                    self._twins_told_at[node] = time.monotonic()
                    found.append(node)
        return found

    async def _after(self, settled: _Settled) -> None:
        for node, ack in settled.acks.items():
            with contextlib.suppress(NotConnected):  # the box sends again, and is answered then
                await self._ack(node, ack)
        if settled.topics:
            self._news.tell(*settled.topics)
        if settled.replan:
            self._replan()

    def _decode(self, topic: Topic, payload: bytes) -> tuple[str, msgspec.Struct] | None:
        if not self._admits(topic.node):
            return None
        try:
            message: msgspec.Struct = codec.decode(payload, KINDS[topic.branch])
            if isinstance(message, Birth | Reported) and len(codec.encode(message)) > MOST_STORED_BYTES:
                raise codec.Malformed(f"{topic.branch}: more than {MOST_STORED_BYTES} bytes with its defaults written out")
        except codec.Malformed as exc:
            refusals.count("message.malformed", str(exc), node=topic.node, branch=topic.branch)
            return None
        self._live.hear(topic.node)
        return topic.node, message

    # -- metrics: in memory, written in buckets

    async def _take_metrics(self, node: str, batch: MetricsBatch) -> None:
        if not batch.samples:
            return
        epoch = batch.samples[0].epoch
        key = (node, epoch)
        if key not in self._numberings:
            held = await self._database.read(lambda tables: events.read_numbering(tables, node, epoch, "samples"))
            self._numberings[key] = held or begun(batch.oldest or batch.samples[0].first)
        numbering = self._numberings[key]
        for sample in batch.samples:
            numbering, is_new = take_range(numbering, min(sample.first, sample.seq), sample.seq)
            if is_new:
                self._count(node, sample)
        self._numberings[key] = give_up(numbering, batch.oldest)
        self._dropped[key] = batch.lost

    def _count(self, node: str, sample: Sample) -> None:
        begin_s = sample.at_ms // 1000
        served = [
            Served(
                s.deployment,
                begin_s,
                node,
                s.edge,
                s.peer,
                s.cloud,
                s.refused,
                s.failed,
                s.late,
                s.latency,
                compared=s.compared,
                differed=min(s.differed, s.compared),
            )
            for s in sample.serve
        ]
        if sample.readings == 1:
            self._live.take(node, sample, served)
        starts = measurements.buckets(begin_s, sample.width_ms // 1000, self._rollup_s)
        if len(starts) * len(served) > MOST_SPREAD:  # of a box in an enemy's hands, mostly
            starts = starts[:1]
        oldest_s = int(time.time()) - self._keep_rollups_s if len(starts) > 1 else 0  # what is older would be dropped at once
        for one in (part for whole in served for part in measurements.spread(whole, starts) if part.at_s >= oldest_s):
            key = (one.deployment, one.at_s, node)
            held = self._served.get(key)
            self._served[key] = one if held is None else measurements.plus(held, one)
        for at_s in (at_s for at_s in starts if at_s >= oldest_s):
            load = _load_of(node, at_s, sample)
            load_before = self._loads.get((node, at_s))
            self._loads[(node, at_s)] = load if load_before is None else measurements.mean(load, load_before)

    async def _flush_loop(self, stop: asyncio.Event) -> None:
        while not await lifecycle.sleep_until(stop, FLUSH_S):
            await self.flush()

    async def flush(self) -> None:
        """Write the buckets and what of each stream has come; numbers and sums go into one transaction, so that they agree."""
        served, self._served = self._served, {}
        loads, self._loads = self._loads, {}
        if not served and not loads:
            return
        numberings = dict(self._numberings)
        dropped = dict(self._dropped)

        def work(tables: Tables) -> None:
            measurements.add_served(tables, list(served.values()))
            measurements.add_loads(tables, list(loads.values()))
            for (node, epoch), numbering in numberings.items():
                events.save_numbering(tables, node, epoch, "samples", numbering, dropped.get((node, epoch), 0))

        try:
            await self._database.write(work)
        except RegistryFailed as exc:
            logger.error("measurements.not_written", reason=str(exc))
            for key, one in served.items():
                held = self._served.get(key)
                self._served[key] = one if held is None else measurements.plus(held, one)
            for load_key, load in loads.items():
                self._loads.setdefault(load_key, load)


def _load_of(node: str, at_s: int, sample: Sample) -> BoxLoad:
    """GPUs count together: the mean of how busy they are, the hottest one's temperature, and the power of all."""
    gpus = sample.gpus
    return BoxLoad(
        node, at_s, 1, sample.cpu_ratio, sample.memory_used_bytes,
        gpu_ratio=sum(gpu.utilization_ratio for gpu in gpus) / len(gpus) if gpus else 0.0,
        temperature_c=max((gpu.temperature_c for gpu in gpus), default=0.0),
        power_w=sum(gpu.power_w for gpu in gpus),
        network_received_bytes_per_s=sample.network_received_bytes_per_s,
        network_sent_bytes_per_s=sample.network_sent_bytes_per_s,
        link_rtt_ms=sample.link_rtt_ms,
    )  # fmt: skip


def _save(tables: Tables, batch: list[tuple[str, msgspec.Struct]], twins: list[str], now_ms: int) -> _Settled:
    """Everything but metrics, in one transaction."""
    settled = _Settled()
    for node in twins:
        text = "two agents take turns under this name: give each box a name of its own"
        events.add_own_event(tables, node, "node.duplicate", node, text, now_ms)
        settled.topics.add("events")
    for node, message in batch:
        _save_one(tables, node, message, settled, now_ms)
    return settled


def _save_one(tables: Tables, node: str, message: msgspec.Struct, settled: _Settled, now_ms: int) -> None:
    match message:
        case Presence():
            if nodes.save_presence(tables, node, message, now_ms):
                _note_presence(tables, node, message, now_ms)
                settled.topics |= {"nodes", "events"}
                settled.replan = True
        case Birth():
            if nodes.save_birth(tables, node, message, now_ms):
                settled.topics.add("nodes")
                settled.replan = True
        case Reported():
            if nodes.save_reported(tables, node, message, now_ms):
                settled.topics |= {"nodes", "deployments"}
        case EventBatch() if message.events and message.events[0].epoch != events.OWN_EPOCH:
            _save_events(tables, node, message, settled, now_ms)
        case _:
            pass


def _note_presence(tables: Tables, node: str, presence: Presence, now_ms: int) -> None:
    if presence.online:
        events.add_own_event(tables, node, "node.online", node, f"session {presence.session_epoch}", now_ms)
    elif presence.is_goodbye:
        events.add_own_event(tables, node, "node.offline", node, f"its agent signed off, session {presence.session_epoch}", now_ms)
    else:
        events.add_own_event(tables, node, "node.silent", node, "nothing heard: a crash can't be told from a cut link", now_ms)


def _save_events(tables: Tables, node: str, message: EventBatch, settled: _Settled, now_ms: int) -> None:
    epoch = message.events[0].epoch
    one_epoch = [event for event in message.events if event.epoch == epoch]
    kept = events.save_events(tables, node, one_epoch, oldest=message.oldest, dropped=message.lost, now_ms=now_ms, nonce=message.nonce)
    held = settled.acks.get(node)
    if held is None or held.epoch != epoch or not held.is_spent:  # else the box is told of the first such number
        settled.acks[node] = Ack(epoch, kept.settled, is_spent=kept.is_spent, nonce=message.nonce)
        if kept.is_spent and not kept.is_known:
            text = f"other events under numbers after {kept.settled}: its disk is one of an earlier day; it goes on under new numbers"
            events.add_own_event(tables, node, "node.restored", node, text, now_ms)
    if kept.fresh or kept.is_spent:
        settled.topics.add("events")
