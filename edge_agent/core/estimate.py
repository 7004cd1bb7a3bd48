"""How long things take, learned from what they took: mean and mean deviation, as TCP does for round trips (RFC 6298). Pure.

``Estimate`` is of one thing, ``CostCurve`` of a run by the rows in it, ``Link`` of the way to another box by the bytes on it.
"""

import math

import msgspec

MEAN_GAIN = 1 / 8
DEVIATION_GAIN = 1 / 4
CAUTION = 3.0
"""Deviations that a careful estimate lies above the mean."""
DOUBT_HALVES_S = 0.5
"""A bad spell is believed in less and less: else whoever had it would not be tried again before it is forgotten."""
EXACT_ROWS = 8
"""Runs of up to so many rows are measured apart; larger ones share a measurement up to each power of two."""
CONTRADICTED_AFTER_S = 10.0
"""A measurement of another size that is older gives way to a new one that it can't be reconciled with."""
LINK_GAIN = 1 / 16
VARIED_SHARE = 1 / 4
"""Sizes must deviate by this share of their mean before they tell a link's bandwidth from its round trip."""
ASSUMED_BYTES_PER_MS = 1250.0
"""10 Mbit/s: what bytes beyond the usual size are taken to cost on a link whose bandwidth is not known."""
MOST_BYTES_PER_MS = 1e7
"""A link that shows no cost of bytes is taken to be this fast."""


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


def believed_ms(mean_ms: float, careful_ms: float, *, age_s: float) -> float:
    """What few exceed, by measurements of that age: doubt fades, the mean stays."""
    return float(mean_ms + (careful_ms - mean_ms) * 0.5 ** (max(0.0, age_s) / DOUBT_HALVES_S))


class Measured(msgspec.Struct, frozen=True):
    """Runs of one size or of a class of sizes: ``size`` is the largest of the class, ``rows`` the mean of those that ran."""

    size: int
    rows: float
    estimate: Estimate


class CostCurve(msgspec.Struct, frozen=True):
    """What a run takes by its rows, from the sizes that ran: straight between two, and in proportion to the rows beyond the largest.

    A run never counts as cheaper than a smaller one that was measured; below the smallest that was, it counts as that one. ``count``
    and ``at_s`` are of all sizes together. A look costs as many steps as there are known sizes, one where all runs are alike.
    """

    points: tuple[Measured, ...] = ()
    count: int = 0
    at_s: float = 0.0

    def mean_ms(self, rows: int) -> float:
        """What a run of so many rows takes on average; 0 while nothing was seen."""
        return _at([(point.rows, point.estimate.mean_ms) for point in self.points], rows)

    def careful_ms(self, rows: int) -> float:
        """What few runs of so many rows exceed; 0 while nothing was seen."""
        return _at([(point.rows, point.estimate.careful_ms) for point in self.points], rows)


def _at(known: list[tuple[float, float]], rows: int) -> float:
    """The duration at ``rows`` on the line through ``known``, which rises by rows."""
    last_rows, last_ms = 0.0, 0.0
    for known_rows, known_ms in known:
        level_ms = max(last_ms, known_ms)
        if rows <= known_rows:
            if last_rows == 0.0:
                return level_ms
            return last_ms + (level_ms - last_ms) * ((rows - last_rows) / (known_rows - last_rows))
        last_rows, last_ms = known_rows, level_ms
    return last_ms * (rows / last_rows) if last_rows else 0.0


def updated_curve(curve: CostCurve, rows: int, duration_ms: float, *, now_s: float) -> CostCurve:
    """The curve after a run of ``rows``, 1 at least."""
    rows = max(1, rows)
    size = rows if rows <= EXACT_ROWS else 1 << (rows - 1).bit_length()
    held = next((point for point in curve.points if point.size == size), Measured(size, float(rows), Estimate()))
    gain = max(MEAN_GAIN, 1 / (held.estimate.count + 1))
    new = Measured(size, held.rows + gain * (rows - held.rows), updated(held.estimate, duration_ms, now_s=now_s))
    if len(curve.points) == 1 and curve.points[0].size == size:
        return CostCurve((new,), curve.count + 1, now_s)
    others = [point for point in curve.points if point.size != size and not _contradicts(point, new)]
    return CostCurve(tuple(sorted([*others, new], key=_size_of)), curve.count + 1, now_s)


