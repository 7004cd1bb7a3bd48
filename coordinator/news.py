"""Tells pages that something changed, so that they look again. Carries no data: what a slow reader misses, it reads later."""

import asyncio
import secrets
from collections.abc import AsyncIterator

from skerry.runtime import lifecycle


class News:
    """``tell`` names what changed: ``nodes``, ``deployments``, ``events``, ``metrics``."""

    def __init__(self) -> None:
        self._readers: set[asyncio.Event] = set()
        self._changed_at: dict[str, int] = {}
        """By topic, the version of its last change."""
        self._epoch = secrets.token_hex(4)
        self.version = 0
        """Rises with every change."""

    def tell(self, *topics: str) -> None:
        """Something of each of ``topics`` changed."""
        self.version += 1
        self._changed_at |= dict.fromkeys(topics, self.version)
        for reader in self._readers:
            reader.set()

    async def changed(self, stop: asyncio.Event, *, within_s: float) -> None:
        """Until something changes, ``stop`` is set, or so long."""
        wake = asyncio.Event()
        self._readers.add(wake)
        try:
            await lifecycle.first_of(stop, wake, within_s=within_s)
        finally:
            self._readers.discard(wake)

    @property
    def place(self) -> str:
        """All that was told up to now, for ``since``; of no use to another process."""
        return f"{self._epoch}-{self.version}"

    def since(self, place: str) -> int | None:
        """The version at a place that was told before; None where that was another process, or is none."""
        epoch, _, version = place.partition("-")
        is_ours = epoch == self._epoch and version.isascii() and version.isdigit() and len(version) < 17
        return int(version) if is_ours and int(version) <= self.version else None

    async def follow(self, *, since: int, pause_s: float, idle_s: float) -> AsyncIterator[list[str]]:
        """Topics that changed after version ``since``, then those that changed since the last time, at most every ``pause_s``; an empty
        list after ``idle_s`` of silence."""
        wake = asyncio.Event()
        self._readers.add(wake)
        if since != self.version:
            wake.set()
        try:
            while True:
                try:
                    await asyncio.wait_for(wake.wait(), idle_s)
                except TimeoutError:
                    yield []
                    continue
                wake.clear()
                changed = [topic for topic, version in self._changed_at.items() if version > since]
                since = self.version
                yield changed
                await asyncio.sleep(pause_s)
        finally:
            self._readers.discard(wake)
