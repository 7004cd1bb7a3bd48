"""While a change spreads: who was let in gets what a fleet of the new deployment would, all others what a fleet of the old one would."""

import msgspec
from hypothesis import assume, given
from hypothesis import strategies as st

from coordinator.core.planner import Wanted, plan
from skerry.wire.messages import ModelRef
from tests.property.test_planner import nodes, wants


@st.composite
def changes(draw):
    """A fleet, a deployment on it as it was planned before, and what it is to become."""
    boxes = [draw(nodes(f"n{index}")) for index in range(draw(st.integers(0, 6)))]
    old = draw(wants("a"))
    new = draw(wants("a"))
    is_counted = old.spec.replicas.count is not None
    assume((new.spec.replicas.count is not None) == is_counted)
    old = msgspec.structs.replace(old, generation=7, model=ModelRef("m", 1, "old", 1))
    new = msgspec.structs.replace(new, generation=8, model=ModelRef("m", 2, "new", 1))
    before = plan(boxes, [old], {}).boxes if draw(st.booleans()) else {}
    most = max(old.spec.replicas.count or 0, new.spec.replicas.count or 0)
    names = [f"a-{index}" for index in range(most)] if is_counted else [box.id for box in boxes]
    return boxes, old, new, before, names


def staged(old: Wanted, new: Wanted, admitted: set[str]) -> Wanted:
    return msgspec.structs.replace(new, before=old, admitted=frozenset(admitted))


@given(changes())
def test_with_nobody_let_in_all_is_as_before_and_with_everybody_as_if_it_had_always_been_so(change):
    boxes, old, new, before, names = change
    assert plan(boxes, [staged(old, new, set())], before).boxes == plan(boxes, [old], before).boxes
    everybody, plain = plan(boxes, [staged(old, new, set(names))], before), plan(boxes, [new], before)
    assert {node: box.replicas for node, box in everybody.boxes.items()} == {node: box.replicas for node, box in plain.boxes.items()}
    assert everybody.outcomes["a"].wanted == plain.outcomes["a"].wanted
    hosting = {placement.node for placement in plain.outcomes["a"].placements}
    for node in hosting:
        assert everybody.boxes[node].routes == plain.boxes[node].routes


@given(changes(), st.data())
def test_each_unit_has_one_of_the_two_and_its_own(change, data):
    boxes, old, new, before, names = change
    admitted = set(data.draw(st.lists(st.sampled_from(names), unique=True))) if names else set()
    made = plan(boxes, [staged(old, new, admitted)], before)
    is_counted = new.spec.replicas.count is not None
    for node, box in made.boxes.items():
        for replica in box.replicas:
            is_in = (replica.name if is_counted else node) in admitted
            assert replica.model.sha256 == ("new" if is_in else "old")
        models = {replica.model.version for replica in box.replicas}
        for route in box.routes:
            assert route.version in ({new.spec.version, old.spec.version} if models else {old.spec.version})
    if not is_counted:
        alone = {node: plan(boxes, [new if node in admitted else old], before).boxes[node].replicas for node in made.boxes}
        assert {node: box.replicas for node, box in made.boxes.items()} == alone
    else:
        held = {replica.name for box in made.boxes.values() for replica in box.replicas}
        assert {name for name in held if name not in admitted} <= {f"a-{index}" for index in range(old.spec.replicas.count or 0)}
        assert {name for name in held if name in admitted} <= {f"a-{index}" for index in range(new.spec.replicas.count or 0)}
    placed = {(placement.node, placement.replica) for placement in made.outcomes["a"].placements}
    assert placed == {(node, replica.name) for node, box in made.boxes.items() for replica in box.replicas}
    assert not {refusal.node for refusal in made.outcomes["a"].refusals} & {node for node, _ in placed} or not is_counted
