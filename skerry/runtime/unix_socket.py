"""Connecting to a socket that somebody else made: to that very one, whatever its name points to by then, and however long its path is."""

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def pinned(path: Path) -> Iterator[str]:
    """A short path by which the socket that lies at ``path`` now can be connected to. Raises OSError where none does.

    A symbolic link is not followed: a sandbox could put one in the place of its socket, and have its gateway talk to another program.
    """
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            raise OSError(f"{path.name} is not a socket")
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def unreachable(path: Path, *, within_s: float) -> str:
    """Why nobody can be reached at ``path``, in the system's words; empty where somebody listens."""
    try:
        with socket.socket(socket.AF_UNIX) as tried:
            tried.settimeout(within_s)
            tried.connect(str(path))
    except OSError as exc:
        return exc.strerror or str(exc)
    return ""
