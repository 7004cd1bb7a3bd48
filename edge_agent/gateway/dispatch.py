"""A deployment's replicas on this box: who is free, who waits, what became of each call.

A call holds a slot (one connection to one worker) from the moment it is sent until the worker has answered, whether or not
anybody still waits for the answer: a worker that computes is busy.
"""

import asyncio
import contextlib
import time
from collections import deque
from pathlib import Path

import msgspec

from edge_agent.core import estimate
from edge_agent.core.routing import LocalView
from edge_agent.gateway.connection import ReplicaLost, WorkerConnection
from skerry.runtime import log
from skerry.wire import codec, ipc, oip
from skerry.wire.box import LocalReplica

logger = log.get("gateway.dispatch")

RECONNECT_S = 0.1
STUCK_AFTER_S = 30.0
"""A worker that has not answered so long after its caller's deadline is no longer waited for: its slot is made anew."""


class TooLate(Exception):
    """The queue took longer than was expected."""


class Outcome(msgspec.Struct, frozen=True):
    """A worker's answer and how long its parts took, in milliseconds."""

    answer: ipc.Answer
    outputs: list[oip.Tensor]
    replica: str
    queue_ms: float


class Pool:
    """The connections to every ready replica of one deployment, and the queue before them."""

    def __init__(self, queue_limit: int) -> None:
        self._queue_limit = queue_limit
        self._keepers: dict[LocalReplica, asyncio.Task[None]] = {}
        self._free: deque[tuple[WorkerConnection, str]] = deque()
        self._waiting: deque[asyncio.Future[tuple[WorkerConnection, str]]] = deque()
        self._slots = 0
        self._running = 0
        self.service = estimate.Estimate()
        self.hello: ipc.Hello | None = None
        self.available = asyncio.Event()

    @property
    def view(self) -> LocalView:
        """What core/routing decides by."""
        waiting = sum(1 for future in self._waiting if not future.done()) if self._waiting else 0
        return LocalView(self._slots, self._running, waiting, self._queue_limit, self.service)

    def update(self, replicas: list[LocalReplica]) -> None:
        """Keep connections to exactly these; calls under way on others are finished, not cut."""
        for replica in [r for r in self._keepers if r not in replicas]:
            self._keepers.pop(replica).cancel()
        for replica in replicas:
            if replica not in self._keepers:
                self._keepers[replica] = asyncio.create_task(self._keep_all(replica), name=f"gateway.replica.{replica.name}")

    async def _keep_all(self, replica: LocalReplica) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(replica.concurrency):
                tasks.create_task(self._keep(replica), name=f"gateway.connection.{replica.name}.{number}")

    async def _keep(self, replica: LocalReplica) -> None:
        """One connection, made again whenever it is lost, until the replica leaves the route table."""
        while True:
            try:
                connection, hello = await WorkerConnection.open(Path(replica.socket))
            except ReplicaLost:
                await asyncio.sleep(RECONNECT_S)
                continue
            self.hello = hello
            self._slots += 1
            self.available.set()
            self._release(connection, replica.name)
            try:
                await asyncio.shield(connection.closed)
            except asyncio.CancelledError:
                self._retire(connection)
                raise
            finally:
                self._slots -= 1
                if self._slots == 0:
                    self.available.clear()
            logger.warning("replica.lost", replica=replica.name)

    def _retire(self, connection: WorkerConnection) -> None:
        """Close a connection once the call on it, if any, is answered."""
        for entry in [entry for entry in self._free if entry[0] is connection]:
            self._free.remove(entry)
            connection.close()
        connection.retired = True

    def _release(self, connection: WorkerConnection, replica: str) -> None:
        """Give a free connection to the next in the queue."""
        if connection.retired or connection.closed.done():
            connection.close()
            return
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result((connection, replica))
                return
        self._free.append((connection, replica))

    async def run(self, inputs: list[oip.Tensor], outputs: list[str], *, until: float) -> Outcome:
        """One inference on whichever replica is free first, done by ``until`` (time.perf_counter, seconds).

        Raises ReplicaLost, and TooLate without troubling a replica where the queue took so long that it would be in vain.
        Cancel it when the deadline has passed.
        """
        asked = time.perf_counter()
        must_wait = not self._free
        connection, replica = await self._slot()
        started = time.perf_counter()
        if must_wait and (until - started) * 1000 < self.service.mean_ms:
            self._release(connection, replica)
            raise TooLate
        self._running += 1

        def on_free() -> None:
            self._running -= 1
            self.service = estimate.updated(self.service, (time.perf_counter() - started) * 1000, now_s=time.monotonic())
            self._release(connection, replica)

        try:
            call = connection.call(inputs, outputs, on_free)
        except ReplicaLost as exc:
            self._running -= 1  # it never began
            connection.close()
            raise ReplicaLost(f"{replica}: {exc}") from exc
        try:
            answer, body = await call
        except ReplicaLost as exc:
            raise ReplicaLost(f"{replica}: {exc}") from exc
        except asyncio.CancelledError:
            asyncio.get_running_loop().call_later(STUCK_AFTER_S, connection.give_up, call)
            raise
        try:
            tensors = ipc.tensors_of(answer.outputs, body)
        except codec.Malformed as exc:
            connection.close()
            raise ReplicaLost(f"{replica}: the worker speaks nonsense: {exc}") from exc
        return Outcome(answer, tensors, replica, (started - asked) * 1000)

    async def _slot(self) -> tuple[WorkerConnection, str]:
        while self._free:
            connection, replica = self._free.popleft()
            if not connection.closed.done():
                return connection, replica
        future: asyncio.Future[tuple[WorkerConnection, str]] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._release(*future.result())  # it was given a slot in the very moment it gave up
            raise
        finally:
            with contextlib.suppress(ValueError):
                self._waiting.remove(future)
