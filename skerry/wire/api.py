"""What the coordinator's REST API answers; the command line, the console and scripts read these."""

from typing import Annotated, Any, Literal

import msgspec

from skerry.wire.messages import (
    Batching,
    CloudBudget,
    Gpu,
    GpuSample,
    ReleaseVersion,
    ReplicaReport,
    Rung,
    SoftwarePhase,
    SoftwareReport,
    SplitMode,
    StateTensor,
    Tier,
)

NodeState = Literal["online", "unknown", "lost", "offline", "new", "revoked"]
"""``unknown``: silent, and nobody can tell a crash from a cut link; ``lost``: silent for long; ``offline``: its agent signed off."""
SILENT: tuple[NodeState, ...] = ("unknown", "lost", "offline")


class Problem(msgspec.Struct, frozen=True):
    """What is wrong; ``field`` and ``line`` where it lies in something that was sent, ``hint`` what to do."""

    code: str
    message: str
    field: str = ""
    line: int = 0
    hint: str = ""


class ProblemBody(msgspec.Struct, frozen=True):
    """The one shape of every error."""

    error: Problem


class Stream(msgspec.Struct, frozen=True):
    """How a numbered stream of a box stands: ``missing`` may still come, ``lost`` never will, ``dropped`` the box threw away."""

    stream: str
    epoch: str
    high: int
    missing: int
    lost: int
    dropped: int


class Outlook(msgspec.Struct, frozen=True):
    """What becomes of a silent box's replicas at ``at_ms``; 0: at no time that is known now, as the text says."""

    at_ms: int
    deployment: str
    text: str


class NodeView(msgspec.Struct, frozen=True):
    """One box. ``generation`` is what it should do, ``reported_generation`` what it says that it does. ``bound`` names the
    labels that it was enrolled with and can't change. Of a silent one, ``silent_since_ms`` is since when, and ``outlook`` what
    becomes of its replicas. ``is_ahead``: it holds a newer document than it was ever told from here. ``drained_at_ms``: since when it is to
    run nothing, 0 where it may."""

    id: str
    state: NodeState
    tier: Tier | None
    labels: dict[str, str]
    gateway_url: str
    changed_at_ms: int
    heard_at_ms: int
    version: str = ""
    cpus: int = 0
    memory_bytes: int = 0
    gpus: list[Gpu] = []
    rungs: list[Rung] = []
    rungs_absent: dict[Rung, str] = {}
    generation: int = 0
    reported_generation: int = 0
    refused: str = ""
    replicas: list[ReplicaReport] = []
    cpu_ratio: float = 0.0
    memory_used_bytes: int = 0
    gpu_samples: list[GpuSample] = []
    outbox_events: int = 0
    outbox_samples: int = 0
    streams: list[Stream] = []
    is_enrolled: bool = False
    bound: list[str] = []
    silent_since_ms: int = 0
    outlook: list[Outlook] = []
    is_ahead: bool = False
    drained_at_ms: int = 0
    drain_reason: str = ""
    software: SoftwareReport = SoftwareReport()

    @property
    def is_silent(self) -> bool:
        """Whether what is known of it is the last that it said."""
        return self.state in SILENT


class ReleaseView(msgspec.Struct, frozen=True):
    """A release of the box software in the store, for one Python (as in ``3.11``) and processor (as in ``x86_64``). ``signature`` is
    ``unchecked`` where this coordinator has no keys for releases (``release_keys_file``)."""

    version: str
    python: str
    machine: str
    sha256: str
    size_bytes: int
    pushed_at_ms: int
    signature: "SignatureState" = "none"
    is_new: bool = False


class SpreadRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which release every box is to run. ``rollout`` as in a deployment: in what waves, watched for how long, taken back for what.
    ``again``: although it was tried, and taken back."""

    version: ReleaseVersion
    rollout: dict[str, Any] = {}
    again: bool = False


class TroubleView(msgspec.Struct, frozen=True):
    """A box that is not where it should be, and what it says of it."""

    node: str
    version: str
    phase: SoftwarePhase
    reason: str


class SoftwareView(msgspec.Struct, frozen=True):
    """The box software over the fleet: which release is wanted (empty: each box's own affair), how many boxes run which, how the last one
    spreads or spread, and up to a hundred boxes that failed."""

    wanted: str
    versions: dict[str, int]
    rollout: "RolloutView | None" = None
    troubles: list[TroubleView] = []


class DrainRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a box is to run nothing: shown wherever somebody wonders."""

    reason: Annotated[str, msgspec.Meta(max_length=200)] = ""


class AheadView(msgspec.Struct, frozen=True):
    """A box that holds a document of ``held_generation``, where this coordinator told it no more than ``known_generation``: it was restored
    from a backup of an earlier day. Were it led from here again, it would stop ``stops``, start ``starts`` and keep ``keeps``."""

    node: str
    held_generation: int
    known_generation: int
    stops: list[str]
    starts: list[str]
    keeps: list[str]


class TakeOver(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which boxes are to be led from here again; all that are ahead where none is named."""

    nodes: Annotated[list[str], msgspec.Meta(max_length=100_000)] = []


class LogsView(msgspec.Struct, frozen=True):
    """What a replica's sandbox wrote, oldest line first; ask with ``after=position`` for what came since."""

    node: str
    replica: str
    lines: list[str]
    position: str


class ServeView(msgspec.Struct, frozen=True):
    """A deployment's requests over the last ``window_s`` seconds; latencies in milliseconds."""

    window_s: float
    per_second: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    edge: int = 0
    peer: int = 0
    cloud: int = 0
    refused: int = 0
    failed: int = 0
    late: int = 0


class PlacementView(msgspec.Struct, frozen=True):
    """A replica: where, why there, and what it in fact is. ``is_current`` says that the box runs what is wanted; ``is_lost``, that
    the box is lost; ``replaces`` is the box in whose place it runs."""

    node: str
    replica: str
    reason: str
    phase: str
    is_current: bool
    status: str = ""
    driver: str = ""
    rung: Rung | None = None
    provider: str = ""
    restarts: int = 0
    is_lost: bool = False
    replaces: str = ""


class RefusalView(msgspec.Struct, frozen=True):
    """A box that does not run the deployment, and why not."""

    node: str
    reason: str


class DeploymentView(msgspec.Struct, frozen=True):
    """One deployment; ``ready`` of ``wanted`` replicas run what generation ``generation`` asks for."""

    name: str
    generation: int
    model: str
    ready: int
    wanted: int
    placements: list[PlacementView]
    refusals: list[RefusalView]
    problem: str
    deadline_ms: int
    target: float
    split: SplitMode
    text: str
    created_at_ms: int
    changed_at_ms: int
    serve: ServeView
    batching: Batching = Batching()
    cloud_budget: CloudBudget | None = None


class Accepted(msgspec.Struct, frozen=True):
    """A deployment that was taken: the planner is on it. ``spreads``: in waves, as ``/v1/rollouts/{name}`` tells."""

    name: str
    generation: int
    warnings: list[str] = []
    spreads: bool = False


class PlanStep(msgspec.Struct, frozen=True):
    """What would become of a replica on a box; ``text`` says why there, or what of it would be another."""

    node: str
    deployment: str
    replica: str
    kind: Literal["starts", "stops", "changes", "keeps"]
    text: str = ""


class PlanView(msgspec.Struct, frozen=True):
    """What a deployment would change once it is everywhere. The counts are of its own replicas, and of boxes that would not run it;
    ``others`` are other deployments' replicas that would move. ``failed_before`` says why this very text was taken back once."""

    name: str
    is_new: bool
    is_same: bool
    spreads: bool
    starts: int
    stops: int
    changes: int
    keeps: int
    refuses: int
    problem: str
    failed_before: str
    warnings: list[str]
    steps: list[PlanStep]
    others: list[PlanStep]
    refusals: list[RefusalView]


RolloutPhase = Literal["rolling", "waiting", "done", "failed", "aborted"]
"""``waiting``: for somebody to approve the next wave."""


class RolloutView(msgspec.Struct, frozen=True):
    """How a deployment's last change spreads, or spread. A *unit* is a box, or where replicas are counted a replica. ``targets`` counts
    the units that have the change after each wave, ``admitted`` those that were let in, ``ready`` those of them that run it, ``away`` those
    whose box is not there; ``wave_units`` names a hundred of the present wave's at the most. ``ready_since_ms`` is 0 while the present wave
    is not ready; the next begins ``observe_ms`` after it. ``reason`` says why it was taken back.
    While ``is_shadow`` the first wave's boxes run it beside what serves; of ``compared`` answers ``differed`` were others."""

    deployment: str
    phase: RolloutPhase
    is_paused: bool
    generation: int
    model: str
    before_generation: int
    before_model: str
    unit: Literal["box", "replica"]
    total: int
    targets: list[int]
    admitted: int
    ready: int
    away: int
    wave: int
    wave_units: list[str]
    began_ms: int
    wave_since_ms: int
    ready_since_ms: int
    observe_ms: int
    changed_at_ms: int
    reason: str = ""
    is_shadow: bool = False
    compared: int = 0
    differed: int = 0


SignatureState = Literal["none", "unchecked", "verified", "not_trusted"]
"""Whether a model is signed; ``unchecked`` where this coordinator has no keys for models (``model_keys_file``)."""


class ModelView(msgspec.Struct, frozen=True):
    """A model version in the store."""

    name: str
    version: int
    sha256: str
    size_bytes: int
    pushed_at_ms: int
    used_by: list[str] = []
    state: list[StateTensor] = []
    signature: SignatureState = "none"


class Signed(msgspec.Struct, frozen=True):
    """A model that somebody vouches for."""

    name: str
    version: int
    signature: SignatureState


class Pushed(msgspec.Struct, frozen=True):
    """A model that was pushed; ``is_new`` is false where the store had it already."""

    name: str
    version: int
    sha256: str
    size_bytes: int
    is_new: bool


class EventView(msgspec.Struct, frozen=True):
    """Something that happened; ids rise in the order in which events reached the coordinator."""

    id: int
    node: str
    at_ms: int
    kind: str
    subject: str
    text: str


class SplitPoint(msgspec.Struct, frozen=True):
    """Answers in one bucket that begins at ``at_s``, Unix time."""

    at_s: int
    edge: int
    peer: int
    cloud: int
    refused: int
    failed: int
    late: int
    p50_ms: float
    p99_ms: float


class SplitView(msgspec.Struct, frozen=True):
    """Who answered over time, in buckets of ``bucket_s``."""

    bucket_s: int
    points: list[SplitPoint]


class LoadPoint(msgspec.Struct, frozen=True):
    """A box's averages in one bucket. Of several GPUs ``gpu_ratio`` is the mean, ``temperature_c`` the hottest one's and ``power_w`` that
    of all together; ``link_rtt_ms`` is to the broker, 0 where it is not known."""

    at_s: int
    cpu_ratio: float
    memory_used_bytes: int
    gpu_ratio: float
    temperature_c: float = 0.0
    power_w: float = 0.0
    network_received_bytes_per_s: float = 0.0
    network_sent_bytes_per_s: float = 0.0
    link_rtt_ms: float = 0.0


class LoadView(msgspec.Struct, frozen=True):
    """A box's load over time, in buckets of ``bucket_s``."""

    bucket_s: int
    points: list[LoadPoint]


class StatusView(msgspec.Struct, frozen=True):
    """The fleet at a glance."""

    fleet: str
    version: str
    broker_connected: bool
    nodes_online: int
    nodes: int
    deployments: int
    deployments_ready: int
    events: int
    events_missing: int
    events_lost: int
    samples_missing: int
    samples_lost: int
    refused: dict[str, int] = {}
    """Messages and documents that this coordinator refused since it started, by reason."""


class LoginLink(msgspec.Struct, frozen=True):
    """A link that logs one browser in, once, within ``expires_in_s``."""

    url: str
    expires_in_s: int
