"""Every message between box and coordinator. New fields get defaults, types never change, unknown fields are ignored."""

from typing import Literal

import msgspec

SCHEMA_VERSION = 1
"""Moves together with ``wire/schema.json``; sent as the MQTT 5 user property ``schema``."""

Tier = Literal["edge", "cloud"]
Rung = Literal["process", "container", "gvisor", "microvm"]
RUNGS: tuple[Rung, ...] = ("process", "container", "gvisor", "microvm")
"""Weakest first."""
Phase = Literal["pending", "fetching", "starting", "ready", "draining", "backoff", "failed"]
SplitMode = Literal["edge", "cloud", "overflow"]


class Presence(msgspec.Struct, frozen=True):
    """Retained, and the Last Will. ``session_epoch`` counts the box's connections since it was installed."""

    online: bool
    boot_id: str
    session_epoch: int


class Gpu(msgspec.Struct, frozen=True):
    """One accelerator as NVML reports it."""

    uuid: str
    name: str
    memory_mib: int
    driver: str = ""


class Birth(msgspec.Struct, frozen=True):
    """What a box is; sent on connect and when it changes."""

    tier: Tier
    labels: dict[str, str]
    gateway_url: str
    boot_id: str
    session_epoch: int
    version: str
    cpus: int
    memory_bytes: int
    gpus: list[Gpu] = []
    rungs: list[Rung] = []
    outbox_epoch: str = ""
    desired_generation: int = 0


class WarmupTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input of the run that a worker makes before it says that it is ready, filled with ``value``."""

    name: str
    shape: list[int]
    value: float = 0.0


class ModelRef(msgspec.Struct, frozen=True):
    """A model version pinned by content."""

    name: str
    version: int
    sha256: str
    size_bytes: int
    warmup: list[WarmupTensor] = []


class ReplicaSpec(msgspec.Struct, frozen=True):
    """One sandbox that should run on a box. ``name`` is unique on the box; ``generation`` is the deployment's."""

    name: str
    deployment: str
    generation: int
    model: ModelRef
    memory_bytes: int
    cpus: float
    gpu_memory_bytes: int = 0
    isolation_at_least: Rung = "process"


class Upstream(msgspec.Struct, frozen=True):
    """Another box's gateway that may answer for a deployment."""

    node: str
    url: str
    tier: Tier


class RouteSpec(msgspec.Struct, frozen=True):
    """How requests for one deployment are answered on a box; changing it restarts nothing."""

    deployment: str
    model: str
    version: int
    deadline_ms: int
    split: SplitMode = "overflow"
    upstreams: list[Upstream] = []


class Desired(msgspec.Struct, frozen=True):
    """Everything that one box should do, whole."""

    fleet: str
    node: str
    generation: int
    issued_at_ms: int
    replicas: list[ReplicaSpec] = []
    routes: list[RouteSpec] = []


class ReplicaReport(msgspec.Struct, frozen=True):
    """What one replica in fact is."""

    name: str
    deployment: str
    generation: int
    phase: Phase
    reason: str = ""
    sha256: str = ""
    provider: str = ""
    driver: str = ""
    rung: Rung | None = None
    restarts: int = 0


class Reported(msgspec.Struct, frozen=True):
    """The box's answer to the desired document of ``generation``; ``refused`` names a document that it would not take."""

    generation: int
    replicas: list[ReplicaReport] = []
    refused: str = ""


class Event(msgspec.Struct, frozen=True):
    """Something that happened once; (node, epoch, seq) names it for ever."""

    epoch: str
    seq: int
    at_ms: int
    kind: str
    subject: str = ""
    text: str = ""


class EventBatch(msgspec.Struct, frozen=True):
    """Events in order of ``seq``. ``lost`` counts those that the outbox ever had to drop, ``oldest`` is the first that it holds:
    what is missing below will never come."""

    events: list[Event]
    lost: int = 0
    oldest: int = 0


class Ack(msgspec.Struct, frozen=True):
    """The coordinator's word that every event of ``epoch`` up to ``events_seq`` stands in its database."""

    epoch: str
    events_seq: int


class ServeSample(msgspec.Struct, frozen=True):
    """One deployment's requests on one box in one sampling interval.

    ``latency`` counts answers by bucket (skerry.wire.latency), so that quantiles can be taken over boxes and time.
    """

    deployment: str
    edge: int = 0
    peer: int = 0
    cloud: int = 0
    refused: int = 0
    failed: int = 0
    late: int = 0
    latency: dict[int, int] = {}


class GpuSample(msgspec.Struct, frozen=True):
    """One GPU's counters; ``utilization_ratio`` is 0 to 1."""

    uuid: str
    utilization_ratio: float
    memory_used_mib: int
    temperature_c: float
    power_w: float


class Sample(msgspec.Struct, frozen=True):
    """One reading of a box. ``seq`` rises by one per reading, so that a gap is seen; ``outbox_*`` is what waits to be confirmed."""

    epoch: str
    seq: int
    at_ms: int
    cpu_ratio: float
    memory_used_bytes: int
    gpus: list[GpuSample] = []
    serve: list[ServeSample] = []
    outbox_events: int = 0
    outbox_samples: int = 0


class MetricsBatch(msgspec.Struct, frozen=True):
    """Readings in order; ``lost`` and ``oldest`` as in EventBatch."""

    samples: list[Sample]
    lost: int = 0
    oldest: int = 0


MESSAGES: tuple[type[msgspec.Struct], ...] = (Presence, Birth, Desired, Reported, EventBatch, MetricsBatch, Ack)
