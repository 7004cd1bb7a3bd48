"""A deployment's replicas on this box: who is free, who waits, what runs together, what became of each call.

submit -> waits, by priority -> core.batching: now or for company -> core.balance: which replica -> connection.send -> Outcome
A place at a replica is held from the moment a call is sent until the worker has answered, whether or not anybody still waits for
the answer: a worker that computes is busy.
"""

import asyncio
import itertools
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path

import msgspec

from edge_agent.core import balance, batching, estimate
from edge_agent.core.balance import ReplicaView
from edge_agent.core.estimate import CostCurve
from edge_agent.core.queueing import Place
from edge_agent.core.routing import LocalView
from edge_agent.gateway.arena import Region
from edge_agent.gateway.backlog import Backlog
from edge_agent.gateway.calls import SHARED_FROM_BYTES, Batch, Job, deliver, placed
from edge_agent.gateway.connection import ReplicaLost, WorkerConnection
from skerry.runtime import log
from skerry.wire import codec, ipc, oip
from skerry.wire.box import LocalReplica, Route

logger = log.get("gateway.dispatch")

RECONNECT_S = 0.1
STUCK_AFTER_S = 30.0
"""A worker that has not answered for so long is no longer waited for: its connection is made anew."""
OVERDUE_MS, OVERDUE_TIMES = 10.0, 4.0
"""A replica whose oldest call takes this long, and so many times as long as was carefully expected, is passed over where it can be."""
ROOM_TO_SPARE_BYTES = 4096
"""Beyond what outputs took before, since each begins at an aligned place."""
MOST_ROOM_BYTES = 16 * 1024 * 1024
"""For the outputs of one row; what a model has beyond that comes in the frame."""
MOST_SEQUENCES = 8192
"""Whose replica is remembered; the longest idle one goes first, and is then asked for at every replica."""


class TooLate(Exception):
    """It would not be done in time any more, or had to make room for what is more urgent."""


class Interrupted(Exception):
    """The sequence's state is gone; the text says why."""


class _Replica:
    """One replica and what is under way there."""

    def __init__(self, spec: LocalReplica) -> None:
        self.spec = spec
        self.connection: WorkerConnection | None = None
        self.hello = ipc.Hello()
        self.keeper: asyncio.Task[None] | None = None
        self.curve = CostCurve()
        self.depth = 1
        self.since_s = 0.0
        self.answered = 0
        self.rows = 0
        self.sent: dict[int, Batch] = {}
        """What is under way, the oldest first."""
        self.answered_at = 0.0
        self.output_bytes = 0
        """Of the largest outputs that it gave, by row."""
        self.is_retired = False

    def is_overdue(self, now: float, *, by_ms: float = 0.0) -> bool:
        if not self.sent:
            return False
        since = max(next(iter(self.sent.values())).at_s, self.answered_at)
        return self.curve.count > 0 and (now - since) * 1000 > by_ms + max(
            OVERDUE_MS, OVERDUE_TIMES * self.curve.careful_ms(max(1, self.rows))
        )

    def view(self) -> ReplicaView:
        return ReplicaView(
            name=self.spec.name, outstanding_rows=self.rows, depth=self.depth, running=len(self.sent), curve=self.curve,
            since_s=self.since_s, answered=self.answered,
        )  # fmt: skip


