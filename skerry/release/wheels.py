"""The wheels that a lock file asks for on the boxes' Python and processor, fetched by pip to make a release of."""

import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from skerry.image.base import Python
from skerry.image.lock import requirements_for

FETCH_TIMEOUT_S = 3600
PYTHON = ".".join(platform.python_version_tuple()[:2])
GLIBC_MINORS = range(36, 4, -1)
"""Wheels for boxes of another processor need no newer C library than Debian 12's, 2.36."""


class NotFetched(Exception):
    """pip could not get them; what it said stands on stderr."""


def fetch(lock: Path, folder: Path, *, python: str = "", machine: str = "") -> None:
    """Put them into ``folder``; pip tells its progress on stderr. Raises NotFetched, ImageError, OSError.

    pip judges an environment marker by the interpreter that it runs in, so it gets those lines alone that hold on the boxes.
    """
    python, machine = python or PYTHON, machine or platform.machine()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as chosen:
        chosen.write(requirements_for(lock.read_text(), Python(f"{python}.0", machine, "glibc", "cpython")))
        chosen.flush()
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--progress-bar=off", "--no-deps"]
        command += ["--require-hashes", "--only-binary=:all:", *_for(python, machine), f"--requirement={chosen.name}", f"--dest={folder}"]
        try:
            done = subprocess.run(command, stdout=sys.stderr, timeout=FETCH_TIMEOUT_S, check=False)  # noqa: S603 - a list, no shell
        except subprocess.TimeoutExpired as exc:
            raise NotFetched(f"{lock}: pip took more than {FETCH_TIMEOUT_S} s") from exc
    if done.returncode != 0:
        raise NotFetched(f"{lock}: pip could not fetch all of it for Python {python} on {machine}")


def _for(python: str, machine: str) -> list[str]:
    """pip's options for a Python and a processor; none for those that it runs on."""
    if (python, machine) == (PYTHON, platform.machine()):
        return []
    options = ["--implementation=cp", f"--python-version={python}"]
    if machine != platform.machine():
        options += [f"--platform=manylinux_2_{minor}_{machine}" for minor in GLIBC_MINORS] + [f"--platform=manylinux2014_{machine}"]
    return options
