"""How often somebody may try to log in. Pure: the caller brings the time.

Failures are counted for each address and for each name: one who tries many names from one address is as slow as one who tries one name
from many. Getting in forgives that one try and no other: an account of one's own is no way round the bound.
"""

from collections.abc import Hashable

WINDOW_S = 600.0
MOST_OF_ADDRESS = 10
MOST_OF_NAME = 30
"""Failures within WINDOW_S: at most 4,320 guesses a day at one name, whatever the number of addresses."""
MOST_KEYS = 10_000


class Attempts:
    """Failed logins of the last WINDOW_S, bounded in number: the oldest keys are forgotten first."""

    def __init__(self) -> None:
        self._failures: dict[Hashable, list[float]] = {}

    def wait_s(self, address: str, name: str, now_s: float) -> float:
        """How long until another try is heard; 0: now."""
        return max(
            self._wait(("address", address), MOST_OF_ADDRESS, now_s),
            self._wait(("name", name), MOST_OF_NAME, now_s),
        )

    def _wait(self, key: Hashable, most: int, now_s: float) -> float:
        failures = [at for at in self._failures.get(key, []) if at > now_s - WINDOW_S]
        return 0.0 if len(failures) < most else failures[-most] + WINDOW_S - now_s

    def failed(self, address: str, name: str, now_s: float) -> None:
        """Count one that did not get in."""
        for key, most in ((("address", address), MOST_OF_ADDRESS), (("name", name), MOST_OF_NAME)):
            failures = [at for at in self._failures.pop(key, []) if at > now_s - WINDOW_S]
            self._failures[key] = [*failures, now_s][-most:]  # at the end: what was touched last is forgotten last
        while len(self._failures) > MOST_KEYS:
            self._failures.pop(next(iter(self._failures)))

    def forgive(self, address: str, name: str) -> None:
        """The latest try was none that failed."""
        for key in (("address", address), ("name", name)):
            if failures := self._failures.get(key):
                failures.pop()
