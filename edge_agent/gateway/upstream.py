"""Other boxes' gateways: requests passed on over HTTP, and what they took."""

import asyncio
import random
import time
from types import TracebackType

import aiohttp
import msgspec

from edge_agent.core import estimate
from edge_agent.core.routing import UpstreamView
from skerry.runtime import backoff, log
from skerry.wire import oip
from skerry.wire.messages import Upstream

logger = log.get("gateway.upstream")

FORWARDED = "Skerry-Forwarded"
"""Names the box that passed a request on; such a request is answered or refused, never passed on again."""
TIMEOUT = "Skerry-Timeout-Ms"
"""Milliseconds that a forwarded request has left."""
NOT_OURS = (401, 403, 404, 407, 408, 429)
"""Answers that say something of the way there or of the upstream's state, not of the caller's request."""
CONNECT_TIMEOUT_S = 2.0
LEAVE_ALONE_FIRST_S = 0.5
LEAVE_ALONE_MOST_S = 10.0
PASSED_ON = ("Content-Type", oip.HEADER_LENGTH, "Accept")
PASSED_BACK = ("Content-Type", oip.HEADER_LENGTH, "Skerry-Served-By", "Skerry-Node", "Server-Timing", "Retry-After")


class UpstreamFailed(Exception):
    """No answer came that could be passed back."""


class Reply(msgspec.Struct, frozen=True):
    """What an upstream answered."""

    status: int
    headers: dict[str, str]
    body: bytes


class _Seen(msgspec.Struct):
    total: estimate.Estimate = estimate.Estimate()
    usable_at_s: float = 0.0
    failures: int = 0
    running: int = 0


class Upstreams:
    """An HTTP session to other gateways, with what was learned of each, by node and deployment."""

    def __init__(self, *, node: str, proxy: str, limit: int) -> None:
        self._node = node
        self._proxy = proxy or None
        self._limit = limit
        self._seen: dict[tuple[str, str], _Seen] = {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Upstreams":
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            auto_decompress=False,
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        if self._session is not None:
            await self._session.close()

    def _of(self, node: str, deployment: str) -> _Seen:
        return self._seen.setdefault((node, deployment), _Seen())

    def views(self, upstreams: list[Upstream], deployment: str) -> list[UpstreamView]:
        """What core/routing decides by."""
        views = []
        for upstream in upstreams:
            seen = self._of(upstream.node, deployment)
            views.append(UpstreamView(upstream.node, upstream.tier, seen.total, seen.usable_at_s, seen.running, self._limit))
        return views

    async def forward(
        self, upstream: Upstream, deployment: str, *, path: str, headers: dict[str, str], body: bytes, remaining_ms: float
    ) -> Reply:
        """Pass a request on. Raises UpstreamFailed, and leaves a failing or overloaded upstream alone for a while."""
        assert self._session is not None  # noqa: S101 - for the type checker
        seen = self._of(upstream.node, deployment)
        seen.running += 1
        started = time.perf_counter()
        try:
            async with (
                asyncio.timeout(remaining_ms / 1000),
                self._session.post(
                    upstream.url.rstrip("/") + path,
                    data=body,
                    headers={**headers, FORWARDED: self._node, TIMEOUT: str(int(remaining_ms))},
                    proxy=self._proxy,
                    allow_redirects=False,
                ) as response,
            ):
                reply = Reply(
                    response.status,
                    {name: response.headers[name] for name in PASSED_BACK if name in response.headers},
                    await response.read(),
                )
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as exc:
            self._leave_alone(seen, upstream.node, f"{type(exc).__name__}: {exc}")
            raise UpstreamFailed(f"{upstream.node}: {type(exc).__name__}") from exc
        finally:
            seen.running -= 1
        if reply.status == 503:
            seen.usable_at_s = time.monotonic() + min(
                LEAVE_ALONE_MOST_S, _seconds(reply.headers.get("Retry-After", "1")) * random.uniform(0.1, 0.5)
            )
            raise UpstreamFailed(f"{upstream.node}: overloaded")
        if reply.status >= 500 or reply.status in NOT_OURS:
            self._leave_alone(seen, upstream.node, f"status {reply.status}")
            raise UpstreamFailed(f"{upstream.node}: status {reply.status}")
        seen.failures = 0
        seen.total = estimate.updated(seen.total, (time.perf_counter() - started) * 1000, now_s=time.monotonic())
        return reply

    def _leave_alone(self, seen: _Seen, node: str, reason: str) -> None:
        delay_s = backoff.delay_s(seen.failures, random.random(), first_s=LEAVE_ALONE_FIRST_S, most_s=LEAVE_ALONE_MOST_S)
        seen.failures += 1
        seen.usable_at_s = time.monotonic() + delay_s
        logger.warning("upstream.failed", upstream=node, reason=reason, leave_alone_s=round(delay_s, 2))


def _seconds(text: str) -> float:
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else 1.0
