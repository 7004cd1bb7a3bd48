"""Room on the disk that is kept for what a box must be able to write whatever fills it: what it is told to do."""

import contextlib
import os
import shutil
from pathlib import Path

from skerry.runtime import log

logger = log.get("warden.reserve")


class Reserve:
    """A file that holds nothing, and takes ``size_bytes``."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self._size_bytes = size_bytes

    def hold(self) -> None:
        """Take it, where there is plenty of room."""
        with contextlib.suppress(OSError):
            if self._path.exists() or shutil.disk_usage(self._path.parent).free < 4 * self._size_bytes:
                return
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, self._size_bytes)
            except OSError:
                self._path.unlink(missing_ok=True)
            finally:
                os.close(descriptor)

    def give_up(self) -> bool:
        """Let it go; says whether there was one."""
        try:
            self._path.unlink()
        except OSError:
            return False
        logger.warning("reserve.used", hint="the disk is full: free some of it")
        return True
