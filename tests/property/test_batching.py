"""Requests share runs where that costs nobody its deadline, and wait for company only where all are done sooner for it."""

import math

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edge_agent.core.batching import Send, WaitUntil, next_batch
from edge_agent.core.estimate import CostCurve, Estimate, Measured
from edge_agent.core.queueing import Place

NOW_S = 1000.0


class Line:
    """A run costs ``base_ms`` and ``row_ms`` for each row, and up to ``doubt_ms`` more."""

    def __init__(self, base_ms: float, row_ms: float, doubt_ms: float) -> None:
        self.base_ms, self.row_ms, self.doubt_ms = base_ms, row_ms, doubt_ms

    def ms(self, rows: int) -> float:
        return self.base_ms + self.row_ms * rows

    def at_most_ms(self, rows: int) -> float:
        return self.ms(rows) + self.doubt_ms

    def curve(self) -> CostCurve:
        points = tuple(Measured(rows, float(rows), Estimate(self.ms(rows), self.doubt_ms / 3, 9, NOW_S)) for rows in range(1, 33))
        return CostCurve(points, 288, NOW_S)


lines = st.builds(
    Line,
    st.sampled_from([0.0, 1.0, 5.0, 8.0]),
    st.sampled_from([0.1, 1.0, 3.0]),
    st.sampled_from([0.0, 0.0, 2.0]),
)


@st.composite
def queues(draw, most=10):
    """In rank order; deadlines near what a run of a few rows costs."""
    arrived = sorted(draw(st.lists(st.one_of(st.floats(0, 6), st.integers(0, 6).map(float)), min_size=1, max_size=most)), reverse=True)
    left_ms = st.one_of(st.floats(-1, 30), st.integers(0, 30).map(float), st.floats(100, 1000), st.floats(100, 1000))
    rows = st.sampled_from([1, 1, 1, 1, 2, 5, 9])
    return [Place(0, NOW_S - before_ms / 1000, NOW_S + draw(left_ms) / 1000, draw(rows)) for before_ms in arrived]


cases = st.fixed_dictionaries(
    {
        "max_rows": st.sampled_from([1, 2, 4, 8]),
        "max_wait_ms": st.sampled_from([0.0, 1.0, 5.0, 50.0]),
        "arrivals_per_s": st.one_of(st.sampled_from([0.0, 10.0, 200.0, 1000.0, 100_000.0]), st.floats(1, 5000)),
    }
)


def left_ms(place: Place) -> float:
    return (place.until_s - NOW_S) * 1000


def makes_it_alone(place: Place, line: Line) -> bool:
    return line.ms(place.rows) <= left_ms(place) - 1e-6


def fits(batch: list[Place], line: Line, max_rows: int, slack_ms: float) -> bool:
    """Whether all may share a run: it is not too large, and nobody who makes it alone is late for it, give or take ``slack_ms``."""
    rows = sum(place.rows for place in batch)
    if len(batch) > 1 and rows > max_rows:
        return False
    return all(line.at_most_ms(rows) <= left_ms(place) + slack_ms for place in batch if makes_it_alone(place, line))


@given(queues(), lines, cases)
@settings(max_examples=600, deadline=None)
def test_a_run_is_not_too_large_and_makes_nobody_late_who_would_make_it_alone(waiting, line, case):
    step = next_batch(waiting, **case, curve=line.curve(), now_s=NOW_S)
    if not isinstance(step, Send):
        return
    assert 1 <= step.count <= len(waiting)
    if step.count > 1:
        assert fits(waiting[: step.count], line, case["max_rows"], 1e-5)
    if step.count < len(waiting):
        borderline = any(abs(line.ms(place.rows) - left_ms(place)) < 1e-5 for place in waiting)
        assert borderline or not fits(waiting[: step.count + 1], line, case["max_rows"], -1e-5), "one more would have fitted"


