"""What a backup holds, how it is made while the coordinator runs, and how a state directory is made of one.

The registry is copied by SQLite's own backup, which is consistent whatever is written meanwhile; all else is whole files that are replaced
whole. What a backup must not bring back is ended when it is restored: sessions of browsers and claims that were open.
"""

import io
import os
import secrets
import shutil
import sqlite3
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import cast

import msgspec
from sqlite_utils import Database as Tables

from coordinator.backup.sealed import Opening, SealBroken, Sealing
from coordinator.registry import audit, events
from coordinator.registry.migrations import STEPS
from skerry import __version__
from skerry.runtime import durable
from skerry.wire import codec

MANIFEST = "manifest.json"
REGISTRY = "registry.db"
KEPT = ("operator.token", "box.token", "signing.pem", "signing.json")
FOLDERS = ("ca",)
SIGNER = "signer"
SETTINGS = (".toml", ".pub")
"""Endings of files beside the state that are no part of it."""
MOST_MANIFEST_BYTES = 64 * 1024


class BackupFailed(Exception):
    """No backup was made, or nothing was restored; the text says why."""


class Manifest(msgspec.Struct, frozen=True):
    """Stands first."""

    fleet: str
    made_at_ms: int
    version: str
    registry_version: int
    with_models: bool
    with_signer: bool


Progress = Callable[[str, int], None]
"""Told each file's name and its bytes."""


