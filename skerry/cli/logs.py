"""``skerry logs``: what a replica's sandbox wrote, once or for as long as somebody watches."""

import sys
import time
from typing import Annotated

import typer
from rich.markup import escape

from skerry.cli import command, output
from skerry.cli.client import EXIT_FAILED, EXIT_NOT_FOUND, EXIT_UNREACHABLE, CliError, Coordinator, path_of
from skerry.cli.command import Json, reporting
from skerry.wire.api import LogsView
from skerry.wire.logs import MAX_LINES

EVERY_S = 1.0
GONE_AFTER_S = 10.0
"""A replica that is not found for this long is gone; a warden that restarts finds it again sooner."""
EXIT_INTERRUPTED = 130
"""128 and SIGINT's number, as shells have it."""


@reporting
def show(
    node: Annotated[str, typer.Argument(help="the box")],
    replica: Annotated[str, typer.Argument(help="the replica, as 'skerry node show' names it")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on with what comes, until Ctrl-C")] = False,
    lines: Annotated[int, typer.Option(help="how many of the newest", min=1, max=MAX_LINES)] = 100,
    as_json: Json = False,
) -> None:
    """What a replica's sandbox wrote, asked of its box now."""
    coordinator = command.coordinator()
    view = _ask(coordinator, node, replica, lines=lines)
    _tell(view, as_json=as_json)
    if not follow:
        return
    try:
        _follow(coordinator, view, lines=lines, as_json=as_json)
    except KeyboardInterrupt as exc:  # how following ends
        raise typer.Exit(EXIT_INTERRUPTED) from exc


def _ask(coordinator: Coordinator, node: str, replica: str, *, lines: int, after: str = "") -> LogsView:
    query = {"lines": str(lines), "after": after}
    return coordinator.call("GET", path_of("nodes", node, "replicas", replica, "logs"), LogsView, query=query)


def _tell(view: LogsView, *, as_json: bool) -> None:
    """As it is: the coordinator made the lines harmless, and markup in them is text."""
    if as_json:
        output.print_json(view)
    else:
        sys.stdout.writelines(f"{line}\n" for line in view.lines)
    sys.stdout.flush()


def _follow(coordinator: Coordinator, view: LogsView, *, lines: int, as_json: bool) -> None:
    """Print what is new every second. A loss is noted once and waited out; raises CliError where waiting does not help."""
    position, heard_at, is_lost = view.position, time.monotonic(), False
    while True:
        time.sleep(EVERY_S)
        try:
            view = _ask(coordinator, view.node, view.replica, lines=MAX_LINES if position else lines, after=position)
        except CliError as exc:
            is_gone = exc.exit_code == EXIT_NOT_FOUND and time.monotonic() - heard_at > GONE_AFTER_S
            if is_gone or exc.exit_code not in (EXIT_FAILED, EXIT_UNREACHABLE, EXIT_NOT_FOUND):
                raise
            if not is_lost:
                output.errors.print(f"[yellow]note:[/] {escape(str(exc))}; asking on", soft_wrap=True)
            is_lost = True
            continue
        if is_lost:
            output.errors.print(f"[yellow]note:[/] {escape(view.node)} answers again", soft_wrap=True)
        heard_at, is_lost, position = time.monotonic(), False, view.position or position
        if view.lines:
            _tell(view, as_json=as_json)
