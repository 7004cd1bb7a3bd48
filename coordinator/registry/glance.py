"""The whole fleet at a glance: sums and single letters, made by SQLite; no box's documents are read for them."""

from collections.abc import Sequence
from typing import Any

import msgspec
from sqlite_utils import Database as Tables

from coordinator.core.search import Search
from coordinator.registry.events import Stream
from coordinator.registry.finding import STATES, where
from coordinator.registry.measurements import MOST
from skerry.wire.api import SILENT
from skerry.wire.fleet import Cell

FAILED = "n.id IN (SELECT node FROM said WHERE phase = 'failed')"
BACKS_OFF = "n.id IN (SELECT node FROM said WHERE phase = 'backoff')"
REFUSES = "n.id IN (SELECT id FROM nodes WHERE refused != '')"
DRAINED = "n.id IN (SELECT node FROM drained)"
TOLD = "coalesce((SELECT d.generation FROM desired d WHERE d.node = n.id), 0)"
_CELLS: dict[Cell, str] = {
    "x": STATES["revoked"],
    "l": STATES["lost"],
    "s": STATES["unknown"],
    "g": STATES["offline"],
    "n": STATES["new"],
    "f": f"({REFUSES} OR {FAILED})",
    "t": BACKS_OFF,
    "d": DRAINED,
}
"""The first that holds counts; one for which none does is well."""
CELL = "CASE " + " ".join(f"WHEN {condition} THEN '{letter}'" for letter, condition in _CELLS.items()) + " ELSE 'o' END"
# As coordinator/console/verdict.py weighs them; a box may have more than one trouble, and counts by its worst.
WEIGHT = f"""CASE WHEN {STATES["revoked"]} THEN NULL WHEN {STATES["lost"]} OR n.said_generation > {TOLD} OR {REFUSES} OR {FAILED} THEN 0
    WHEN {STATES["unknown"]} OR {STATES["offline"]} OR {BACKS_OFF} THEN 1 WHEN n.online = 1 AND n.said_generation != {TOLD} THEN 2
    WHEN {DRAINED} THEN 3 ELSE NULL END"""


class Needy(msgspec.Struct, frozen=True):
    """Boxes that need a look, the worst first and so many at the most; ``urgent`` is how many there are in all, those apart that only
    settle or are drained."""

    names: list[str]
    urgent: int


def read_needy(tables: Tables, *, limit: int) -> Needy:
    """Those of the whole fleet."""
    rows = list(
        tables.query(
            "SELECT id, sum(weight < 2) OVER () AS urgent"  # noqa: S608 - constants
            f" FROM (SELECT n.id AS id, {WEIGHT} AS weight FROM nodes n) WHERE weight IS NOT NULL ORDER BY weight, id LIMIT ?",
            [limit],
        )
    )
    return Needy([row["id"] for row in rows], rows[0]["urgent"] if rows else 0)


class Cells(msgspec.Struct, frozen=True):
    """Boxes with one value of a label ("" for none): their names as a JSON array, and their letters, both in the order of names."""

    value: str
    names: bytes
    letters: str


def read_cells(tables: Tables, search: Search, by: str) -> list[Cells]:
    """The boxes that are looked for, by the value of their label ``by``."""
    condition, values = where(search)
    rows = tables.query(
        "SELECT value, json_group_array(id) AS names, group_concat(cell, '') AS letters FROM ("  # noqa: S608 - constants
        f"SELECT coalesce(l.value, '') AS value, n.id AS id, {CELL} AS cell FROM nodes n"
        f" LEFT JOIN node_labels l ON l.node = n.id AND l.key = ? WHERE {condition} ORDER BY value, n.id) GROUP BY value ORDER BY value",
        [by, *values],
    )
    return [Cells(row["value"], row["names"].encode(), row["letters"]) for row in rows]


def read_label_keys(tables: Tables, *, most: int) -> list[str]:
    """By which boxes can be put together, those first that most boxes have."""
    rows = tables.query("SELECT key FROM node_labels GROUP BY key ORDER BY count(*) DESC, key LIMIT ?", [most])
    return [row["key"] for row in rows]


class Standing(msgspec.Struct, frozen=True):
    """A deployment: ``ready`` of ``wanted`` replicas run what was told last; ``unheard`` placements are on boxes that are silent now."""

    wanted: int
    ready: int
    unheard: int
    boxes: int
    problem: str


