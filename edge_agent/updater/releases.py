"""Releases on the disk: ``root/VERSION``, and the links ``current``, ``previous`` and ``proven``, which change by a rename."""

import asyncio
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from edge_agent.updater.config import Config
from edge_agent.updater.ports import GATEWAY, PROGRAMS, NotPrepared
from skerry.release import unpack
from skerry.runtime import durable, log
from skerry.wire import model_signature
from skerry.wire.messages import Software

logger = log.get("updater.releases")

CHUNK_BYTES = 1 << 20
GROWS = 5
"""A release takes so many times its size, its archive included, while it is unpacked."""
TRY_WITHIN_S = 120.0
DATA_PLANE = ("edge_agent/gateway", "edge_agent/core", "skerry/wire", "skerry/runtime", "edge_agent/__init__.py")
"""What the gateway's program is made of, of ours. ``skerry/__init__.py`` is not: it is the version's number."""
UNITS = "share/skerry/systemd"
SELF_TEST = "from edge_agent.worker import ahead; ahead.prepare()"


class ReleasesOnDisk:
    """See ports.Releases."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._root = config.root

    def current(self) -> str:
        """See Releases."""
        return self._target("current")

    def _target(self, link: str) -> str:
        try:
            return (self._root / link).readlink().name
        except OSError:
            return ""

    # -- a new one

    async def prepare(self, software: Software, path: Path) -> None:
        """See Releases."""
        await asyncio.to_thread(self._prepare, software, path)

    def _prepare(self, software: Software, path: Path) -> None:
        folder = self._root / software.version
        try:
            if software.sha256:
                self._unpack(software, path)
            elif not (folder / unpack.COMPLETE).exists():
                raise NotPrepared(f"{software.version} is not on this box any more")
            self._try(folder)
        except (OSError, unpack.NotUnpacked) as exc:
            raise NotPrepared(str(exc)) from exc

    def _check_signature(self, software: Software) -> None:
        file = self._config.release_keys_file
        if file is None:
            raise NotPrepared("release_keys_file: is not named in updater.toml, so nobody is trusted to vouch for a release")
        try:
            keys = model_signature.parse_keys(file.read_bytes())
        except ValueError as exc:
            raise NotPrepared(f"release_keys_file: {file}: {exc}") from exc
        path = model_signature.release_path(software.version)
        try:
            model_signature.verify_file(software.signature, keys, path=path, sha256=software.sha256)
        except model_signature.NotVouched as exc:
            raise NotPrepared(f"release {software.version}: {exc}") from exc

    def _unpack(self, software: Software, path: Path) -> None:
        self._check_signature(software)
        for left_over in self._root.glob(".update-*.tar"):
            left_over.unlink()
        if (self._root / software.version / unpack.COMPLETE).exists():
            return
        free, needed = shutil.disk_usage(self._root).free, GROWS * software.size_bytes + self._config.reserve_bytes
        if free < needed:
            raise NotPrepared(f"{needed} bytes are needed below {self._root}, and {free} are free")
        # A copy that is root's: where it lies now another program could change it between the look at its digest and its use.
        own = self._root / f".update-{software.sha256}.tar"
        try:
            self._copy(path, own, software)
            with tarfile.open(own, "r:") as archive:
                version = unpack.read_manifest(archive)["version"]
            if version != software.version:
                raise NotPrepared(f"release {software.version}: its manifest says {version}")
            unpack.unpack(own, self._root, python=_python(), say=lambda line: logger.info("unpacking", step=line))
        except tarfile.TarError as exc:
            raise NotPrepared(f"release {software.version}: {exc}") from exc
        finally:
            own.unlink(missing_ok=True)

    def _copy(self, source: Path, target: Path, software: Software) -> None:
        digest, size = hashlib.sha256(), 0
        descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as reader, target.open("xb") as writer:
            while chunk := reader.read(CHUNK_BYTES):
                size += len(chunk)
                if size > software.size_bytes:
                    break
                digest.update(chunk)
                writer.write(chunk)
        if (size, digest.hexdigest()) != (software.size_bytes, software.sha256):
            raise NotPrepared(f"release {software.version}: the bytes here are not those that were signed")

    def _try(self, folder: Path) -> None:
        """Its programs must understand the settings that are there, and its worker compute. Raises NotPrepared."""
        for program in (*PROGRAMS, "skerry-updater"):
            settings = self._config.settings_dir / f"{program.removeprefix('skerry-')}.toml"
            self._run(f"{program} with {settings}", folder / "bin" / program, "--check", "--config", settings)
        self._run("the worker", folder / "bin/python", "-I", "-c", SELF_TEST)

    @staticmethod
    def _run(what: str, *words: Path | str) -> None:
        environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/nonexistent"}
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=TRY_WITHIN_S, check=False, env=environment)  # noqa: S603 - a list, no shell
        except subprocess.TimeoutExpired as exc:
            raise NotPrepared(f"self-test: {what}: did not end within {TRY_WITHIN_S:.0f} s") from exc
        if done.returncode:
            raise NotPrepared(f"self-test: {what}: exit status {done.returncode}: {(done.stderr or done.stdout).strip()[-400:]}")

    # -- one instead of the other

    def changed(self, before: str, after: str) -> list[str]:
        """See Releases."""
        old, new = self._root / before, self._root / after
        is_same = _data_plane(old) == _data_plane(new) and _unit(old, GATEWAY) == _unit(new, GATEWAY)
        return [program for program in PROGRAMS if program != GATEWAY or not is_same]

    def point(self, version: str, *, before: str) -> None:
        """See Releases."""
        self._give_units(self.current(), version)
        if before != version:
            self._link("previous", before)
        self._link("current", version)

    def prove(self, version: str) -> None:
        """See Releases."""
        self._link("proven", version)

    def _link(self, name: str, version: str) -> None:
        if self._target(name) == version:
            return
        staging = self._root / f".{name}.new"
        staging.unlink(missing_ok=True)
        staging.symlink_to(version)
        staging.rename(self._root / name)
        durable.sync_directory(self._root)

    def _give_units(self, before: str, after: str) -> None:
        """Unit files that are there as the one release brought them become the other's. What somebody changed is left as it is, and a
        unit that is not installed is not installed now."""
        old, new = self._root / before / UNITS, self._root / after / UNITS
        for path in _files(new):
            name = path.relative_to(new)
            installed = self._config.units_dir / name
            content, now, was = path.read_bytes(), _read(installed), _read(old / name)
            if now is not None and now == was and now != content:
                durable.write(installed, content, mode=0o644)


def _python() -> str:
    """The interpreter that this release's own environment was made with."""
    return str(Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _unit(folder: Path, program: str) -> bytes | None:
    return _read(folder / UNITS / f"{program}.service")


def _data_plane(folder: Path) -> str:
    """What the gateway runs, as a digest: the names and versions of all libraries, and what of ours it is made of."""
    digest = hashlib.sha256()
    for packages in sorted(folder.glob("lib/python3*/site-packages")):
        names = sorted(path.name for path in packages.glob("*.dist-info"))
        digest.update("\n".join(name for name in names if not name.startswith("skerry-")).encode())
        for part in DATA_PLANE:
            place = packages / part
            for path in _files(place) if place.is_dir() else [place]:
                if path.suffix == ".py":
                    digest.update(f"{path.relative_to(packages)}\0".encode() + hashlib.sha256(_read(path) or b"").digest())
    return digest.hexdigest()
