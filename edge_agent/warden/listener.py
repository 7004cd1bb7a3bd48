"""The Unix socket on which the agent speaks to the warden: lines of JSON (skerry/wire/box.py), the agent's treated as hostile."""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from skerry.runtime import lifecycle, refusals
from skerry.wire import codec
from skerry.wire.box import MAX_LINE_BYTES, Apply, Arrived, Entries, FromAgent, Linked, LogsRead, ReadLogs, State, Taken
from skerry.wire.logs import BUSY, fitting
from skerry.wire.messages import LogsReply, LogsRequest

MAX_CONNECTIONS = 8
SEND_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 1.0
LOGS_TIMEOUT_S = 6.0
"""Less than the agent waits for the answer."""
MOST_READING = 4
"""Logs that are read at a time, over all connections; the next gets ``busy``."""


class Listener:
    """Serves the socket; what is said is handed to ``apply``, ``arrived``, ``read_logs``, ``linked`` (by whom, and whether there
    is a link) and the journal's two functions.

    ``read_logs`` says in its answer what went wrong; it is called beside what else is heard, which does not wait for it.
    """

    def __init__(
        self,
        path: Path,
        *,
        state: Callable[[], State | None],
        apply: Callable[[bytes], Awaitable[None]],
        arrived: Callable[[str, str], Awaitable[None]],
        entries_after: Callable[[int], Entries],
        forget: Callable[[int], None],
        linked: Callable[[object, bool], None],
        read_logs: Callable[[LogsRequest], Awaitable[LogsReply]],
        journal_id: str,
    ) -> None:
        self._path = path
        self._state = state
        self._apply = apply
        self._arrived = arrived
        self._entries_after = entries_after
        self._forget = forget
        self._linked = linked
        self._read_logs = read_logs
        self._journal_id = journal_id
        self._news = asyncio.Condition()
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._reading: set[asyncio.Task[None]] = set()

    async def serve(self, stop: asyncio.Event) -> None:
        """Listen until ``stop`` is set."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        staging = self._path.with_name(f".{self._path.name}.new")
        staging.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._accept, path=str(staging), limit=MAX_LINE_BYTES)
        os.chmod(staging, 0o660)  # noqa: PTH101 - the group is the programs of this box
        staging.rename(self._path)  # whoever sees the path can connect
        async with server:
            await stop.wait()
        await lifecycle.end(*self._reading)
        for writer in self._connections.values():
            writer.close()  # whoever reads from it sees the end, and ends
        if self._connections:
            await asyncio.wait(self._connections, timeout=CLOSE_TIMEOUT_S)

    async def announce(self) -> None:
        """Something changed: every connection looks again."""
        async with self._news:
            self._news.notify_all()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        if connection is None or len(self._connections) >= MAX_CONNECTIONS:
            writer.close()
            return
        self._connections[connection] = writer
        try:
            await self._serve_one(reader, writer)
        finally:
            del self._connections[connection]

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        cursor: asyncio.Queue[int] = asyncio.Queue(maxsize=16)
        teller = asyncio.create_task(self._tell(writer, cursor), name="warden.tell")
        try:
            while line := await reader.readline():
                message: FromAgent = codec.decode(line, FromAgent, max_bytes=MAX_LINE_BYTES)  # type: ignore[arg-type]  # a union is no type[T]
                if isinstance(message, ReadLogs):
                    await self._start_reading(message, writer)
                elif isinstance(message, Linked):
                    self._linked(writer, message.is_up)
                else:
                    await self._hear(message, cursor)
        except (codec.Malformed, ValueError) as exc:  # ValueError: a line over the limit
            refusals.count("agent.malformed", str(exc))
        except OSError:
            pass  # the agent went away
        finally:
            self._linked(writer, False)
            await lifecycle.end(teller)
            writer.close()

    async def _start_reading(self, message: ReadLogs, writer: asyncio.StreamWriter) -> None:
        if len(self._reading) >= MOST_READING:
            await self._send(writer, LogsRead(message.call, LogsReply(error=BUSY)))
            return
        task = asyncio.create_task(self._answer(message, writer), name="warden.read_logs")
        self._reading.add(task)
        task.add_done_callback(self._reading.discard)

    async def _answer(self, message: ReadLogs, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(LOGS_TIMEOUT_S):
                reply = await self._read_logs(message.request)
        except TimeoutError:
            reply = LogsReply(error=f"the logs could not be read within {LOGS_TIMEOUT_S:.0f} s")
        with contextlib.suppress(OSError):  # the agent went away meanwhile, or (TimeoutError) does not listen
            await self._send(writer, LogsRead(message.call, fitting(reply)))

    async def _hear(self, message: Apply | Arrived | Taken, cursor: asyncio.Queue[int]) -> None:
        match message:
            case Apply(envelope):
                await self._apply(envelope)
            case Arrived(sha256, reason):
                await self._arrived(sha256, reason[:500])
            case Taken(journal, seq):
                known = seq if journal == self._journal_id else 0
                self._forget(known)
                await cursor.put(known)
                await self.announce()

    async def _tell(self, writer: asyncio.StreamWriter, cursor: asyncio.Queue[int]) -> None:
        """Send the state whenever it changed, and journal entries from where the agent says it is; one batch is out at a time."""
        told: State | None = None
        after: int | None = None
        while True:
            while not cursor.empty():
                after = cursor.get_nowait()
            state = self._state()
            if state is not None and state != told:
                told = state
                await self._send(writer, state)
            if after is not None and (entries := self._entries_after(after)).entries:
                after = None  # until the agent has taken these
                await self._send(writer, entries)
            async with self._news:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(5):
                        await self._news.wait()

    @staticmethod
    async def _send(writer: asyncio.StreamWriter, message: msgspec.Struct) -> None:
        writer.write(codec.encode(message) + b"\n")
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await writer.drain()
