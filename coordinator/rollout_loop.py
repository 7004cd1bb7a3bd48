"""Looks again and again at what spreads in waves, changes of deployments and releases of the box software."""

import asyncio
import time
from collections.abc import Callable

import msgspec
from sqlite_utils import Database as Tables

from coordinator import deployment_rollout, software_rollout
from coordinator.news import News
from coordinator.registry import releases, rollouts
from coordinator.registry.database import Database, RegistryFailed
from skerry.runtime import lifecycle, log
from skerry.wire import codec

logger = log.get("coordinator.rollout")

LOOK_EVERY_S = 1.0
REST = 4.0
"""A look is followed by a rest of so many times as long as it took."""
IDLE_S = 60.0


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _is_spreading(tables: Tables) -> bool:
    spread = releases.read_spread(tables)
    return bool(rollouts.read_active(tables)) or (spread is not None and not spread.state.is_over)


class RolloutLoop:
    """``wake`` asks for a look; while something spreads it looks every second by itself."""

    def __init__(self, database: Database, news: News, *, replan: Callable[[], None]) -> None:
        self._database = database
        self._news = news
        self._replan = replan
        self._wake = asyncio.Event()
        self._wake.set()
        self.pulse = lifecycle.Pulse()

    def wake(self) -> None:
        """Look soon."""
        self._wake.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop`` is set."""
        pause_s = 0.0
        while not stop.is_set():
            self.pulse.beat()
            await lifecycle.first_of(self._wake, stop, within_s=pause_s)
            self._wake.clear()
            if stop.is_set():
                return
            pause_s = await self._look()

    async def _look(self) -> float:
        """Returns how long to rest."""
        began_s = time.monotonic()
        try:
            changed = await self._database.write(lambda tables: deployment_rollout.turn(tables, now_ms=_now_ms()))
            release = await self._database.write(lambda tables: software_rollout.turn(tables, now_ms=_now_ms()))
            active = bool(changed) or release is not None or await self._database.read(_is_spreading)
        except (RegistryFailed, msgspec.DecodeError, codec.Malformed) as exc:
            logger.error("rollout.failed_to_look", reason=str(exc))
            return LOOK_EVERY_S
        for one in changed:
            logger.info("rollout", deployment=one.deployment, phase=one.state.phase, waves=len(one.state.waves), reason=one.state.reason)
        if release is not None:
            state = release.state
            logger.info("rollout", software=release.version, phase=state.phase, waves=len(state.waves), reason=state.reason)
        if changed or release is not None:
            self._news.tell("deployments", "events")
            self._replan()
        return max(LOOK_EVERY_S, REST * (time.monotonic() - began_s)) if active else IDLE_S
