"""What every command of the command line has in common: how it fails, how it finds the coordinator, ``--json``."""

from collections.abc import Callable
from functools import wraps
from typing import Annotated, ParamSpec

import typer
from rich.markup import escape

from skerry.cli import catalogue, output
from skerry.cli.client import EXIT_FAILED, CliError, Coordinator, find_login
from skerry.image.engine import ImageError

P = ParamSpec("P")

Json = Annotated[bool, typer.Option("--json", help="print JSON for scripts")]


def reporting(command: Callable[P, None]) -> Callable[P, None]:
    """Turn what goes wrong into a line for people and an exit code for scripts."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (CliError, catalogue.CatalogueError, ImageError) as exc:
            output.errors.print(f"[red]error:[/] {escape(str(exc))}", soft_wrap=True)
            hint = getattr(exc, "hint", "")
            if hint:
                output.errors.print(f"  {escape(hint)}", soft_wrap=True)
            raise typer.Exit(getattr(exc, "exit_code", EXIT_FAILED)) from exc

    return wrapped


def coordinator() -> Coordinator:
    return Coordinator(find_login())
