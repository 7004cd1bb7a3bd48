"""Another version that is asked what was answered already: nobody waits for it, and what it says is only compared."""

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

from edge_agent.core import agreement
from edge_agent.core.queueing import LOWEST, Place
from edge_agent.gateway.calls import Job, Outcome
from edge_agent.gateway.connection import ReplicaLost
from edge_agent.gateway.dispatch import Pool, TooLate
from edge_agent.gateway.samples import Samples
from skerry.wire import oip
from skerry.wire.box import Route

MOST_AT_ONCE = 2
"""What is asked besides must not be what keeps a box busy."""
MOST_BYTES = 32 * 2**20
"""Inputs and outputs together are copied, since their memory is used again; larger ones are passed over."""
WITHIN_S = 30.0


class Account(Protocol):
    """Where it is counted."""

    def asked_besides(self, *, differs: bool) -> None:
        """A shadow answered."""


class ShadowPool:
    """The shadows of one deployment on this box."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self._pool: Pool | None = None
        self._route: Route | None = None
        self._credit = 0.0
        self._asking: set[asyncio.Task[None]] = set()

    @property
    def is_ready(self) -> bool:
        """Whether there is one to ask."""
        return self._pool is not None and self._pool.slots > 0

    def update(self, route: Route | None) -> None:
        """Keep connections to exactly this route's shadows."""
        self._route = route if route is not None and route.shadow is not None and route.shadows else None
        if self._route is None and self._pool is not None:
            self._pool.update(None)
            self._pool = None
        if self._route is not None:
            if self._pool is None:
                self._pool = Pool(queue_limit=MOST_AT_ONCE, arena_bytes=0, on_run=lambda *_: None)
            self._pool.update(_of_shadows(self._route))

    def sweep(self) -> None:
        """Once in a while: what no request would do."""
        if self._pool is not None:
            self._pool.sweep()

    def wants(self, request: oip.InferRequest, *, is_own: bool) -> bool:
        """Whether this request is one of those that are asked besides: answered on this box, of no sequence, and of the share."""
        if self._route is None or self._pool is None or not is_own or request.sequence is not None:
            return False
        shadow = self._route.shadow
        self._credit = min(1.0, self._credit + (shadow.share if shadow is not None else 0.0))
        if self._credit < 1.0 or len(self._asking) >= MOST_AT_ONCE or not self.is_ready:
            return False
        return sum(len(tensor.data) for tensor in request.inputs) <= MOST_BYTES

    def ask(self, request: oip.InferRequest, answered: Sequence[oip.Tensor], account: Account) -> None:
        """Ask, and compare with what was ``answered``. Both are copied now; the rest is done when the caller has its answer."""
        self._credit = 0.0
        if sum(len(tensor.data) for tensor in answered) > MOST_BYTES:
            return
        inputs, ours = _copied(request.inputs), _copied(answered)
        wanted = [output.name for output in request.outputs]
        rows = inputs[0].shape[0] if inputs and inputs[0].shape else 1
        task = asyncio.create_task(self._compare(inputs, wanted, max(1, rows), ours, account), name="gateway.shadow")
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _compare(self, inputs: list[oip.Tensor], wanted: list[str], rows: int, ours: list[oip.Tensor], account: Account) -> None:
        pool, route = self._pool, self._route
        if pool is None or route is None or route.shadow is None:
            return
        now = time.perf_counter()
        job = Job(inputs, wanted, Place(LOWEST, now, now + WITHIN_S, rows), memory=[], sequence=None)
        pool.submit(job)
        try:
            async with asyncio.timeout(WITHIN_S):
                outcome = await job.future
        except (ReplicaLost, TooLate, TimeoutError):
            return  # it says nothing about what it would have answered
        finally:
            pool.withdraw(job)
        reason = outcome.answer.error or agreement.difference(ours, outcome.outputs, route.shadow.agreement)
        if outcome.room is not None:
            outcome.room.release()
        account.asked_besides(differs=bool(reason))
        self._sample(route.deployment, outcome, reason)

    def _sample(self, deployment: str, outcome: Outcome, reason: str) -> None:
        now, kind = time.perf_counter(), "shadow differs"
        if reason and self._samples.wants(deployment, kind, now_s=now):
            self._samples.take(deployment, kind, f"the shadow {outcome.replica} answers otherwise: {reason}"[:500], now_s=now)


def _of_shadows(route: Route) -> Route:
    """As a pool takes it: one request at a time."""
    return Route(route.deployment, route.model, route.version, route.deadline_ms, replicas=route.shadows)


def _copied(tensors: Sequence[oip.Tensor]) -> list[oip.Tensor]:
    return [oip.Tensor(t.name, t.datatype, t.shape, memoryview(bytes(t.data))) for t in tensors]
