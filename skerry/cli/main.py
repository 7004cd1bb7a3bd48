"""The operator's command line."""

import socket
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from skerry import __version__
from skerry.cli import (
    command,
    draining,
    explain,
    hindsight,
    images,
    inference,
    joining,
    logs,
    models,
    output,
    people,
    recovery,
    releases,
    rollouts,
)
from skerry.cli.client import EXIT_FAILED, EXIT_NOT_FOUND, EXIT_USAGE, CliError, Coordinator, Login, path_of, save_login
from skerry.cli.command import Json, reporting
from skerry.wire import codec, oip
from skerry.wire.accounts import PasswordRequest, TokenMade
from skerry.wire.api import Accepted, DeploymentView, EventView, LoginLink, NodeView, PlanView, StatusView
from skerry.wire.units import parse_duration_ms

EXIT_CODES = "Exit codes: 0 done, 1 failed or not in time, 2 wrong usage, 3 nobody answers, 4 refused, 5 not found, 6 not logged in."

app = typer.Typer(
    no_args_is_help=True,
    help=f"Skerry: inference at the edge that stands when the link is gone.\n\n{EXIT_CODES}",
    pretty_exceptions_enable=False,
)
node_app = typer.Typer(no_args_is_help=True, help="Boxes.")
deployment_app = typer.Typer(no_args_is_help=True, help="What runs where.")
app.add_typer(node_app, name="node")
joining.attach(node_app)
draining.attach(node_app)
app.add_typer(models.app, name="model")
app.add_typer(images.app, name="image")
app.add_typer(releases.app, name="release")
app.add_typer(deployment_app, name="deployment")
app.add_typer(rollouts.app, name="rollout")
app.add_typer(people.user_app, name="user")
app.add_typer(people.token_app, name="token")
app.add_typer(people.audit_app, name="audit")
app.command("whoami")(people.whoami)
app.command("logs")(logs.show)
app.command("explain")(explain.show)
app.command("what-if")(hindsight.what_if)
app.command("slowest")(hindsight.slowest)
app.command("recover")(recovery.recover)


@app.command()
@reporting
def version(as_json: Json = False) -> None:
    """Print the version."""
    if as_json:
        output.print_json({"version": __version__})
    else:
        output.console.print(f"skerry {__version__}")


@app.command()
@reporting
def demo(
    directory: Annotated[Path, typer.Option("--dir", help="where all state goes")] = Path(".demo"),
    seconds: Annotated[int, typer.Option(help="end by itself after so long, with a summary (0: go on until Ctrl-C)", min=0)] = 0,
    broker: Annotated[str, typer.Option(help="auto, mosquitto or embedded")] = "auto",
    driver: Annotated[str, typer.Option(help="docker, bubblewrap, or both in order of preference")] = "docker,bubblewrap",
    plain: Annotated[bool, typer.Option("--plain", help="lines instead of a live table")] = False,
) -> None:
    """A whole fleet on this machine: broker, coordinator, three edge boxes and a cloud box, put to the test."""
    from skerry.demo import show

    raise typer.Exit(show.run(directory, seconds=seconds, broker_kind=broker, drivers=driver.split(","), plain=plain))


@app.command()
@reporting
def login(
    url: Annotated[str, typer.Argument(help="the coordinator's address, such as https://fleet.example:8080")],
    name: Annotated[str, typer.Option(help="your name: asks for the password, and keeps a token of 30 days")] = "",
    token_file: Annotated[Path | None, typer.Option(help="a file that holds a token; asked for otherwise")] = None,
    as_json: Json = False,
) -> None:
    """Keep a coordinator's address, and a token for it, for later commands."""
    try:
        if name:
            token = _token_for(url, name)
        else:
            token = token_file.read_text().strip() if token_file else typer.prompt("token", hide_input=True).strip()
    except OSError as exc:
        raise CliError(f"--token-file: {token_file}: {exc.strerror}", exit_code=EXIT_USAGE) from exc
    status_now = Coordinator(Login(url, token)).call("GET", path_of("status"), StatusView)
    path = save_login(Login(url, token))
    if as_json:
        output.print_json({"fleet": status_now.fleet, "url": url, "kept_in": str(path)})
        return
    output.console.print(f"logged in to fleet {status_now.fleet}; kept in {path}")


def _token_for(url: str, name: str) -> str:
    """A token for a password that is asked for. Raises CliError."""
    title = f"command line on {socket.gethostname()}"[:63]
    request = PasswordRequest(name, typer.prompt("password", hide_input=True), title)
    return Coordinator(Login(url, "")).call("POST", path_of("login"), TokenMade, body=codec.encode(request)).token


@app.command("login-link")
@reporting
def login_link(as_json: Json = False) -> None:
    """A link that logs one browser in to the console, once."""
    link = command.coordinator().call("POST", path_of("login-links"), LoginLink)
    if as_json:
        output.print_json(link)
    else:
        output.console.print(link.url, soft_wrap=True)


