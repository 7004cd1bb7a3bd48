"""The time that a program judges by on a box, whose clock may say 1970 or two years ahead: what signed documents have proved, and what has
passed since on a clock that only runs forward."""

import asyncio
import time
from pathlib import Path

from skerry.runtime import durable, lifecycle, log
from skerry.wire import codec
from skerry.wire.proof import Proof, later

logger = log.get("proved_time")

KEEP_EVERY_S = 600.0
"""What a power cut may cost of what had passed."""


def uptime_ms() -> int:
    """How long the machine has run; it counts while it sleeps too."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class ProvedTime:
    """Never says less than before: across restarts, where a ``path`` is given. A damaged file costs what it held."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._kept_ms = 0
        self._proof = Proof(0, uptime_ms())
        if path is not None and (held := durable.read(path, Proof)) is not None:
            self._proof = Proof(held.at_least_ms(uptime_ms()), uptime_ms())
            self._kept_ms = self._proof.moment_ms

    @property
    def proof(self) -> Proof:
        """For other programs of this machine. It stays the same until something proves more."""
        return self._proof

    def now_at_least_ms(self) -> int:
        """A moment that has passed for sure, Unix milliseconds; 0 and what has passed since where nothing was proved yet."""
        return self._proof.at_least_ms(uptime_ms())

    def prove(self, moment_ms: int) -> None:
        """A moment that has passed, as something signed says."""
        self.believe(Proof(moment_ms, uptime_ms()))

    def believe(self, proof: Proof) -> None:
        """What another program of this machine knows."""
        self._proof = later(self._proof, proof, uptime_ms())

    def keep(self) -> None:
        """Have it last over a restart. What the disk does not take is tried again with the next."""
        now = uptime_ms()
        moment_ms = self._proof.at_least_ms(now)
        if self._path is None or moment_ms <= self._kept_ms:
            return
        try:
            durable.write(self._path, codec.encode(Proof(moment_ms, now)))
        except OSError as exc:
            logger.error("proved_time.not_kept", path=str(self._path), reason=exc.strerror)
        else:
            self._kept_ms = moment_ms

    async def run(self, stop: asyncio.Event) -> None:
        """Keep it now and then, until ``stop`` is set, and once more."""
        while not await lifecycle.sleep_until(stop, KEEP_EVERY_S):
            await asyncio.to_thread(self.keep)
        self.keep()
