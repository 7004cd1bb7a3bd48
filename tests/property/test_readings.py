"""Readings that stand for several add up to what was read, and are spread over time without gaining or losing a request."""

from hypothesis import given
from hypothesis import strategies as st

from coordinator.registry.measurements import Served, buckets, spread
from edge_agent.core.thinning import merged, steps
from skerry.wire import codec
from skerry.wire.messages import GpuSample, Sample, ServeSample

COUNTS = ("edge", "peer", "cloud", "refused", "failed", "late")
counts = st.integers(0, 50)
serves = st.lists(
    st.builds(
        ServeSample, st.sampled_from("ab"), counts, counts, counts, counts, counts, counts,
        latency=st.dictionaries(st.integers(0, 5), counts, max_size=3),
    ),
    max_size=2, unique_by=lambda one: one.deployment,
)  # fmt: skip


@st.composite
def stretches(draw):
    """Readings that follow each other."""
    seq, at_ms, found = draw(st.integers(0, 5)), draw(st.integers(0, 10**9)), []
    for _ in range(draw(st.integers(1, 12))):
        gpus = [GpuSample(uuid, draw(st.floats(0, 1)), draw(counts), 40.0, 100.0) for uuid in draw(st.sampled_from(["", "g", "gh"]))]
        seq, at_ms = seq + 1, at_ms + draw(st.integers(0, 5000))
        found.append(Sample("e", seq, at_ms, draw(st.floats(0, 1)), draw(st.integers(0, 2**40)), gpus, draw(serves)))
    return found


def sums(samples: list[Sample]) -> dict[tuple[str, str], int]:
    total: dict[tuple[str, str], int] = {}
    for one in (one for sample in samples for one in sample.serve):
        parts = {name: getattr(one, name) for name in COUNTS} | {f"bucket {bucket}": count for bucket, count in one.latency.items()}
        for name, count in parts.items():
            total[one.deployment, name] = total.get((one.deployment, name), 0) + count
    return total


@given(stretches(), st.integers(1, 12))
def test_one_reading_for_several_says_the_same_in_whatever_steps_it_was_made(stretch, size):
    whole = merged(stretch)
    in_steps = merged([merged(stretch[first : first + size]) for first in range(0, len(stretch), size)])
    for made in (whole, in_steps):
        assert codec.decode(codec.encode(made), Sample) == made, "and can be sent"
        assert (made.first, made.seq, made.readings) == (stretch[0].seq, stretch[-1].seq, len(stretch))
        assert (made.at_ms, made.at_ms + made.width_ms) == (stretch[0].at_ms, stretch[-1].at_ms)
        assert {key: count for key, count in sums([made]).items() if count} == {key: count for key, count in sums(stretch).items() if count}
        assert abs(made.cpu_ratio - sum(sample.cpu_ratio for sample in stretch) / len(stretch)) < 0.001
        assert {gpu.uuid for gpu in made.gpus} == {gpu.uuid for sample in stretch for gpu in sample.gpus}


@given(
    st.builds(Served, st.just("d"), st.integers(0, 10**6), st.just("n"), counts, counts, counts, counts, counts, counts,
              st.dictionaries(st.integers(0, 5), counts, max_size=3)),
    st.integers(0, 7200), st.integers(1, 60),
)  # fmt: skip
def test_what_is_spread_over_time_adds_up_to_what_it_was(whole, width_s, rollup_s):
    starts = buckets(whole.at_s, width_s, rollup_s)
    assert all(at_s % rollup_s == 0 for at_s in starts)
    assert starts[0] <= whole.at_s < starts[0] + rollup_s
    assert starts[-1] <= max(whole.at_s, whole.at_s + width_s - 1) < starts[-1] + rollup_s
    parts = spread(whole, starts)
    assert len({part.at_s for part in parts}) == len(parts)
    assert {part.at_s for part in parts} <= set(starts)
    for name in COUNTS:
        each = [getattr(part, name) for part in parts]
        assert sum(each) == getattr(whole, name)
        assert len(parts) < len(starts) or max(each) - min(each) <= 1, "evenly"
    for bucket, count in whole.latency.items():
        assert sum(part.latency.get(bucket, 0) for part in parts) == count


@given(st.dictionaries(st.sampled_from(["events", "samples", "minutes", "hours"]), st.integers(0, 100)), st.integers(1, 100))
def test_events_go_last_and_nothing_is_dropped_that_can_be_thinned(held, most):
    order = steps(held, most)
    assert len(set(order)) == len(order)
    assert ("drop events" in order) == (held.get("events", 0) > 0)
    if "drop events" in order:
        assert order[-1] == "drop events"
    for step, name in (("roll samples", "samples"), ("roll minutes", "minutes"), ("drop hours", "hours")):
        assert (step in order) == (held.get(name, 0) > 0)
    if "drop hours" in order and held["hours"] <= most // 8:
        assert order.index("drop hours") == len([step for step in order if step != "drop events"]) - 1
