"""``skerry node drain``, ``undrain`` and ``restart``: a box that is to run nothing for a while, or a replica that is to start anew."""

import time
from typing import Annotated

import typer

from skerry.cli import command, output
from skerry.cli.client import EXIT_FAILED, EXIT_USAGE, CliError, Coordinator, path_of
from skerry.cli.command import Json, reporting
from skerry.wire import codec
from skerry.wire.api import DrainRequest, NodeView
from skerry.wire.units import parse_duration_ms

LOOK_EVERY_S = 0.5


def attach(app: typer.Typer) -> None:
    """Add these commands to ``skerry node``."""
    app.command("drain")(drain)
    app.command("undrain")(undrain)
    app.command("restart")(restart)


@reporting
def drain(
    name: Annotated[str, typer.Argument(help="the box")],
    reason: Annotated[str, typer.Option(help="shown wherever somebody wonders why it runs nothing")] = "",
    wait: Annotated[bool, typer.Option("--wait", help="until it runs nothing")] = False,
    timeout: Annotated[str, typer.Option(help="how long to wait, such as 90s or 5m")] = "5m",
    as_json: Json = False,
) -> None:
    """Have a box run nothing: before its power is cut, or its disk is changed.

    A replica of a deployment that counts them starts on another box and goes on here until it is ready there; where no other box has room,
    and where each box has its own, it ends. Requests that reach the box are passed on, as to a box that has none.
    """
    try:
        timeout_s = parse_duration_ms(timeout) / 1000
        body = codec.encode(codec.decode(codec.encode({"reason": reason}), DrainRequest))
    except (ValueError, codec.Malformed) as exc:
        raise CliError(str(exc) if isinstance(exc, codec.Malformed) else f"--timeout: {exc}", exit_code=EXIT_USAGE) from exc
    coordinator = command.coordinator()
    coordinator.call("PUT", path_of("nodes", name, "drain"), type(None), body=body)
    if wait:
        _until_empty(coordinator, name, timeout_s)
    output.done(f"{name} is drained" if wait else f"{name} is to run nothing; see 'skerry node show {name}'", as_json)


def _until_empty(coordinator: Coordinator, name: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        node = coordinator.call("GET", path_of("nodes", name), NodeView)
        if not node.replicas and node.reported_generation == node.generation:
            return
        if time.monotonic() > deadline:
            left = ", ".join(sorted(replica.name for replica in node.replicas)) or "its last word is an old one"
            raise CliError(f"{name} is not empty after {timeout_s:g} s: {left}", exit_code=EXIT_FAILED)
        time.sleep(LOOK_EVERY_S)


@reporting
def undrain(name: Annotated[str, typer.Argument(help="the box")], as_json: Json = False) -> None:
    """Let a box run things again."""
    command.coordinator().call("DELETE", path_of("nodes", name, "drain"), type(None))
    output.done(f"{name} may run things again", as_json)


@reporting
def restart(
    name: Annotated[str, typer.Argument(help="the box")],
    replica: Annotated[str, typer.Argument(help="the replica, as 'skerry node show' names it")],
    as_json: Json = False,
) -> None:
    """Have a replica started anew.

    It goes as an update does: the new sandbox is started beside the old one where both fit and the deployment does not say otherwise. A box
    that is away does it once it is back. One in a crash loop is tried again.
    """
    command.coordinator().call("POST", path_of("nodes", name, "replicas", replica, "restart"), type(None))
    output.done(f"{replica} on {name} is to start anew; see 'skerry node show {name}'", as_json)
