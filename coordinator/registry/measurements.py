"""Measurements in buckets of a few seconds: who answered how fast, and how busy the boxes were."""

import functools
from collections.abc import Iterable

import msgspec
from sqlite_utils import Database as Tables

from skerry.wire import latency


class Served(msgspec.Struct, frozen=True):
    """One deployment's requests in one bucket that begins at ``at_s`` (Unix time); ``latency`` as in skerry.wire.latency."""

    deployment: str
    at_s: int
    node: str
    edge: int = 0
    peer: int = 0
    cloud: int = 0
    refused: int = 0
    failed: int = 0
    late: int = 0
    latency: dict[int, int] = {}
    compared: int = 0
    differed: int = 0

    @property
    def asked(self) -> int:
        """All requests; those that were late are among the answered ones."""
        return self.edge + self.peer + self.cloud + self.refused + self.failed


class BoxLoad(msgspec.Struct, frozen=True):
    """One box's readings in one bucket, averaged over ``samples``."""

    node: str
    at_s: int
    samples: int
    cpu_ratio: float
    memory_used_bytes: int
    gpu_ratio: float
    temperature_c: float = 0.0
    power_w: float = 0.0
    network_received_bytes_per_s: float = 0.0
    network_sent_bytes_per_s: float = 0.0
    link_rtt_ms: float = 0.0


LEVELS = (
    "cpu_ratio", "gpu_ratio", "temperature_c", "power_w", "network_received_bytes_per_s", "network_sent_bytes_per_s", "link_rtt_ms",
)  # fmt: skip
ALL = ""
"""Stands for all boxes together where a box's name would stand."""
MOST = 2**53
"""Sums stop here: a box in an enemy's hands must not make a number that SQLite can't hold."""
REQUESTS = ("edge", "peer", "cloud", "refused", "failed", "late")
COUNTS = (*REQUESTS, "compared", "differed")


def plus(a: Served, b: Served) -> Served:
    """The sum of two buckets, under the first one's name."""
    counts = {name: min(MOST, getattr(a, name) + getattr(b, name)) for name in COUNTS}
    merged = {bucket: min(MOST, count) for bucket, count in latency.merged([a.latency, b.latency]).items()}
    return msgspec.structs.replace(a, latency=merged, **counts)


def total(served: Iterable[Served]) -> Served:
    """The sum of any number of buckets, under no name."""
    return functools.reduce(plus, served, Served("", 0, ""))


