"""Who answers a request: this box, a neighbour, the cloud, or nobody in time. Pure; the reasons and numbers travel with the answer.

split.mode is cloud, and a cloud box fits? --yes--> Forward, with the time kept to do it here after all
    | no
fits here? --yes--> Here; or, while others wait here, as the trial of a box that failed before, with the time kept likewise
    | no
fits at an upstream? --yes--> Forward
    | no
idle here, and no recent measurement? --yes--> Here (else a bad estimate would never be mended)
    | no
Refuse at once, never queued to die

What is passed on is tried a second way when it is overdue (``hedge_in_ms``), at another upstream or here. Where it fitted here when it
came, that is early enough for an answer of this box whatever the other one does, and the time is ``kept``: the gateway counts those under
way in ``LocalView.kept``.

A box that failed before is tried again by requests for which that second way is open, if it would be the better one to ask.
"""

import math
from collections.abc import Sequence

import msgspec

from edge_agent.core.estimate import CostCurve, Estimate, Link, believed_ms
from skerry.wire.messages import SplitMode, Tier

PROBE_AFTER_S = 1.0
"""Where nobody else can help, an estimate that is this old is put to the test by one request."""
FIRST_FORWARD_MS = 20.0
"""What a forwarded request costs beyond its computing, as long as none was measured."""
FORGET_S = 5.0
"""A measurement that is older says nothing."""
QUEUE_CAUTION = 1.2
"""Those in the queue before take this much longer than on average: a queue that is full is when a box is busiest."""
MOST_PUSHED_BY = 0.95
"""Where those of higher priority leave less, those of lower one still get in while nobody waits."""
CLOUD_PRICE = 1.1
"""A cloud box must be this much faster than a neighbour: it costs of a budget, and a link that others need."""
HEDGE_LEAST_MS = 10.0
"""No answer from elsewhere is called overdue before: processes wait for processors that long."""
HEDGE_MARGIN_MS = 2.0
"""Kept back for noticing that an answer is overdue, and for the run under way that was begun meanwhile."""


class LocalView(msgspec.Struct, frozen=True):
    """This box's replicas of one deployment, as a request of ``rows`` rows finds them.

    ``slots`` runs go on at once; ``running`` were given to replicas, of ``running_rows`` rows together; ``waiting`` requests are queued, at
    most ``queue_limit``, where one of lower priority ``makes_way`` or not. ``ahead`` of them, of ``ahead_rows`` rows together, go before
    this one; ``kept`` were passed on, but may have to be run here after all. A run takes up to ``max_rows`` rows of several requests; where
    that is 1, each request is a run. ``pushed_by`` is the part of the slots' time, from 0 to 1, that arrivals of higher priority take up:
    they go before this one although they come after it.
    """

    slots: int
    running: int
    waiting: int
    queue_limit: int
    service: CostCurve
    rows: int = 1
    running_rows: int = 0
    ahead: int = 0
    ahead_rows: int = 0
    kept: int = 0
    max_rows: int = 1
    makes_way: bool = False
    pushed_by: float = 0.0


class UpstreamView(msgspec.Struct, frozen=True):
    """Another box's gateway: the ``link`` to it, and what it said its answers took itself (``service``), its queue included.

    ``is_open`` and ``is_trial`` are its circuit breaker's; ``running`` requests are with it from here, at most ``limit``.
    """

    node: str
    tier: Tier
    link: Link = Link()
    service: Estimate = Estimate()
    is_open: bool = False
    is_trial: bool = False
    running: int = 0
    limit: int = 64
    has_budget: bool = True


class Considered(msgspec.Struct, frozen=True):
    """What was known of an upstream; ``why_not`` is empty where it could have had the request."""

    node: str
    estimate_ms: float
    link_ms: float
    remote_ms: float
    why_not: str = ""


class Numbers(msgspec.Struct, frozen=True):
    """What led to a decision. ``here_ms`` is ``queue_ms`` and ``service_ms`` together, infinite where there is no replica."""

    remaining_ms: float
    here_ms: float
    queue_ms: float
    service_ms: float
    upstreams: tuple[Considered, ...] = ()


class Here(msgspec.Struct, frozen=True, tag=True):
    """Answer on this box."""

    estimate_ms: float
    reason: str
    numbers: Numbers


