"""A request is never queued to die, never sent where it must not go, and a bad estimate does not shut a box for ever."""

import math
from itertools import permutations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.core.estimate import CostCurve, Estimate, Link, Measured
from edge_agent.core.routing import PROBE_AFTER_S, Forward, Here, LocalView, Refuse, UpstreamView, decide, in_words

NOW_S = 1000.0
ages_s = st.sampled_from([0.0, 0.3, PROBE_AFTER_S, 2.0, 4.9, 5.1, 900.0])
times_ms = st.one_of(*[st.integers(0, 40).map(float)] * 3, st.floats(0, 5000), st.floats(5000, 60_000))


@st.composite
def estimates(draw):
    if not draw(st.integers(0, 4)):
        return Estimate()
    mean_ms = draw(times_ms)
    return Estimate(mean_ms, mean_ms * draw(st.sampled_from([0.0, 0.25, 1.0])), draw(st.integers(1, 20)), NOW_S - draw(ages_s))


def curve_of(service: Estimate) -> CostCurve:
    """Of runs of one row."""
    return CostCurve((Measured(1, 1.0, service),), service.count, service.at_s) if service.count else CostCurve()


@st.composite
def links(draw):
    seen = draw(estimates())
    per_byte = draw(st.sampled_from([0.0, 0.0, 0.001, 0.1]))
    return Link(seen.mean_ms, per_byte, seen.deviation_ms, seen.count, seen.at_s, 1e9, seen.mean_ms)


@st.composite
def locals_(draw):
    ahead = draw(st.integers(0, 5))
    return LocalView(
        slots=draw(st.sampled_from([0, 0, 1, 1, 2, 3])),
        running=draw(st.integers(0, 4)),
        waiting=draw(st.integers(ahead, 6)),
        queue_limit=draw(st.sampled_from([0, 3, 9, 9, 9])),
        service=curve_of(draw(estimates())),
        ahead=ahead,
        ahead_rows=ahead,
        kept=draw(st.sampled_from([0, 0, 1, 4])),
        makes_way=draw(st.sampled_from([False, False, True])),
        pushed_by=draw(st.sampled_from([0.0, 0.0, 0.5, 3.0])),
    )


upstream = st.builds(
    UpstreamView,
    node=st.sampled_from("uvw"),
    tier=st.sampled_from(["cloud", "edge"]),
    link=links(),
    service=estimates(),
    is_open=st.sampled_from([False, False, False, True]),
    is_trial=st.sampled_from([False, False, True]),
    running=st.integers(0, 2),
    limit=st.sampled_from([1, 3, 9]),
    has_budget=st.sampled_from([True, True, False]),
)
upstreams_ = st.lists(upstream, max_size=3, unique_by=lambda upstream: upstream.node)
SLACK = 1.001
"""How far the code may be more careful than the plain sum below before it turns away what it could do."""


def here_takes_ms(local: LocalView) -> float:
    """A round of all slots, a fifth longer than usual, for every ``slots`` requests before this one, and then a careful turn of its own.

    The rounds get as much longer as those of higher priority leave less of the time, at most twenty times.
    """
    if local.slots == 0:
        return math.inf
    service = local.service.points[0].estimate if local.service.points else Estimate()
    rounds, before = 0, local.running + local.ahead + local.kept
    while before >= local.slots:
        rounds, before = rounds + 1, before - local.slots
    return (
        rounds * service.mean_ms * 6 / 5 * min(20.0, 1 / max(0.001, 1 - local.pushed_by))
        + service.mean_ms
        + doubt_ms(service.deviation_ms, service.at_s)
    )


def doubt_ms(deviation_ms: float, at_s: float) -> float:
    """Three deviations, half of it gone every half second."""
    return 3 * deviation_ms * 4.0 ** -min(max(0.0, NOW_S - at_s), 100.0)


