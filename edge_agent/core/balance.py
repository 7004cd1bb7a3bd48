"""Which replica a call goes to: the one expected to be done first, a new one carefully. Pure.

A replica that has just started is slow for its first calls (memory is touched for the first time, caches are cold), and its first
measurements say little. So it counts as a usual one times a factor that falls from SLOW_FACTOR to 1 over its first SLOW_ANSWERS answers or
SLOW_S seconds, whichever comes first, and holds one call at a time until then.
"""

import math
from collections.abc import Sequence

import msgspec

from edge_agent.core.estimate import CostCurve

SLOW_FACTOR = 3.0
SLOW_ANSWERS = 8
SLOW_S = 10.0
AHEAD_UNDER_MS = 1.0
"""Below this a replica would idle noticeably between two calls, if it were given the next only after it answered."""
MOST_AHEAD = 8
LONG_MS = 20.0


class ReplicaView(msgspec.Struct, frozen=True):
    """A replica: ``running`` calls of ``outstanding_rows`` rows together are with it, of ``depth`` that it may hold at once.

    It is ready since ``since_s`` and has answered ``answered`` calls since then.
    """

    name: str
    outstanding_rows: int
    depth: int
    running: int
    curve: CostCurve
    since_s: float
    answered: int


def expected_ms(view: ReplicaView, rows: int, *, typical: CostCurve, now_s: float) -> float:
    """How long until a call of ``rows`` would be done that is sent now: what is with the replica comes first, call by call.

    ``typical`` is the curve of all replicas of the deployment. A replica of which nothing is known counts as a typical one.
    """
    slowness = _slowness(view, now_s)
    curve = typical if (slowness > 1 and typical.count) or view.curve.count == 0 else view.curve
    before_ms = view.running * curve.mean_ms(math.ceil(view.outstanding_rows / view.running)) if view.running else 0.0
    return slowness * (before_ms + curve.mean_ms(rows))


def choose(views: Sequence[ReplicaView], rows: int, *, typical: CostCurve, now_s: float) -> int | None:
    """The index of the replica with a free place that is expected to be done first; None where none has a place.

    Of equals, the one with fewer rows, then the one listed first. Looks at each replica once.
    """
    free = [index for index, view in enumerate(views) if view.running < _places(view, now_s)]
    if len(free) <= 1:
        return free[0] if free else None
    return min(
        free, key=lambda index: (expected_ms(views[index], rows, typical=typical, now_s=now_s), views[index].outstanding_rows, index)
    )


def depth_of(curve: CostCurve) -> int:
    """How many calls a replica may hold so that it does not idle between two: the more the shorter they are.

    One where they are long, so that the idling is nothing beside them and what is more urgent need not wait; one while nothing is known.
    """
    if curve.count == 0:
        return 1
    mean_ms = curve.mean_ms(1)
    if mean_ms >= AHEAD_UNDER_MS:
        return 2 if mean_ms < LONG_MS else 1
    return min(MOST_AHEAD, max(1, math.ceil(AHEAD_UNDER_MS / max(mean_ms, AHEAD_UNDER_MS / MOST_AHEAD))))


def _places(view: ReplicaView, now_s: float) -> int:
    return min(view.depth, 1) if _slowness(view, now_s) > 1 else view.depth


def _slowness(view: ReplicaView, now_s: float) -> float:
    started = max(view.answered / SLOW_ANSWERS, (now_s - view.since_s) / SLOW_S)
    return 1.0 + (SLOW_FACTOR - 1.0) * (1.0 - min(1.0, max(0.0, started)))
