"""Warm sandboxes: started ahead, with the runtime imported and no model, so that a replica's start only has to load its model. Pure.

How many of each kind, from the recent starts ("demands") of its replicas:

    weight of a kind = sum over its demands of 2 ** -(age / half life) * factor of its deadline
    half life        = keep_s / 4: a demand about to be forgotten counts a sixteenth of a new one
    factor           = 4 for a deadline of at most 100 ms, 2 for at most 1 s, else 1
    most of a kind   = its burst: the largest number of its demands within any one minute

As many are held as the memory, ``most`` and the bursts allow; that number only grows with the memory. Which ones: the n-th of a kind
ranks by weight / n, so that kinds share by weight (the highest averages method of D'Hondt, 1882), and one is taken wherever the number
can still be reached beside it.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

import msgspec

HALF_LIVES = 4
"""Half lives of a demand's weight until it is forgotten."""
BURST_S = 60.0
DEADLINE_FACTORS = ((100, 4.0), (1000, 2.0))
"""Up to this deadline in milliseconds, a demand counts so many times."""


class Kind(msgspec.Struct, frozen=True, order=True):
    """What must be equal for a warm sandbox to become a replica's: the driver, its memory and processors, and its image."""

    driver: str
    memory_bytes: int
    cpus: float
    image: str = ""


class Demand(msgspec.Struct, frozen=True):
    """A replica of ``kind`` was started ``at_s``, on the caller's clock; its requests must be answered within ``deadline_ms``."""

    kind: Kind
    at_s: float
    deadline_ms: int


def wanted(demands: Sequence[Demand], *, free_bytes: int, most: int, now_s: float, keep_s: float) -> dict[Kind, int]:
    """How many warm sandboxes to hold of each kind now; kinds of which none is to be held are absent.

    ``free_bytes`` is the memory for all of them, what those that exist hold included; ``most`` bounds their number. Demands count
    for ``keep_s``; one in the future, as after a clock was set back, counts as one of now.
    """
    ages_s: dict[Kind, list[tuple[float, int]]] = {}
    for demand in demands:
        age_s = max(0.0, now_s - demand.at_s)
        if age_s < keep_s:
            ages_s.setdefault(demand.kind, []).append((age_s, demand.deadline_ms))
    ranked: list[tuple[float, Kind, int]] = []
    for kind, recent in ages_s.items():
        weight = math.fsum(2.0 ** (-HALF_LIVES * age_s / keep_s) * _factor(deadline_ms) for age_s, deadline_ms in recent)
        burst = _burst([age_s for age_s, _ in recent])
        ranked.extend((-weight / n, kind, n) for n in range(1, min(burst, max(0, most)) + 1))
    counts: dict[Kind, int] = {}
    for kind in _chosen([kind for _, kind, _ in sorted(ranked)], free_bytes, most):
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def _factor(deadline_ms: int) -> float:
    return next((factor for up_to_ms, factor in DEADLINE_FACTORS if deadline_ms <= up_to_ms), 1.0)


def _burst(times_s: list[float]) -> int:
    """The largest number of times within less than one minute."""
    times_s = sorted(times_s)
    largest, first = 0, 0
    for last, time_s in enumerate(times_s):
        while time_s - times_s[first] >= BURST_S:
            first += 1
        largest = max(largest, last - first + 1)
    return largest


def _chosen(ranked: list[Kind], free_bytes: int, most: int) -> list[Kind]:
    """As many as fit, the best ranked ones among which that many still fit."""
    by_size = sorted(kind.memory_bytes for kind in ranked)
    open_places = sum(used <= free_bytes for used in accumulate(by_size[: max(0, most)]))
    chosen = []
    for kind in ranked:
        if open_places == 0:
            break
        by_size.remove(kind.memory_bytes)
        rest_bytes = sum(by_size[: open_places - 1])
        if len(by_size) >= open_places - 1 and kind.memory_bytes + rest_bytes <= free_bytes:
            chosen.append(kind)
            free_bytes -= kind.memory_bytes
            open_places -= 1
    return chosen


def changes(want: Mapping[Kind, int], have: Mapping[str, Kind], *, young: set[str]) -> tuple[list[Kind], list[str]]:
    """What to start and which to stop, so that the warm sandboxes ``have`` become those that ``want`` counts.

    Those of ``young`` are not stopped yet: else a start would pay for nothing. Nothing is started that would not fit, in number and
    in memory, into what ``want`` holds in all beside everything that is still there; so both lists may be carried out in any order.
    """
    to_stop: list[str] = []
    missing: list[Kind] = []
    for kind in sorted({*want, *have.values()}):
        mine = sorted(name for name, other in have.items() if other == kind)
        surplus = len(mine) - want.get(kind, 0)
        to_stop.extend([name for name in mine if name not in young][: max(0, surplus)])
        missing.extend([kind] * -surplus)
    places = sum(want.values()) - len(have)
    room_bytes = sum(kind.memory_bytes * count for kind, count in want.items()) - sum(kind.memory_bytes for kind in have.values())
    to_start: list[Kind] = []
    for kind in missing:
        if places > 0 and kind.memory_bytes <= room_bytes:
            to_start.append(kind)
            places -= 1
            room_bytes -= kind.memory_bytes
    return to_start, sorted(to_stop)
