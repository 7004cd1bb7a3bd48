"""Files that are whole after a power cut: written beside, synced, renamed, and the directory synced."""

import fcntl
import os
from pathlib import Path
from typing import TypeVar

from skerry.runtime import log
from skerry.wire import codec

T = TypeVar("T")

logger = log.get("durable")

MOST_STATE_BYTES = 64 * 1024


def sync_directory(folder: Path) -> None:
    """Make a rename or an unlink in ``folder`` last."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, content: bytes, *, mode: int = 0o640, is_synced: bool = True) -> None:
    """Replace ``path`` by ``content``: a reader, or a boot after a power cut, sees the old bytes or the new, never a part.

    Without ``is_synced`` that holds for readers alone: for what is written anew after a boot, and should be there at once.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            if is_synced:
                os.fsync(file.fileno())
        staging.rename(path)
    except OSError:
        staging.unlink(missing_ok=True)
        raise
    if is_synced:
        sync_directory(path.parent)


def read(path: Path, kind: type[T], *, max_bytes: int = MOST_STATE_BYTES) -> T | None:
    """What a program kept in a small file of its own; None where there is none, or none that can be read: that costs what it held, and
    no start."""
    try:
        return codec.decode(path.read_bytes(), kind, max_bytes=max_bytes)
    except FileNotFoundError:
        return None
    except (OSError, codec.Malformed) as exc:
        logger.error("state.unreadable", path=str(path), reason=str(exc))
        return None


class AlreadyRunning(Exception):
    """Another process holds this state directory."""


def lock(folder: Path, program: str) -> int:
    """Hold ``folder`` for this process as long as the returned descriptor is open. Raises AlreadyRunning, naming the holder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{program}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise AlreadyRunning(
            f"{folder}: {program} runs already with process id {holder}; stop it, or give this one a state_dir of its own"
        ) from exc
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor
