"""Answers that many ask for and that cost something: made once for all who wait, and again when something changed since."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, TypeVar

from coordinator.news import News

T = TypeVar("T")

MOST = 64
"""Answers that are kept."""
CHEAP_S = 0.05
REST = 4.0
"""What takes longer than CHEAP_S is made again this many times its own duration later at the soonest: a large fleet changes all the time,
and those who look at it must not take the processor from those who run it."""
LONGEST_REST_S = 10.0
BY_ITSELF_S = 1.0
"""How old an answer may be although nothing changed: sums over the last seconds do so by themselves."""


class _Made:
    """One answer, made from what stood in ``version`` of the news; ``cost_s`` is known once it is there."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.task: asyncio.Task[Any] | None = None
        self.ended = 0.0
        self.cost_s = 0.0
        self.earlier: _Made | None = None
        """What is given until it is there."""

    @property
    def is_there(self) -> bool:
        """Whether it was made, and did not fail."""
        return self.task is not None and self.task.done() and not self.task.cancelled() and self.task.exception() is None

    @property
    def age_s(self) -> float:
        """Since it was made."""
        return time.monotonic() - self.ended


class Recent:
    """Kept by key."""

    def __init__(self, news: News, *, by_itself_s: float = BY_ITSELF_S) -> None:
        self._news = news
        self._by_itself_s = by_itself_s
        self._made: OrderedDict[Hashable, _Made] = OrderedDict()

    async def get(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        """The answer, of the last change, or where it is dear one of the last few seconds. Raises what ``make`` raises, to all who wait."""
        held = self._made.get(key)
        made = held if held is not None and self._is_good(held) else self._begin(key, make, before=held)
        self._made.move_to_end(key)
        given = made.earlier if made.earlier is not None and not made.is_there else made
        assert given.task is not None  # noqa: S101 - begun
        answer: T = await asyncio.shield(given.task)
        return answer

    def _begin(self, key: Hashable, make: Callable[[], Awaitable[T]], *, before: _Made | None) -> _Made:
        made = _Made(self._news.version)
        if before is not None:
            made.cost_s = before.cost_s
            if before.is_there and before.cost_s > CHEAP_S and before.age_s < LONGEST_REST_S:
                made.earlier = before  # nobody waits for the new one

        async def timed() -> T:
            began = time.monotonic()
            answer = await make()
            made.ended = time.monotonic()
            made.cost_s = made.ended - began
            made.earlier = None
            return answer

        made.task = asyncio.create_task(timed(), name="coordinator.recent")
        self._made[key] = made
        while len(self._made) > MOST:
            self._made.popitem(last=False)
        return made

    def _is_good(self, held: _Made) -> bool:
        rest_s = min(LONGEST_REST_S, REST * held.cost_s) if held.cost_s > CHEAP_S else 0.0
        is_of_now = held.version == self._news.version
        if held.task is None or not held.task.done():
            return is_of_now or rest_s > 0
        return held.is_there and held.age_s < (max(rest_s, self._by_itself_s) if is_of_now else rest_s)
