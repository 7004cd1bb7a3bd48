"""Which sandboxes a box can offer: the drivers that work here, and those that do not yet, which are tried again.

A container engine comes up when it does: a warden that started before it, or while a disk was full, must not be without it for good.
"""

import asyncio
import contextlib
import itertools
import random
from collections.abc import Callable, Sequence

from edge_agent.warden.ports import Driver, DriverFailed
from skerry.runtime import backoff, lifecycle, log
from skerry.wire.messages import RUNGS, Rung

logger = log.get("warden")

MOST_REASON = 300
"""Characters of why a rung is not offered that are passed on."""
AGAIN_S = (2.0, 60.0)
"""Between two tries: at first, at most."""
FIRST_WITHIN_S, AGAIN_WITHIN_S = 8.0, 30.0
"""How long a try is waited for; at the start all else waits too."""


class Offer:
    """``working`` and ``absent`` are the same objects all along, and hold what was found last. Drivers stand in order of preference."""

    def __init__(self, drivers: Sequence[Driver], *, again_s: tuple[float, float] = AGAIN_S) -> None:
        self.working: list[Driver] = []
        self.absent: dict[Rung, str] = {}
        self.drivers = list(drivers)
        self._again_s = again_s
        self._trying: dict[Driver, asyncio.Task[str]] = {}

    async def look(self, *, within_s: float | None = None) -> bool:
        """Try those that did not work, for so long; whether one does now."""
        waiting = [driver for driver in self.drivers if driver not in self.working]
        reasons = await self._reasons(waiting, within_s)
        found = [driver for driver, reason in zip(waiting, reasons, strict=True) if not reason]
        self.working[:] = [driver for driver in self.drivers if driver in self.working or driver in found]
        offered, names = {driver.rung for driver in self.working}, ", ".join(driver.name for driver in self.drivers)
        said: dict[Rung, str] = dict.fromkeys(RUNGS, f"drivers: no driver of this rung is among {names}")
        said["microvm"] = "this version has no driver for micro virtual machines"
        said |= {driver.rung: reason[:MOST_REASON] for driver, reason in zip(waiting, reasons, strict=True) if reason}
        before = dict(self.absent)
        self.absent.clear()
        self.absent.update({rung: reason for rung, reason in said.items() if rung not in offered})
        for driver, reason in zip(waiting, reasons, strict=True):
            if reason and before.get(driver.rung) != reason[:MOST_REASON]:
                logger.info("driver.absent", driver=driver.name, reason=reason)
            elif not reason and before:
                logger.info("driver.found", driver=driver.name)
        return bool(found)

    async def _reasons(self, waiting: list[Driver], within_s: float | None) -> list[str]:
        """Why each does not work; one that has not said within its time goes on trying."""
        for driver in waiting:
            if driver not in self._trying:
                self._trying[driver] = asyncio.create_task(_reason(driver), name=f"warden.offer.{driver.name}")
        if waiting:
            await asyncio.wait([self._trying[driver] for driver in waiting], timeout=within_s)
        tried = {driver: self._trying.pop(driver) for driver in waiting if self._trying[driver].done()}
        return [tried[driver].result() if driver in tried else f"no answer within {within_s:g} s" for driver in waiting]

    async def run(self, stop: asyncio.Event, on_found: Callable[[], None]) -> None:
        """Try again those that do not work, ever more seldom, until all do or ``stop`` is set."""
        first_s, most_s = self._again_s
        for attempt in itertools.count():
            if len(self.working) == len(self.drivers):
                return
            if await lifecycle.sleep_until(stop, backoff.delay_s(attempt, random.random(), first_s=first_s, most_s=most_s)):
                return
            if await self.look(within_s=AGAIN_WITHIN_S):
                on_found()


async def _reason(driver: Driver) -> str:
    """Why it does not work; empty where it does. One whose sandboxes run here does: to try it takes room on the disk, and a full disk must
    not have them taken for lost."""
    with contextlib.suppress(DriverFailed, OSError):
        if any(sandbox.running for sandbox in await driver.sandboxes()):
            return ""
    return await driver.probe()
