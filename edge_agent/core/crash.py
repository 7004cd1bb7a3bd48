"""When a replica that ended is tried again, and when it is given up. Pure.

The first ending of one that answered is followed by a try at once: its callers wait, and most often the next one serves. A replica that
served for ``forgive_after_s`` begins anew when it ends. Else its endings in a row are counted, one that could not load its
model double (the same bytes will fail again; only want of memory or a broken disk passes). Each next try waits about twice as long as the
last; at ``limit`` the replica is in a crash loop and is not tried again until its spec changes.
"""

from typing import Literal

import msgspec

ReasonKind = Literal["start_failed", "load_failed", "exited", "killed", "oom"]


class Ending(msgspec.Struct, frozen=True):
    """A sandbox ended ``at_s``, on the caller's clock, after it had answered for ``ready_for_s``; 0 where it never did."""

    at_s: float
    reason_kind: ReasonKind
    ready_for_s: float = 0.0


class Attempts(msgspec.Struct, frozen=True):
    """Endings in a row, as they count; ``since_s`` is when the first of them was."""

    count: int = 0
    since_s: float = 0.0


class Verdict(msgspec.Struct, frozen=True):
    """What follows from an ending. ``retry_in_s`` is None in a crash loop."""

    attempts: Attempts
    retry_in_s: float | None
    is_crash_loop: bool


def after(
    ending: Ending, attempts: Attempts, *, first_s: float, most_s: float, limit: int, forgive_after_s: float, jitter: float
) -> Verdict:
    """What to do after ``ending``, with ``attempts`` from the verdict before it; ``jitter`` is a random number from 0 to 1.

    ``limit`` is at least 1. The delay before the next try is that of skerry.runtime.backoff: half of min(most_s, first_s * 2 ** endings
    before this one) is certain, the other half is times ``jitter``. There is none after the first ending of one that answered.
    """
    if attempts.count == 0 or ending.ready_for_s >= forgive_after_s:
        attempts = Attempts(0, ending.at_s)
    weight = 2 if ending.reason_kind == "load_failed" else 1
    counted = Attempts(attempts.count + weight, min(attempts.since_s, ending.at_s))
    if counted.count >= limit:
        return Verdict(counted, None, is_crash_loop=True)
    if attempts.count == 0 and ending.ready_for_s > 0:
        return Verdict(counted, 0.0, is_crash_loop=False)
    ceiling_s = min(most_s, first_s * 2.0 ** min(attempts.count, 32))
    return Verdict(counted, ceiling_s * (0.5 + 0.5 * jitter), is_crash_loop=False)
