"""Builds the worker's image: a base, the locked libraries, our code, in layers that change ever more often."""

import importlib.util
import tarfile
import tempfile
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec

from skerry import __version__
from skerry.image.base import Base, find_base
from skerry.image.engine import Engine, ImageError, Say
from skerry.image.lock import Distribution, install

Accelerator = Literal["cpu", "cuda"]

LOCKS: dict[Accelerator, str] = {"cpu": "worker.txt", "cuda": "worker-cuda.txt"}
CODE = ("edge_agent/__init__.py", "skerry/confine", "edge_agent/worker", "skerry/__init__.py", "skerry/wire")
"""Of ours, what a worker imports."""

_MADE_AT = 1_577_836_800
"""The time on every file that is copied in, so that the same files are the same layer."""


class Built(msgspec.Struct, frozen=True):
    """An image that was built: by ``id`` it is pinned, ``tag`` is for people."""

    id: str
    tag: str
    base: Base
    distributions: list[Distribution]


def lock_of(accelerator: Accelerator) -> Path:
    """The lock file that ships with the package. Raises ImageError."""
    return _ours(f"image/{LOCKS[accelerator]}")


def _ours(name: str) -> Path:
    path = Path(str(resources.files("skerry"))) / name
    if not path.is_file():
        raise ImageError(f"{path} is missing from this installation")
    return path


def _packages() -> Path:
    """The folder that holds our packages. The box's are found by name: what is shared imports nothing of them."""
    spec = importlib.util.find_spec("edge_agent")
    if spec is None or spec.origin is None:
        raise ImageError("the package edge_agent, whose worker goes into the image, is not installed here")
    return Path(spec.origin).parents[1]


def _code_files() -> list[tuple[Path, str]]:
    root = _packages()
    found: list[Path] = []
    for name in CODE:
        path = root / name
        found += [path] if path.is_file() else sorted([*path.rglob("*.py"), *path.rglob("*.onnx")])
    return [(path, f"code/{path.relative_to(root)}") for path in found]


def pack(files: list[tuple[Path, str]], archive: Path) -> None:
    """Write files under their names into a build context: root's, readable to all, their folders named, and none with a time of its own."""
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as tar:
        folders: set[PurePosixPath] = set()
        for path, name in sorted(files, key=lambda entry: entry[1]):
            for folder in reversed(PurePosixPath(name).parents):
                if folder.name and folder not in folders:
                    folders.add(folder)
                    tar.addfile(_entry(str(folder), tarfile.DIRTYPE, 0o755))
            entry = _entry(name, tarfile.REGTYPE, 0o755 if path.stat().st_mode & 0o100 else 0o644)
            entry.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(entry, file)


def _entry(name: str, kind: bytes, mode: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.mtime = kind, mode, _MADE_AT
    return entry


def files_below(folder: Path, name: str) -> list[tuple[Path, str]]:
    """Every regular file below a folder, as ``pack`` takes them, below ``name``."""
    return [(path, f"{name}/{path.relative_to(folder)}") for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def build_worker(engine: Engine, *, accelerator: Accelerator, base: str, mirror: str, tag: str, say: Say) -> Built:
    """Build the worker's image on ``base``. Raises ImageError."""
    lock = lock_of(accelerator)
    found = find_base(engine, base, mirror=mirror, say=say)
    say(f"base {found.name}: Python {found.python.version}, {found.id}")
    with tempfile.TemporaryDirectory(prefix="skerry-image-") as scratch:
        folder = Path(scratch)
        say(f"dependencies: installing {lock.name} for Python {found.python.version}")
        distributions = install(lock, folder / "dependencies", found.python)
        files = [(_ours("image/Dockerfile"), "Dockerfile"), *files_below(folder / "dependencies", "dependencies"), *_code_files()]
        pack(files, folder / "context.tar")
        arguments = {"BASE": found.id, "VERSION": __version__, "ACCELERATOR": accelerator}
        identifier = engine.build(folder / "context.tar", arguments=arguments, tag=tag, say=say)
    return Built(identifier, tag, found, distributions)
