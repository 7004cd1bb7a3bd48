"""While a change spreads: who was let in gets what a fleet of the new deployment would, all others what a fleet of the old one would."""

import msgspec
from hypothesis import assume, given
from hypothesis import strategies as st

from coordinator.core.deployment import parse
from coordinator.core.fit import Node, unfit
from coordinator.core.planner import Wanted, plan
from coordinator.core.rollout import Compared, Rules
from skerry.wire.messages import ModelRef, Shadow
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


@given(changes(), st.data())
def test_a_shadow_runs_beside_what_serves_where_there_is_room_and_changes_nothing_else(change, data):
    boxes, old, new, before, names = change
    shadowing = set(data.draw(st.lists(st.sampled_from(names), unique=True))) if names else set()
    asked = Compared(Shadow(0.5))
    new = msgspec.structs.replace(new, spec=msgspec.structs.replace(new.spec, rollout=Rules([1], compared=asked)))
    plain = plan(boxes, [staged(old, new, set())], before)
    made = plan(boxes, [msgspec.structs.replace(staged(old, new, set()), shadowing=frozenset(shadowing))], before)
    assert made.outcomes == plain.outcomes
    is_counted = new.spec.replicas.count is not None
    for node, box in made.boxes.items():
        shadows = [replica for replica in box.replicas if replica.is_shadow]
        assert [replica for replica in box.replicas if not replica.is_shadow] == plain.boxes[node].replicas
        assert [msgspec.structs.replace(route, shadow=None) for route in box.routes] == plain.boxes[node].routes
        assert [route.shadow for route in box.routes if route.shadow] == [asked.shadow] * len(shadows)
        units = {placement.replica if is_counted else node for placement in plain.outcomes["a"].placements if placement.node == node}
        assert len(shadows) <= bool(units & shadowing)
        taken = sum(replica.memory_bytes for replica in box.replicas)
        here = next(one for one in boxes if one.id == node)
        assert taken <= here.memory_bytes * 0.8
        for shadow in shadows:
            assert (shadow.model.sha256, shadow.name, shadow.generation) == ("new", "a-shadow", 8)
            assert not unfit(here, new.spec)
        if units & shadowing and not shadows and not unfit(here, new.spec):
            gpu = sum(replica.gpu_memory_bytes for replica in box.replicas)
            has_memory = taken + new.spec.memory_bytes <= here.memory_bytes * 0.8
            assert not (has_memory and gpu + new.spec.gpu_memory_bytes <= here.gpu_memory_bytes), "there was room"


@given(st.data())
def test_shadows_of_several_changes_share_what_room_there_is(data):
    """Boxes and deployments that differ in size alone."""
    sizes = st.sampled_from([4, 5, 8, 10, 20])
    boxes = [Node(f"n{n}", "edge", {}, f"http://n{n}", True, data.draw(sizes), 0, ["process"]) for n in range(3)]
    rules = Rules([1], compared=Compared(Shadow(0.5)))
    wanted = []
    for name in "ab":
        old = wants_of(name, data.draw(st.sampled_from([1, 2, 3])), 1, None)
        new = wants_of(name, data.draw(st.sampled_from([1, 2, 3])), 2, rules)
        wanted.append(msgspec.structs.replace(staged(old, new, set()), shadowing=frozenset({"n0", "n1", "n2"})))
    made = plan(boxes, wanted, {})
    for box in boxes:
        replicas = made.boxes[box.id].replicas
        taken = sum(replica.memory_bytes for replica in replicas)
        assert taken <= box.memory_bytes * 0.8
        for want in wanted:
            serves = any(replica.deployment == want.spec.name and not replica.is_shadow for replica in replicas)
            has_shadow = any(replica.deployment == want.spec.name and replica.is_shadow for replica in replicas)
            assert serves or not has_shadow
            assert has_shadow or not serves or taken + want.spec.memory_bytes > box.memory_bytes * 0.8, "there was room"


def wants_of(name: str, memory_bytes: int, version: int, rules: Rules | None) -> Wanted:
    text = f"name: {name}\nmodel: m:{version}\nreplicas: {{per_node: 1}}\nresources: {{memory: 256MiB}}\nslo: {{deadline_ms: 50}}\n"
    spec = msgspec.structs.replace(parse(text), memory_bytes=memory_bytes, rollout=rules)
    return Wanted(spec, version, ModelRef("m", version, f"v{version}", 1))
