"""Making a release: the wheels that the lock file names, the lock file, and the program that unpacks it, in one uncompressed tar.

The same wheels give the same bytes. What the lock file asks for on the boxes' machines and is not there is found here, and not on a box.
"""

import hashlib
import io
import platform
import re
import tarfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import msgspec

from skerry.image.base import Python
from skerry.image.lock import requirements_for
from skerry.release.unpack import FORMAT, LOCK, MANIFEST, VERSION
from skerry.release.wheels import PYTHON

HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
WHEEL = re.compile(r"(?P<name>[A-Za-z0-9_.]+)-(?P<version>[A-Za-z0-9_.!+]+)(-\d[^-]*)?-[^-]+-[^-]+-[^-]+\.whl")
OWN = "skerry"
CHUNK_BYTES = 2**20


class NotBuilt(Exception):
    """The release can't be made; the text says why."""


class File(msgspec.Struct, frozen=True):
    """A file of a release."""

    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """What a release says of itself: for which Python (as in ``3.11``) and machine (as in ``x86_64``) its wheels are, and its files."""

    format: int
    version: str
    python: str
    machine: str
    files: dict[str, File]


def build(wheels: Path, lock: Path, out: Path, *, python: str = "", machine: str = "") -> Manifest:
    """Write the release to ``out``. ``wheels`` holds Skerry's own wheel and those of ``lock``. Raises NotBuilt, ImageError, OSError."""
    version, python, machine = version_of(wheels), python or PYTHON, machine or platform.machine()
    text = requirements_for(lock.read_text(), Python(f"{python}.0", machine, "glibc", "cpython"))
    found = {path.name: path for path in sorted(wheels.glob("*.whl"))}
    digests = {name: _digest(path) for name, path in found.items()}
    chosen = [name for name in found if name.startswith(f"{OWN}-")]
    for requirement, hashes in _locked(text):
        have = [name for name, digest in digests.items() if digest in hashes]
        if not have:
            raise NotBuilt(f"{wheels}: holds no wheel of {requirement} that the lock file has a hash of")
        chosen += have
    content: list[tuple[str, Path | bytes]] = [("unpack.py", resources.files("skerry.release").joinpath("unpack.py").read_bytes())]
    content += [(LOCK, text.encode()), *((f"wheels/{name}", found[name]) for name in sorted(chosen))]
    files = {name: _file(data) for name, data in content}
    manifest = Manifest(FORMAT, version, python, machine, files)
    _write(out, manifest, content)
    return manifest


def version_of(wheels: Path) -> str:
    """Of Skerry's own wheel. Raises NotBuilt."""
    own = [match["version"] for path in wheels.glob("*.whl") if (match := WHEEL.fullmatch(path.name)) and match["name"] == OWN]
    if len(own) != 1:
        raise NotBuilt(f"{wheels}: holds {len(own)} wheels of Skerry itself, not one")
    if not VERSION.fullmatch(own[0]):
        raise NotBuilt(f"{wheels}: version {own[0]!r} can't be a folder's name")
    return own[0]


def _locked(text: str) -> Iterator[tuple[str, set[str]]]:
    """Each requirement, and its hashes."""
    for line in text.splitlines():
        yield line.partition(" --hash=")[0], set(HASH.findall(line))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file(data: Path | bytes) -> File:
    if isinstance(data, bytes):
        return File(len(data), hashlib.sha256(data).hexdigest())
    return File(data.stat().st_size, _digest(data))


def _write(out: Path, manifest: Manifest, content: list[tuple[str, Path | bytes]]) -> None:
    staging = out.with_name(f".{out.name}.partial")
    with tarfile.open(staging, "w", format=tarfile.PAX_FORMAT) as archive:
        _add(archive, MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
        for name, data in content:
            _add(archive, name, data)
    staging.rename(out)


def _add(archive: tarfile.TarFile, name: str, data: Path | bytes) -> None:
    member = tarfile.TarInfo(name)
    member.mode = 0o644
    if isinstance(data, bytes):
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
        return
    member.size = data.stat().st_size
    with data.open("rb") as file:
        archive.addfile(member, file)