def there_takes_ms(upstream: UpstreamView, request) -> float:
    """The way and the work there: each as it was lately, or as a first one counts."""
    link, service, local = upstream.link, upstream.service, request["local"].service
    way_ms = 20.0
    if link.count and NOW_S - link.at_s <= 5.0:
        way_ms = link.round_trip_ms + link.ms_per_byte * request["size_bytes"] + doubt_ms(link.deviation_ms, link.at_s)
    work_ms = 2 * local.points[0].estimate.mean_ms if local.points else 0.0
    if service.count and NOW_S - service.at_s <= 5.0:
        work_ms = service.mean_ms + doubt_ms(service.deviation_ms, service.at_s)
    return way_ms + work_ms


def is_free(upstream: UpstreamView) -> bool:
    return not upstream.is_open and upstream.running < upstream.limit and (upstream.tier == "edge" or upstream.has_budget)


def may_leave(request) -> bool:
    return not request["forwarded"] and request["split"] != "edge" and request["may_leave"]


def may_make_it(upstream: UpstreamView, request) -> bool:
    return is_free(upstream) and there_takes_ms(upstream, request) <= request["remaining_ms"] * SLACK + 1e-6


def must_make_it(upstream: UpstreamView, request) -> bool:
    return is_free(upstream) and there_takes_ms(upstream, request) * SLACK <= request["remaining_ms"] - 1e-6


@st.composite
def requests_(draw):
    """The time that is left is often near what it takes here, there, or first there and then here or at another."""
    request = {
        "split": draw(st.sampled_from(["edge", "cloud", "cloud", "overflow", "overflow"])),
        "local": draw(locals_()),
        "upstreams": draw(upstreams_),
        "forwarded": draw(st.sampled_from([*[False] * 7, True])),
        "may_leave": draw(st.sampled_from([*[True] * 7, False])),
        "size_bytes": draw(st.sampled_from([0, 100, 100_000])),
    }
    here_ms = here_takes_ms(request["local"]) if request["local"].slots else 0.0
    there_ms = [there_takes_ms(upstream, request) for upstream in request["upstreams"]]
    in_turn_ms = [max(10.0, first_ms) + second_ms for first_ms, second_ms in permutations(there_ms, 2)]
    near_ms = draw(st.sampled_from([here_ms, *there_ms, *(here_ms + each_ms for each_ms in there_ms), *in_turn_ms, *in_turn_ms]))
    remaining_ms = st.one_of(
        st.one_of(st.integers(0, 200).map(float), st.floats(-1000, 20_000)),
        *[st.one_of(st.floats(-5, 20), st.floats(0, 100)).map(lambda off_ms: near_ms + off_ms)] * 4,
    )
    return {**request, "remaining_ms": draw(remaining_ms)}


@st.composite
def two_ways_(draw):
    """No replica here, and an upstream that failed before beside one that did not."""
    request = draw(requests_())
    tried, other = draw(st.permutations([*request["upstreams"], *draw(st.lists(upstream, min_size=2, max_size=2))]))[:2]
    pair = [msgspec.structs.replace(tried, node="t", is_trial=True), msgspec.structs.replace(other, node="o", is_trial=False)]
    first_ms, second_ms = (there_takes_ms(one, request) for one in pair)
    remaining_ms = draw(st.floats(-20, 20)) + draw(st.sampled_from([first_ms, second_ms, max(10.0, first_ms) + second_ms]))
    return {
        **request,
        "local": msgspec.structs.replace(request["local"], slots=0, running=0),
        "upstreams": pair,
        "remaining_ms": remaining_ms,
    }


requests = requests_()


def has_room(local: LocalView) -> bool:
    return local.slots > 0 and (local.waiting < local.queue_limit or local.makes_way)


def taken_of(decision: Forward, request) -> UpstreamView:
    return next(upstream for upstream in request["upstreams"] if upstream.node == decision.node)


def second_way_ms(decision: Forward, request) -> float:
    """What the fastest other way takes: this box with nobody before the request, or an upstream that did not fail before."""
    taken, alone = taken_of(decision, request), msgspec.structs.replace(request["local"], running=0, ahead=0, kept=0)
    others = [one for one in request["upstreams"] if one is not taken and not one.is_trial and may_make_it(one, request)]
    return min([here_takes_ms(alone), *(there_takes_ms(one, request) for one in others)])


