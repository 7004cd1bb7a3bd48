"""Releases of the box software that were pushed, and how the last one spreads over the fleet."""

from collections.abc import Mapping
from typing import Any

import msgspec
from sqlite_utils import Database as Tables

from coordinator.core.software import Build, Release, Spread
from coordinator.registry.models import Exists
from skerry.wire import codec
from skerry.wire.bundle import Bundle


def _release(row: dict[str, Any]) -> Release:
    signature = msgspec.json.decode(row["signature"], type=Bundle) if row["signature"] else None
    return Release(row["version"], row["python"], row["machine"], row["sha256"], row["size_bytes"], row["pushed_at_ms"], signature)


def read_releases(tables: Tables) -> list[Release]:
    """Every build, the newest last."""
    return [_release(row) for row in tables.query("SELECT * FROM releases ORDER BY pushed_at_ms, version, python, machine")]


def by_build(tables: Tables) -> Mapping[Build, Release]:
    """The same, by what they are for."""
    return {release.build: release for release in read_releases(tables)}


def save_release(tables: Tables, release: Release) -> bool:
    """Add a build, or its signature; says whether that is news. Raises Exists where the build has other bytes."""
    held = by_build(tables).get(release.build)
    if held is not None and held.sha256 != release.sha256:
        name = f"{release.version} for Python {release.python} on {release.machine}"
        raise Exists(f"release {name} is in the store already, with digest {held.sha256}; give the other one another version")
    if held is not None and (release.signature is None or held.signature == release.signature):
        return False
    signature = msgspec.json.encode(release.signature).decode() if release.signature is not None else ""
    pushed_at_ms = held.pushed_at_ms if held is not None else release.pushed_at_ms
    row = [*release.build, release.sha256, release.size_bytes, signature, pushed_at_ms]
    tables.execute("INSERT OR REPLACE INTO releases VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    return True


def remove_release(tables: Tables, version: str) -> list[str]:
    """Forget every build of a version; returns their digests."""
    digests = [release.sha256 for release in read_releases(tables) if release.version == version]
    tables.execute("DELETE FROM releases WHERE version = ?", [version])
    return digests


def _spread(row: dict[str, Any]) -> Spread:
    return codec.decode(row["spread"].encode(), Spread, max_bytes=codec.NO_LIMIT_BYTES)


def read_spread(tables: Tables) -> Spread | None:
    """The last one."""
    return next((_spread(row) for row in tables.query("SELECT spread FROM spreads ORDER BY number DESC LIMIT 1")), None)


def read_failed_spread(tables: Tables, version: str) -> Spread | None:
    """The last one of a version, where it was no good."""
    rows = tables.query("SELECT spread FROM spreads WHERE version = ? ORDER BY number DESC LIMIT 1", [version])
    found = next((_spread(row) for row in rows), None)
    return found if found is not None and found.state.phase == "failed" else None


def count_spreads(tables: Tables, version: str) -> int:
    """How often a version began to spread."""
    return int(next(iter(tables.query("SELECT count(*) AS n FROM spreads WHERE version = ?", [version])))["n"])


def add_spread(tables: Tables, spread: Spread) -> None:
    """One that begins; it takes the place of the one before."""
    tables.execute("INSERT INTO spreads (version, spread) VALUES (?, ?)", [spread.version, codec.encode(spread).decode()])


def save_spread(tables: Tables, spread: Spread) -> None:
    """How the last one is now."""
    tables.execute("UPDATE spreads SET spread = ? WHERE number = (SELECT max(number) FROM spreads)", [codec.encode(spread).decode()])
