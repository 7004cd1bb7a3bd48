"""Boxes by what people look for, a page at a time: SQLite finds them, and no other box is read."""

from typing import Any

from sqlite_utils import Database as Tables

from coordinator.core.search import Search
from skerry.wire import codec
from skerry.wire.api import NodeState
from skerry.wire.messages import SoftwareReport

OUT = "n.id IN (SELECT node FROM enrolled WHERE revoked_at_ms > 0)"
STATES: dict[NodeState, str] = {
    "online": f"n.online = 1 AND NOT {OUT}",
    "new": f"n.online = 0 AND n.has_birth = 0 AND NOT {OUT}",
    "offline": f"n.online = 0 AND n.has_birth = 1 AND n.said_goodbye = 1 AND NOT {OUT}",
    "lost": f"n.online = 0 AND n.has_birth = 1 AND n.said_goodbye = 0 AND n.is_lost = 1 AND NOT {OUT}",
    "unknown": f"n.online = 0 AND n.has_birth = 1 AND n.said_goodbye = 0 AND n.is_lost = 0 AND NOT {OUT}",
    "revoked": OUT,
}
"""As coordinator/views.py tells them."""
RUNS = "SELECT t.node FROM told t JOIN models m ON m.sha256 = t.sha256"


def _literally(text: str) -> str:
    """For LIKE, which would take some of it for a pattern."""
    return "".join(rf"\{one}" if one in r"\%_" else one for one in text)


def where(search: Search) -> tuple[str, list[Any]]:
    """A condition on ``nodes n``, and its values; nothing that was typed stands in the text itself."""
    found: list[tuple[str, list[Any]]] = [("1", [])]
    found += [(r"n.id LIKE ? ESCAPE '\'", [f"%{_literally(part)}%"]) for part in search.names]
    for key, pattern in search.labels.items():
        found.append(("n.id IN (SELECT node FROM node_labels WHERE key = ? AND value GLOB ?)", [key, pattern]))
    if search.deployment:
        found.append(("n.id IN (SELECT node FROM told WHERE deployment GLOB ?)", [search.deployment]))
    if search.model:
        name, _, version = search.model.partition(":")
        found.append((f"n.id IN ({RUNS} WHERE m.name GLOB ? AND (? = '' OR m.version = CAST(? AS INTEGER)))", [name, version, version]))
    if search.version:
        found.append(("n.version GLOB ?", [search.version]))
    if search.tier:
        found.append(("coalesce((SELECT tier FROM enrolled WHERE node = n.id), n.own_tier) = ?", [search.tier]))
    found += [(STATES[state], []) for state in STATES if state == search.state]
    return " AND ".join(f"({text})" for text, _ in found), [value for _, values in found for value in values]


def find(tables: Tables, search: Search, *, after: str = "", limit: int | None = None) -> list[str]:
    """Names in order, those behind ``after``."""
    condition, values = where(search)
    query = f"SELECT n.id FROM nodes n WHERE n.id > ? AND {condition} ORDER BY n.id LIMIT ?"  # noqa: S608 - constants
    return [row["id"] for row in tables.query(query, [after, *values, -1 if limit is None else limit])]


def count_by_state(tables: Tables) -> dict[NodeState, int]:
    """Of the whole fleet, in the order in which they need a look."""
    order: tuple[NodeState, ...] = ("lost", "unknown", "new", "offline", "online", "revoked")
    return {state: _count(tables, STATES[state], []) for state in order}


def count(tables: Tables, search: Search) -> int:
    """How many there are in all."""
    return _count(tables, *where(search))


def count_by_version(tables: Tables) -> dict[str, int]:
    """Of the boxes that said what they run, and were not thrown out."""
    rows = tables.query(f"SELECT version, count(*) AS n FROM nodes n WHERE version IS NOT NULL AND NOT {OUT} GROUP BY version")  # noqa: S608 - constants
    return {row["version"]: row["n"] for row in rows}


def read_troubled(tables: Tables, *, most: int) -> list[tuple[str, SoftwareReport]]:
    """Boxes whose last change of their own programs failed, by name, and what they say of it."""
    rows = tables.query(
        "SELECT id, json_extract(reported, '$.software') AS said FROM nodes n WHERE json_extract(reported, '$.software.phase') = 'failed'"  # noqa: S608 - constants
        f" AND birth IS NOT NULL AND NOT {OUT} ORDER BY id LIMIT ?",
        [most],
    )
    return [(row["id"], codec.decode(row["said"].encode(), SoftwareReport)) for row in rows]


def _count(tables: Tables, condition: str, values: list[Any]) -> int:
    return int(next(iter(tables.query(f"SELECT count(*) AS n FROM nodes n WHERE {condition}", values)))["n"])  # noqa: S608 - constants