@given(requests)
@settings(max_examples=300, deadline=None)
def test_nothing_is_queued_where_there_is_no_slot_no_room_or_no_time(request):
    local, decision = request["local"], decide(**request, now_s=NOW_S)
    if isinstance(decision, Here):
        assert has_room(local)
        is_idle = local.running + local.waiting + local.kept == 0
        is_probe = is_idle and NOW_S - local.service.at_s >= 1.0 and request["remaining_ms"] > 0
        assert is_probe or here_takes_ms(local) <= request["remaining_ms"] * SLACK + 1e-6
        assert decision.reason


@given(requests)
@settings(max_examples=500, deadline=None)
def test_a_request_is_passed_on_only_to_whom_may_have_it_and_can_make_it(request):
    decision = decide(**request, now_s=NOW_S)
    if not isinstance(decision, Forward):
        return
    assert may_leave(request), "a forwarded request goes no further, and some never leave"
    taken = taken_of(decision, request)
    assert may_make_it(taken, request)
    assert decision.reason
    assert decision.is_trial == taken.is_trial
    for other in request["upstreams"]:
        counts = must_make_it(other, request) and not other.is_trial and not taken.is_trial
        if counts and (request["split"] != "cloud" or other.tier == taken.tier):
            dearest = 1.1 if taken.tier == "edge" and other.tier == "cloud" else 1.0
            assert there_takes_ms(taken, request) <= there_takes_ms(other, request) * dearest * SLACK + 1e-6, (
                "another one is faster for sure"
            )
            if taken.tier == "cloud" and other.tier == "edge":
                assert there_takes_ms(taken, request) <= there_takes_ms(other, request) * SLACK / 1.1 + 1e-6, "a neighbour would have done"


@given(st.one_of(requests, two_ways_()))
@settings(max_examples=800, deadline=None)
def test_a_trial_is_for_a_request_that_others_still_make_afterwards_or_that_nobody_else_would(request):
    decision = decide(**request, now_s=NOW_S)
    if isinstance(decision, Forward) and decision.is_trial:
        others = [upstream for upstream in request["upstreams"] if not upstream.is_trial and must_make_it(upstream, request)]
        is_followed = (
            decision.hedge_in_ms is not None
            and decision.hedge_in_ms + second_way_ms(decision, request) + 2.0 <= request["remaining_ms"] * SLACK
        )
        assert decision.is_kept or not others or is_followed


@given(requests)
@settings(max_examples=500, deadline=None)
def test_the_edge_answer_stays_possible_whatever_the_other_box_does(request):
    local, decision = request["local"], decide(**request, now_s=NOW_S)
    if not isinstance(decision, Forward):
        return
    fits = has_room(local) and here_takes_ms(local) * SLACK <= request["remaining_ms"] - 1e-6
    if fits:
        assert decision.is_kept
    if decision.is_kept:
        assert has_room(local)
        assert decision.hedge_in_ms is not None
        assert decision.hedge_in_ms + here_takes_ms(local) <= request["remaining_ms"] * SLACK + 1e-6
    if decision.hedge_in_ms is not None:
        due_ms = max(10.0, there_takes_ms(taken_of(decision, request), request))
        assert 0 <= decision.hedge_in_ms <= due_ms * SLACK + 1e-6, "an overdue answer is not waited for"
        latest_ms = request["remaining_ms"] - here_takes_ms(local) - 2.0
        assert decision.hedge_in_ms >= min(due_ms, latest_ms) / SLACK - 1e-2, "not before it is overdue or must be"


