"""Every message between box and coordinator. New fields get defaults, types never change, unknown fields are ignored."""

from typing import Annotated, Literal

import msgspec

from skerry.wire.bundle import Bundle

SCHEMA_VERSION = 8
"""Moves together with ``wire/schema.json``; sent as the MQTT 5 user property ``schema``."""

Tier = Literal["edge", "cloud"]
Rung = Literal["process", "container", "gvisor", "microvm"]
RUNGS: tuple[Rung, ...] = ("process", "container", "gvisor", "microvm")
"""Weakest first."""
Phase = Literal["pending", "fetching", "starting", "ready", "draining", "backoff", "failed"]
UpdateMode = Literal["hand_over", "hand_over_if_room", "recreate"]
"""How a replica changes: the new one beside the old until it is ready (refused where both do not fit), the same but one after the
other where both do not fit, or always one after the other."""
SplitMode = Literal["edge", "cloud", "overflow"]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
"""A number that every reader can hold, JavaScript and SQLite included; a box in an enemy's hands sends others."""
Moment = Annotated[int, msgspec.Meta(ge=0, le=4_102_444_800_000)]
"""Milliseconds since 1970, up to the year 2100."""
Bucket = Annotated[int, msgspec.Meta(ge=0, le=1000)]
Ratio = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
Reading = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]
ReleaseVersion = Annotated[str, msgspec.Meta(pattern=r"^[0-9][A-Za-z0-9._+-]{0,63}(?!\n)$")]
"""Of Skerry itself; the name of a folder too."""
SoftwarePhase = Literal["", "fetching", "preparing", "trial", "returning", "done", "failed"]
"""How far a box is with a release of its own programs; empty where it was told of none."""


class Presence(msgspec.Struct, frozen=True):
    """Retained, and the Last Will. ``session_epoch`` counts the box's connections since it was installed; ``is_goodbye`` tells that the
    agent ended its connection itself."""

    online: bool
    boot_id: str
    session_epoch: Count
    is_goodbye: bool = False


class Gpu(msgspec.Struct, frozen=True):
    """One accelerator as NVML reports it."""

    uuid: str
    name: str
    memory_mib: Count
    driver: str = ""


class Birth(msgspec.Struct, frozen=True):
    """What a box is; sent on connect and when it changes."""

    tier: Tier
    labels: dict[str, str]
    gateway_url: str
    boot_id: str
    session_epoch: Count
    version: str
    cpus: Count
    memory_bytes: Count
    gpus: list[Gpu] = []
    rungs: list[Rung] = []
    outbox_epoch: str = ""
    rungs_absent: dict[Rung, str] = {}
    """Why a rung is not offered, found by trying it."""
    desired_generation: Count = 0
    machine: str = ""
    """Its processor, as in ``x86_64``, and its Python, as in ``3.11``: which build of a release is for it."""
    python: str = ""


class WarmupTensor(msgspec.Struct, frozen=True):
    """One input of the run that a worker makes before it says that it is ready, filled with ``value``."""

    name: str
    shape: list[int]
    value: float = 0.0


class StateTensor(msgspec.Struct, frozen=True):
    """What a model remembers between the requests of a sequence: its output ``output`` is the next request's input ``input``.

    The first request of a sequence gets zeros, every free extent being one. A caller that gives ``input`` itself is not held to that.
    """

    input: str
    output: str


class ModelRef(msgspec.Struct, frozen=True):
    """A model version pinned by content."""

    name: str
    version: Count
    sha256: str
    size_bytes: Count
    warmup: list[WarmupTensor] = []
    state: list[StateTensor] = []

    @property
    def title(self) -> str:
        """For people. A release of the box's own programs comes as models do, and has no version of that kind."""
        return f"model {self.name}:{self.version}" if self.version else self.name


class Server(msgspec.Struct, frozen=True):
    """A model server of one's own, in an image of its own: any that speaks the Open Inference Protocol over HTTP.

    ``image`` is the image's id in the engine (``sha256:`` and 64 digits: the digest of its configuration, which pins every layer).
    ``port`` is where it listens inside; ``model`` is the model's name there, empty where it is the deployment's. An empty ``argv``
    is the image's own command. The model's file lies read-only at /model/model.onnx.
    """

    image: str
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 8080
    model: str = ""
    argv: list[str] = []
    environment: dict[str, str] = {}


class ReplicaSpec(msgspec.Struct, frozen=True):
    """One sandbox that should run on a box. ``name`` is unique on the box; ``generation`` is the deployment's."""

    name: str
    deployment: str
    generation: Count
    model: ModelRef
    memory_bytes: Count
    cpus: float
    gpu_memory_bytes: Count = 0
    isolation_at_least: Rung = "process"
    update: UpdateMode = "hand_over_if_room"
    image: str = ""
    """The image of the worker, by id as in Server; empty: the box's own interpreter and libraries."""
    server: Server | None = None
    stop_after_ms: Count = 0
    """How long the box goes on with it without a link to the broker; 0: for ever. Changing it restarts nothing."""
    replaces: str = ""
    """The box in whose place it runs here, where it is that of a box that was lost."""
    is_shadow: bool = False
    """Whether its answers are compared with the others', and given to nobody."""
    attempt: Count = 0
    """Raised to have it started anew although nothing else of it changed."""


