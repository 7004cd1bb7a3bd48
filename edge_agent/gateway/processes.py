"""Several processes behind one port: who starts them, and what each lets the others see.

A parent without threads or event loop forks the serving processes, starts again whichever ends, ends whichever no longer works, and ends
with them when it is told to. They share nothing that serves requests; what each has counted lies on a board that all of them can read,
so that any of them can give the sum, and the next process in the same place goes on counting from there.
"""

import contextlib
import ctypes
import gc
import mmap
import os
import signal
import struct
import sys
import time
import zlib
from typing import NoReturn, TypeVar

import msgspec
import structlog

from skerry.runtime import log, sdnotify

T = TypeVar("T")

logger = log.get("gateway.processes")

PAGE_BYTES = 1024 * 1024
"""For what one process has counted; twice over, so that a page that is being written is not read."""
RESTART_S, RESTART_MOST_S = 0.1, 5.0
"""Before a process that ended is started again; twice as long each time where it keeps ending early."""
STEADY_S = 10.0
"""A process that worked for so long did not end early."""
START_WITHIN_S = 25.0
STOP_WITHIN_S = 8.0
HEARD_WITHIN_S = 15.0
"""A process that has not said for so long that it works is ended, as systemd would do with a lone one (WatchdogSec=)."""
LOOK_S, LOOK_STARTING_S = 1.0, 0.05
READ_TRIES = 4
_PR_SET_PDEATHSIG = 1
_HALF = struct.Struct("<QII")
"""In front of each half: which writing it is, how long it is, and the checksum of both and of what follows."""
_BEAT = struct.Struct("<Q")
_WAITED_FOR = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT}


class Board:
    """A page for each process, in memory that they inherited. One writer a page, any number of readers.

    The two halves of a page are written in turn. A half that its writer did not finish, because it is writing or was killed, does not
    match its checksum, and the other one stands: what could once be read does not go away.
    """

    def __init__(self, processes: int, *, page_bytes: int = PAGE_BYTES) -> None:
        self.processes = processes
        self._page_bytes = page_bytes
        self._half_bytes = _HALF.size + page_bytes
        self._map = mmap.mmap(-1, processes * (_BEAT.size + 2 * self._half_bytes))

    def _at(self, place: int, half: int) -> int:
        return self.processes * _BEAT.size + (2 * place + half) * self._half_bytes

    def write(self, place: int, value: object) -> None:
        """Put ``value`` on a page, whole or not at all; one that is too long for it stays off, and the old one stands."""
        data = msgspec.msgpack.encode(value)
        if len(data) > self._page_bytes:
            logger.error("board.too_long", place=place, size_bytes=len(data))
            return
        newest = self._newest(place)
        count = newest[0] + 1 if newest is not None else 1
        at = self._at(place, count % 2)
        _HALF.pack_into(self._map, at, count, len(data), _checksum(count, data))
        self._map[at + _HALF.size : at + _HALF.size + len(data)] = data

    def read(self, place: int, kind: type[T]) -> T | None:
        """What stands on a page; None where nothing does yet."""
        newest = self._newest(place)
        return None if newest is None else msgspec.msgpack.decode(newest[1], type=kind)

    def _newest(self, place: int) -> tuple[int, bytes] | None:
        for _ in range(
            READ_TRIES
        ):  # both halves can only be torn, or the one that is not be old, where the writer came round while we read
            halves = [(at, self._half(at)) for at in (self._at(place, half) for half in (0, 1))]
            whole = [(at, half) for at, half in halves if half is not None]
            if len(whole) == len(halves):
                return max(half for _, half in whole)
            # Alone it is the newest only if it still stands: else both were written anew since it was looked at, and this is an old one.
            if whole and _HALF.unpack_from(self._map, whole[0][0])[0] == whole[0][1][0]:
                return whole[0][1]
        return None

    def _half(self, at: int) -> tuple[int, bytes] | None:
        """Which writing lies there, and its bytes; None where it is not whole."""
        count, size, checksum = _HALF.unpack_from(self._map, at)
        if not count or size > self._page_bytes:
            return None
        data = self._map[at + _HALF.size : at + _HALF.size + size]
        return (count, data) if checksum == _checksum(count, data) else None

    def beat(self, place: int) -> None:
        """Say that the process in ``place`` works."""
        _BEAT.pack_into(self._map, place * _BEAT.size, time.monotonic_ns())

    def heard(self, place: int) -> bytes:
        """The beat of the process in ``place``: another one whenever it has said that it works, SILENT until it first did."""
        return self._map[place * _BEAT.size : (place + 1) * _BEAT.size]

    def hush(self, place: int) -> None:
        """Nobody is in ``place`` yet."""
        self._map[place * _BEAT.size : (place + 1) * _BEAT.size] = SILENT


