"""When a box that is said to be connected has been silent for too long: its broker may have died with its Last Will. Pure."""

from collections.abc import Mapping

SILENT_AFTER_S = 150.0
"""Boxes repeat their report every minute; two may get lost."""


def silent(online: Mapping[str, int], heard_at_ms: Mapping[str, int], *, connected_since_ms: int, now_ms: int) -> list[str]:
    """Boxes to call silent. ``online`` maps a box to when it connected, ``heard_at_ms`` to its last message.

    The time before our own connect does not count: nobody could be heard then.
    """
    return sorted(
        node
        for node, since_ms in online.items()
        if now_ms - max(since_ms, heard_at_ms.get(node, 0), connected_since_ms) > SILENT_AFTER_S * 1000
    )
