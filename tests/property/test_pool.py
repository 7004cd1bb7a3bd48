"""Warm sandboxes follow recent demand, never take more than they may, and come and go without thrashing."""

import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.core.pool import Demand, Kind, changes, wanted

NOW_S = 10_000.0
KEEP_S = 600.0
kinds = st.builds(Kind, st.sampled_from(["docker", "bwrap"]), st.integers(0, 6), st.sampled_from([0.5, 1.0]), st.sampled_from(["", "img"]))
few_kinds = st.sampled_from([Kind("docker", 3, 1.0), Kind("docker", 3, 2.0), Kind("bwrap", 1, 1.0), Kind("bwrap", 5, 1.0, "img")])
ages_s = st.one_of(st.integers(-300, 700), st.integers(0, 90), st.sampled_from([0, 1, 59, 60, 61, 119, 120])).map(float)
demands_ = st.lists(
    st.builds(
        lambda kind, age_s, deadline_ms: Demand(kind, NOW_S - age_s, deadline_ms),
        st.one_of(few_kinds, few_kinds, kinds),
        ages_s,
        st.sampled_from([0, 50, 100, 101, 1000, 5000]),
    ),
    max_size=14,
)
byte_counts = st.integers(-2, 60)
counts = st.integers(-1, 12)


def hold(demands, free_bytes=10**6, most=10**6) -> dict[Kind, int]:
    return wanted(demands, free_bytes=free_bytes, most=most, now_s=NOW_S, keep_s=KEEP_S)


def bursts(demands) -> dict[Kind, int]:
    """The most starts of each kind within a minute that begins with one of them, found by trying every beginning."""
    times: dict[Kind, list[float]] = {}
    for demand in demands:
        if NOW_S - demand.at_s < KEEP_S:
            times.setdefault(demand.kind, []).append(min(NOW_S, demand.at_s))
    return {kind: max(sum(start <= at < start + 60 for at in mine) for start in mine) for kind, mine in times.items()}


@given(demands_, byte_counts, counts)
def test_no_more_is_held_than_memory_number_and_bursts_allow(demands, free_bytes, most):
    held = hold(demands, free_bytes, most)
    assert sum(held.values()) <= max(0, most)
    assert not held or sum(kind.memory_bytes * count for kind, count in held.items()) <= free_bytes
    burst = bursts(demands)
    assert all(1 <= count <= burst.get(kind, 0) for kind, count in held.items())


@given(demands_, byte_counts, counts)
@settings(max_examples=500, deadline=None)
def test_as_many_are_held_as_can_be(demands, free_bytes, most):
    sizes = sorted(kind.memory_bytes for kind, count in bursts(demands).items() for _ in range(count))
    best = max(count for count in range(len(sizes) + 1) if count == 0 or (count <= most and sum(sizes[:count]) <= free_bytes))
    assert sum(hold(demands, free_bytes, most).values()) == best


@given(demands_, byte_counts, st.integers(0, 20), counts)
def test_more_memory_never_yields_fewer(demands, free_bytes, more_bytes, most):
    assert sum(hold(demands, free_bytes + more_bytes, most).values()) >= sum(hold(demands, free_bytes, most).values())


@given(demands_, byte_counts, counts, st.integers(0, 2**32))
def test_the_order_of_the_demands_changes_nothing(demands, free_bytes, most, seed):
    shuffled = random.Random(seed).sample(demands, len(demands))
    assert list(hold(shuffled, free_bytes, most).items()) == list(hold(demands, free_bytes, most).items())


@given(demands_, byte_counts, counts, st.floats(0.001, 1e9))
def test_a_demand_of_the_future_counts_as_one_of_now(demands, free_bytes, most, ahead_s):
    later = [Demand(d.kind, d.at_s + ahead_s if d.at_s >= NOW_S else d.at_s, d.deadline_ms) for d in demands]
    now = [Demand(d.kind, min(NOW_S, d.at_s), d.deadline_ms) for d in demands]
    assert hold(later, free_bytes, most) == hold(now, free_bytes, most)


@given(demands_, st.integers(0, 12))
def test_of_two_equally_large_kinds_the_one_with_every_demand_of_the_other_and_more_gets_no_fewer(demands, most):
    much, little = Kind("docker", 2, 1.0, "a"), Kind("docker", 2, 1.0, "b")
    of_little = [Demand(little, d.at_s, d.deadline_ms) for d in demands[::2]]
    of_much = [Demand(much, d.at_s, d.deadline_ms) for d in demands]
    held = hold(of_little + of_much, most=most)
    assert held.get(much, 0) >= held.get(little, 0)


