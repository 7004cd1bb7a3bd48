"""The agent's end of the warden's socket."""

import asyncio
import contextlib
import itertools
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

from skerry.runtime import backoff, lifecycle, log
from skerry.wire import codec
from skerry.wire.box import MAX_LINE_BYTES, Apply, Arrived, Entries, FromAgent, FromWarden, Linked, LogsRead, ReadLogs, State, Taken
from skerry.wire.logs import BUSY
from skerry.wire.messages import LogsReply, LogsRequest

logger = log.get("agent.warden")

WARDEN_ABSENT = "the box's warden is not there now"

RECONNECT_FIRST_S = 0.1
RECONNECT_MOST_S = 5.0
LOGS_TIMEOUT_S = 8.0
"""More than the warden gives itself, less than the coordinator waits: each says in its own words what took too long."""
MOST_ASKED = 16
"""Questions to the warden that wait for an answer."""


class WardenLink:
    """Stays connected; hands what the warden says to ``on_state`` and ``on_entries``, which answers with the position reached."""

    def __init__(
        self,
        path: Path,
        *,
        on_state: Callable[[State], Awaitable[None]],
        on_entries: Callable[[Entries], tuple[str, int] | None],
        position: Callable[[], tuple[str, int]],
    ) -> None:
        self._path = path
        self._on_state = on_state
        self._on_entries = on_entries
        self._position = position
        self._writer: asyncio.StreamWriter | None = None
        self._held_envelope: bytes | None = None
        self._is_linked = False
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[LogsReply]] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Connect again whenever the connection is lost, until ``stop`` is set."""
        attempt = 0
        while not stop.is_set():
            try:
                reader, self._writer = await asyncio.open_unix_connection(str(self._path), limit=MAX_LINE_BYTES)
            except OSError as exc:
                if attempt == 0:
                    logger.warning("warden.absent", socket=str(self._path), reason=exc.strerror or str(exc))
                delay_s = backoff.delay_s(attempt, random.random(), first_s=RECONNECT_FIRST_S, most_s=RECONNECT_MOST_S)
                attempt += 1
                await lifecycle.sleep_until(stop, delay_s)
                continue
            attempt = 0
            await self._converse(reader, stop)
            await lifecycle.sleep_until(stop, backoff.delay_s(0, random.random(), first_s=RECONNECT_FIRST_S, most_s=RECONNECT_MOST_S))

    async def _converse(self, reader: asyncio.StreamReader, stop: asyncio.Event) -> None:
        stopping = asyncio.create_task(stop.wait(), name="agent.warden.stop")
        listening = asyncio.create_task(self._listen(reader), name="agent.warden.listen")
        try:
            journal, seq = self._position()
            self._say(Taken(journal, seq))
            self._say(Linked(self._is_linked))
            if self._held_envelope is not None:
                self._say(Apply(self._held_envelope))
            await asyncio.wait([stopping, listening], return_when=asyncio.FIRST_COMPLETED)
            if listening.done():
                listening.result()
        except (OSError, codec.Malformed, ValueError) as exc:
            logger.warning("warden.lost", reason=str(exc)[:300])
        finally:
            for task in (stopping, listening):
                task.cancel()
            if self._writer is not None:
                self._writer.close()
                with contextlib.suppress(OSError):
                    await self._writer.wait_closed()
            self._writer = None
            for answer in self._asked.values():
                if not answer.done():
                    answer.set_result(LogsReply(error=WARDEN_ABSENT))

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            message: FromWarden = codec.decode(line, FromWarden, max_bytes=MAX_LINE_BYTES)  # type: ignore[arg-type]  # a union is no type[T]
            match message:
                case State():
                    await self._on_state(message)
                case Entries():
                    reached = self._on_entries(message)
                    if reached is None:
                        raise ConnectionError("the outbox could not take what happened here; asked for again later")
                    self._say(Taken(*reached))
                case LogsRead(call, reply):
                    answer = self._asked.get(call)
                    if answer is not None and not answer.done():  # else it came too late
                        answer.set_result(reply)

    def _say(self, message: FromAgent) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(codec.encode(message) + b"\n")

    def apply(self, envelope: bytes) -> None:
        """Hand over a desired document; a warden that is not there now gets it when it is."""
        self._held_envelope = envelope
        self._say(Apply(envelope))

    def linked(self, *, is_up: bool) -> None:
        """Whether the broker is there."""
        if is_up != self._is_linked:
            self._is_linked = is_up
            self._say(Linked(is_up))

    def arrived(self, sha256: str, reason: str = "") -> None:
        """A model lies in the incoming folder, or ``reason`` why not."""
        self._say(Arrived(sha256, reason))

    async def read_logs(self, request: LogsRequest) -> LogsReply:
        """What a replica's sandbox wrote; where the warden can't say, ``error`` of the answer says why."""
        if self._writer is None:
            return LogsReply(error=WARDEN_ABSENT)
        if len(self._asked) >= MOST_ASKED:
            return LogsReply(error=BUSY)
        call = next(self._numbers)
        self._asked[call] = asyncio.get_running_loop().create_future()
        try:
            self._say(ReadLogs(call, request))
            async with asyncio.timeout(LOGS_TIMEOUT_S):
                return await self._asked[call]
        except TimeoutError:
            return LogsReply(error=f"the box's warden did not answer within {LOGS_TIMEOUT_S:.0f} s")
        finally:
            del self._asked[call]