@app.command()
@reporting
def status(as_json: Json = False) -> None:
    """The fleet at a glance."""
    coordinator = command.coordinator()
    view = coordinator.call("GET", path_of("status"), StatusView)
    if as_json:
        output.print_json(view)
        return
    broker = "broker connected" if view.broker_connected else "[red]broker not connected[/]"
    output.console.print(
        f"fleet [bold]{view.fleet}[/]  {view.nodes_online}/{view.nodes} boxes online  "
        f"{view.deployments_ready}/{view.deployments} deployments ready  {broker}"
    )
    output.console.print(
        f"{view.events} events, {view.events_missing} missing, {view.events_lost} lost; "
        f"samples: {view.samples_missing} missing, {view.samples_lost} lost"
    )
    output.print_nodes(coordinator.call("GET", path_of("nodes"), list[NodeView]))
    output.print_deployments(coordinator.call("GET", path_of("deployments"), list[DeploymentView]))


@app.command()
@reporting
def events(
    node: Annotated[str, typer.Option(help="only this box's")] = "",
    subject: Annotated[str, typer.Option(help="only about this")] = "",
    kind: Annotated[str, typer.Option(help="only of this kind")] = "",
    limit: Annotated[int, typer.Option(help="how many of the newest", min=1, max=1000)] = 50,
    as_json: Json = False,
) -> None:
    """What happened lately."""
    query = {"node": node, "subject": subject, "kind": kind, "limit": str(limit)}
    found = command.coordinator().call("GET", path_of("events"), list[EventView], query=query)
    if as_json:
        output.print_json(found)
    else:
        output.print_events(found)


@node_app.command("list")
@reporting
def node_list(
    query: Annotated[
        str,
        typer.Argument(help="narrows it: part of a name, KEY=PATTERN, state:lost, version:0.2*, tier:edge, deployment:NAME, model:NAME:3"),
    ] = "",
    as_json: Json = False,
) -> None:
    """Every box, or those that are looked for."""
    nodes = command.coordinator().call("GET", path_of("nodes"), list[NodeView], query={"q": query} if query else None)
    if as_json:
        output.print_json(nodes)
    else:
        output.print_nodes(nodes)


@node_app.command("show")
@reporting
def node_show(name: str, as_json: Json = False) -> None:
    """One box: what it is, what it runs, how its telemetry stands."""
    node = command.coordinator().call("GET", path_of("nodes", name), NodeView)
    if as_json:
        output.print_json(node)
    else:
        output.print_node(node)


@app.command()
@reporting
def deploy(
    file: Annotated[Path, typer.Argument(help="a deployment in YAML or JSON; - for standard input")],
    wait: Annotated[bool, typer.Option("--wait", help="until every replica is ready")] = False,
    timeout: Annotated[str, typer.Option(help="how long to wait, such as 90s or 5m")] = "5m",
    again: Annotated[bool, typer.Option("--again", help="although this very change was tried, and taken back")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="say what it would change, and change nothing")] = False,
    as_json: Json = False,
) -> None:
    """Create or change a deployment."""
    try:
        text = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        timeout_s = parse_duration_ms(timeout) / 1000
    except OSError as exc:
        raise CliError(f"{file}: {exc.strerror}", exit_code=EXIT_USAGE) from exc
    except ValueError as exc:
        raise CliError(f"--timeout: {exc}", exit_code=EXIT_USAGE) from exc
    coordinator = command.coordinator()
    if plan:
        planned = coordinator.call("POST", path_of("deployments", "plan"), PlanView, body=text)
        if as_json:
            output.print_json(planned)
        else:
            output.print_plan(planned)
        return
    path = path_of("deployments") + ("?again=true" if again else "")
    accepted = coordinator.call("POST", path, Accepted, body=text)
    for warning in accepted.warnings:
        output.errors.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    if wait and accepted.spreads:
        over = rollouts.follow(coordinator, accepted.name, is_quiet=as_json, timeout_s=timeout_s)
        if over.phase != "done":
            raise CliError(f"{accepted.name}: {over.phase}: {over.reason}; what was there before is back", exit_code=EXIT_FAILED)
    view = wait_ready(coordinator, accepted, timeout_s=timeout_s) if wait else None
    if as_json:
        output.print_json(view or accepted)
    elif view is not None:
        output.print_deployment(view)
    else:
        follow = f"skerry rollout show {accepted.name} --watch" if accepted.spreads else f"skerry deployment show {accepted.name}"
        output.console.print(f"{accepted.name}: generation {accepted.generation} accepted; follow it with '{follow}'")


