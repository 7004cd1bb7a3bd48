"""Who answers a request: this box, a neighbour, the cloud, or nobody in time. Pure; the reasons travel with the answer.

fits here? --yes--> Here
    | no
fits at an upstream? --yes--> Forward
    | no
idle here, and no recent measurement? --yes--> Here (else a bad estimate would never be mended)
    | no
Refuse at once, never queued to die
"""

import math
from collections.abc import Sequence

import msgspec

from edge_agent.core.estimate import Estimate
from skerry.wire.messages import SplitMode, Tier

PROBE_AFTER_S = 1.0
"""Where nobody else can help, an estimate that is this old is put to the test by one request."""
FIRST_FORWARD_MS = 20.0
"""What a forwarded request costs beyond its computing, as long as none was measured."""
FORGET_S = 5.0
"""A measurement that is older says nothing."""
DOUBT_HALVES_S = 0.5
"""A bad spell is believed in less and less: else whoever had it would not be tried again before it is forgotten."""
QUEUE_CAUTION = 1.2
"""Those in the queue before take this much longer than on average: a queue that is full is when a box is busiest."""


class LocalView(msgspec.Struct, frozen=True):
    """This box's replicas of one deployment: ``slots`` calls run at once, ``waiting`` are queued, at most ``queue_limit``."""

    slots: int
    running: int
    waiting: int
    queue_limit: int
    service: Estimate


class UpstreamView(msgspec.Struct, frozen=True):
    """Another box's gateway: ``total`` is what its answers took, link included; before ``usable_at_s`` it is left alone."""

    node: str
    tier: Tier
    total: Estimate
    usable_at_s: float = 0.0
    running: int = 0
    limit: int = 64


class Here(msgspec.Struct, frozen=True, tag=True):
    """Answer on this box."""

    estimate_ms: float
    reason: str


class Forward(msgspec.Struct, frozen=True, tag=True):
    """Pass it on to ``node``."""

    node: str
    estimate_ms: float
    reason: str


class Refuse(msgspec.Struct, frozen=True, tag=True):
    """Nobody can answer in time; try again after ``retry_after_s``."""

    reason: str
    retry_after_s: int


Decision = Here | Forward | Refuse


def believed_ms(estimate: Estimate, *, now_s: float) -> float:
    """What few exceed, by measurements that are as old as they are: doubt fades, the mean stays."""
    age_s = max(0.0, now_s - estimate.at_s)
    doubt_ms = estimate.careful_ms - estimate.mean_ms
    return float(estimate.mean_ms + doubt_ms * 0.5 ** (age_s / DOUBT_HALVES_S))


def local_ms(view: LocalView, *, now_s: float) -> float:
    """When a request that joins the queue now would be done, carefully; infinite where there is no replica."""
    if view.slots == 0:
        return math.inf
    rounds_before = (view.running + view.waiting) // view.slots
    return rounds_before * view.service.mean_ms * QUEUE_CAUTION + believed_ms(view.service, now_s=now_s)


def upstream_ms(upstream: UpstreamView, service: Estimate, *, now_s: float) -> float:
    """What forwarding would take, carefully. An old or missing measurement counts as a first one would."""
    if upstream.total.count == 0 or now_s - upstream.total.at_s > FORGET_S:
        return FIRST_FORWARD_MS + 2 * service.mean_ms
    return believed_ms(upstream.total, now_s=now_s)


def decide(
    *, split: SplitMode, remaining_ms: float, local: LocalView, upstreams: Sequence[UpstreamView], forwarded: bool, now_s: float
) -> Decision:
    """Who answers a request that must be done in ``remaining_ms``. A forwarded one is not forwarded again."""
    here_ms = local_ms(local, now_s=now_s)
    has_room = local.slots > 0 and local.waiting < local.queue_limit
    fits_here = has_room and here_ms <= remaining_ms
    best = None if forwarded or split == "edge" else _best_upstream(upstreams, local.service, remaining_ms=remaining_ms, now_s=now_s)
    if split == "cloud" and best is not None:
        return Forward(best[1], best[0], "split.mode is cloud")
    if fits_here:
        return Here(here_ms, "fits here")
    idle_s = now_s - local.service.at_s if has_room and remaining_ms > 0 and local.running + local.waiting == 0 else 0.0
    if idle_s > FORGET_S:
        return Here(here_ms, "idle: measured anew")
    if best is not None:
        why = "no replica is ready here" if local.slots == 0 else f"here {here_ms:.0f} ms of {remaining_ms:.0f} ms left"
        return Forward(best[1], best[0], f"{why}, at {best[1]} {best[0]:.0f} ms")
    if idle_s >= PROBE_AFTER_S:
        return Here(here_ms, "idle: measured anew")
    return Refuse(_why_refused(local, here_ms, remaining_ms, upstreams, forwarded), _retry_after_s(local))


def _best_upstream(upstreams: Sequence[UpstreamView], service: Estimate, *, remaining_ms: float, now_s: float) -> tuple[float, str] | None:
    """The estimate and node of the fastest usable upstream that makes it."""
    usable = [u for u in upstreams if now_s >= u.usable_at_s and u.running < u.limit]
    estimates = [(upstream_ms(u, service, now_s=now_s), u.node) for u in usable]
    return min((estimate for estimate in estimates if estimate[0] <= remaining_ms), default=None)


def _why_refused(local: LocalView, here_ms: float, remaining_ms: float, upstreams: Sequence[UpstreamView], forwarded: bool) -> str:
    if local.slots == 0:
        here = "no replica is ready here"
    elif local.waiting >= local.queue_limit:
        here = f"the queue here is full ({local.queue_limit})"
    else:
        here = f"here it would take {here_ms:.0f} ms of {remaining_ms:.0f} ms left"
    if forwarded:
        return here
    return f"{here}; " + (f"none of {len(upstreams)} upstreams can make it" if upstreams else "there is no upstream")


def _retry_after_s(local: LocalView) -> int:
    """Whole seconds until the queue here has drained, 1 at least and 30 at most."""
    backlog_ms = (local.running + local.waiting) * local.service.mean_ms / max(1, local.slots)
    return max(1, min(30, math.ceil(backlog_ms / 1000)))
