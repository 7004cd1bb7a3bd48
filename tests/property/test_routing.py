"""A request is never queued to die, never sent where it must not go, and a bad estimate does not shut a box for ever."""

import math

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.core import estimate
from edge_agent.core.estimate import Estimate
from edge_agent.core.routing import PROBE_AFTER_S, Forward, Here, LocalView, Refuse, UpstreamView, decide

NOW_S = 1000.0
ages_s = st.sampled_from([0.0, 0.3, PROBE_AFTER_S, 2.0, 4.9, 5.1, 900.0])
times_ms = st.one_of(st.integers(0, 40).map(float), st.integers(0, 40).map(float), st.floats(0, 5000), st.floats(5000, 60_000))


@st.composite
def estimates(draw):
    if not draw(st.integers(0, 4)):
        return Estimate()
    mean_ms = draw(times_ms)
    return Estimate(mean_ms, mean_ms * draw(st.sampled_from([0.0, 0.25, 1.0])), draw(st.integers(1, 20)), NOW_S - draw(ages_s))


locals_ = st.builds(
    LocalView,
    slots=st.integers(0, 3),
    running=st.integers(0, 4),
    waiting=st.integers(0, 5),
    queue_limit=st.integers(0, 9),
    service=estimates(),
)
upstreams_ = st.lists(
    st.builds(
        UpstreamView,
        node=st.sampled_from("uvw"),
        tier=st.sampled_from(["cloud", "edge"]),
        total=estimates(),
        usable_at_s=st.sampled_from([0.0, 0.0, NOW_S, NOW_S + 0.1, NOW_S + 30]),
        running=st.integers(0, 2),
        limit=st.integers(1, 3),
    ),
    max_size=3,
    unique_by=lambda upstream: upstream.node,
)
requests = st.fixed_dictionaries(
    {
        "split": st.sampled_from(["edge", "cloud", "overflow"]),
        "remaining_ms": st.one_of(st.integers(0, 200).map(float), st.integers(0, 200).map(float), st.floats(-1000, 20_000)),
        "local": locals_,
        "upstreams": upstreams_,
        "forwarded": st.sampled_from([False, False, True]),
    }
)


SLACK = 1.001
"""How far the code may be more careful than the plain sum below before it turns away what it could do."""


def here_takes_ms(local: LocalView) -> float:
    """A round of all slots, a fifth longer than usual, for every ``slots`` requests before this one, and then a careful turn of its own."""
    if local.slots == 0:
        return math.inf
    rounds, ahead = 0, local.running + local.waiting
    while ahead >= local.slots:
        rounds, ahead = rounds + 1, ahead - local.slots
    age_s = max(0.0, NOW_S - local.service.at_s)
    doubt_ms = 3 * local.service.deviation_ms * 4.0 ** -min(age_s, 100.0)  # halves every half second
    return rounds * local.service.mean_ms * 6 / 5 + local.service.mean_ms + doubt_ms


def there_takes_ms(upstream: UpstreamView, local: LocalView) -> tuple[float, float]:
    """At best and at worst: a measurement counts between its mean and its careful value, an old or missing one as a first would."""
    if upstream.total.count == 0 or NOW_S - upstream.total.at_s > 5.0:
        first_ms = 20.0 + 2 * local.service.mean_ms
        return first_ms, first_ms
    return upstream.total.mean_ms, upstream.total.mean_ms + 3 * upstream.total.deviation_ms


def is_open(upstream: UpstreamView) -> bool:
    return upstream.usable_at_s <= NOW_S and upstream.running < upstream.limit


def may_make_it(upstream: UpstreamView, request) -> bool:
    return is_open(upstream) and there_takes_ms(upstream, request["local"])[0] <= request["remaining_ms"] + 1e-6


def must_make_it(upstream: UpstreamView, request) -> bool:
    return is_open(upstream) and there_takes_ms(upstream, request["local"])[1] <= request["remaining_ms"] - 1e-6


def has_room(local: LocalView) -> bool:
    return local.slots > 0 and local.waiting < local.queue_limit


@given(requests)
@settings(max_examples=250, deadline=None)
def test_nothing_is_queued_where_there_is_no_slot_no_room_or_no_time(request):
    local, decision = request["local"], decide(**request, now_s=NOW_S)
    if isinstance(decision, Here):
        assert has_room(local)
        is_probe = local.running + local.waiting == 0 and NOW_S - local.service.at_s >= 1.0 and request["remaining_ms"] > 0
        assert is_probe or here_takes_ms(local) <= request["remaining_ms"] + 1e-6
        assert decision.reason


