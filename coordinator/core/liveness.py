"""Whether a box is there, and for how long it has not been. Pure.

A crash can't be told from a cut link: a box that is not heard is *unknown*, and *lost* only once it was not heard for as long as somebody
said. A link that flaps does not make its box come and go: silence ends when the box has been there for STEADY_MS.
"""

from collections.abc import Iterable, Mapping

import msgspec

SILENT_AFTER_S = 150.0
"""Boxes repeat their report every minute; two may get lost."""
STEADY_MS = 30_000
"""How long a box must be connected before its silence is over."""


class Contact(msgspec.Struct, frozen=True):
    """``since_ms`` is when the box was last connected or cut off; ``silent_since_ms`` when the silence began that is not over, or was
    not when the box came back; 0 for none."""

    online: bool
    since_ms: int
    silent_since_ms: int = 0

    def after(self, *, online: bool, now_ms: int) -> "Contact":
        """Once it is connected, or cut off, at ``now_ms``."""
        if online and self.online:  # another connection before the end of the last was noticed
            return Contact(True, self.since_ms, 0 if self._is_over(now_ms) else self.silent_since_ms)
        if online:
            return Contact(True, now_ms, self.silent_since_ms)
        return Contact(False, now_ms, now_ms if self._is_over(now_ms) else self.silent_since_ms)

    def _is_over(self, now_ms: int) -> bool:
        """Whether there is no silence, or there was one and the box has been back for long enough."""
        return not self.silent_since_ms or (self.online and now_ms - self.since_ms >= STEADY_MS)

    def silent_ms(self, now_ms: int) -> int:
        """How long it has been silent; 0 for a box that is there. While one that came back may go again, it stays what it was."""
        if self._is_over(now_ms):
            return 0
        return max(0, (self.since_ms if self.online else now_ms) - self.silent_since_ms)

    def next_change_ms(self, now_ms: int, lost_after_ms: Iterable[int]) -> int | None:
        """When it will be steady again, or silent for one of these; None for never, if nothing happens."""
        if self._is_over(now_ms):
            return None
        if self.online:
            return self.since_ms + STEADY_MS
        silent_ms = self.silent_ms(now_ms)
        return min((self.silent_since_ms + after_ms for after_ms in lost_after_ms if after_ms > silent_ms), default=None)


def silent(online: Mapping[str, int], heard_at_ms: Mapping[str, int], *, connected_since_ms: int, now_ms: int) -> list[str]:
    """Boxes that are said to be connected and were not heard for too long: their broker may have died with their Last Will.

    ``online`` maps a box to when it connected, ``heard_at_ms`` to its last message. The time before our own connect does not count:
    nobody could be heard then.
    """
    return sorted(
        node
        for node, since_ms in online.items()
        if now_ms - max(since_ms, heard_at_ms.get(node, 0), connected_since_ms) > SILENT_AFTER_S * 1000
    )


class Ear(msgspec.Struct, frozen=True):
    """The moment up to which silence is counted. While the coordinator hears nobody itself it stands still, and after that until
    everybody could be heard: it only ever goes forward."""

    heard_until_ms: int = 0

    def after(self, *, listening_since_ms: int, now_ms: int) -> "Ear":
        """``listening_since_ms`` is when the coordinator last connected to the broker; 0 while it is not connected."""
        if counts_again_at_ms(listening_since_ms=listening_since_ms, now_ms=now_ms) != now_ms:
            return self
        return Ear(max(self.heard_until_ms, now_ms))


def counts_again_at_ms(*, listening_since_ms: int, now_ms: int) -> int | None:
    """When silence goes on, which may be now; None while nobody can say."""
    return max(now_ms, listening_since_ms + SETTLE_MS) if listening_since_ms else None


SETTLE_MS = 5_000
"""After a connect the broker tells who is there; until then silence says nothing."""
