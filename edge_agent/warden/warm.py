"""Sandboxes started ahead: a worker that has imported all it needs and waits for its model. How many is core/pool's to say."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import msgspec

from edge_agent.core import pool
from edge_agent.core.admission import Holding
from edge_agent.core.crash import Attempts
from edge_agent.core.pool import Demand, Kind
from edge_agent.warden import launch
from edge_agent.warden.config import Config
from edge_agent.warden.journal import Journal
from edge_agent.warden.ports import Driver, DriverFailed
from edge_agent.warden.slots import Slots
from skerry.runtime import log
from skerry.wire.messages import ReplicaSpec

logger = log.get("warden.warm")

DEMANDS_KEPT = 256
YOUNG_S = 30.0
"""One started less than this long ago is not given back for want of demand: its start would have been for nothing."""
PAUSE_AFTER_FAILURE_S = 60.0
STOP_GRACE_S, STOPPED_WITHIN_S = 0.5, 5.0


class Warm(msgspec.Struct):
    """A warm sandbox. ``is_waiting`` once its worker asks for a model."""

    kind: Kind
    driver: Driver
    since: float
    is_waiting: bool = False


class WarmPool:
    """Owns the warm sandboxes of a box, until one is taken."""

    def __init__(self, config: Config, slots: Slots, journal: Journal) -> None:
        self._most = config.warm_most
        self._keep_s = config.warm_keep_s
        self._slots = slots
        self._journal = journal
        self._held: dict[str, Warm] = {}
        self._demands: deque[Demand] = deque(maxlen=DEMANDS_KEPT)
        self._paused_until = 0.0
        self._starting: asyncio.Task[None] | None = None
        self._starting_name = ""

    @property
    def holdings(self) -> Mapping[str, Holding]:
        """What they hold, by sandbox name."""
        return {name: Holding(warm.kind.memory_bytes) for name, warm in self._held.items()}

    @property
    def kinds(self) -> dict[str, Kind]:
        """What there is, by sandbox name."""
        return {name: warm.kind for name, warm in self._held.items()}

    def adopt(self, name: str, kind: Kind, driver: Driver) -> None:
        """One that an earlier warden started."""
        self._held[name] = Warm(kind, driver, time.monotonic())

    def demand(self, kind: Kind, deadline_ms: int) -> None:
        """A replica of this kind was started."""
        self._demands.append(Demand(kind, time.monotonic(), deadline_ms))

    def takes(self, spec: ReplicaSpec, driver: Driver) -> list[str]:
        """Those that may become this replica, the oldest first. One with a GPU or a server of its own is never started ahead."""
        if spec.server is not None or spec.gpu_memory_bytes:
            return []
        kind = launch.kind_of(spec, driver)
        fitting = [(warm.since, name) for name, warm in self._held.items() if warm.kind == kind and warm.is_waiting]
        return [name for _, name in sorted(fitting)]

    async def take(self, name: str, replica: ReplicaSpec, model: Path, attempts: Attempts) -> Driver:
        """Hand one over: from now on it is ``replica``'s. Raises OSError where it can't be; it is gone then."""
        warm = self._held.pop(name)
        try:
            self._slots.claim(name, replica, model, attempts)
            await launch.tell(self._slots.socket_dir(name), replica.model)
        except (OSError, TimeoutError) as exc:
            await self._stop(name, warm)
            raise OSError(f"the warm sandbox {name} could not be told its model: {exc or type(exc).__name__}") from exc
        return warm.driver

    async def give_back(self, name: str, reason: str) -> bool:
        """Stop one; says whether it is gone."""
        if name == self._starting_name and self._starting is not None:
            await asyncio.wait([self._starting])
        warm = self._held.pop(name, None)
        if warm is None:
            return True
        self._say("warm.given_back", name, f"{launch.in_words(warm.kind)}: {reason}")
        return await self._stop(name, warm)

    async def _stop(self, name: str, warm: Warm) -> bool:
        try:
            await asyncio.wait_for(warm.driver.stop(name, grace_s=STOP_GRACE_S), STOPPED_WITHIN_S)
        except (DriverFailed, TimeoutError) as exc:
            logger.warning("warm.not_stopped", sandbox=name, reason=str(exc) or "no answer")
            self._held[name] = msgspec.structs.replace(warm, is_waiting=False)
            return False
        self._slots.close(name)
        return True

    async def look(self, driver: Driver, running: set[str], *, asked_at: float) -> None:
        """``running`` ran at ``asked_at``, as this driver says; those of ours that did not have ended. One that oversteps is ended."""
        for name, warm in list(self._held.items()):
            if warm.driver is not driver or name == self._starting_name or warm.since > asked_at:
                continue
            reason = await asyncio.to_thread(self._slots.overfull, name) if name in running else "it ended"
            if reason:
                self._paused_until = time.monotonic() + PAUSE_AFTER_FAILURE_S
                await self.give_back(name, reason)

    def notice(self) -> None:
        """See who waits for a model by now."""
        for name, warm in self._held.items():
            warm.is_waiting = warm.is_waiting or launch.is_waiting(self._slots.socket_dir(name))

    async def tend(self, drivers: list[Driver], *, free_bytes: int) -> bool:
        """Become as many as core/pool wants: stop what is too much, begin to start one that is missing. ``free_bytes`` is theirs in all;
        what ``drivers`` do not have is left alone.

        Says whether it goes on: one is started at a time, so that a deploy never waits behind several.
        """
        if self._starting is not None and not self._starting.done():
            return True
        now = time.monotonic()
        want = pool.wanted(list(self._demands), free_bytes=free_bytes, most=self._most, now_s=now, keep_s=self._keep_s)
        young = {name for name, warm in self._held.items() if now - warm.since < YOUNG_S}
        to_start, to_stop = pool.changes(want, self.kinds, young=young)
        by_name = {driver.name: driver for driver in drivers}
        for name in to_stop:
            if self._held[name].kind.driver in by_name:
                await self.give_back(name, "no recent start of this kind")
        startable = [kind for kind in to_start if kind.driver in by_name]
        if not startable or now < self._paused_until:
            return False
        self._starting = asyncio.create_task(self._start(startable[0], by_name[startable[0].driver]), name="warden.warm")
        return True

    async def _start(self, kind: Kind, driver: Driver) -> None:
        name = self._starting_name = launch.new_name("warm")
        warm = self._held[name] = Warm(kind, driver, time.monotonic())
        try:
            slot = self._slots.open(name, driver=driver.name, kind=kind, replica=None, model=None, attempts=Attempts())
            await driver.start(launch.sandbox_spec(name, slot, self._slots))
        except (DriverFailed, OSError) as exc:
            logger.warning("warm.not_started", kind=launch.in_words(kind), reason=str(exc))
            self._paused_until = time.monotonic() + PAUSE_AFTER_FAILURE_S
            self._held.pop(name, None)
            await self._stop(name, warm)
        else:
            warm.since = time.monotonic()
            self._say("warm.started", name, launch.in_words(kind))
        finally:
            self._starting_name = ""
            self._journal.flush()  # the loop may rest for a while

    async def close(self) -> None:
        """Let a start that is under way end, so that what it started is on record."""
        if self._starting is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._starting), 4.0)

    def _say(self, kind: str, subject: str, text: str) -> None:
        self._journal.note(kind, subject, text, at_ms=time.time_ns() // 1_000_000)
        logger.info(kind, subject=subject, text=text)
