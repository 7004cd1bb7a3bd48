"""What is known of the time where no clock can be believed: a moment that has passed, and how far a clock that only runs forward was then.

Sound across restarts of a machine: that clock begins anew there, so that what it says since then is less than what has passed.
"""

import msgspec


class Proof(msgspec.Struct, frozen=True):
    """``moment_ms``, Unix milliseconds, had passed when the machine had run for ``uptime_ms``."""

    moment_ms: int = 0
    uptime_ms: int = 0

    def at_least_ms(self, uptime_ms: int) -> int:
        """A moment that has passed when the machine has run for ``uptime_ms``."""
        return self.moment_ms + max(0, uptime_ms - self.uptime_ms)


def later(one: Proof, other: Proof, uptime_ms: int) -> Proof:
    """Which of two says more when the machine has run for ``uptime_ms``; the first where they say the same."""
    return other if other.at_least_ms(uptime_ms) > one.at_least_ms(uptime_ms) else one
