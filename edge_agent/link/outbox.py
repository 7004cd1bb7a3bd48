"""What the coordinator has not yet confirmed: numbered events and samples in one SQLite file, bounded.

An event leaves when the coordinator says that it is in its database (``command/ack``): neither the broker's word nor a
working link is enough. A sample leaves once it was sent and stayed unneeded for the time in which a dead link can go
unnoticed; after a reconnect the younger ones are sent again, and the numbers tell the coordinator which it has already.
"""

import sqlite3
import uuid
from pathlib import Path

import msgspec

from skerry.runtime import log
from skerry.wire import codec
from skerry.wire.box import MAX_TOTALS_BYTES, Entry, GatewayTotals
from skerry.wire.messages import Event, Sample

logger = log.get("agent.outbox")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS box (
    epoch TEXT NOT NULL, session_epoch INTEGER NOT NULL, sample_seq INTEGER NOT NULL,
    events_lost INTEGER NOT NULL, samples_lost INTEGER NOT NULL, journal TEXT NOT NULL, journal_seq INTEGER NOT NULL,
    totals BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, at_ms INTEGER NOT NULL, kind TEXT NOT NULL, subject TEXT NOT NULL, text TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS routed (
    started_at_ms INTEGER NOT NULL, seq INTEGER NOT NULL, minute INTEGER NOT NULL, taken INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS samples (seq INTEGER PRIMARY KEY, sent_at_ms INTEGER NOT NULL, payload BLOB NOT NULL);
"""


ROUTED_PER_MINUTE = 20
"""Sampled decisions that become events in a minute of the clock, over all deployments: they must not crowd out what matters."""
MAX_ROUTED_TEXT = 500
"""Characters of one."""
_LAST_MOMENT_MS, _LARGEST = 4_102_444_800_000, 2**53
"""As in skerry.wire.messages: Moment and Count."""


class OutboxFailed(Exception):
    """The file refuses writes, a full disk mostly; what was to be written is counted as lost."""


class Outbox:
    """``state_dir/outbox.db``. Every method is quick; a commit costs one fsync (events) or none (samples)."""

    def __init__(self, path: Path, *, most_events: int, most_samples: int) -> None:
        self._most_events = most_events
        self._most_samples = most_samples
        self.set_aside = ""
        try:
            self._db = self._open(path)
        except sqlite3.DatabaseError as exc:
            if isinstance(exc, sqlite3.OperationalError) and exc.sqlite_errorcode != sqlite3.SQLITE_ERROR:
                raise  # a full or locked disk, not a damaged file: what it holds stays
            aside = path.with_name(f"{path.name}.corrupt-{uuid.uuid4().hex[:6]}")
            path.replace(aside)
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            self.set_aside = f"{aside.name}: {exc}"
            self._db = self._open(path)
        row = self._db.execute("SELECT epoch, sample_seq FROM box").fetchone()
        self.epoch: str = row[0]
        newest = self._db.execute("SELECT max(seq) FROM samples").fetchone()[0] or 0
        # Samples are written without fsync: a power cut can undo the last few, whose numbers are then given out again, and the
        # coordinator takes the new ones for repeats. Events are written with fsync, and keep their numbers.
        self._sample_seq: int = max(row[1], newest)
        self._unwritten_samples = 0
        self._unwritten_events = 0

    @staticmethod
    def _open(path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(path, isolation_level=None, timeout=5)
        # EXCLUSIVE: nobody else opens the file, and so a full disk, which has no room for a -shm file, does not keep it shut.
        db.executescript(f"PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; {_SCHEMA}")
        if (damage := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(damage)
        if db.execute("SELECT count(epoch) FROM box").fetchone()[0] == 0:
            db.execute("INSERT INTO box VALUES (?, 0, 0, 0, 0, '', 0, x'')", (uuid.uuid4().hex[:12],))
        return db

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def next_session(self) -> int:
        """A number for this connection, one more than the last."""
        try:
            self._db.execute("UPDATE box SET session_epoch = session_epoch + 1")
        except sqlite3.OperationalError as exc:
            raise OutboxFailed(str(exc)) from exc
        number: int = self._db.execute("SELECT session_epoch FROM box").fetchone()[0]
        return number

    # -- events

    def add_event(self, kind: str, subject: str = "", text: str = "", *, at_ms: int) -> None:
        """Number an event and keep it. Raises OutboxFailed."""
        try:
            self._write_events([(at_ms, kind, subject, text)])
        except OutboxFailed:
            self._unwritten_events += 1
            raise

    def add_entries(self, journal: str, entries: list[Entry]) -> None:
        """Take over what happened in the warden, each entry once whatever is repeated. Raises OutboxFailed."""
        held_journal, held_seq = self.journal_position()
        reached = held_seq if journal == held_journal else 0
        fresh = []
        for entry in sorted(entries, key=lambda entry: entry.seq):
            if entry.seq > reached:
                fresh.append((entry.at_ms, entry.kind, entry.subject, entry.text))
                reached = entry.seq
        if fresh:
            self._write_events(fresh, "UPDATE box SET journal = ?, journal_seq = ?", (journal, reached))

    def journal_position(self) -> tuple[str, int]:
        """The warden's journal and the last of its entries that stands here."""
        row = self._db.execute("SELECT journal, journal_seq FROM box").fetchone()
        return row[0], row[1]

    def add_routed(self, kind: str, totals: GatewayTotals, *, at_ms: int) -> None:
        """Take over the gateway's sampled decisions, each once however often it is told and whoever starts again. Raises OutboxFailed.

        Of more than ROUTED_PER_MINUTE in a minute the newest count; the others are passed over for good.
        """
        started_at_ms, reached, minute, taken = self._db.execute("SELECT * FROM routed").fetchone() or (0, 0, 0, 0)
        if started_at_ms != totals.started_at_ms:
            reached = 0
        if minute != at_ms // 60_000:
            minute, taken = at_ms // 60_000, 0
        fresh = {one.seq: one for one in totals.routed if reached < one.seq <= _LARGEST}
        if not fresh or not 0 <= totals.started_at_ms <= _LARGEST:
            return
        room = max(0, ROUTED_PER_MINUTE - taken)
        chosen = [fresh[seq] for seq in sorted(fresh)[max(0, len(fresh) - room) :]]
        # A time that no coordinator takes would keep every event behind it from being confirmed.
        rows = [
            (one.at_ms if 0 <= one.at_ms <= _LAST_MOMENT_MS else at_ms, kind, one.deployment[:80], one.text[:MAX_ROUTED_TEXT])
            for one in chosen
        ]
        mark = "INSERT OR REPLACE INTO routed (rowid, started_at_ms, seq, minute, taken) VALUES (1, ?, ?, ?, ?)"
        self._write_events(rows, mark, (totals.started_at_ms, max(fresh), minute, taken + len(rows)))

    def _write_events(self, rows: list[tuple[int, str, str, str]], mark: str = "", values: tuple[str | int, ...] = ()) -> None:
        """Number events and keep them; ``mark`` notes in the same transaction how far their source has been taken over."""
        try:
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                self._db.executemany("INSERT INTO events (at_ms, kind, subject, text) VALUES (?, ?, ?, ?)", rows)
                if mark:
                    self._db.execute(mark, values)
                dropped = self._db.execute(
                    "DELETE FROM events WHERE seq <= (SELECT max(seq) FROM events) - ?", (self._most_events,)
                ).rowcount
                if dropped + self._unwritten_events:
                    self._db.execute("UPDATE box SET events_lost = events_lost + ?", (dropped + self._unwritten_events,))
            self._unwritten_events = 0
        except sqlite3.OperationalError as exc:
            raise OutboxFailed(str(exc)) from exc

    def events_after(self, seq: int, limit: int) -> list[Event]:
        """Events that follow ``seq``, oldest first."""
        rows = self._db.execute("SELECT seq, at_ms, kind, subject, text FROM events WHERE seq > ? ORDER BY seq LIMIT ?", (seq, limit))
        return [Event(self.epoch, row[0], row[1], row[2], row[3], row[4]) for row in rows]

    def oldest_event(self) -> int:
        """The smallest number still held; 0 where there is none."""
        return self._db.execute("SELECT min(seq) FROM events").fetchone()[0] or 0

    def oldest_sample(self) -> int:
        """The smallest number still held; 0 where there is none."""
        return self._db.execute("SELECT min(seq) FROM samples").fetchone()[0] or 0

    def confirm_events(self, epoch: str, seq: int) -> None:
        """The coordinator has every event up to ``seq``."""
        if epoch == self.epoch:
            self._try("DELETE FROM events WHERE seq <= ?", (seq,))

    def depth(self) -> tuple[int, int]:
        """How many events and samples are held."""
        events = self._db.execute("SELECT count(*) FROM events").fetchone()[0]
        samples = self._db.execute("SELECT count(*) FROM samples").fetchone()[0]
        return events, samples

    def lost(self) -> tuple[int, int]:
        """How many events and samples were ever dropped."""
        row = self._db.execute("SELECT events_lost, samples_lost FROM box").fetchone()
        return row[0] + self._unwritten_events, row[1] + self._unwritten_samples

    # -- samples

    def next_sample_seq(self) -> int:
        """The number of the next sample."""
        self._sample_seq += 1
        return self._sample_seq

    def last_totals(self) -> GatewayTotals | None:
        """The gateway's counters up to which requests stand in the samples that were added."""
        (raw,) = self._db.execute("SELECT totals FROM box").fetchone()
        try:
            return codec.decode(raw, GatewayTotals, max_bytes=MAX_TOTALS_BYTES) if raw else None
        except codec.Malformed as exc:
            logger.error("outbox.totals_damaged", reason=str(exc)[:200])
            return None

    def add_sample(self, sample: Sample, *, sent_at_ms: int, totals: GatewayTotals | None = None) -> None:
        """Keep a sample; ``sent_at_ms`` is 0 for one that was not sent. One that can't be written is counted as lost.

        ``totals``, the counters that it was taken from, are kept in the same transaction: an agent that starts again goes on from there.
        """
        try:
            with self._db:
                self._db.execute("PRAGMA synchronous = NORMAL")
                self._db.execute("BEGIN IMMEDIATE")
                self._db.execute("INSERT OR REPLACE INTO samples VALUES (?, ?, ?)", (sample.seq, sent_at_ms, codec.encode(sample)))
                dropped = self._db.execute("DELETE FROM samples WHERE seq <= ?", (sample.seq - self._most_samples,)).rowcount
                lost = max(dropped, 0) + self._unwritten_samples
                self._db.execute("UPDATE box SET sample_seq = ?, samples_lost = samples_lost + ?", (sample.seq, lost))
                if totals is not None:
                    self._db.execute("UPDATE box SET totals = ?", (codec.encode(totals),))
            self._unwritten_samples = 0
        except sqlite3.OperationalError as exc:
            self._unwritten_samples += 1
            logger.error("outbox.full", reason=str(exc))
        finally:
            self._db.execute("PRAGMA synchronous = FULL")

    def samples_after(self, seq: int, limit: int) -> list[Sample]:
        """Samples that follow ``seq``, oldest first; one that can't be read is left out."""
        rows = self._db.execute("SELECT payload FROM samples WHERE seq > ? ORDER BY seq LIMIT ?", (seq, limit)).fetchall()
        found = []
        for (payload,) in rows:
            try:
                found.append(codec.decode(payload, Sample))
            except codec.Malformed as exc:
                logger.error("outbox.sample_damaged", reason=str(exc)[:200])
        return found

    def mark_sent(self, seqs: list[int], *, at_ms: int) -> None:
        """These samples were sent."""
        if seqs:
            self._try(f"UPDATE samples SET sent_at_ms = ? WHERE seq IN ({','.join('?' * len(seqs))})", (at_ms, *seqs))  # noqa: S608 - only marks

    def forget_samples(self, *, sent_before_ms: int) -> None:
        """Drop samples that were sent before that time: a link that died later has been noticed by now."""
        self._try("DELETE FROM samples WHERE sent_at_ms > 0 AND sent_at_ms < ?", (sent_before_ms,))

    def _try(self, statement: str, values: tuple[msgspec.Raw | int | str, ...]) -> None:
        """Run a clean-up; on a full disk it is made up for by the next one."""
        try:
            self._db.execute(statement, values)
        except sqlite3.OperationalError as exc:
            logger.warning("outbox.not_cleaned", reason=str(exc))
