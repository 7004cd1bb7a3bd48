"""The requests that took longest, and where the time went: a gateway's answer to ``GET /v2/models/{name}/slowest``, and the fleet's."""

import msgspec

from skerry.wire.decision import Who

MOST_KEPT_MIN = 60
"""So long do gateways keep them."""


class SlowRequest(msgspec.Struct, frozen=True):
    """One request that ended at ``at_ms`` (wall clock), ``took_ms`` of its ``deadline_ms`` later than it came.

    ``timing`` is as in the header Server-Timing (W3C Server Timing): ``queue``, ``compute``, ``remote`` and ``forward`` with ``dur`` in
    milliseconds; empty where nobody answered. ``node`` answered it, because of ``reason``.
    """

    at_ms: int
    took_ms: float
    deadline_ms: float
    who: Who
    node: str
    reason: str
    timing: str = ""


class Slowest(msgspec.Struct, frozen=True):
    """One gateway's, the slowest first."""

    deployment: str
    requests: list[SlowRequest]


class SlowRequestOf(SlowRequest, frozen=True):
    """The same, and which box was asked."""

    asked: str = ""


class SlowestOfAll(msgspec.Struct, frozen=True):
    """The fleet's, the slowest first. ``asked`` told theirs, of ``boxes`` that had requests; ``silent`` says why others did not."""

    deployment: str
    minutes: int
    boxes: int
    asked: list[str]
    silent: list[str]
    requests: list[SlowRequestOf]
