"""Model versions that were pushed."""

from typing import Any

import msgspec
from sqlite_utils import Database as Tables

from skerry.wire.bundle import Bundle
from skerry.wire.messages import ModelRef, StateTensor, WarmupTensor


class Exists(Exception):
    """The version is there already, with other bytes: versions never change."""


class Model(msgspec.Struct, frozen=True):
    """A model version in the store."""

    ref: ModelRef
    pushed_at_ms: int
    signature: Bundle | None = None


def _model(row: dict[str, Any]) -> Model:
    warmup = msgspec.json.decode(row["warmup"], type=list[WarmupTensor])
    state = msgspec.json.decode(row["state"], type=list[StateTensor])
    signature = msgspec.json.decode(row["signature"], type=Bundle) if row["signature"] else None
    return Model(ModelRef(row["name"], row["version"], row["sha256"], row["size_bytes"], warmup, state), row["pushed_at_ms"], signature)


def read_models(tables: Tables) -> list[Model]:
    """Every version, by name and version."""
    return [_model(row) for row in tables.query("SELECT * FROM models ORDER BY name, version")]


def read_model(tables: Tables, name: str, version: int) -> Model | None:
    """One version."""
    return next((_model(row) for row in tables.query("SELECT * FROM models WHERE name = ? AND version = ?", [name, version])), None)


def save_model(tables: Tables, ref: ModelRef, now_ms: int) -> bool:
    """Add a version; says whether it is new. Raises Exists where the version has other bytes."""
    held = read_model(tables, ref.name, ref.version)
    if held is not None:
        if held.ref.sha256 != ref.sha256:
            raise Exists(f"{ref.name}:{ref.version} is in the store already, with digest {held.ref.sha256}; push it as another version")
        if held.ref == ref:
            return False
    tables["models"].upsert(  # type: ignore[union-attr]  # a table, not a view
        {
            "name": ref.name,
            "version": ref.version,
            "sha256": ref.sha256,
            "size_bytes": ref.size_bytes,
            "warmup": msgspec.json.encode(ref.warmup).decode(),
            "state": msgspec.json.encode(ref.state).decode(),
            "pushed_at_ms": now_ms,
        },
        pk=("name", "version"),
    )
    return held is None


def save_signature(tables: Tables, model: Model, signature: Bundle) -> bool:
    """Keep who vouches for a version; says whether that is news."""
    if model.signature == signature:
        return False
    text = msgspec.json.encode(signature).decode()
    tables["models"].update((model.ref.name, model.ref.version), {"signature": text})  # type: ignore[union-attr]  # a table
    return True
