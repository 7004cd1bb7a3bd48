"""A box that is drained ends up empty, and what can run elsewhere is never without a box where it is ready on the way there."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core.deployment import Deployment, Replicas
from coordinator.core.fit import Node
from coordinator.core.planner import BoxPlan, Wanted, plan
from skerry.wire.messages import ModelRef

MODEL = ModelRef("m", 1, "digest", 1)


def box(name: str, memory_bytes: int) -> Node:
    return Node(name, "edge", {}, f"http://{name}", True, memory_bytes, 0, ["process"])


def deployment(**replicas: int) -> Wanted:
    spec = Deployment(
        name="m", model="m", version=1, replicas=Replicas(**replicas), labels={}, tiers=["edge"], accelerator="any", memory_bytes=4,
        cpus=1.0, gpu_memory_bytes=0, isolation_at_least="process", deadline_ms=50, target=0.9, split="edge",
    )  # fmt: skip
    return Wanted(spec, 1, MODEL)


class World:
    """Boxes that do what they are told when ``report`` is called, and say so."""

    def __init__(self, sizes: list[int], want: Wanted) -> None:
        self.boxes = {f"b{index}": box(f"b{index}", size) for index, size in enumerate(sizes)}
        self.want = want
        self.told: dict[str, BoxPlan] = {}
        self.ready: dict[str, set[str]] = {name: set() for name in self.boxes}

    def plan(self) -> None:
        boxes = [msgspec.structs.replace(node, ready=frozenset(self.ready[name])) for name, node in self.boxes.items()]
        made = plan(boxes, [self.want], self.told)
        self.told, self.outcome = made.boxes, made.outcomes["m"]
        for name, part in made.boxes.items():  # what is to go goes at once, what is to come takes its time
            self.ready[name] &= {replica.name for replica in part.replicas}

    def report(self, names: list[str]) -> None:
        for name in names:
            self.ready[name] = {replica.name for replica in self.told[name].replicas}

    def drain(self, names: set[str]) -> None:
        for name in self.boxes:
            self.boxes[name] = msgspec.structs.replace(self.boxes[name], drained="is drained" if name in names else "")

    def answering(self) -> set[str]:
        return set().union(*self.ready.values())

    def holds(self, name: str) -> set[str]:
        return {replica.name for replica in self.told[name].replicas}


@given(st.data())
def test_nothing_is_without_a_ready_box_while_boxes_are_drained_one_after_the_other(data):
    sizes = data.draw(st.lists(st.sampled_from([10, 15, 20, 40]), min_size=2, max_size=5))
    count = data.draw(st.integers(1, 6))
    world = World(sizes, deployment(count=count))
    world.plan()
    world.report(list(world.boxes))
    world.plan()
    names = sorted(world.boxes)
    for _ in range(data.draw(st.integers(1, 4))):
        drained = set(data.draw(st.lists(st.sampled_from(names), max_size=len(names) - 1)))
        world.drain(drained)
        room = sum(sizes[names.index(name)] * 4 // 5 // 4 for name in names if name not in drained)
        before = world.answering()
        was = {name: world.holds(name) for name in names}
        for _ in range(data.draw(st.integers(0, 3))):
            world.plan()
            if room >= count:
                assert before <= world.answering(), "a replica is ready nowhere though there is room"
                before = world.answering()
            for name in set(names) - drained:
                alone = {replica for replica in was[name] if sum(replica in was[other] for other in names) == 1}
                assert alone <= world.holds(name), "it moved for nothing"
            world.report(data.draw(st.lists(st.sampled_from(names), unique=True)))
        for _ in range(3):
            world.plan()
            world.report(names)
        world.plan()
        assert {name: world.holds(name) for name in drained} == {name: set() for name in drained}
        found = len(set().union(*(world.holds(name) for name in names)))
        assert found == min(count, room)
        assert ("drained" in {refusal.reason.split()[-1] for refusal in world.outcome.refusals}) == bool(drained)


def test_where_each_box_has_its_own_a_drained_one_is_empty_at_once():
    world = World([20, 20], deployment(per_node=1))
    world.plan()
    world.report(["b0", "b1"])
    world.drain({"b0"})
    world.plan()
    assert (world.holds("b0"), world.holds("b1")) == (set(), {"m-0"})
    assert [(refusal.node, refusal.reason) for refusal in world.outcome.refusals] == [("b0", "is drained")]
    assert world.outcome.problem == ""


def test_a_replica_goes_on_where_it_is_drained_until_it_is_ready_elsewhere():
    world = World([10, 10], deployment(count=1))
    world.plan()
    world.report(["b0"])
    world.drain({"b0"})
    world.plan()
    assert (world.holds("b0"), world.holds("b1")) == ({"m-0"}, {"m-0"})
    world.plan()
    assert world.holds("b0") == {"m-0"}, "it is not ready there yet"
    world.report(["b1"])
    world.plan()
    assert (world.holds("b0"), world.holds("b1")) == (set(), {"m-0"})
    world.drain(set())
    world.plan()
    assert (world.holds("b0"), world.holds("b1")) == (set(), {"m-0"}), "it does not come back for nothing"
