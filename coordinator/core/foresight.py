"""What a change of a deployment would do to the fleet: which replicas start, stop and change, and who would not run it. Pure."""

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from coordinator.core import planner
from coordinator.core.fit import Node
from coordinator.core.planner import BoxPlan, Outcome, Wanted
from skerry.wire.messages import ReplicaSpec
from skerry.wire.units import format_bytes

Kind = Literal["starts", "stops", "changes", "keeps"]
IN_WORDS: dict[str, str] = {
    "cpus": "cpus", "gpu_memory_bytes": "GPU memory", "image": "image", "isolation_at_least": "isolation", "memory_bytes": "memory",
    "server": "server", "stop_after_ms": "stop_on_box_after", "replaces": "in whose place it runs",
}  # fmt: skip
SIZES = ("memory_bytes", "gpu_memory_bytes")


class Step(msgspec.Struct, frozen=True):
    """What becomes of one replica on one box, and why, or what of it changes."""

    node: str
    deployment: str
    replica: str
    kind: Kind
    text: str = ""


class Foreseen(msgspec.Struct, frozen=True):
    """Everything that becomes another, the deployment's own replicas that do not too, and what the planner says of it."""

    steps: list[Step]
    outcome: Outcome


def foresee(nodes: Sequence[Node], wanted: Sequence[Wanted], changed: Wanted, before: Mapping[str, BoxPlan]) -> Foreseen:
    """With ``changed`` in the place of the deployment of that name, or behind all others. ``before`` is what boxes are told now."""
    name = changed.spec.name
    is_new = all(want.spec.name != name for want in wanted)
    then = planner.plan(nodes, [*(changed if want.spec.name == name else want for want in wanted), *([changed] if is_new else [])], before)
    reasons = {
        (placement.node, placement.replica): placement.reason for outcome in then.outcomes.values() for placement in outcome.placements
    }
    steps = []
    for node, part in sorted(then.boxes.items()):
        old = {replica.name: replica for replica in before.get(node, BoxPlan()).replicas}
        new = {replica.name: replica for replica in part.replicas}
        for replica in sorted(old.keys() | new.keys()):
            step = _step(node, replica, old.get(replica), new.get(replica), reasons.get((node, replica), ""))
            if step.kind != "keeps" or step.deployment == name:
                steps.append(step)
    return Foreseen(steps, then.outcomes[name])


def _step(node: str, name: str, old: ReplicaSpec | None, new: ReplicaSpec | None, reason: str) -> Step:
    if old is None or new is None:
        spec = new or old
        assert spec is not None  # noqa: S101 - for the type checker
        return Step(node, spec.deployment, name, "stops" if new is None else "starts", reason)
    if old == new:
        return Step(node, new.deployment, name, "keeps", reason)
    return Step(node, new.deployment, name, "changes", "; ".join(_differences(old, new)))


def _differences(old: ReplicaSpec, new: ReplicaSpec) -> list[str]:
    found = []
    if (old.model.name, old.model.version) != (new.model.name, new.model.version):
        found.append(f"model {old.model.name}:{old.model.version} becomes {new.model.name}:{new.model.version}")
    elif old.model != new.model:
        found.append("the model's warm-up or state")
    for field, words in IN_WORDS.items():
        a, b = getattr(old, field), getattr(new, field)
        if a != b and field in SIZES:
            found.append(f"{words} {format_bytes(a)} becomes {format_bytes(b)}")
        elif a != b and isinstance(a, str | int | float):
            found.append(f"{words} {a or 'none'} becomes {b or 'none'}")
        elif a != b:
            found.append(words)
    return found or ["what it is called"]
