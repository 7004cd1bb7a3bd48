"""What is known of the time is never more than what has passed, never less than before, and grows while a machine runs."""

from hypothesis import given
from hypothesis import strategies as st

from skerry.wire.proof import Proof, later

YEARS_MS = 10**11
lapses = st.one_of(st.integers(0, 10), st.integers(0, YEARS_MS))


@given(st.lists(st.tuples(st.sampled_from(["runs", "is off", "hears", "is told"]), lapses), max_size=30), lapses)
def test_it_is_never_ahead_of_the_truth_and_never_falls(happened, start_ms):
    """The oracle is the true time."""
    truth_ms, uptime_ms, known, told, before = start_ms, 0, Proof(), Proof(), 0
    for what, lapse_ms in happened:
        if what == "runs":
            truth_ms, uptime_ms = truth_ms + lapse_ms, uptime_ms + lapse_ms
        elif what == "is off":
            kept = Proof(known.at_least_ms(uptime_ms), uptime_ms)
            truth_ms, uptime_ms = truth_ms + lapse_ms, 0
            known = Proof(kept.at_least_ms(uptime_ms), uptime_ms)  # as it is read again
        elif what == "hears":
            known = later(known, Proof(max(0, truth_ms - lapse_ms), uptime_ms), uptime_ms)
        else:  # another program's word, which may be one of before the machine was off
            known, told = later(known, told, uptime_ms), known
        now = known.at_least_ms(uptime_ms)
        assert before <= now <= truth_ms
        before = now
    known = later(known, Proof(truth_ms, uptime_ms), uptime_ms)
    assert known.at_least_ms(uptime_ms) == truth_ms
    assert known.at_least_ms(uptime_ms + 12_345) == truth_ms + 12_345, "none of what passes while it runs is lost"
