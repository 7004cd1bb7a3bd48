"""Who changed what. Records are written in the transaction of the change itself: there is no change without its record."""

import msgspec
from sqlite_utils import Database as Tables

from skerry.wire.audit import GENESIS, AuditPage, Record, sealed

MOST_TEXT = 64 * 1024
"""Characters of ``before`` and of ``after``: a deployment's file fits."""


class Actor(msgspec.Struct, frozen=True):
    """Who acts, how they showed who they are, and from which address."""

    who: str
    via: str
    address: str = ""


def append(tables: Tables, actor: Actor, action: str, subject: str, *, before: str = "", after: str = "", now_ms: int) -> None:
    """Write the next record."""
    last = next(iter(tables.query("SELECT sha256 FROM audit ORDER BY id DESC LIMIT 1")), None)
    record = sealed(
        Record(
            id=last_id(tables) + 1,  # one that was removed leaves a gap, also at the end
            at_ms=now_ms,
            who=actor.who,
            via=actor.via,
            address=actor.address,
            action=action,
            subject=subject,
            before=before[:MOST_TEXT],
            after=after[:MOST_TEXT],
            previous=last["sha256"] if last else GENESIS,
        )
    )
    names = Record.__struct_fields__
    tables.execute(
        f"INSERT INTO audit ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})",  # noqa: S608 - our own field names
        [getattr(record, name) for name in names],
    )


def read_after(tables: Tables, after_id: int, *, limit: int) -> AuditPage:
    """Records behind a number, in order."""
    rows = tables.query("SELECT * FROM audit WHERE id > ? ORDER BY id LIMIT ?", [after_id, limit])
    return AuditPage([Record(**row) for row in rows], last_id(tables))


def read_newest(tables: Tables, *, before_id: int, subject: str, who: str, limit: int) -> AuditPage:
    """Records, the newest first; ``before_id`` 0: from the newest on. ``subject`` and ``who`` narrow them down."""
    rows = tables.query(
        "SELECT * FROM audit WHERE (? = 0 OR id < ?) AND (? = '' OR subject = ?) AND (? = '' OR who = ?) ORDER BY id DESC LIMIT ?",
        [before_id, before_id, subject, subject, who, who, limit],
    )
    return AuditPage([Record(**row) for row in rows], last_id(tables))


def last_id(tables: Tables) -> int:
    """The greatest number that was ever given out, also to a record that is gone."""
    return next((row["seq"] for row in tables.query("SELECT seq FROM sqlite_sequence WHERE name = 'audit'")), 0)
