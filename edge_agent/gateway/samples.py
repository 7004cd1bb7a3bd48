"""Decisions put by for people: a few of each kind, so that whoever asks why a request went where it went finds one like it."""

import time
from collections import deque

from edge_agent.gateway.cases import Cases
from edge_agent.gateway.slowest import SlowestKept
from skerry.wire.box import Routed

EVERY_S = 30.0
"""Of one deployment and one kind; a kind that was not seen for so long is put by at once."""
MOST = 64


class Samples:
    """The latest samples, for the agent and for ``skerry explain``. ``cases`` is what decisions were made from, to make them anew;
    ``slowest`` are the requests that took longest."""

    def __init__(self, *, first_seq: int = 1) -> None:
        self.cases = Cases()
        self.slowest = SlowestKept()
        self._next_seq = first_seq
        self._latest: deque[Routed] = deque(maxlen=MOST)
        self._taken_at: dict[tuple[str, str], float] = {}

    def keep(self, deployments: set[str]) -> None:
        """Forget of the others what is not told by itself."""
        self.cases.keep(deployments)
        self.slowest.keep(deployments)

    def wants(self, deployment: str, kind: str, *, now_s: float) -> bool:
        """Whether a decision of that kind should be put by now."""
        return now_s - self._taken_at.get((deployment, kind), -EVERY_S) >= EVERY_S

    def take(self, deployment: str, kind: str, text: str, *, now_s: float) -> None:
        """Put one by."""
        self._taken_at[deployment, kind] = now_s
        self._latest.append(Routed(self._next_seq, time.time_ns() // 1_000_000, deployment, text))
        self._next_seq += 1

    def latest(self) -> list[Routed]:
        """All that are held, the oldest first."""
        return list(self._latest)

    def of(self, deployment: str) -> list[Routed]:
        """Those of one deployment, the newest first."""
        return [one for one in reversed(self._latest) if one.deployment == deployment]
