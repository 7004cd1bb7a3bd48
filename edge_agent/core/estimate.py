"""How long things take, learned from what they took: mean and mean deviation, as TCP does for round trips (RFC 6298). Pure."""

import msgspec

MEAN_GAIN = 1 / 8
DEVIATION_GAIN = 1 / 4
CAUTION = 3.0
"""Deviations that a careful estimate lies above the mean."""


class Estimate(msgspec.Struct, frozen=True):
    """Durations seen so far, in milliseconds. ``at_s`` is when the last was seen, on the observer's clock."""

    mean_ms: float = 0.0
    deviation_ms: float = 0.0
    count: int = 0
    at_s: float = 0.0

    @property
    def careful_ms(self) -> float:
        """What few exceed; 0 while nothing was seen."""
        return self.mean_ms + CAUTION * self.deviation_ms


def updated(old: Estimate, duration_ms: float, *, now_s: float) -> Estimate:
    """The estimate after one more duration."""
    if old.count == 0:
        return Estimate(duration_ms, duration_ms / 4, 1, now_s)
    gain = max(MEAN_GAIN, 1 / (old.count + 1))  # the first few count alike, so that one slow start is soon forgotten
    error_ms = duration_ms - old.mean_ms
    deviation_ms = old.deviation_ms + DEVIATION_GAIN * (abs(error_ms) - old.deviation_ms)
    return Estimate(old.mean_ms + gain * error_ms, deviation_ms, old.count + 1, now_s)
