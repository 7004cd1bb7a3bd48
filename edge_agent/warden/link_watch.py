"""How long this box has had no link, across restarts and without a clock: as the agent says, by the time that was proved."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from skerry.runtime import durable, lifecycle, log
from skerry.runtime.proved_time import ProvedTime
from skerry.wire import codec

logger = log.get("warden.link")

GRACE_S = 10.0
"""After its start the warden has heard nothing of the link; until the agent could have said, it is not taken for cut."""
LOOK_S = 5.0


class _Kept(msgspec.Struct, frozen=True):
    """There was a link at ``linked_until_ms``, Unix milliseconds as proved."""

    linked_until_ms: int


class LinkWatch:
    """``state_dir/link.json``. ``keep_every_s`` says how often it is written while the link is there, looked at every ``look_s``."""

    def __init__(self, path: Path, proved: ProvedTime, *, grace_s: float = GRACE_S, look_s: float = LOOK_S) -> None:
        self._path = path
        self._grace_s = grace_s
        self._look_s = look_s
        self._proved = proved
        self._started_at = time.monotonic()
        self._kept_at = self._started_at
        self._up: set[object] = set()
        kept = durable.read(path, _Kept)
        self._linked_until_ms = kept.linked_until_ms if kept is not None else proved.now_at_least_ms()
        self.keep_every_s: Callable[[], float] = lambda: 600.0

    def hear(self, who: object, *, is_up: bool) -> None:
        """What one connection of the agent says; one that ends says that there is no link."""
        was_up = bool(self._up)
        (self._up.add if is_up else self._up.discard)(who)
        if was_up and not self._up:
            self._linked_until_ms = self._proved.now_at_least_ms()
            self._keep()

    @property
    def cut_off_ms(self) -> int:
        """How long there has been no link; 0 while there is one."""
        if self._up or time.monotonic() - self._started_at < self._grace_s:
            return 0
        return max(0, self._proved.now_at_least_ms() - self._linked_until_ms)

    def _keep(self) -> None:
        self._kept_at = time.monotonic()
        self._proved.keep()
        try:
            durable.write(self._path, codec.encode(_Kept(self._linked_until_ms)))
        except OSError as exc:
            logger.error("link.not_kept", reason=exc.strerror)

    async def run(self, stop: asyncio.Event) -> None:
        """Keep it while the link is there, until ``stop`` is set."""
        while not await lifecycle.sleep_until(stop, self._look_s):
            if self._up and time.monotonic() - self._kept_at >= self.keep_every_s():
                self._linked_until_ms = self._proved.now_at_least_ms()
                await asyncio.to_thread(self._keep)
        if self._up:
            self._linked_until_ms = self._proved.now_at_least_ms()
            self._keep()