def _size_of(point: Measured) -> int:
    return point.size


def _contradicts(old: Measured, new: Measured) -> bool:
    """Whether ``old`` is of another time: fewer rows that took longer, or more that took longer than rows in proportion would.

    Else a bad spell at one size would be believed for as long as that size is avoided because of it.
    """
    if new.estimate.at_s - old.estimate.at_s <= CONTRADICTED_AFTER_S:
        return False
    most_ms = new.estimate.mean_ms * max(1.0, old.rows / new.rows)
    return old.estimate.mean_ms > most_ms


class Link(msgspec.Struct, frozen=True):
    """The way to another box and back: a round trip, and so many bytes in a millisecond, from requests that went there.

    The line of durations over sizes with the least squares, the last about sixteen requests counting most; neither of its terms is
    negative. While sizes are much alike it can't be told what of a duration is due to bytes (``bytes_per_ms`` is 0): then all of it
    counts as round trip, and bytes beyond the usual size as ASSUMED_BYTES_PER_MS has it. ``typical_bytes`` and ``typical_ms`` are the
    means that the line goes through, ``spread`` and ``joint_spread`` the variance of sizes and their covariance with durations.
    """

    round_trip_ms: float = 0.0
    ms_per_byte: float = 0.0
    deviation_ms: float = 0.0
    count: int = 0
    at_s: float = 0.0
    typical_bytes: float = 0.0
    typical_ms: float = 0.0
    spread: float = 0.0
    joint_spread: float = 0.0

    @property
    def bytes_per_ms(self) -> float:
        """The bandwidth; 0 while it is unknown."""
        return 1.0 / self.ms_per_byte if self.ms_per_byte else 0.0

    def mean_ms(self, size_bytes: int) -> float:
        """What it takes on average to move a request and its answer of so many bytes together; 0 while nothing was seen."""
        if self.count == 0:
            return 0.0
        if self.ms_per_byte:
            return self.round_trip_ms + size_bytes * self.ms_per_byte
        return self.round_trip_ms + max(0.0, size_bytes - self.typical_bytes) / ASSUMED_BYTES_PER_MS

    def careful_ms(self, size_bytes: int) -> float:
        """What few exceed; 0 while nothing was seen."""
        return self.mean_ms(size_bytes) + CAUTION * self.deviation_ms


def updated_link(link: Link, size_bytes: int, duration_ms: float, *, now_s: float) -> Link:
    """The link after ``size_bytes`` went over it, request and answer together, in ``duration_ms``: what the whole took less what the
    other box says that it took itself. A negative duration counts as none (clocks are coarse, and the other box may lie)."""
    if not math.isfinite(duration_ms):
        return link
    size, duration_ms = float(max(0, size_bytes)), max(0.0, duration_ms)
    if link.count == 0:
        return Link(duration_ms, 0.0, duration_ms / 4, 1, now_s, size, duration_ms)
    gain = max(LINK_GAIN, 1 / (link.count + 1))
    error_bytes, error_ms = size - link.typical_bytes, duration_ms - link.typical_ms
    typical_bytes, typical_ms = link.typical_bytes + gain * error_bytes, link.typical_ms + gain * error_ms
    spread = (1 - gain) * (link.spread + gain * error_bytes * error_bytes)
    joint_spread = (1 - gain) * (link.joint_spread + gain * error_bytes * error_ms)
    round_trip_ms, ms_per_byte = typical_ms, 0.0
    if spread > (VARIED_SHARE * typical_bytes) ** 2:
        ms_per_byte = max(1 / MOST_BYTES_PER_MS, joint_spread / spread)
        round_trip_ms = typical_ms - ms_per_byte * typical_bytes
        if round_trip_ms < 0:  # the best line of those through the origin
            round_trip_ms = 0.0
            ms_per_byte = max(1 / MOST_BYTES_PER_MS, (joint_spread + typical_bytes * typical_ms) / (spread + typical_bytes**2))
    missed_ms = abs(duration_ms - link.mean_ms(size_bytes))
    deviation_ms = link.deviation_ms + DEVIATION_GAIN * (missed_ms - link.deviation_ms)
    return Link(round_trip_ms, ms_per_byte, deviation_ms, link.count + 1, now_s, typical_bytes, typical_ms, spread, joint_spread)
