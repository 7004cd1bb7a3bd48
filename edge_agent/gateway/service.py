"""One inference request from arrival to answer: decide, run here or pass on, try again, and never answer late.

arrive -> core.routing.decide -> Here: Pool.submit -> answer
                              -> Forward: Upstreams.forward -> answer
                              -> Refuse: 503 with Retry-After
A try that fails, or that is not over when it should be, sends the request back to ``decide`` with the time that is left; the first
answer wins and the others are given up. What must not be done twice is tried once.
"""

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

import msgspec

from edge_agent.core import replay, routing
from edge_agent.core.queueing import Place
from edge_agent.core.replay import Case
from edge_agent.core.routing import Decision, Forward, Here, LocalView, Refuse, UpstreamView
from edge_agent.gateway.arena import Region
from edge_agent.gateway.budget import NO_LIMIT, Budgets
from edge_agent.gateway.calls import Job, Outcome
from edge_agent.gateway.connection import ReplicaLost
from edge_agent.gateway.dispatch import Interrupted, Pool, TooLate
from edge_agent.gateway.ledger import Account, Ledger, ServedBy
from edge_agent.gateway.samples import Samples
from edge_agent.gateway.shadow import ShadowPool
from edge_agent.gateway.upstream import Reply, UpstreamFailed, UpstreamRefused, Upstreams
from skerry.wire import oip
from skerry.wire.box import Route, RouteTable
from skerry.wire.messages import Tier
from skerry.wire.slowest import Ended, SlowRequest

ANSWER_MARGIN_MS = 2.0
"""Kept back from the deadline for the way back to the caller."""
MOST_TRIES = 8
MOST_WORDS = 600
OVERDUE_MS, OVERDUE_TIMES = 10.0, 4.0
"""A call on this box that takes this long, and so many times as long as was carefully expected, is tried elsewhere as well. Where nothing
was measured yet, one that has taken half of its time."""
LAST_RESORT_MS = 1000.0
"""A replica that is overdue by more is taken for frozen even where no other answer is to be had."""


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
    """A request as it came. ``started`` is on time.perf_counter, in seconds; ``memory`` is where its tensors lie, if it was reserved."""

    request: oip.InferRequest
    started: float
    deadline_ms: float
    forwarded: bool = False
    memory: object = None


class Answer(msgspec.Struct, frozen=True):
    """The outputs, who computed them and why there. ``timing`` is text for Server-Timing; ``numbers`` are the estimates, in ms.

    The outputs may lie in memory that is used again: ``release`` says that they were written.
    """

    served_by: ServedBy
    node: str
    reason: str
    route: Route
    outputs: list[oip.Tensor]
    timing: str
    numbers: dict[str, float | str]
    room: Region | None = None

    def release(self) -> None:
        """The outputs are needed no longer. Once."""
        if self.room is not None:
            self.room.release()


class Served:
    """A deployment as this gateway serves it; ``shadow`` is asked besides, where there is one."""

    def __init__(self, route: Route, pool: Pool, account: Account, shadow: ShadowPool) -> None:
        self.route = route
        self.pool = pool
        self.account = account
        self.shadow = shadow


class _Request:
    """A request on its way through the tries."""

    __slots__ = ("arrival", "case", "failure", "is_noted", "may_leave", "place", "rows", "served", "size_bytes", "tried_nodes", "until_s")

    def __init__(self, arrival: Arrival, served: Served) -> None:
        request = arrival.request
        self.arrival = arrival
        self.served = served
        self.until_s = arrival.started + (arrival.deadline_ms - ANSWER_MARGIN_MS) / 1000
        self.rows = request.inputs[0].shape[0] if request.inputs and request.inputs[0].shape else 1
        self.place = Place(priority=request.priority, arrived_s=time.perf_counter(), until_s=self.until_s, rows=max(1, self.rows))
        self.size_bytes = sum(len(tensor.data) for tensor in request.inputs)
        self.may_leave = request.sequence is None
        self.case: Case | None = None
        """What its last decision was made from."""
        self.is_noted = False
        self.failure = ""
        """What went wrong before, for the reason."""
        self.tried_nodes: set[str] = set()

    @property
    def remaining_ms(self) -> float:
        return (self.until_s - time.perf_counter()) * 1000