@given(queues(4), lines, cases)
@settings(max_examples=600, deadline=None)
def test_nobody_waits_longer_than_it_may_nor_past_its_deadline_nor_for_nothing(waiting, line, case):
    curve = line.curve()
    step = next_batch(waiting, **case, curve=curve, now_s=NOW_S)
    if isinstance(step, Send):
        return
    rows = sum(place.rows for place in waiting)
    assert step.at_s > NOW_S
    assert case["arrivals_per_s"] > 0
    gap_ms = 1000 / case["arrivals_per_s"]
    assert rows < case["max_rows"], "it was full"
    for place in waiting:
        assert (step.at_s - place.arrived_s) * 1000 <= case["max_wait_ms"] + 1e-6
        assert (place.until_s - step.at_s) * 1000 >= line.at_most_ms(rows) - 1e-6, "late for company"
    assert (step.at_s - max(place.arrived_s for place in waiting)) * 1000 <= 3 * gap_ms + 1e-6, "who is overdue is not waited for"
    more = math.ceil(rows / len(waiting))
    assert gap_ms + line.ms(rows + more) <= line.ms(rows) + line.ms(more) + 1e-6, "two runs would be done sooner"
    again = next_batch(waiting, **case, curve=curve, now_s=step.at_s)
    assert again == Send(len(waiting))
    halfway = next_batch(waiting, **case, curve=curve, now_s=(NOW_S + step.at_s) / 2)
    assert halfway in (step, Send(len(waiting)))


@given(st.integers(1, 6), st.sampled_from([0.0, 2.0]), st.floats(1, 20))
def test_where_company_is_near_and_pays_it_is_waited_for(number, doubt_ms, base_ms):
    """The next comes after a tenth of what it saves."""
    line = Line(base_ms, 0.1, doubt_ms)
    waiting = [Place(0, NOW_S - 0.00001 * (number - at), NOW_S + 10.0, 1) for at in range(number)]
    case = {"max_rows": 8, "max_wait_ms": base_ms, "curve": line.curve(), "now_s": NOW_S}
    step = next_batch(waiting, **case, arrivals_per_s=10_000 / base_ms)
    assert isinstance(step, WaitUntil)
    assert next_batch(waiting, **case, arrivals_per_s=500 / base_ms) == Send(number), "the next comes too late"
    assert next_batch(waiting, **{**case, "max_rows": number}, arrivals_per_s=10_000 / base_ms) == Send(number), "it is full"
    assert next_batch(waiting, **{**case, "curve": CostCurve()}, arrivals_per_s=10_000 / base_ms) == Send(number), "nothing is known"
    straight = Line(0.0, base_ms, doubt_ms).curve()
    assert next_batch(waiting, **{**case, "curve": straight}, arrivals_per_s=10_000 / base_ms) == Send(number), "sharing saves nothing"


@given(st.integers(2, 50), queues(3))
def test_a_request_of_more_rows_than_a_run_may_have_goes_alone(rows, waiting):
    assume(all(left_ms(place) > 0 for place in waiting))
    large = Place(0, NOW_S - 1, NOW_S + 10.0, rows)
    line = Line(1.0, 1.0, 0.0)
    case = {"max_rows": max(1, rows - 1), "max_wait_ms": 50.0, "curve": line.curve(), "arrivals_per_s": 1e5, "now_s": NOW_S}
    assert next_batch([large, *waiting], **case) == Send(1)
    assert next_batch([large], **case) == Send(1)


def test_nobody_is_waited_for_who_would_not_fit_nor_while_somebody_who_does_not_fit_waits():
    case = {"max_wait_ms": 9.0, "curve": Line(8.0, 0.1, 0.0).curve(), "arrivals_per_s": 5000.0, "now_s": NOW_S}
    one, two, five = (Place(0, NOW_S, NOW_S + 10.0, rows) for rows in (1, 2, 5))
    assert isinstance(next_batch([two], **case, max_rows=4), WaitUntil)
    assert next_batch([two], **case, max_rows=3) == Send(1), "another of two rows would not fit"
    assert isinstance(next_batch([one, one], **case, max_rows=4), WaitUntil)
    assert next_batch([one, one, five], **case, max_rows=4) == Send(2), "the third needs the replica"