def buckets(begin_s: int, width_s: int, rollup_s: int) -> range:
    """When the buckets begin that a reading of ``width_s`` lies in."""
    first = begin_s // rollup_s * rollup_s
    return range(first, max(first, (begin_s + width_s - 1) // rollup_s * rollup_s) + 1, rollup_s)


def spread(whole: Served, starts: range) -> list[Served]:
    """What was counted over a stretch of time, in equal parts of whole numbers that add up to it."""
    if len(starts) <= 1:
        return [msgspec.structs.replace(whole, at_s=at_s) for at_s in starts]
    parts = []
    for index, at_s in enumerate(starts):
        counts = {name: _part(getattr(whole, name), index, len(starts)) for name in COUNTS}
        histogram = {bucket: part for bucket, count in whole.latency.items() if (part := _part(count, index, len(starts)))}
        if histogram or any(counts.values()):
            parts.append(msgspec.structs.replace(whole, at_s=at_s, latency=histogram, **counts))
    return parts


def _part(count: int, index: int, parts: int) -> int:
    return count * (index + 1) // parts - count * index // parts


def add_served(tables: Tables, served: list[Served]) -> None:
    """Add to the buckets that are there: each box's, and the one of all boxes together, which is what is asked for most."""
    everywhere: dict[tuple[str, int], Served] = {}
    for one in served:
        key = (one.deployment, one.at_s)
        everywhere[key] = plus(everywhere[key], one) if key in everywhere else msgspec.structs.replace(one, node=ALL)
    for bucket in [*served, *everywhere.values()]:
        place = [bucket.deployment, bucket.at_s, bucket.node]
        row = next(tables.query("SELECT * FROM serve_rollups WHERE deployment = ? AND at_s = ? AND node = ?", place), None)
        total = bucket if row is None else plus(bucket, _served(row))
        tables.execute(
            f"INSERT OR REPLACE INTO serve_rollups (deployment, at_s, node, {', '.join(COUNTS)}, latency)"  # noqa: S608 - constants
            f" VALUES ({', '.join('?' * (len(place) + len(COUNTS) + 1))})",
            [*place, *(getattr(total, name) for name in COUNTS), msgspec.json.encode(total.latency).decode()],
        )


def add_loads(tables: Tables, loads: list[BoxLoad]) -> None:
    """Merge into the buckets that are there, weighted by their samples."""
    columns, marks = ", ".join(BoxLoad.__struct_fields__), ", ".join("?" * len(BoxLoad.__struct_fields__))
    for load in loads:
        row = next(tables.query("SELECT * FROM box_rollups WHERE node = ? AND at_s = ?", [load.node, load.at_s]), None)
        total = load if row is None else mean(load, msgspec.convert(row, BoxLoad))
        tables.execute(f"INSERT OR REPLACE INTO box_rollups ({columns}) VALUES ({marks})", list(msgspec.structs.astuple(total)))  # noqa: S608 - constants


def mean(a: BoxLoad, b: BoxLoad) -> BoxLoad:
    """Both together."""
    n = a.samples + b.samples
    levels = {name: (getattr(a, name) * a.samples + getattr(b, name) * b.samples) / n for name in LEVELS}
    memory = min(MOST, (a.memory_used_bytes * a.samples + b.memory_used_bytes * b.samples) // n)
    return msgspec.structs.replace(a, samples=n, memory_used_bytes=memory, **levels)


def _served(row: dict[str, object]) -> Served:
    return msgspec.convert({**row, "latency": msgspec.json.decode(str(row["latency"]), type=dict[int, int])}, Served)


def read_served(tables: Tables, *, since_s: int, deployment: str = "", node: str = "") -> list[Served]:
    """Buckets from ``since_s`` on, oldest first: of one box, or of all together; of one deployment, or of each."""
    conditions = ["at_s >= ?", "node = ?"]
    values: list[int | str] = [since_s, node or ALL]
    if deployment:
        conditions.append("deployment = ?")
        values.append(deployment)
    rows = tables.query(f"SELECT * FROM serve_rollups WHERE {' AND '.join(conditions)} ORDER BY at_s", values)  # noqa: S608 - constants
    return [_served(row) for row in rows]


def totals(tables: Tables, *, since_s: int) -> dict[str, Served]:
    """By deployment, what all boxes together were asked from ``since_s`` on; how fast is left out."""
    sums = ", ".join(f"CAST(min({MOST}, total({name})) AS INTEGER) AS {name}" for name in COUNTS)
    query = f"SELECT deployment, {sums} FROM serve_rollups WHERE node = ? AND at_s >= ? GROUP BY deployment"  # noqa: S608 - constants
    return {
        row["deployment"]: msgspec.convert({**row, "at_s": since_s, "node": ALL}, Served) for row in tables.query(query, [ALL, since_s])
    }


def read_flow(tables: Tables, *, since_s: int, by: str, deployment: str = "") -> list[tuple[str, int, int, int, int]]:
    """By the value of a label of the boxes that were asked ("" for none): requests that edge, peer and cloud answered, and those refused;
    the most first."""
    sums = ", ".join(f"CAST(min({MOST}, total(s.{name})) AS INTEGER) AS {name}" for name in ("edge", "peer", "cloud", "refused"))
    rows = tables.query(
        f"SELECT coalesce(l.value, '') AS value, {sums} FROM serve_rollups s LEFT JOIN node_labels l ON l.node = s.node AND l.key = ?"  # noqa: S608 - constants
        " WHERE s.node != ? AND s.at_s >= ? AND (? = '' OR s.deployment = ?) GROUP BY value"
        " ORDER BY total(s.edge) + total(s.peer) + total(s.cloud) + total(s.refused) DESC, value",
        [by, ALL, since_s, deployment, deployment],
    )
    return [(row["value"], row["edge"], row["peer"], row["cloud"], row["refused"]) for row in rows]


def read_served_by(tables: Tables, boxes: list[str], *, since_s: int, deployment: str = "") -> list[Served]:
    """Buckets of some boxes from ``since_s`` on, of one deployment or of each."""
    rows = tables.query(
        "SELECT * FROM serve_rollups WHERE node IN (SELECT value FROM json_each(?)) AND at_s >= ? AND (deployment = ? OR ? = '')",
        [msgspec.json.encode(boxes).decode(), since_s, deployment, deployment],
    )
    return [_served(row) for row in rows]


def read_asked(tables: Tables, deployment: str = "", *, since_s: int) -> dict[str, int]:
    """By box, how many requests it was asked from ``since_s`` on, for one deployment or in all."""
    rows = tables.query(
        "SELECT node, sum(edge + peer + cloud + refused + failed) AS n FROM serve_rollups WHERE (deployment = ? OR ? = '') AND at_s >= ?"
        " AND node != ? GROUP BY node",
        [deployment, deployment, since_s, ALL],
    )
    return {row["node"]: row["n"] for row in rows}


def read_most_asked(tables: Tables, deployment: str, *, since_s: int, limit: int) -> tuple[list[str], int]:
    """The boxes that had the most requests for a deployment from ``since_s`` on, and how many had any."""
    rows = list(
        tables.query(
            "SELECT node, count(*) OVER () AS boxes FROM (SELECT s.node AS node,"
            " total(s.edge + s.peer + s.cloud + s.refused + s.failed) AS n FROM nodes b CROSS JOIN serve_rollups s"
            " ON s.node = b.id AND s.at_s >= ? AND s.deployment = ? GROUP BY s.node HAVING n > 0) ORDER BY n DESC, node LIMIT ?",
            [since_s, deployment, limit],
        )
    )
    return [row["node"] for row in rows], rows[0]["boxes"] if rows else 0


def sum_up(tables: Tables, deployment: str, boxes: list[str], *, since_s: int, until_s: int) -> Served:
    """What these boxes, or ALL together, were asked for a deployment from ``since_s`` until ``until_s``."""
    where = "node IN (SELECT value FROM json_each(?)) AND at_s >= ? AND at_s < ? AND deployment = ?"
    values = [msgspec.json.encode(boxes).decode(), since_s, until_s, deployment]
    sums = ", ".join(f"CAST(min({MOST}, total({name})) AS INTEGER) AS {name}" for name in COUNTS)
    counts = next(iter(tables.query(f"SELECT {sums} FROM serve_rollups WHERE {where}", values)))  # noqa: S608 - constants
    histogram = tables.query(
        f"SELECT CAST(l.key AS INTEGER) AS bucket, CAST(min({MOST}, total(l.value)) AS INTEGER) AS n"  # noqa: S608 - constants
        f" FROM serve_rollups s, json_each(s.latency) l WHERE {where} GROUP BY bucket",
        values,
    )
    return Served(deployment, since_s, "", **counts, latency={row["bucket"]: row["n"] for row in histogram})


def read_loads(tables: Tables, node: str, *, since_s: int) -> list[BoxLoad]:
    """One box's buckets from ``since_s`` on, oldest first."""
    rows = tables.query("SELECT * FROM box_rollups WHERE node = ? AND at_s >= ? ORDER BY at_s", [node, since_s])
    return [msgspec.convert(row, BoxLoad) for row in rows]


def forget_before(tables: Tables, at_s: int) -> None:
    """Drop what is older."""
    tables.execute("DELETE FROM serve_rollups WHERE at_s < ?", [at_s])
    tables.execute("DELETE FROM box_rollups WHERE at_s < ?", [at_s])
