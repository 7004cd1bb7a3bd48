"""``skerry release``: the box software itself, in one file."""

import tarfile
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.markup import escape

from skerry.cli import command, models, output, rollouts, signing
from skerry.cli.client import EXIT_FAILED, EXIT_USAGE, CliError, Coordinator, path_of
from skerry.cli.command import Json, reporting
from skerry.cli.output import moment
from skerry.image.engine import ImageError
from skerry.release import archive, prune, unpack
from skerry.release import wheels as locked_wheels
from skerry.wire import codec, model_signature
from skerry.wire.api import ReleaseView, RolloutView, SoftwareView, SpreadRequest
from skerry.wire.units import format_bytes

app = typer.Typer(no_args_is_help=True, help="Releases of Skerry itself, and which of them the boxes run.")


@app.command("fetch")
@reporting
def release_fetch(
    requirements: Annotated[Path, typer.Option(help="the lock file, with hashes")],
    wheels: Annotated[Path, typer.Option(help="the folder to put them into")],
    python: Annotated[str, typer.Option(help="the boxes' Python, as in 3.11 (default: this one)")] = "",
    machine: Annotated[str, typer.Option(help="the boxes' processor, as in aarch64 (default: this one)")] = "",
) -> None:
    """Fetch the wheels that a lock file asks for on the boxes, for `skerry release build`; pip tells how far it is."""
    try:
        locked_wheels.fetch(requirements, wheels, python=python, machine=machine)
    except (locked_wheels.NotFetched, ImageError, OSError) as exc:
        raise CliError(str(exc)) from exc


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
    """Make a release out of wheels; `skerry release fetch` gets them."""
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


def _version_of(file: Path) -> str:
    """What a release says that it is. Raises CliError."""
    try:
        with tarfile.open(file, "r:") as opened:
            return str(unpack.read_manifest(opened)["version"])
    except OSError as exc:
        raise CliError(f"{file}: {exc.strerror}", exit_code=EXIT_USAGE) from exc
    except (tarfile.TarError, unpack.NotUnpacked) as exc:
        raise CliError(f"{file}: this is no release: {exc}", exit_code=EXIT_USAGE) from exc


@app.command("keygen")
@reporting
def release_keygen(
    key: Annotated[Path, typer.Option(help="where the private key goes; the public one goes beside it, with .pub at the end")],
    as_json: Json = False,
) -> None:
    """Make a key with which to vouch for releases. Keep it away from the coordinator: give the boxes the .pub alone."""
    signing.make_key(key, as_json=as_json)


@app.command("sign")
@reporting
def release_sign(
    file: Annotated[Path, typer.Argument(help="skerry-VERSION.tar")],
    key: Annotated[Path, typer.Option(help="a private key of the curve P-256, P-384 or P-521, in PEM")],
    to: Annotated[Path | None, typer.Option(help="where the signature goes; FILE.sig where nothing is named")] = None,
    as_json: Json = False,
) -> None:
    """Vouch for a file being this release: boxes take no other from their coordinator."""
    version = _version_of(file)
    signing.sign_file(file, model_signature.release_path(version), key, to, title=("skerry", f"skerry {version}"), as_json=as_json)


