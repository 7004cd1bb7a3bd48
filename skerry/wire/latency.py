"""Latency histograms that can be added up over boxes and time: logarithmic buckets, eight to the octave.

Bucket ``i`` counts durations from ``0.01 ms * 2 ** (i / 8)`` up to the next; a quantile read from it is off by 4.5 % at most.
"""

import math
from collections.abc import Iterable, Mapping

SMALLEST_MS = 0.01
BUCKETS_PER_OCTAVE = 8
LAST_BUCKET = 8 * 27
"""About 22 minutes; longer ones are counted here."""


def bucket_of(duration_ms: float) -> int:
    """The bucket that counts ``duration_ms``."""
    if duration_ms <= SMALLEST_MS:
        return 0
    return min(LAST_BUCKET, int(math.log2(duration_ms / SMALLEST_MS) * BUCKETS_PER_OCTAVE))


def middle_ms(bucket: int) -> float:
    """The geometric middle of a bucket, in milliseconds."""
    return float(SMALLEST_MS * 2.0 ** ((bucket + 0.5) / BUCKETS_PER_OCTAVE))


def merged(histograms: Iterable[Mapping[int, int]]) -> dict[int, int]:
    """The sum of histograms."""
    total: dict[int, int] = {}
    for histogram in histograms:
        for bucket, count in histogram.items():
            total[bucket] = total.get(bucket, 0) + count
    return total


def grown(now: Mapping[int, int], before: Mapping[int, int]) -> dict[int, int]:
    """What a counting histogram gained since ``before``; a counter that fell was reset and counts from zero."""
    was_reset = any(count > now.get(bucket, 0) for bucket, count in before.items())
    old = {} if was_reset else before
    return {bucket: grew for bucket, count in now.items() if (grew := count - old.get(bucket, 0))}


def quantile_ms(histogram: Mapping[int, int], q: float) -> float:
    """The ``q`` quantile (0 to 1) in milliseconds; 0 for an empty histogram."""
    rank = q * sum(histogram.values())
    seen = 0
    for bucket in sorted(histogram):
        seen += histogram[bucket]
        if seen >= rank:
            return middle_ms(bucket)
    return 0.0
