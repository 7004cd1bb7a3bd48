"""A replica that keeps ending is tried less and less often and then no more; one that served is forgiven."""

import math

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.crash import Attempts, Ending, after
from skerry.runtime import backoff

kinds = st.sampled_from(["start_failed", "load_failed", "exited", "killed", "oom"])
endings = st.builds(
    Ending, at_s=st.integers(0, 10**6).map(float), reason_kind=kinds, ready_for_s=st.sampled_from([0.0, 0.0, 1.0, 59.9, 60.0, 900.0])
)
chances = st.floats(0, 1)
KNOWN = {"first_s": 0.5, "most_s": 30.0, "forgive_after_s": 60.0}


def points(ending: Ending) -> int:
    return {"load_failed": 2}.get(ending.reason_kind, 1)


@given(st.lists(endings, min_size=1, max_size=30), st.integers(1, 12), chances)
def test_it_is_given_up_when_the_endings_since_it_last_served_reach_the_limit(row, limit, jitter):
    attempts = Attempts()
    for number, ending in enumerate(row):
        verdict = after(ending, attempts, limit=limit, jitter=jitter, **KNOWN)
        last_good = max([at for at in range(number + 1) if row[at].ready_for_s >= 60.0], default=0)
        since = row[last_good : number + 1]
        assert verdict.attempts == Attempts(sum(points(one) for one in since), min(one.at_s for one in since))
        assert verdict.is_crash_loop == (verdict.attempts.count >= limit)
        assert (verdict.retry_in_s is None) == verdict.is_crash_loop
        attempts = verdict.attempts


@given(endings, st.integers(0, 60), chances)
def test_the_next_try_waits_as_every_other_back_off_does_but_for_the_first_of_one_that_answered(ending, count, jitter):
    verdict = after(ending, Attempts(count, 0.0), limit=10**6, jitter=jitter, **KNOWN)
    before = 0 if ending.ready_for_s >= 60.0 else count
    is_at_once = before == 0 and ending.ready_for_s > 0
    assert verdict.retry_in_s == (0.0 if is_at_once else backoff.delay_s(before, jitter, first_s=0.5, most_s=30.0))


@given(st.integers(1, 20), chances)
def test_a_crash_loop_ends_after_at_most_limit_tries_whatever_the_reason(limit, jitter):
    for kind, tries in (("exited", limit), ("load_failed", math.ceil(limit / 2))):
        attempts, waits = Attempts(), []
        for _ in range(tries):
            verdict = after(Ending(0.0, kind), attempts, limit=limit, jitter=jitter, **KNOWN)
            attempts = verdict.attempts
            waits.append(verdict.retry_in_s)
        assert waits[-1] is None
        assert None not in waits[:-1]
        assert waits[:-1] == sorted(waits[:-1])


@given(st.lists(endings, min_size=1, max_size=30).map(lambda row: [one for one in row if one.ready_for_s >= 60.0]), chances)
def test_a_replica_that_serves_long_enough_each_time_is_always_tried_again_at_once(row, jitter):
    attempts = Attempts()
    for ending in row:
        verdict = after(ending, attempts, limit=3, jitter=jitter, **KNOWN)
        assert verdict.retry_in_s == 0.0
        attempts = verdict.attempts