class Forward(msgspec.Struct, frozen=True, tag=True):
    """Pass it on to ``node``, and try another way too if its answer is not here after ``hedge_in_ms``; None: there is no use in that.

    ``is_kept``: then this box still makes it. ``is_trial``: it is the one request that may find out whether the node answers again.
    """

    node: str
    estimate_ms: float
    hedge_in_ms: float | None
    reason: str
    numbers: Numbers
    is_kept: bool = False
    is_trial: bool = False


class Refuse(msgspec.Struct, frozen=True, tag=True):
    """Nobody can answer in time; try again after ``retry_after_s``."""

    reason: str
    retry_after_s: int
    numbers: Numbers


Decision = Here | Forward | Refuse


def queue_and_service_ms(view: LocalView, *, now_s: float) -> tuple[float, float]:
    """How long a request that joins the queue now would wait, and then run, carefully; infinite where there is no replica.

    The runs before it, those under way counted whole, take their turns on the slots; one that finds a slot free does not wait.
    """
    if view.slots == 0:
        return math.inf, math.inf
    curve = view.service
    runs, run_rows, own_rows = _runs_before(view)
    queue_ms = 0.0
    if view.running + runs >= view.slots:
        running_ms = view.running * curve.mean_ms(math.ceil(view.running_rows / view.running) or view.rows) if view.running else 0.0
        before_ms = running_ms + (runs * curve.mean_ms(run_rows) if runs else 0.0)
        queue_ms = (view.running + runs) // view.slots * (before_ms / (view.running + runs)) * QUEUE_CAUTION
        queue_ms /= 1 - min(MOST_PUSHED_BY, max(0.0, view.pushed_by))
    service_ms = believed_ms(curve.mean_ms(own_rows), curve.careful_ms(own_rows), age_s=now_s - curve.at_s)
    return queue_ms, service_ms


def _runs_before(view: LocalView) -> tuple[int, int, int]:
    """The queued runs that go before this request's, the rows of each of them, and those of its own run."""
    ahead, ahead_rows = view.ahead + view.kept, view.ahead_rows + view.kept * view.rows
    if view.max_rows <= 1:
        return ahead, math.ceil(ahead_rows / ahead) if ahead else view.rows, view.rows
    full, rest = divmod(ahead_rows, view.max_rows)
    if rest + view.rows <= view.max_rows:
        return full, view.max_rows, rest + view.rows
    return full + (rest > 0), view.max_rows if full else rest, view.rows


def local_ms(view: LocalView, *, now_s: float) -> float:
    """When a request that joins the queue now would be done, carefully; infinite where there is no replica."""
    return sum(queue_and_service_ms(view, now_s=now_s))


def upstream_ms(upstream: UpstreamView, local: LocalView, *, size_bytes: int, now_s: float) -> tuple[float, float]:
    """What the way to an upstream and back would take, and what it would there, carefully.

    ``size_bytes`` is of the request and its answer. An old or missing measurement counts as a first one would: FIRST_FORWARD_MS for the
    way, twice what the run takes here for the rest.
    """
    link, service = upstream.link, upstream.service
    if link.count == 0 or now_s - link.at_s > FORGET_S:
        link_ms = FIRST_FORWARD_MS
    else:
        link_ms = believed_ms(link.mean_ms(size_bytes), link.careful_ms(size_bytes), age_s=now_s - link.at_s)
    if service.count == 0 or now_s - service.at_s > FORGET_S:
        remote_ms = 2 * local.service.mean_ms(local.rows)
    else:
        remote_ms = believed_ms(service.mean_ms, service.careful_ms, age_s=now_s - service.at_s)
    return link_ms, remote_ms


class _Case(msgspec.Struct, frozen=True):
    """What a decision is made from."""

    split: SplitMode
    local: LocalView
    numbers: Numbers
    stays: str
    """Why it may not be passed on; empty where it may."""
    usable: tuple[tuple[UpstreamView, float], ...]
    """The upstreams that make it, each with its estimate."""
    has_room: bool

    @property
    def fits_here(self) -> bool:
        return self.has_room and self.numbers.here_ms <= self.numbers.remaining_ms

    @property
    def spare_ms(self) -> float:
        """How long this box may wait for another one's answer before it must begin itself."""
        return self.numbers.remaining_ms - self.numbers.here_ms - HEDGE_MARGIN_MS if self.fits_here else -math.inf


