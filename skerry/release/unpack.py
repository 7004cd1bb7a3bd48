"""Put a release beside the others: ``python3 unpack.py skerry-1.2.3.tar --root /opt/skerry`` makes ``/opt/skerry/1.2.3``.

This file travels in the release and runs before anything else of it is installed, so it needs the standard library alone. A release counts
once ``.complete`` is there, which is written last of all, when the rest is on the disk: what power cut off is made anew. What was unpacked
already is left as it is.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MANIFEST, LOCK, COMPLETE = "manifest.json", "requirements.txt", ".complete"
FORMAT = 1
NAME = re.compile(r"wheels/[A-Za-z0-9][A-Za-z0-9._+!-]{0,199}\.whl|unpack\.py|requirements\.txt")
VERSION = re.compile(r"[0-9][A-Za-z0-9._+-]{0,63}")
MOST_MANIFEST_BYTES = 2**20
MOST_BYTES = 4 * 2**30
CHUNK_BYTES = 2**20
STEP_WITHIN_S = 1800
"""A slow disk takes its time; one that hangs must not hold whoever waits for ever."""
EXIT_FAILED = 1


class NotUnpacked(Exception):
    """The release can't be used here; the text says why."""


def read_manifest(archive: tarfile.TarFile) -> dict[str, Any]:
    """What the release says of itself: ``format, version, python, machine`` and, by name, ``size`` and ``sha256`` of each file.

    Raises NotUnpacked.
    """
    first = archive.next()
    if first is None or first.name != MANIFEST or not first.isreg() or first.size > MOST_MANIFEST_BYTES:
        raise NotUnpacked(f"{MANIFEST}: is not the first file of the archive, which is no release")
    file = archive.extractfile(first)
    try:
        manifest = json.loads(file.read() if file else b"")
    except ValueError as exc:
        raise NotUnpacked(f"{MANIFEST}: {exc}") from exc
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise NotUnpacked(f"{MANIFEST}: format: is not {FORMAT}, the one that is known here")
    for name, form in (("version", VERSION), ("python", re.compile(r"3\.\d{1,2}")), ("machine", re.compile(r"[A-Za-z0-9_]{1,32}"))):
        if not isinstance(manifest.get(name), str) or not form.fullmatch(manifest[name]):
            raise NotUnpacked(f"{MANIFEST}: {name}: is not what it must look like")
    _check_files(manifest.get("files"))
    return manifest


def _check_files(files: object) -> None:
    if not isinstance(files, dict) or LOCK not in files:
        raise NotUnpacked(f"{MANIFEST}: files: there is no {LOCK}")
    total = 0
    for name, entry in files.items():
        if not NAME.fullmatch(name):
            raise NotUnpacked(f"{MANIFEST}: files: {name[:80]!r} is none that a release has")
        size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or size < 0 or not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise NotUnpacked(f"{MANIFEST}: files: {name}: size or sha256 is missing")
        total += size
    if total > MOST_BYTES:
        raise NotUnpacked(f"{MANIFEST}: files: {total} bytes are more than {MOST_BYTES}")


def extract(archive: tarfile.TarFile, manifest: dict[str, Any], folder: Path) -> None:
    """Every file into ``folder``, each checked by size and digest. Raises NotUnpacked."""
    wanted = dict(manifest["files"])
    (folder / "wheels").mkdir(parents=True)
    while (member := archive.next()) is not None:
        entry = wanted.pop(member.name, None)
        if entry is None or not member.isreg() or member.size != entry["size"]:
            raise NotUnpacked(f"{member.name[:80]!r}: the manifest has no such file, or another size")
        source, digest = archive.extractfile(member), hashlib.sha256()
        if source is None:
            raise NotUnpacked(f"{member.name}: has no content")
        with (folder / member.name).open("xb") as target:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                target.write(chunk)
        if digest.hexdigest() != entry["sha256"]:
            raise NotUnpacked(f"{member.name}: has the SHA-256 {digest.hexdigest()}, the manifest says {entry['sha256']}")
    if wanted:
        raise NotUnpacked(f"{min(wanted)}: is missing from the archive")


def unpack(path: Path, root: Path, *, python: str, say: Callable[[str], object]) -> tuple[Path, bool]:
    """The release's folder, and whether it was made now. ``python`` is the interpreter to run it with. Raises NotUnpacked, OSError."""
    try:
        with tarfile.open(path, "r:") as archive:
            manifest = read_manifest(archive)
            folder = root / manifest["version"]
            if (folder / COMPLETE).exists():
                return folder, False
            _check_machine(manifest, python)
            say(f"environment {folder}")
            root.mkdir(parents=True, exist_ok=True)
            _step(python, "-m", "venv", "--clear", str(folder))
            incoming = folder / ".incoming"
            extract(archive, manifest, incoming)
    except tarfile.TarError as exc:
        raise NotUnpacked(f"{path}: {exc}") from exc
    _install(folder, incoming, manifest["version"], say)
    shutil.rmtree(incoming)
    os.sync()
    # Only now, and with a name that is on the disk itself.
    with (folder / COMPLETE).open("xb") as file:
        os.fsync(file.fileno())
    _sync_folder(folder)
    _sync_folder(root)
    return folder, True


def _check_machine(manifest: dict[str, Any], python: str) -> None:
    asked = "import platform; print(*platform.python_version_tuple()[:2], sep='.')"
    here = _step(python, "-c", asked).strip()
    if (manifest["python"], manifest["machine"]) != (here, platform.machine()):
        raise NotUnpacked(
            f"release {manifest['version']} is for Python {manifest['python']} on {manifest['machine']}; this is {here} on"
            f" {platform.machine()}"
        )


def _install(folder: Path, incoming: Path, version: str, say: Callable[[str], object]) -> None:
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-cache-dir"]
    pip += ["--only-binary", ":all:", "--find-links", str(incoming / "wheels")]
    say("locked requirements")
    _step(*pip, "--require-hashes", "--requirement", str(incoming / LOCK))
    say(f"skerry {version}")
    _step(*pip, "--no-deps", f"skerry=={version}")
    found = _step(str(folder / "bin/skerry"), "version").split()[-1]
    if found != version:
        raise NotUnpacked(f"the release says that it is {found!r}, not {version!r}")


def _step(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=STEP_WITHIN_S, check=False)  # noqa: S603 - a list, no shell
    except subprocess.TimeoutExpired as exc:
        raise NotUnpacked(f"{' '.join(words[:4])}: did not end within {STEP_WITHIN_S} s") from exc
    if done.returncode:
        raise NotUnpacked(f"{' '.join(words[:4])}: exit status {done.returncode}: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main() -> int:
    """The command; prints the release's folder, and says on standard error what takes long."""
    parser = argparse.ArgumentParser(description="Put a release of Skerry beside the others.")
    parser.add_argument("archive", type=Path, help="skerry-VERSION.tar")
    parser.add_argument("--root", type=Path, default=Path("/opt/skerry"), help="where releases lie (default: %(default)s)")
    parser.add_argument("--python", default=sys.executable, help="the interpreter to run it with (default: %(default)s)")
    parsed = parser.parse_args()
    try:
        folder, is_new = unpack(parsed.archive, parsed.root, python=parsed.python, say=lambda line: sys.stderr.write(f"{line}\n"))
    except (NotUnpacked, OSError) as exc:
        sys.stderr.write(f"error: {exc}\n")
        return EXIT_FAILED
    sys.stdout.write(f"{folder} {'made' if is_new else 'was there'}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
