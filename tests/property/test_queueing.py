"""The queue's order, who makes way, and whose time is up."""

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.queueing import Place, ahead_of, ahead_rows, hopeless, rank, to_shed

NOW_S = 1000.0
places = st.builds(
    Place,
    priority=st.sampled_from([0, 0, 1, 1, 2, 7, 2**31, -1]),
    arrived_s=st.one_of(st.integers(995, 1000).map(float), st.floats(990, 1000)),
    until_s=st.one_of(st.sampled_from([NOW_S, NOW_S + 0.005, NOW_S + 0.0051]), st.floats(999, 1001)),
    rows=st.integers(1, 4),
)
queues = st.lists(places, max_size=8)


def goes_before(one: Place, other: Place) -> bool:
    """By Triton's rule, written out: a number from 1 on before no number, the smaller before the larger, the older before the newer."""
    if (one.priority >= 1) != (other.priority >= 1):
        return one.priority >= 1
    if one.priority >= 1 and one.priority != other.priority:
        return one.priority < other.priority
    return one.arrived_s < other.arrived_s


def is_more_urgent(one: Place, other: Place) -> bool:
    return goes_before(Place(one.priority, 0.0, 0.0), Place(other.priority, 0.0, 0.0))


@given(queues)
def test_the_queue_is_served_by_priority_and_then_in_order_of_arrival(waiting):
    served = sorted(waiting, key=rank)
    for at, one in enumerate(served):
        assert not any(goes_before(later, one) for later in served[at + 1 :])
    assert all((rank(a) < rank(b)) == goes_before(a, b) for a in waiting for b in waiting)


@given(queues, places, st.integers(0, 9))
def test_the_newest_of_the_lowest_priority_makes_way_for_a_higher_one_alone(waiting, new, limit):
    shed = to_shed(waiting, new, limit=limit)
    if len(waiting) < limit:
        assert shed is None
        return
    less_urgent = [place for place in waiting if is_more_urgent(new, place)]
    if not less_urgent or limit == 0:
        assert shed == -1
        return
    assert shed is not None
    assert shed >= 0
    assert waiting[shed] in less_urgent
    assert not any(goes_before(waiting[shed], other) for other in waiting), "another one would be served after it"


@given(queues, st.floats(0, 20), st.sampled_from([0.0, 5.0]))
def test_those_whose_time_is_up_are_found_and_nobody_else(waiting, service_ms, exact_ms):
    for run_ms in (service_ms, exact_ms):
        found = hopeless(waiting, service_ms=run_ms, now_s=NOW_S)
        assert found == sorted(set(found))
        for index, place in enumerate(waiting):
            left_ms = (place.until_s - NOW_S) * 1000
            assert index in found if left_ms < run_ms - 1e-6 else True
            assert index not in found if left_ms > run_ms + 1e-6 else True


@given(queues, st.sampled_from([0, -1, 1, 2, 3, 7]))
def test_what_goes_before_a_new_request_is_what_would_be_served_before_it(waiting, priority):
    new = Place(priority, NOW_S + 1, NOW_S + 2)
    before = [place for place in waiting if goes_before(place, new)]
    assert ahead_rows(waiting, priority) == sum(place.rows for place in before)
    assert ahead_of(waiting, priority) == (len(before), sum(place.rows for place in before))
