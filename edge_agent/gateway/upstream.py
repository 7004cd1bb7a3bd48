"""Other boxes' gateways: requests passed on over HTTP, what they took, and when to leave one alone.

What comes back is as hostile as what comes from a caller: it is bounded, parsed, and must be an answer of the protocol, or it is none.
"""

import asyncio
import random
import ssl
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import aiohttp
import msgspec

from edge_agent.core import breaker, estimate
from edge_agent.core.breaker import Breaker
from edge_agent.core.estimate import Estimate, Link
from edge_agent.core.routing import UpstreamView
from skerry.runtime import log
from skerry.wire import oip
from skerry.wire.box import Route
from skerry.wire.messages import Tier, Upstream

logger = log.get("gateway.upstream")

FORWARDED = "Skerry-Forwarded"
"""Names the box that passed a request on; such a request is answered or refused, never passed on again."""
TIMEOUT = "Skerry-Timeout-Ms"
"""Milliseconds that a forwarded request has left."""
NOT_OURS = (401, 403, 404, 407, 408, 429)
"""Answers that say something of the way there or of the upstream's state, not of the caller's request."""
CONNECT_TIMEOUT_S = 2.0
MAX_WORDS = 300


class UpstreamFailed(Exception):
    """No answer came that could be passed back."""


class UpstreamRefused(Exception):
    """The upstream says that the request itself is wrong; the text is its own."""


class Reply(msgspec.Struct, frozen=True):
    """What an upstream answered. ``size_bytes`` went and came; ``remote_ms`` is what it says it took itself."""

    outputs: list[oip.Tensor]
    node: str
    tier: Tier
    timing: str
    size_bytes: int
    took_ms: float
    remote_ms: float


class Secured(msgspec.Struct, frozen=True):
    """How a box's gateway is reached over TLS: showing what, and whose certificate it must show."""

    context: ssl.SSLContext
    name: str


class _Seen(msgspec.Struct):
    link: Link = Link()
    service: Estimate = Estimate()
    breaker: Breaker = Breaker()
    running: int = 0


