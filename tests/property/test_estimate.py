"""What is learned of runs and links: within what was seen, careful beyond it, and soon over a bad spell."""

import math
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.core import estimate
from edge_agent.core.estimate import CostCurve, Estimate, Link, updated_curve, updated_link

durations_ms = st.one_of(st.floats(0.01, 100), st.floats(1, 2), st.integers(1, 9).map(float))
runs = st.lists(st.tuples(st.one_of(st.integers(1, 8), st.integers(1, 70)), durations_ms), min_size=1, max_size=40)


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


def curve_after(seen, *, step_s: float = 0.001) -> CostCurve:
    curve = CostCurve()
    for at, (rows, duration_ms) in enumerate(seen):
        curve = updated_curve(curve, rows, duration_ms, now_s=at * step_s)
    return curve


@given(runs)
@settings(max_examples=200, deadline=None)
def test_a_larger_run_never_counts_as_cheaper_and_never_as_more_than_in_proportion_to_the_largest_seen(seen):
    curve = curve_after(seen)
    assert (curve.count, curve.at_s) == (len(seen), (len(seen) - 1) * 0.001)
    assert len(curve.points) == len({point.size for point in curve.points}) <= len({rows for rows, _ in seen}), "one for each size"
    means = [curve.mean_ms(rows) for rows in range(1, 200)]
    careful = [curve.careful_ms(rows) for rows in range(1, 200)]
    tiny = 1e-9 * max(means)
    assert all(a <= b + tiny for a, b in pairwise(means))
    assert all(a <= b + tiny for a, b in pairwise(careful))
    assert all(a <= b + tiny for a, b in zip(means, careful, strict=True))
    slowest_ms, largest = max(duration_ms for _, duration_ms in seen), max(rows for rows, _ in seen)
    assert max(means[:largest]) <= slowest_ms * 2 + tiny  # one of a class of sizes stands for those up to twice as large
    assert min(means) >= min(duration_ms for _, duration_ms in seen) - tiny


@given(st.dictionaries(st.integers(1, 8), st.floats(0.1, 100), min_size=1), st.integers(1, 64), st.integers(1, 5), st.randoms())
@settings(max_examples=300, deadline=None)
def test_sizes_that_always_take_the_same_are_known_exactly_and_others_lie_between_or_in_proportion(truth, asked, times, rnd):
    seen = [(rows, duration_ms) for rows, duration_ms in truth.items() for _ in range(times)]
    rnd.shuffle(seen)
    got_ms = curve_after(seen).mean_ms(asked)
    at_least_ms = max((truth[rows] for rows in truth if rows <= asked), default=0.0)
    larger = [rows for rows in truth if rows >= asked]
    if asked in truth:
        assert math.isclose(got_ms, at_least_ms)
    elif larger:
        assert at_least_ms * (1 - 1e-9) <= got_ms <= max(at_least_ms, truth[min(larger)]) * (1 + 1e-9)
        smaller = max((rows for rows in truth if rows < asked), default=None)
        if smaller is not None and smaller < asked:
            upper_ms = max(at_least_ms, truth[min(larger)])
            assert math.isclose(got_ms, float(np.interp(asked, [smaller, min(larger)], [at_least_ms, upper_ms])))
    else:
        assert math.isclose(got_ms, at_least_ms * asked / max(truth))


@given(st.integers(2, 16), st.floats(1, 20), st.floats(2, 50))
def test_a_bad_spell_at_a_size_that_is_then_avoided_is_not_believed_for_ever(rows, usual_ms, times):
    bad_ms = usual_ms * rows * times
    curve = curve_after([(1, usual_ms), (rows, bad_ms)])
    assert math.isclose(curve.mean_ms(rows), bad_ms)
    assert math.isclose(updated_curve(curve, 1, usual_ms, now_s=5.0).mean_ms(rows), bad_ms), "it may still be true"
    assert math.isclose(updated_curve(curve, 1, usual_ms, now_s=60.0).mean_ms(rows), usual_ms * rows)
    slow_start = curve_after([(1, bad_ms), (rows, usual_ms)])
    assert math.isclose(slow_start.mean_ms(rows), bad_ms)
    assert math.isclose(updated_curve(slow_start, rows, usual_ms, now_s=60.0).mean_ms(rows), usual_ms)
    fine = curve_after([(1, usual_ms), (rows, usual_ms * 1.5)])
    assert math.isclose(updated_curve(fine, 1, usual_ms, now_s=60.0).mean_ms(rows), usual_ms * 1.5), "what fits together is kept"


def link_after(seen) -> Link:
    link = Link()
    for at, (size_bytes, duration_ms) in enumerate(seen):
        link = updated_link(link, size_bytes, duration_ms, now_s=float(at))
    return link


