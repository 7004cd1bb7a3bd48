"""Releases that nothing needs any more: neither the present one, nor the one before, nor the one that
judges the next, nor one that a program or a sandbox runs from."""

import shutil
import time
from pathlib import Path

from skerry.release.unpack import COMPLETE, VERSION

UNFINISHED_S = 24 * 3600
"""A release without its mark may be about to get it: it is left for a day."""


def unneeded(root: Path, *, processes: Path = Path("/proc"), now_s: float | None = None) -> list[Path]:
    """Folders below ``root`` that may go. Raises OSError where ``root`` can't be read."""
    now_s = time.time() if now_s is None else now_s
    named = {link.readlink().name for link in (root / "current", root / "previous", root / "proven") if link.is_symlink()}
    if "current" not in {path.name for path in root.iterdir()}:
        return []  # somebody is at work here
    found = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.is_symlink() and VERSION.fullmatch(path.name)]
    found = [path for path in found if path.name not in named]
    found = [path for path in found if (path / COMPLETE).exists() or now_s - path.stat().st_mtime > UNFINISHED_S]
    used = used_of(root, {path.name for path in found}, processes)
    return [path for path in found if path.name not in used]


def used_of(root: Path, versions: set[str], processes: Path) -> set[str]:
    """Those of ``versions`` that a process was started from, or sees in a mount: a sandbox has the release's libraries mounted, and its
    own words name paths inside."""
    used: set[str] = set()
    for folder in processes.iterdir():
        if not folder.name.isdigit():
            continue
        for name in ("cmdline", "mountinfo"):
            try:
                text = (folder / name).read_bytes()
            except OSError:
                continue  # it has ended
            # As a part of a mounted file system the path may begin anywhere above the root's own name.
            used |= {version for version in versions - used if f"/{root.name}/{version}/".encode() in text}
    return used


def prune(root: Path, *, processes: Path = Path("/proc")) -> list[Path]:
    """Remove them; returns which. Raises OSError."""
    gone = unneeded(root, processes=processes)
    for path in gone:
        # Its mark first: what is cut off in the middle is no release any more.
        (path / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(path)
    return gone
