"""What a box should be against what it says that it is: each thing once, and unlike only where it is."""

import msgspec
import pytest

from coordinator.core.difference import difference
from skerry.wire.messages import Birth, Desired, ModelRef, ReplicaReport, ReplicaSpec, Reported, Software

MODEL = ModelRef("detector", 3, "d" * 64, 5)
SPEC = ReplicaSpec("shelf-0", "shelf", 7, MODEL, 1, 1.0, isolation_at_least="container")
REPORT = ReplicaReport("shelf-0", "shelf", 7, "ready", sha256=MODEL.sha256, rung="gvisor")
BIRTH = Birth("edge", {}, "u", "b", 1, "0.2.0", 1, 1)
TOLD = Desired("f", "store-1", 4, 1, [SPEC], software=Software("0.2.0"))
SAID = Reported(4, [REPORT])


def unlike(desired, reported, birth=BIRTH):
    return {
        (line.replica, line.field): (line.wanted, line.found) for line in difference(desired, birth, reported).lines if not line.is_alike
    }


def test_a_box_that_is_what_it_should_be_differs_in_nothing():
    found = difference(TOLD, BIRTH, SAID)
    assert found.is_alike
    assert (found.generation, found.reported_generation) == (4, 4)
    of_replica = [("shelf-0", field) for field in ("model", "generation", "phase", "isolation")]
    assert [(line.replica, line.field) for line in found.lines] == [("", "generation"), ("", "software"), *of_replica]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"phase": "backoff"}, {("shelf-0", "phase"): ("ready", "backoff")}),
        ({"phase": "failed", "is_crash_loop": True}, {("shelf-0", "phase"): ("ready", "crash_loop")}),
        ({"generation": 6}, {("shelf-0", "generation"): ("7", "6")}),
        ({"sha256": "e" * 64}, {("shelf-0", "model"): ("detector:3", "sha256 eeeeeeeeeeee")}),
        ({"sha256": ""}, {("shelf-0", "model"): ("detector:3", "")}),
        ({"rung": "process"}, {("shelf-0", "isolation"): ("at least container", "process")}),
        ({"rung": "microvm"}, {}),
        ({"rung": None}, {("shelf-0", "isolation"): ("at least container", "")}),
    ],
)
def test_what_is_unlike_is_shown_from_both_sides(changes, expected):
    assert unlike(TOLD, Reported(4, [msgspec.structs.replace(REPORT, **changes)])) == expected


def test_what_is_missing_and_what_is_too_much_is_shown():
    assert unlike(TOLD, Reported(4)) == {("shelf-0", "replica"): ("detector:3", "")}
    assert unlike(Desired("f", "store-1", 5, 1), SAID) == {("", "generation"): ("5", "4"), ("shelf-0", "replica"): ("", "ready")}
    assert unlike(TOLD, SAID, msgspec.structs.replace(BIRTH, version="0.1.0")) == {("", "software"): ("0.2.0", "0.1.0")}


def test_a_box_that_was_told_nothing_and_says_nothing_is_alike():
    assert difference(None, None, None).is_alike
    assert unlike(TOLD, None) == {("", "generation"): ("4", "0"), ("shelf-0", "replica"): ("detector:3", "")}
