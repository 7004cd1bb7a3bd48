"""The file that a sandbox's output goes to: appended by the sandbox, read by position, cut when it grows too long."""

import contextlib
import os
from pathlib import Path

from edge_agent.warden.ports import LogLines

READ_MAX_BYTES = 256 * 1024


class ProcessLog:
    """``path`` and beside it ``<path>.cut``: how many bytes were cut off its front, so that positions go on counting."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cut_path = path.with_name(f"{path.name}.cut")

    def _cut_bytes(self) -> int:
        try:
            return int(self._cut_path.read_text())
        except (OSError, ValueError):
            return 0

    def read(self, lines: int, *, after: str = "") -> LogLines:
        """The last ``lines`` lines, of those after the position ``after``, in the last 256 KiB. What is no position counts as none."""
        cut_bytes = self._cut_bytes()
        try:
            with self._path.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                begin = max(0, end - READ_MAX_BYTES)
                if after.isascii() and after.isdigit() and len(after) < 20:  # not every digit of Unicode is one to int()
                    begin = max(begin, min(int(after) - cut_bytes, end))
                log.seek(begin)
                text = log.read(READ_MAX_BYTES)
        except OSError:
            return LogLines([])
        whole = text.rfind(b"\n") + 1 if after else len(text)  # who follows is shown a line once it is whole
        found = text[:whole].decode(errors="replace").splitlines()
        return LogLines(found[-lines:] if lines > 0 else [], str(cut_bytes + begin + whole))

    def trim(self, max_bytes: int) -> None:
        """Cut the front off a log over ``max_bytes``, half of that is kept. What is written in between may be lost, as in any rotation."""
        with contextlib.suppress(OSError):
            size = self._path.stat().st_size
            if size <= max_bytes:
                return
            with self._path.open("r+b") as log:
                log.seek(size - max_bytes // 2)
                kept = log.read()
                self._cut_path.write_text(str(self._cut_bytes() + size - max_bytes // 2))
                log.truncate(0)
                log.seek(0)
                log.write(kept)