class Upstream(msgspec.Struct, frozen=True):
    """Another box's gateway that may answer for a deployment."""

    node: str
    url: str
    tier: Tier


class CloudBudget(msgspec.Struct, frozen=True):
    """What one box may send to the cloud for one deployment in any clock hour; None is without limit. Never exceeded."""

    requests_per_hour: Count | None = None
    bytes_per_hour: Count | None = None
    """Bytes of requests and answers together, as tensors."""


class Batching(msgspec.Struct, frozen=True):
    """Requests that may share one run of a model with a free first axis: ``max_batch`` rows at most, and the longest wait for company."""

    max_batch: Count = 1
    max_wait_us: Count = 0


class Agreement(msgspec.Struct, frozen=True):
    """When two answers to one request are the same (edge_agent/core/agreement.py)."""

    by: Literal["values", "largest"] = "values"
    tolerance: Ratio = 0.001


class Shadow(msgspec.Struct, frozen=True):
    """Of the requests that a box answers itself, a ``share`` is asked of its replicas that are ``is_shadow`` as well, after the answer."""

    share: Annotated[float, msgspec.Meta(gt=0, le=1)]
    agreement: Agreement = Agreement()


class RouteSpec(msgspec.Struct, frozen=True):
    """How requests for one deployment are answered on a box; changing it restarts nothing."""

    deployment: str
    model: str
    version: Count
    deadline_ms: Count
    split: SplitMode = "overflow"
    upstreams: list[Upstream] = []
    batching: Batching = Batching()
    cloud_budget: CloudBudget | None = None
    shadow: Shadow | None = None


MOST_ADDRESSES = 16


class Addresses(msgspec.Struct, frozen=True):
    """Where broker (host:port) and coordinator (URL) are, or will be: a box tries these before those of its settings."""

    brokers: Annotated[list[str], msgspec.Meta(max_length=MOST_ADDRESSES)] = []
    coordinator: str = ""


class Software(msgspec.Struct, frozen=True):
    """The release of its own programs that a box should run, pinned by content, and who vouches for it.

    Without ``sha256`` it must lie unpacked on the box already: the way back to what ran before. ``attempt`` is raised to have a box try
    again what it gave up.
    """

    version: ReleaseVersion
    sha256: str = ""
    size_bytes: Count = 0
    signature: Bundle | None = None
    attempt: Count = 0


class Desired(msgspec.Struct, frozen=True):
    """Everything that one box should do, whole."""

    fleet: str
    node: str
    generation: Count
    issued_at_ms: Moment
    replicas: list[ReplicaSpec] = []
    routes: list[RouteSpec] = []
    revoked: list[str] = []
    """Boxes that were thrown out, as far as this one could hear of them: its gateway answers theirs no more."""
    signatures: dict[str, Bundle] = {}
    """By ``NAME/VERSION``, who vouches for the models of ``replicas``; the warden judges it (skerry/wire/model_signature.py)."""
    expires_at_ms: Moment = 0
    """From when on no box takes it any more that does not hold it already; 0 for never. What is held is acted on for ever."""
    retired_keys: list[str] = []
    """Ids of signing keys that are the fleet's no more."""
    addresses: Addresses = Addresses()
    software: Software | None = None
    """What the box's own programs should be; None leaves them as they are."""


class ReplicaReport(msgspec.Struct, frozen=True):
    """What one replica in fact is."""

    name: str
    deployment: str
    generation: Count
    phase: Phase
    reason: str = ""
    sha256: str = ""
    provider: str = ""
    driver: str = ""
    rung: Rung | None = None
    restarts: Count = 0
    sandbox: str = ""
    """The sandbox's own name on the box."""
    limits: str = ""
    """What holds its limits: engine, cgroup2, cgroup1 or rlimits."""
    is_crash_loop: bool = False
    """Whether it ended so often that it is not tried again until the coordinator changes it."""
    is_warm: bool = False
    """Whether it was started ahead and only had to load the model."""

    def is_of(self, spec: "ReplicaSpec") -> bool:
        """Whether it is what ``spec`` asks for, in whatever phase."""
        return self.generation == spec.generation and self.sha256 == spec.model.sha256

    @property
    def state(self) -> str:
        """The phase, or ``crash_loop`` where it is not tried again."""
        return "crash_loop" if self.is_crash_loop else self.phase


