"""``skerry release``: the box software itself, in one file."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from skerry.cli import output
from skerry.cli.client import CliError
from skerry.cli.command import Json, reporting
from skerry.image.engine import ImageError
from skerry.release import archive, prune
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


@app.command("prune")
@reporting
def release_prune(
    root: Annotated[Path, typer.Option(help="where releases lie")] = Path("/opt/skerry"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say which would go, and remove nothing")] = False,
    as_json: Json = False,
) -> None:
    """Remove releases from this machine that nothing needs.

    The present one stays, the one before, and each that a program or a sandbox runs from.
    """
    try:
        gone = prune.unneeded(root) if dry_run else prune.prune(root)
    except OSError as exc:
        raise CliError(f"{exc.filename or root}: {exc.strerror}") from exc
    if as_json:
        output.print_json({"removed": [path.name for path in gone], "dry_run": dry_run})
        return
    for path in gone:
        output.console.print(f"{path.name} {'would go' if dry_run else 'is gone'}", highlight=False)
    if not gone:
        output.console.print(f"nothing in {root} may go", highlight=False)
