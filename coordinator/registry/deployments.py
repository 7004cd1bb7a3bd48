"""Deployments as their owners wrote them, and what the planner made of them."""

from typing import Any

import msgspec
from sqlite_utils import Database as Tables

from coordinator.core.deployment import Deployment
from coordinator.core.planner import Outcome
from skerry.wire import codec


class Stored(msgspec.Struct, frozen=True):
    """A deployment's text, what it was found to say when it came, and when that was."""

    name: str
    generation: int
    text: str
    spec: Deployment
    created_at_ms: int
    changed_at_ms: int


def _stored(row: dict[str, Any]) -> Stored:
    spec = codec.decode(row["spec"].encode(), Deployment, max_bytes=codec.NO_LIMIT_BYTES)
    return msgspec.convert({**{key: row[key] for key in Stored.__struct_fields__}, "spec": spec}, Stored)


def read_deployments(tables: Tables) -> list[Stored]:
    """Every deployment, oldest first."""
    return [_stored(row) for row in tables.query("SELECT * FROM deployments ORDER BY created_at_ms, name")]


def read_deployment(tables: Tables, name: str) -> Stored | None:
    """One deployment."""
    return next((_stored(row) for row in tables.query("SELECT * FROM deployments WHERE name = ?", [name])), None)


def save_deployment(tables: Tables, spec: Deployment, text: str, now_ms: int) -> int:
    """Keep a deployment; returns its generation, which moves only when the text does, and never back, not even after a deletion.

    What the text is found to say is kept anew all the same: an earlier version may have passed over some of it.
    """
    name = spec.name
    row = next(tables.query("SELECT generation, text FROM deployments WHERE name = ?", [name]), None)
    if row is not None and row["text"] == text:
        tables.execute("UPDATE deployments SET spec = ? WHERE name = ?", [codec.encode(spec).decode(), name])
        generation: int = row["generation"]
        return generation
    last = next(tables.query("SELECT last FROM generations WHERE name = ?", [name]), {"last": 0})["last"]
    tables.execute("INSERT OR REPLACE INTO generations VALUES (?, ?)", [name, last + 1])
    tables.execute(
        "INSERT INTO deployments VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET "
        "generation = excluded.generation, text = excluded.text, spec = excluded.spec, changed_at_ms = excluded.changed_at_ms",
        [name, last + 1, text, codec.encode(spec).decode(), now_ms, now_ms],
    )
    return int(last) + 1


def read_text(tables: Tables, name: str) -> str:
    """A deployment as its owner wrote it; "" where there is none."""
    return next((row["text"] for row in tables.query("SELECT text FROM deployments WHERE name = ?", [name])), "")


def delete_deployment(tables: Tables, name: str) -> bool:
    """Forget a deployment; says whether there was one."""
    tables.execute("DELETE FROM outcomes WHERE deployment = ?", [name])
    return bool(tables.execute("DELETE FROM deployments WHERE name = ?", [name]).rowcount)


def read_outcomes(tables: Tables) -> dict[str, Outcome]:
    """The planner's word on each deployment."""
    return {row["deployment"]: msgspec.json.decode(row["outcome"], type=Outcome) for row in tables.query("SELECT * FROM outcomes")}


def read_outcome(tables: Tables, name: str) -> Outcome | None:
    """The planner's word on one."""
    rows = tables.query("SELECT outcome FROM outcomes WHERE deployment = ?", [name])
    return next((msgspec.json.decode(row["outcome"], type=Outcome) for row in rows), None)


def save_outcomes(tables: Tables, outcomes: dict[str, Outcome]) -> None:
    """Replace the planner's word on every deployment."""
    tables.execute("DELETE FROM outcomes")
    for name, outcome in outcomes.items():
        tables.execute("INSERT INTO outcomes VALUES (?, ?)", [name, msgspec.json.encode(outcome).decode()])