class SoftwareReport(msgspec.Struct, frozen=True):
    """How far a box is with the release that it was told of. ``is_unreached``: the only fault was that the coordinator was not reached."""

    version: str = ""
    attempt: Count = 0
    phase: SoftwarePhase = ""
    reason: str = ""
    is_unreached: bool = False


class Reported(msgspec.Struct, frozen=True):
    """The box's answer to the desired document of ``generation``; ``refused`` names a document that it would not take."""

    generation: Count
    replicas: list[ReplicaReport] = []
    refused: str = ""
    software: SoftwareReport = SoftwareReport()


class Event(msgspec.Struct, frozen=True):
    """Something that happened once; (node, epoch, seq) names it for ever."""

    epoch: str
    seq: Count
    at_ms: Moment
    kind: str
    subject: str = ""
    text: str = ""


class EventBatch(msgspec.Struct, frozen=True):
    """Events in order of ``seq``. ``lost`` counts those that the outbox ever had to drop, ``oldest`` is the first that it holds:
    what is missing below will never come. ``nonce`` is of this connection, and comes back in what acknowledges it."""

    events: list[Event]
    lost: Count = 0
    oldest: Count = 0
    nonce: Annotated[str, msgspec.Meta(max_length=32)] = ""


class Ack(msgspec.Struct, frozen=True):
    """The coordinator's word that every event of ``epoch`` up to ``events_seq`` stands in its database.

    ``is_spent``: the numbers that follow were given to other events before, by this box as it was before its disk was restored. What
    it holds beyond ``events_seq`` needs an epoch of its own. ``nonce`` is the batch's: a broker may keep an acknowledgement until such a
    box is back, which is not about what it says now.
    """

    epoch: str
    events_seq: Count
    is_spent: bool = False
    nonce: str = ""


class LogsRequest(msgspec.Struct, frozen=True):
    """``command/logs``: what a replica's sandbox wrote. ``after`` is the position in the last answer, empty for the last ``lines``."""

    replica: str
    lines: Annotated[int, msgspec.Meta(ge=1, le=2000)] = 100
    after: str = ""


class LogsReply(msgspec.Struct, frozen=True):
    """The answer on ``reply``, with the request's correlation data. ``error`` says why there is none."""

    lines: list[str] = []
    position: str = ""
    error: str = ""


class ServeSample(msgspec.Struct, frozen=True):
    """One deployment's requests on one box in one sampling interval.

    ``compared`` counts answers beside which a shadow's was looked at, ``differed`` those of them that it did not agree with. ``latency``
    counts answers by bucket (skerry.wire.latency), so that quantiles can be taken over boxes and time.
    """

    deployment: str
    edge: Count = 0
    peer: Count = 0
    cloud: Count = 0
    refused: Count = 0
    failed: Count = 0
    late: Count = 0
    latency: dict[Bucket, Count] = {}
    compared: Count = 0
    differed: Count = 0


class GpuSample(msgspec.Struct, frozen=True):
    """One GPU's counters; ``utilization_ratio`` is 0 to 1."""

    uuid: str
    utilization_ratio: Ratio
    memory_used_mib: Count
    temperature_c: Reading
    power_w: Reading


class Sample(msgspec.Struct, frozen=True):
    """One reading of a box. ``seq`` rises by one per reading, so that a gap is seen; ``outbox_*`` is what waits to be confirmed.

    Of a box that was cut off for long a reading may stand for several, ``readings`` of them with the numbers from ``first_seq`` to
    ``seq``, over ``width_ms`` from ``at_ms`` on: counts are their sum, all else their mean.

    ``network_*`` is what went over all of the box's interfaces but loopback; ``link_rtt_ms`` is the round trip to the broker as the kernel
    measures it on that connection, 0 where it does not.
    """

    epoch: str
    seq: Count
    at_ms: Moment
    cpu_ratio: Ratio
    memory_used_bytes: Count
    gpus: list[GpuSample] = []
    serve: list[ServeSample] = []
    outbox_events: Count = 0
    outbox_samples: Count = 0
    first_seq: Count = 0
    readings: Annotated[int, msgspec.Meta(ge=1, le=10**7)] = 1
    width_ms: Annotated[int, msgspec.Meta(ge=0, le=3_600_000)] = 0
    network_received_bytes_per_s: Reading = 0.0
    network_sent_bytes_per_s: Reading = 0.0
    link_rtt_ms: Reading = 0.0

    @property
    def first(self) -> int:
        """The first number that it stands for."""
        return self.first_seq or self.seq


class MetricsBatch(msgspec.Struct, frozen=True):
    """Readings in order; ``lost`` and ``oldest`` as in EventBatch."""

    samples: list[Sample]
    lost: Count = 0
    oldest: Count = 0


MESSAGES: tuple[type[msgspec.Struct], ...] = (Presence, Birth, Desired, Reported, EventBatch, MetricsBatch, Ack, LogsRequest, LogsReply)