@given(requests)
@settings(max_examples=300, deadline=None)
def test_a_refusal_says_why_and_when_to_come_again_and_comes_only_when_nobody_can(request):
    local, decision = request["local"], decide(**request, now_s=NOW_S)
    if isinstance(decision, Refuse):
        assert 1 <= decision.retry_after_s <= 30
        assert decision.reason
        if may_leave(request):
            assert not any(must_make_it(upstream, request) for upstream in request["upstreams"])
            assert all(upstream.node + ": " in decision.reason for upstream in request["upstreams"]), "each is named with its reason"
        assert not has_room(local) or here_takes_ms(local) * SLACK > request["remaining_ms"] - 1e-6


@given(requests, st.floats(0.001, 200))
@settings(max_examples=300, deadline=None)
def test_what_fits_here_stays_here_unless_the_cloud_was_asked_for(request, spare_ms):
    """But for the trial of a box that failed before, for which others must wait here and the time to do it here must be kept."""
    local = request["local"]
    if has_room(local):
        request = {**request, "remaining_ms": here_takes_ms(local) * SLACK + spare_ms}
        decision = decide(**request, now_s=NOW_S)
        assert not isinstance(decision, Refuse)
        if isinstance(decision, Forward):
            assert may_make_it(taken_of(decision, request), request)
            if request["split"] == "cloud":
                assert taken_of(decision, request).tier == "cloud"
            else:
                assert decision.is_trial
                assert local.running + local.ahead + local.kept >= local.slots
                both_ms = there_takes_ms(taken_of(decision, request), request) + here_takes_ms(local)
                assert both_ms <= request["remaining_ms"] * SLACK + 1e-6


@given(requests, st.floats(0, 5000))
@settings(max_examples=250, deadline=None)
def test_more_time_never_turns_an_answer_into_a_refusal(request, more_ms):
    if not isinstance(decide(**request, now_s=NOW_S), Refuse):
        roomier = {**request, "remaining_ms": request["remaining_ms"] + more_ms}
        assert not isinstance(decide(**roomier, now_s=NOW_S), Refuse)


@given(requests, st.floats(1, 1e5))
@settings(max_examples=150, deadline=None)
def test_an_idle_replica_with_a_bad_old_estimate_is_tried_again(request, mean_ms):
    service = Estimate(mean_ms, mean_ms, 5, NOW_S - PROBE_AFTER_S)
    idle = LocalView(slots=1, running=0, waiting=0, queue_limit=2, service=curve_of(service))
    request = {**request, "local": idle, "remaining_ms": max(1.0, request["remaining_ms"])}
    assert not isinstance(decide(**request, now_s=NOW_S), Refuse)
    fresh = msgspec.structs.replace(idle, service=curve_of(msgspec.structs.replace(service, at_s=NOW_S - PROBE_AFTER_S / 2)))
    alone = {**request, "local": fresh, "upstreams": [], "remaining_ms": mean_ms / 2}
    assert isinstance(decide(**alone, now_s=NOW_S), Refuse), "one probe, not a stream of them"


@given(requests)
def test_the_order_in_which_upstreams_are_listed_changes_nothing(request):
    turned = {**request, "upstreams": request["upstreams"][::-1]}
    assert decide(**request, now_s=NOW_S) == decide(**turned, now_s=NOW_S)


@given(requests)
@settings(max_examples=100, deadline=None)
def test_where_no_replica_is_ready_a_request_goes_to_a_free_upstream_if_it_may_leave_at_all(request):
    free = UpstreamView("free", "cloud", Link(1.0, 0.0, 0.0, 9, NOW_S, 1e9, 1.0), Estimate(1.0, 0.0, 9, NOW_S))
    nobody = msgspec.structs.replace(request["local"], slots=0, running=0, waiting=0)
    request = {**request, "local": nobody, "upstreams": [free], "remaining_ms": max(3.0, request["remaining_ms"])}
    assert isinstance(decide(**request, now_s=NOW_S), Forward if may_leave(request) else Refuse)


