"""A few cases stand for all requests of the last hour, and take no more room than they may."""

import msgspec

from edge_agent.core.estimate import CostCurve
from edge_agent.core.replay import Case
from edge_agent.core.routing import LocalView
from edge_agent.gateway.cases import EVERY_MS, KEPT_MS, MOST, Cases

LOCAL = LocalView(slots=1, running=0, waiting=0, queue_limit=8, service=CostCurve())


def case(at_ms: int, size_bytes: int = 0) -> Case:
    return Case(at_ms, 100.0, "overflow", 90.0, LOCAL, (), size_bytes, True, at_ms / 1000)


def test_each_request_of_the_last_hour_is_stood_for_once():
    cases, noted = Cases(), []
    for at_ms in range(0, 2 * KEPT_MS, 3700):
        cases.note("a", case(at_ms))
        noted.append(at_ms)
    last = noted[-1]
    kept = cases.since("a", 0)
    slots = [one.case.at_ms // EVERY_MS for one in kept]
    assert slots == sorted(set(slots))
    assert kept[0].case.at_ms >= last - KEPT_MS - EVERY_MS
    assert sum(one.count for one in kept) == sum(1 for at_ms in noted if at_ms // EVERY_MS >= slots[0])
    later = cases.since("a", last - 60_000)
    assert later == [one for one in kept if one.case.at_ms >= last - 60_000]
    assert 5 <= len(later) <= 7


def test_any_of_the_requests_of_a_time_may_be_the_one_that_is_kept():
    kept = []
    for _ in range(2000):
        cases = Cases()
        for number in range(5):
            cases.note("a", case(number, size_bytes=number))
        (one,) = cases.since("a", 0)
        assert one.count == 5
        kept.append(one.case.size_bytes)
    assert all(300 < kept.count(number) < 500 for number in range(5)), "each of five was kept about 400 times of 2000"


def test_many_deployments_share_the_room_and_what_is_not_served_any_more_leaves_none():
    cases, names = Cases(), [f"d-{number}" for number in range(40)]
    for step in range(300):
        for name in names:
            cases.note(name, case(step * EVERY_MS))
    held = {name: cases.since(name, 0) for name in names}
    assert sum(len(each) for each in held.values()) <= MOST
    assert {len(each) for each in held.values()} == {MOST // 40}
    assert all(each[-1].case.at_ms == 299 * EVERY_MS for each in held.values())
    cases.note("late", case(300 * EVERY_MS))
    assert {len(cases.since(name, 0)) for name in names} == {MOST // 41}, "those that nobody asks for make room, too"
    cases.keep({"d-1"})
    assert [name for name in names if cases.since(name, 0)] == ["d-1"]


def test_a_clock_that_is_set_back_loses_nothing_and_takes_no_more_room():
    cases = Cases()
    for at_ms in (5 * KEPT_MS, 5 * KEPT_MS + 1, 0, 1, 2):
        cases.note("a", case(at_ms))
    assert sum(one.count for one in cases.since("a", 0)) == 5
    assert msgspec.structs.asdict(cases.since("a", 4 * KEPT_MS)[0])["count"] == 2
