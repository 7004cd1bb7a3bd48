"""An endpoint that fails is left alone, tried by one request at a time, and never shut out for ever."""

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.core import breaker
from edge_agent.core.breaker import Breaker

chances = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0]))
waits_s = st.one_of(st.floats(0, 1), st.floats(0, 15), st.sampled_from([0.0, 0.25, 0.5, 10.0]))
steps = st.lists(
    st.tuples(waits_s, st.sampled_from(["send", "send", "send", "answer", "fail", "fail", "overloaded", "cancel"]), chances),
    max_size=60,
)


class Endpoint:
    """The rules written out as a list of what was sent, by somebody who obeys the breaker. Some requests' ends are never reported."""

    def __init__(self) -> None:
        self.held = Breaker()
        self.under_way: list[tuple[bool, float]] = []
        """Whether it was the trial, and when it was sent."""

    def send(self, now_s: float) -> None:
        is_open, is_trial = breaker.is_open(self.held, now_s=now_s), breaker.is_trial(self.held, now_s=now_s)
        assert not (is_open and is_trial)
        if is_open:
            return
        young_trials = [sent_s for was_trial, sent_s in self.under_way if was_trial and now_s - sent_s < 10.0]
        if is_trial:
            assert not young_trials, "two trials at once"
        self.held = breaker.begun(self.held, now_s=now_s)
        self.under_way.append((is_trial, now_s))
        if is_trial:
            assert breaker.is_open(self.held, now_s=now_s)

    def end(self, how: str, now_s: float, chance: float) -> None:
        if not self.under_way:
            return
        was_trial, _ = self.under_way.pop()
        was_open = breaker.is_open(self.held, now_s=now_s)
        match how:
            case "answer":
                self.held = breaker.succeeded(self.held, now_s=now_s)
            case "fail":
                self.held = breaker.failed(self.held, now_s=now_s, chance=chance)
            case "overloaded":
                self.held = breaker.failed(self.held, now_s=now_s, chance=chance, retry_after_s=5.0)
                assert breaker.is_open(self.held, now_s=now_s)
                assert not breaker.is_open(self.held, now_s=now_s + 10.0)
            case "cancel" if was_trial:
                self.held = breaker.cancelled(self.held, now_s=now_s)
        if how == "fail" and was_trial and was_open:
            assert breaker.is_open(self.held, now_s=now_s)
        if how == "answer" and not was_trial and was_open and not self.under_way:
            assert breaker.is_open(self.held, now_s=now_s), "an old answer does not end a pause"


@given(steps)
@settings(max_examples=500, deadline=None)
def test_one_trial_at_a_time_and_nobody_is_shut_out_for_ever(story):
    endpoint, now_s = Endpoint(), 100.0
    for wait_s, what, chance in story:
        now_s += wait_s
        if what == "send":
            endpoint.send(now_s)
        else:
            endpoint.end(what, now_s, chance)
        later_s = now_s + 10.0 + 10.0  # a lost trial's bound, and the longest pause
        assert not breaker.is_open(endpoint.held, now_s=later_s)
        retried = breaker.begun(endpoint.held, now_s=later_s)
        assert breaker.succeeded(retried, now_s=later_s) == Breaker(), "one answer to a trial and all is well"


@given(chances, st.integers(1, 12))
def test_each_failed_trial_doubles_the_pause_up_to_ten_seconds(chance, trials):
    held, now_s = Breaker(), 0.0
    held = breaker.failed(held, now_s=now_s, chance=chance)
    assert not breaker.is_open(held, now_s=now_s), "one failure is bad luck"
    held = breaker.failed(held, now_s=now_s, chance=chance)
    for trial in range(trials):
        pause_s = min(10.0, 0.5 * 2**trial) * (1 + chance) / 2
        assert breaker.is_open(held, now_s=now_s)
        assert breaker.is_open(held, now_s=now_s + pause_s * 0.999)
        assert not breaker.is_trial(held, now_s=now_s + pause_s * 0.999)
        now_s += pause_s * 1.001
        assert breaker.is_trial(held, now_s=now_s)
        held = breaker.failed(breaker.begun(held, now_s=now_s), now_s=now_s, chance=chance)


@given(st.integers(2, 64), chances)
def test_many_requests_that_die_together_are_one_failure_of_the_endpoint(number, chance):
    two, many = Breaker(), Breaker()
    for count in range(number):
        many = breaker.failed(many, now_s=5.0, chance=chance)
        two = breaker.failed(two, now_s=5.0, chance=chance) if count < 2 else two
    assert many == two


@given(st.floats(0.1, 100), chances, st.integers(0, 1))
def test_an_overloaded_endpoint_is_left_alone_for_a_part_of_what_it_asks_and_is_not_taken_for_broken(retry_after_s, chance, failures):
    held = Breaker()
    for _ in range(failures):
        held = breaker.failed(held, now_s=0.0, chance=chance)
    held = breaker.failed(held, now_s=0.0, chance=chance, retry_after_s=retry_after_s)
    assert breaker.is_open(held, now_s=min(10.0, retry_after_s * 0.1) * 0.999)
    assert not breaker.is_open(held, now_s=min(10.0, retry_after_s * 0.5) * 1.001)
    again = breaker.failed(breaker.begun(held, now_s=20.0), now_s=20.0, chance=1.0)
    assert not breaker.is_open(again, now_s=20.51), "its next failure is its first or second, not one of many"


@given(st.floats(0, 9.99), chances)
def test_a_trial_that_was_cancelled_is_given_to_another(after_s, chance):
    held = breaker.failed(breaker.failed(Breaker(), now_s=0.0, chance=chance), now_s=0.0, chance=chance)
    tried = breaker.begun(held, now_s=1.0)
    assert breaker.is_open(tried, now_s=1.0 + after_s)
    assert breaker.is_trial(breaker.cancelled(tried, now_s=1.0 + after_s), now_s=1.0 + after_s)


def test_a_trial_that_never_ends_counts_as_failed_whenever_one_looks():
    held = breaker.failed(breaker.failed(Breaker(), now_s=0.0, chance=1.0), now_s=0.0, chance=1.0)
    tried = breaker.begun(held, now_s=1.0)
    assert breaker.is_open(tried, now_s=11.0)
    assert breaker.is_open(tried, now_s=11.9), "the pause after it is the second"
    assert breaker.is_trial(tried, now_s=12.0)
    assert breaker.is_trial(tried, now_s=9000.0)
    late = breaker.failed(tried, now_s=11.5, chance=0.0)
    assert breaker.is_trial(late, now_s=12.0), "what was counted already is not counted again"


@given(st.lists(st.sampled_from(["answer", "fail"]), max_size=30))
def test_failures_count_only_in_a_row(story):
    held, in_a_row = Breaker(), 0
    for what in story:
        in_a_row = in_a_row + 1 if what == "fail" else 0
        held = breaker.succeeded(held, now_s=0.0) if what == "answer" else breaker.failed(held, now_s=0.0, chance=0.5)
        if in_a_row >= 2:
            assert breaker.is_open(held, now_s=0.0)
            return
        assert not breaker.is_open(held, now_s=0.0)
