"""The outbox's SQLite file: opened in a time that does not depend on what it holds, set aside where it is damaged, never over its size.

WAL with ``synchronous = FULL``: a commit is on disk when it returns, and a power cut leaves the commits before it. ``EXCLUSIVE``:
nobody else opens the file, and so a full disk, which has no room for a -shm file, does not keep it shut.
"""

import contextlib
import sqlite3
import uuid
from pathlib import Path

WAL_BYTES = 1 << 20
"""What the log beside the file may grow to."""
LEAST_BYTES = 4 << 20
_PAGE_BYTES = 4096
_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS box (
    epoch TEXT NOT NULL, session_epoch INTEGER NOT NULL, sample_seq INTEGER NOT NULL,
    events_lost INTEGER NOT NULL, samples_lost INTEGER NOT NULL, journal TEXT NOT NULL, journal_seq INTEGER NOT NULL,
    totals BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, at_ms INTEGER NOT NULL, kind TEXT NOT NULL, subject TEXT NOT NULL, text TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS routed (
    started_at_ms INTEGER NOT NULL, seq INTEGER NOT NULL, minute INTEGER NOT NULL, taken INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS readings (
    seq INTEGER PRIMARY KEY, first_seq INTEGER NOT NULL, level INTEGER NOT NULL, at_ms INTEGER NOT NULL, sent_at_ms INTEGER NOT NULL,
    payload BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS readings_by_level ON readings (level, seq);
CREATE INDEX IF NOT EXISTS readings_sent ON readings (sent_at_ms) WHERE sent_at_ms > 0;
CREATE TABLE IF NOT EXISTS held (class TEXT PRIMARY KEY, items INTEGER NOT NULL, bytes INTEGER NOT NULL);
INSERT OR IGNORE INTO held VALUES ('events', 0, 0), ('samples', 0, 0), ('minutes', 0, 0), ('hours', 0, 0);
CREATE TABLE IF NOT EXISTS told (events_lost INTEGER NOT NULL, samples_lost INTEGER NOT NULL, thinned INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS thinned (readings INTEGER NOT NULL);
"""
EVENT_BYTES = "length(kind) + length(subject) + length(text) + 24"
"""Of a row of ``events``, about."""
_UPGRADE = """
INSERT INTO readings SELECT seq, seq, 0, coalesce(json_extract(CAST(payload AS TEXT), '$.at_ms'), 0), sent_at_ms, payload FROM samples
    WHERE json_valid(CAST(payload AS TEXT));
DROP TABLE samples;
UPDATE held SET items = (SELECT count(*) FROM readings), bytes = (SELECT coalesce(sum(length(payload)), 0) FROM readings)
    WHERE class = 'samples';
UPDATE held SET items = (SELECT count(*) FROM events), bytes = (
    SELECT coalesce(sum(length(kind) + length(subject) + length(text) + 24), 0) FROM events)
    WHERE class = 'events';
"""
"""A file of the first version: what it held then is counted."""


def is_damage(exc: sqlite3.DatabaseError) -> bool:
    """Whether the file itself is damaged, and not its disk full or a statement wrong."""
    return (getattr(exc, "sqlite_errorcode", 0) or 0) & 0xFF in _CORRUPT


def opened(path: Path, most_bytes: int) -> tuple[sqlite3.Connection, str]:
    """The file, made where it is not there, and how a damaged one was set aside; empty where it was not.

    Raises sqlite3.OperationalError where the disk refuses.
    """
    try:
        return _open(path, most_bytes), ""
    except sqlite3.DatabaseError as exc:
        if isinstance(exc, sqlite3.OperationalError) and exc.sqlite_errorcode != sqlite3.SQLITE_ERROR:
            raise  # a full or locked disk, not a damaged file: what it holds stays
        aside = set_aside(path)
        return _open(path, most_bytes), f"{aside}: {exc}"


def set_aside(path: Path) -> str:
    """Move a damaged file out of the way; its new name. Raises OSError."""
    aside = path.with_name(f"{path.name}.corrupt-{uuid.uuid4().hex[:6]}")
    path.replace(aside)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    for older in sorted(path.parent.glob(f"{path.name}.corrupt-*"), key=lambda one: one.stat().st_mtime_ns)[:-1]:
        older.unlink(missing_ok=True)  # the newest is enough for whoever looks into it
    return aside.name


def _open(path: Path, most_bytes: int) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, timeout=5)
    try:
        db.executescript(
            f"PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;"
            f"PRAGMA journal_size_limit = {WAL_BYTES}; PRAGMA wal_autocheckpoint = {WAL_BYTES // _PAGE_BYTES // 2};"
            f"PRAGMA max_page_count = {(most_bytes - WAL_BYTES) // _PAGE_BYTES}; {_SCHEMA}"
        )
        if db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'samples'").fetchone()[0]:
            db.executescript(f"BEGIN; {_UPGRADE}; COMMIT;")
        if db.execute("SELECT count(epoch) FROM box").fetchone()[0] == 0:
            db.execute("INSERT INTO box VALUES (?, 0, 0, 0, 0, '', 0, x'')", (uuid.uuid4().hex[:12],))
        for table in ("events", "readings"):  # the ends of each: to read all of it would take as long as there is much
            for order in ("ASC", "DESC"):
                db.execute(f"SELECT * FROM {table} ORDER BY seq {order} LIMIT 1").fetchall()  # noqa: S608 - constants
    except sqlite3.DatabaseError:
        with contextlib.suppress(sqlite3.Error):
            db.close()
        raise
    return db


def used_bytes(db: sqlite3.Connection) -> int:
    """What the file needs; the pages that are free are used again."""
    pages, free = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count"))
    return int(pages - free) * _PAGE_BYTES
