"""``skerry model keygen``, ``sign`` and ``verify``: who vouches for a model. Nothing here speaks to a coordinator."""

import hashlib
import os
from pathlib import Path
from typing import Annotated

import typer
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from skerry.cli import catalogue, output
from skerry.cli.client import EXIT_USAGE, CliError
from skerry.cli.command import Json, reporting
from skerry.runtime import keys
from skerry.wire import codec, model_signature
from skerry.wire.bundle import Bundle

EXIT_NOT_VOUCHED = 1


def signature_beside(file: Path) -> Path | None:
    """``FILE.sig``, where there is one."""
    beside = file.with_name(f"{file.name}.sig")
    return beside if beside.is_file() else None


def read_bundle(path: Path) -> Bundle:
    """A signature's file. Raises CliError."""
    try:
        return model_signature.parse_bundle(path.read_bytes())
    except OSError as exc:
        raise CliError(f"{path}: {exc.strerror}", exit_code=EXIT_USAGE) from exc
    except codec.Malformed as exc:
        raise CliError(f"{path}: not a model's signature: {exc}", exit_code=EXIT_USAGE) from exc


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        text = path.read_bytes()
        try:
            key = load_pem_private_key(text, password=None)
        except TypeError:  # it is encrypted
            key = load_pem_private_key(text, password=typer.prompt(f"password of {path}", hide_input=True, err=True).encode())
    except OSError as exc:
        raise CliError(f"--key: {path}: {exc.strerror}", exit_code=EXIT_USAGE) from exc
    except ValueError as exc:
        raise CliError(f"--key: {path}: not a private key in PEM, or another password", exit_code=EXIT_USAGE) from exc
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CliError(f"--key: {path}: not a key of the curve P-256, P-384 or P-521", exit_code=EXIT_USAGE)
    return key


def _named(file: Path, name: str, number: int) -> tuple[Path, str, int]:
    """The file, and which model it is, as the options or the catalogue's manifest say it. Raises CliError."""
    if file.is_dir():
        manifest = catalogue.read_manifest(file / "model.toml")
        return catalogue.materialise(manifest, Path(".cache/models")), name or manifest.name, number or manifest.version
    if not name or not number:
        raise CliError("give --name and --version: the signature says which model the file is", exit_code=EXIT_USAGE)
    return file, name, number


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as exc:
        raise CliError(f"{file}: {exc.strerror}", exit_code=EXIT_USAGE) from exc


def _write_new(path: Path, content: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as exc:
        raise CliError(f"{path} is there already, and a key is never overwritten", exit_code=EXIT_USAGE) from exc
    except OSError as exc:
        raise CliError(f"{path}: {exc.strerror}", exit_code=EXIT_USAGE) from exc
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


File = Annotated[Path, typer.Argument(help="an ONNX file, or a catalogue folder with a model.toml")]
Name = Annotated[str, typer.Option(help="the model's name")]
Number = Annotated[int, typer.Option("--version", help="the version, a whole number from 1", min=0)]


@reporting
def model_keygen(
    key: Annotated[Path, typer.Option(help="where the private key goes; the public one goes beside it, with .pub at the end")],
    as_json: Json = False,
) -> None:
    """Make a key with which to vouch for models. Keep it away from the coordinator: give that and the boxes the .pub alone."""
    make_key(key, as_json=as_json)


def make_key(key: Path, *, as_json: bool) -> None:
    """A private key and, beside it, the public one. Raises CliError."""
    made = keys.made()
    public = key.with_name(f"{key.name}.pub")
    _write_new(key, keys.pem(made), 0o600)
    _write_new(public, made.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), 0o644)
    if as_json:
        output.print_json({"key": str(key), "public_key": str(public), "hint": model_signature.hint_of(made.public_key())})
    else:
        output.console.print(f"{key} is the private key, {public} the public one", soft_wrap=True)


@reporting
def model_sign(
    file: File,
    key: Annotated[Path, typer.Option(help="a private key of the curve P-256, P-384 or P-521, in PEM")],
    name: Name = "",
    number: Number = 0,
    to: Annotated[Path | None, typer.Option(help="where the signature goes; FILE.sig where nothing is named")] = None,
    as_json: Json = False,
) -> None:
    """Vouch for a file being this version of this model: an OpenSSF model signature, which 'skerry model push' sends along."""
    file, name, number = _named(file, name, number)
    sign_file(file, model_signature.path_of(name, number), key, to, title=(name, f"{name}:{number}"), as_json=as_json)


def sign_file(file: Path, path: str, key: Path, to: Path | None, *, title: tuple[str, str], as_json: bool) -> None:
    """Vouch for ``file`` being ``path``; ``title`` is what the signature and what people are told. Raises CliError."""
    try:
        bundle = model_signature.sign({path: _digest(file)}, _key(key), title=title[0])
    except ValueError as exc:
        raise CliError(f"--key: {key}: {exc}", exit_code=EXIT_USAGE) from exc
    to = to or file.with_name(f"{file.name}.sig")
    try:
        to.write_bytes(codec.encode(bundle) + b"\n")
    except OSError as exc:
        raise CliError(f"{to}: {exc.strerror}", exit_code=EXIT_USAGE) from exc
    if as_json:
        output.print_json({"signature": str(to), "hint": bundle.verification_material.public_key.hint})
    else:
        output.console.print(f"{title[1]} signed  {to}", soft_wrap=True)


@reporting
def model_verify(
    file: File,
    key: Annotated[Path, typer.Option(help="public keys (PEM), any of which may have signed")],
    name: Name = "",
    number: Number = 0,
    signature: Annotated[Path | None, typer.Option(help="the signature; FILE.sig where nothing is named")] = None,
) -> None:
    """Whether one of the keys vouches for a file being this version of this model; exits 1 where none does."""
    file, name, number = _named(file, name, number)
    try:
        trusted = model_signature.parse_keys(key.read_bytes())
    except OSError as exc:
        raise CliError(f"--key: {key}: {exc.strerror}", exit_code=EXIT_USAGE) from exc
    except ValueError as exc:
        raise CliError(f"--key: {key}: {exc}", exit_code=EXIT_USAGE) from exc
    path = signature or signature_beside(file)
    try:
        signer = model_signature.verify(read_bundle(path) if path else None, trusted, name=name, version=number, sha256=_digest(file))
    except model_signature.NotVouched as exc:
        raise CliError(f"{name}:{number}: {exc}", exit_code=EXIT_NOT_VOUCHED) from exc
    output.console.print(f"{name}:{number} is vouched for by key {model_signature.hint_of(signer)[:16]}", soft_wrap=True)
