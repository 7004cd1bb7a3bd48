"""Small bodies of requests, read within bounds however much is sent."""

from aiohttp import web


async def beginning(request: web.Request, most_bytes: int) -> bytes:
    """The body; of one that is longer than ``most_bytes`` the first ``most_bytes + 1``, so that its length tells."""
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > most_bytes:
            break
    return bytes(body[: most_bytes + 1])
