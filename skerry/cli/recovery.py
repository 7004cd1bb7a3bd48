"""``skerry recover``: lead boxes again that hold more than a restored coordinator knows of."""

from typing import Annotated

import typer
from rich.markup import escape

from skerry.cli import command, output
from skerry.cli.client import EXIT_USAGE, CliError, path_of
from skerry.cli.command import Json, reporting
from skerry.wire import codec
from skerry.wire.api import AheadView, TakeOver


@reporting
def recover(
    node: Annotated[
        list[str] | None, typer.Argument(help="boxes; all that hold more than this coordinator knows where none is named")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would stop and start, and change nothing")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    as_json: Json = False,
) -> None:
    """After a coordinator was restored from a backup: have it lead the boxes again that were told more since.

    Until then nothing is told to them, and all on them goes on. What was deployed after the backup was made is not known here: deploy it
    again first, else it stops.
    """
    coordinator = command.coordinator()
    found = coordinator.call("GET", path_of("ahead"), list[AheadView])
    chosen = [view for view in found if not node or view.node in node]
    if missing := sorted(set(node or []) - {view.node for view in found}):
        raise CliError(f"{missing[0]} holds nothing that is newer than what this coordinator told it", exit_code=EXIT_USAGE)
    if dry_run:
        if as_json:
            output.print_json(chosen)
        else:
            _show(chosen)
        return
    if chosen and not yes:
        _show(chosen)
        typer.confirm("lead them from here again?", abort=True)
    names = [view.node for view in chosen]
    taken = coordinator.call("POST", path_of("ahead", "take-over"), list[AheadView], body=codec.encode(TakeOver(names))) if chosen else []
    if as_json:
        output.print_json(taken)
    else:
        output.console.print(f"{len(taken)} boxes are led from here again" if taken else "no box holds more than this coordinator knows")


def _show(views: list[AheadView]) -> None:
    for view in views:
        output.console.print(f"{escape(view.node)}: holds generation {view.held_generation}, {view.known_generation} is known here")
        for word, names in (("stops", view.stops), ("starts", view.starts), ("keeps", view.keeps)):
            if names:
                output.console.print(f"  {word} {escape(', '.join(names))}", soft_wrap=True)
    if not views:
        output.console.print("no box holds more than this coordinator knows")
