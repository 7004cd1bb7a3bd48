"""Whether another box's endpoint is asked at all: closed after successes, open after failures, then tried by one request. Pure.

               OPENS_AFTER failures in a row, or a 503 with Retry-After
    closed ------------------------------------------------------------> open
      ^                                                                   | its time is up
      | the trial succeeded                                               v
      +---------------- trial under way <--- one request is sent --- half open
                            | failed, or not ended within TRIAL_MOST_S
                            +----------------------------------------> open, for about twice as long as the last time

Whoever sends reports exactly one of ``succeeded``, ``failed`` and ``cancelled`` for each ``begun``. A request that lost against its hedge
because it was overdue is a failure, not a cancellation: else an endpoint that hangs would never be found out.
"""

import msgspec

OPENS_AFTER = 2
OPEN_FIRST_S = 0.5
OPEN_MOST_S = 10.0
TRIAL_MOST_S = 10.0
"""A trial that has not ended by then counts as failed: whoever should have said how it ended is gone."""
OVERLOAD_LEAST = 0.1
OVERLOAD_MOST = 0.5
"""Between these parts of what an overloaded endpoint asks for it is left alone: it knows its queue, but not how soon that is shed."""


class Breaker(msgspec.Struct, frozen=True):
    """What is known of one endpoint, closed at first. ``failures`` are in a row; times are on the caller's clock.

    ``open_until_s`` is None where it is closed, ``trial_until_s`` where no trial is under way.
    """

    failures: int = 0
    open_until_s: float | None = None
    trial_until_s: float | None = None


def is_open(breaker: Breaker, *, now_s: float) -> bool:
    """Whether nothing may be sent now: it is left alone, or its trial is under way."""
    breaker = _settled(breaker, now_s)
    return breaker.open_until_s is not None and (breaker.trial_until_s is not None or now_s < breaker.open_until_s)


def is_trial(breaker: Breaker, *, now_s: float) -> bool:
    """Whether exactly one request may be sent now, to find out whether it answers again."""
    return breaker.open_until_s is not None and not is_open(breaker, now_s=now_s)


def begun(breaker: Breaker, *, now_s: float) -> Breaker:
    """After a request was sent: where it is half open, that was the trial."""
    breaker = _settled(breaker, now_s)
    if is_trial(breaker, now_s=now_s):
        return msgspec.structs.replace(breaker, trial_until_s=now_s + TRIAL_MOST_S)
    return breaker


def succeeded(breaker: Breaker, *, now_s: float) -> Breaker:
    """After an answer. One to a request sent before it opened does not close it early, but its failures are forgiven."""
    breaker = _settled(breaker, now_s)
    if breaker.open_until_s is not None and breaker.trial_until_s is None and now_s < breaker.open_until_s:
        return msgspec.structs.replace(breaker, failures=0)
    return Breaker()


def failed(breaker: Breaker, *, now_s: float, chance: float, retry_after_s: float = 0.0) -> Breaker:
    """After a failure; ``chance`` is a random number from 0 to 1. ``retry_after_s`` above 0: it answered that it is overloaded.

    The delay is that of skerry.runtime.backoff: half of it is certain, so that boxes do not come back in step. What fails while it is
    left alone was sent before, so it makes nothing worse: sixty requests that die together are one failure of the endpoint.
    """
    breaker = _settled(breaker, now_s)
    is_left_alone = is_open(breaker, now_s=now_s) and breaker.trial_until_s is None
    if retry_after_s > 0:
        pause_s = min(OPEN_MOST_S, retry_after_s * (OVERLOAD_LEAST + (OVERLOAD_MOST - OVERLOAD_LEAST) * chance))
        until_s = now_s + pause_s
        if is_left_alone and breaker.open_until_s is not None:
            until_s = max(until_s, breaker.open_until_s)
        return Breaker(breaker.failures, until_s)
    if is_left_alone:
        return breaker
    failures = breaker.failures + 1
    if breaker.open_until_s is None and failures < OPENS_AFTER:
        return Breaker(failures)
    return Breaker(failures, now_s + _delay_s(failures, chance))


def cancelled(breaker: Breaker, *, now_s: float) -> Breaker:
    """After the trial was cancelled for a reason that says nothing of the endpoint: another request may be the trial.

    To be called for the request that was the trial alone; another's end gives nothing back.
    """
    return msgspec.structs.replace(_settled(breaker, now_s), trial_until_s=None)


def _delay_s(failures: int, chance: float) -> float:
    ceiling_s = min(OPEN_MOST_S, OPEN_FIRST_S * 2.0 ** min(max(0, failures - OPENS_AFTER), 32))
    return ceiling_s * (0.5 + 0.5 * chance)


def _settled(breaker: Breaker, now_s: float) -> Breaker:
    """With an overdue trial counted as the failure that it is; whenever one looks, the same comes out."""
    if breaker.trial_until_s is None or now_s < breaker.trial_until_s:
        return breaker
    failures = breaker.failures + 1
    return Breaker(failures, breaker.trial_until_s + _delay_s(failures, 1.0))
