"""One inference request from arrival to answer: decide, run here or pass on, and never answer late.

arrive -> core.routing.decide -> Here: Pool.run -> answer
                              -> Forward: Upstreams.forward -> answer
                              -> Refuse: 503 with Retry-After
A replica or an upstream that fails in the middle sends the request back to ``decide`` with the time that is left.
"""

import asyncio
import time

import msgspec

from edge_agent.core.routing import Decision, Forward, Here, Refuse, decide
from edge_agent.gateway.connection import ReplicaLost
from edge_agent.gateway.dispatch import Outcome, Pool, TooLate
from edge_agent.gateway.ledger import Account, Ledger
from edge_agent.gateway.upstream import Reply, UpstreamFailed, Upstreams
from skerry.wire import oip
from skerry.wire.box import Route, RouteTable
from skerry.wire.messages import Tier

ANSWER_MARGIN_MS = 2.0
"""Kept back from the deadline for the way back to the caller."""
MOST_TRIES = 8


class Unknown(Exception):
    """No deployment answers to that name and version; the text lists those that do."""


class Refused(Exception):
    """Nobody can answer in time."""

    def __init__(self, reason: str, retry_after_s: int) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class Rejected(Exception):
    """The model does not take these inputs; the text names them."""


class Failed(Exception):
    """The replica failed on this request."""


class Arrival(msgspec.Struct, frozen=True):
    """A request as it came: parsed, and as bytes for passing on. ``started`` is on time.perf_counter, in seconds."""

    request: oip.InferRequest
    headers: dict[str, str]
    body: bytes
    started: float
    deadline_ms: float
    forwarded: bool


class Answer(msgspec.Struct, frozen=True):
    """Either outputs computed here (``outcome``) or a reply to hand back as it is (``reply``)."""

    served_by: str
    node: str
    reason: str
    route: Route
    outcome: Outcome | None = None
    reply: Reply | None = None


class _Served(msgspec.Struct):
    route: Route
    pool: Pool
    account: Account