SILENT = bytes(_BEAT.size)


def _checksum(count: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(struct.pack("<QQ", count, len(data))))


class Place(msgspec.Struct, frozen=True):
    """Which of how many processes this one is, and where it says that it works and what it has counted."""

    number: int
    board: Board
    started_at_ms: int = 0
    """When the first process of this gateway started; it stays the same when one of them is started again."""

    @property
    def is_shared(self) -> bool:
        """Whether there are others."""
        return self.board.processes > 1

    def beat(self) -> None:
        """Say that this process works."""
        self.board.beat(self.number)

    def share(self, total: int) -> int:
        """This process's part of what is limited for all together: all parts make up ``total``."""
        return total // self.board.processes + (self.number < total % self.board.processes)


def split(processes: int) -> Place:
    """Become ``processes`` serving processes. Returns in each of them; the parent ends here, when they have ended.

    Until all of them serve for the first time, one that ends ends them all, and the parent with its status: what does not start is
    somebody else's to mend. Later it is started again.
    """
    board, started_at_ms = Board(processes), time.time_ns() // 1_000_000
    if processes == 1:
        return Place(0, board, started_at_ms)
    return _Parent(board, started_at_ms).watch()


class _Seat(msgspec.Struct):
    """A process as its parent sees it."""

    pid: int = 0
    """0: none runs."""
    started_s: float = 0.0
    beat: bytes = SILENT
    heard_s: float = 0.0
    early: int = 0
    """How often in a row it ended early."""
    again_s: float = 0.0
    """When it is to be started."""


