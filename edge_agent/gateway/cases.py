"""What requests of the last hour were decided by, a few of each minute, for whoever wants to know what would have become of them."""

import random
from collections import deque

import msgspec

from edge_agent.core.replay import Case
from skerry.wire.decision import MOST_KEPT_MIN

EVERY_MS = 10_000
"""One of the requests that come within this time is kept, whichever: it stands for all of them."""
KEPT_MS = MOST_KEPT_MIN * 60_000
MOST = 2048
"""Over all deployments, some kilobytes each: where there are many, each has fewer, and so not of the whole hour."""


class Kept(msgspec.Struct):
    """A case that stands for ``count`` requests."""

    case: Case
    count: int = 1


class Cases:
    """By deployment."""

    def __init__(self) -> None:
        self._held: dict[str, deque[Kept]] = {}

    def note(self, deployment: str, case: Case) -> None:
        """A request was decided by this."""
        held = self._held.get(deployment)
        if held is None:
            held = self._held[deployment] = deque()
            for each in self._held.values():
                _cut(each, MOST // len(self._held))
        if held and held[-1].case.at_ms // EVERY_MS == case.at_ms // EVERY_MS:
            held[-1].count += 1
            if random.random() * held[-1].count < 1:
                held[-1].case = case
            return
        held.append(Kept(case))
        _cut(held, MOST // len(self._held))
        while held[0].case.at_ms < case.at_ms - KEPT_MS:
            held.popleft()

    def keep(self, deployments: set[str]) -> None:
        """Forget the others'."""
        for name in [name for name in self._held if name not in deployments]:
            del self._held[name]

    def since(self, deployment: str, at_ms: int) -> list[Kept]:
        """Those of one deployment from then on, the oldest first."""
        return [one for one in self._held.get(deployment, ()) if one.case.at_ms >= at_ms]


def _cut(held: deque[Kept], most: int) -> None:
    """Keep the latest, one at the least."""
    while len(held) > max(1, most):
        held.popleft()