class _Try:
    """One way in which a request is being answered."""

    __slots__ = ("decision", "future", "job")

    def __init__(self, decision: Here | Forward, future: "asyncio.Future[Any]", job: Job | None) -> None:
        self.decision = decision
        self.future = future
        self.job = job


class Service:
    """Everything that this gateway serves, as the route table says."""

    def __init__(
        self, *, node: str, tier: Tier, upstreams: Upstreams, ledger: Ledger, budgets: Budgets, samples: Samples, queue_limit: int,
        arena_bytes: int, look: Callable[[], None],
    ) -> None:  # fmt: skip
        self._node = node
        self._tier: Tier = tier
        self._upstreams = upstreams
        self._ledger = ledger
        self._budgets = budgets
        self._samples = samples
        self._queue_limit = queue_limit
        self._arena_bytes = arena_bytes
        self._look = look
        self._served: dict[str, Served] = {}
        self._found: dict[tuple[str, str | None], Served] = {}
        self.generation = 0

    # -- what is served

    def update(self, table: RouteTable) -> None:
        """Serve what ``table`` says from now on."""
        self.generation = table.generation
        self._found.clear()
        wanted = {route.deployment: route for route in table.routes}
        for name in [name for name in self._served if name not in wanted]:
            gone = self._served.pop(name)
            gone.pool.update(None)
            gone.shadow.update(None)
        for name, route in wanted.items():
            account = self._ledger.account(name, route.model, route.version)
            held = self._served.get(name)
            if held is None:
                pool = Pool(queue_limit=self._queue_limit, arena_bytes=self._arena_bytes, on_run=account.ran, on_shed=account.made_way)
                held = self._served[name] = Served(route, pool, account, ShadowPool(self._samples))
            held.route, held.account = route, account
            held.pool.on_run, held.pool.on_shed = account.ran, account.made_way
            held.pool.update(route)
            held.shadow.update(route)
        self._samples.keep(set(wanted))
        self._budgets.update({name: route.cloud_budget for name, route in wanted.items()})
        self._upstreams.keep({(upstream.node, name) for name, route in wanted.items() for upstream in route.upstreams})

    def routes(self) -> list[Served]:
        """Everything served, in order of name."""
        return [served for _, served in sorted(self._served.items())]

    def find(self, name: str, version: str | None) -> Served:
        """The deployment called ``name``, else the one that serves the model of that name, the highest version first.

        Raises Unknown.
        """
        found = self._found.get((name, version))
        if found is None:
            found = self._find(name, version)
            if found is None:
                self._look()  # what the warden has just put there may not have been seen yet
                found = self._find(name, version)
            if found is None:
                known = ", ".join(f"{s.route.model}:{s.route.version}" for s in self.routes()) or "none"
                asked = f"model {name[:80]!r}{f' version {version[:20]!r}' if version is not None else ''}"
                raise Unknown(f"{asked} is not served here; served: {known[:1000]}")
            self._found[name, version] = found
        return found

    def _find(self, name: str, version: str | None) -> Served | None:
        matching = [s for s in self._served.values() if s.route.deployment == name]
        matching = matching or [s for s in self._served.values() if s.route.model == name]
        if version is not None:
            matching = [s for s in matching if str(s.route.version) == version]
        return min(matching, key=lambda s: (-s.route.version, s.route.deployment), default=None)

    def sweep(self) -> None:
        """Once in a while: what no request would do."""
        for served in self._served.values():
            served.pool.sweep()
            served.shadow.sweep()
            served.account.waiting = served.pool.waiting
            served.account.slots = served.pool.slots
        self._budgets.top_up()

    # -- one request

    async def infer(self, arrival: Arrival, served: Served) -> Answer:
        """Answer in time, from what ``find`` gave. Raises Refused, Rejected, Failed or Interrupted."""
        account = served.account
        try:
            request = _Request(arrival, served)
            answer = await (self._in_sequence(request) if arrival.request.sequence is not None else self._answered(request))
        except Refused as exc:
            account.refused(_ms_since(arrival.started))
            self._note_if_slow(arrival, served, "refused", "", str(exc))
            raise
        except (Failed, Rejected, Interrupted) as exc:
            account.failed("BACKEND" if isinstance(exc, Failed) else "OTHER", _ms_since(arrival.started))
            self._note_if_slow(arrival, served, "failed", "", str(exc))
            raise
        except asyncio.CancelledError:
            account.cancelled(_ms_since(arrival.started))
            self._note_if_slow(arrival, served, "cancelled", "", "nobody waited for the answer any more")
            raise
        self._note_if_slow(arrival, served, answer.served_by, answer.node, answer.reason, answer.timing)
        if served.shadow.wants(arrival.request, is_own=answer.node == self._node):
            served.shadow.ask(arrival.request, answer.outputs, account)
        return answer

    def _note_if_slow(self, arrival: Arrival, served: Served, who: Ended, node: str, reason: str, timing: str = "") -> None:
        """Put it by if it is among the slowest that callers of this box waited for."""
        took_ms, at_ms, deployment = _ms_since(arrival.started), time.time_ns() // 1_000_000, served.route.deployment
        if not arrival.forwarded and self._samples.slowest.wants(deployment, took_ms, at_ms=at_ms):
            self._samples.slowest.take(deployment, SlowRequest(at_ms, took_ms, arrival.deadline_ms, who, node, reason, timing))

    async def _answered(self, request: _Request) -> Answer:
        """The first answer of as many tries as it takes."""
        tries: list[_Try] = []
        try:
            for _ in range(MOST_TRIES):
                decision = self._decide(request, tries)
                if not isinstance(decision, Refuse):
                    self._note(request)
                    tries.append(self._begin(request, decision, is_second=bool(tries)))
                elif not tries:
                    if await self._comes_back(request):
                        continue
                    self._note(request)
                    self._sample_refusal(request, decision)
                    raise Refused(f"{request.failure}{decision.reason}", decision.retry_after_s)
                wake_ms = request.remaining_ms
                if not isinstance(decision, Refuse) and request.arrival.request.idempotent:
                    wake_ms = min(wake_ms, _overdue_in_ms(decision))
                answer = await self._first(request, tries, wake_ms)
                if answer is not None:
                    return answer
                if request.remaining_ms <= 0:
                    raise Refused(f"{request.failure}not done within {request.arrival.deadline_ms:.0f} ms", 1)
            raise Refused(f"{request.failure}{MOST_TRIES} tries were in vain", 1)
        finally:
            for one in tries:
                self._give_up(request, one)

    def _sample_refusal(self, request: _Request, decision: Refuse) -> None:
        now, deployment = time.perf_counter(), request.served.route.deployment
        if self._samples.wants(deployment, "refused", now_s=now):
            self._samples.take(deployment, "refused", f"{request.failure}{routing.in_words(decision)}", now_s=now)

    def _decide(self, request: _Request, tries: list[_Try]) -> Decision:
        served, arrival = request.served, request.arrival
        jobs = [one.job for one in tries if one.job is not None]
        case = self._case(request, served.pool.view(request.place, jobs))
        decision = replay.decided(case, forwarded=arrival.forwarded)
        if isinstance(decision, Refuse) and not case.local.slots and not tries and served.pool.slots:
            # All are overdue, and there is nobody else: what was held up for a moment, by a neighbour or the kernel, is worth waiting for.
            local = served.pool.view(request.place, jobs, overdue_by_ms=LAST_RESORT_MS)
            case = msgspec.structs.replace(case, local=local, remaining_ms=request.remaining_ms)
            decision = replay.decided(case, forwarded=arrival.forwarded)
        request.case = case
        return decision

    def _note(self, request: _Request) -> None:
        """Keep what it was decided by at first, once it is settled; what was passed on to this box was decided elsewhere."""
        if request.case is not None and not request.is_noted and not request.arrival.forwarded:
            request.is_noted = True
            self._samples.cases.note(request.served.route.deployment, request.case)

    def _case(self, request: _Request, local: LocalView) -> Case:
        """What a decision is made from now."""
        served, now = request.served, time.perf_counter()
        route = served.route
        views: list[UpstreamView] = []
        if route.upstreams and request.may_leave and not request.arrival.forwarded:
            has_budget = self._budgets.has(route.deployment, request.size_bytes)
            views = self._upstreams.views(route.upstreams, route.deployment, has_budget=has_budget, now_s=now)
            if request.tried_nodes:
                views = [view for view in views if view.node not in request.tried_nodes]
            if not request.arrival.request.idempotent and (served.pool.slots or not all(view.is_trial for view in views)):
                views = [view for view in views if not view.is_trial]  # it has but one way, and somebody else may be better
        return Case(
            at_ms=time.time_ns() // 1_000_000,
            deadline_ms=request.arrival.deadline_ms,
            split=route.split,
            remaining_ms=request.remaining_ms,
            local=local,
            upstreams=tuple(views),
            size_bytes=request.size_bytes,
            may_leave=request.may_leave,
            now_s=now,
        )

    async def _comes_back(self, request: _Request) -> bool:
        """Whether a replica of this box is up again in time: one that was killed is restarted within a second."""
        self._look()
        pool, remaining_ms = request.served.pool, request.remaining_ms
        if pool.slots or not request.served.route.replicas or remaining_ms <= 0:
            return False
        try:
            async with asyncio.timeout(remaining_ms / 1000):
                await pool.available.wait()
        except TimeoutError:
            return False
        return True

    def _begin(self, request: _Request, decision: Here | Forward, *, is_second: bool) -> _Try:
        account = request.served.account
        if is_second:
            account.hedged += 1
        elif request.failure:
            account.retried += 1
        if isinstance(decision, Here):
            job = self._job(request)
            request.served.pool.submit(job)
            return _Try(decision, job.future, job)
        request.tried_nodes.add(decision.node)
        if decision.is_kept:
            request.served.pool.kept += 1
        return _Try(decision, asyncio.create_task(self._forward(request, decision), name="gateway.forward"), None)

    @staticmethod
    def _job(request: _Request) -> Job:
        asked, memory = request.arrival.request, request.arrival.memory
        wanted = [output.name for output in asked.outputs]
        held = [memory] if isinstance(memory, Region) else []
        return Job(asked.inputs, wanted, request.place, memory=held, sequence=asked.sequence)

    async def _first(self, request: _Request, tries: list[_Try], wake_ms: float) -> Answer | None:
        """The first answer; None when a try has failed, or when ``wake_ms`` are over. Takes what is over out of ``tries``."""
        await _any_done([one.future for one in tries], max(0.0, wake_ms) / 1000)
        for one in [one for one in tries if one.future.done()]:
            tries.remove(one)
            self._unkept(request, one)
            try:
                result = one.future.result()
            except (ReplicaLost, TooLate, UpstreamFailed) as exc:
                request.failure = f"{request.failure}{exc}; "[:MOST_WORDS]
                was_begun = one.job is None or one.job.sent_to != ""
                if was_begun and not request.arrival.request.idempotent:
                    raise Failed(f"{exc}: what became of it is not known, and it must not be tried again") from exc
            except UpstreamRefused as exc:
                raise Rejected(str(exc)) from exc
            else:
                return self._answer_of(request, one.decision, result)
        return None

    def _answer_of(self, request: _Request, decision: Here | Forward, result: Outcome | Reply) -> Answer:
        """The answer, unless it failed or comes too late: then it is none, and that is said. Raises Refused, Rejected and Failed."""
        account, arrival, route = request.served.account, request.arrival, request.served.route
        took_ms = _ms_since(arrival.started)
        if took_ms > arrival.deadline_ms:
            account.late += 1
            _given_back(result)
            raise Refused(f"{request.failure}done only after {took_ms:.0f} ms of {arrival.deadline_ms:.0f} ms", 1)
        reason, told = f"{request.failure}{decision.reason}", _told(decision)
        if isinstance(result, Reply):
            served_by: ServedBy = "cloud" if result.tier == "cloud" else "peer"
            timing = ", ".join(filter(None, [result.timing.replace("total;", "remote;"), f"forward;dur={result.took_ms:.3f}"]))
            answer = Answer(served_by, result.node, reason, route, result.outputs, timing, told)
            queue_ms = compute_ms = 0.0
        else:
            if result.answer.error:
                _given_back(result)
                raise (Rejected if result.answer.refused else Failed)(result.answer.error)
            served_by = "cloud" if self._tier == "cloud" else "peer" if arrival.forwarded else "edge"
            queue_ms, compute_ms = result.queue_ms, result.answer.compute_us / 1000
            timing = f"queue;dur={queue_ms:.3f}, compute;dur={compute_ms:.3f}"
            answer = Answer(served_by, self._node, reason, route, result.outputs, timing, told, result.room)
        now = time.perf_counter()
        kind = f"{served_by}, after a failure" if request.failure else served_by
        if self._samples.wants(route.deployment, kind, now_s=now):
            text = f"{request.failure}{routing.in_words(decision)}, done in {took_ms:.1f} ms"
            self._samples.take(route.deployment, kind, text, now_s=now)
        account.served(
            served_by,
            total_ms=took_ms,
            at_ms=time.time_ns() // 1_000_000,
            rows=request.rows if isinstance(result, Outcome) else 0,
            queue_ms=queue_ms,
            compute_ms=compute_ms,
        )
        return answer

    async def _forward(self, request: _Request, decision: Forward) -> Reply:
        """Pass it on, within the budget where it goes to the cloud. Raises UpstreamFailed and UpstreamRefused."""
        route, node = request.served.route, decision.node
        upstream = next(upstream for upstream in route.upstreams if upstream.node == node)
        reserved = self._budgets.reserve(route.deployment, request.size_bytes) if upstream.tier == "cloud" else NO_LIMIT
        if reserved is None:
            raise UpstreamFailed(f"{node}: the cloud budget of this hour is spent")
        reply = await self._upstreams.forward(
            upstream, route, request.arrival.request, remaining_ms=request.remaining_ms, overdue_ms=decision.estimate_ms,
            most_bytes=reserved.size_bytes,
        )  # fmt: skip
        self._budgets.used(reserved, reply.size_bytes)
        return reply

    def _give_up(self, request: _Request, one: _Try) -> None:
        """Nobody wants its answer any more, and what it held is given back."""
        self._unkept(request, one)
        if one.job is not None:
            request.served.pool.withdraw(one.job)
        if not one.future.done():
            one.future.cancel()
        elif not one.future.cancelled() and one.future.exception() is None:
            _given_back(one.future.result())

    @staticmethod
    def _unkept(request: _Request, one: _Try) -> None:
        if isinstance(one.decision, Forward) and one.decision.is_kept:
            request.served.pool.kept -= 1

    # -- sequences

    async def _in_sequence(self, request: _Request) -> Answer:
        """A step of a sequence: where its state lies, once, or an error that says that the sequence is over."""
        pool, step = request.served.pool, request.arrival.request.sequence
        assert step is not None  # noqa: S101 - for the type checker
        decision = self._decide(request, [])
        self._note(request)
        if not isinstance(decision, Here):
            raise Refused(f"a sequence stays on this box: {decision.reason}", 1)
        for name in pool.holders(step):
            job = self._job(request)
            outcome = await self._step(request, step, job, name)
            if outcome.answer.no_sequence:
                continue
            try:
                return self._answer_of(request, decision, outcome)
            except Refused as exc:  # the state has gone on, and the caller knows nothing of it
                pool.interrupt(step, job)
                raise Interrupted(f"sequence {step.id!r} was interrupted: {exc}; start it anew") from exc
        pool.interrupt(step)
        raise Interrupted(f"sequence {step.id!r} was interrupted: no replica here holds its state; start it anew")

    async def _step(self, request: _Request, step: oip.SequenceStep, job: Job, replica: str) -> Outcome:
        pool = request.served.pool
        job.pin = replica
        pool.submit(job)
        try:
            await _any_done([job.future], request.remaining_ms / 1000)
            if job.future.done():
                return job.future.result()
        except TooLate as exc:
            raise Refused(f"{exc}; the sequence is as it was", 1) from exc
        except ReplicaLost as exc:
            pool.interrupt(step)
            raise Interrupted(f"sequence {step.id!r} was interrupted: {exc}, and its state with it; start it anew") from exc
        finally:
            pool.withdraw(job)
        late = f"not done within {request.arrival.deadline_ms:.0f} ms"
        if not job.sent_to:
            raise Refused(f"{late}; the sequence is as it was", 1)
        pool.interrupt(step, job)
        raise Interrupted(f"sequence {step.id!r} was interrupted: a step was {late}, and whether it was done is not known; start it anew")

    # -- what people ask

    def foreseen(self, served: Served, *, deadline_ms: float, size_bytes: int, priority: int) -> Decision:
        """What would become of such a request now."""
        empty = oip.InferRequest("", [], [], priority=priority)
        request = _Request(Arrival(empty, time.perf_counter(), deadline_ms), served)
        request.size_bytes = size_bytes
        return self._decide(request, [])

    def explained(self) -> list[dict[str, Any]]:
        """What this gateway believes of each route."""
        return [
            {"route": served.route, "slots": served.pool.slots, "running": served.pool.running, "waiting": served.pool.waiting}
            | {"service": served.pool.curve}
            for served in self.routes()
        ]


