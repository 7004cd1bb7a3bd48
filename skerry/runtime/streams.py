"""Bodies of HTTP messages, read to their end within a bound however they are cut."""

import aiohttp


async def beginning(content: aiohttp.StreamReader, most_bytes: int) -> bytes:
    """The whole; of what is longer than ``most_bytes`` the first ``most_bytes + 1``, so that its length tells."""
    body = bytearray()
    async for chunk in content.iter_any():
        body += chunk
        if len(body) > most_bytes:
            break
    return bytes(body[: most_bytes + 1])
