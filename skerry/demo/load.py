"""Callers: requests at a given rate to given boxes, whatever becomes of those before, and what came of each."""

import asyncio
import contextlib
import time
from collections.abc import Callable

import aiohttp
import msgspec

from skerry.wire import oip

WAY_BACK_MS = 40.0
"""What a caller keeps of its deadline for the way there and back, and for itself; the gateway is given the rest."""
MOST_UNDER_WAY = 400


class Reply(msgspec.Struct, frozen=True):
    """What came of one request. ``status`` is 0 where nothing came."""

    status: int
    took_ms: float
    served_by: str = ""
    node: str = ""
    outputs: list[oip.Tensor] = []
    error: str = ""


class Tally(msgspec.Struct):
    """What came of many. ``late`` answers came after the deadline, ``lost`` requests got no answer at all."""

    edge: int = 0
    peer: int = 0
    cloud: int = 0
    refused: int = 0
    late: int = 0
    lost: int = 0
    wrong: int = 0
    slowest_ms: float = 0.0

    @property
    def answered(self) -> int:
        """Requests with an answer."""
        return self.edge + self.peer + self.cloud

    def take(self, reply: Reply, deadline_ms: float) -> None:
        """Count one."""
        if reply.status == 200:
            setattr(self, reply.served_by, getattr(self, reply.served_by) + 1)
            self.slowest_ms = max(self.slowest_ms, reply.took_ms)
            if reply.took_ms > deadline_ms:
                self.late += 1
        elif reply.status == 503:
            self.refused += 1
        elif reply.status == 0:
            self.lost += 1
        else:
            self.wrong += 1


class Request(msgspec.Struct, frozen=True):
    """A request, ready to be sent again and again."""

    model: str
    body: bytes
    headers: dict[str, str]
    deadline_ms: float


def request_of(model: str, tensors: list[oip.Tensor], *, deadline_ms: float) -> Request:
    """A request that leaves WAY_BACK_MS of its deadline for the way back."""
    body, headers = oip.render_request(tensors, timeout_us=int((deadline_ms - WAY_BACK_MS) * 1000))
    return Request(model, body, headers, deadline_ms)


async def ask(session: aiohttp.ClientSession, gateway_url: str, request: Request) -> Reply:
    """Send one request and wait for what comes of it; never raises."""
    started = time.perf_counter()

    def took_ms() -> float:
        return (time.perf_counter() - started) * 1000

    try:
        url = f"{gateway_url}/v2/models/{request.model}/infer"
        async with session.post(url, data=request.body, headers=request.headers) as response:
            body = await response.read()
            if response.status != 200:
                return Reply(response.status, took_ms(), error=body.decode(errors="replace")[:300])
            elapsed_ms = took_ms()
            answer = oip.parse_answer(body, response.headers.get(oip.HEADER_LENGTH))
            headers = response.headers
            return Reply(200, elapsed_ms, headers.get("Skerry-Served-By", ""), headers.get("Skerry-Node", ""), answer.outputs)
    except (aiohttp.ClientError, OSError, TimeoutError, oip.BadRequest) as exc:
        return Reply(0, took_ms(), error=f"{type(exc).__name__}: {exc}")


class Callers:
    """Sends ``request()`` to one gateway ``per_second`` times a second, at even intervals; replies go to ``on_reply``."""

    def __init__(
        self, session: aiohttp.ClientSession, gateway_url: str, request: Callable[[], Request], on_reply: Callable[[Reply, Request], None]
    ) -> None:
        self._session = session
        self._gateway_url = gateway_url
        self._request = request
        self._on_reply = on_reply
        self._under_way: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None
        self.per_second = 0.0

    async def __aenter__(self) -> "Callers":
        self._task = asyncio.create_task(self._run(), name="demo.callers")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self.settle()

    async def settle(self) -> None:
        """Wait for what is under way."""
        if self._under_way:
            await asyncio.wait(list(self._under_way), timeout=10)

    async def _run(self) -> None:
        due = time.perf_counter()
        while True:
            if self.per_second <= 0:
                await asyncio.sleep(0.05)
                due = time.perf_counter()
                continue
            due = max(due + 1 / self.per_second, time.perf_counter() - 0.25)  # after a stall: no burst of all that was missed
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if len(self._under_way) < MOST_UNDER_WAY:
                task = asyncio.create_task(self._one(), name="demo.request")
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)

    async def _one(self) -> None:
        request = self._request()
        self._on_reply(await ask(self._session, self._gateway_url, request), request)