def _told(decision: Here | Forward) -> dict[str, float | str]:
    """The numbers that led to a decision, as an answer's parameters."""
    numbers = decision.numbers
    told: dict[str, float | str] = {"estimate_ms": round(decision.estimate_ms, 2), "remaining_ms": round(numbers.remaining_ms, 1)}
    if numbers.upstreams:
        told["considered"] = routing.in_words(decision)
    return told


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000


def _overdue_in_ms(decision: Here | Forward) -> float:
    """After how long without an answer a second way is tried."""
    if isinstance(decision, Forward):
        return math.inf if decision.hedge_in_ms is None else decision.hedge_in_ms
    if decision.estimate_ms <= 0:
        return decision.numbers.remaining_ms / 2
    return max(OVERDUE_MS, OVERDUE_TIMES * decision.estimate_ms)


async def _any_done(futures: "list[asyncio.Future[Any]]", within_s: float) -> None:
    """Wait until one of them is done, for so long at most."""
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()

    def wake(_: object = None) -> None:
        if not waiter.done():
            waiter.set_result(None)

    timer = loop.call_later(max(0.0, within_s), wake)
    for future in futures:
        future.add_done_callback(wake)
    try:
        await waiter
    finally:
        timer.cancel()
        for future in futures:
            future.remove_done_callback(wake)


def _given_back(result: Outcome | Reply) -> None:
    """Nobody writes these outputs to anybody."""
    if isinstance(result, Outcome) and result.room is not None:
        result.room.release()
