"""A schedule of faults is what its seed says, and the checker of what a fleet did through it finds what is wrong and nothing else."""

from hypothesis import given
from hypothesis import strategies as st

from sim import checker, faults
from sim.checker import BoxState, Kept, Request

BOXES = ["a", "b", "c"]
SECONDS = st.floats(5, 120)
TIMES = st.integers(0, 400).map(lambda tenth: tenth / 10)


def lane_of(fault: faults.Fault) -> tuple[str, bool]:
    return fault.box, fault.kind in faults.LINK


@given(st.integers(0, 2**32), SECONDS, st.sets(st.sampled_from(faults.KINDS), min_size=1))
def test_a_seed_is_always_the_same_schedule_of_the_kinds_that_were_asked_for_one_after_the_other_in_each_lane(seed, seconds, kinds):
    found = faults.schedule(seed, boxes=BOXES, seconds=seconds, kinds=tuple(sorted(kinds)))
    assert found == faults.schedule(seed, boxes=BOXES, seconds=seconds, kinds=tuple(sorted(kinds)))
    assert {fault.kind for fault in found} <= kinds
    assert all(fault.at_s >= 0 and fault.until_s <= seconds for fault in found)
    assert all((fault.kind in faults.CENTRE) == (fault.box == "") for fault in found)
    over: dict[tuple[str, bool], float] = {}
    for fault in found:
        assert fault.at_s > over.get(lane_of(fault), -1.0)
        over[lane_of(fault)] = fault.until_s


def test_a_long_schedule_has_every_kind_and_another_seed_another():
    kinds = {fault.kind for fault in faults.schedule(5, boxes=BOXES, seconds=600)}
    assert kinds == set(faults.KINDS)
    assert faults.schedule(5, boxes=BOXES, seconds=60) != faults.schedule(6, boxes=BOXES, seconds=60)


@st.composite
def requests(draw):
    sent_s = draw(TIMES)
    ends_s = sent_s + draw(st.integers(1, 60)) / 10
    endpoints = draw(st.lists(st.sampled_from(BOXES), min_size=1, max_size=3, unique=True))
    return Request(sent_s, ends_s, endpoints, draw(st.booleans()), is_answered=False, error="none")


@given(requests(), st.lists(st.tuples(st.sampled_from(BOXES), st.booleans(), TIMES, TIMES), max_size=6))
def test_a_request_without_an_answer_is_wrong_exactly_where_a_box_was_there_all_the_time(request, spans):
    """By moments: a box was away if it was at any of them."""
    moments = [request.sent_s + step * (request.ended_s - request.sent_s) / 999 for step in range(1, 999)]

    def was_there(index: int, box: str) -> bool:
        is_near = request.is_local and index == 0
        return not any(
            begun < moment < over for name, outside, begun, over in spans if name == box and not (is_near and outside) for moment in moments
        )

    expected = any(was_there(index, box) for index, box in enumerate(request.endpoints))
    assert bool(checker.unanswered([request], spans)) == expected
    answered = Request(request.sent_s, request.ended_s, request.endpoints, request.is_local, is_answered=True)
    assert checker.unanswered([answered], spans) == []
    wrong = Request(request.sent_s, request.ended_s, request.endpoints, request.is_local, is_answered=True, is_right=False)
    assert checker.unanswered([wrong], spans)


EVENTS = st.lists(
    st.builds(Kept, st.sampled_from(BOXES), st.integers(1, 30), st.integers(0, 5), st.just("k"), st.just("s"), st.just("t")),
    unique=True, min_size=1, max_size=20,
)  # fmt: skip


@given(EVENTS, st.data())
def test_an_event_that_is_missing_doubled_or_altered_is_found(kept, data):
    assert checker.events_wrong(kept, data.draw(st.permutations(kept)), lost={}) == []
    one = data.draw(st.sampled_from(kept))
    others = [event for event in kept if event != one]
    assert checker.events_wrong(kept, others, lost={})
    assert checker.events_wrong(kept, others, lost={one.node: 1}) == []
    assert checker.events_wrong(kept, [*kept, one], lost={})
    assert checker.events_wrong(kept, [*others, Kept(one.node, one.seq, one.at_ms, one.kind, one.subject, "another")], lost={})


def test_a_box_that_is_not_as_it_was_told_is_found():
    whole = BoxState("a", True, 4, 4, "", ["r-0", "r-1"], ["r-1", "r-0"], 2)
    assert checker.unconverged([whole]) == []
    for other in (
        BoxState("a", False, 4, 4, "", ["r-0"], ["r-0"], 1),
        BoxState("a", True, 5, 4, "", ["r-0"], ["r-0"], 1),
        BoxState("a", True, 4, 4, "no room", ["r-0"], ["r-0"], 1),
        BoxState("a", True, 4, 4, "", ["r-0", "r-1"], ["r-0"], 2),
        BoxState("a", True, 4, 4, "", ["r-0"], ["r-0"], 2),
    ):
        assert len(checker.unconverged([other])) == 1


def test_a_kind_that_must_cost_no_answer_excuses_none():
    happened = [
        faults.Fault(1.0, 2.0, "disk_full", "a"),
        faults.Fault(1.0, 2.0, "reboot", "a"),
        faults.Fault(4.0, 0.0, "kill", "a", "gateway"),
    ]
    away = checker.disturbances(happened, {"reboot": 3.0, "gateway": 1.0})
    assert away == [("a", False, 1.0, 6.0), ("a", False, 4.0, 5.0)]
    frozen = faults.Fault(5.0, 10.0, "freeze", "a", "warden")
    assert checker.disturbances([happened[1], frozen], {"reboot": 3.0}) == [("a", False, 1.0, 18.0)]
    assert checker.disturbances([happened[1], frozen], {"reboot": 1.0}) == [("a", False, 1.0, 4.0)], "it was over before"
