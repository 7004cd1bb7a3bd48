"""Requests decided anew: what nobody changed comes out as it did, and what was changed as if it had been so from the first."""

from collections import Counter

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.replay import HOUR_MS, Case, Replay
from edge_agent.core.routing import Forward, Here, UpstreamView, decide
from skerry.wire.decision import Changed
from tests.property.test_routing import NOW_S, requests_, there_takes_ms, upstream

WHO = ("edge", "peer", "cloud", "refused")


@st.composite
def cases_(draw):
    """A few, in order, some of them across the full hour, each with what it stands for."""
    found, at_ms = [], draw(st.integers(0, HOUR_MS))
    for _ in range(draw(st.integers(1, 5))):
        request = draw(requests_()) | {"forwarded": False}
        at_ms += draw(st.sampled_from([0, 1, 10_000, HOUR_MS // 3, HOUR_MS]))
        found.append((at_ms, draw(st.sampled_from([50.0, 400.0])), request, draw(st.sampled_from([1, 1, 2, 7]))))
    return found


def replayed(cases, change: Changed, own_tier="edge") -> Replay:
    replay = Replay(change, own_tier=own_tier)
    for at_ms, deadline_ms, request, count in cases:
        given_ = {key: value for key, value in request.items() if key != "forwarded"}
        replay.add(Case(at_ms=at_ms, deadline_ms=deadline_ms, now_s=NOW_S, **(given_ | {"upstreams": tuple(request["upstreams"])})), count)
    return replay


def who(request, own_tier="edge") -> str:
    """Who answers, as the routing has it."""
    match decide(**request, now_s=NOW_S):
        case Here():
            return "cloud" if own_tier == "cloud" else "edge"
        case Forward(node=node):
            return "cloud" if {one.node: one.tier for one in request["upstreams"]}[node] == "cloud" else "peer"
    return "refused"


def tally(cases, altered=lambda request, _: request) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for _, deadline_ms, request, count in cases:
        counts[who(altered(request, deadline_ms))] += count
    return {name: counts[name] for name in WHO}


def of(tally_) -> dict[str, int]:
    return msgspec.structs.asdict(tally_)


@given(cases_(), st.sampled_from(["edge", "cloud"]))
def test_what_was_not_changed_comes_out_as_it_did(cases, own_tier):
    replay = replayed(cases, Changed(), own_tier)
    counts = Counter()
    for _, _, request, count in cases:
        counts[who(request, own_tier)] += count
    assert of(replay.before) == of(replay.after) == {name: counts[name] for name in WHO}
    assert replay.moved == []


@given(
    cases_(),
    st.builds(
        Changed,
        deadline_ms=st.sampled_from([None, None, None, 1.0, 60.0, 500.0, 5000.0]),
        split=st.sampled_from([None, "edge", "cloud", "overflow"]),
        is_cut_off=st.sampled_from([False, False, False, True]),
    ),
)
def test_what_was_changed_comes_out_as_if_it_had_been_so(cases, change):
    def altered(request, deadline_ms):
        return request | {
            "remaining_ms": request["remaining_ms"] + ((change.deadline_ms or deadline_ms) - deadline_ms),
            "split": change.split or request["split"],
            "upstreams": [] if change.is_cut_off else request["upstreams"],
        }

    replay = replayed(cases, change)
    assert of(replay.before) == tally(cases)
    assert of(replay.after) == tally(cases, altered)
    moves = [(at_ms, count, who(request), who(altered(request, ms))) for at_ms, ms, request, count in cases]
    assert [(one.at_ms, one.count, one.before, one.after) for one in replay.moved] == [move for move in moves if move[2] != move[3]]


@given(cases_(), st.sampled_from([-1000.0, -5.0, 0.5, 30.0, 5000.0]))
def test_a_farther_link_is_added_to_what_the_way_takes_and_a_nearer_one_takes_nothing_at_the_least(cases, by_ms):
    """Judged where the split is cloud, nothing runs here, and one upstream is free: then it is asked exactly where it makes it."""
    for _, deadline_ms, request, _ in cases:
        for held in request["upstreams"]:
            one = msgspec.structs.replace(held, tier="cloud", is_open=False, is_trial=False, has_budget=True, running=0, limit=9)
            alone = request | {"upstreams": [one], "split": "cloud", "may_leave": True}
            alone["local"] = msgspec.structs.replace(request["local"], slots=0, running=0)
            takes_ms = there_takes_ms(one, alone) + max(by_ms, -way_ms(one))
            for off_ms, expected in ((-0.1, "refused"), (0.1, "cloud")):
                found = replayed([(0, deadline_ms, alone | {"remaining_ms": takes_ms + off_ms}, 1)], Changed(link_ms=by_ms)).after
                assert of(found)[expected] == 1, (takes_ms, off_ms, found)


def way_ms(one: UpstreamView) -> float:
    """What is certain of it: a measured round trip, or what a first one is taken for."""
    link = one.link
    return link.round_trip_ms if link.count and NOW_S - link.at_s <= 5.0 else 20.0


@st.composite
def for_the_cloud_(draw):
    """Most of them go there unless its budget is spent; then a neighbour has some of them, if there is one."""
    found = []
    for at_ms, deadline_ms, request, count in draw(cases_()):
        if draw(st.integers(0, 4)):
            free = {"is_open": False, "is_trial": False, "has_budget": draw(st.booleans()), "running": 0, "limit": 9}
            views = [msgspec.structs.replace(draw(upstream), node=tier, tier=tier, **free) for tier in ("cloud", "edge")]
            views = views[: draw(st.integers(1, 2))]
            takes_ms = max(there_takes_ms(one, request) for one in views)
            local = msgspec.structs.replace(request["local"], slots=0, running=0)
            request |= {"upstreams": views, "split": "cloud", "may_leave": True, "local": local, "remaining_ms": takes_ms + 5}
        found.append((at_ms, deadline_ms, request, count))
    return found


@given(for_the_cloud_(), st.integers(0, 8))
def test_a_budget_is_spent_in_order_and_anew_each_hour(cases, most):
    spent: Counter[int] = Counter()
    expected: Counter[str] = Counter()
    for at_ms, _, request, count in cases:
        for _ in range(count):
            has_budget = spent[at_ms // HOUR_MS] < most
            views = [msgspec.structs.replace(one, has_budget=has_budget or one.tier == "edge") for one in request["upstreams"]]
            found = who(request | {"upstreams": views})
            expected[found] += 1
            spent[at_ms // HOUR_MS] += found == "cloud"
    replay = replayed(cases, Changed(cloud_requests_per_hour=most))
    assert of(replay.after) == {name: expected[name] for name in WHO}
    assert all(each <= most for each in spent.values())
