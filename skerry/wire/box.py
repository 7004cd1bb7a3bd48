"""What the programs of one box say to each other: lines of JSON on the warden's socket, the route table, the gateway's totals.

The agent and the warden each treat the other's lines as hostile: the agent faces the network, the warden starts things.
"""

from typing import Literal

import msgspec

from skerry.wire.messages import (
    Addresses,
    Batching,
    CloudBudget,
    LogsReply,
    LogsRequest,
    ModelRef,
    Reported,
    Rung,
    Shadow,
    Software,
    SplitMode,
    Tier,
    Upstream,
)
from skerry.wire.proof import Proof

MAX_LINE_BYTES = 1024 * 1024
"""Longest line on the warden's socket; a desired document is at most codec.MAX_MESSAGE_BYTES."""
MAX_TOTALS_BYTES = 4 * 1024 * 1024
"""Largest answer of the gateway to the agent."""


class Apply(msgspec.Struct, frozen=True, tag="apply"):
    """Agent to warden: the signed desired document as it came, byte for byte."""

    envelope: bytes


class Taken(msgspec.Struct, frozen=True, tag="taken"):
    """Agent to warden: entries of ``journal`` up to ``seq`` stand in the outbox; send what follows. Any other journal: send all."""

    journal: str
    seq: int


class Arrived(msgspec.Struct, frozen=True, tag="arrived"):
    """Agent to warden: a model's bytes lie in the incoming folder, or why they can't be had (``reason``) for now."""

    sha256: str
    reason: str = ""


class ReadLogs(msgspec.Struct, frozen=True, tag="read_logs"):
    """Agent to warden: what a replica's sandbox wrote. ``call`` comes back in the answer."""

    call: int
    request: LogsRequest


class LogsRead(msgspec.Struct, frozen=True, tag="logs_read"):
    """Warden to agent: the answer to ``call``."""

    call: int
    reply: LogsReply


class Linked(msgspec.Struct, frozen=True, tag="linked"):
    """Agent to warden, on connect and on each change: whether the broker is there."""

    is_up: bool


FromAgent = Apply | Taken | Arrived | ReadLogs | Linked


class State(msgspec.Struct, frozen=True, tag="state"):
    """Warden to agent, on connect and on each change: what to report, and the models that the box lacks."""

    reported: Reported
    needs: list[ModelRef] = []
    rungs: list[Rung] = []
    rungs_absent: dict[Rung, str] = {}
    time: Proof = Proof()
    addresses: Addresses = Addresses()


class Entry(msgspec.Struct, frozen=True):
    """Something that happened in the warden; ``seq`` rises by one."""

    seq: int
    at_ms: int
    kind: str
    subject: str = ""
    text: str = ""


class Entries(msgspec.Struct, frozen=True, tag="entries"):
    """Warden to agent: journal entries in order. ``journal`` names the journal, so that a new one is not taken for the old."""

    journal: str
    entries: list[Entry]
    lost: int = 0


FromWarden = State | Entries | LogsRead


class LocalReplica(msgspec.Struct, frozen=True):
    """A ready sandbox on this box; ``socket`` is the path of its worker's Unix socket."""

    name: str
    socket: str


class Route(msgspec.Struct, frozen=True):
    """One deployment as this box's gateway serves it."""

    deployment: str
    model: str
    version: int
    deadline_ms: int
    split: SplitMode = "overflow"
    replicas: list[LocalReplica] = []
    upstreams: list[Upstream] = []
    batching: Batching = Batching()
    cloud_budget: CloudBudget | None = None
    shadow: Shadow | None = None
    shadows: list[LocalReplica] = []
    """Whom to ask besides."""


class RouteTable(msgspec.Struct, frozen=True):
    """The gateway's file: everything it may answer."""

    generation: int = 0
    routes: list[Route] = []
    revoked: list[str] = []
    time: Proof = Proof()


class ServeTotals(msgspec.Struct, frozen=True):
    """One deployment's counters since the gateway started; ``latency`` as in skerry.wire.latency."""

    deployment: str
    edge: int = 0
    peer: int = 0
    cloud: int = 0
    refused: int = 0
    failed: int = 0
    late: int = 0
    latency: dict[int, int] = {}
    compared: int = 0
    differed: int = 0


class Routed(msgspec.Struct, frozen=True):
    """One request's decision, as a sample for the events. ``seq`` rises by one per sample; ``text`` has the numbers, for people."""

    seq: int
    at_ms: int
    deployment: str
    text: str


class GatewayTotals(msgspec.Struct, frozen=True):
    """What the gateway tells the agent on its Unix socket. ``started_at_ms`` tells a restart from counters that stand still."""

    started_at_ms: int
    node: str
    tier: Tier
    deployments: list[ServeTotals] = []
    routed: list[Routed] = []
    """The latest samples; who asks passes over those that it has seen."""


class WantedSoftware(msgspec.Struct, frozen=True):
    """The warden's file for the updater: the release that the box was told of, and where its bytes lie; None for none."""

    software: Software | None = None
    path: str = ""


class Heard(msgspec.Struct, frozen=True):
    """The agent's file: as process ``pid``, of ``version``, it was acknowledged by the coordinator."""

    version: str
    pid: int


class Update(msgspec.Struct, frozen=True):
    """A change of the box's own programs that is under way, from release ``before`` to ``version``.

    ``begun`` counts how often it was taken up; ``units`` are the programs that change with it; ``waiting_for`` are the deployments that
    nobody could answer for before it, None where the gateway did not answer itself. ``reason`` says why it goes back.
    """

    version: str
    before: str
    sha256: str = ""
    attempt: int = 0
    stage: Literal["preparing", "trial", "returning"] = "preparing"
    begun: int = 1
    units: list[str] = []
    waiting_for: list[str] | None = None
    reason: str = ""
    is_unreached: bool = False


class Outcome(msgspec.Struct, frozen=True):
    """How such a change ended."""

    version: str
    sha256: str
    attempt: int
    is_good: bool
    reason: str = ""
    is_unreached: bool = False


class UpdateStep(msgspec.Struct, frozen=True):
    """Something that happened in the updater; ``seq`` rises by one."""

    seq: int
    at_ms: int
    kind: str
    subject: str
    text: str = ""


class UpdateRecord(msgspec.Struct, frozen=True):
    """The updater's file: what is under way, how the last ones ended, and what happened, latest last."""

    under_way: Update | None = None
    outcomes: list[Outcome] = []
    steps: list[UpdateStep] = []