def wait_ready(coordinator: Coordinator, accepted: Accepted, *, timeout_s: float) -> DeploymentView:
    """Wait until all of a generation is ready. Raises CliError with what is missing."""
    deadline = time.monotonic() + timeout_s
    with output.errors.status(f"{accepted.name}: waiting") as spinner:
        while True:
            view = coordinator.call("GET", path_of("deployments", accepted.name), DeploymentView)
            spinner.update(f"{accepted.name}: {view.ready} of {view.wanted} ready")
            planned = view.generation >= accepted.generation and view.problem != "not planned yet"
            if planned and view.wanted and view.ready >= view.wanted:
                return view
            if time.monotonic() > deadline:
                waiting = [f"{p.node}: {p.phase} {p.status}".strip() for p in view.placements if p.phase != "ready"]
                raise CliError(
                    f"{accepted.name}: {view.ready} of {view.wanted} replicas are ready after {timeout_s:.0f} s",
                    hint="; ".join([view.problem, *waiting][:5]).strip("; ") or "see 'skerry explain'",
                )
            time.sleep(0.1)


@deployment_app.command("list")
@reporting
def deployment_list(as_json: Json = False) -> None:
    """Every deployment."""
    views = command.coordinator().call("GET", path_of("deployments"), list[DeploymentView])
    if as_json:
        output.print_json(views)
    else:
        output.print_deployments(views)


@deployment_app.command("show")
@reporting
def deployment_show(name: str, as_json: Json = False) -> None:
    """One deployment: where it runs and how it does."""
    view = command.coordinator().call("GET", path_of("deployments", name), DeploymentView)
    if as_json:
        output.print_json(view)
    else:
        output.print_deployment(view)


@deployment_app.command("delete")
@reporting
def deployment_delete(name: str, as_json: Json = False) -> None:
    """Remove a deployment from every box."""
    accepted = command.coordinator().call("DELETE", path_of("deployments", name), Accepted)
    if as_json:
        output.print_json(accepted)
    else:
        output.console.print(f"{accepted.name}: deleted; boxes drain its replicas")


def _gateway_of(node: str) -> str:
    """The address of a box's gateway; of the first edge box online where none is named. Raises CliError."""
    nodes = command.coordinator().call("GET", path_of("nodes"), list[NodeView])
    fitting = [n for n in nodes if (n.id == node if node else n.state == "online") and n.gateway_url]
    if not fitting:
        raise CliError(f"there is no box {node!r}" if node else "no box is online", exit_code=EXIT_NOT_FOUND, hint="see 'skerry node list'")
    return min(fitting, key=lambda n: (n.tier != "edge", n.id)).gateway_url


@app.command()
@reporting
def infer(
    model: Annotated[str, typer.Argument(help="a model's or deployment's name")],
    request: Annotated[Path | None, typer.Argument(help="a request of the protocol in JSON; - for standard input")] = None,
    inputs: Annotated[list[str] | None, typer.Option("--input", help="NAME=FILE.npy, instead of a request; may be repeated")] = None,
    node: Annotated[str, typer.Option(help="the box to ask; an edge box that is online otherwise")] = "",
    gateway: Annotated[str, typer.Option(help="the gateway's address, instead of a box's name")] = "",
    timeout: Annotated[str, typer.Option(help="how long to wait")] = "30s",
) -> None:
    """Ask a box for one inference; prints the answer as JSON, who served it on standard error."""
    try:
        timeout_s = parse_duration_ms(timeout) / 1000
    except ValueError as exc:
        raise CliError(f"--timeout: {exc}", exit_code=EXIT_USAGE) from exc
    if (request is None) == (not inputs):
        raise CliError("give a request or --input", exit_code=EXIT_USAGE, hint="skerry infer NAME --input x=image.npy")
    if inputs:
        pairs = [entry.partition("=") for entry in inputs]
        body, headers = oip.render_request([inference.read_npy(Path(path), name) for name, _, path in pairs])
    else:
        try:
            body = sys.stdin.buffer.read() if str(request) == "-" else Path(str(request)).read_bytes()
        except OSError as exc:
            raise CliError(f"{request}: {exc.strerror}", exit_code=EXIT_USAGE) from exc
        headers = {"Content-Type": "application/json"}
    answer = inference.infer(gateway or _gateway_of(node), model, body, headers, timeout_s=timeout_s)
    facts = {name: answer.headers.get(name, "") for name in ("skerry-served-by", "skerry-node", "skerry-reason", "server-timing")}
    tensors = oip.parse_answer(answer.body, answer.headers.get(oip.HEADER_LENGTH.lower()))
    output.errors.print(escape(", ".join(f"{key}: {value}" for key, value in facts.items() if value)), soft_wrap=True)
    outputs = [{"name": t.name, "datatype": t.datatype, "shape": t.shape, "data": oip.json_of_data(t)} for t in tensors.outputs]
    output.print_json(
        {"model_name": tensors.model_name, "model_version": tensors.model_version, "parameters": tensors.parameters, "outputs": outputs}
    )


def main() -> None:
    """The console command ``skerry``."""
    app()


if __name__ == "__main__":
    main()
