"""Small bodies of requests, read within bounds however much is sent."""

from typing import TypeVar

from aiohttp import web

from coordinator.api.answers import refuse
from skerry.runtime import streams
from skerry.wire import codec

T = TypeVar("T")

MOST_JSON_BYTES = 64 * 1024


async def beginning(request: web.Request, most_bytes: int) -> bytes:
    """The body; of one that is longer than ``most_bytes`` the first ``most_bytes + 1``, so that its length tells."""
    return await streams.beginning(request.content, most_bytes)


async def json_body(request: web.Request, kind: type[T]) -> T:
    """A small JSON body as what it should be. Raises Refused."""
    body = await beginning(request, MOST_JSON_BYTES)
    if len(body) > MOST_JSON_BYTES:
        raise refuse(413, "too_large", f"the body is larger than the {MOST_JSON_BYTES} bytes that this call takes")
    try:
        return codec.decode(body, kind)
    except codec.Malformed as exc:
        raise refuse(422, "invalid_request", str(exc)) from exc
