"""What happened in the fleet: each event once, by (node, epoch, seq)."""

from collections.abc import Collection
from typing import Any, Literal

import msgspec
from sqlite_utils import Database as Tables

from coordinator.core.sequence import Numbering, begun, give_up, take
from skerry.wire.messages import Event

Stream = Literal["events", "samples"]
CONNECTIONS = 16
"""Of one name, of which it is remembered what was heard: nothing of an older one is on its way any more."""
OWN_EPOCH = "coordinator"
"""Under which the coordinator writes events of its own."""


class Row(msgspec.Struct, frozen=True):
    """An event in the registry; ``id`` is the order in which it came."""

    id: int
    node: str
    at_ms: int
    kind: str
    subject: str
    text: str


class Account(msgspec.Struct, frozen=True):
    """A numbered stream of one box; ``dropped`` is what the box itself says it had to throw away."""

    node: str
    epoch: str
    stream: Stream
    numbering: Numbering
    dropped: int


def read_numbering(tables: Tables, node: str, epoch: str, stream: Stream) -> Numbering | None:
    """What of a stream has come; None for one not met before."""
    rows = tables.query("SELECT numbering FROM numberings WHERE node = ? AND epoch = ? AND stream = ?", [node, epoch, stream])
    return next((msgspec.json.decode(row["numbering"], type=Numbering) for row in rows), None)


def save_numbering(tables: Tables, node: str, epoch: str, stream: Stream, numbering: Numbering, dropped: int) -> None:
    """Keep what of a stream has come."""
    tables.execute(
        "INSERT OR REPLACE INTO numberings VALUES (?, ?, ?, ?, ?)",
        [node, epoch, stream, msgspec.json.encode(numbering).decode(), dropped],
    )


def read_accounts(tables: Tables, node: str | None = None) -> list[Account]:
    """Every numbered stream, of one box or of all."""
    where, values = ("WHERE node = ?", [node]) if node else ("", [])
    return [
        Account(row["node"], row["epoch"], row["stream"], msgspec.json.decode(row["numbering"], type=Numbering), row["dropped"])
        for row in tables.query(f"SELECT * FROM numberings {where} ORDER BY node, stream, epoch", values)  # noqa: S608 - a constant
    ]


def read_accounts_of_some(tables: Tables, names: Collection[str]) -> list[Account]:
    """The numbered streams of these boxes."""
    return [account for name in names for account in read_accounts(tables, name)]


class Kept(msgspec.Struct, frozen=True):
    """What became of a batch: the events that were new, and the number up to which the box need hold nothing any more, which is none
    that was not heard on its connection: another disk of its may have said something else under it. ``is_spent``: the number after it
    stands for another event here, since the box's disk is one of an earlier day; ``is_known``: this connection was told so before."""

    fresh: list[Event]
    settled: int
    is_spent: bool = False
    is_known: bool = False


def save_events(tables: Tables, node: str, events: list[Event], *, oldest: int, dropped: int, now_ms: int, nonce: str = "") -> Kept:
    """Keep a batch of one epoch. ``nonce`` is of the connection on which it came.

    What came on a connection after something was lost there is not kept: the box sends all of it again, and what was lost may turn out to
    be under numbers that are spent. Nor is what was on its way when that was found: it comes again under others.
    """
    epoch = events[0].epoch
    through, is_spent = _heard(tables, node, epoch, nonce)
    if is_spent:
        return Kept([], through, is_spent=True, is_known=True)
    ordered = sorted(events, key=lambda event: event.seq)
    through = max(through, (oldest or ordered[0].seq) - 1)
    numbering = read_numbering(tables, node, epoch, "events") or begun(oldest or ordered[0].seq)
    if nonce and ordered[0].seq > through + 1:
        return Kept([], min(numbering.settled, through))
    fresh: list[Event] = []
    for event in ordered:
        after, is_new = take(numbering, event.seq)
        held = None if is_new else _held(tables, node, event)
        if held is not None and held != (event.at_ms, event.kind, event.subject, event.text):
            save_numbering(tables, node, epoch, "events", numbering, dropped)
            _save_heard(tables, node, epoch, nonce, event.seq - 1, is_spent=True)
            return Kept(fresh, event.seq - 1, is_spent=True)
        numbering = after
        if held is not None:
            continue
        inserted = tables.execute(
            "INSERT OR IGNORE INTO events (node, epoch, seq, at_ms, received_at_ms, kind, subject, text) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [node, epoch, event.seq, event.at_ms, now_ms, event.kind, event.subject, event.text],
        ).rowcount
        if inserted:
            fresh.append(event)
            if not is_new:  # given up for lost, by a box that did not hold it: another of its name does
                numbering = msgspec.structs.replace(numbering, lost=max(0, numbering.lost - 1))
    numbering = give_up(numbering, oldest)
    save_numbering(tables, node, epoch, "events", numbering, dropped)
    for event in ordered:
        if event.seq == through + 1:
            through = event.seq
    _save_heard(tables, node, epoch, nonce, through, is_spent=False)
    return Kept(fresh, min(numbering.settled, through))