@given(requests)
@settings(max_examples=150, deadline=None)
def test_a_decision_carries_the_numbers_that_led_to_it(request):
    decision = decide(**request, now_s=NOW_S)
    numbers = decision.numbers
    assert numbers.remaining_ms == request["remaining_ms"]
    assert math.isclose(numbers.here_ms, here_takes_ms(request["local"]), rel_tol=1e-6, abs_tol=1e-6)
    expected = sorted(request["upstreams"], key=lambda one: one.node) if may_leave(request) else []
    assert [one.node for one in numbers.upstreams] == [one.node for one in expected]
    for said, upstream in zip(numbers.upstreams, expected, strict=True):
        assert math.isclose(said.estimate_ms, there_takes_ms(upstream, request), rel_tol=1e-6, abs_tol=1e-6)
        assert math.isclose(said.link_ms + said.remote_ms, said.estimate_ms, rel_tol=1e-9, abs_tol=1e-9)
        assert not said.why_not or not must_make_it(upstream, request)
        assert said.why_not or may_make_it(upstream, request)
    text = in_words(decision)
    assert "\n" not in text
    assert all(upstream.node in text for upstream in expected)
    assert msgspec.json.decode(msgspec.json.encode(decision))["numbers"]["remaining_ms"] == request["remaining_ms"]


@given(requests)
@settings(max_examples=300, deadline=None)
def test_where_the_cloud_is_asked_first_a_neighbour_still_comes_after_this_box(request):
    local = request["local"]
    decision = decide(**{**request, "split": "cloud"}, now_s=NOW_S)
    if isinstance(decision, Forward) and taken_of(decision, request).tier == "edge":
        assert not has_room(local) or here_takes_ms(local) * SLACK > request["remaining_ms"] - 1e-6 or decision.is_trial


@given(st.one_of(requests, two_ways_()))
@settings(max_examples=800, deadline=None)
def test_where_a_second_way_would_take_too_long_after_an_overdue_answer_there_is_no_hedge_and_else_there_is(request):
    decision = decide(**request, now_s=NOW_S)
    if isinstance(decision, Forward) and not decision.is_kept:
        due_ms, second_ms = max(10.0, there_takes_ms(taken_of(decision, request), request)), second_way_ms(decision, request)
        if decision.hedge_in_ms is not None:
            assert decision.hedge_in_ms + second_ms + 2.0 <= request["remaining_ms"] * SLACK + 1e-6
        else:
            assert (due_ms + second_ms) * SLACK + 2.0 > request["remaining_ms"] - 1e-6


def a_decision(**changes):
    busy = LocalView(slots=1, running=1, waiting=1, queue_limit=9, service=curve_of(Estimate(10.0, 0.0, 9, NOW_S)), ahead=1, ahead_rows=1)
    request = {"split": "overflow", "remaining_ms": 25.0, "local": busy, "upstreams": [], "forwarded": False}
    return decide(**{**request, **changes}, now_s=NOW_S)


def far(node, tier, total_ms, **changes) -> UpstreamView:
    link = Link(total_ms / 2, 0.0, 0.0, 9, NOW_S, 1e9, total_ms / 2)
    return UpstreamView(node, tier, link, Estimate(total_ms / 2, 0.0, 9, NOW_S), **changes)


def test_a_spent_budget_and_an_open_circuit_are_named():
    spent, is_open = far("c", "cloud", 10.0, has_budget=False), far("p", "edge", 10.0, is_open=True)
    decision = a_decision(upstreams=[spent, is_open])
    assert isinstance(decision, Refuse)
    assert "c: the cloud budget of this hour is spent" in decision.reason
    assert "p: its circuit is open" in decision.reason
    assert "but the cloud budget of this hour is spent" in in_words(a_decision(upstreams=[spent], remaining_ms=90.0)), "answered here"


def test_a_neighbour_is_asked_before_a_cloud_that_is_hardly_faster():
    assert a_decision(upstreams=[far("a", "cloud", 20.0), far("b", "edge", 20.0)]).node == "b"
    assert a_decision(upstreams=[far("a", "cloud", 19.0), far("b", "edge", 20.0)]).node == "b"
    assert a_decision(upstreams=[far("a", "cloud", 10.0), far("b", "edge", 20.0)]).node == "a"