class _Parent:
    def __init__(self, board: Board, started_at_ms: int) -> None:
        self._board = board
        self._started_at_ms = started_at_ms
        self._pid = os.getpid()
        self._seats = [_Seat() for _ in range(board.processes)]
        self._is_ready = False
        self._stop_until_s = 0.0
        self._status = 0
        self._looked_s = time.monotonic()
        self._fed_s = 0.0

    def watch(self) -> Place:
        """Keep them running until told to stop. Returns in each child; ends in the parent.

        What it waits for is blocked but for the moment of waiting, so that no signal comes between two steps.
        """
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a starter that ignores it would have the kernel take their statuses away
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED_FOR)
        gc.collect()
        gc.freeze()  # else the first collection in each child would copy what they share
        while True:
            self._collect()
            if not self._stop_until_s:
                number = self._due()
                if number is not None:
                    if self._start(number) == 0:
                        return self._as_child(number, mask)
                    continue
            elif not any(seat.pid for seat in self._seats):
                self._end()
            self._look(time.monotonic())
            told = signal.sigtimedwait(_WAITED_FOR, LOOK_S if self._is_settled() else LOOK_STARTING_S)
            if told is not None and told.si_signo != signal.SIGCHLD:
                self._stop(0)

    def _due(self) -> int | None:
        now = time.monotonic()
        return next((number for number, seat in enumerate(self._seats) if not seat.pid and now >= seat.again_s), None)

    def _is_settled(self) -> bool:
        return not self._stop_until_s and all(seat.pid and seat.beat != SILENT for seat in self._seats)

    def _start(self, number: int) -> int:
        self._board.hush(number)
        sys.stdout.flush()
        sys.stderr.flush()
        seat, now = self._seats[number], time.monotonic()
        try:
            pid = os.fork()
        except OSError as exc:
            if not self._is_ready:
                raise
            logger.error("process.not_forked", number=number, reason=str(exc))
            seat.again_s = now + RESTART_MOST_S
            return -1
        if pid:
            seat.pid, seat.started_s, seat.heard_s, seat.beat = pid, now, now, SILENT
        return pid

    def _as_child(self, number: int, mask: set[int]) -> Place:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != self._pid:
            sys.exit(0)  # it ended before it could be asked to tell
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.environ.pop("NOTIFY_SOCKET", None)  # the parent speaks for all
        structlog.contextvars.bind_contextvars(process=number)
        return Place(number, self._board, self._started_at_ms)

    # -- what became of them

    def _collect(self) -> None:
        """Take the statuses of those that ended."""
        for number, seat in enumerate(self._seats):
            if not seat.pid:
                continue
            ended, status = os.waitpid(seat.pid, os.WNOHANG)
            if not ended:
                continue
            seat.pid = 0
            code = os.waitstatus_to_exitcode(status)
            if not self._stop_until_s:
                self._ended(number, code)

    def _ended(self, number: int, code: int) -> None:
        if not self._is_ready:
            logger.error("process.not_started", number=number, status=code)
            self._stop(code if code >= 0 else 128 - code)
            return
        seat, now = self._seats[number], time.monotonic()
        seat.early = 0 if now - seat.started_s >= STEADY_S else seat.early + 1
        wait_s = min(RESTART_S * 2**seat.early, RESTART_MOST_S)
        seat.again_s = now + wait_s
        logger.warning("process.ended", number=number, status=code, again_in_s=wait_s)

    def _look(self, now: float) -> None:
        """Hear who works; tell systemd, and end those that do not."""
        if now - self._looked_s > HEARD_WITHIN_S / 2:  # it was we that stood still
            for seat in self._seats:
                seat.started_s = seat.heard_s = now
        self._looked_s = now
        for number, seat in enumerate(self._seats):
            beat = self._board.heard(number)
            if seat.pid and beat != seat.beat:
                seat.beat, seat.heard_s = beat, now
        if self._stop_until_s:
            if now >= self._stop_until_s:
                self._signal(signal.SIGKILL)
            return
        if not self._is_ready and self._is_settled():
            self._is_ready = True
            logger.info("processes.up", processes=len(self._seats))
            sdnotify.notify("READY=1")
        for number, seat in enumerate(self._seats):
            if seat.pid and now - seat.heard_s > (START_WITHIN_S if seat.beat == SILENT else HEARD_WITHIN_S):
                logger.error("process.silent", number=number, for_s=round(now - seat.heard_s, 1))
                seat.heard_s = now
                os.kill(seat.pid, signal.SIGKILL)
        self._feed(now)

    def _feed(self, now: float) -> None:
        interval_s = sdnotify.watchdog_interval_s()
        works = any(seat.pid and seat.beat != SILENT and now - seat.heard_s < HEARD_WITHIN_S for seat in self._seats)
        if interval_s and works and now - self._fed_s >= interval_s:
            sdnotify.notify("WATCHDOG=1")
            self._fed_s = now

    # -- the end

    def _stop(self, status: int) -> None:
        if self._stop_until_s:
            return
        self._stop_until_s = time.monotonic() + STOP_WITHIN_S
        self._status = status
        sdnotify.notify("STOPPING=1")
        self._signal(signal.SIGTERM)

    def _signal(self, signum: int) -> None:
        for seat in self._seats:
            if seat.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(seat.pid, signum)

    def _end(self) -> NoReturn:
        sys.exit(self._status)
