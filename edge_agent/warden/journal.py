"""What happened in the warden, kept until the agent's outbox has it. SQLite: an entry that was written survives kill -9 and power cuts."""

import contextlib
import sqlite3
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path

from skerry.wire.box import Entries, Entry

BATCH = 200
PENDING = 1000
"""Entries kept in memory while the disk refuses them."""


class Journal:
    """A bounded queue of entries; over ``most`` the oldest is dropped and counted."""

    def __init__(self, path: Path, *, most: int) -> None:
        self._most = most
        self.on_add: Callable[[], None] = lambda: None
        self._pending: deque[tuple[int, str, str, str]] = deque(maxlen=PENDING)
        self._dropped = 0
        try:
            self._db = self._open(path)
        except sqlite3.DatabaseError as exc:
            if isinstance(exc, sqlite3.OperationalError) and exc.sqlite_errorcode != sqlite3.SQLITE_ERROR:
                raise  # a full or locked disk, not a damaged file: what it holds stays
            path.replace(path.with_suffix(".corrupt"))  # set aside for a person: the box must start all the same
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            self._db = self._open(path)
        self.id: str = self._db.execute("SELECT id FROM journal").fetchone()[0]

    @staticmethod
    def _open(path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(path, isolation_level=None, timeout=5, check_same_thread=False)
        # FULL: an entry is told to the coordinator, so it must not come undone; entries are few.
        # EXCLUSIVE: nobody else opens the file, and so a full disk, which has no room for a -shm file, does not keep it shut.
        db.executescript(
            """PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
            CREATE TABLE IF NOT EXISTS journal (id TEXT NOT NULL, lost INTEGER NOT NULL);
            CREATE TABLE IF NOT EXISTS entries (
                seq INTEGER PRIMARY KEY AUTOINCREMENT, at_ms INTEGER NOT NULL,
                kind TEXT NOT NULL, subject TEXT NOT NULL, text TEXT NOT NULL);
            """
        )
        if (damage := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(damage)
        if db.execute("SELECT count(id) FROM journal").fetchone()[0] == 0:
            db.execute("INSERT INTO journal VALUES (?, 0)", (uuid.uuid4().hex[:12],))
        return db

    def add(self, kind: str, subject: str = "", text: str = "", *, at_ms: int) -> None:
        """Write an entry down; while the disk refuses it waits in memory."""
        self.note(kind, subject, text, at_ms=at_ms)
        self.flush()

    def note(self, kind: str, subject: str = "", text: str = "", *, at_ms: int) -> None:
        """Have an entry written down by the next flush: a disk takes longer to be sure of it than a warm replica takes to start."""
        self._dropped += len(self._pending) == PENDING
        self._pending.append((at_ms, kind, subject, text[:2000]))

    def flush(self) -> None:
        """Write down what was noted, and try again what the disk refused."""
        if not self._pending:
            return
        self._write_pending()
        if not self._pending:
            self.on_add()

    def _write_pending(self) -> None:
        with contextlib.suppress(sqlite3.OperationalError), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT INTO entries (at_ms, kind, subject, text) VALUES (?, ?, ?, ?)", list(self._pending))
            dropped = self._db.execute("DELETE FROM entries WHERE seq <= (SELECT max(seq) FROM entries) - ?", (self._most,)).rowcount
            if dropped + self._dropped:
                self._db.execute("UPDATE journal SET lost = lost + ?", (dropped + self._dropped,))
            self._db.execute("COMMIT")
            self._pending.clear()
            self._dropped = 0

    def after(self, seq: int) -> Entries:
        """The entries that follow ``seq``, at most BATCH, and how many were ever dropped."""
        rows = self._db.execute(
            "SELECT seq, at_ms, kind, subject, text FROM entries WHERE seq > ? ORDER BY seq LIMIT ?", (seq, BATCH)
        ).fetchall()
        lost = self._db.execute("SELECT lost FROM journal").fetchone()[0]
        return Entries(self.id, [Entry(*row) for row in rows], lost + self._dropped)

    def forget(self, seq: int) -> None:
        """Drop what the outbox has."""
        with contextlib.suppress(sqlite3.OperationalError):
            self._db.execute("DELETE FROM entries WHERE seq <= ?", (seq,))

    def close(self) -> None:
        """Close the file."""
        self._db.close()
