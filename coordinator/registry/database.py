"""One SQLite file: a single writer thread that owns the only connection that writes, and a few that read.

Callers hand over a function and await its result; the thread wraps it into one transaction. Nobody else writes, so nobody
sees "database is locked". WAL lets readers go on meanwhile. ``synchronous=FULL``: what was acknowledged to a box or a person
is on the disk.
"""

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from sqlite_utils import Database as Tables

from coordinator.registry.migrations import migrate

T = TypeVar("T")

WRITE_QUEUE = 1000
READERS = 4


class RegistryFailed(Exception):
    """SQLite refused: a full disk, mostly. Nothing of the transaction was kept."""


class Database:
    """Open with ``async with``; ``write`` and ``read`` run functions that get a sqlite_utils database."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._jobs: queue.Queue[Callable[[Tables], None] | None] = queue.Queue(maxsize=WRITE_QUEUE)
        self._thread = threading.Thread(target=self._write_loop, name="registry.writer", daemon=True)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="registry.reader")
        self._local = threading.local()
        self._opened: list[sqlite3.Connection] = []

    async def __aenter__(self) -> "Database":
        def prepare() -> None:
            connection = self._connect()
            migrate(connection)
            connection.close()

        await asyncio.to_thread(prepare)
        self._thread.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        await asyncio.to_thread(self._jobs.put, None)
        await asyncio.to_thread(self._thread.join)
        self._readers.shutdown()
        for connection in self._opened:
            connection.close()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, isolation_level=None, timeout=10, check_same_thread=False)
        connection.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;")
        connection.row_factory = sqlite3.Row
        return connection

    def _write_loop(self) -> None:
        connection = self._connect()
        tables = Tables(connection)
        while (job := self._jobs.get()) is not None:
            job(tables)
        connection.close()

    async def write(self, work: Callable[[Tables], T]) -> T:
        """Run ``work`` in one transaction on the writer thread. Raises RegistryFailed, and whatever ``work`` raises."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def job(tables: Tables) -> None:
            try:
                result = _in_transaction(tables, work)
            except BaseException as exc:  # noqa: BLE001 - handed to the caller, whatever it is
                loop.call_soon_threadsafe(_fail, done, exc)
            else:
                loop.call_soon_threadsafe(_succeed, done, result)

        while True:
            try:
                self._jobs.put_nowait(job)
                break
            except queue.Full:
                await asyncio.sleep(0.01)  # callers wait their turn: the queue is the bound
        return await asyncio.shield(done)

    async def read(self, work: Callable[[Tables], T]) -> T:
        """Run ``work`` on a connection that can't write."""

        def job() -> T:
            if not hasattr(self._local, "tables"):
                connection = self._connect()
                connection.execute("PRAGMA query_only = ON")
                self._opened.append(connection)
                self._local.tables = Tables(connection)
            tables: Tables = self._local.tables
            return work(tables)

        return await asyncio.get_running_loop().run_in_executor(self._readers, job)


def _in_transaction(tables: Tables, work: Callable[[Tables], T]) -> T:
    connection = tables.conn
    assert connection is not None  # noqa: S101 - for the type checker
    try:
        connection.execute("BEGIN IMMEDIATE")
        try:
            result = work(tables)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
    except sqlite3.OperationalError as exc:
        raise RegistryFailed(f"the registry can't be written: {exc}") from exc
    return result


def _succeed(done: "asyncio.Future[T]", result: T) -> None:
    if not done.done():
        done.set_result(result)


def _fail(done: "asyncio.Future[T]", exc: BaseException) -> None:
    if not done.done():
        done.set_exception(exc)
