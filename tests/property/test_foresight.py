"""What is foreseen of a change is what comes of it."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core.foresight import foresee
from coordinator.core.planner import BoxPlan, plan
from skerry.wire.messages import ModelRef
from tests.property.test_planner import fleets, wants


def replicas_of(boxes: dict[str, BoxPlan]) -> dict[tuple[str, str], object]:
    return {(node, replica.name): replica for node, box in boxes.items() for replica in box.replicas}


@given(fleets(), st.data())
def test_it_is_what_the_next_plan_differs_by(fleet, data):
    boxes, wanted = fleet
    before = plan(boxes, wanted, {}).boxes
    changed = data.draw(wants(data.draw(st.sampled_from("abcdz"))))
    changed = msgspec.structs.replace(changed, generation=99, model=changed.model and ModelRef("m", 9, "ninth", 1))
    found = foresee(boxes, wanted, changed, before)
    names = [want.spec.name for want in wanted]
    after_wanted = [changed if want.spec.name == changed.spec.name else want for want in wanted]
    after = plan(boxes, after_wanted if changed.spec.name in names else [*wanted, changed], before)
    was, will = replicas_of(before), replicas_of(after.boxes)
    said = {(step.node, step.replica): step.kind for step in found.steps}
    assert len(said) == len(found.steps)
    for key in was.keys() | will.keys():
        kind = "starts" if key not in was else "stops" if key not in will else "keeps" if was[key] == will[key] else "changes"
        own = (will.get(key) or was[key]).deployment == changed.spec.name
        assert said.get(key) == (kind if kind != "keeps" or own else None)
    assert found.outcome == after.outcomes[changed.spec.name]
    for step in found.steps:
        assert step.text or step.kind == "stops"


@given(fleets())
def test_a_deployment_that_stays_as_it_is_changes_nothing(fleet):
    boxes, wanted = fleet
    before = plan(boxes, wanted, {}).boxes
    for want in wanted:
        found = foresee(boxes, wanted, want, before)
        assert {step.kind for step in found.steps} <= {"keeps"}
