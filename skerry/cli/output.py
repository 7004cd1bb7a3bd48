"""How answers look: tables for people, JSON for scripts."""

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from skerry.wire import codec
from skerry.wire.api import DeploymentView, EventView, ModelView, NodeView, PlanView, ServeView
from skerry.wire.messages import Batching, CloudBudget
from skerry.wire.units import format_bytes

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

STATES = {
    "online": "[green]● online[/]",
    "unknown": "[yellow]▲ silent[/]",
    "lost": "[red]✕ lost[/]",
    "offline": "○ signed off",
    "new": "[yellow]◌ new[/]",
    "revoked": "[red]⊘ thrown out[/]",
}
PHASES = {"ready": "[green]ready[/]", "crash_loop": "[red]crash loop[/]", "failed": "[red]failed[/]", "backoff": "[yellow]backoff[/]"}


def print_json(value: object) -> None:
    """A Struct, or a list of them, on standard output."""
    sys.stdout.write(codec.encode(value).decode() + "\n")


def moment(at_ms: int) -> str:
    """A local time of day, with the date where it was not today."""
    if not at_ms:
        return "never"
    then = time.localtime(at_ms / 1000)
    return time.strftime("%H:%M:%S" if then[:3] == time.localtime()[:3] else "%Y-%m-%d %H:%M:%S", then)


def minute(at_ms: int) -> str:
    """Day and minute, in the zone of whoever reads it."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at_ms / 1000))


def done(text: str, as_json: bool) -> None:
    """What was done, for a call that answers nothing."""
    if as_json:
        print_json({"done": True})
    else:
        console.print(escape(text))


def table_of(*columns: str) -> Table:
    """An empty table; numbers stand to the right."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        right = column in ("req/s", "p50 ms", "p99 ms", "edge", "cloud", "refused", "size", "cpu", "memory", "would take")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def print_nodes(nodes: Sequence[NodeView]) -> None:
    """A line for each box."""
    table = table_of("box", "state", "tier", "labels", "replicas", "cpu", "memory", "generation", "since")
    for node in nodes:
        ready = sum(1 for replica in node.replicas if replica.phase == "ready")
        behind = "" if node.generation == node.reported_generation else f" (runs {node.reported_generation})"
        table.add_row(
            escape(node.id),
            STATES[node.state] + (", drained" if node.drained_at_ms else ""),
            node.tier or "",
            escape(" ".join(f"{key}={value}" for key, value in sorted(node.labels.items()))),
            f"{ready}/{len(node.replicas)}",
            f"{node.cpu_ratio:.0%}",
            format_bytes(node.memory_used_bytes),
            f"{node.generation}{behind}",
            moment(node.changed_at_ms),
        )
    console.print(table if nodes else "no box has joined yet")


def print_node(node: NodeView) -> None:
    """All of one box."""
    console.print(f"[bold]{escape(node.id)}[/]  {STATES[node.state]} since {moment(node.changed_at_ms)}  tier {node.tier or 'unknown'}")
    if node.is_silent:
        console.print(f"  silent since {moment(node.silent_since_ms)}: from here a crash can't be told from a cut link")
    if node.drained_at_ms:
        console.print(f"  drained since {moment(node.drained_at_ms)}{f': {escape(node.drain_reason)}' if node.drain_reason else ''}")
    for step in node.outlook:
        console.print(f"  {moment(step.at_ms) if step.at_ms else 'then'}  {escape(step.text)}", soft_wrap=True)
    console.print(f"  gateway {escape(node.gateway_url)}   version {escape(node.version)}   sandboxes {', '.join(node.rungs) or 'unknown'}")
    for rung, reason in node.rungs_absent.items():
        console.print(f"  no {rung}: {escape(reason)}", soft_wrap=True)
    console.print(f"  {node.cpus} cores, {format_bytes(node.memory_bytes)}, {len(node.gpus)} GPUs")
    console.print(f"  desired generation {node.generation}, reported {node.reported_generation}")
    if node.is_ahead:
        console.print("  [red]it holds more than this coordinator ever told it:[/] see 'skerry recover --dry-run'")
    if node.refused:
        console.print(f"  [red]refused:[/] {escape(node.refused)}")
    table = table_of("replica", "phase", "sandbox", "provider", "restarts", "reason")
    for replica in node.replicas:
        phase = PHASES.get(replica.state, replica.state)
        sandbox = f"{replica.driver} ({replica.rung}{', warm' if replica.is_warm else ''}; limits: {replica.limits or 'none'})"
        table.add_row(replica.name, phase, sandbox, replica.provider, str(replica.restarts), escape(replica.reason))
    console.print(table)
    for stream in node.streams:
        console.print(
            f"  {stream.stream}: {stream.high} numbered, {stream.missing} missing, {stream.lost} lost, {stream.dropped} dropped by the box"
        )


def _served(serve: ServeView) -> list[str]:
    total = max(1, serve.edge + serve.peer + serve.cloud)
    return [
        f"{serve.per_second:.1f}",
        f"{serve.p50_ms:.1f}",
        f"{serve.p99_ms:.1f}",
        f"{(serve.edge + serve.peer) / total:.0%}",
        f"{serve.cloud / total:.0%}",
        str(serve.refused),
    ]


