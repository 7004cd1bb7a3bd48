"""Fleets on a virtual clock through schedules of faults: the same checker as real fleets have, and many more schedules."""

import pytest

from sim import faults
from sim.chaos import one, some
from sim.virtual_fleet import empty_registry

SECONDS = 60.0


def test_through_many_schedules_no_promise_is_broken():
    outcomes = some(range(1, 81), SECONDS, faults.KINDS)
    assert [(outcome.seed, outcome.wrong) for outcome in outcomes if outcome.wrong] == []
    assert sum(outcome.faults for outcome in outcomes) > 4000
    assert sum(outcome.requests for outcome in outcomes) > 30_000
    assert sum(outcome.events for outcome in outcomes) > 10_000


@pytest.mark.parametrize("kind", faults.KINDS)
def test_each_kind_alone_is_survived(kind):
    outcomes = some(range(1, 4), SECONDS, (kind,))
    assert [(outcome.seed, outcome.wrong) for outcome in outcomes if outcome.wrong] == []
    assert all(outcome.faults for outcome in outcomes)


def test_a_seed_is_always_the_same_run():
    registry = empty_registry()
    assert one(7, registry, seconds=SECONDS) == one(7, registry, seconds=SECONDS) == one(7, empty_registry(), seconds=SECONDS)
