"""What must be done now and then: silent boxes are noticed, old measurements and events go."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from sqlite_utils import Database as Tables

from coordinator.core.liveness import silent
from coordinator.live import Live
from coordinator.news import News
from coordinator.registry import events, measurements, nodes
from coordinator.registry.database import Database, RegistryFailed
from skerry.runtime import lifecycle, log
from skerry.wire.messages import Presence

logger = log.get("coordinator.housekeeping")

LOOK_S = 10.0
TIDY_EVERY = 30


class Housekeeping:
    """Looks every LOOK_S, tidies every TIDY_EVERY looks."""

    def __init__(
        self,
        database: Database,
        live: Live,
        news: News,
        *,
        keep_rollups_h: int,
        keep_events: int,
        listening_since_ms: Callable[[], int],
        refresh_list: Callable[[], Awaitable[None]],
        write_uses: Callable[[], Awaitable[None]],
    ) -> None:
        self._database = database
        self._live = live
        self._news = news
        self._keep_rollups_h = keep_rollups_h
        self._keep_events = keep_events
        self._listening_since_ms = listening_since_ms
        self._refresh_list = refresh_list
        self._write_uses = write_uses
        self.pulse = lifecycle.Pulse()

    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop`` is set."""
        looks = 0
        self.pulse.beat()
        while not await lifecycle.sleep_until(stop, LOOK_S):
            looks += 1
            self.pulse.beat()
            try:
                await self._notice_silence()
                if looks % TIDY_EVERY == 0:
                    await self._database.write(self._tidy)
                    await self._refresh_list()
                    await self._write_uses()
            except (RegistryFailed, OSError) as exc:
                logger.error("housekeeping.failed", reason=str(exc))

    async def _notice_silence(self) -> None:
        now_ms = time.time_ns() // 1_000_000
        listening_since_ms = self._listening_since_ms()
        if not listening_since_ms:
            return
        boxes = {node.id: node for node in await self._database.read(nodes.read_nodes) if node.online}
        gone = silent(
            {node.id: node.changed_at_ms for node in boxes.values()},
            self._live.heard_at_ms,
            connected_since_ms=listening_since_ms,
            now_ms=now_ms,
        )
        if not gone:
            return

        def work(tables: Tables) -> None:
            for name in gone:
                nodes.save_presence(tables, name, Presence(False, "", boxes[name].session_epoch), now_ms)
                events.add_own_event(tables, name, "node.silent", name, "nothing heard: a crash can't be told from a cut link", now_ms)

        await self._database.write(work)
        self._news.tell("nodes", "events")

    def _tidy(self, tables: Tables) -> None:
        measurements.forget_before(tables, int(time.time()) - self._keep_rollups_h * 3600)
        events.forget_events(tables, keep=self._keep_events)
