"""A box is told the same anew before it is too old to be taken, after it was enrolled, when keys are retired, and not otherwise."""

import sqlite3
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlite_utils import Database

from coordinator.core import deployment
from coordinator.plan_loop import Terms, replan
from coordinator.registry import deployments, models, nodes
from coordinator.registry.migrations import migrate
from skerry.wire.messages import Birth, Desired, ModelRef

HOUR_MS = 3_600_000
START_MS = 1_800_000_000_000
LIFE_MS = 720 * HOUR_MS
BOXES = ("store-1", "store-2", "van-7")
SPEC = "name: d\nmodel: m:1\nplace: {tier: [edge]}\nresources: {memory: 64MiB}\n"


@pytest.fixture
def tables() -> Iterator[Database]:
    tables = Database(filled())
    yield tables
    tables.close()


def filled() -> sqlite3.Connection:
    """A registry with three boxes and one deployment on all of them."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    migrate(connection)
    tables = Database(connection)
    models.save_model(tables, ModelRef("m", 1, "a" * 64, 10), START_MS)
    deployments.save_deployment(tables, deployment.parse(SPEC), SPEC, START_MS)
    for name in BOXES:
        birth = Birth("edge", {"site": name}, "http://127.0.0.1:1", "b", 1, "v", 4, 2**33, rungs=["process"])
        nodes.save_birth(tables, name, birth, START_MS)
    return connection


def told(tables: Database, now_ms: int, terms: Terms) -> dict[str, Desired]:
    return {document.node: document for document in replan(tables, fleet="f", now_ms=now_ms, terms=terms).changed}


def enrol(tables: Database, name: str, now_ms: int) -> None:
    tables.execute("INSERT OR REPLACE INTO enrolled VALUES (?, 'edge', '{}', 'k', ?, ?, NULL)", [name, name, now_ms])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["pass", "enrol", "enrol and back", "retire", "back"]), st.integers(1, 200), st.sampled_from(BOXES)),
        max_size=20,
    )
)
def test_what_a_box_was_told_last_can_always_be_taken_by_one_that_knows_nothing(happened):
    """The oracle knows the rules of a box alone: not over, not from before its enrolment, and of a higher generation than the last."""
    tables = Database(filled())
    wall_ms, retired = START_MS, []
    last: dict[str, Desired] = {}
    since = dict.fromkeys(BOXES, 0)
    for what, hours, name in [("pass", 1, ""), *happened]:
        if what == "retire":
            retired = [*retired, f"key-{len(retired)}"]
        elif what != "pass":
            if "enrol" in what:
                enrol(tables, name, wall_ms)
                since[name] = wall_ms
            if "back" in what:
                wall_ms -= hours * HOUR_MS  # the coordinator's own clock is set
        else:
            wall_ms += hours * HOUR_MS
        for node, document in told(tables, wall_ms, Terms(LIFE_MS, retired)).items():
            before = last.get(node)
            assert before is None or document.generation > before.generation
            assert before is None or document.issued_at_ms > before.issued_at_ms, "boxes take it for proof of the time"
            last[node] = document
        assert set(last) == set(BOXES)
        for node, document in last.items():
            assert document.retired_keys == retired
            assert document.issued_at_ms >= since[node]
            assert wall_ms < document.expires_at_ms
            assert document.expires_at_ms - document.issued_at_ms == LIFE_MS
    assert told(tables, wall_ms, Terms(LIFE_MS, retired)) == {}, "nothing is told twice"
    tables.close()


def test_a_box_that_was_told_is_told_anew_within_half_of_its_life_and_not_all_boxes_at_once(tables):
    terms = Terms(LIFE_MS, [])
    assert set(told(tables, START_MS, terms)) == set(BOXES)
    hours = [hour for hour in range(1, 720) for _ in told(tables, START_MS + hour * HOUR_MS, terms)][: len(BOXES)]
    assert all(360 <= hour <= 481 for hour in hours)
    assert len(set(hours)) == len(BOXES)


def test_while_the_signer_has_not_said_which_keys_are_retired_what_it_said_before_stands(tables):
    told(tables, START_MS, Terms(LIFE_MS, ["old"]))
    assert told(tables, START_MS + 1, Terms(LIFE_MS, None)) == {}
    enrol(tables, "van-7", START_MS + HOUR_MS)
    (document,) = told(tables, START_MS + 2 * HOUR_MS, Terms(LIFE_MS, None)).values()
    assert (document.node, document.retired_keys) == ("van-7", ["old"])


def test_a_shorter_life_is_taken_up_at_once(tables):
    told(tables, START_MS, Terms(LIFE_MS, []))
    assert set(told(tables, START_MS + 1, Terms(LIFE_MS // 2, []))) == set(BOXES)
    assert told(tables, START_MS + 2, Terms(LIFE_MS // 2, [])) == {}