def _heard(tables: Tables, node: str, epoch: str, nonce: str) -> tuple[int, bool]:
    """The number up to which a connection said all that its box held, and whether it was told that what follows is spent."""
    rows = tables.query("SELECT through, is_spent FROM heard WHERE node = ? AND epoch = ? AND nonce = ?", [node, epoch, nonce])
    return next(((row["through"], bool(row["is_spent"])) for row in rows), (0, False))


def _save_heard(tables: Tables, node: str, epoch: str, nonce: str, through: int, *, is_spent: bool) -> None:
    if not nonce:
        return
    tables.execute("INSERT OR REPLACE INTO heard VALUES (?, ?, ?, ?, ?)", [node, nonce, epoch, through, int(is_spent)])
    newest = "SELECT rowid FROM heard WHERE node = ? ORDER BY rowid DESC LIMIT ?"
    tables.execute(f"DELETE FROM heard WHERE node = ? AND rowid NOT IN ({newest})", [node, node, CONNECTIONS])  # noqa: S608 - constants


def _held(tables: Tables, node: str, event: Event) -> tuple[int, str, str, str] | None:
    """What a number stands for here; None where it was given up, or is forgotten."""
    query = "SELECT at_ms, kind, subject, text FROM events WHERE node = ? AND epoch = ? AND seq = ?"
    rows = tables.query(query, [node, event.epoch, event.seq])
    return next(((row["at_ms"], row["kind"], row["subject"], row["text"]) for row in rows), None)


def add_own_event(tables: Tables, node: str, kind: str, subject: str, text: str, now_ms: int) -> None:
    """Write down something that the coordinator saw itself."""
    last = next(tables.query("SELECT max(seq) AS seq FROM events WHERE node = ? AND epoch = ?", [node, OWN_EPOCH]))["seq"] or 0
    tables.execute(
        "INSERT INTO events (node, epoch, seq, at_ms, received_at_ms, kind, subject, text) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [node, OWN_EPOCH, last + 1, now_ms, now_ms, kind, subject, text],
    )


def read_events(
    tables: Tables, *, node: str = "", subject: str = "", kind: str = "", except_kind: str = "", after: int = 0, limit: int = 200
) -> list[Row]:
    """The newest events with an id over ``after``, newest first."""
    conditions: list[str] = ["id > ?"]
    values: list[Any] = [after]
    if node:
        conditions.append("node = ?")
        values.append(node)
    if kind:
        conditions.append("kind = ?")
        values.append(kind)
    if except_kind:
        conditions.append("kind <> ?")
        values.append(except_kind)
    if subject:
        conditions.append("(subject = ? OR subject LIKE ? ESCAPE '\\')")
        escaped = subject.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        values += [subject, f"{escaped}-%"]
    rows = tables.query(
        f"SELECT id, node, at_ms, kind, subject, text FROM events WHERE {' AND '.join(conditions)} ORDER BY id DESC LIMIT ?",  # noqa: S608 - constants
        [*values, limit],
    )
    return [msgspec.convert(row, Row) for row in rows]


def read_following(tables: Tables, *, after: int, limit: int) -> list[Row]:
    """The first events behind one, oldest first."""
    rows = tables.query("SELECT id, node, at_ms, kind, subject, text FROM events WHERE id > ? ORDER BY id LIMIT ?", [after, limit])
    return [msgspec.convert(row, Row) for row in rows]


def forget_events(tables: Tables, *, keep: int) -> None:
    """Drop the oldest over ``keep``."""
    tables.execute("DELETE FROM events WHERE id <= (SELECT max(id) FROM events) - ?", [keep])
