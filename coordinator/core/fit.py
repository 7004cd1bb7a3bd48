"""Whether a box can run a deployment at all, whatever else it runs. Pure."""

from collections.abc import Mapping
from fnmatch import fnmatchcase

import msgspec

from coordinator.core.deployment import Deployment
from skerry.wire.messages import RUNGS, Rung, Tier

MAX_REASON = 300
"""Characters of a box's own words in a reason: it is kept once for each deployment."""


class Node(msgspec.Struct, frozen=True):
    """A box as the planner sees it."""

    id: str
    tier: Tier
    labels: dict[str, str]
    gateway_url: str
    online: bool
    memory_bytes: int
    gpu_memory_bytes: int
    rungs: list[Rung]
    rungs_absent: dict[Rung, str] = {}
    silent_ms: int = 0
    """How long it was not heard; 0 for one that is there."""
    ready: frozenset[str] = frozenset()
    """Replicas that it last said are ready."""
    drained: str = ""
    """Why it is to run nothing; empty where it may."""


def label_mismatch(node: Node, labels: Mapping[str, str]) -> str:
    """Why a box is not selected; empty where it is. A cloud box need not carry the labels of sites, only must not contradict them."""
    for key, pattern in sorted(labels.items()):
        value = node.labels.get(key)
        if value is None:
            if node.tier == "cloud":
                continue
            return f"has no label {key!r}, {pattern!r} is asked for"
        if not fnmatchcase(value, pattern):
            return f"label {key}={value} does not match {pattern!r}"
    return ""


def unfit(node: Node, spec: Deployment) -> str:
    """Why a box can't run a deployment whatever else it runs; empty where it can."""
    if node.tier not in spec.tiers:
        return f"tier {node.tier} is not among {', '.join(spec.tiers)}"
    mismatch = label_mismatch(node, spec.labels)
    if mismatch:
        return mismatch
    if spec.accelerator == "gpu" and not node.gpu_memory_bytes:
        return "has no GPU, accelerator: gpu is asked for"
    if spec.accelerator == "none" and node.gpu_memory_bytes:
        return "has a GPU, accelerator: none is asked for"
    if not node.rungs:
        return "has not said yet which sandboxes it offers"
    return _no_rung(node, spec)


def least_rung(spec: Deployment) -> Rung:
    """The weakest rung that will do: an image needs an engine, which is the rung container at the least."""
    if spec.server is None and not spec.image:
        return spec.isolation_at_least
    return max(spec.isolation_at_least, "container", key=RUNGS.index)


def _no_rung(node: Node, spec: Deployment) -> str:
    """Why none of a box's sandboxes will do; empty where one will."""
    asked, least = spec.isolation_at_least, least_rung(spec)
    offers = f"offers {', '.join(node.rungs)}"
    if spec.server is not None:
        if RUNGS.index(asked) > RUNGS.index("container"):
            return (
                f"isolation.at_least: {asked} is asked for, and a server of one's own runs on the rung container alone: "
                "elsewhere each container has a loopback of its own, and its server could not be reached"
            )
        if "container" not in node.rungs:
            return f"server: runs on the rung container, {offers}{_absence(node, 'container')}"
    if max(RUNGS.index(rung) for rung in node.rungs) >= RUNGS.index(least):
        return ""
    if least != asked:
        return f"image: runs on the rung container or above, {offers}{_absence(node, least)}"
    return f"isolation.at_least: {asked} is asked for, {offers}{_absence(node, asked)}"


def _absence(node: Node, rung: Rung) -> str:
    """The box's own word on why it does not offer a rung, where it gave one."""
    reason = node.rungs_absent.get(rung, "")[:MAX_REASON]
    return f"; {rung} is not available on this box: {reason}" if reason else ""
