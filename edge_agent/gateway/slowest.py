"""The requests of the last hour that took longest, for whoever wants to know where the time went."""

import heapq
from collections import deque

import msgspec

from skerry.wire.decision import MOST_KEPT_MIN
from skerry.wire.slowest import MOST_TIMING, SlowRequest

SLOT_MS = 300_000
MOST = 10
"""Of one deployment in each slot: one bad quarter of an hour does not hide the others."""
SLOTS = MOST_KEPT_MIN * 60_000 // SLOT_MS
MOST_WORDS = 300
MOST_NAME = 128
"""Another box says what it is called, and what took it how long."""


class _Slot(msgspec.Struct):
    """``heap`` has the least slow in front; the number keeps those that took alike apart."""

    began_ms: int
    heap: list[tuple[float, int, SlowRequest]]


class SlowestKept:
    """By deployment."""

    def __init__(self) -> None:
        self._held: dict[str, deque[_Slot]] = {}
        self._number = 0

    def wants(self, deployment: str, took_ms: float, *, at_ms: int) -> bool:
        """Whether such a request is among the slowest of its time."""
        held = self._held.get(deployment)
        slot = held[-1] if held and held[-1].began_ms == _began(at_ms) else None
        return slot is None or len(slot.heap) < MOST or took_ms > slot.heap[0][0]

    def take(self, deployment: str, request: SlowRequest) -> None:
        """Put one by that is wanted."""
        held = self._held.setdefault(deployment, deque(maxlen=SLOTS))
        if not held or held[-1].began_ms != _began(request.at_ms):
            held.append(_Slot(_began(request.at_ms), []))
        self._number += 1
        texts = {"reason": request.reason[:MOST_WORDS], "timing": request.timing[:MOST_TIMING], "node": request.node[:MOST_NAME]}
        one = (request.took_ms, self._number, msgspec.structs.replace(request, **texts))
        heap = held[-1].heap
        if len(heap) < MOST:
            heapq.heappush(heap, one)
        else:
            heapq.heappushpop(heap, one)

    def keep(self, deployments: set[str]) -> None:
        """Forget the others'."""
        for name in [name for name in self._held if name not in deployments]:
            del self._held[name]

    def since(self, deployment: str, at_ms: int) -> list[SlowRequest]:
        """Those of one deployment from then on, the slowest first."""
        found = [one for slot in self._held.get(deployment, ()) for one in slot.heap if one[2].at_ms >= at_ms]
        return [one[2] for one in sorted(found, key=lambda one: (-one[0], one[1]))]


def _began(at_ms: int) -> int:
    return at_ms // SLOT_MS * SLOT_MS
