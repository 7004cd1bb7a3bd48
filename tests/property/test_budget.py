"""The cloud budget is never exceeded in sum: not by several processes, nor over their deaths, nor when the clock jumps."""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.core.budget import NOTHING, Account, Lease, lease, spend
from skerry.wire.messages import CloudBudget

limits = st.one_of(st.none(), st.integers(0, 12), st.integers(0, 400))
budgets = st.builds(CloudBudget, requests_per_hour=limits, bytes_per_hour=limits)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 2), st.integers(0, 60)),
        st.tuples(st.just("ask"), st.integers(0, 2), st.integers(0, 60)),
        st.tuples(st.just("kill"), st.integers(0, 2), st.just(0)),
        st.tuples(st.just("clock"), st.sampled_from([1, 1, -1, 5, -3]), st.just(0)),
    ),
    max_size=120,
)


@given(budgets, steps, st.sampled_from([0.02, 0.2, 0.0, 1.0]))
@settings(max_examples=600, deadline=None)
def test_no_clock_hour_ever_sees_more_than_its_budget(budget, story, share):
    account, held, hour = Account(), [NOTHING] * 3, 500_000
    spent: dict[int, list[int]] = {}
    for what, who, size_bytes in story:
        if what == "clock":
            hour += who
        elif what == "kill":
            held[who] = NOTHING
            account = msgspec.json.decode(msgspec.json.encode(account), type=Account)
        elif what == "ask":
            left = spend(held[who], size_bytes, now_hour=hour)
            if left is None:
                account, held[who] = lease(
                    account, budget, now_hour=hour, want_requests=1, want_bytes=size_bytes, share=share, held=held[who]
                )
                left = spend(held[who], size_bytes, now_hour=hour)
            if left is not None:
                held[who] = left
                so_far = spent.setdefault(hour, [0, 0])
                so_far[0] += 1
                so_far[1] += size_bytes
    for requests, size_bytes in spent.values():
        assert budget.requests_per_hour is None or requests <= budget.requests_per_hour
        assert budget.bytes_per_hour is None or size_bytes <= budget.bytes_per_hour


@given(budgets, st.lists(st.integers(0, 60), max_size=60), st.sampled_from([0.02, 0.2, 1.0]))
@settings(max_examples=300, deadline=None)
def test_one_process_that_lives_may_spend_the_whole_budget(budget, sizes, share):
    """What it asks for is refused only where it would exceed the budget."""
    account, held, requests, total_bytes = Account(), NOTHING, 0, 0
    for size_bytes in sizes:
        left = spend(held, size_bytes, now_hour=7)
        if left is None:
            account, held = lease(account, budget, now_hour=7, want_requests=1, want_bytes=size_bytes, share=share, held=held)
            left = spend(held, size_bytes, now_hour=7)
        fits = (budget.requests_per_hour is None or requests < budget.requests_per_hour) and (
            budget.bytes_per_hour is None or total_bytes + size_bytes <= budget.bytes_per_hour
        )
        assert (left is not None) == fits
        if left is not None:
            held, requests, total_bytes = left, requests + 1, total_bytes + size_bytes


@given(st.integers(0, 5000), st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 10**5))
def test_a_lease_is_small_so_that_a_process_that_dies_loses_little(requests, size_bytes, want, want_bytes):
    budget = CloudBudget(requests, size_bytes)
    account, held = lease(Account(), budget, now_hour=3, want_requests=want, want_bytes=want_bytes, share=0.02)
    assert (account.requests, account.bytes) == (held.requests_left, held.bytes_left)
    if want > requests or want_bytes > size_bytes:
        assert (held.requests_left, held.bytes_left) == (0, 0), "not enough is nothing"
    else:
        assert want <= held.requests_left <= max(want, requests / 50)
        assert want_bytes <= held.bytes_left <= max(want_bytes, size_bytes / 50)


def test_a_clock_that_went_back_is_given_nothing_until_it_has_caught_up():
    budget = CloudBudget(10, None)
    account, held = lease(Account(), budget, now_hour=8, want_requests=10, share=0.02)
    assert held == Lease(8, 10, None)
    assert lease(account, budget, now_hour=7, share=0.02) == (account, NOTHING)
    assert spend(held, 1, now_hour=7) is None
    assert spend(held, 1, now_hour=9) is None
    assert lease(account, budget, now_hour=8, share=0.02)[1].requests_left == 0
    assert lease(account, budget, now_hour=9, share=0.02)[1].requests_left == 1


@given(limits, limits)
def test_a_budget_that_was_lowered_gives_nothing_out_until_it_is_above_what_was_given(first, then):
    account, _ = lease(Account(), CloudBudget(first, None), now_hour=1, want_requests=5, share=0.5)
    after, held = lease(account, CloudBudget(then, None), now_hour=1, want_requests=5, share=0.5)
    if then is not None and account.requests + 5 > then:
        assert (after, held.requests_left) == (account, 0)


def test_the_empty_account_and_lease_are_worth_nothing_in_any_hour():
    assert spend(NOTHING, 0, now_hour=-1) is None
    assert spend(NOTHING, 0, now_hour=0) is None
