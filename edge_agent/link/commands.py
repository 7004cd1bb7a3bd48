"""Typed commands to this box, answered beside the session: a slow answer holds up no acknowledgement and no other command."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from skerry.runtime import refusals
from skerry.wire import codec
from skerry.wire.logs import BUSY, MAX_POSITION, MAX_REPLICA, UNKNOWN_REPLICA, fitting
from skerry.wire.messages import LogsReply, LogsRequest

MOST_AT_A_TIME = 4
MOST_REFUSALS = 16
"""Answers that say ``busy`` and are on their way; a command beyond them gets no answer at all."""


class Commands:
    """``read_logs`` never raises; ``reply`` sends an answer with the command's correlation data."""

    def __init__(
        self,
        *,
        read_logs: Callable[[LogsRequest], Awaitable[LogsReply]],
        reply: Callable[[bytes, LogsReply], Awaitable[None]],
    ) -> None:
        self._read_logs = read_logs
        self._reply = reply
        self._tasks: asyncio.TaskGroup | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self._refusing: set[asyncio.Task[None]] = set()

    async def run(self, stop: asyncio.Event) -> None:
        """Answer until ``stop`` is set; what is not answered then is dropped."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            await stop.wait()
            self._tasks = None
            for task in self._answering | self._refusing:
                task.cancel()

    def hear(self, verb: str, correlation: bytes, payload: bytes) -> None:
        """Take a command; returns at once."""
        if verb != "logs":
            refusals.count("command.unknown", verb)
        elif self._tasks is None:
            refusals.count("command.dropped", "the agent is starting or stopping", verb=verb)
        elif len(self._answering) < MOST_AT_A_TIME:
            _start(self._tasks, self._answer(correlation, payload), self._answering)
        elif len(self._refusing) < MOST_REFUSALS:
            _start(self._tasks, self._refuse(correlation), self._refusing)
        else:
            refusals.count("command.dropped", "too many commands", verb=verb)

    async def _refuse(self, correlation: bytes) -> None:
        await self._reply(correlation, LogsReply(error=BUSY))

    async def _answer(self, correlation: bytes, payload: bytes) -> None:
        await self._reply(correlation, fitting(await self._logs(payload)))

    async def _logs(self, payload: bytes) -> LogsReply:
        try:
            request = codec.decode(payload, LogsRequest)
        except codec.Malformed as exc:
            refusals.count("command.malformed", str(exc), verb="logs")
            return LogsReply(error=f"this box does not understand the request: {exc}")
        if len(request.replica) > MAX_REPLICA:
            return LogsReply(error=UNKNOWN_REPLICA)
        if len(request.after) > MAX_POSITION:
            return LogsReply(error=f"a position has at most {MAX_POSITION} characters")
        return await self._read_logs(request)


def _start(tasks: asyncio.TaskGroup, work: Coroutine[Any, Any, None], among: set[asyncio.Task[None]]) -> None:
    task = tasks.create_task(work, name="agent.command")
    among.add(task)
    task.add_done_callback(among.discard)
