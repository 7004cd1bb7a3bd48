"""What becomes of a silent box's replicas, and when: the policy of each deployment, told for one box. Pure."""

from collections.abc import Sequence

import msgspec

from coordinator.core.deployment import Deployment
from coordinator.core.liveness import STEADY_MS


class Step(msgspec.Struct, frozen=True):
    """Something that happens at ``at_ms`` if the box stays silent until then; 0: at no time that is known, as the text says."""

    at_ms: int
    deployment: str
    text: str


def outlook(silent_since_ms: int, runs: Sequence[tuple[Deployment, Sequence[str]]]) -> list[Step]:
    """In order of time. ``runs`` are the deployments of which the box has replicas, and their names."""
    steps = [step for spec, names in runs if names for step in _of(silent_since_ms, spec, ", ".join(sorted(names)))]
    return sorted(steps, key=lambda step: (step.at_ms == 0, step.at_ms, step.deployment))


def _of(since_ms: int, spec: Deployment, names: str) -> list[Step]:
    policy = spec.disconnect
    lost_at_ms = since_ms + policy.lost_after_ms
    is_replaced = policy.replace and spec.replicas.count is not None
    if is_replaced:
        lost = f"{names}: lost; started on another box too, if one has room"
    elif spec.replicas.count is None:
        lost = f"{names}: lost; nothing is started elsewhere, since every box has its own (replicas.per_node)"
    else:
        lost = f"{names}: lost; nothing is started elsewhere (disconnect.replace is false)"
    steps = [Step(lost_at_ms, spec.name, lost)]
    if policy.stop_on_box_after_ms:
        stop_at_ms = since_ms + policy.stop_on_box_after_ms
        steps.append(Step(stop_at_ms, spec.name, f"{names}: stopped by the box itself, if it runs and has no link"))
    else:
        steps.append(
            Step(0, spec.name, f"{names}: served by the box itself for as long as it is cut off (disconnect.stop_on_box_after: never)")
        )
    if is_replaced:
        stays = "what runs here stays" if policy.reconcile == "keep_original" else "what runs elsewhere stays"
        back = f"{names}: once the box was heard for {STEADY_MS // 1000} s and both are ready, {stays} (disconnect.reconcile)"
        steps.append(Step(0, spec.name, back))
    return steps