class Service:
    """Everything that this gateway serves, as the route table says."""

    def __init__(self, *, node: str, tier: Tier, upstreams: Upstreams, ledger: Ledger, queue_limit: int) -> None:
        self._node = node
        self._tier = tier
        self._upstreams = upstreams
        self._ledger = ledger
        self._queue_limit = queue_limit
        self._served: dict[str, _Served] = {}
        self.generation = 0

    def update(self, table: RouteTable) -> None:
        """Serve what ``table`` says from now on."""
        self.generation = table.generation
        wanted = {route.deployment: route for route in table.routes}
        for name in [name for name in self._served if name not in wanted]:
            self._served.pop(name).pool.update([])
        for name, route in wanted.items():
            account = self._ledger.account(name, route.model, route.version)
            held = self._served.get(name)
            if held is None:
                held = self._served[name] = _Served(route, Pool(self._queue_limit), account)
            held.route = route
            held.pool.update(route.replicas)
            account.slots = sum(replica.concurrency for replica in route.replicas)

    def routes(self) -> list[tuple[Route, Pool, Account]]:
        """Everything served, in order of name."""
        return [(s.route, s.pool, s.account) for _, s in sorted(self._served.items())]

    def find(self, name: str, version: str | None) -> tuple[Route, Pool, Account]:
        """The deployment called ``name``, else the one that serves the model of that name, the highest version first.

        Raises Unknown.
        """
        matching = [s for s in self._served.values() if s.route.deployment == name] or [
            s for s in self._served.values() if s.route.model == name
        ]
        if version is not None:
            matching = [s for s in matching if str(s.route.version) == version]
        if not matching:
            known = ", ".join(f"{route.model}:{route.version}" for route, _, _ in self.routes()) or "none"
            raise Unknown(
                f"model {name[:80]!r}{f' version {version[:20]!r}' if version is not None else ''} is not served here; served: {known}"
            )
        best = min(matching, key=lambda s: (-s.route.version, s.route.deployment))
        return best.route, best.pool, best.account

    async def infer(self, arrival: Arrival, route: Route, pool: Pool, account: Account) -> Answer:
        """Answer in time, from what ``find`` gave. Raises Refused, Rejected or Failed."""
        try:
            answer = await self._answer(arrival, route, pool)
        except Refused:
            account.refused += 1
            raise
        except Failed:
            account.failed += 1
            raise
        total_ms = (time.perf_counter() - arrival.started) * 1000
        account.served(answer.served_by, total_ms)
        if total_ms > arrival.deadline_ms:
            account.late += 1
        if answer.outcome is not None:
            account.queue_ms += answer.outcome.queue_ms
            account.compute_ms += answer.outcome.answer.compute_us / 1000
            account.computed += 1
        account.waiting = pool.view.waiting
        return answer

    async def _answer(self, arrival: Arrival, route: Route, pool: Pool) -> Answer:
        failure = ""
        for _ in range(MOST_TRIES):
            remaining_ms = _remaining_ms(arrival)
            decision = self._decide(arrival, route, pool, remaining_ms)
            try:
                match decision:
                    case Here(_, reason):
                        return await self._run_here(arrival, route, pool, f"{failure}{reason}")
                    case Forward(node, _, reason):
                        return await self._forward(arrival, route, node, f"{failure}{reason}")
                    case Refuse(reason, retry_after_s):
                        if pool.view.slots == 0 and await self._replica_comes_back(route, pool, remaining_ms):
                            continue
                        raise Refused(f"{failure}{reason}", retry_after_s)
            except ReplicaLost as exc:
                failure = f"{exc}; "
            except TooLate:
                failure = "the queue here took longer than expected; "
            except UpstreamFailed as exc:
                failure = f"{exc}; "
        raise Refused(f"{failure}{MOST_TRIES} tries failed", 1)

    def _decide(self, arrival: Arrival, route: Route, pool: Pool, remaining_ms: float) -> Decision:
        return decide(
            split=route.split,
            remaining_ms=remaining_ms,
            local=pool.view,
            upstreams=self._upstreams.views(route.upstreams, route.deployment),
            forwarded=arrival.forwarded,
            now_s=time.monotonic(),
        )

    @staticmethod
    async def _replica_comes_back(route: Route, pool: Pool, remaining_ms: float) -> bool:
        """Whether a replica of this box is up again in time: one that was killed is restarted within a second."""
        if not route.replicas or remaining_ms <= 0:
            return False
        try:
            async with asyncio.timeout(remaining_ms / 1000):
                await pool.available.wait()
        except TimeoutError:
            return False
        return True

    async def _run_here(self, arrival: Arrival, route: Route, pool: Pool, reason: str) -> Answer:
        wanted = [output.name for output in arrival.request.outputs]
        try:
            async with asyncio.timeout(_remaining_ms(arrival) / 1000):
                until = arrival.started + (arrival.deadline_ms - ANSWER_MARGIN_MS) / 1000
                outcome = await pool.run(arrival.request.inputs, wanted, until=until)
        except TimeoutError as exc:
            raise Refused(f"not done within {arrival.deadline_ms:.0f} ms", 1) from exc
        if outcome.answer.error:
            raise (Rejected if outcome.answer.refused else Failed)(outcome.answer.error)
        served_by = "cloud" if self._tier == "cloud" else "peer" if arrival.forwarded else "edge"
        return Answer(served_by, self._node, reason, route, outcome=outcome)

    async def _forward(self, arrival: Arrival, route: Route, node: str, reason: str) -> Answer:
        upstream = next(u for u in route.upstreams if u.node == node)
        reply = await self._upstreams.forward(
            upstream,
            route.deployment,
            path=f"/v2/models/{route.deployment}/versions/{route.version}/infer",
            headers=arrival.headers,
            body=arrival.body,
            remaining_ms=_remaining_ms(arrival),
        )
        return Answer("cloud" if upstream.tier == "cloud" else "peer", node, reason, route, reply=reply)


def _remaining_ms(arrival: Arrival) -> float:
    return arrival.deadline_ms - (time.perf_counter() - arrival.started) * 1000 - ANSWER_MARGIN_MS
