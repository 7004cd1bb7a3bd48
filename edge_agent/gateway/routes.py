"""The route table's file, read again whenever the warden has replaced it."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from skerry.runtime import lifecycle, log
from skerry.wire import codec
from skerry.wire.box import RouteTable

logger = log.get("gateway.routes")

LOOK_S = 0.1
LOOK_AGAIN_S = 0.005
"""Whoever would otherwise have to refuse a request looks at once, but no more often than this."""
MAX_TABLE_BYTES = 16 * 1024 * 1024


class Follower:
    """Hands every new table to ``use``. A missing or damaged file changes nothing: what is served goes on being served."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._looked_at = 0.0
        self.use: Callable[[RouteTable], None] = lambda _: None

    def look(self) -> None:
        """Take the table if it is a new one."""
        now = time.perf_counter()
        if now - self._looked_at < LOOK_AGAIN_S:
            return
        self._looked_at = now
        try:
            status = self._path.stat()
            mark = (status.st_mtime_ns, status.st_ino)
            if mark == self._seen:
                return
            self._seen = mark
            table = codec.decode(self._path.read_bytes(), RouteTable, max_bytes=MAX_TABLE_BYTES)
        except FileNotFoundError:
            return
        except (OSError, codec.Malformed) as exc:
            logger.error("routes.unreadable", path=str(self._path), reason=str(exc)[:300])
            return
        self.use(table)
        logger.info("routes.taken", generation=table.generation, replicas=sum(len(route.replicas) for route in table.routes))

    async def follow(self, stop: asyncio.Event) -> None:
        """Look every LOOK_S until ``stop``."""
        while not await lifecycle.sleep_until(stop, LOOK_S):
            self.look()
