"""What this program refused of what came from outside, counted by reason: said at once, and then every few seconds with the count.

Whoever can send a message could else fill the disk with what is said of it.
"""

import asyncio
from collections import Counter
from typing import Any

from skerry.runtime import log

EVERY_S = 5.0
MOST_TEXT = 300

logger = log.get("refusals")

_counted: Counter[str] = Counter()
_said: Counter[str] = Counter()
_due: set[str] = set()


def count(reason: str, text: str, **where: Any) -> None:
    """Count one under ``reason``, a short fixed word; ``text`` and ``where`` are of this one. Called in the event loop."""
    _counted[reason] += 1
    if reason in _due:
        return
    _due.add(reason)
    _say(reason, text=text[:MOST_TEXT], **where)
    asyncio.get_running_loop().call_later(EVERY_S, _look_again, reason)


def _say(reason: str, **more: Any) -> None:
    _said[reason] = _counted[reason]
    logger.warning(reason, count=_counted[reason], **more)


def _look_again(reason: str) -> None:
    if _counted[reason] == _said[reason]:
        _due.discard(reason)
        return
    _say(reason)
    asyncio.get_running_loop().call_later(EVERY_S, _look_again, reason)


def totals() -> dict[str, int]:
    """By reason, since the program started."""
    return dict(sorted(_counted.items()))
