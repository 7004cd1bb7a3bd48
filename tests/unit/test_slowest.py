"""The slowest requests of each time are kept, and nothing else."""

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.gateway.slowest import MOST, SLOT_MS, SLOTS, SlowestKept
from skerry.wire.slowest import SlowRequest

requests_ = st.lists(st.tuples(st.integers(0, SLOT_MS // 2), st.sampled_from([0.5, 1.0, 2.0, 3.0]) | st.floats(0, 100)), max_size=80)


@given(requests_)
def test_of_each_time_those_are_kept_that_took_longest(steps):
    kept, noted, at_ms = SlowestKept(), [], 0
    for gap_ms, took_ms in steps:
        at_ms += gap_ms
        noted.append((at_ms // SLOT_MS, took_ms))
        if kept.wants("a", took_ms, at_ms=at_ms):
            kept.take("a", SlowRequest(at_ms, took_ms, 50.0, "edge", "n", "why"))
    slots = sorted({slot for slot, _ in noted})[-SLOTS:]
    expected = sorted((took for slot in slots for took in sorted((t for s, t in noted if s == slot), reverse=True)[:MOST]), reverse=True)
    assert [one.took_ms for one in kept.since("a", 0)] == expected
    assert kept.since("b", 0) == []
    assert all(one.at_ms >= at_ms - 1000 for one in kept.since("a", at_ms - 1000))
    kept.keep({"b"})
    assert kept.since("a", 0) == []


def test_what_is_told_of_each_is_bounded():
    kept = SlowestKept()
    kept.take("a", SlowRequest(1, 5.0, 50.0, "edge", "n", "w" * 10_000))
    assert len(kept.since("a", 0)[0].reason) == 300