def decide(
    *,
    split: SplitMode,
    remaining_ms: float,
    local: LocalView,
    upstreams: Sequence[UpstreamView],
    forwarded: bool,
    may_leave: bool = True,
    size_bytes: int = 0,
    now_s: float,
) -> Decision:
    """Who answers a request that must be done in ``remaining_ms``.

    A forwarded one is not forwarded again, and one that may not leave (its sequence's state is here) is not forwarded at all.
    """
    stays = ""
    if forwarded:
        stays = "it was passed on already"
    elif split == "edge":
        stays = "split.mode is edge"
    elif not may_leave:
        stays = "its sequence may not leave this box"
    case = _case(split, local, () if stays else upstreams, stays=stays, remaining_ms=remaining_ms, size_bytes=size_bytes, now_s=now_s)
    if case.usable and (asked_first := _asked_first(case)) is not None:
        return asked_first
    numbers = case.numbers
    if case.fits_here:
        return Here(numbers.here_ms, "fits here", numbers)
    is_idle = case.has_room and remaining_ms > 0 and local.running + local.waiting + local.kept == 0
    idle_s = now_s - local.service.at_s if is_idle else 0.0
    if idle_s > FORGET_S:
        return Here(numbers.here_ms, "idle: measured anew", numbers)
    if (best := _asked_now(case)) is not None:
        why = "no replica is ready here" if local.slots == 0 else f"here {numbers.here_ms:.0f} ms of {remaining_ms:.0f} ms left"
        return _forward(case, best, f"{why}, at {best[0].node} {best[1]:.0f} ms")
    if idle_s >= PROBE_AFTER_S:
        return Here(numbers.here_ms, "idle: measured anew", numbers)
    return Refuse(_why_refused(case), _retry_after_s(local), numbers)


def _case(
    split: SplitMode, local: LocalView, upstreams: Sequence[UpstreamView], *, stays: str, remaining_ms: float, size_bytes: int, now_s: float
) -> _Case:
    queue_ms, service_ms = queue_and_service_ms(local, now_s=now_s)
    considered, usable = [], []
    for upstream in upstreams:
        link_ms, remote_ms = upstream_ms(upstream, local, size_bytes=size_bytes, now_s=now_s)
        why_not = _why_not(upstream, link_ms + remote_ms, remaining_ms)
        considered.append(Considered(upstream.node, link_ms + remote_ms, link_ms, remote_ms, why_not))
        if not why_not:
            usable.append((upstream, link_ms + remote_ms))
    considered.sort(key=lambda one: one.node)
    numbers = Numbers(remaining_ms, queue_ms + service_ms, queue_ms, service_ms, tuple(considered))
    has_room = local.slots > 0 and (local.waiting < local.queue_limit or local.makes_way)
    return _Case(split, local, numbers, stays, tuple(usable), has_room)


def _why_not(upstream: UpstreamView, estimate_ms: float, remaining_ms: float) -> str:
    """Why an upstream can't have a request; empty where it can."""
    if upstream.is_open:
        return "its circuit is open"
    if upstream.tier == "cloud" and not upstream.has_budget:
        return "the cloud budget of this hour is spent"
    if upstream.running >= upstream.limit:
        return f"{upstream.running} requests are with it already"
    if estimate_ms > remaining_ms:
        return f"it would take {estimate_ms:.0f} ms"
    return ""


def _best(usable: Sequence[tuple[UpstreamView, float]], *, trial: bool) -> tuple[UpstreamView, float] | None:
    """The one expected to be done first, among those that are to be tried or among the others."""
    return min((one for one in usable if one[0].is_trial == trial), key=_cost, default=None)


def _cost(one: tuple[UpstreamView, float]) -> tuple[float, bool, str]:
    upstream, estimate_ms = one
    is_cloud = upstream.tier == "cloud"
    return (estimate_ms * (CLOUD_PRICE if is_cloud else 1.0), is_cloud, upstream.node)


def _asked_now(case: _Case) -> tuple[UpstreamView, float] | None:
    """The upstream for what does not fit here: one that failed before only where nobody else makes it, or still does afterwards."""
    best, tried = _best(case.usable, trial=False), _best(case.usable, trial=True)
    if best is None or tried is None:
        return best or tried
    return tried if _cost(tried) < _cost(best) and _overdue_ms(tried[1]) + best[1] <= _time_for_two_ms(case) else best


def _overdue_ms(estimate_ms: float) -> float:
    return max(estimate_ms, HEDGE_LEAST_MS)


def _time_for_two_ms(case: _Case) -> float:
    return case.numbers.remaining_ms - HEDGE_MARGIN_MS


