"""Whatever a box's clock says, it asks for its next certificate in time, and never in a loop."""

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.renewal import Life, due_in_s

DAY_S = 86_400
YEARS_MS = 3 * 365 * DAY_S * 1000
START_MS = 1_800_000_000_000
lives = st.builds(
    lambda days, jitter: Life(START_MS, START_MS + int(days * DAY_S * 1000), jitter),
    st.floats(0.01, 400), st.floats(0, 1, exclude_max=True),
)  # fmt: skip
agos = st.floats(0, 500 * DAY_S)


def length_s(life: Life) -> float:
    return (life.not_after_ms - life.not_before_ms) / 1000


@given(lives, st.integers(0, 10**12), agos)
def test_with_a_right_clock_it_is_due_between_two_thirds_and_five_sixths_of_the_life(life, into_ms, started_s_ago):
    wall_ms = life.not_before_ms + into_ms % (life.not_after_ms - life.not_before_ms)
    share = (
        (wall_ms - life.not_before_ms) / 1000 + due_in_s(life, wall_ms=wall_ms, started_s_ago=started_s_ago, renewed_s_ago=None)
    ) / length_s(life)
    elapsed = (wall_ms - life.not_before_ms) / 1000 / length_s(life)
    if elapsed < 0.66:
        assert 0.66 < share < 0.84
    if elapsed > 0.84:
        assert share == elapsed, "it is due now"


@given(lives, st.integers(START_MS - 60 * 365 * DAY_S * 1000, START_MS + YEARS_MS), agos, st.one_of(st.none(), agos))
def test_waiting_for_as_long_as_it_says_makes_it_due(life, wall_ms, started_s_ago, renewed_s_ago):
    wait_s = due_in_s(life, wall_ms=wall_ms, started_s_ago=started_s_ago, renewed_s_ago=renewed_s_ago)
    assert 0 <= wait_s <= length_s(life)
    later_s = wait_s + 0.01
    again_s = due_in_s(
        life, wall_ms=wall_ms + int(later_s * 1000) + 1, started_s_ago=started_s_ago + later_s,
        renewed_s_ago=None if renewed_s_ago is None else renewed_s_ago + later_s,
    )  # fmt: skip
    is_over = life.not_before_ms <= wall_ms <= life.not_after_ms < wall_ms + later_s * 1000
    starts = wall_ms < life.not_before_ms <= wall_ms + later_s * 1000 + 1
    if not (is_over or starts):  # the clock's word is taken from one moment to the next: what was waited for is another thing
        assert again_s < 0.02


@given(lives, st.one_of(st.floats(-2, 2), st.floats(-3000, 3000)), st.integers(2, 40))
def test_however_wrong_the_clock_a_life_sees_ten_renewals_at_most(life, off, looks):
    """The clock is off by ``off`` lives all the time; every renewal brings a certificate dated by the coordinator's right clock."""
    wall_ms = START_MS + int(off * length_s(life) * 1000)
    now_s, renewed_at_s, count = 0.0, None, 0
    current = life
    for _ in range(looks):
        now_s += due_in_s(
            current, wall_ms=wall_ms + int(now_s * 1000), started_s_ago=now_s,
            renewed_s_ago=None if renewed_at_s is None else now_s - renewed_at_s,
        ) + 0.001  # fmt: skip
        if now_s > length_s(life):
            break
        wait_s = due_in_s(
            current, wall_ms=wall_ms + int(now_s * 1000), started_s_ago=now_s,
            renewed_s_ago=None if renewed_at_s is None else now_s - renewed_at_s,
        )  # fmt: skip
        if wait_s == 0:
            renewed_at_s, count = now_s, count + 1
            begins_ms = START_MS + int(now_s * 1000)
            current = Life(begins_ms, begins_ms + (life.not_after_ms - life.not_before_ms), life.jitter)
    assert count <= 11
