"""How many of those who wait share the next run, or how long it pays to wait for more. Pure.

Of the requests in rank order, as many from the first on as fit into the rows and leave every one of them its deadline. If nobody else could
join, they are sent. Else it is worth waiting for the next one, which comes after about 1 / arrivals_per_s, if

    gap + cost(rows + next rows)  <  cost(rows) + cost(next rows)

for then even the last is done sooner than if two runs followed each other. That needs a replica which would still be busy when the next one
comes, so a box with little to do never waits. The wait ends when someone's deadline or max_wait_ms asks for it, or the next one is overdue.
"""

import math
from collections.abc import Sequence
from itertools import islice

import msgspec

from edge_agent.core.estimate import CostCurve
from edge_agent.core.queueing import Place

OVERDUE_GAPS = 3.0
"""Who has not come after so many usual gaps is not waited for: of arrivals at random, one in twenty is later."""


class Send(msgspec.Struct, frozen=True, tag=True):
    """The first ``count`` of those waiting run together now."""

    count: int


class WaitUntil(msgspec.Struct, frozen=True, tag=True):
    """Nothing runs before ``at_s``, unless another one comes: then ask again. Asked at ``at_s``, it is Send."""

    at_s: float


def next_batch(
    waiting: Sequence[Place], *, max_rows: int, max_wait_ms: float, curve: CostCurve, arrivals_per_s: float, now_s: float
) -> Send | WaitUntil:
    """What to do with ``waiting``: one request at least, in rank order, all of which may share a run with the first.

    Nobody who could be done in time alone is made late by company, as the curve carefully has it; and nobody waits for company for more
    than ``max_wait_ms`` from its arrival. A request of more than ``max_rows`` goes alone. Looks at no more requests than fit into a run.
    """
    if max_rows <= 1:
        return Send(1)
    count, rows = _company(waiting, max_rows=max_rows, curve=curve, now_s=now_s)
    if count < len(waiting) or rows >= max_rows or max_wait_ms <= 0 or arrivals_per_s <= 0:
        return Send(count)
    next_rows = math.ceil(rows / count)
    if rows + next_rows > max_rows:
        return Send(count)
    gap_s = 1 / arrivals_per_s
    saved_ms = curve.mean_ms(rows) + curve.mean_ms(next_rows) - curve.mean_ms(rows + next_rows)
    if saved_ms <= gap_s * 1000:
        return Send(count)
    joint_s = curve.careful_ms(rows + next_rows) / 1000
    latest_s = min(min(place.until_s - joint_s, place.arrived_s + max_wait_ms / 1000) for place in waiting)
    if now_s + gap_s > latest_s:
        return Send(count)
    at_s = min(latest_s, max(place.arrived_s for place in waiting) + OVERDUE_GAPS * gap_s)
    return WaitUntil(at_s) if now_s < at_s else Send(count)


def _company(waiting: Sequence[Place], *, max_rows: int, curve: CostCurve, now_s: float) -> tuple[int, int]:
    """How many from the first on run together, and their rows."""
    rows = waiting[0].rows
    until_s = _binding_until_s(waiting[0], curve, now_s)
    count = 1
    for place in islice(waiting, 1, max_rows):
        joint_until_s = min(until_s, _binding_until_s(place, curve, now_s))
        if rows + place.rows > max_rows or now_s + curve.careful_ms(rows + place.rows) / 1000 > joint_until_s:
            break
        count, rows, until_s = count + 1, rows + place.rows, joint_until_s
    return count, rows


def _binding_until_s(place: Place, curve: CostCurve, now_s: float) -> float:
    """The deadline that company must keep; none for whoever will be late even alone, who must not make the others go one by one."""
    return place.until_s if now_s + curve.mean_ms(place.rows) / 1000 <= place.until_s else math.inf