def make(
    target: Path, passphrase: bytes, *, fleet: str, state_dir: Path, signer_dir: Path | None, with_models: bool, progress: Progress
) -> Manifest:
    """Write a backup; the file is there whole, or not at all. Raises BackupFailed."""
    staging = target.with_name(f".{target.name}.{os.getpid()}.new")
    copy = staging.with_suffix(".db")
    try:
        _copy_registry(state_dir / REGISTRY, copy)
        files = dict(_files(state_dir, signer_dir, with_models=with_models))
        has_signer = any(name in files for name in ("signing.pem", f"{SIGNER}/signing.pem"))
        manifest = Manifest(fleet, time.time_ns() // 10**6, __version__, len(STEPS), with_models, has_signer)
        with os.fdopen(os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            sealing = Sealing(file, passphrase)
            with tarfile.open(fileobj=cast("io.BytesIO", sealing), mode="w|") as tar:
                _add_bytes(tar, MANIFEST, codec.encode(manifest))
                for name, path in {REGISTRY: copy, **files}.items():
                    progress(name, path.stat().st_size)
                    tar.add(path, name, recursive=False, filter=_anonymous)
            sealing.close()
            file.flush()
            os.fsync(file.fileno())
        staging.rename(target)
        durable.sync_directory(target.absolute().parent)
    except (OSError, sqlite3.Error, tarfile.TarError) as exc:
        raise BackupFailed(f"{target}: {exc}") from exc
    finally:
        for path in (staging, copy):
            path.unlink(missing_ok=True)
    return manifest


def _copy_registry(path: Path, copy: Path) -> None:
    if not path.exists():
        raise BackupFailed(f"{path}: there is no registry")
    os.close(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    source, target = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30), sqlite3.connect(copy)
    try:
        source.backup(target)
        target.execute("PRAGMA journal_mode = DELETE")
    finally:
        source.close()
        target.close()


def _files(state_dir: Path, signer_dir: Path | None, *, with_models: bool) -> Iterator[tuple[str, Path]]:
    """By name in the backup."""
    folders = [*FOLDERS, *(["models"] if with_models else [])]
    for name in KEPT:
        if (state_dir / name).is_file():
            yield name, state_dir / name
    for folder in folders:
        for path in sorted((state_dir / folder).glob("*")):
            if path.is_file() and not path.is_symlink() and not path.name.startswith("."):
                yield f"{folder}/{path.name}", path
    for name in ("signing.pem", "signing.json"):
        if signer_dir is not None and (signer_dir / name).is_file():
            yield f"{SIGNER}/{name}", signer_dir / name


def _add_bytes(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o600
    tar.addfile(member, io.BytesIO(content))


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def restore(source: Path, passphrase: bytes, *, fleet: str, state_dir: Path, signer_dir: Path | None, progress: Progress) -> Manifest:
    """Make a state directory of a backup; one that is there is kept beside it, under another name. Raises BackupFailed.

    All is unpacked and looked at before anything that is there is touched.
    """
    staging = state_dir.with_name(f".{state_dir.name}.{secrets.token_hex(4)}.restoring")
    try:
        staging.mkdir(mode=0o700, parents=True)
        with source.open("rb") as file:
            opening = Opening(file, passphrase)
            with tarfile.open(fileobj=cast("io.BytesIO", opening), mode="r|") as tar:
                manifest = _unpack(tar, staging, fleet, progress)
        _end_what_was_open(staging / REGISTRY, manifest)
        if (staging / SIGNER).exists():
            if signer_dir is None:
                raise BackupFailed("it holds the signer's key: say where with --signer-dir")
            _switch(staging / SIGNER, signer_dir)
        _switch(staging, state_dir)
    except SealBroken as exc:
        raise BackupFailed(f"{source}: {exc}") from exc
    except (OSError, sqlite3.Error, tarfile.TarError) as exc:
        raise BackupFailed(f"{source}: {exc}") from exc
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def _unpack(tar: tarfile.TarFile, folder: Path, fleet: str, progress: Progress) -> Manifest:
    manifest: Manifest | None = None
    for member in tar:
        path = PurePosixPath(member.name)
        if not member.isreg() or len(path.parts) > 2 or ".." in path.parts or path.is_absolute():
            raise BackupFailed(f"it holds {member.name[:80]!r}, which no backup does")
        content = tar.extractfile(member)
        assert content is not None  # noqa: S101 - a regular file
        if manifest is None:
            manifest = _manifest(member.name, content.read(MOST_MANIFEST_BYTES), fleet)
            continue
        progress(member.name, member.size)
        target = folder / member.name
        target.parent.mkdir(mode=0o700, exist_ok=True)
        with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, member.mode & 0o755), "wb") as file:
            shutil.copyfileobj(content, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
    if manifest is None or not (folder / REGISTRY).exists():
        raise BackupFailed("it holds no registry")
    return manifest


def _manifest(name: str, content: bytes, fleet: str) -> Manifest:
    try:
        manifest = codec.decode(content, Manifest) if name == MANIFEST else None
    except codec.Malformed as exc:
        raise BackupFailed(f"its first file can't be read: {exc}") from exc
    if manifest is None:
        raise BackupFailed("it is no backup of a coordinator")
    if manifest.fleet != fleet:
        raise BackupFailed(f"it is of fleet {manifest.fleet[:80]!r}, and the settings are of {fleet!r}")
    if manifest.registry_version > len(STEPS):
        raise BackupFailed(f"it was made by version {manifest.version}, which is newer than this one: install that")
    return manifest


def _end_what_was_open(path: Path, manifest: Manifest) -> None:
    """What may have been used up, ended or withdrawn since must not be good again."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        if (damage := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise BackupFailed(f"its registry is damaged: {damage}")
        tables, now_ms = Tables(connection), time.time_ns() // 10**6
        connection.execute("BEGIN")
        if manifest.registry_version >= 5:
            connection.execute("DELETE FROM sessions")
            connection.execute("UPDATE claims SET expires_at_ms = min(expires_at_ms, ?) WHERE used_at_ms IS NULL", (now_ms,))
            made = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(manifest.made_at_ms / 1000))
            audit.append(
                tables, audit.Actor("root", "this machine"), "coordinator.restored", manifest.fleet, after=f"of {made}", now_ms=now_ms
            )
            events.add_own_event(tables, "", "coordinator.restored", manifest.fleet, f"from a backup of {made}", now_ms)
        connection.execute("COMMIT")
    finally:
        connection.close()


def _switch(made: Path, place: Path) -> None:
    """Put a folder where another may be, which is kept; as the same user's."""
    if place.exists():
        owner = place.stat()
        for path in place.iterdir():  # settings, where somebody keeps them there
            if path.is_file() and path.suffix in SETTINGS and not (made / path.name).exists():
                shutil.copy2(path, made / path.name)
        made.chmod(owner.st_mode & 0o7777)
        if os.geteuid() == 0:
            for path in [made, *made.rglob("*")]:
                os.chown(path, owner.st_uid, owner.st_gid)
        place.rename(place.with_name(f"{place.name}.before-{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(2)}"))
    place.parent.mkdir(parents=True, exist_ok=True)
    made.rename(place)
    durable.sync_directory(place.parent)
