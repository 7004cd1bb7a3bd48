"""Whether everything is all right, and if not, what needs a look. Pure: state and time go in, words come out."""

from collections.abc import Iterable, Sequence

import msgspec

from coordinator.console.wording import Level, percent
from skerry.wire.api import NodeView, StatusView
from skerry.wire.fleet import DeploymentSummary, FleetView

SETTLE_MS = 120_000
"""How long a changed deployment may take before what is not ready counts as trouble."""
FEWEST_ASKED = 20
"""Requests in the window below which a missed target says nothing."""
_ORDER: dict[Level, int] = {"bad": 0, "warn": 1, "busy": 2, "idle": 3, "good": 4}


class Trouble(msgspec.Struct, frozen=True):
    """Something to look at, and where; ``silent_since_ms`` is 0 for all but a box that is silent."""

    level: Level
    subject: str
    href: str
    text: str
    silent_since_ms: int = 0


class Verdict(msgspec.Struct, frozen=True):
    """The one glance. ``troubles`` has the worst first."""

    level: Level
    headline: str
    text: str
    troubles: list[Trouble]


def judge(status: StatusView, nodes: Sequence[NodeView], fleet: FleetView, *, now_ms: int) -> Verdict:
    """The state of the fleet in one sentence. ``nodes`` are boxes to be told of, all that need a look in a fleet of some dozens; how many
    others there are, ``fleet`` says."""
    found = [*_of_the_broker(status)]
    for node in nodes:
        found += _of_a_node(node)
    for deployment in fleet.deployments:
        found += _of_a_deployment(deployment, now_ms)
    found.sort(key=lambda trouble: (_ORDER[trouble.level], trouble.subject))
    text = f"{status.nodes_online} of {status.nodes} boxes online, {status.deployments_ready} of {status.deployments} deployments ready"
    named = {trouble.subject for trouble in found if trouble.level in ("bad", "warn")} & {node.id for node in nodes}
    needs_a_look = sum(1 for trouble in found if trouble.level in ("bad", "warn")) + max(0, fleet.urgent - len(named))
    if needs_a_look:
        return Verdict(found[0].level, f"{needs_a_look} {'thing needs' if needs_a_look == 1 else 'things need'} a look", text, found)
    if any(trouble.level != "idle" for trouble in found):
        return Verdict("busy", "Settling", text, found)
    if not status.nodes:
        return Verdict(
            "idle", "No box has connected yet", "Install the box software and give it this fleet's broker; it appears here by itself", []
        )
    return Verdict("good", "All is well", text, found)


def _of_the_broker(status: StatusView) -> Iterable[Trouble]:
    if not status.broker_connected:
        text = "no connection: boxes can't be heard or told anything, and what is shown of them is the last that was heard"
        yield Trouble("bad", "broker", "/events", text)


def _of_a_node(node: NodeView) -> Iterable[Trouble]:
    href = f"/nodes/{node.id}"
    if node.state in ("unknown", "lost"):
        level: Level = "bad" if node.state == "lost" else "warn"
        yield Trouble(level, node.id, href, "can't tell a crash from a cut link", node.silent_since_ms)
    elif node.state == "offline":
        yield Trouble("warn", node.id, href, "its agent signed off", node.silent_since_ms)
    if node.drained_at_ms:
        yield Trouble("idle", node.id, href, f"drained: {node.drain_reason}" if node.drain_reason else "drained")
    if node.is_ahead:
        text = f"holds generation {node.reported_generation}, {node.generation} is known here: restored from a backup? see 'skerry recover'"
        yield Trouble("bad", node.id, href, text)
    elif node.refused:
        yield Trouble("bad", node.id, href, f"refuses what it is told: {node.refused}")
    elif node.state == "online" and node.reported_generation != node.generation:
        yield Trouble("busy", node.id, href, f"generation {node.generation} is wanted, it reports {node.reported_generation}")
    for replica in node.replicas:
        if replica.phase in ("backoff", "failed"):
            level = "bad" if replica.phase == "failed" else "warn"
            yield Trouble(level, node.id, href, f"{replica.name} {replica.state.replace('_', ' ')}: {replica.reason or 'no reason given'}")


def _of_a_deployment(view: DeploymentSummary, now_ms: int) -> Iterable[Trouble]:
    href = f"/deployments/{view.name}"
    if view.problem:
        level: Level = "busy" if view.problem == "not planned yet" else "bad"
        yield Trouble(level, view.name, href, view.problem)
    elif view.ready < view.wanted:
        level = "busy" if now_ms - view.changed_at_ms < SETTLE_MS else "warn"
        yield Trouble(level, view.name, href, f"{view.ready} of {view.wanted} replicas run what is wanted")
    serve = view.serve
    answered = serve.edge + serve.peer + serve.cloud
    asked = answered + serve.refused + serve.failed
    in_time = max(0, answered - serve.late)
    if asked >= FEWEST_ASKED and in_time / asked < view.target:
        counts = {"refused": serve.refused, "failed": serve.failed, "late": serve.late}
        why = ", ".join(f"{number} {what}" for what, number in counts.items() if number)
        text = (
            f"{percent(in_time / asked)} answered in time over the last {serve.window_s:.0f} s, {percent(view.target)} is the target: {why}"
        )
        yield Trouble("warn", view.name, href, text)