sizes_bytes = st.one_of(st.integers(0, 2000), st.integers(0, 10**6), st.sampled_from([0, 256, 602_112]))


@given(st.lists(st.tuples(sizes_bytes, st.one_of(st.floats(-5, 1e5), st.floats(0, 50))), min_size=1, max_size=60))
@settings(max_examples=300, deadline=None)
def test_a_link_has_no_negative_part_and_costs_no_less_for_more_bytes(seen):
    link = link_after(seen)
    assert (link.count, link.at_s) == (len(seen), float(len(seen) - 1))
    numbers = (link.round_trip_ms, link.bytes_per_ms, link.deviation_ms, *(link.mean_ms(size) for size in (0, 100, 10**6, 10**9)))
    assert all(math.isfinite(number) and number >= 0 for number in numbers)
    assert link.mean_ms(0) <= link.mean_ms(1000) <= link.mean_ms(10**6) <= link.careful_ms(10**6)
    assert link.mean_ms(0) <= max(0.0, *(duration_ms for _, duration_ms in seen)) * (1 + 1e-9)


@given(st.lists(st.tuples(sizes_bytes, st.floats(0, 1000)), min_size=2, max_size=16))
@settings(max_examples=300, deadline=None)
def test_the_first_requests_give_the_line_with_the_least_squares(seen):
    """Sixteen count alike; numpy solves the same problem whole."""
    link = link_after(seen)
    sizes, durations = np.array(seen, dtype=float).T
    if link.bytes_per_ms == 0:
        assert sizes.std() <= sizes.mean() / 4 * (1 + 1e-9)
        assert math.isclose(link.mean_ms(int(sizes.mean())), durations.mean(), rel_tol=1e-6, abs_tol=1e-6)
        return
    assert sizes.std() >= sizes.mean() / 4 * (1 - 1e-9)
    slope, start_ms = np.polyfit(sizes, durations, 1)
    if slope >= 1e-6 and start_ms >= 1e-3:
        assert math.isclose(link.round_trip_ms, start_ms, rel_tol=1e-4, abs_tol=1e-3)
        assert math.isclose(1 / link.bytes_per_ms, slope, rel_tol=1e-4)
    elif start_ms < -1e-3:
        assert link.round_trip_ms == 0
        through_origin = float(sizes @ durations / (sizes @ sizes))
        assert math.isclose(1 / link.bytes_per_ms, max(1e-7, through_origin), rel_tol=1e-4)


@given(st.floats(1, 300), st.floats(1, 1e5), st.floats(1, 300), st.floats(1, 1e5), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_a_link_that_becomes_another_is_known_anew_after_some_tens_of_requests(rt_ms, bytes_per_ms, new_rt_ms, new_bytes_per_ms, seed):
    rnd = np.random.default_rng(seed)
    sizes = rnd.choice([256, 20_000, 602_112], size=320)
    seen = [(int(size), rt_ms + size / bytes_per_ms) for size in sizes[:20]]
    link = link_after(seen)
    for size in (256, 100_000):
        assert math.isclose(link.mean_ms(size), rt_ms + size / bytes_per_ms, rel_tol=1e-3, abs_tol=1e-3) or len(set(sizes[:20])) == 1
    link = link_after(seen + [(int(size), new_rt_ms + size / new_bytes_per_ms) for size in sizes[20:]])
    assert math.isclose(link.round_trip_ms, new_rt_ms, rel_tol=1e-2, abs_tol=1e-2)
    assert math.isclose(link.bytes_per_ms, new_bytes_per_ms, rel_tol=1e-2)
    assert link.careful_ms(602_112) <= (new_rt_ms + 602_112 / new_bytes_per_ms) * 1.01 + 0.1


@given(st.integers(0, 10**6), st.floats(0, 500), st.integers(1, 30))
def test_where_all_sizes_are_alike_all_of_it_is_round_trip_and_more_bytes_cost_more(size_bytes, duration_ms, times):
    link = link_after([(size_bytes, duration_ms)] * times)
    assert link.bytes_per_ms == 0
    assert math.isclose(link.mean_ms(size_bytes), duration_ms)
    assert math.isclose(link.mean_ms(size_bytes // 2), duration_ms), "nobody knows whether less is cheaper"
    assert math.isclose(link.mean_ms(size_bytes + 12_500), duration_ms + 10)


def test_nothing_is_claimed_of_what_was_not_seen():
    assert CostCurve().mean_ms(1) == CostCurve().careful_ms(9) == Link().mean_ms(1) == Link().careful_ms(10**6) == 0
    link = updated_link(Link(), 10, 5.0, now_s=1.0)
    assert updated_link(link, 10, math.nan, now_s=2.0) == updated_link(link, 10, math.inf, now_s=2.0) == link
