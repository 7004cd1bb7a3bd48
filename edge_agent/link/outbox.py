"""What the coordinator has not yet confirmed: numbered events and samples in one SQLite file of bounded size.

An event leaves when the coordinator says that it is in its database (``command/ack``): neither the broker's word nor a
working link is enough. A sample leaves once it was sent and stayed unneeded for the time in which a dead link can go
unnoticed; after a reconnect the younger ones are sent again, and the numbers tell the coordinator which it has already.

What does not fit is thinned before it is dropped (core/thinning): each loss is counted and told.
"""

import contextlib
import functools
import hashlib
import sqlite3
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import msgspec

from edge_agent.core import thinning
from edge_agent.core.thinning import LEVELS, WIDTH_MS, Class, Row, Step
from edge_agent.link import outbox_file
from skerry.runtime import log
from skerry.wire import codec
from skerry.wire.box import MAX_TOTALS_BYTES, Entry, GatewayTotals
from skerry.wire.messages import Event, Sample

T = TypeVar("T")
P = ParamSpec("P")

logger = log.get("agent.outbox")

ROUTED_PER_MINUTE = 20
"""Sampled decisions that become events in a minute of the clock, over all deployments: they must not crowd out what matters."""
MAX_ROUTED_TEXT = 500
"""Characters of one."""
DROP_EVENTS = 64
"""At a time."""
MARGIN_BYTES = 256 * 1024
"""Kept free for what is written before there is room made again."""
_LAST_MOMENT_MS, _LARGEST = 4_102_444_800_000, 2**53
"""As in skerry.wire.messages: Moment and Count."""


class OutboxFailed(Exception):
    """The file refuses writes, a full disk mostly; what was to be written is counted as lost."""


class Loss(msgspec.Struct, frozen=True):
    """What was given up since it was last told: events and readings that are gone, and readings that stand in minutes' and hours' now."""

    events: int
    samples: int
    thinned: int


