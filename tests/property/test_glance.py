"""Sums over a fleet are what a look at each box would add up to, and the map shows each box once, whatever order things came in."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlite_utils import Database as Tables

from coordinator.core.planner import Outcome, Placement
from coordinator.core.search import Search
from coordinator.core.sequence import Numbering
from coordinator.registry import deployments, events, finding, glance, models, nodes
from coordinator.registry.migrations import migrate
from coordinator.registry.nodes import Drained
from skerry.wire.messages import Birth, Desired, ModelRef, Presence, ReplicaReport, ReplicaSpec, Reported

NAMES = ["store-1", "store-2", "van-7", "depot"]
MODELS = {"a": ModelRef("m", 1, "1" * 64, 5), "b": ModelRef("m", 2, "2" * 64, 5), "c": ModelRef("other", 1, "3" * 64, 5)}
PHASES = ["ready", "starting", "failed", "backoff"]


def spec(name: str, model: str, generation: int) -> ReplicaSpec:
    return ReplicaSpec(f"{name}-0", name, generation, MODELS[model], 1, 1.0)


def report(name: str, model: str, generation: int, phase: Any) -> ReplicaReport:
    return ReplicaReport(f"{name}-0", name, generation, phase, sha256=MODELS[model].sha256)


told = st.builds(
    lambda generation, replicas: (generation, replicas),
    st.integers(1, 3),
    st.dictionaries(st.sampled_from(["one", "two"]), st.tuples(st.sampled_from("abc"), st.integers(1, 2)), max_size=2),
)
said = st.builds(
    lambda generation, refused, replicas: (generation, refused, replicas),
    st.integers(0, 3),
    st.sampled_from(["", "", "stale"]),
    st.dictionaries(
        st.sampled_from(["one", "two"]), st.tuples(st.sampled_from("abc"), st.integers(1, 2), st.sampled_from(PHASES)), max_size=2
    ),
)


def agreeing(box: dict[str, Any]) -> dict[str, Any]:
    """It does what it was told last."""
    generation, replicas = box["told"][-1]
    return {**box, "said": [*box["said"], (generation, "", {name: (*what, "ready") for name, what in replicas.items()})]}


boxes = st.dictionaries(
    st.sampled_from(NAMES),
    st.fixed_dictionaries({
        "birth": st.booleans(), "online": st.booleans(), "goodbye": st.booleans(), "lost": st.booleans(), "revoked": st.booleans(),
        "drained": st.booleans(), "site": st.sampled_from(["", "north", "south"]), "told": st.lists(told, max_size=3),
        "said": st.lists(said, max_size=3), "agrees": st.booleans(),
    }).map(lambda box: agreeing(box) if box["agrees"] and box["told"] else box),
)  # fmt: skip


def kept(fleet: dict[str, dict[str, Any]]) -> Tables:
    tables = Tables(memory=True)
    migrate(tables.conn)
    for ref in MODELS.values():
        models.save_model(tables, ref, 1)
    for name, box in fleet.items():
        nodes.save_presence(tables, name, Presence(box["online"], "b", 1, is_goodbye=box["goodbye"] and not box["online"]), 5)
        if box["birth"]:
            labels = {"site": box["site"]} if box["site"] else {}
            nodes.save_birth(tables, name, Birth("edge", labels, "u", "b", 1, "0.1.0", 1, 1, rungs=["process"]), 5)
        nodes.save_lost(tables, name, is_lost=box["lost"])
        if box["drained"]:
            nodes.save_drained(tables, name, Drained(5, ""))
        if box["revoked"]:
            tables.execute("INSERT INTO enrolled VALUES (?, 'edge', '{}', 'k', ?, 1, 9)", [name, name])
        for document in box["told"]:
            replicas = [spec(deployment, *what) for deployment, what in document[1].items()]
            nodes.save_desired(tables, Desired("f", name, document[0], 1, replicas))
        for word in box["said"]:
            replicas = [report(deployment, *what) for deployment, what in word[2].items()]
            nodes.save_reported(tables, name, Reported(word[0], replicas, word[1]), 5)
    return tables


def last(found: list[Any]) -> Any:
    return found[-1] if found else None


def state_of(box: dict[str, Any]) -> str:
    if box["revoked"]:
        return "revoked"
    if box["online"]:
        return "online"
    if not box["birth"]:
        return "new"
    return "offline" if box["goodbye"] else "lost" if box["lost"] else "unknown"


def letter_of(box: dict[str, Any]) -> str:
    away = {"revoked": "x", "lost": "l", "unknown": "s", "offline": "g", "new": "n"}.get(state_of(box))
    if away:
        return away
    phases = {what[2] for what in (last(box["said"]) or (0, "", {}))[2].values()}
    refused = bool((last(box["said"]) or (0, "", {}))[1])
    return "f" if refused or "failed" in phases else "t" if "backoff" in phases else "d" if box["drained"] else "o"


def weight_of(box: dict[str, Any]) -> int | None:
    state, word, document = state_of(box), last(box["said"]) or (0, "", {}), last(box["told"]) or (0, {})
    phases = {what[2] for what in word[2].values()}
    if state == "revoked":
        return None
    if state == "lost" or word[0] > document[0] or word[1] or "failed" in phases:
        return 0
    if state in ("unknown", "offline") or "backoff" in phases:
        return 1
    if state == "online" and word[0] != document[0]:
        return 2
    return 3 if box["drained"] else None


@settings(max_examples=250, deadline=None)
@given(boxes, st.sampled_from(["site", "region"]), st.sampled_from(["", "store", "van"]))
def test_the_map_has_each_box_once_under_its_label_and_with_its_letter(fleet, by, part):
    tables = kept(fleet)
    expected = sorted(
        (box["site"] if by == "site" and box["birth"] else "", name, letter_of(box)) for name, box in fleet.items() if part in name
    )
    found = glance.read_cells(tables, Search([part] if part else []), by)
    assert [(one.value, *each) for one in found for each in zip(json.loads(one.names), one.letters, strict=True)] == expected
    assert len({one.value for one in found}) == len(found)
    tables.conn.close()


@settings(max_examples=250, deadline=None)
@given(boxes, st.integers(1, 4))
def test_what_needs_a_look_comes_worst_first_and_is_counted_whole(fleet, limit):
    tables = kept(fleet)
    weighed = sorted((weight, name) for name, box in fleet.items() if (weight := weight_of(box)) is not None)
    needy = glance.read_needy(tables, limit=limit)
    assert needy.names == [name for _, name in weighed][:limit]
    assert needy.urgent == sum(weight < 2 for weight, _ in weighed)
    assert glance.read_silent(tables) == {name for name, box in fleet.items() if state_of(box) in ("unknown", "lost", "offline")}
    tables.conn.close()


@settings(max_examples=250, deadline=None)
@given(boxes)
def test_a_replica_runs_where_it_is_ready_and_of_what_was_told_last(fleet):
    tables = kept(fleet)
    for deployment in ("one", "two"):
        expected = set()
        for name, box in fleet.items():
            document, word = last(box["told"]), last(box["said"])
            if document and word and deployment in document[1] and deployment in word[2]:
                model, generation, phase = word[2][deployment]
                if phase == "ready" and (model, generation) == document[1][deployment]:
                    expected.add((name, f"{deployment}-0"))
        assert glance.read_running(tables, deployment) == expected
    tables.conn.close()


@settings(max_examples=150, deadline=None)
@given(boxes, st.sampled_from(["", "one", "t*", "none"]), st.sampled_from(["", "m", "m:2", "other:1", "o*", "m:7"]))
def test_boxes_are_found_by_what_they_were_told_to_run(fleet, deployment, model):
    tables = kept(fleet)
    wanted = {"": "abc", "m": "ab", "m:2": "b", "other:1": "c", "o*": "c", "m:7": ""}[model]
    expected = []
    for name, box in fleet.items():
        replicas = (last(box["told"]) or (0, {}))[1]
        of = {"": True, "one": "one" in replicas, "t*": "two" in replicas, "none": False}[deployment]
        if of and (not model or any(used in wanted for used, _ in replicas.values())):
            expected.append(name)
    assert finding.find(tables, Search(deployment=deployment, model=model)) == sorted(expected)
    tables.conn.close()


@pytest.mark.parametrize("enormous", [0, 2**53])
def test_numbers_that_come_and_that_never_will_add_up(enormous):
    tables = Tables(memory=True)
    migrate(tables.conn)
    for number in range(3):
        events.save_numbering(tables, f"box-{number}", "e", "events", Numbering(20, ((3, 4), (8, 10)), lost=number + enormous), 0)
        events.save_numbering(tables, f"box-{number}", "e", "samples", Numbering(20, (), lost=1), 0)
    streams = glance.read_streams(tables)
    assert (streams["events"].missing, streams["samples"].missing) == (15, 0)
    assert (streams["events"].lost, streams["samples"].lost) == (min(2**53, 3 + 3 * enormous), 3)


placements = st.lists(
    st.builds(Placement, st.sampled_from([*NAMES, "gone"]), st.sampled_from(["one-0", "one-1"]), st.just("why"), st.booleans()), max_size=6
)


@settings(max_examples=250, deadline=None)
@given(boxes, placements, st.booleans())
def test_a_deployment_stands_as_its_placements_do(fleet, placed, by_box):
    tables = kept(fleet)
    assert glance.read_standing(tables, "one", by_box=by_box) is None
    deployments.save_outcomes(tables, {"one": Outcome(7, placed, problem="too few"), "two": Outcome(1)})
    ready = set()
    for one in placed:
        box = fleet.get(one.node)
        if box is None or one.is_lost or not box["told"] or not box["said"] or one.replica != "one-0":
            continue
        document, word = box["told"][-1][1], box["said"][-1][2]
        if "one" in document and "one" in word and word["one"] == (*document["one"], "ready"):
            ready.add((one.replica, one.node if by_box else ""))
    unheard = sum(one.node in fleet and state_of(fleet[one.node]) in ("unknown", "lost", "offline") for one in placed)
    assert glance.read_standing(tables, "one", by_box=by_box) == glance.Standing(
        7, len(ready), unheard, len({one.node for one in placed}), "too few"
    )
    assert glance.read_standing(tables, "two", by_box=by_box) == glance.Standing(1, 0, 0, 0, "")
    tables.conn.close()