@given(requests)
@settings(max_examples=250, deadline=None)
def test_a_request_is_passed_on_only_to_whom_may_have_it_and_can_make_it(request):
    decision = decide(**request, now_s=NOW_S)
    if isinstance(decision, Forward):
        assert not request["forwarded"], "a forwarded request goes no further"
        assert request["split"] != "edge"
        taken = next(upstream for upstream in request["upstreams"] if upstream.node == decision.node)
        assert may_make_it(taken, request)
        worst_ms = [there_takes_ms(upstream, request["local"])[1] for upstream in request["upstreams"] if is_open(upstream)]
        assert there_takes_ms(taken, request["local"])[0] <= min(worst_ms) + 1e-6, "another one is faster for sure"
        assert decision.reason


@given(requests)
@settings(max_examples=250, deadline=None)
def test_a_refusal_says_why_and_when_to_come_again_and_comes_only_when_nobody_can(request):
    local, decision = request["local"], decide(**request, now_s=NOW_S)
    if isinstance(decision, Refuse):
        assert 1 <= decision.retry_after_s <= 30
        assert decision.reason
        if not request["forwarded"] and request["split"] != "edge":
            assert not any(must_make_it(upstream, request) for upstream in request["upstreams"])
        assert not has_room(local) or here_takes_ms(local) * SLACK > request["remaining_ms"] - 1e-6


@given(requests, st.floats(0.001, 200))
@settings(max_examples=250, deadline=None)
def test_what_fits_here_stays_here_unless_the_cloud_was_asked_for(request, spare_ms):
    local = request["local"]
    if has_room(local):
        request = {**request, "remaining_ms": here_takes_ms(local) * SLACK + spare_ms}
        decision = decide(**request, now_s=NOW_S)
        assert isinstance(decision, Here) or request["split"] == "cloud"
        if isinstance(decision, Forward):
            assert may_make_it(next(u for u in request["upstreams"] if u.node == decision.node), request)


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
    idle = msgspec.structs.replace(request["local"], slots=1, running=0, waiting=0, queue_limit=2, service=service)
    request = {**request, "local": idle, "remaining_ms": max(1.0, request["remaining_ms"])}
    assert not isinstance(decide(**request, now_s=NOW_S), Refuse)
    fresh = msgspec.structs.replace(idle, service=msgspec.structs.replace(service, at_s=NOW_S - PROBE_AFTER_S / 2))
    alone = {**request, "local": fresh, "upstreams": [], "remaining_ms": mean_ms / 2}
    assert isinstance(decide(**alone, now_s=NOW_S), Refuse), "one probe, not a stream of them"


@given(requests)
def test_the_order_in_which_upstreams_are_listed_changes_nothing(request):
    turned = {**request, "upstreams": request["upstreams"][::-1]}
    assert decide(**request, now_s=NOW_S) == decide(**turned, now_s=NOW_S)


@given(st.lists(st.one_of(st.floats(0, 1e6), st.floats(1, 2)), min_size=1, max_size=40))
@settings(max_examples=150, deadline=None)
def test_an_estimate_stays_within_what_was_seen(durations):
    held = Estimate()
    for at, duration_ms in enumerate(durations):
        held = estimate.updated(held, duration_ms, now_s=float(at))
    slack = 1e-9 * max(durations)
    assert min(durations) - slack <= held.mean_ms <= max(durations) + slack
    assert held.deviation_ms >= 0
    assert held.careful_ms >= held.mean_ms
    assert (held.count, held.at_s) == (len(durations), float(len(durations) - 1))


@given(st.floats(1, 1000), st.floats(2, 50))
def test_one_slow_start_is_forgotten_after_thirty_usual_answers(usual_ms, times):
    held = estimate.updated(Estimate(), usual_ms * times, now_s=0.0)
    for at in range(1, 31):
        held = estimate.updated(held, usual_ms, now_s=float(at))
    assert held.mean_ms <= usual_ms * (1 + times / 20)
    assert held.careful_ms <= usual_ms * (1 + times / 8)


@given(requests)
@settings(max_examples=100, deadline=None)
def test_where_no_replica_is_ready_a_request_goes_to_a_free_upstream_if_it_may_leave_at_all(request):
    free = UpstreamView("free", "cloud", Estimate(1.0, 0.0, 9, NOW_S))
    nobody = msgspec.structs.replace(request["local"], slots=0, running=0, waiting=0)
    request = {**request, "local": nobody, "upstreams": [free], "remaining_ms": max(2.0, request["remaining_ms"])}
    may_leave = not request["forwarded"] and request["split"] != "edge"
    assert isinstance(decide(**request, now_s=NOW_S), Forward if may_leave else Refuse)
