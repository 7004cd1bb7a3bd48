"""Versions side by side: each is judged by what it answered itself, and by nothing that another one did."""

import sqlite3

import pytest
from sqlite_utils import Database as Tables

from coordinator import versions
from coordinator.core.deployment import parse
from coordinator.core.rollout import State
from coordinator.registry import deployments, measurements, rollouts
from coordinator.registry.measurements import Served
from coordinator.registry.migrations import migrate
from coordinator.registry.rollouts import Rollout, Version

NOW_S = 100_000
BOXES = [f"b-{number}" for number in range(6)]
FAST, SLOW = {80: 1}, {160: 1}
"""About ten milliseconds, and ten seconds."""


@pytest.fixture
def tables():
    connection = sqlite3.connect(":memory:")
    migrate(connection)
    tables = Tables(connection)
    deployments.save_deployment(tables, parse("name: m\nmodel: m:2\n"), "", (NOW_S - 50) * 1000)
    for box in BOXES:
        tables.execute("INSERT INTO said VALUES (?, 'm-0', 'm', 1, 'digest', 'ready')", [box])
    yield tables
    connection.close()


def answered(tables: Tables, box: str, at_s: int, latency: dict[int, int], **more: int) -> None:
    measurements.add_served(tables, [Served("m", at_s, box, edge=1, latency=latency, **more)])


def spread(tables: Tables, waves: list[list[str]], phase: str = "rolling", **more: int) -> None:
    old, new = (Version(generation, "", parse(f"name: m\nmodel: m:{generation}\n")) for generation in (1, 2))
    state = State(phase, waves, (NOW_S - 7000) * 1000, **more)
    rollouts.save_rollout(tables, Rollout("m", old, new, state, 1, (NOW_S - 100) * 1000))


def test_while_a_wave_is_watched_every_box_that_was_let_in_is_seen_since_all_of_them_ran_it(tables):
    spread(tables, [BOXES[:1], BOXES[1:3]], wave_since_ms=(NOW_S - 500) * 1000, ready_since_ms=(NOW_S - 300) * 1000)
    for box in BOXES:
        answered(tables, box, NOW_S - 400, FAST)  # the second wave's boxes ran the old one yet
        answered(tables, box, NOW_S - 200, SLOW if box in BOXES[:3] else FAST)
    new, old = versions.read(tables, "m", now_s=NOW_S)
    assert (new.model, new.boxes, new.asked, new.latency_ms["0.5"] > 5000) == ("m:2", 3, 3, True)
    assert (old.model, old.boxes, old.asked, old.latency_ms["0.999"] < 50) == ("m:1", 3, 3, True)


def test_while_a_wave_turns_to_it_boxes_of_earlier_ones_are_seen(tables):
    spread(tables, [BOXES[:1], BOXES[1:3]], wave_since_ms=(NOW_S - 500) * 1000)
    for box in BOXES:
        answered(tables, box, NOW_S - 600, FAST, failed=5)
        answered(tables, box, NOW_S - 200, SLOW if box == BOXES[0] else FAST)
    new, old = versions.read(tables, "m", now_s=NOW_S)
    assert (new.boxes, new.asked, new.failed, new.latency_ms["0.5"] > 5000) == (1, 1, 0, True)
    assert (old.boxes, old.asked, old.failed) == (3, 3, 0), "those on their way are neither"


def test_what_was_taken_back_is_seen_until_it_was(tables):
    spread(tables, [BOXES[:1]], "failed", wave_since_ms=(NOW_S - 500) * 1000, ready_since_ms=(NOW_S - 300) * 1000)
    answered(tables, BOXES[0], NOW_S - 200, SLOW)
    answered(tables, BOXES[0], NOW_S - 20, FAST)
    new, old = versions.read(tables, "m", now_s=NOW_S)
    assert (new.asked, new.until_s, old.asked) == (1, NOW_S - 100, 0)


def test_once_it_is_everywhere_the_one_before_is_seen_in_the_hour_before_it_began(tables):
    spread(tables, [BOXES], "done", wave_since_ms=(NOW_S - 500) * 1000, ready_since_ms=(NOW_S - 300) * 1000)
    for at_s in (NOW_S - 7000 - 4000, NOW_S - 7000 - 100, NOW_S - 3000, NOW_S - 60):
        answered(tables, BOXES[3], at_s, SLOW if at_s < NOW_S - 7000 else FAST)
    new, old = versions.read(tables, "m", now_s=NOW_S)
    assert (new.boxes, new.asked, new.latency_ms["0.5"] < 50) == (None, 1, True)
    assert (old.boxes, old.asked, old.latency_ms["0.5"] > 5000) == (None, 1, True)


def test_without_a_change_that_spread_it_is_seen_since_it_was_written(tables):
    answered(tables, BOXES[0], NOW_S - 60, SLOW)
    answered(tables, BOXES[0], NOW_S - 40, FAST)
    (only,) = versions.read(tables, "m", now_s=NOW_S)
    assert (only.model, only.since_s, only.asked) == ("m:2", NOW_S - 50, 1)
    assert versions.read(tables, "nobody", now_s=NOW_S) == []
