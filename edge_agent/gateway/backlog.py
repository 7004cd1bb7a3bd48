"""Those of one deployment who wait for a replica, by priority, and how many come of each: what a decision asks for is always at hand."""

import math
from bisect import bisect_left, insort

from edge_agent.core import queueing
from edge_agent.core.queueing import LOWEST, Place
from edge_agent.gateway.calls import Job

REMEMBER_S = 2.0
"""Over about so long arrivals are counted."""
MOST_PRIORITIES = 64
"""Of which arrivals are counted apart; callers choose them."""


def _rank(job: Job) -> tuple[int, float, int]:
    return job.rank


class Backlog:
    """At most ``limit`` jobs, those to be served first in front."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._jobs: list[Job] = []
        self._waiting: dict[int, list[int]] = {}
        """By priority as it ranks: how many wait, and of how many rows."""
        self._arrivals: dict[int, tuple[float, float]] = {}
        """By priority as it ranks: rows a second, as of when."""

    def __len__(self) -> int:
        return len(self._jobs)

    def __getitem__(self, index: int) -> Job:
        return self._jobs[index]

    def beside(self, index: int) -> list[Job]:
        """Those from ``index`` on that may share a run with the one there, which comes first."""
        kind = self._jobs[index].kind
        return [job for job in self._jobs[index:] if job.kind == kind and not job.future.done()]

    def arrived(self, place: Place, now_s: float) -> None:
        """Count one that came, whether it then waits or not."""
        key = place.priority or LOWEST
        if key in self._arrivals or len(self._arrivals) < MOST_PRIORITIES:
            rate, at_s = self._arrivals.get(key, (0.0, now_s))
            self._arrivals[key] = (rate * math.exp((at_s - now_s) / REMEMBER_S) + place.rows / REMEMBER_S, now_s)

    def rows_per_s_above(self, priority: int, now_s: float) -> float:
        """How many rows come that go before one of ``priority``."""
        if len(self._arrivals) < 2:
            return 0.0
        own = priority or LOWEST
        return sum(rate * math.exp((at_s - now_s) / REMEMBER_S) for key, (rate, at_s) in self._arrivals.items() if key < own)

    def ahead(self, priority: int) -> tuple[int, int]:
        """How many wait, of how many rows, that go before one of ``priority`` that comes now."""
        own = priority or LOWEST
        before = [counts for key, counts in self._waiting.items() if key <= own]
        return sum(count for count, _ in before), sum(rows for _, rows in before)

    def makes_way(self, place: Place) -> bool:
        """Whether somebody would have to leave for one that comes now, and would."""
        return len(self._jobs) >= self.limit > 0 and max(self._waiting, default=0) > (place.priority or LOWEST)

    def add(self, job: Job) -> Job | None:
        """Queue it; where it is full, whoever has to go instead: the job itself, or one that is less urgent."""
        victim: Job | None = None
        if len(self._jobs) >= self.limit:
            index = queueing.to_shed([waiting.place for waiting in self._jobs], job.place, limit=self.limit)
            if index is not None and index < 0:
                return job
            victim = self._jobs[index] if index is not None else None
            if victim is not None:
                self.remove(victim)
        insort(self._jobs, job, key=_rank)
        counts = self._waiting.setdefault(job.rank[0], [0, 0])
        counts[0] += 1
        counts[1] += job.place.rows
        return victim

    def remove(self, job: Job) -> None:
        """Take it out, if it is in."""
        index = bisect_left(self._jobs, job.rank, key=_rank)
        if index < len(self._jobs) and self._jobs[index] is job:
            del self._jobs[index]
            counts = self._waiting[job.rank[0]]
            counts[0] -= 1
            counts[1] -= job.place.rows
            if not counts[0]:
                del self._waiting[job.rank[0]]
