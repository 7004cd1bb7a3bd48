"""``skerry release``: the box software itself, in one file."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from skerry.cli import output
from skerry.cli.client import CliError
from skerry.cli.command import Json, reporting
from skerry.image.engine import ImageError
from skerry.release import archive
from skerry.wire.units import format_bytes

app = typer.Typer(no_args_is_help=True, help="Releases of Skerry itself.")


@app.command("build")
@reporting
def release_build(
    wheels: Annotated[Path, typer.Option(help="a folder with Skerry's wheel and those of the lock file")],
    requirements: Annotated[Path, typer.Option(help="the lock file, with hashes")],
    out: Annotated[Path, typer.Option(help="the file to write, or a folder for skerry-VERSION.tar")] = Path(),
    python: Annotated[str, typer.Option(help="the boxes' Python, as in 3.11 (default: this one)")] = "",
    machine: Annotated[str, typer.Option(help="the boxes' processor, as in aarch64 (default: this one)")] = "",
    as_json: Json = False,
) -> None:
    """Make a release out of wheels; `make release` fetches them first."""
    try:
        path = out / f"skerry-{archive.version_of(wheels)}.tar" if out.is_dir() else out
        made = archive.build(wheels, requirements, path, python=python, machine=machine)
    except (archive.NotBuilt, ImageError, OSError) as exc:
        raise CliError(str(exc)) from exc
    if as_json:
        output.print_json({"file": str(path), "version": made.version, "python": made.python, "machine": made.machine})
        return
    size = format_bytes(path.stat().st_size)
    output.console.print(
        f"{escape(str(path))}  Skerry {made.version} for Python {made.python} on {made.machine}, {len(made.files)} files, {size}",
        soft_wrap=True,
        highlight=False,
    )