def _whole(method: "Callable[Concatenate[Outbox, P], T]") -> "Callable[Concatenate[Outbox, P], T]":
    """Where the file turns out to be damaged, it is set aside, and the method runs on a new one."""

    def call(self: "Outbox", /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(self, *args, **kwargs)
        except sqlite3.DatabaseError as exc:
            if not outbox_file.is_damage(exc):
                raise
            self._begin_anew(str(exc))
            return method(self, *args, **kwargs)

    functools.update_wrapper(call, method)
    return call


class Outbox:
    """``state_dir/outbox.db``, of ``most_bytes`` at the most, its log included. Every method is quick; a commit costs one fsync (events)
    or none (samples)."""

    def __init__(self, path: Path, *, most_bytes: int) -> None:
        self._path = path
        self._most_bytes = max(most_bytes, outbox_file.LEAST_BYTES)
        self._room_bytes = self._most_bytes - outbox_file.WAL_BYTES - MARGIN_BYTES
        self._unwritten_samples = 0
        self._unwritten_events = 0
        self._db, self.set_aside = outbox_file.opened(path, self._most_bytes)
        self._begin()

    def _begin(self) -> None:
        row = self._db.execute("SELECT epoch, sample_seq FROM box").fetchone()
        self.epoch: str = row[0]
        newest = self._db.execute("SELECT max(seq) FROM readings").fetchone()[0] or 0
        # Samples are written without fsync: a power cut can undo the last few, whose numbers are then given out again, and the
        # coordinator takes the new ones for repeats. Events are written with fsync, and keep their numbers.
        self._sample_seq: int = max(row[1], newest)
        if self.set_aside:
            with contextlib.suppress(OutboxFailed):  # counted
                self.add_event("outbox.damaged", "", f"set aside as {self.set_aside}"[:500], at_ms=time.time_ns() // 1_000_000)

    def _begin_anew(self, reason: str) -> None:
        logger.error("outbox.damaged", reason=reason)
        try:
            self._db.close()
        except sqlite3.Error as exc:
            logger.warning("outbox.not_closed", reason=str(exc))
        aside = outbox_file.set_aside(self._path)
        self._db, _ = outbox_file.opened(self._path, self._most_bytes)
        self.set_aside = f"{aside}: {reason}"
        self._begin()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @_whole
    def next_session(self) -> int:
        """A number for this connection, one more than the last."""
        try:
            self._db.execute("UPDATE box SET session_epoch = session_epoch + 1")
        except sqlite3.OperationalError as exc:
            raise OutboxFailed(str(exc)) from exc
        number: int = self._db.execute("SELECT session_epoch FROM box").fetchone()[0]
        return number

    # -- its size

    def _held(self) -> dict[Class, int]:
        return dict(self._db.execute("SELECT class, bytes FROM held").fetchall())

    def _count(self, name: Class, items: int, size: int) -> None:
        self._db.execute("UPDATE held SET items = items + ?, bytes = bytes + ? WHERE class = ?", (items, size, name))

    def _make_room(self) -> None:
        """Thin and drop until what is held fits again. Raises sqlite3.OperationalError."""
        while outbox_file.used_bytes(self._db) > self._room_bytes:
            if not any(self._give_up(step) for step in thinning.steps(self._held(), self._room_bytes)):
                return

    def _give_up(self, step: Step) -> bool:
        """Whether something could be done."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            match step:
                case "roll samples":
                    return self._roll(0)
                case "roll minutes":
                    return self._roll(1)
                case "drop hours":
                    return self._drop_hour()
                case "drop events":
                    return self._drop_events() > 0

    def _roll(self, level: int) -> bool:
        """Make one reading of the next level out of the oldest of this one that were never sent: those that were may have arrived."""
        rows = self._db.execute(
            "SELECT first_seq, seq, at_ms, payload FROM readings WHERE level = ? AND sent_at_ms = 0 ORDER BY seq", (level,)
        )
        run = thinning.run_of(map(Row._make, rows), WIDTH_MS[level + 1])
        rows.close()
        if not run:
            return False
        samples = _readable([row.payload for row in run])
        self._db.executemany("DELETE FROM readings WHERE seq = ?", [(row.seq,) for row in run])
        self._count(LEVELS[level], -len(run), -sum(len(row.payload) for row in run))
        if level == 0:
            self._add_thinned(len(run))
        if samples:
            whole = msgspec.structs.replace(thinning.merged(samples), first_seq=run[0].first_seq, seq=run[-1].seq)
            self._put(whole, level + 1, sent_at_ms=0)
        return True

    def _put(self, sample: Sample, level: int, *, sent_at_ms: int) -> None:
        payload = codec.encode(sample)
        values = (sample.seq, sample.first, level, sample.at_ms, sent_at_ms, payload)
        self._db.execute("INSERT OR REPLACE INTO readings VALUES (?, ?, ?, ?, ?, ?)", values)
        self._count(LEVELS[level], 1, len(payload))

    def _add_thinned(self, count: int) -> None:
        if not self._db.execute("UPDATE thinned SET readings = readings + ?", (count,)).rowcount:
            self._db.execute("INSERT INTO thinned VALUES (?)", (count,))

    def _drop_hour(self) -> bool:
        row = self._db.execute("SELECT seq, first_seq, length(payload) FROM readings WHERE level = 2 ORDER BY seq LIMIT 1").fetchone()
        if row is None:
            return False
        self._db.execute("DELETE FROM readings WHERE seq = ?", (row[0],))
        self._count("hours", -1, -row[2])
        self._db.execute("UPDATE box SET samples_lost = samples_lost + ?", (row[0] - row[1] + 1,))
        return True

    def _drop_events(self) -> int:
        rows = self._db.execute(f"SELECT seq, {outbox_file.EVENT_BYTES} FROM events ORDER BY seq LIMIT ?", (DROP_EVENTS,)).fetchall()  # noqa: S608 - a constant
        if rows:
            self._db.execute("DELETE FROM events WHERE seq <= ?", (rows[-1][0],))
            self._count("events", -len(rows), -sum(row[1] for row in rows))
            self._db.execute("UPDATE box SET events_lost = events_lost + ?", (len(rows),))
        return len(rows)

    # -- events

    @_whole
    def add_event(self, kind: str, subject: str = "", text: str = "", *, at_ms: int) -> None:
        """Number an event and keep it. Raises OutboxFailed."""
        try:
            self._write_events([(at_ms, kind, subject, text)])
        except OutboxFailed:
            self._unwritten_events += 1
            raise

    @_whole
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

    @_whole
    def journal_position(self) -> tuple[str, int]:
        """The warden's journal and the last of its entries that stands here."""
        row = self._db.execute("SELECT journal, journal_seq FROM box").fetchone()
        return row[0], row[1]

    @_whole
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
            self._make_room()
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                self._db.executemany("INSERT INTO events (at_ms, kind, subject, text) VALUES (?, ?, ?, ?)", rows)
                last = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'events'").fetchone()[0]
                self._count("events", len(rows), sum(len(kind) + len(subject) + len(text) + 24 for _, kind, subject, text in rows))
                if mark:
                    self._db.execute(mark, values)
                if self._unwritten_events:
                    self._db.execute("UPDATE box SET events_lost = events_lost + ?", (self._unwritten_events,))
            self._unwritten_events = 0
        except sqlite3.OperationalError as exc:
            raise OutboxFailed(str(exc)) from exc
        for seq, (at_ms, kind, subject, text) in enumerate(rows, start=last - len(rows) + 1):
            logger.info("event.kept", seq=seq, at_ms=at_ms, kind=kind, subject=subject, text=text)

    @_whole
    def events_after(self, seq: int, limit: int) -> list[Event]:
        """Events that follow ``seq``, oldest first."""
        rows = self._db.execute("SELECT seq, at_ms, kind, subject, text FROM events WHERE seq > ? ORDER BY seq LIMIT ?", (seq, limit))
        return [Event(self.epoch, row[0], row[1], row[2], row[3], row[4]) for row in rows]

    @_whole
    def oldest_event(self) -> int:
        """The smallest number still held; 0 where there is none."""
        return self._db.execute("SELECT min(seq) FROM events").fetchone()[0] or 0

    @_whole
    def oldest_sample(self) -> int:
        """The smallest number still held; 0 where there is none."""
        row = self._db.execute("SELECT first_seq FROM readings ORDER BY seq LIMIT 1").fetchone()
        return row[0] if row else 0

    @_whole
    def confirm_events(self, epoch: str, seq: int, *, is_spent: bool = False) -> None:
        """The coordinator has every event up to ``seq``; with ``is_spent`` what follows gets an epoch of its own."""
        if epoch != self.epoch:
            return
        try:
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                count, size = self._db.execute(
                    f"SELECT count(*), coalesce(sum({outbox_file.EVENT_BYTES}), 0) FROM events WHERE seq <= ?",  # noqa: S608 - a constant
                    (seq,),
                ).fetchone()
                if count:
                    self._db.execute("DELETE FROM events WHERE seq <= ?", (seq,))
                    self._count("events", -count, -size)
                if is_spent:
                    self._db.execute("UPDATE box SET epoch = ?", (self._next_epoch(),))
        except sqlite3.OperationalError as exc:
            logger.warning("outbox.not_cleaned", reason=str(exc))
        self.epoch = self._db.execute("SELECT epoch FROM box").fetchone()[0]

    def _next_epoch(self) -> str:
        """Made of the first event that is still held: whoever holds it too, a copy of this disk or this disk restored again, comes to the
        same numbers with it, and it is not kept twice."""
        first = self._db.execute("SELECT seq, at_ms, kind, subject, text FROM events ORDER BY seq LIMIT 1").fetchone()
        return hashlib.sha256(codec.encode([self.epoch, *first])).hexdigest()[:12] if first else uuid.uuid4().hex[:12]

    @_whole
    def depth(self) -> tuple[int, int]:
        """How many events and readings are held."""
        items = dict(self._db.execute("SELECT class, items FROM held").fetchall())
        return items["events"], sum(items[name] for name in LEVELS)

    @_whole
    def lost(self) -> tuple[int, int]:
        """How many events and samples were ever dropped."""
        row = self._db.execute("SELECT events_lost, samples_lost FROM box").fetchone()
        return row[0] + self._unwritten_events, row[1] + self._unwritten_samples

    @_whole
    def take_loss(self) -> Loss:
        """What was given up since this was last asked. Raises OutboxFailed."""
        events, samples = self.lost()
        thinned = (self._db.execute("SELECT readings FROM thinned").fetchone() or (0,))[0]
        told = self._db.execute("SELECT events_lost, samples_lost, thinned FROM told").fetchone() or (0, 0, 0)
        if told == (events, samples, thinned):
            return Loss(0, 0, 0)
        try:
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                self._db.execute("DELETE FROM told")
                self._db.execute("INSERT INTO told VALUES (?, ?, ?)", (events, samples, thinned))
        except sqlite3.OperationalError as exc:
            raise OutboxFailed(str(exc)) from exc
        return Loss(events - told[0], samples - told[1], thinned - told[2])

    # -- samples

    def next_sample_seq(self) -> int:
        """The number of the next sample."""
        self._sample_seq += 1
        return self._sample_seq

    @_whole
    def last_totals(self) -> GatewayTotals | None:
        """The gateway's counters up to which requests stand in the samples that were added."""
        (raw,) = self._db.execute("SELECT totals FROM box").fetchone()
        try:
            return codec.decode(raw, GatewayTotals, max_bytes=MAX_TOTALS_BYTES) if raw else None
        except codec.Malformed as exc:
            logger.error("outbox.totals_damaged", reason=str(exc)[:200])
            return None

    @_whole
    def add_sample(self, sample: Sample, *, sent_at_ms: int, totals: GatewayTotals | None = None) -> None:
        """Keep a sample; ``sent_at_ms`` is 0 for one that was not sent. One that can't be written is counted as lost.

        ``totals``, the counters that it was taken from, are kept in the same transaction: an agent that starts again goes on from there.
        """
        try:
            self._make_room()
            self._db.execute("PRAGMA synchronous = NORMAL")
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                self._put(sample, 0, sent_at_ms=sent_at_ms)
                self._db.execute("UPDATE box SET sample_seq = ?, samples_lost = samples_lost + ?", (sample.seq, self._unwritten_samples))
                if totals is not None:
                    self._db.execute("UPDATE box SET totals = ?", (codec.encode(totals),))
            self._unwritten_samples = 0
        except sqlite3.OperationalError as exc:
            self._unwritten_samples += 1
            logger.error("outbox.full", reason=str(exc))
        finally:
            self._db.execute("PRAGMA synchronous = FULL")

    @_whole
    def samples_after(self, seq: int, limit: int) -> list[Sample]:
        """Samples that follow ``seq``, oldest first; one that can't be read is left out."""
        rows = self._db.execute("SELECT payload FROM readings WHERE seq > ? ORDER BY seq LIMIT ?", (seq, limit)).fetchall()
        return _readable([row[0] for row in rows])

    @_whole
    def mark_sent(self, seqs: list[int], *, at_ms: int) -> None:
        """These samples were sent."""
        if seqs:
            self._try(f"UPDATE readings SET sent_at_ms = ? WHERE seq IN ({','.join('?' * len(seqs))})", (at_ms, *seqs))  # noqa: S608 - only marks

    @_whole
    def forget_samples(self, *, sent_before_ms: int) -> None:
        """Drop samples that were sent before that time: a link that died later has been noticed by now."""
        try:
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                which = (sent_before_ms,)
                rows = self._db.execute(
                    "SELECT level, count(*), sum(length(payload)) FROM readings WHERE sent_at_ms > 0 AND sent_at_ms < ? GROUP BY level",
                    which,
                ).fetchall()
                if rows:
                    self._db.execute("DELETE FROM readings WHERE sent_at_ms > 0 AND sent_at_ms < ?", which)
                for level, count, size in rows:
                    self._count(LEVELS[level], -count, -size)
        except sqlite3.OperationalError as exc:
            logger.warning("outbox.not_cleaned", reason=str(exc))

    def _try(self, statement: str, values: tuple[Any, ...]) -> None:
        """Run a clean-up; on a full disk it is made up for by the next one."""
        try:
            self._db.execute(statement, values)
        except sqlite3.OperationalError as exc:
            logger.warning("outbox.not_cleaned", reason=str(exc))


def _readable(payloads: list[bytes]) -> list[Sample]:
    found = []
    for payload in payloads:
        try:
            found.append(codec.decode(payload, Sample))
        except codec.Malformed as exc:
            logger.error("outbox.sample_damaged", reason=str(exc)[:200])
    return found
