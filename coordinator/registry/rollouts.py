"""How each deployment's last change spreads or spread, and which changes were no good."""

import hashlib
from typing import Any

import msgspec
from sqlite_utils import Database as Tables

from coordinator.core.deployment import Deployment
from coordinator.core.rollout import Standing, State
from skerry.wire import codec


class Version(msgspec.Struct, frozen=True):
    """A deployment as it stood at one generation."""

    generation: int
    text: str
    spec: Deployment


class Rollout(msgspec.Struct, frozen=True):
    """From ``before`` to ``after``. ``planned`` is the stage that the last plan took into account."""

    deployment: str
    before: Version
    after: Version
    state: State
    planned: int
    changed_at_ms: int
    standing: Standing = Standing()


class Failed(msgspec.Struct, frozen=True):
    """A change that was taken back: when, and why."""

    at_ms: int
    reason: str


def _rollout(row: dict[str, Any]) -> Rollout:
    return codec.decode(row["rollout"].encode(), Rollout, max_bytes=codec.NO_LIMIT_BYTES)


def read_rollouts(tables: Tables) -> list[Rollout]:
    """Of every deployment that ever changed, by name."""
    return [_rollout(row) for row in tables.query("SELECT rollout FROM rollouts ORDER BY deployment")]


def read_active(tables: Tables) -> list[Rollout]:
    """Those that are not over."""
    return [_rollout(row) for row in tables.query("SELECT rollout FROM rollouts WHERE is_over = 0 ORDER BY deployment")]


def read_rollout(tables: Tables, deployment: str) -> Rollout | None:
    """Of one deployment."""
    return next((_rollout(row) for row in tables.query("SELECT rollout FROM rollouts WHERE deployment = ?", [deployment])), None)


def save_rollout(tables: Tables, rollout: Rollout) -> None:
    """Keep it, in the place of an earlier one."""
    tables.execute(
        "INSERT OR REPLACE INTO rollouts (deployment, is_over, rollout) VALUES (?, ?, ?)",
        [rollout.deployment, int(rollout.state.is_over), codec.encode(rollout).decode()],
    )


def forget_rollout(tables: Tables, deployment: str) -> None:
    """The deployment is deleted, or changes at once."""
    tables.execute("DELETE FROM rollouts WHERE deployment = ?", [deployment])


def note_failed(tables: Tables, deployment: str, text: str, failed: Failed) -> None:
    """Remember a change that was no good."""
    tables.execute("INSERT OR REPLACE INTO failed_changes VALUES (?, ?, ?, ?)", [deployment, _digest(text), failed.at_ms, failed.reason])


def read_failed(tables: Tables, deployment: str, text: str) -> Failed | None:
    """Whether this very text was tried before and was no good."""
    rows = tables.query("SELECT at_ms, reason FROM failed_changes WHERE deployment = ? AND text_sha256 = ?", [deployment, _digest(text)])
    return next((Failed(row["at_ms"], row["reason"]) for row in rows), None)


def forget_failed(tables: Tables, deployment: str, text: str) -> None:
    """It is to be tried again."""
    tables.execute("DELETE FROM failed_changes WHERE deployment = ? AND text_sha256 = ?", [deployment, _digest(text)])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
