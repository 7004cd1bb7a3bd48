"""A call goes where it is expected to be done first; a new replica is trusted little by little."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.core.balance import ReplicaView, choose, depth_of, expected_ms
from edge_agent.core.estimate import CostCurve, Estimate, Measured

NOW_S = 1000.0


def straight(per_row_ms: float, count: int = 50) -> CostCurve:
    """Of which every row costs the same."""
    if count == 0:
        return CostCurve()
    return CostCurve((Measured(1, 1.0, Estimate(per_row_ms, 0.0, count, NOW_S)),), count, NOW_S)


@st.composite
def replicas(draw):
    running = draw(st.integers(0, 4))
    per_row_ms = draw(st.one_of(st.integers(1, 9).map(float), st.floats(0.01, 50)))
    return ReplicaView(
        name="r",
        outstanding_rows=running * draw(st.integers(1, 3)),
        depth=draw(st.integers(1, 5)),
        running=running,
        curve=straight(per_row_ms, draw(st.sampled_from([0, 1, 50]))),
        since_s=NOW_S - draw(st.sampled_from([0.0, 1.0, 5.0, 9.0, 10.0, 11.0, 900.0])),
        answered=draw(st.sampled_from([0, 1, 4, 7, 8, 9, 500])),
    )


def per_row_ms(curve: CostCurve) -> float:
    return curve.points[0].estimate.mean_ms if curve.points else 0.0


def takes_ms(view: ReplicaView, rows: int, typical: CostCurve) -> float:
    """All rows one after the other, at most three times as slow while it is new."""
    part_new = min(max(0.0, 1 - view.answered / 8), max(0.0, 1 - (NOW_S - view.since_s) / 10))
    own = per_row_ms(view.curve) if view.curve.count else per_row_ms(typical)
    each_ms = (per_row_ms(typical) if typical.count else own) * (1 + 2 * part_new) if part_new > 0 else own
    return (view.outstanding_rows + rows) * each_ms


def has_place(view: ReplicaView) -> bool:
    is_new = view.answered < 8 and NOW_S - view.since_s < 10
    return view.running < (1 if is_new else view.depth)


@given(st.lists(replicas(), max_size=5), st.integers(1, 4), st.floats(0.1, 20), st.sampled_from([0, 50]))
@settings(max_examples=500, deadline=None)
def test_a_call_goes_to_a_free_place_where_it_is_done_first(views, rows, usual_ms, count):
    typical = straight(usual_ms, count)
    chosen = choose(views, rows, typical=typical, now_s=NOW_S)
    free = [view for view in views if has_place(view)]
    if chosen is None:
        assert not free
        return
    assert has_place(views[chosen])
    best_ms = min(takes_ms(view, rows, typical) for view in free)
    assert takes_ms(views[chosen], rows, typical) <= best_ms * (1 + 1e-9)
    for view in views:
        assert math.isclose(expected_ms(view, rows, typical=typical, now_s=NOW_S), takes_ms(view, rows, typical), rel_tol=1e-9)


def test_of_equals_the_emptier_one_and_then_the_first_is_chosen():
    def one(rows: int) -> ReplicaView:
        return ReplicaView("r", rows, 4, min(rows, 1), straight(0.0), 0.0, 99)

    assert choose([one(3), one(1), one(1)], 1, typical=straight(0.0), now_s=NOW_S) == 1
    assert choose([], 1, typical=straight(1.0), now_s=NOW_S) is None


@given(st.floats(0, 12), st.floats(0, 12), st.integers(0, 9), st.integers(0, 9))
def test_trust_in_a_new_replica_only_grows(age_s, more_s, answered, more):
    def new(age_s: float, answered: int) -> ReplicaView:
        return ReplicaView("r", 0, 4, 0, straight(5.0), NOW_S - age_s, answered)

    typical = straight(5.0)
    young = expected_ms(new(age_s, answered), 1, typical=typical, now_s=NOW_S)
    older = expected_ms(new(age_s + more_s, answered + more), 1, typical=typical, now_s=NOW_S)
    assert 5.0 - 1e-9 <= older <= young + 1e-9 <= 15.0 + 1e-6


def test_a_first_run_that_was_slow_is_not_held_against_a_new_replica():
    slow_start = ReplicaView("r", 0, 4, 0, straight(500.0, 1), NOW_S, 1)
    assert expected_ms(slow_start, 1, typical=straight(5.0), now_s=NOW_S) <= 15.0


@given(st.one_of(st.floats(0, 3), st.floats(3, 60), st.sampled_from([20.0, 1.0, 0.5, 0.125, 0.1])))
def test_calls_are_given_ahead_only_where_a_replica_would_else_idle(mean_ms):
    depth = depth_of(straight(mean_ms))
    assert 1 <= depth <= 8
    if mean_ms >= 20:
        assert depth == 1
    elif mean_ms >= 1:
        assert depth == 2
    else:
        assert depth == 8 or (depth - 1) * mean_ms <= 1 <= depth * mean_ms * (1 + 1e-9)
    assert depth_of(CostCurve()) == 1