@app.command("push")
@reporting
def release_push(
    file: Annotated[Path, typer.Argument(help="skerry-VERSION.tar")],
    signature: Annotated[
        Path | None, typer.Option(help="made by 'skerry release sign'; where none is named, FILE.sig if that is there")
    ] = None,
    as_json: Json = False,
) -> None:
    """Push a release to the coordinator's store, with its signature. No box takes it until 'skerry release roll-out'."""
    version = _version_of(file)
    signature = signature or signing.signature_beside(file)
    bundle = signing.read_bundle(signature) if signature else None
    coordinator = command.coordinator()
    view = models.upload(coordinator, file, path_of("releases"), ReleaseView, title=f"skerry {version}", query={})
    words = "pushed" if view.is_new else "was there already"
    if bundle is not None:
        view = coordinator.call("PUT", path_of("releases", view.sha256, "signature"), ReleaseView, body=codec.encode(bundle))
    if as_json:
        output.print_json(view)
        return
    output.console.print(
        f"skerry {escape(view.version)} for Python {view.python} on {view.machine} {words}  {format_bytes(view.size_bytes)}"
        f"  sha256 {view.sha256}  signature {view.signature}",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


@app.command("list")
@reporting
def release_list(as_json: Json = False) -> None:
    """Releases in the coordinator's store."""
    views = command.coordinator().call("GET", path_of("releases"), list[ReleaseView])
    if as_json:
        output.print_json(views)
        return
    table = output.table_of("version", "Python", "processor", "size", "signature", "pushed")
    for view in views:
        table.add_row(
            escape(view.version), view.python, view.machine, format_bytes(view.size_bytes), view.signature, moment(view.pushed_at_ms)
        )
    output.console.print(table if views else "no release was pushed yet: skerry release push FILE")


@app.command("remove")
@reporting
def release_remove(version: Annotated[str, typer.Argument(help="which one, every build of it")]) -> None:
    """Remove a release from the coordinator's store."""
    command.coordinator().call("DELETE", path_of("releases", version), type(None))
    output.console.print(f"{escape(version)} is gone", highlight=False)


@app.command("roll-out")
@reporting
def release_roll_out(
    version: Annotated[str, typer.Argument(help="which one")],
    waves: Annotated[str, typer.Option(help="boxes that run it after each wave: numbers, or shares of all")] = "1,10%,50%,100%",
    observe: Annotated[str, typer.Option(help="for how long each wave is watched")] = "2m",
    deadline: Annotated[str, typer.Option(help="how long a wave may take to be ready: to fetch, unpack and try it")] = "30m",
    approve: Annotated[bool, typer.Option("--approve", help="wait for 'skerry release approve' before each wave")] = False,
    again: Annotated[bool, typer.Option("--again", help="although it was tried, and taken back")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="until it is over; the exit code says how it ended")] = False,
    as_json: Json = False,
) -> None:
    """Have every box run a release, in waves: each box tries it beside what runs, and goes back by itself if it is no good."""
    shares: list[int | str] = [int(wave) if wave.isdigit() else wave for wave in (part.strip() for part in waves.split(","))]
    rules = {"waves": shares, "observe": observe, "deadline": deadline, "approve": approve}
    coordinator = command.coordinator()
    try:
        wanted = msgspec.convert({"version": version, "rollout": rules, "again": again}, SpreadRequest)
    except msgspec.ValidationError as exc:
        raise CliError(f"version: {version!r} is none of a release", exit_code=EXIT_USAGE) from exc
    view = coordinator.call("PUT", path_of("software"), SoftwareView, body=codec.encode(wanted))
    if watch:
        view = _watched(coordinator, is_quiet=as_json)
    _show(view, as_json=as_json)
    _judge(view, is_watched=watch)


@app.command("status")
@reporting
def release_status(
    watch: Annotated[bool, typer.Option("--watch", help="until it is over; the exit code says how it ended")] = False, as_json: Json = False
) -> None:
    """Which release the boxes are to run, which they run, and how far the last one is."""
    coordinator = command.coordinator()
    view = _watched(coordinator, is_quiet=as_json) if watch else coordinator.call("GET", path_of("software"), SoftwareView)
    _show(view, as_json=as_json)
    _judge(view, is_watched=watch)


def _watched(coordinator: Coordinator, *, is_quiet: bool) -> SoftwareView:
    def look() -> RolloutView:
        rollout = coordinator.call("GET", path_of("software"), SoftwareView).rollout
        if rollout is None:
            raise CliError("no release was rolled out from here", hint="skerry release roll-out VERSION")
        return rollout

    rollouts.watched(look, is_quiet=is_quiet)
    return coordinator.call("GET", path_of("software"), SoftwareView)


def _judge(view: SoftwareView, *, is_watched: bool) -> None:
    rollout = view.rollout
    if is_watched and rollout is not None and rollout.phase != "done":
        raise CliError(f"skerry {rollout.model}: {rollout.phase}: {rollout.reason}", exit_code=EXIT_FAILED)


def _show(view: SoftwareView, *, as_json: bool) -> None:
    if as_json:
        output.print_json(view)
        return
    running = ", ".join(f"{count} run {escape(version)}" for version, count in view.versions.items()) or "no box is known"
    wanted = f"boxes are to run {escape(view.wanted)}" if view.wanted else "no release is rolled out from here"
    output.console.print(f"{wanted}; {running}", highlight=False, soft_wrap=True)
    if view.rollout is not None:
        output.console.print(rollouts.drawn(view.rollout, time.time() * 1000))
    for trouble in view.troubles:
        text = f"  {escape(trouble.node)}: {escape(trouble.version)} {trouble.phase}: {escape(trouble.reason)}"
        output.console.print(text, soft_wrap=True, highlight=False)


def _said(verb: str, text: str, *, as_json: bool) -> None:
    view = command.coordinator().call("POST", path_of("software", verb), SoftwareView)
    if as_json:
        output.print_json(view)
    else:
        output.console.print(text)


@app.command("pause")
@reporting
def release_pause(as_json: Json = False) -> None:
    """Let no further wave begin; the present one is watched on, and taken back if it is no good."""
    _said("pause", "no further wave begins until 'skerry release resume'", as_json=as_json)


@app.command("resume")
@reporting
def release_resume(as_json: Json = False) -> None:
    """Go on after a pause."""
    _said("resume", "it goes on", as_json=as_json)


@app.command("approve")
@reporting
def release_approve(as_json: Json = False) -> None:
    """Let the next wave begin, after 'roll-out --approve'."""
    _said("approve", "the next wave may begin", as_json=as_json)


@app.command("abort")
@reporting
def release_abort(as_json: Json = False) -> None:
    """Have every box go back to what ran before."""
    _said("abort", "what ran before comes back", as_json=as_json)
