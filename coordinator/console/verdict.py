"""Whether everything is all right, and if not, what needs a look. Pure: state and time go in, words come out."""

from collections.abc import Iterable, Sequence

import msgspec

from coordinator.console.language import N_, _, plural
from coordinator.console.wording import Level, count, percent, phase_mark
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
    text = _(
        "%(online)s of %(boxes)s boxes online, %(ready)s of %(deployments)s deployments ready.",
        online=count(status.nodes_online), boxes=count(status.nodes), ready=status.deployments_ready, deployments=status.deployments,
    )  # fmt: skip
    named = {trouble.subject for trouble in found if trouble.level in ("bad", "warn")} & {node.id for node in nodes}
    needs_a_look = sum(1 for trouble in found if trouble.level in ("bad", "warn")) + max(0, fleet.urgent - len(named))
    if needs_a_look:
        return Verdict(
            found[0].level,
            plural("%(num)s thing needs a look", "%(num)s things need a look", needs_a_look) % {"num": needs_a_look},
            text,
            found,
        )
    if any(trouble.level != "idle" for trouble in found):
        return Verdict("busy", _("Settling"), text, found)
    if not status.nodes:
        return Verdict(
            "idle",
            _("No box has connected yet"),
            _("Install the box software and give it this fleet's broker; it appears here by itself."),
            [],
        )
    return Verdict("good", _("All is well"), text, found)


def _of_the_broker(status: StatusView) -> Iterable[Trouble]:
    if not status.broker_connected:
        text = _("no connection: boxes can't be heard or told anything, and what is shown of them is the last that was heard")
        yield Trouble("bad", "broker", "/events", text)


def _of_a_node(node: NodeView) -> Iterable[Trouble]:
    href = f"/nodes/{node.id}"
    if node.state in ("unknown", "lost"):
        level: Level = "bad" if node.state == "lost" else "warn"
        yield Trouble(level, node.id, href, _("can't tell a crash from a cut link"), node.silent_since_ms)
    elif node.state == "offline":
        yield Trouble("warn", node.id, href, _("its agent signed off"), node.silent_since_ms)
    if node.drained_at_ms:
        yield Trouble("idle", node.id, href, _("drained: %(reason)s", reason=node.drain_reason) if node.drain_reason else _("drained"))
    if node.is_ahead:
        text = _(
            "holds generation %(held)s, %(known)s is known here: restored from a backup? see 'skerry recover'",
            held=node.reported_generation, known=node.generation,
        )  # fmt: skip
        yield Trouble("bad", node.id, href, text)
    elif node.refused:
        yield Trouble("bad", node.id, href, _("refuses what it is told: %(reason)s", reason=node.refused))
    elif node.state == "online" and node.reported_generation != node.generation:
        text = _("generation %(wanted)s is wanted, it reports %(found)s", wanted=node.generation, found=node.reported_generation)
        yield Trouble("busy", node.id, href, text)
    for replica in node.replicas:
        if replica.phase in ("backoff", "failed"):
            level = "bad" if replica.phase == "failed" else "warn"
            why = replica.reason or _("no reason given")
            yield Trouble(level, node.id, href, f"{replica.name} {_(phase_mark(replica.state).word)}: {why}")


def _of_a_deployment(view: DeploymentSummary, now_ms: int) -> Iterable[Trouble]:
    href = f"/deployments/{view.name}"
    if view.problem:
        level: Level = "busy" if view.problem == N_("not planned yet") else "bad"
        yield Trouble(level, view.name, href, _(view.problem))
    elif view.ready < view.wanted:
        level = "busy" if now_ms - view.changed_at_ms < SETTLE_MS else "warn"
        yield Trouble(
            level,
            view.name,
            href,
            _("%(ready)s of %(wanted)s replicas run what is wanted", ready=count(view.ready), wanted=count(view.wanted)),
        )
    serve = view.serve
    answered = serve.edge + serve.peer + serve.cloud
    asked = answered + serve.refused + serve.failed
    in_time = max(0, answered - serve.late)
    if asked >= FEWEST_ASKED and in_time / asked < view.target:
        counts = {_("refused"): serve.refused, _("failed"): serve.failed, _("late"): serve.late}
        why = ", ".join(f"{number} {what}" for what, number in counts.items() if number)
        text = _(
            "%(part)s answered in time over the last %(seconds)s s, %(target)s is the target: %(why)s",
            part=percent(in_time / asked), seconds=round(serve.window_s), target=percent(view.target), why=why,
        )  # fmt: skip
        yield Trouble("warn", view.name, href, text)