class Pool:
    """Connections to every ready replica of one deployment, and the queue before them."""

    def __init__(
        self, *, queue_limit: int, arena_bytes: int, on_run: Callable[[int, float], None], on_shed: Callable[[], None] = lambda: None
    ) -> None:
        self.on_shed = on_shed
        """Told of each request that made way for a more urgent one."""
        self.on_run = on_run
        """Told of each run: how many calls shared it, and what it took in milliseconds."""
        self._arena_bytes = arena_bytes
        self._replicas: dict[LocalReplica, _Replica] = {}
        self._connected: list[_Replica] = []
        self._backlog = Backlog(queue_limit)
        self._timer: asyncio.TimerHandle | None = None
        self._batching = (1, 0.0)
        self._batches = itertools.count(1)
        self._calls = itertools.count(1)
        self._pins: OrderedDict[str, str] = OrderedDict()
        self._arrivals_per_s = 0.0
        self._arrived_at = 0.0
        self.curve = CostCurve()
        """What a run takes, on whichever replica."""
        self.hello: ipc.Hello | None = None
        self.available = asyncio.Event()
        self.kept = 0
        """Requests that were passed on and may have to be run here after all."""

    # -- what others see

    @property
    def slots(self) -> int:
        """Runs that go on at once: one for each replica that is ready."""
        return len(self._connected)

    @property
    def running(self) -> int:
        """Batches that are under way."""
        return sum(len(replica.sent) for replica in self._connected)

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._backlog)

    def view(self, place: Place, tries: list[Job], *, overdue_by_ms: float = 0.0) -> LocalView:
        """What core/routing decides by: as a request finds it that is at ``place``, and is being tried here already by ``tries``.

        A replica that is overdue by more than ``overdue_by_ms`` does not count, nor one that has the request, nor any while the request
        waits in the queue.
        """
        now, able = time.perf_counter(), self._connected
        if tries:
            taken = {job.sent_to for job in tries}
            able = [] if "" in taken else [replica for replica in able if replica.spec.name not in taken]
        slots = running = running_rows = 0
        for replica in able:
            if replica.sent:
                if replica.is_overdue(now, by_ms=overdue_by_ms):
                    continue
                running += len(replica.sent)
                running_rows += replica.rows
            slots += 1
        backlog, (max_rows, _) = self._backlog, self._batching
        ahead, ahead_rows = backlog.ahead(place.priority) if len(backlog) else (0, 0)
        above = backlog.rows_per_s_above(place.priority, now)
        pushed_by = above * self.curve.mean_ms(max_rows) / max_rows / 1000 / slots if above and slots else 0.0
        return LocalView(
            slots=slots, running=running, waiting=len(backlog), queue_limit=backlog.limit, service=self.curve, rows=place.rows,
            running_rows=running_rows, ahead=ahead, ahead_rows=ahead_rows, kept=self.kept, max_rows=max_rows,
            makes_way=backlog.makes_way(place), pushed_by=pushed_by,
        )  # fmt: skip

    def memory_for(self, size_bytes: int, *, lead_bytes: int) -> Region | None:
        """Room for a request's body where the replica that would run it now can read it; None where it may as well lie elsewhere."""
        if size_bytes < SHARED_FROM_BYTES or not self._connected:
            return None
        replica = self._connected[0] if len(self._connected) == 1 else min(self._connected, key=lambda r: (r.rows, r.answered_at))
        connection = replica.connection
        return connection.arena.take(size_bytes, lead_bytes=lead_bytes) if connection is not None and connection.arena is not None else None

    # -- which replicas there are

    def update(self, route: Route | None) -> None:
        """Keep a connection to exactly this route's replicas; calls under way on others are finished, not cut."""
        replicas = route.replicas if route is not None else []
        self._batching = (max(1, route.batching.max_batch), route.batching.max_wait_us / 1000) if route is not None else (1, 0.0)
        for spec in [spec for spec in self._replicas if spec not in replicas]:
            self._retire(self._replicas.pop(spec))
        for spec in replicas:
            if spec not in self._replicas:
                replica = self._replicas[spec] = _Replica(spec)
                replica.keeper = asyncio.create_task(self._keep(replica), name=f"gateway.replica.{spec.name}")

    def _retire(self, replica: _Replica) -> None:
        replica.is_retired = True
        if replica in self._connected:
            self._disconnected(replica)
        if replica.keeper is not None and not replica.sent:
            replica.keeper.cancel()

    async def _keep(self, replica: _Replica) -> None:
        """One connection, made again whenever it is lost, until the replica leaves the route table and has answered what it was asked."""
        try:
            while not replica.is_retired:
                try:
                    connection, hello = await WorkerConnection.open(Path(replica.spec.socket), arena_bytes=self._arena_bytes)
                except ReplicaLost:
                    await asyncio.sleep(RECONNECT_S)
                    continue
                if self._replicas.get(replica.spec) is not replica:
                    connection.close()
                    return
                replica.connection, replica.hello, self.hello = connection, hello, hello
                replica.since_s, replica.answered, replica.curve = time.perf_counter(), 0, CostCurve()
                self._connected.append(replica)
                self.available.set()
                self._pump()
                await asyncio.shield(connection.closed)
                replica.connection = None
                if replica in self._connected:
                    self._disconnected(replica)
                if not replica.is_retired:
                    logger.warning("replica.lost", replica=replica.spec.name)
        finally:
            if replica.connection is not None:
                replica.connection.close()

    def _disconnected(self, replica: _Replica) -> None:
        self._connected.remove(replica)
        if not self._connected:
            self.available.clear()
        for sequence in [key for key, name in self._pins.items() if name == replica.spec.name]:
            self._pins[sequence] = ""

    # -- the queue

    def submit(self, job: Job) -> None:
        """Run it when its turn comes; ``job.future`` tells of the end. Whoever gives up on it calls ``withdraw``."""
        if self._batching[0] > 1:
            now = job.place.arrived_s
            gap = now - self._arrived_at
            self._arrived_at = now
            self._arrivals_per_s += 0.1 * ((1 / gap if gap > 1e-6 else 1e6) - self._arrivals_per_s) if gap < 1 else -self._arrivals_per_s
            job.kind = self._kind_of(job)
        self._backlog.arrived(job.place, job.place.arrived_s)
        if not len(self._backlog) and self._batching[0] == 1 and not job.pin:
            replica = self._chosen(job.place.rows)
            if replica is not None:
                self._send(replica, [job])
                return
        victim = self._backlog.add(job)
        if victim is not None:
            if victim is not job:
                self.on_shed()
            full = f"the queue here is full ({self._backlog.limit})"
            victim.fail(TooLate(full if victim is job else f"{full}, and what is more urgent goes first"))
        if victim is not job:
            self._pump()

    def withdraw(self, job: Job) -> None:
        """Nobody waits for it any more: it leaves the queue, and if it was sent its answer is thrown away."""
        if not job.future.done():
            job.future.cancel()
        if not job.sent_to:
            self._backlog.remove(job)

    def _kind_of(self, job: Job) -> object:
        """What jobs have in common that may share a run: all but the extent of the first axis."""
        hello = self.hello
        if hello is None or not hello.batches or job.sequence is not None or any(not t.shape or t.shape[0] < 1 for t in job.inputs):
            return None
        return tuple((t.name, t.datatype, t.shape[1:]) for t in job.inputs), tuple(job.wanted)

    def _chosen(self, rows: int, pin: str = "") -> _Replica | None:
        """The replica that is expected to be done first, of those that have a place."""
        connected = self._connected
        if not pin and len(connected) == 1:
            return connected[0] if len(connected[0].sent) < connected[0].depth else None
        now = time.perf_counter()
        able = [r for r in connected if r.spec.name == pin] if pin else [r for r in connected if not r.is_overdue(now)] or connected
        index = balance.choose([replica.view() for replica in able], rows, typical=self.curve, now_s=now)
        return None if index is None else able[index]

    def _pump(self) -> None:
        """Send what can be sent."""
        max_rows, max_wait_ms = self._batching
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        backlog, index = self._backlog, 0
        while index < len(backlog):
            first = backlog[index]
            if first.future.done():
                backlog.remove(first)
                continue
            replica = self._chosen(first.place.rows, first.pin)
            if replica is None:
                if first.pin:
                    index += 1  # others need not wait for the replica that this one waits for
                    continue
                return
            now = time.perf_counter()
            if (first.place.until_s - now) * 1000 < self.curve.mean_ms(first.place.rows):
                backlog.remove(first)
                first.fail(TooLate("the queue here took longer than expected"))
                continue
            jobs = [first]
            if max_rows > 1 and first.kind is not None:
                jobs = backlog.beside(index)[:max_rows]
                step = batching.next_batch(
                    [job.place for job in jobs], max_rows=max_rows, max_wait_ms=max_wait_ms, curve=self.curve,
                    arrivals_per_s=self._arrivals_per_s, now_s=now,
                )  # fmt: skip
                if isinstance(step, batching.WaitUntil):
                    self._timer = asyncio.get_running_loop().call_later(max(0.0, step.at_s - now), self._pump)
                    return
                jobs = jobs[: step.count]
            for job in jobs:
                backlog.remove(job)
            self._send(replica, jobs)

    # -- sequences

    def holders(self, step: oip.SequenceStep) -> list[str]:
        """The replicas to be asked one after the other for a step of a sequence; "" stands for any. Raises Interrupted."""
        if step.start:
            held = Counter(self._pins.values())
            fewest = min(self._connected, key=lambda replica: (held[replica.spec.name], replica.rows), default=None)
            return ["" if fewest is None else fewest.spec.name]
        pinned = self._pins.get(step.id)
        if pinned == "":
            raise Interrupted(f"sequence {step.id!r} was interrupted before; start it anew")
        if pinned is not None:
            return [pinned]
        names = [replica.spec.name for replica in self._connected]
        if not names:
            raise Interrupted(f"sequence {step.id!r} was interrupted: no replica is ready here; start it anew")
        return names

    def _pin(self, step: oip.SequenceStep, name: str) -> None:
        self._pins.pop(step.id, None)
        if not step.end:
            self._pins[step.id] = name
            if len(self._pins) > MOST_SEQUENCES:
                self._pins.popitem(last=False)

    def interrupt(self, step: oip.SequenceStep, job: Job | None = None) -> None:
        """Its state is gone, or not what the caller believes it to be: until it is started anew it is at an end.

        What ``job`` left, or will have left, is dropped by its worker too: another process may be asked for the next step.
        """
        if job is not None:
            for replica in self._connected:
                if replica.spec.name == job.sent_to and replica.connection is not None:
                    replica.connection.forget(job.call)
        self._pin(msgspec.structs.replace(step, end=False), "")

    # -- calls

    def _send(self, replica: _Replica, jobs: list[Job]) -> None:
        connection = replica.connection
        assert connection is not None  # noqa: S101 - for the type checker
        sent = Batch(jobs, sum(job.place.rows for job in jobs), time.perf_counter())
        body: list[oip.Bytes] = []
        calls = [self._call_of(job, replica, connection, sent, body) for job in jobs]
        number = next(self._batches)

        def on_answers(answers: list[ipc.Answer], inline: memoryview) -> None:
            self._over(replica, number, sent)
            self._measured(replica, sent, answers)
            try:
                deliver(replica.spec.name, sent, answers, inline, connection.arena.view if connection.arena is not None else None)
            except codec.Malformed as exc:
                for job in jobs:
                    job.fail(ReplicaLost(f"{replica.spec.name}: the worker speaks nonsense: {exc}"))
                connection.close()
            self._freed(replica)

        def on_lost(lost: ReplicaLost) -> None:
            self._over(replica, number, sent)
            for job, room in zip(jobs, sent.rooms, strict=True):
                if room is not None:
                    room.release()
                job.fail(ReplicaLost(f"{replica.spec.name}: {lost}"))

        replica.sent[number] = sent
        replica.rows += sent.rows
        try:
            connection.send(calls, body, on_answers, on_lost)
        except ReplicaLost as lost:
            on_lost(lost)

    def _call_of(self, job: Job, replica: _Replica, connection: WorkerConnection, sent: Batch, body: list[oip.Bytes]) -> ipc.Call:
        job.sent_to = replica.spec.name
        if job.sequence is not None:
            self._pin(job.sequence, replica.spec.name)
        heads = [placed(tensor, job, connection.arena, sent, body) for tensor in job.inputs]
        room, wanted_bytes = None, replica.output_bytes * job.place.rows
        if connection.arena is not None and wanted_bytes >= SHARED_FROM_BYTES:
            room = connection.arena.take(wanted_bytes + ROOM_TO_SPARE_BYTES)
        sent.rooms.append(room)
        job.call = next(self._calls)
        within_us = max(1, int((job.place.until_s - sent.at_s) * 1e6)) if job.sequence is not None else 0
        place = ipc.Room(room.at, len(room.view)) if room is not None else None
        return ipc.Call(job.call, heads, job.wanted, place, job.sequence, within_us)

    @staticmethod
    def _over(replica: _Replica, number: int, sent: Batch) -> None:
        replica.sent.pop(number, None)
        replica.rows -= sent.rows
        for region in sent.held:
            region.release()

    def _measured(self, replica: _Replica, sent: Batch, answers: list[ipc.Answer]) -> None:
        """Learn from a batch that was answered: from when the replica turned to it."""
        now = time.perf_counter()
        sent.service_ms = (now - max(sent.at_s, replica.answered_at)) * 1000
        replica.answered_at = now
        replica.answered += len(answers)
        replica.curve = estimate.updated_curve(replica.curve, sent.rows, sent.service_ms, now_s=now)
        self.curve = estimate.updated_curve(self.curve, sent.rows, sent.service_ms, now_s=now)
        replica.depth = balance.depth_of(replica.curve)
        for job, answer in zip(sent.jobs, answers, strict=True):
            size = sum(head.size_bytes for head in answer.outputs) // job.place.rows
            replica.output_bytes = min(max(replica.output_bytes, size), MOST_ROOM_BYTES)
        self.on_run(len(answers), sent.service_ms)

    def _freed(self, replica: _Replica) -> None:
        """A place may be free now."""
        if replica.is_retired:
            if not replica.sent and replica.connection is not None:
                replica.connection.close()
        elif len(self._backlog):
            self._pump()

    def sweep(self) -> None:
        """Once in a while: make anew the connection of a worker that answers nobody."""
        now = time.perf_counter()
        for replica in [*self._connected]:
            if replica.sent and now - next(iter(replica.sent.values())).until_s > STUCK_AFTER_S and replica.connection is not None:
                logger.warning("replica.stuck", replica=replica.spec.name)
                replica.connection.close()
