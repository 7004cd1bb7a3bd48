"""How far each webhook was told of events."""

from sqlite_utils import Database as Tables


def read_reached(tables: Tables, url: str) -> int:
    """The last event that it was told of; one that is new begins with what happens from now on."""
    row = next(iter(tables.query("SELECT reached FROM hooks WHERE url = ?", [url])), None)
    if row is not None:
        return int(row["reached"])
    return int(next(iter(tables.query("SELECT coalesce(max(id), 0) AS last FROM events")))["last"])


def save_reached(tables: Tables, url: str, reached: int) -> None:
    """Keep it."""
    tables.execute("INSERT OR REPLACE INTO hooks (url, reached) VALUES (?, ?)", [url, reached])


def keep_only(tables: Tables, urls: list[str]) -> None:
    """Forget the others: one that is set again begins anew."""
    marks = ", ".join("?" * len(urls))
    tables.execute(f"DELETE FROM hooks WHERE url NOT IN ({marks})", urls)  # noqa: S608 - marks alone
