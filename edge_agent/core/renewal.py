"""When a box asks for its next certificate: long before the old one ends, and not with the whole fleet in one minute.

Its clock may be wrong by years. While it lies within the certificate's life it is believed; else what counts is how long ago, by a clock
that only runs forward, the box last asked.
"""

import msgspec

FIRST_SHARE, SPREAD_SHARE = 2 / 3, 1 / 6
"""After two thirds of its life at the earliest, five sixths at the latest."""
BLIND_SHARE = 1 / 3
LEAST_SHARE = 1 / 10
"""No certificate is asked for sooner after the last, whatever any clock says."""
FIRST_BLIND_S = 20.0
"""At the start, spread over the fleet: boxes that slept together wake together."""


class Life(msgspec.Struct, frozen=True):
    """A certificate's first and last moment, in Unix milliseconds, and a number from 0 to 1 that differs from box to box."""

    not_before_ms: int
    not_after_ms: int
    jitter: float


def due_in_s(life: Life, *, wall_ms: int, started_s_ago: float, renewed_s_ago: float | None) -> float:
    """Seconds until the next certificate should be asked for; 0 for now. ``renewed_s_ago`` is None until one was got since the start."""
    life_s = max(0.0, (life.not_after_ms - life.not_before_ms) / 1000)
    least_s = 0.0 if renewed_s_ago is None else LEAST_SHARE * life_s - renewed_s_ago
    if life.not_before_ms <= wall_ms <= life.not_after_ms:
        due_ms = life.not_before_ms + (FIRST_SHARE + SPREAD_SHARE * life.jitter) * life_s * 1000
        return max(0.0, least_s, (due_ms - wall_ms) / 1000)
    if renewed_s_ago is None:
        return max(0.0, min(FIRST_BLIND_S, BLIND_SHARE * life_s) * life.jitter - started_s_ago)
    return max(0.0, BLIND_SHARE * life_s - renewed_s_ago)
