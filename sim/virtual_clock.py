"""Time that passes when it is told to: a minute of a fleet is over in milliseconds."""

import heapq
import itertools
from collections.abc import Callable


class Clock:
    """Seconds since the start; what is to be done at a moment is done in the order of moments."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def after(self, seconds: float, work: Callable[[], None]) -> None:
        """Do it then."""
        heapq.heappush(self._due, (self.now_s + seconds, next(self._numbers), work))

    def run(self, until_s: float) -> None:
        """Until that moment."""
        while self._due and self._due[0][0] <= until_s:
            self.now_s, _, work = heapq.heappop(self._due)
            work()
        self.now_s = until_s

    @property
    def now_ms(self) -> int:
        """The same, as the registry has it; never 0."""
        return 1_000_000 + int(self.now_s * 1000)
