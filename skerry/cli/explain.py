"""``skerry explain``: why a deployment runs where it does, and who answers its requests: a gateway's word, or what boxes noted."""

from typing import Annotated
from urllib.parse import quote, urlencode

import typer
from rich.markup import escape

from skerry.cli import command, inference, output
from skerry.cli.client import EXIT_FAILED, EXIT_NOT_FOUND, EXIT_REFUSED, EXIT_USAGE, CliError, path_of, send
from skerry.cli.command import Json, reporting
from skerry.wire import codec, units
from skerry.wire.api import DeploymentView, EventView
from skerry.wire.decision import Decision

ROUTED = "request.routed"
MOST_EVENTS = 20
MOST_ASKED = 1000
"""Of the decisions: the search by subject finds those on deployments of longer names too, such as ``a-b`` for ``a``."""
ASK_S = 10.0


@reporting
def show(
    model: Annotated[str, typer.Argument(help="a deployment; with --at a model's name too")],
    at: Annotated[str, typer.Option(help="a gateway's address: ask it who would answer a request that came now")] = "",
    deadline: Annotated[str, typer.Option(help="with --at: the time that the request has, such as 50ms; the deployment's otherwise")] = "",
    size: Annotated[str, typer.Option(help="with --at: the size of its inputs, such as 588KiB")] = "",
    priority: Annotated[int, typer.Option(help="with --at: its priority; 0 is the model's default", min=0, max=2**31 - 1)] = 0,
    node: Annotated[str, typer.Option(help="without --at: only what this box noted")] = "",
    as_json: Json = False,
) -> None:
    """Why a deployment runs where it does and not elsewhere, and who answers its requests."""
    if at and node:
        raise CliError("--node goes without --at: the gateway at an address is one box's", exit_code=EXIT_USAGE)
    if at:
        decision = ask(at, model, _query(deadline, size, priority))
        if as_json:
            output.print_json(decision)
        else:
            print_decision(decision)
        return
    if deadline or size or priority:
        raise CliError("--deadline, --size and --priority go with --at: only a gateway can say", exit_code=EXIT_USAGE)
    _show_noted(model, node, as_json=as_json)


def _query(deadline: str, size: str, priority: int) -> dict[str, str]:
    query = {"priority": str(priority)}
    try:
        if deadline:
            query["deadline_ms"] = f"{units.parse_duration_us(deadline) / 1000:g}"
    except ValueError as exc:
        raise CliError(f"--deadline: {exc}", exit_code=EXIT_USAGE) from exc
    try:
        if size:
            query["size_bytes"] = str(units.parse_bytes(size))
    except ValueError as exc:
        raise CliError(f"--size: {exc}", exit_code=EXIT_USAGE) from exc
    return query


def ask(gateway_url: str, model: str, query: dict[str, str]) -> Decision:
    """What the gateway would do with such a request. Raises CliError, with the gateway's own words for a refusal."""
    url = f"{gateway_url.rstrip('/')}/v2/models/{quote(model, safe='')}/decision?{urlencode(query)}"
    answer = send("GET", url, headers={"Accept": "application/json"}, timeout_s=ASK_S)
    if answer.status == 404:
        raise CliError(
            inference.words_of(answer), exit_code=EXIT_NOT_FOUND, hint="is it the address of a box's gateway? See 'skerry node list'"
        )
    if answer.status != 200:
        raise CliError(inference.words_of(answer), exit_code=EXIT_REFUSED if answer.status < 500 else EXIT_FAILED)
    try:
        return codec.decode(answer.body, Decision)
    except codec.Malformed as exc:
        raise CliError(f"{gateway_url} answers what this version does not understand: {exc}", hint="is it a Skerry gateway?") from exc


def _show_noted(name: str, node: str, *, as_json: bool) -> None:
    """The deployment, what happened to it, and the newest decisions that boxes noted."""
    coordinator = command.coordinator()
    view = coordinator.call("GET", path_of("deployments", name), DeploymentView)
    happened, found = (
        coordinator.call("GET", path_of("events"), list[EventView], query={"subject": name, "node": node, **more})
        for more in ({"except_kind": ROUTED, "limit": str(MOST_EVENTS)}, {"kind": ROUTED, "limit": str(MOST_ASKED)})
    )
    routed = [event for event in found if event.subject == name][:MOST_EVENTS]
    if as_json:
        output.print_json({"deployment": view, "events": happened, "routed": routed})
        return
    output.print_deployment(view)
    output.print_events(happened)
    output.console.print(f"\n[bold]who answered, lately[/]{f' on {escape(node)}' if node else ''}")
    if not routed:
        output.console.print("  no box has noted a decision yet; ask a gateway: 'skerry explain NAME --at URL'")
        return
    table = output.table_of("at", "box", "what was decided, and by which numbers")
    for event in reversed(routed):
        table.add_row(output.moment(event.at_ms), escape(event.node), escape(event.text))
    output.console.print(table)


def print_decision(decision: Decision) -> None:
    """Who would answer, how long each would take, and why the others would not."""
    numbers = decision.numbers
    model = f"  {escape(decision.model)}:{decision.version}" if decision.model else ""
    left = "" if numbers.remaining_ms is None else f" that has {_ms(numbers.remaining_ms)}"
    who = {
        "here": f"is answered here{f', on {escape(decision.node)}' if decision.node else ''}",
        "forward": f"is passed on to {escape(decision.node)} ({escape(decision.served_by)})",
        "refuse": "[red]is refused[/]",
    }[decision.decision]
    output.console.print(f"[bold]{escape(decision.deployment)}[/]{model}", soft_wrap=True)
    output.console.print(f"a request{left} {who}: {escape(decision.reason)}", soft_wrap=True)
    table = output.table_of("who", "tier", "would take", "of that", "why not")
    table.add_row(*_row_of_here(decision))
    for other in numbers.upstreams:
        chosen = decision.decision == "forward" and other.node == decision.node
        table.add_row(
            _named(other.node, chosen=chosen),
            escape(other.tier),
            _ms(other.estimate_ms),
            _parts(("link", other.link_ms), ("there", other.remote_ms)),
            escape(other.why_not or ("" if chosen else _too_long(other.estimate_ms, numbers.remaining_ms) or "not needed")),
        )
    output.console.print(table)
    if decision.recent:
        recent = output.table_of("at", "what was decided lately")
        for one in decision.recent[-MOST_EVENTS:]:
            recent.add_row(output.moment(one.at_ms), escape(one.text))
        output.console.print(recent)


def _row_of_here(decision: Decision) -> tuple[str, str, str, str, str]:
    numbers = decision.numbers
    chosen = decision.decision == "here"
    why_not = "no replica is ready here" if numbers.here_ms is None else _too_long(numbers.here_ms, numbers.remaining_ms)
    parts = _parts(("queue", numbers.queue_ms), ("service", numbers.service_ms)) if numbers.here_ms is not None else ""
    return _named("this box", chosen=chosen), "", _ms(numbers.here_ms), parts, "" if chosen else why_not or "see the reason above"


def _named(name: str, *, chosen: bool) -> str:
    return f"[green]→ {escape(name)}[/]" if chosen else f"  {escape(name)}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"


def _parts(*parts: tuple[str, float | None]) -> str:
    return ", ".join(f"{name} {_ms(value)}" for name, value in parts if value is not None)


def _too_long(estimate_ms: float | None, remaining_ms: float | None) -> str:
    if estimate_ms is None or remaining_ms is None or estimate_ms <= remaining_ms:
        return ""
    return f"longer than the {_ms(remaining_ms)} that are left"
