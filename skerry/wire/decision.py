"""What a gateway would do with a request that came now, and by which numbers: its answer to ``GET /v2/models/{name}/decision``."""

from typing import Literal

import msgspec


class Other(msgspec.Struct, frozen=True):
    """Another box that may answer: what it would take, link and work apart; ``why_not`` is empty where it could."""

    node: str
    tier: str = ""
    estimate_ms: float | None = None
    link_ms: float | None = None
    remote_ms: float | None = None
    why_not: str = ""


class Numbers(msgspec.Struct, frozen=True):
    """What a decision was made of. A time that is absent is not known, or without end."""

    remaining_ms: float | None = None
    here_ms: float | None = None
    queue_ms: float | None = None
    service_ms: float | None = None
    upstreams: list[Other] = []


class Recent(msgspec.Struct, frozen=True):
    """A decision that the gateway made lately."""

    at_ms: int
    text: str


class Decision(msgspec.Struct, frozen=True):
    """A gateway's answer: what it would do with a request that came now."""

    deployment: str
    decision: Literal["here", "forward", "refuse"]
    reason: str
    model: str = ""
    version: int | str = ""
    served_by: str = ""
    node: str = ""
    numbers: Numbers = Numbers()
    recent: list[Recent] = []
