"""Histograms answer for the durations that were counted in them, and add up and take apart without a remainder."""

import numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from skerry.wire.latency import BUCKETS_PER_OCTAVE, LAST_BUCKET, SMALLEST_MS, bucket_of, grown, merged, middle_ms, quantile_ms

durations = st.one_of(st.floats(SMALLEST_MS, 1e6), st.floats(0.5, 50), st.sampled_from([SMALLEST_MS * 2 ** (i / 8) for i in range(200)]))
histograms = st.dictionaries(st.integers(0, 12), st.integers(1, 9), max_size=6)


def counted(values) -> dict[int, int]:
    histogram: dict[int, int] = {}
    for value in values:
        histogram[bucket_of(value)] = histogram.get(bucket_of(value), 0) + 1
    return histogram


@given(st.lists(durations, min_size=1, max_size=60), st.sampled_from([0.0, 0.25, 0.5, 0.9, 0.95, 0.99, 1.0]))
@settings(max_examples=250, deadline=None)
def test_a_quantile_is_within_a_tenth_of_the_one_taken_from_the_durations_themselves(values, q):
    true_ms = float(numpy.quantile(values, q, method="inverted_cdf"))
    assert abs(quantile_ms(counted(values), q) - true_ms) <= 0.1 * true_ms


@given(st.floats(SMALLEST_MS * 1.0001, 1e6))
@settings(max_examples=250)
def test_a_bucket_holds_what_its_documentation_says(duration_ms):
    bucket = bucket_of(duration_ms)
    low_ms = SMALLEST_MS * 2 ** (bucket / BUCKETS_PER_OCTAVE)
    assert low_ms * (1 - 1e-9) <= duration_ms <= low_ms * 2 ** (1 / BUCKETS_PER_OCTAVE) * (1 + 1e-9)
    assert abs(middle_ms(bucket) / duration_ms - 1) <= 0.046


@given(st.lists(st.floats(0, 1e12), min_size=2, max_size=2))
def test_a_longer_duration_never_lands_in_an_earlier_bucket(pair):
    shorter, longer = sorted(pair)
    assert 0 <= bucket_of(shorter) <= bucket_of(longer) <= LAST_BUCKET


@given(histograms, histograms, histograms)
def test_adding_up_does_not_depend_on_order_or_grouping(a, b, c):
    assert merged([a, b]) == merged([b, a])
    assert merged([merged([a, b]), c]) == merged([a, merged([b, c])]) == merged([a, b, c])
    assert merged([a, {}]) == a


@given(st.lists(durations, max_size=30), st.lists(durations, max_size=30))
def test_the_sum_of_two_boxes_is_the_histogram_of_all_their_durations(here, there):
    assert merged([counted(here), counted(there)]) == counted(here + there)


@given(histograms, histograms)
def test_what_was_gained_and_what_was_there_make_what_is_there_now(before, gained):
    now = merged([before, gained])
    assert grown(now, before) == gained
    assert merged([grown(now, before), before]) == now


@given(histograms.filter(bool), histograms, st.data())
def test_a_counter_that_fell_was_reset_and_everything_counts_from_zero(before, now, data):
    fallen = data.draw(st.sampled_from(sorted(before)))
    now = {**now, fallen: data.draw(st.integers(0, before[fallen] - 1))}
    without_zeros = {bucket: count for bucket, count in now.items() if count}
    assert grown(now, before) == without_zeros
    assert grown(without_zeros, before) == without_zeros, "a bucket that is gone fell as well"


def test_an_empty_histogram_has_no_quantiles():
    assert quantile_ms({}, 0.5) == 0.0
