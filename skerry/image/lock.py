"""A lock file's distributions, installed into a folder for another interpreter: pinned, hashed, wheels alone."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from skerry.image.base import Python
from skerry.image.engine import ImageError

INSTALL_TIMEOUT_S = 1800
EXTRA_HINT = "pip install 'skerry[image]'"


class Distribution(msgspec.Struct, frozen=True):
    """A Python distribution as it was installed; ``sha256`` is its wheel's, one of those in the lock file."""

    name: str
    version: str
    sha256: str


class _Archive(msgspec.Struct, frozen=True):
    hashes: dict[str, str] = {}


class _Download(msgspec.Struct, frozen=True):
    archive_info: _Archive = _Archive()


class _Metadata(msgspec.Struct, frozen=True):
    name: str
    version: str


class _Item(msgspec.Struct, frozen=True):
    metadata: _Metadata
    download_info: _Download = _Download()


class _Report(msgspec.Struct, frozen=True):
    """What pip says that it installed."""

    install: list[_Item]


def requirements_for(text: str, python: Python) -> str:
    """The lines of a lock file that concern ``python``, without their markers. Raises ImageError.

    pip judges markers by the interpreter that it runs in, which is not the one of the image.
    """
    try:
        from packaging.markers import default_environment
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError as exc:
        raise ImageError("the package 'packaging' is not installed", hint=EXTRA_HINT) from exc
    environment: dict[str, Any] = {**default_environment(), "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    environment["python_version"] = ".".join(python.version.split(".")[:2])
    environment |= {"python_full_version": python.version, "implementation_version": python.version, "platform_machine": python.machine}
    chosen = []
    for line in text.replace("\\\n", " ").splitlines():
        words, *hashes = line.partition(" #")[0].split(" --hash=")
        if not words.strip() or words.startswith("#"):
            continue
        try:
            requirement = Requirement(words.strip())
        except InvalidRequirement as exc:
            raise ImageError(f"the lock file: {words.strip()[:80]!r}: {exc}") from exc
        if requirement.marker is None or requirement.marker.evaluate(environment):
            chosen.append(" ".join([f"{requirement.name}{requirement.specifier}", *(f"--hash={value.strip()}" for value in hashes)]))
    return "\n".join(chosen) + "\n"


def install(lock: Path, folder: Path, python: Python) -> list[Distribution]:
    """Install a lock file's distributions below ``folder``; returns them in order of name. Raises ImageError.

    Nothing of them is run, and byte code is left to the interpreter of the image.
    """
    folder.mkdir(parents=True)
    chosen, report = folder.with_name(f"{folder.name}.txt"), folder.with_name(f"{folder.name}.json")
    chosen.write_text(requirements_for(lock.read_text(), python))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--no-compile"]
    command += ["--require-hashes", "--only-binary=:all:", "--implementation=cp", f"--python-version={python.version.rstrip('+')}"]
    command += ["--requirement", str(chosen), "--target", str(folder), "--report", str(report)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)  # noqa: S603 - a list, no shell
    except subprocess.TimeoutExpired as exc:
        raise ImageError(f"{lock.name}: pip took more than {INSTALL_TIMEOUT_S} s") from exc
    if done.returncode != 0:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR:")), done.stderr.strip()[-300:])
        raise ImageError(
            f"{lock.name}: pip could not install it for Python {python.version}: {reason[:300]}",
            hint="a base whose Python is newer than the lock file's wheels has none: take an older one",
        )
    installed = msgspec.json.decode(report.read_bytes(), type=_Report).install
    found = [Distribution(i.metadata.name, i.metadata.version, i.download_info.archive_info.hashes.get("sha256", "")) for i in installed]
    return sorted(found, key=lambda distribution: distribution.name.lower())
