"""Nothing gets out: every attempt on every rung, and what is known not to be held is still not held."""

import pytest

from tests.conftest import need
from tests.escape.gaps import GAPS, gap_of
from tests.escape.perform import ATTEMPTS, BOX, climb, on_the_box
from tests.escape.rungs import RUNGS, absence

pytestmark = pytest.mark.timeout(300)  # the first test of a rung makes all its attempts


@pytest.mark.parametrize("attempt", ATTEMPTS)
@pytest.mark.parametrize("rung", RUNGS)
def test_the_sandbox_holds(attempt: str, rung: str) -> None:
    need(rung, absence(rung))
    made = climb(rung)
    outcome = made.outcomes[attempt]
    assert outcome.broken == "", "the attempt itself is broken"
    gap = gap_of(attempt, rung, made.conditions)
    if gap is None:
        assert outcome.held, outcome.how
    else:
        assert not outcome.held, f"it is held now ({outcome.how}): take it off the list"


@pytest.mark.parametrize("attempt", BOX)
def test_the_box_holds(attempt: str) -> None:
    outcome = on_the_box(attempt)
    assert outcome.broken == ""
    assert outcome.held, outcome.how


def test_every_known_gap_names_an_attempt_and_a_rung() -> None:
    for gap in GAPS:
        assert gap.attempt in ATTEMPTS
        assert gap.rung in RUNGS
        assert gap.reason