def test_a_box_that_failed_is_tried_again_while_others_wait_here_and_there_is_time():
    failed = far("p", "edge", 20.0, is_trial=True)
    decision = a_decision(upstreams=[failed], remaining_ms=90.0)
    assert isinstance(decision, Forward)
    assert (decision.is_trial, decision.is_kept, decision.hedge_in_ms) == (True, True, 20.0)
    assert isinstance(a_decision(upstreams=[failed], remaining_ms=40.0), Here), "no time to do it here after all"
    idle = LocalView(slots=1, running=0, waiting=0, queue_limit=9, service=curve_of(Estimate(10.0, 0.0, 9, NOW_S)))
    assert isinstance(a_decision(upstreams=[failed], remaining_ms=90.0, local=idle), Here), "nobody needs it"
    assert a_decision(upstreams=[failed, far("c", "cloud", 20.0)]).node == "c", "what can't be done here is not risked"
    assert a_decision(upstreams=[failed]).is_trial, "nothing to lose"
    clouds = [far("c", "cloud", 20.0, is_trial=True), far("d", "cloud", 21.0)]
    assert a_decision(split="cloud", upstreams=clouds).node == "d", "likewise where the cloud is asked first"
    assert a_decision(split="cloud", upstreams=clouds, remaining_ms=90.0).node == "c"


def test_a_box_that_has_been_idle_measures_anew_before_it_asks_others():
    def idle_for(age_s: float) -> LocalView:
        return LocalView(slots=1, running=0, waiting=0, queue_limit=9, service=curve_of(Estimate(500.0, 0.0, 9, NOW_S - age_s)))

    assert isinstance(a_decision(upstreams=[far("c", "cloud", 10.0)], local=idle_for(5.1)), Here)
    assert isinstance(a_decision(upstreams=[far("c", "cloud", 10.0)], local=idle_for(4.9)), Forward)


def test_the_cloud_is_asked_first_but_this_box_begins_when_it_must():
    idle = LocalView(slots=1, running=0, waiting=0, queue_limit=9, service=curve_of(Estimate(60.0, 0.0, 9, NOW_S)))
    case = {"split": "cloud", "local": idle, "upstreams": [far("c", "cloud", 30.0)]}
    assert a_decision(**case, remaining_ms=150.0).hedge_in_ms == 30.0, "as soon as it is overdue"
    assert a_decision(**case, remaining_ms=80.0).hedge_in_ms == 18.0, "before it is overdue, for this box needs the rest"
    assert isinstance(a_decision(**case, remaining_ms=61.0), Here), "both would have to begin at once"
    assert not a_decision(**case, remaining_ms=50.0).is_kept
    assert isinstance(a_decision(**{**case, "upstreams": [far("p", "edge", 30.0)]}, remaining_ms=150.0), Here)


def test_requests_that_share_runs_wait_for_fewer_of_them():
    points = tuple(Measured(rows, float(rows), Estimate(8.0 + rows, 0.0, 9, NOW_S)) for rows in (1, 2, 3, 4))
    local = LocalView(
        slots=1,
        running=1,
        waiting=9,
        queue_limit=99,
        service=CostCurve(points, 36, NOW_S),
        running_rows=4,
        ahead=9,
        ahead_rows=9,
        max_rows=4,
    )
    numbers = a_decision(local=local, remaining_ms=900.0).numbers
    assert math.isclose(numbers.queue_ms, 3 * 12.0 * 1.2), "one run of four is under way and two go before the one that it shares"
    assert math.isclose(numbers.service_ms, 8.0 + 2), "its own run is the third, with the ninth of those ahead"
    alone = msgspec.structs.replace(local, max_rows=1)
    assert math.isclose(a_decision(local=alone, remaining_ms=900.0).numbers.queue_ms, (12.0 + 9 * 9.0) * 1.2)
    full = msgspec.structs.replace(local, rows=4)
    assert math.isclose(a_decision(local=full, remaining_ms=900.0).numbers.queue_ms, 4 * 12.0 * 1.2), "it shares with nobody"