def read_standing(tables: Tables, deployment: str, *, by_box: bool) -> Standing | None:
    """How a deployment stands; ``by_box`` where each box has replicas of its own. None where it is not planned yet."""
    rows = tables.query(_STANDING, {"name": deployment, "by_box": int(by_box)})
    return next((msgspec.convert(row, Standing) for row in rows), None)


_SILENT = " OR ".join(f"({STATES[state]})" for state in SILENT)
_PLACED = """WITH placed AS MATERIALIZED (
    SELECT json_extract(p.value, '$.node') AS node, json_extract(p.value, '$.replica') AS replica,
        coalesce(json_extract(p.value, '$.is_lost'), 0) AS is_lost
    FROM outcomes o, json_each(o.outcome, '$.placements') p WHERE o.deployment = :name)"""
_STANDING = f"""{_PLACED} SELECT json_extract(outcome, '$.wanted') AS wanted, coalesce(json_extract(outcome, '$.problem'), '') AS problem,
    (SELECT count(DISTINCT p.replica || CASE WHEN :by_box THEN '/' || p.node ELSE '' END) FROM placed p
        JOIN told t ON t.deployment = :name AND t.node = p.node AND t.replica = p.replica
        JOIN said s ON s.deployment = :name AND s.node = p.node AND s.replica = p.replica
        WHERE NOT p.is_lost AND s.phase = 'ready' AND s.generation = t.generation AND s.sha256 = t.sha256) AS ready,
    (SELECT count(*) FROM placed p JOIN nodes n ON n.id = p.node WHERE {_SILENT}) AS unheard,
    (SELECT count(DISTINCT node) FROM placed) AS boxes
FROM outcomes WHERE deployment = :name"""  # noqa: S608 - constants
_WORST = f"""{_PLACED} SELECT p.node AS node, p.replica AS replica FROM placed p
    LEFT JOIN told t ON t.deployment = :name AND t.node = p.node AND t.replica = p.replica
    LEFT JOIN said s ON s.deployment = :name AND s.node = p.node AND s.replica = p.replica
    ORDER BY s.phase IS 'ready' AND s.generation IS t.generation AND s.sha256 IS t.sha256, p.node, p.replica LIMIT :most"""  # noqa: S608 - constants


def read_worst(tables: Tables, deployment: str, *, most: int) -> set[tuple[str, str]]:
    """Box and name of so many of its placements, those that do not run what they should before others."""
    return {(row["node"], row["replica"]) for row in tables.query(_WORST, {"name": deployment, "most": most})}


def read_running(tables: Tables, deployment: str) -> set[tuple[str, str]]:
    """Box and name of its replicas that are ready and what was last told."""
    rows = tables.conn.execute(
        "SELECT t.node, t.replica FROM told t JOIN said s USING (deployment, node, replica)"
        " WHERE t.deployment = ? AND s.phase = 'ready' AND s.generation = t.generation AND s.sha256 = t.sha256",
        [deployment],
    )
    return {(row[0], row[1]) for row in rows}


def read_silent(tables: Tables) -> set[str]:
    """Boxes of which nothing is heard now."""
    rows = tables.query(f"SELECT n.id AS id FROM nodes n WHERE {_SILENT}")  # noqa: S608 - constants
    return {row["id"] for row in rows}


class Streams(msgspec.Struct, frozen=True):
    """Numbers that boxes gave out: those that may still come, and those that never will."""

    missing: int
    lost: int


def read_streams(tables: Tables) -> dict[Stream, Streams]:
    """Of all boxes."""
    kinds: Sequence[Stream] = ("events", "samples")
    return {kind: Streams(_sum(tables, _MISSING, kind), _sum(tables, _LOST, kind)) for kind in kinds}


# total() and not sum(): numbers of a box in an enemy's hands add up to more than SQLite's whole numbers hold.
_MISSING = f"""SELECT CAST(min({MOST}, total(json_extract(g.value, '$[1]') - json_extract(g.value, '$[0]') + 1)) AS INTEGER) AS n
    FROM numberings, json_each(numbering, '$.gaps') g WHERE stream = ? AND json_array_length(numbering, '$.gaps') > 0"""  # noqa: S608 - constants
_LOST = f"SELECT CAST(min({MOST}, total(lost)) AS INTEGER) AS n FROM numberings WHERE stream = ?"  # noqa: S608 - constants


def _sum(tables: Tables, query: str, *values: Any) -> int:
    return int(next(iter(tables.query(query, values)))["n"])


def count_events(tables: Tables) -> int:
    """On record."""
    return _sum(tables, "SELECT count(*) AS n FROM events")