@given(st.floats(0, 500), st.floats(1, 99), st.sampled_from([0, 100, 1000, 5000]), st.integers(1, 5))
def test_where_there_is_room_for_one_it_is_the_kind_needed_more_lately_more_often_or_sooner(age_s, older_s, deadline_ms, times):
    a, b = Kind("docker", 2, 1.0, "a"), Kind("docker", 2, 1.0, "b")
    late, early = Demand(b, NOW_S - age_s, deadline_ms), Demand(a, NOW_S - age_s - older_s, deadline_ms)
    assert hold([early, late], most=1) == {b: 1}
    assert hold([Demand(a, late.at_s, deadline_ms)] * times + [late] * (times + 1), most=1) == {b: 1}
    for loose_ms, tight_ms in ((5000, 1000), (1000, 100), (101, 100), (1001, 1000)):
        assert hold([Demand(a, late.at_s, loose_ms), Demand(b, late.at_s, tight_ms)], most=1) == {b: 1}


@given(st.lists(st.floats(0, 599), min_size=1, max_size=12), st.integers(0, 2**32))
def test_two_kinds_with_the_same_demands_in_another_order_weigh_the_same(ages, seed):
    a, b = Kind("docker", 2, 1.0, "a"), Kind("docker", 2, 1.0, "b")
    shuffled = random.Random(seed).sample(ages, len(ages))
    assert hold([Demand(a, NOW_S - age_s, 50) for age_s in ages] + [Demand(b, NOW_S - age_s, 50) for age_s in shuffled], most=1) == {a: 1}


def test_kinds_share_by_weight():
    a, b = Kind("docker", 2, 1.0, "a"), Kind("docker", 2, 1.0, "b")
    assert hold([Demand(a, NOW_S, 5000)] * 20 + [Demand(b, NOW_S, 5000)] * 10, most=6) == {a: 4, b: 2}
    assert hold([Demand(a, NOW_S - KEEP_S / 4, 5000)] * 20 + [Demand(b, NOW_S, 5000)] * 20, most=6) == {a: 2, b: 4}


def test_without_recent_demand_nothing_is_held():
    kind = Kind("docker", 2, 1.0)
    assert hold([]) == hold([Demand(kind, NOW_S - KEEP_S, 50)]) == {}
    assert wanted([Demand(kind, NOW_S, 50)], free_bytes=9, most=9, now_s=NOW_S, keep_s=0.0) == {}


def test_as_many_as_were_started_within_one_minute_are_held():
    kind = Kind("docker", 2, 1.0)
    assert hold([Demand(kind, NOW_S, 50), Demand(kind, NOW_S - 60, 50)]) == {kind: 1}
    assert hold([Demand(kind, NOW_S, 50), Demand(kind, NOW_S - 59, 50), Demand(kind, NOW_S - 61, 50)]) == {kind: 2}


def test_those_that_are_still_there_leave_room_for_few_new_ones():
    small, large = Kind("docker", 3, 1.0), Kind("docker", 5, 1.0)
    assert changes({small: 3}, {"w1": large}, young=set()) == ([small], ["w1"])
    assert changes({small: 3}, {"w1": large}, young={"w1"}) == ([small], [])
    assert changes({small: 1}, {"w1": large}, young={"w1"}) == ([], [])


wants = st.dictionaries(few_kinds, st.integers(0, 3))
haves = st.dictionaries(st.sampled_from([f"w{number}" for number in range(8)]), few_kinds)


def cost(kinds_) -> tuple[int, int]:
    return len(kinds_), sum(kind.memory_bytes for kind in kinds_)


@given(wants, haves, st.sets(st.sampled_from([f"w{number}" for number in range(8)])), st.integers(0, 2**32))
@settings(max_examples=500, deadline=None)
def test_the_warm_ones_become_what_is_wanted_whatever_part_of_the_changes_is_made_and_never_exceed_it(want, have, young, seed):
    rnd = random.Random(seed)
    all_wanted = [kind for kind, count in want.items() for _ in range(count)]
    bound = [max(pair) for pair in zip(cost(all_wanted), cost(have.values()), strict=True)]
    names = iter(range(10**6))
    for number in range(40):
        to_start, to_stop = changes(want, have, young=young)
        assert (to_start, to_stop) == changes(dict(reversed(want.items())), dict(reversed(have.items())), young=young)
        assert not young & set(to_stop)
        moves = [*to_start, *to_stop]
        if rnd.random() < 0.5:
            rnd.shuffle(moves)
        for move in moves[: rnd.randint(0, len(moves))] if number < 10 else moves:
            if isinstance(move, Kind):
                have = {**have, f"n{next(names)}": move}
            else:
                assert sum(kind == have[move] for kind in have.values()) > want.get(have[move], 0), "one that is wanted was stopped"
                have = {name: kind for name, kind in have.items() if name != move}
            assert all(now <= most for now, most in zip(cost(have.values()), bound, strict=True))
        if number >= 20:
            young = set()
    assert sorted(have.values()) == sorted(all_wanted)


@given(demands_, counts)
def test_a_weight_is_a_number_however_old_or_near_the_demand(demands, most):
    near = [Demand(d.kind, math.nextafter(NOW_S - KEEP_S, NOW_S), d.deadline_ms) for d in demands]
    assert sum(hold(near, most=most).values()) <= len(near)
