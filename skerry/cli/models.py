"""``skerry model``: the catalogue and the store."""

import hashlib
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

from skerry.cli import catalogue, command, output, signing
from skerry.cli.client import EXIT_NOT_FOUND, EXIT_USAGE, CliError, Coordinator, Upload, path_of
from skerry.cli.command import Json, reporting
from skerry.wire import codec
from skerry.wire.api import ModelView, Pushed, Signed
from skerry.wire.messages import StateTensor, WarmupTensor
from skerry.wire.units import format_bytes

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True, help="Models in the store and in the catalogue.")
app.command("keygen")(signing.model_keygen)
app.command("sign")(signing.model_sign)
app.command("verify")(signing.model_verify)


@app.command("list")
@reporting
def model_list(as_json: Json = False) -> None:
    """Every model version in the store."""
    models = command.coordinator().call("GET", path_of("models"), list[ModelView])
    if as_json:
        output.print_json(models)
    else:
        output.print_models(models)


@app.command("materialise")
@reporting
def model_materialise(
    names: Annotated[list[str] | None, typer.Argument(help="models of the catalogue; all where none is named")] = None,
    catalogue_dir: Annotated[Path, typer.Option("--catalogue", help="the folder with NAME/model.toml")] = Path("models"),
    to: Annotated[Path, typer.Option(help="where the files go, in Triton's layout")] = Path(".cache/models"),
    as_json: Json = False,
) -> None:
    """Extract models from the packages that hold them, verified by digest."""
    manifests = catalogue.read_catalogue(catalogue_dir)
    unknown = set(names or []) - {manifest.name for manifest in manifests}
    if unknown:
        known = ", ".join(manifest.name for manifest in manifests) or "nothing"
        raise CliError(
            f"{sorted(unknown)[0]!r} is not in the catalogue {catalogue_dir}", exit_code=EXIT_NOT_FOUND, hint=f"it holds {known}"
        )
    done = []
    for manifest in manifests:
        if not names or manifest.name in names:
            path = catalogue.materialise(manifest, to)
            done.append({"name": manifest.name, "version": manifest.version, "path": str(path), "sha256": manifest.source.sha256})
            if not as_json:
                output.console.print(
                    f"{manifest.name}:{manifest.version}  {format_bytes(manifest.source.size_bytes)}  {path}", soft_wrap=True
                )
    if as_json:
        output.print_json(done)


def push_file(
    coordinator: Coordinator, path: Path, *, name: str, number: int, warmup: list[WarmupTensor], state: list[StateTensor]
) -> Pushed:
    """Push one file, with a progress bar on a terminal. Raises CliError."""
    query = {"warmup": codec.encode(warmup).decode(), "state": codec.encode(state).decode()}
    return upload(coordinator, path, path_of("models", name, "versions", number), Pushed, title=f"{name}:{number}", query=query)


def upload(coordinator: Coordinator, path: Path, to: str, kind: type[T], *, title: str, query: dict[str, str]) -> T:
    """The file sent with its digest, with a progress bar on a terminal. Raises CliError."""
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.seek(0, 2)
            file.seek(0)
            bar = Progress(
                "{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=output.errors, transient=True
            )
            with bar:
                task = bar.add_task(title, total=size)
                return coordinator.call(
                    "PUT", to, kind, query={"sha256": sha256, **query},
                    body=Upload(file, lambda sent: bar.advance(task, sent)), size=size, timeout_s=600,
                )  # fmt: skip
    except OSError as exc:
        raise CliError(f"{path}: {exc.strerror}", exit_code=EXIT_USAGE) from exc


def _read_option(text: str, option: str, kind: type[T]) -> list[T]:
    try:
        return codec.decode(text.encode(), list[kind])  # type: ignore[valid-type]  # a list of what is given
    except codec.Malformed as exc:
        raise CliError(f"{option}: {exc}", exit_code=EXIT_USAGE) from exc


@app.command("push")
@reporting
def model_push(
    file: Annotated[Path, typer.Argument(help="an ONNX file, or a catalogue folder with a model.toml")],
    name: Annotated[str, typer.Option(help="the model's name")] = "",
    number: Annotated[int, typer.Option("--version", help="the version, a whole number from 1; versions never change", min=0)] = 0,
    warmup: Annotated[str, typer.Option(help="inputs of the warm-up run: JSON, [{name, shape, value}]")] = "[]",
    state: Annotated[
        str, typer.Option(help="outputs that are the next request's inputs within a sequence: JSON, [{input, output}]")
    ] = "[]",
    signature: Annotated[
        Path | None, typer.Option(help="who vouches for it, made by 'skerry model sign'; where none is named, FILE.sig if that is there")
    ] = None,
    as_json: Json = False,
) -> None:
    """Push a model version to the store, with its signature."""
    tensors, kept = _read_option(warmup, "--warmup", WarmupTensor), _read_option(state, "--state", StateTensor)
    if file.is_dir():
        manifest = catalogue.read_manifest(file / "model.toml")
        file = catalogue.materialise(manifest, Path(".cache/models"))
        name, number = name or manifest.name, number or manifest.version
        tensors, kept = tensors or manifest.warmup, kept or manifest.state
    if not name or not number:
        raise CliError(
            "give --name and --version", exit_code=EXIT_USAGE, hint="skerry model push FILE.onnx --name shelf-detector --version 1"
        )
    signature = signature or signing.signature_beside(file)
    bundle = signing.read_bundle(signature) if signature else None
    coordinator = command.coordinator()
    pushed = push_file(coordinator, file, name=name, number=number, warmup=tensors, state=kept)
    signed = None
    if bundle is not None:
        signed = coordinator.call("PUT", path_of("models", name, "versions", number, "signature"), Signed, body=codec.encode(bundle))
    if as_json:
        output.print_json({**msgspec.to_builtins(pushed), "signature": signed.signature if signed else "none"})
    else:
        words = "pushed" if pushed.is_new else "was there already"
        output.console.print(
            f"{pushed.name}:{pushed.version} {words}  {format_bytes(pushed.size_bytes)}  sha256 {pushed.sha256}"
            f"{f'  signature {signed.signature}' if signed else ''}",
            soft_wrap=True,
        )
