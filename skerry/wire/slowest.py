"""The requests that took longest, and where the time went: a gateway's answer to ``GET /v2/models/{name}/slowest``, and the fleet's."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from skerry.wire.decision import AtMs, Name, Text

Ended = Literal["edge", "peer", "cloud", "refused", "failed", "cancelled"]
"""Who answered, or why nobody did; ``cancelled`` is by the caller."""
MOST_TIMING = 500
Ms = Annotated[float, Meta(ge=0, le=1e9)]


class SlowRequest(msgspec.Struct, frozen=True):
    """One request that ended at ``at_ms`` (wall clock), ``took_ms`` of its ``deadline_ms`` later than it came.

    ``timing`` is as in the header Server-Timing (W3C Server Timing): ``queue``, ``compute``, ``remote`` and ``forward`` with ``dur`` in
    milliseconds; empty where nobody answered. ``node`` answered it, because of ``reason``.
    """

    at_ms: AtMs
    took_ms: Ms
    deadline_ms: Ms
    who: Ended
    node: Name
    reason: Text
    timing: Annotated[str, Meta(max_length=MOST_TIMING)] = ""


class Slowest(msgspec.Struct, frozen=True):
    """One gateway's, the slowest first."""

    deployment: Name
    requests: Annotated[list[SlowRequest], Meta(max_length=1000)]


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