def deployments_table(deployments: Sequence[DeploymentView]) -> Table:
    """A line for each deployment."""
    table = table_of("deployment", "model", "ready", "req/s", "p50 ms", "p99 ms", "edge", "cloud", "refused", "problem")
    for view in deployments:
        colour = "green" if view.ready == view.wanted and view.wanted else "yellow"
        table.add_row(
            escape(view.name), escape(view.model), f"[{colour}]{view.ready}/{view.wanted}[/]", *_served(view.serve), escape(view.problem)
        )
    return table


def print_plan(plan: PlanView) -> None:
    """What a deployment would change."""
    if plan.is_same:
        console.print(f"{escape(plan.name)} is that already")
        return
    counts = {"start": plan.starts, "change": plan.changes, "stop": plan.stops, "go on as they are": plan.keeps}
    words = ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "none is concerned"
    how = "a new deployment" if plan.is_new else "in waves" if plan.spreads else "at once"
    console.print(f"{escape(plan.name)}: of its replicas {words}; {plan.refuses} boxes refuse; {how}", highlight=False, soft_wrap=True)
    for warning in plan.warnings:
        errors.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    if plan.problem or plan.failed_before:
        said = [plan.problem, f"this very text was taken back: {plan.failed_before}" if plan.failed_before else ""]
        errors.print(f"[yellow]{escape('; '.join(filter(None, said)))}[/]", soft_wrap=True)
    rows: list[tuple[str, str, str, str]] = [(one.node, one.replica, one.kind, one.text) for one in [*plan.steps, *plan.others]]
    rows += [(refusal.node, "", "refuses", refusal.reason) for refusal in plan.refusals]
    table = table_of("box", "replica", "what", "why")
    for row in rows:
        table.add_row(*map(escape, row))
    if rows:
        console.print(table)


def print_deployments(deployments: Sequence[DeploymentView]) -> None:
    """A line for each deployment."""
    console.print(deployments_table(deployments) if deployments else "nothing is deployed yet: 'skerry deploy FILE.yaml'")


def print_deployment(view: DeploymentView) -> None:
    """All of one deployment: where, why there, why not elsewhere."""
    console.print(
        f"[bold]{escape(view.name)}[/]  {escape(view.model)}  generation {view.generation}  "
        f"ready {view.ready}/{view.wanted}  deadline {view.deadline_ms} ms  split {view.split}"
    )
    for words in (batching_words(view.batching), budget_words(view.cloud_budget)):
        if words:
            console.print(f"  {words}")
    if view.problem:
        console.print(f"  [yellow]{escape(view.problem)}[/]")
    table = table_of("runs on", "phase", "sandbox", "why there", "what it says")
    for placement in view.placements:
        phase = PHASES.get(placement.phase, placement.phase)
        sandbox = f"{placement.driver} ({placement.rung})" if placement.driver else ""
        table.add_row(f"{escape(placement.node)}/{placement.replica}", phase, sandbox, escape(placement.reason), escape(placement.status))
    console.print(table)
    if view.refusals:
        refusals = table_of("not on", "why not")
        for refusal in view.refusals:
            refusals.add_row(escape(refusal.node), escape(refusal.reason))
        console.print(refusals)
    serve = view.serve
    rate, p50, p99, edge, cloud, refused = _served(serve)
    console.print(
        f"  last {serve.window_s:.0f} s: {rate} answers/s, p50 {p50} ms, p99 {p99} ms, edge {edge}, cloud {cloud}, "
        f"{refused} refused, {serve.late} late, {serve.failed} failed"
    )


def batching_words(batching: Batching) -> str:
    """How requests share runs; empty where none do."""
    if batching.max_batch <= 1:
        return ""
    wait = f"{batching.max_wait_us / 1000:g} ms at most" if batching.max_wait_us else "not at all"
    return f"up to {batching.max_batch} rows share a run, waiting for company {wait}"


def budget_words(budget: CloudBudget | None) -> str:
    """What a box may send to the cloud; empty where there is no limit."""
    if budget is None:
        return ""
    limits = [] if budget.requests_per_hour is None else [f"{budget.requests_per_hour} requests"]
    limits += [] if budget.bytes_per_hour is None else [format_bytes(budget.bytes_per_hour)]
    return f"each box sends {' and '.join(limits)} an hour to the cloud at most"


def print_models(models: Sequence[ModelView]) -> None:
    """A line for each model version."""
    table = table_of("model", "size", "sha256", "signature", "pushed", "used by")
    for model in models:
        table.add_row(
            f"{model.name}:{model.version}",
            format_bytes(model.size_bytes),
            model.sha256[:16],
            model.signature.replace("_", " "),
            moment(model.pushed_at_ms),
            ", ".join(model.used_by),
        )
    console.print(table if models else "the store is empty: 'skerry model push FILE.onnx --name NAME --version 1'")


def print_events(events: Sequence[EventView]) -> None:
    """Oldest first, as a log reads."""
    table = table_of("at", "box", "event", "about", "what")
    for event in reversed(events):
        table.add_row(
            moment(event.at_ms), escape(event.node or "coordinator"), escape(event.kind), escape(event.subject), escape(event.text)
        )
    console.print(table)
