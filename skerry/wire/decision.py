"""What a gateway would do with a request that came now, and by which numbers: its answer to ``GET /v2/models/{name}/decision``; and what it
would have done with those that came, had things been otherwise: ``GET /v2/models/{name}/decisions``."""

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from skerry.wire import codec
from skerry.wire.messages import SplitMode


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


Who = Literal["edge", "peer", "cloud", "refused"]
"""Who answered: a replica of the box itself, another box of its site, the cloud, nobody in time."""
MOST_KEPT_MIN = 60
"""So long do gateways keep what they decided by."""


class Changed(msgspec.Struct, frozen=True):
    """What is to be taken for otherwise; what is None or 0 stays as it was.

    ``cloud_requests_per_hour`` is what the box may send to the cloud in a clock hour; ``link_ms`` is what answers from other boxes take
    longer on their way, or less long.
    """

    deadline_ms: Annotated[float, Meta(ge=1, le=600_000)] | None = None
    split: SplitMode | None = None
    cloud_requests_per_hour: Annotated[int, Meta(ge=0, le=1_000_000_000)] | None = None
    link_ms: Annotated[float, Meta(ge=-60_000, le=60_000)] = 0.0
    is_cut_off: bool = False


def changed(query: Mapping[str, str]) -> Changed:
    """As a query has it; other words of it are passed over. Raises Malformed, which names the field."""
    try:
        return msgspec.convert({key: query[key] for key in Changed.__struct_fields__ if query.get(key)}, Changed, strict=False)
    except msgspec.ValidationError as exc:
        raise codec.Malformed(str(exc)) from exc


MOST_TEXT = 2000
AtMs = Annotated[int, Meta(ge=0, le=253_402_300_799_000)]
"""Unix time in milliseconds, up to the year 9999: what people's clocks can show."""
Count = Annotated[int, Meta(ge=0, le=2**53)]
Text = Annotated[str, Meta(max_length=MOST_TEXT)]
Name = Annotated[str, Meta(max_length=128)]


class Tally(msgspec.Struct, frozen=True):
    """Requests, by who answered."""

    edge: Count = 0
    peer: Count = 0
    cloud: Count = 0
    refused: Count = 0


class Moved(msgspec.Struct, frozen=True):
    """A request, standing for ``count``, that another would have answered: why, and by which numbers, is told in ``text``."""

    at_ms: AtMs
    count: Count
    before: Who
    after: Who
    text: Text


class Decisions(msgspec.Struct, frozen=True):
    """A gateway's answer to ``GET /v2/models/{name}/decisions``: what became of requests since ``since_ms``, and what would have.

    ``cases`` were decided anew, each as the box found things when the request came; they stand for all.
    """

    deployment: Name
    since_ms: AtMs
    cases: Count
    before: Tally
    after: Tally
    moved: Annotated[list[Moved], Meta(max_length=100)] = []


class MovedOn(Moved, frozen=True):
    """The same, and on which box."""

    node: str


class WhatIf(msgspec.Struct, frozen=True):
    """The sum over boxes. ``asked`` told it, of ``boxes`` that had requests for the deployment; ``silent`` says why others did not."""

    deployment: str
    since_ms: int
    boxes: int
    asked: list[str]
    silent: list[str]
    cases: int
    before: Tally
    after: Tally
    moved: list[MovedOn]
