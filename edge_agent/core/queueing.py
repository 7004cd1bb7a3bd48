"""Who is served first, and who makes way where too many come. Pure.

Triton's priorities: 1 is served first, 0 stands for the default, which is the lowest of all. Within a priority, first come, first served.
"""

from collections.abc import Sequence

import msgspec

LOWEST = 2**63
"""What priority 0 counts as."""


class Place(msgspec.Struct, frozen=True):
    """A request of ``rows`` rows that came ``arrived_s`` and must be done ``until_s``, both on the gateway's clock."""

    priority: int
    arrived_s: float
    until_s: float
    rows: int = 1


def rank(place: Place) -> tuple[int, float]:
    """Sorted by this, those to be served first come first."""
    return (place.priority if place.priority > 0 else LOWEST, place.arrived_s)


def to_shed(waiting: Sequence[Place], new: Place, *, limit: int) -> int | None:
    """Who makes way for ``new`` in a queue for ``limit``: None where there is room, -1 for ``new`` itself, else an index of ``waiting``.

    Only one of lower priority than ``new`` makes way: of the lowest, the one that came last. Costs nothing while there is room, else one
    look at each; ``waiting`` may be in any order.
    """
    if len(waiting) < limit:
        return None
    last = max(range(len(waiting)), key=lambda index: (*rank(waiting[index]), index), default=-1)
    return last if last >= 0 and rank(waiting[last])[0] > rank(new)[0] and limit > 0 else -1


def hopeless(waiting: Sequence[Place], *, service_ms: float, now_s: float) -> list[int]:
    """The indexes of those that would be late even if a run of ``service_ms`` began for them now. One look at each."""
    if not waiting:
        return []
    done_s = now_s + service_ms / 1000
    return [index for index, place in enumerate(waiting) if place.until_s < done_s]


def ahead_of(waiting: Sequence[Place], priority: int) -> tuple[int, int]:
    """How many requests, and how many rows, go before one of ``priority`` that comes now. One look at each."""
    if not waiting:
        return (0, 0)
    own = priority if priority > 0 else LOWEST
    before = [place.rows for place in waiting if rank(place)[0] <= own]
    return (len(before), sum(before))


def ahead_rows(waiting: Sequence[Place], priority: int) -> int:
    """How many rows go before a request of ``priority`` that comes now. One look at each."""
    return ahead_of(waiting, priority)[1]