def _asked_first(case: _Case) -> Forward | None:
    """An upstream that is asked although the request may fit here: where the cloud is wanted, or where a trial is due and costs nothing.

    A trial needs the time to do it here after all. Where the cloud is not wanted it also needs that others wait here, for only then will
    upstreams be needed soon, and that the answer would be overdue before this box has to begin.
    """
    if case.split == "cloud":
        clouds = [one for one in case.usable if one[0].tier == "cloud"]
        tried = _best(clouds, trial=True) if case.fits_here else None
        best = tried or _best(clouds, trial=False)
        if best is not None and (case.spare_ms > 0 or not case.fits_here):
            return _forward(case, best, "split.mode is cloud")
        return None
    if not case.fits_here or case.numbers.queue_ms == 0:
        return None
    tried = _best(case.usable, trial=True)
    if tried is not None and tried[1] <= case.spare_ms:
        return _forward(case, tried, f"{tried[0].node} failed before and is tried again")
    return None


def _forward(case: _Case, best: tuple[UpstreamView, float], reason: str) -> Forward:
    """With the hedge when the answer is overdue: earlier where this box could else not make it any more.

    Where it does not fit here now, an overdue one may still fit later, if a run alone does, or at another upstream.
    """
    upstream, estimate_ms = best
    hedge_in_ms = _overdue_ms(estimate_ms)
    if case.fits_here:
        hedge_in_ms = max(0.0, min(hedge_in_ms, case.spare_ms))
        return Forward(upstream.node, estimate_ms, hedge_in_ms, reason, case.numbers, is_kept=True, is_trial=upstream.is_trial)
    others = [other_ms for other, other_ms in case.usable if other is not upstream and not other.is_trial]
    can_wait = hedge_in_ms + min([case.numbers.service_ms, *others]) <= _time_for_two_ms(case)
    return Forward(upstream.node, estimate_ms, hedge_in_ms if can_wait else None, reason, case.numbers, is_trial=upstream.is_trial)


def _why_refused(case: _Case) -> str:
    local, numbers = case.local, case.numbers
    if local.slots == 0:
        here = "no replica is ready here"
    elif not case.has_room:
        here = f"the queue here is full ({local.queue_limit})"
    else:
        here = f"here it would take {numbers.here_ms:.0f} ms of {numbers.remaining_ms:.0f} ms left"
    if case.stays:
        return f"{here}; {case.stays}"
    if not numbers.upstreams:
        return f"{here}; there is no upstream"
    return f"{here}; none of {len(numbers.upstreams)} upstreams can make it: {_why_nots(numbers)}"


def _why_nots(numbers: Numbers) -> str:
    return "; ".join(f"{one.node}: {one.why_not}" for one in numbers.upstreams if one.why_not)


def _retry_after_s(local: LocalView) -> int:
    """Whole seconds until the queue here has drained, 1 at least and 30 at most."""
    rows = max(local.waiting, local.ahead_rows)
    runs, run_rows = (local.waiting, local.rows) if local.max_rows <= 1 else (math.ceil(rows / local.max_rows), min(rows, local.max_rows))
    backlog_ms = (local.running + runs) * local.service.mean_ms(max(1, run_rows)) / max(1, local.slots)
    return max(1, min(30, math.ceil(backlog_ms / 1000)))


def in_words(decision: Decision) -> str:
    """A decision and the numbers that led to it, in one line for people."""
    numbers = decision.numbers
    facts = [f"{numbers.remaining_ms:.0f} ms left"]
    if math.isfinite(numbers.here_ms):
        facts.append(f"here {numbers.here_ms:.1f} ms (queue {numbers.queue_ms:.1f}, run {numbers.service_ms:.1f})")
    for one in numbers.upstreams:
        but = f", but {one.why_not}" if one.why_not else ""
        facts.append(f"{one.node} {one.estimate_ms:.1f} ms (link {one.link_ms:.1f}, there {one.remote_ms:.1f}){but}")
    match decision:
        case Here(_, reason):
            what = f"here: {reason}"
        case Forward(node, _, hedge_in_ms, reason):
            hedge = "" if hedge_in_ms is None else f", another way too after {hedge_in_ms:.0f} ms"
            what = f"to {node}{hedge}: {reason}"
        case Refuse(reason, retry_after_s):
            what = f"refused, again in {retry_after_s} s: {reason}"
    return f"{what} [{'; '.join(facts)}]"
