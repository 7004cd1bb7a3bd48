"""What a box may send to the cloud within a clock hour, shared by several processes and over their deaths. Pure.

One account says what of the hour's budget was given out. A process takes a lease from it, a small part, and spends that without asking.
An account is written down for good before its lease is used: then whatever dies, no more is spent than was given out, and what a dead
process still held is lost for the hour. Both know their hour, and a lease of another hour is worth nothing. A clock that went back finds an
account of a later hour: nothing is given out until it has caught up, for what was spent in the hour that comes again is not known any more.
Where the budget changes, what is held under the old one must be dropped.
"""

import msgspec

from skerry.wire.messages import CloudBudget


class Account(msgspec.Struct, frozen=True):
    """What was given out in ``hour``, counted from the epoch. The empty account is of no hour."""

    hour: int = -1
    requests: int = 0
    bytes: int = 0


class Lease(msgspec.Struct, frozen=True):
    """What its holder may still spend in ``hour``; None is without limit. The empty lease is worth nothing."""

    hour: int = -1
    requests_left: int | None = 0
    bytes_left: int | None = 0


NOTHING = Lease()


def lease(
    account: Account,
    budget: CloudBudget,
    *,
    now_hour: int,
    want_requests: int = 1,
    want_bytes: int = 0,
    share: float = 0.02,
    held: Lease = NOTHING,
) -> tuple[Account, Lease]:
    """The account and the holder's lease afterwards: for what it wants, or a ``share`` of the hour's budget where that is more.

    ``held`` is the lease that it has; what is left of it in the same hour is kept and only the rest taken. Where the account has not enough
    left of requests or of bytes, it stays as it is, and so does what is held.
    """
    if now_hour < account.hour:
        return account, NOTHING
    if now_hour > account.hour:
        account = Account(now_hour)
    if held.hour != now_hour:
        held = Lease(now_hour, 0, 0)
    requests = _grant(budget.requests_per_hour, account.requests, held.requests_left, max(1, want_requests), share)
    size_bytes = _grant(budget.bytes_per_hour, account.bytes, held.bytes_left, max(0, want_bytes), share)
    if requests is None or size_bytes is None:
        return account, held
    given = Account(now_hour, account.requests + requests, account.bytes + size_bytes)
    return given, Lease(
        now_hour,
        None if budget.requests_per_hour is None else (held.requests_left or 0) + requests,
        None if budget.bytes_per_hour is None else (held.bytes_left or 0) + size_bytes,
    )


def _grant(budget: int | None, given_out: int, held: int | None, want: int, share: float) -> int | None:
    """How much to give out of one dimension; None where there is not enough. Without a limit nothing need be given out."""
    if budget is None:
        return 0
    missing = want - (held or 0)
    if missing <= 0:
        return 0
    left = budget - given_out
    return min(left, max(missing, int(budget * share))) if missing <= left else None


def spend(held: Lease, size_bytes: int, *, now_hour: int) -> Lease | None:
    """The lease after one request that moves ``size_bytes``, its answer included; None where it does not suffice or is of another hour."""
    if held.hour != now_hour:
        return None
    if (held.requests_left is not None and held.requests_left < 1) or (held.bytes_left is not None and held.bytes_left < size_bytes):
        return None
    return Lease(
        now_hour,
        None if held.requests_left is None else held.requests_left - 1,
        None if held.bytes_left is None else held.bytes_left - max(0, size_bytes),
    )