class Upstreams:
    """An HTTP session to other gateways, with what was learned of each: of its link, and of its deployments.

    ``secured`` says how a box is reached over TLS, where this gateway has a certificate of the fleet.
    """

    def __init__(
        self, *, node: str, proxy: str, limit: int, answer_limit_bytes: int, secured: Callable[[str], Secured | None] = lambda _: None
    ) -> None:
        self._secured = secured
        self._node = node
        self._proxy = proxy or None
        self._limit = limit
        self._answer_limit_bytes = answer_limit_bytes
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

    def keep(self, used: set[tuple[str, str]]) -> None:
        """Forget what was learned of others than these (node, deployment)."""
        for key in [key for key, seen in self._seen.items() if key not in used and not seen.running]:
            del self._seen[key]

    def views(self, upstreams: list[Upstream], deployment: str, *, has_budget: bool, now_s: float) -> list[UpstreamView]:
        """What core/routing decides by."""
        views = []
        for upstream in upstreams:
            seen = self._of(upstream.node, deployment)
            views.append(
                UpstreamView(
                    node=upstream.node,
                    tier=upstream.tier,
                    link=seen.link,
                    service=seen.service,
                    is_open=breaker.is_open(seen.breaker, now_s=now_s),
                    is_trial=breaker.is_trial(seen.breaker, now_s=now_s),
                    running=seen.running,
                    limit=self._limit,
                    has_budget=has_budget or upstream.tier != "cloud",
                )
            )
        return views

    async def forward(
        self, upstream: Upstream, route: Route, request: oip.InferRequest, *, remaining_ms: float, overdue_ms: float, most_bytes: int
    ) -> Reply:
        """Pass a request on; it and its answer may take ``most_bytes`` together.

        Raises UpstreamFailed, and leaves a failing or overloaded upstream alone for a while; UpstreamRefused. Where it is cancelled after
        ``overdue_ms``, the upstream has failed too.
        """
        seen = self._of(upstream.node, route.deployment)
        started = time.perf_counter()
        is_trial = breaker.is_trial(seen.breaker, now_s=started)
        seen.running += 1
        seen.breaker = breaker.begun(seen.breaker, now_s=started)
        try:
            path = f"/v2/models/{route.deployment}/versions/{route.version}/infer"
            reply = await self._exchange(upstream, path, request, remaining_ms, most_bytes)
        except asyncio.CancelledError:
            now = time.perf_counter()
            if (now - started) * 1000 >= overdue_ms:
                seen.breaker = breaker.failed(seen.breaker, now_s=now, chance=random.random())
            elif is_trial:
                seen.breaker = breaker.cancelled(seen.breaker, now_s=now)
            raise
        except _Overloaded as exc:
            seen.breaker = breaker.failed(seen.breaker, now_s=time.perf_counter(), chance=random.random(), retry_after_s=exc.retry_after_s)
            raise UpstreamFailed(f"{upstream.node}: overloaded") from exc
        except UpstreamFailed as exc:
            seen.breaker = breaker.failed(seen.breaker, now_s=time.perf_counter(), chance=random.random())
            logger.warning("upstream.failed", upstream=upstream.node, reason=str(exc)[:MAX_WORDS])
            raise
        except UpstreamRefused:
            seen.breaker = breaker.succeeded(seen.breaker, now_s=time.perf_counter())
            raise
        finally:
            seen.running -= 1
        now = time.perf_counter()
        seen.breaker = breaker.succeeded(seen.breaker, now_s=now)
        seen.service = estimate.updated(seen.service, reply.remote_ms, now_s=now)
        seen.link = estimate.updated_link(seen.link, reply.size_bytes, max(0.0, reply.took_ms - reply.remote_ms), now_s=now)
        return reply

    async def _exchange(self, upstream: Upstream, path: str, request: oip.InferRequest, remaining_ms: float, most_bytes: int) -> Reply:
        assert self._session is not None  # noqa: S101 - for the type checker
        parts, headers = oip.render_request_parts(
            request.inputs,
            priority=request.priority,
            outputs=[output.name for output in request.outputs],
            id=request.id,
            idempotent=request.idempotent,
        )
        body = b"".join(parts)  # once: what lies in shared memory can change while it is sent
        headers |= {FORWARDED: self._node, TIMEOUT: str(int(remaining_ms))}
        secured: dict[str, Any] = {}
        if upstream.url.startswith("https:") and (known := self._secured(upstream.node)) is not None:
            secured = {"ssl": known.context, "server_hostname": known.name}
        started = time.perf_counter()
        try:
            async with (
                asyncio.timeout(remaining_ms / 1000),
                self._session.post(
                    upstream.url.rstrip("/") + path, data=body, headers=headers, proxy=self._proxy, allow_redirects=False, **secured
                ) as response,
            ):
                answer = await _read(response, min(self._answer_limit_bytes, most_bytes - len(body)))
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as exc:
            raise UpstreamFailed(f"{upstream.node}: {type(exc).__name__} {exc}"[:MAX_WORDS]) from exc
        took_ms = (time.perf_counter() - started) * 1000
        self._check_status(upstream.node, response, answer)
        try:
            parsed = oip.parse_answer(answer, response.headers.get(oip.HEADER_LENGTH))
        except oip.BadRequest as exc:
            raise UpstreamFailed(f"{upstream.node}: its answer is not of the protocol: {exc}"[:MAX_WORDS]) from exc
        names = {output.name for output in parsed.outputs}
        if len(names) != len(parsed.outputs) or not names or not {output.name for output in request.outputs} <= names:
            raise UpstreamFailed(f"{upstream.node}: its answer has other outputs than were asked for")
        timing = response.headers.get("Server-Timing", "")[:MAX_WORDS]
        remote_ms = min(took_ms, _total_ms(timing))
        return Reply(parsed.outputs, upstream.node, upstream.tier, timing, len(body) + len(answer), took_ms, remote_ms)

    @staticmethod
    def _check_status(node: str, response: aiohttp.ClientResponse, answer: bytes) -> None:
        status = response.status
        if status == 200:
            return
        if status == 503:
            raise _Overloaded(_seconds(response.headers.get("Retry-After", "1")))
        if 400 <= status < 500 and status not in NOT_OURS:
            raise UpstreamRefused(_words(answer) or f"{node} refused with status {status}")
        raise UpstreamFailed(f"{node}: status {status}")


async def _read(response: aiohttp.ClientResponse, most_bytes: int) -> bytes:
    """The body, as long as it is not too long. Raises ValueError."""
    if (response.content_length or 0) > most_bytes:
        raise ValueError(f"an answer of {response.content_length} bytes, at most {most_bytes} are taken")
    parts, size = [], 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > most_bytes:
            raise ValueError(f"an answer of more than {most_bytes} bytes")
        parts.append(part)
    return b"".join(parts)


class _Overloaded(Exception):
    def __init__(self, retry_after_s: float) -> None:
        super().__init__()
        self.retry_after_s = retry_after_s


class _ErrorJson(msgspec.Struct):
    error: str


def _words(answer: bytes) -> str:
    try:
        return msgspec.json.decode(answer, type=_ErrorJson).error[:MAX_WORDS]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""


def _seconds(text: str) -> float:
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else 1.0


def _total_ms(timing: str) -> float:
    """The ``total`` in a Server-Timing header; 0 where there is none, so that all counts as the link."""
    for part in timing.split(","):
        name, _, duration = part.strip().partition(";dur=")
        if name == "total":
            try:
                return max(0.0, min(float(duration), 1e9))
            except ValueError:
                return 0.0
    return 0.0
