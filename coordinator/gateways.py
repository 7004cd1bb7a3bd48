"""Boxes' gateways, as the coordinator asks them: for an operator who tries a model, and for whoever looks at how boxes decide and decided.

Where a box's gateway is, the box says itself. Over TLS it must show the certificate of that very box; without, it is asked only where the
coordinator itself does without. What comes back is bounded and never followed elsewhere.
"""

import ssl
from collections.abc import Callable
from typing import Literal

import aiohttp
import msgspec

from skerry.runtime import streams
from skerry.wire.identity import Subject

TIMEOUT_S = 15.0
CONNECT_TIMEOUT_S = 3.0
MOST_ANSWER_BYTES = 64 * 2**20
MOST_TOLD_BYTES = 2**20
"""Of what a gateway tells of its decisions."""
PASSED_ON = ("Content-Type", "Inference-Header-Content-Length")
TOLD = (
    "Content-Type",
    "Inference-Header-Content-Length",
    "Skerry-Served-By",
    "Skerry-Node",
    "Skerry-Reason",
    "Server-Timing",
    "Retry-After",
)
"""Headers of an answer that are passed back."""


class NotAnswered(Exception):
    """The box's gateway was not reached, or said what is no answer."""


class Asked(msgspec.Struct, frozen=True):
    """What a gateway answered."""

    status: int
    headers: dict[str, str]
    body: bytes


class Gateways:
    """``context`` gives what is shown and believed over TLS, None where the coordinator has none: then ``http`` will do."""

    def __init__(self, fleet: str, context: Callable[[], ssl.SSLContext] | None) -> None:
        self._fleet = fleet
        self._context = context

    async def infer(self, node: str, url: str, deployment: str, body: bytes, headers: dict[str, str]) -> Asked:
        """One request of the Open Inference Protocol. Raises NotAnswered."""
        passed = {key: headers[key] for key in PASSED_ON if key in headers}
        return await self._ask("POST", node, url, f"{deployment}/infer", body=body, headers=passed)

    async def look(
        self, node: str, url: str, deployment: str, what: Literal["decision", "decisions", "slowest"], query: dict[str, str]
    ) -> Asked:
        """What the box would do with a request that came now, would have done with others, or which took longest. Raises NotAnswered."""
        return await self._ask("GET", node, url, f"{deployment}/{what}", query=query, most_bytes=MOST_TOLD_BYTES)

    async def _ask(
        self, method: str, node: str, url: str, path: str, *, body: bytes = b"", headers: dict[str, str] | None = None,
        query: dict[str, str] | None = None, most_bytes: int = MOST_ANSWER_BYTES,
    ) -> Asked:  # fmt: skip
        scheme = url.partition("://")[0]
        if scheme != "https" and (scheme != "http" or self._context is not None):
            raise NotAnswered(f"box {node} says that its gateway is at {url[:200]!r}, which is not over TLS")
        secured = self._context() if scheme == "https" and self._context is not None else None
        name = Subject(self._fleet, "gateway", node).dns_name if secured is not None else None
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session,
                session.request(
                    method, f"{url.rstrip('/')}/v2/models/{path}", data=body or None, params=query, allow_redirects=False,
                    ssl=secured or True, server_hostname=name, headers=headers,
                ) as response,
            ):  # fmt: skip
                answer = await streams.beginning(response.content, most_bytes)
                if len(answer) > most_bytes:
                    raise NotAnswered(f"box {node} answered with more than {most_bytes} bytes")
                return Asked(response.status, {key: response.headers[key][:2000] for key in TOLD if key in response.headers}, answer)
        except (aiohttp.ClientError, ssl.SSLError, OSError, ValueError) as exc:
            raise NotAnswered(f"box {node}: {str(exc)[:300] or type(exc).__name__}") from exc
