"""Of a numbered stream each number is counted once, and what has not come is either awaited or lost, whatever was repeated or cut."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core.sequence import MOST_GAPS, Numbering, begun, give_up, take, take_range


@st.composite
def streams(draw):
    """The first number known of, and what comes: mostly in order, some twice, some late, some never, with give-ups in between."""
    oldest = draw(st.integers(0, 5))
    first = max(1, oldest)
    numbers = list(range(first, first + draw(st.integers(0, 30))))
    coming = [number for number in numbers if draw(st.integers(0, 3))]
    coming += draw(st.lists(st.sampled_from(numbers), max_size=8)) if numbers else []
    if draw(st.booleans()):
        coming = draw(st.permutations(coming))
    else:  # near order: a link that was cut and sends the last few again
        for _ in range(draw(st.integers(0, 4))):
            if coming:
                at = draw(st.integers(0, len(coming) - 1))
                coming.insert(draw(st.integers(at, len(coming))), coming[at])
    calls = [("take", number) for number in coming]
    for _ in range(draw(st.integers(0, 4))):
        calls.insert(draw(st.integers(0, len(calls))), ("give_up", draw(st.integers(0, first + 32))))
    return oldest, calls


class Oracle:
    """Sets, and nothing else: what came, and what of that which is awaited was given up."""

    def __init__(self, oldest: int) -> None:
        self.before = max(0, oldest - 1)
        self.high = self.before
        self.came: set[int] = set()
        self.gone: set[int] = set()

    def take(self, number: int) -> bool:
        is_new = number > self.before and number not in self.came | self.gone
        if is_new:
            self.came.add(number)
            self.high = max(self.high, number)
        return is_new

    @property
    def awaited(self) -> set[int]:
        return set(range(self.before + 1, self.high + 1)) - self.came - self.gone

    def give_up(self, oldest: int) -> None:
        self.gone |= {number for number in self.awaited if number < oldest}


def agree(numbering: Numbering, oracle: Oracle) -> None:
    assert numbering.high == oracle.high
    assert numbering.missing == len(oracle.awaited)
    assert numbering.lost == len(oracle.gone)
    assert numbering.settled == min(oracle.awaited, default=oracle.high + 1) - 1
    assert numbering.lost + len(oracle.came) + numbering.missing + oracle.before == numbering.high
    flat = [edge for gap in numbering.gaps for edge in gap]
    assert flat == sorted(flat), "gaps stand in order and do not overlap"


@given(streams())
@settings(max_examples=300, deadline=None)
def test_each_number_is_counted_once_whatever_was_repeated_reordered_or_lost(stream):
    oldest, calls = stream
    numbering, oracle = begun(oldest), Oracle(oldest)
    for verb, number in calls:
        if verb == "take":
            numbering, is_new = take(numbering, number)
            assert is_new == oracle.take(number)
        else:
            numbering = give_up(numbering, number)
            oracle.give_up(number)
        agree(numbering, oracle)


@given(streams(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_same_numbers_in_any_order_end_in_the_same_numbering(stream, rnd):
    oldest, calls = stream
    numbers = [number for verb, number in calls if verb == "take"]
    ends = []
    for _ in range(2):
        numbering = begun(oldest)
        for number in numbers:
            numbering, _new = take(numbering, number)
        ends.append(give_up(numbering, max(numbers, default=0)))
        rnd.shuffle(numbers)
    assert ends[0] == ends[1]


@given(streams())
def test_giving_up_twice_or_once_is_the_same(stream):
    oldest, calls = stream
    numbering = begun(oldest)
    for verb, number in calls:
        numbering = take(numbering, number)[0] if verb == "take" else give_up(numbering, number)
        once = give_up(numbering, oldest + 3)
        assert give_up(once, oldest + 3) == once
        assert give_up(once, oldest) == once


@given(st.integers(0, 99), st.integers(2, 4))
@settings(max_examples=5, deadline=None)
def test_no_order_of_numbers_makes_more_gaps_than_are_kept_and_none_goes_uncounted(seed, step):
    """A box that sends its newest number first and then every other one in any order would else make the registry grow."""
    last = 3 * MOST_GAPS * step
    numbers = list(range(step, last, step))
    random.Random(seed).shuffle(numbers)
    numbering, came = begun(1), 0
    for number in [last, *numbers[: 2 * MOST_GAPS]]:
        numbering, is_new = take(numbering, number)
        came += is_new
        assert len(numbering.gaps) <= MOST_GAPS
        assert numbering.lost + came + numbering.missing == numbering.high


def test_what_lay_before_the_first_number_met_is_neither_missing_nor_lost():
    numbering, is_new = take(begun(100), 100)
    assert (is_new, numbering) == (True, Numbering(high=100))
    assert take(numbering, 99) == (numbering, False)


@given(streams(), st.lists(st.tuples(st.integers(1, 45), st.integers(0, 12)), max_size=8))
@settings(max_examples=300, deadline=None)
def test_numbers_that_come_together_count_as_each_of_them_and_as_new_only_where_all_are(stream, ranges):
    oldest, calls = stream
    numbering, oracle = begun(oldest), Oracle(oldest)
    for (verb, number), (first, more) in zip(calls, [*ranges, *[(0, 0)] * len(calls)], strict=False):
        if verb == "take":
            numbering, _ = take(numbering, number)
            oracle.take(number)
        else:
            numbering = give_up(numbering, number)
            oracle.give_up(number)
        if first:
            numbering, are_new = take_range(numbering, first, first + more)
            each = [oracle.take(one) for one in range(first, first + more + 1)]
            assert are_new == all(each)
        agree(numbering, oracle)
