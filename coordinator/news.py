"""Tells pages that something changed, so that they look again. Carries no data: what a slow reader misses, it reads later."""

import asyncio
from collections.abc import AsyncIterator

from skerry.runtime import lifecycle


class News:
    """``tell`` names what changed: ``nodes``, ``deployments``, ``events``, ``metrics``."""

    def __init__(self) -> None:
        self._readers: set[asyncio.Event] = set()
        self._versions: dict[str, int] = {}
        self.version = 0
        """Rises with every change."""

    def tell(self, *topics: str) -> None:
        """Something of each of ``topics`` changed."""
        self.version += 1
        for topic in topics:
            self._versions[topic] = self._versions.get(topic, 0) + 1
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

    async def follow(self, *, pause_s: float, idle_s: float) -> AsyncIterator[list[str]]:
        """Topics that changed since the last time, at most every ``pause_s``; an empty list after ``idle_s`` of silence."""
        wake = asyncio.Event()
        self._readers.add(wake)
        seen = dict(self._versions)
        try:
            while True:
                try:
                    await asyncio.wait_for(wake.wait(), idle_s)
                except TimeoutError:
                    yield []
                    continue
                wake.clear()
                changed = [topic for topic, version in self._versions.items() if seen.get(topic) != version]
                seen = dict(self._versions)
                yield changed
                await asyncio.sleep(pause_s)
        finally:
            self._readers.discard(wake)
