"""However tries are spread over addresses, names and time, no window holds more failures than are allowed. The oracle counts itself."""

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core.attempts import MOST_KEYS, MOST_OF_ADDRESS, MOST_OF_NAME, WINDOW_S, Attempts

TRY = st.tuples(
    st.sampled_from(["a1", "a2", "a3"]),
    st.sampled_from(["n1", "n2"]),
    st.sampled_from([*[0.0] * 6, *[5.0] * 5, 300.0]),
    st.sampled_from([False, False, False, True]),
)
TRIES = st.lists(TRY, min_size=20, max_size=120)


@settings(max_examples=150)
@given(TRIES)
def test_no_window_holds_more_failures_than_are_allowed_and_waiting_as_told_helps(tries):
    attempts, now, heard = Attempts(), 0.0, []
    for address, name, later, is_right in tries:
        now += later
        wait_s = attempts.wait_s(address, name, now)
        recent = [(a, n) for a, n, at in heard if at > now - WINDOW_S]
        is_full = sum(a == address for a, _ in recent) >= MOST_OF_ADDRESS or sum(n == name for _, n in recent) >= MOST_OF_NAME
        assert (wait_s > 0) == is_full
        if wait_s:
            assert wait_s <= WINDOW_S
            assert attempts.wait_s(address, name, now + wait_s + 1e-6) < wait_s
            continue
        attempts.failed(address, name, now)
        if is_right:
            attempts.forgive(address, name)
        else:
            heard.append((address, name, now))


def test_what_is_remembered_is_bounded():
    attempts = Attempts()
    for number in range(3 * MOST_KEYS):
        attempts.failed(f"address {number}", f"name {number}", 0.0)
    assert len(attempts._failures) <= MOST_KEYS
