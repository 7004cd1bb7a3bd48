"""What an image stands on: one that the engine has or can pull, or a small Debian made here where no registry is in reach."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import msgspec

from skerry.image.engine import Engine, ImageError, Say

DEBOOTSTRAP = "debootstrap"
SUITE = "bookworm"
REPOSITORY = "skerry-base"
DEBOOTSTRAP_TIMEOUT_S = 1800
OLDEST_PYTHON = (3, 11)

_INCLUDE = "python3"
_LEFT_OUT = (
    *("dev/*", "etc/hostname", "etc/resolv.conf", "etc/machine-id", "tmp/*", "run/*", "root/.*", "var/log/*", "var/tmp/*"),
    *("var/cache/*", "var/lib/apt/lists/*", "var/lib/dpkg/*-old", "usr/share/man/*", "usr/share/info/*", "usr/share/locale/*"),
)
"""What a running image does not need, or what would differ from host to host."""

_ASK = (
    "import json,platform,sys;print(json.dumps({'version':platform.python_version(),'machine':platform.machine(),"
    "'libc':platform.libc_ver()[0],'implementation':sys.implementation.name}))"
)


class Python(msgspec.Struct, frozen=True):
    """The interpreter of a base, as it says itself. ``libc`` is empty where it is not the one that wheels are built for."""

    version: str
    machine: str
    libc: str
    implementation: str


class Base(msgspec.Struct, frozen=True):
    """A base that the engine has: its name as it was asked for, its id, its interpreter."""

    name: str
    id: str
    python: Python


def find_base(engine: Engine, wanted: str, *, mirror: str, say: Say) -> Base:
    """The base by an image's name or id, pulled where it is absent; ``debootstrap[:SUITE]`` makes one. Raises ImageError."""
    kind, _, suite = wanted.partition(":")
    if kind == DEBOOTSTRAP:
        name, identifier = _debian(engine, suite or SUITE, mirror=mirror, say=say)
    else:
        name, identifier = wanted, engine.id_of(wanted)
        if not identifier:
            say(f"base {wanted}: not on this engine, pulling it")
            try:
                identifier = engine.pull(wanted)
            except ImageError as exc:
                hint = "load it first, or make one here with --base debootstrap"
                raise ImageError(f"base {wanted}: not on this engine, and it can't be pulled: {exc}", hint=hint) from exc
    return Base(name, identifier, _python_of(engine, name, identifier))


def _python_of(engine: Engine, name: str, identifier: str) -> Python:
    """The base's interpreter; raises ImageError where our wheels could not run on it."""
    hint = "a base needs python3, 3.11 or newer, in its PATH"
    try:
        status, text = engine.run(identifier, ["python3", "-I", "-c", _ASK])
    except ImageError as exc:
        raise ImageError(f"base {name}: python3 can't be started: {exc}", hint=hint) from exc
    try:
        python = msgspec.json.decode(text, type=Python)
        version = tuple(int(part) for part in python.version.rstrip("+").split(".")[:2])
    except (msgspec.DecodeError, ValueError) as exc:
        raise ImageError(f"base {name}: python3 ended with status {status}: {text.strip()[-300:]}", hint=hint) from exc
    if version < OLDEST_PYTHON or python.implementation != "cpython":
        raise ImageError(f"base {name}: has {python.implementation} {python.version}", hint=hint)
    if python.libc != "glibc":
        raise ImageError(f"base {name}: its C library is not glibc, and ONNX Runtime has wheels for glibc alone", hint="take a Debian base")
    if python.machine != os.uname().machine:
        raise ImageError(f"base {name}: is for {python.machine}, and this machine is {os.uname().machine}", hint="build on one like it")
    return python


def _debian(engine: Engine, suite: str, *, mirror: str, say: Say) -> tuple[str, str]:
    """A Debian with python3 and nothing else that was asked for: its name and id. Made once, then found again by its tag."""
    if not suite.isascii() or not suite.replace("-", "").isalnum() or suite.startswith("-"):
        raise ImageError(f"--base: {suite[:40]!r} is not the name of a Debian suite, such as {SUITE}")
    if mirror and not mirror.startswith(("http://", "https://", "file:///")):
        raise ImageError(f"--mirror: {mirror[:80]!r} is not an address that begins with http://, https:// or file:///")
    recipe = hashlib.sha256(repr((suite, mirror, _INCLUDE, _LEFT_OUT)).encode()).hexdigest()[:12]
    name = f"{REPOSITORY}:{suite}-{recipe}"
    identifier = engine.id_of(name)
    if identifier:
        say(f"base {name}: made before")
        return name, identifier
    program = shutil.which(DEBOOTSTRAP, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if program is None:
        raise ImageError("debootstrap is not installed", hint="'apt-get install debootstrap', or give --base an image with python3")
    if os.geteuid() != 0:
        raise ImageError("debootstrap needs root", hint="run this as root, or give --base an image with python3")
    with tempfile.TemporaryDirectory(prefix="skerry-base-") as scratch:
        root, archive = Path(scratch) / "root", Path(scratch) / "root.tar"
        say(f"base {name}: debootstrap {suite}, a minute or two")
        command = [program, "--variant=minbase", f"--include={_INCLUDE}", suite, str(root), *([mirror] if mirror else [])]
        _run(command, "debootstrap", timeout_s=DEBOOTSTRAP_TIMEOUT_S)
        say(f"base {name}: importing it")
        _pack(root, archive)
        return name, engine.import_base(archive, repository=REPOSITORY, tag=name.partition(":")[2], labels={"skerry.recipe": recipe})


def _released_at(root: Path) -> int:
    """When the suite was released, seconds since 1970: no file of the base is given a later time, so that its bytes do not tell when
    or where it was made."""
    for release in sorted((root / "var/lib/apt/lists").glob("*_Release")):
        for line in release.read_text(errors="replace").splitlines():
            if line.startswith("Date: "):
                return int(parsedate_to_datetime(line.removeprefix("Date: ").replace("UTC", "+0000")).timestamp())
    return int(datetime(2020, 1, 1, tzinfo=UTC).timestamp())


def _pack(root: Path, archive: Path) -> None:
    """The root as an archive: sorted, owners by number, nothing newer than the release."""
    released_at = _released_at(root)
    command = ["tar", "--create", "--file", str(archive), "--directory", str(root), "--sort=name", "--numeric-owner"]
    command += [
        f"--mtime=@{released_at}",
        "--clamp-mtime",
        "--format=gnu",
        "--anchored",
        *(f"--exclude=./{path}" for path in _LEFT_OUT),
        ".",
    ]
    _run(command, "tar", timeout_s=300)


def _run(command: list[str], name: str, *, timeout_s: int) -> None:
    """Run a program to its end; raises ImageError with the last of what it wrote."""
    environment = {
        "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin",
        "LC_ALL": "C.UTF-8",
        "DEBIAN_FRONTEND": "noninteractive",
    }
    environment |= {key: value for key, value in os.environ.items() if key.lower().endswith("_proxy")}
    try:
        done = subprocess.run(  # noqa: S603 - a list, no shell
            command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False, env=environment
        )
    except subprocess.TimeoutExpired as exc:
        raise ImageError(f"{name} took more than {timeout_s} s") from exc
    if done.returncode != 0:
        said = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip() and not line.startswith("I: ")]
        raise ImageError(f"{name} failed: {'; '.join(said[-3:])[:500] or f'exit status {done.returncode}'}")
