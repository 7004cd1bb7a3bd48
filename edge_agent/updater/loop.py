"""The loop that brings a box to another release of its own programs, and back if it is no good. What to do is edge_agent.core.update's to
say; each step is on the disk before it is taken, so that whoever takes it up after a power cut goes on from there."""

import asyncio
import time
from pathlib import Path
from typing import assert_never

import msgspec

from edge_agent.core import update
from edge_agent.core.update import Limits, Point, Restart, Seen, Settle, TurnBack, Wait, Watch
from edge_agent.updater.ports import AGENT, PROGRAMS, Box, Manager, NotPrepared, Releases
from edge_agent.updater.record import RecordFile
from skerry.runtime import lifecycle
from skerry.wire.box import Update
from skerry.wire.messages import Software

LOOK_EVERY_S = 0.5


class Updater:
    """Runs until there is nothing to change."""

    def __init__(self, record: RecordFile, releases: Releases, manager: Manager, box: Box, limits: Limits) -> None:
        self._file = record
        self._releases = releases
        self._manager = manager
        self._box = box
        self._limits = limits
        self.pulse = lifecycle.Pulse()

    async def run(self, stop: asyncio.Event) -> None:
        """Take up what was under way, then what is wanted, until that is done or ``stop`` is set. Raises OSError."""
        if (held := self._file.record.under_way) is not None:
            again = msgspec.structs.replace(held, begun=held.begun + 1)
            self._keep(again, "software.resumed", f"for the {again.begun}. time, {again.stage}")
        is_sure = False
        while not stop.is_set():
            software, path = self._box.wanted()
            if self._file.record.under_way is None:
                following = update.wanted_next(self._file.record, software, self._releases.current())
                if following is None and is_sure:
                    return
                if following is None:
                    is_sure = not await lifecycle.sleep_until(stop, self._limits.linger_s)
                    continue
                is_sure = False
                self._keep(update.begun(following, self._releases.current()), "software.preparing", is_vital=True)
            held = self._file.record.under_way
            if held is not None and held.stage == "preparing":
                if software is None or update.key(software) != update.key(held):
                    record = msgspec.structs.replace(self._file.record, under_way=None)
                    self._file.keep(record, "software.dropped", held.version, "it is wanted no more")
                    continue
                await self._prepare(held, software, path)
                continue
            await self._change(stop)

    def _keep(self, change: Update, kind: str, text: str = "", *, is_vital: bool = False) -> None:
        record = msgspec.structs.replace(self._file.record, under_way=change)
        self._file.keep(record, kind, change.version, text, is_vital=is_vital)

    def _settle(self, *, is_good: bool) -> None:
        held = self._file.record.under_way
        if held is None:
            return
        if is_good:
            self._releases.prove(held.version)
        text = f"in place of {held.before}" if is_good else f"{held.reason}; {held.before} is back" if held.units else held.reason
        self._file.keep(
            update.settled(self._file.record, is_good=is_good), "software.done" if is_good else "software.failed", held.version, text
        )

    async def _prepare(self, held: Update, software: Software, path: Path) -> None:
        """Unpack and try it; what comes next is a trial, or the end."""
        try:
            if held.begun > self._limits.most_begun:
                raise NotPrepared(f"it was begun {held.begun} times and never came through")
            await self._releases.prepare(software, path)
        except NotPrepared as exc:
            self._keep(msgspec.structs.replace(held, reason=str(exc)), "software.refused", str(exc))
            self._settle(is_good=False)
            return
        units = self._releases.changed(held.before, held.version)
        waiting = await self._box.waiting_for()
        known = None if waiting is None else sorted(waiting)
        ready = msgspec.structs.replace(held, stage="trial", units=units, waiting_for=known)
        self._keep(ready, "software.trial", f"{', '.join(units)} start anew from it, after {held.before}", is_vital=True)

    async def _change(self, stop: asyncio.Event) -> None:
        """Steps until it is settled."""
        watch = Watch()
        while not stop.is_set():
            self.pulse.beat()
            held = self._file.record.under_way
            if held is None:
                return
            seen, now_s = await self._look(held), time.monotonic()
            watch = update.watched(watch, held, seen, now_s)
            step = update.next_step(held, seen, watch, now_s, self._limits)
            if isinstance(step, Wait):
                await lifecycle.sleep_until(stop, LOOK_EVERY_S)
                continue
            if isinstance(step, Restart):
                watch = msgspec.structs.replace(watch, restarted_s=now_s)
            await self._act(step, held)

    async def _act(self, step: Point | Restart | TurnBack | Settle, held: Update) -> None:
        match step:
            case Point(version):
                self._releases.point(version, before=held.before)
                await self._manager.reload()  # whatever changed: another life may have changed it, and been cut off
            case Restart(units):
                await self._manager.restart(units)
            case TurnBack(reason, is_unreached):
                back = msgspec.structs.replace(held, stage="returning", reason=reason, is_unreached=is_unreached)
                self._keep(back, "software.returning", reason)
            case Settle(is_good):
                self._settle(is_good=is_good)
            case _:
                assert_never(step)

    async def _look(self, held: Update) -> Seen:
        pids = await self._manager.look(PROGRAMS)
        return Seen(
            current=self._releases.current(),
            units={name: one.unit for name, one in pids.items()},
            is_heard=self._box.is_heard(update.aim(held), pids[AGENT].pid),
            waiting_for=await self._box.waiting_for(),
        )
