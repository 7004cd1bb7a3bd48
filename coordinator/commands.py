"""Questions to a box that are answered over MQTT: each waits under a number that nobody can guess, for a while and not for ever."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable

from skerry.runtime import refusals
from skerry.wire import codec
from skerry.wire.logs import fitting
from skerry.wire.messages import LogsReply, LogsRequest

MOST_WAITING = 32
TIMEOUT_S = 10.0
"""More than a box takes to say that it can't answer."""
CORRELATION_BYTES = 16


class TooMany(Exception):
    """As many questions wait for an answer as may."""


class NoAnswer(Exception):
    """The box was asked and did not answer in time."""


class Commands:
    """``send`` puts a question on its way; ``answered`` is called with whatever comes back."""

    def __init__(self, send: Callable[[str, bytes, LogsRequest], Awaitable[None]], *, timeout_s: float = TIMEOUT_S) -> None:
        self._send = send
        self._timeout_s = timeout_s
        self._waiting: dict[bytes, tuple[str, asyncio.Future[LogsReply]]] = {}

    async def read_logs(self, node: str, request: LogsRequest) -> LogsReply:
        """What a replica's sandbox wrote, within the bounds of skerry.wire.logs. Raises TooMany, NoAnswer and what ``send`` raises."""
        if len(self._waiting) >= MOST_WAITING:
            raise TooMany(f"{MOST_WAITING} questions to boxes wait for an answer already")
        correlation = secrets.token_bytes(CORRELATION_BYTES)
        answer: asyncio.Future[LogsReply] = asyncio.get_running_loop().create_future()
        self._waiting[correlation] = (node, answer)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._send(node, correlation, request)
                return await answer
        except TimeoutError as exc:
            raise NoAnswer(f"box {node} did not answer within {self._timeout_s:g} s") from exc
        finally:
            del self._waiting[correlation]

    def answered(self, node: str, correlation: bytes, payload: bytes) -> None:
        """Take a reply of ``node``; one that nobody waits for, that another box was asked for, or that is none, changes nothing."""
        asked, answer = self._waiting.get(correlation, ("", None))
        if answer is None or answer.done():
            refusals.count("reply.unasked", "nobody waits for it", node=node)
            return
        if asked != node:
            refusals.count("reply.foreign", f"{asked} was asked", node=node)
            return
        try:
            answer.set_result(fitting(codec.decode(payload, LogsReply)))
        except codec.Malformed as exc:
            refusals.count("reply.malformed", str(exc), node=node)
