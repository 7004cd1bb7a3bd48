"""The route table's file, read again whenever the warden has replaced it."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from skerry.runtime import lifecycle, log
from skerry.wire import codec
from skerry.wire.box import RouteTable

logger = log.get("gateway.routes")

LOOK_S = 0.1
MAX_TABLE_BYTES = 16 * 1024 * 1024


async def follow(path: Path, use: Callable[[RouteTable], None], stop: asyncio.Event) -> None:
    """Hand every new table to ``use``. A missing or damaged file changes nothing: what is served goes on being served."""
    seen: tuple[int, int] | None = None
    while True:
        try:
            status = path.stat()
            mark = (status.st_mtime_ns, status.st_ino)
            if mark != seen:
                seen = mark
                table = codec.decode(path.read_bytes(), RouteTable, max_bytes=MAX_TABLE_BYTES)
                use(table)
                logger.info("routes.taken", generation=table.generation, replicas=sum(len(route.replicas) for route in table.routes))
        except FileNotFoundError:
            pass
        except (OSError, codec.Malformed) as exc:
            logger.error("routes.unreadable", path=str(path), reason=str(exc)[:300])
        if await lifecycle.sleep_until(stop, LOOK_S):
            return
