"""``skerry image``: the images that sandboxes run, built and loaded on the engine of this machine."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from skerry import __version__
from skerry.cli import output
from skerry.cli.client import EXIT_USAGE, CliError
from skerry.cli.command import Json, reporting
from skerry.image import build as building
from skerry.image.base import DEBOOTSTRAP, SUITE
from skerry.image.engine import Engine
from skerry.image.sbom import write_sbom
from skerry.wire.units import format_bytes

app = typer.Typer(no_args_is_help=True, help="Images that sandboxes run.")

Socket = Annotated[Path, typer.Option("--docker-socket", envvar="SKERRY_DOCKER_SOCKET", help="the Docker Engine's socket")]
DEFAULT_SOCKET = Path("/var/run/docker.sock")


def _say(line: str) -> None:
    """Progress goes to standard error: the answer alone stands on standard output."""
    output.errors.print(escape(line), soft_wrap=True)


@app.command("build")
@reporting
def image_build(
    kind: Annotated[Literal["worker"], typer.Option(help="what the image is for")] = "worker",
    accelerator: Annotated[building.Accelerator, typer.Option(help="cpu, or cuda for NVIDIA GPUs")] = "cpu",
    base: Annotated[str, typer.Option(help="an image with python3, or debootstrap[:SUITE] to make one here as root")] = "",
    mirror: Annotated[str, typer.Option(help="where debootstrap fetches from, instead of its own default")] = "",
    tag: Annotated[str, typer.Option(help="the image's name on the engine")] = "",
    save: Annotated[Path | None, typer.Option(help="write the image to this archive too")] = None,
    sbom: Annotated[Path | None, typer.Option(help="write a bill of materials, CycloneDX 1.6 in JSON")] = None,
    docker_socket: Socket = DEFAULT_SOCKET,
    as_json: Json = False,
) -> None:
    """Build an image, and print the id by which a deployment pins it."""
    if accelerator == "cuda" and not base:
        raise CliError("--accelerator cuda needs --base", exit_code=EXIT_USAGE, hint="an image with python3 and the CUDA runtime")
    base, tag = base or f"{DEBOOTSTRAP}:{SUITE}", tag or f"skerry-{kind}:{__version__}-{accelerator}"
    engine = Engine(docker_socket)
    built = building.build_worker(engine, accelerator=accelerator, base=base, mirror=mirror, tag=tag, say=_say)
    if sbom is not None:
        _say(f"{sbom}: {write_sbom(engine, built, sbom)} components")
    if save is not None:
        _say(f"{save}: {format_bytes(engine.save(tag, save))}")
    if as_json:
        written = {"archive": str(save) if save else "", "sbom": str(sbom) if sbom else ""}
        output.print_json({"id": built.id, "tag": tag, "base": built.base.name, "python": built.base.python.version, **written})
    else:
        output.console.print(f"{built.id}  {escape(tag)}", soft_wrap=True)


@app.command("load")
@reporting
def image_load(
    file: Annotated[Path, typer.Argument(help="an archive that was saved")], docker_socket: Socket = DEFAULT_SOCKET, as_json: Json = False
) -> None:
    """Load a saved archive into the engine of this machine, and print the id of each image in it."""
    loaded = Engine(docker_socket).load(file)
    if as_json:
        output.print_json([{"id": identifier, "name": name} for name, identifier in loaded])
        return
    for name, identifier in loaded:
        output.console.print(f"{identifier}  {escape(name)}", soft_wrap=True)
