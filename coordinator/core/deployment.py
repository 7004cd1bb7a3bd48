"""A deployment as its owner writes it, in YAML or JSON: parsed once, and every mistake named by key and line. Pure."""

import re
from typing import Annotated, Any, Literal

import msgspec
import yaml

from coordinator.core.rollout import Compared, Rules
from skerry.wire import topics, units
from skerry.wire.messages import Agreement, Batching, CloudBudget, Rung, Server, Shadow, SplitMode, Tier, UpdateMode

MAX_TEXT_BYTES = 64 * 1024
MAX_DEPTH = 16
"""Of brackets in brackets. A file of nothing but brackets takes the YAML parser minutes."""
MAX_NAME = 48
"""Leaves room for a replica's number in 63 characters."""

MAX_ARGUMENTS = 256
MAX_ARGUMENTS_BYTES = 16 * 1024
"""Of a server's command line and environment together: they travel in the box's document."""

MAX_WAIT_US = 1_000_000
"""For company in a batch."""
MAX_BYTES_PER_HOUR = 2**50
"""1 PiB: no link carries more, and every reader can hold the number."""

MAX_WAVES = 32
LEAST_SILENCE_MS = 1000
MOST_SILENCE_MS = 10 * 365 * 86_400_000
"""Of ``lost_after`` and ``stop_on_box_after``."""

Reconcile = Literal["keep_original", "keep_replacement"]
Positive = Annotated[int, msgspec.Meta(ge=1, le=100_000)]

_IMAGE = re.compile(r"sha256:[0-9a-f]{64}")
_SHARE = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)%")
_SERVED_MODEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")


class DeploymentError(ValueError):
    """A deployment that can't be taken; ``field`` is the key's path, ``line`` where it stands (0 unknown)."""

    def __init__(self, message: str, *, field: str = "", line: int = 0) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field
        self.line = line


class Replicas(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Either so many on each matching box, or so many in all."""

    per_node: Annotated[int, msgspec.Meta(ge=1, le=256)] | None = None
    count: Positive | None = None


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which boxes. Label values may be shell-style patterns."""

    labels: dict[str, str] = {}
    tier: list[Tier] = msgspec.field(default_factory=lambda: ["edge"])
    accelerator: str = "any"


class Resources(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one replica may use."""

    memory: str | int = "512MiB"
    cpus: Annotated[float, msgspec.Meta(ge=0.01, le=1024)] = 1.0
    gpu_memory: str | int = 0


class Isolation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The weakest sandbox that will do."""

    at_least: Rung = "process"


class Slo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What callers are promised."""

    deadline_ms: Annotated[int, msgspec.Meta(ge=1, le=3_600_000)] = 1000
    target: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.99


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one box may send to the cloud in an hour: one of the two at the least."""

    requests_per_hour: Annotated[int, msgspec.Meta(ge=0, le=10**9)] | None = None
    bytes_per_hour: str | int | None = None


class Split(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How work is divided between edge and cloud."""

    mode: SplitMode = "overflow"
    cloud_budget: Budget | None = None


class Batches(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which requests may share one run of the model: so many rows at most, and so long a wait for company at most."""

    max_batch: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1
    max_wait: str = "0ms"


class Disconnect(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What becomes of the replicas of a box that is silent; see Policy."""

    lost_after: str = "60s"
    replace: bool = False
    reconcile: Reconcile = "keep_original"
    stop_on_box_after: str = "never"


class ShadowOf(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How answers of a change are compared before it answers anybody; see coordinator.core.rollout.Compared."""

    share: str = "10%"
    by: Literal["values", "largest"] = "values"
    tolerance: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.001
    max_differing: Annotated[float, msgspec.Meta(ge=0.0001, le=1)] = 0.01


class Rollout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a change spreads; see coordinator.core.rollout.Rules."""

    waves: list[int | str] = msgspec.field(default_factory=lambda: [1, "10%", "100%"])
    success: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.95
    observe: str = "2m"
    deadline: str = "10m"
    max_restarts: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0
    max_failed: Annotated[float, msgspec.Meta(ge=0.0001, le=1)] = 0.01
    max_slower: Annotated[float, msgspec.Meta(ge=1, le=1000)] = 1.5
    false_alarm: Annotated[float, msgspec.Meta(ge=1e-9, le=0.5)] = 0.01
    approve: bool = False
    shadow: ShadowOf | None = None


class OwnServer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model server of one's own, in place of ours; see skerry.wire.messages.Server."""

    image: str
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 8080
    model: str = ""
    argv: list[str] = []
    environment: dict[str, str] = {}


class Update(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a replica changes: the new one beside the old until it is ready, or one after the other; what to do without room for both."""

    strategy: Literal["hand_over", "recreate"] = "hand_over"
    no_room: Literal["refuse", "recreate"] = "recreate"


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole deployment file."""

    name: str
    model: str
    replicas: Replicas = Replicas(per_node=1)
    place: Place = Place()
    resources: Resources = Resources()
    isolation: Isolation = Isolation()
    slo: Slo = Slo()
    split: Split = Split()
    batching: Batches = Batches()
    image: str | None = None
    server: OwnServer | None = None
    update: Update = Update()
    disconnect: Disconnect | None = None
    rollout: Rollout | None = None


class Policy(msgspec.Struct, frozen=True):
    """What becomes of the replicas of a box that is silent. Until ``lost_after_ms`` nothing; then, with ``replace``, each is started on
    another box too, and ``reconcile`` says which one stays once both are there. The box itself stops them after ``stop_on_box_after_ms``
    without a link; 0 for never."""

    lost_after_ms: int = 60_000
    replace: bool = False
    reconcile: Reconcile = "keep_original"
    stop_on_box_after_ms: int = 0


class Deployment(msgspec.Struct, frozen=True):
    """A checked deployment; sizes in bytes, the model by name and version."""

    name: str
    model: str
    version: int
    replicas: Replicas
    labels: dict[str, str]
    tiers: list[Tier]
    accelerator: str
    memory_bytes: int
    cpus: float
    gpu_memory_bytes: int
    isolation_at_least: Rung
    deadline_ms: int
    target: float
    split: SplitMode
    warnings: list[str] = []
    image: str = ""
    server: Server | None = None
    update: UpdateMode = "hand_over_if_room"
    batching: Batching = Batching()
    cloud_budget: CloudBudget | None = None
    disconnect: Policy = Policy()
    rollout: Rules | None = None


def parse(text: str) -> Deployment:
    """The deployment in ``text``. Raises DeploymentError."""
    if len(text.encode(errors="replace")) > MAX_TEXT_BYTES:
        raise DeploymentError(f"the file has more than {MAX_TEXT_BYTES} bytes")
    value, lines = _read_yaml(text)
    try:
        spec = msgspec.convert(value, Spec)
    except msgspec.ValidationError as exc:
        message, field = _split_path(str(exc))
        raise DeploymentError(message, field=field, line=_line_of(lines, field)) from exc
    try:
        return _checked(spec)
    except DeploymentError as exc:
        exc.line = _line_of(lines, exc.field)
        raise


def _read_yaml(text: str) -> tuple[Any, dict[str, int]]:
    """The value, and the line of each key's path. Aliases are refused: they are how a short file becomes a huge one."""
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if reason := _not_accepted(event, depth):
                raise DeploymentError(reason, line=event.start_mark.line + 1 if event.start_mark else 0)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
    except yaml.MarkedYAMLError as exc:
        line = exc.problem_mark.line + 1 if exc.problem_mark else 0
        raise DeploymentError(f"not YAML: {exc.problem or 'unreadable'}", line=line) from exc
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as exc:
        if isinstance(exc, DeploymentError):
            raise
        raise DeploymentError(f"not YAML: {str(exc)[:200]}") from exc
    if not isinstance(value, dict):
        raise DeploymentError("expected a mapping with the keys name and model", line=1)
    lines: dict[str, int] = {}
    _note_lines(node, "", lines)
    return value, lines


def _not_accepted(event: Any, depth: int) -> str:
    """Why a part of a YAML file that is well formed is refused; empty where it is not."""
    if isinstance(event, yaml.AliasEvent):
        return "aliases are not accepted"
    if getattr(event, "tag", None) is not None:
        return "tags are not accepted"  # PyYAML trips over some, such as an empty !!int
    if depth > MAX_DEPTH:
        return f"nested more than {MAX_DEPTH} deep"
    if isinstance(event, yaml.ScalarEvent) and any("\ud800" <= character <= "\udfff" for character in event.value):
        return "holds half a character (a lone surrogate)"
    return ""


def _note_lines(node: Any, path: str, lines: dict[str, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = f"{path}.{key.value}" if path else str(key.value)
            if key.tag != "tag:yaml.org,2002:str":
                raise DeploymentError("a key must be text: put it in quotes", field=below, line=key.start_mark.line + 1)
            if below in lines:
                raise DeploymentError("the key is given twice", field=below, line=key.start_mark.line + 1)
            lines[below] = key.start_mark.line + 1
            _note_lines(value, below, lines)


def _split_path(message: str) -> tuple[str, str]:
    """msgspec's message and the key's path in it: ``... - at `$.a.b` `` and ``unknown field `c` ``."""
    text, _, path = message.partition(" - at `$")
    field = path.rstrip("`").lstrip(".")
    if text.startswith("Object contains unknown field `"):
        key = text.split("`")[1]
        return "unknown key", f"{field}.{key}" if field else key
    if text.startswith("Object missing required field `"):
        key = text.split("`")[1]
        return "is required", f"{field}.{key}" if field else key
    return text[:1].lower() + text[1:], field


def _line_of(lines: dict[str, int], field: str) -> int:
    """The line of a key, else of the nearest key above it."""
    path = field.replace("[...]", "").split("[")[0]
    while path:
        if path in lines:
            return lines[path]
        path = path.rpartition(".")[0]
    return 0


def _size(value: str | int, field: str) -> int:
    try:
        return units.parse_bytes(value)
    except ValueError as exc:
        raise DeploymentError(str(exc), field=field) from exc


def _checked(spec: Spec) -> Deployment:
    if not topics.is_name(spec.name) or len(spec.name) > MAX_NAME:
        raise DeploymentError(f"{spec.name[:80]!r} is not a name: letters, digits, '_' and '-', at most {MAX_NAME}", field="name")
    model, separator, version = spec.model.rpartition(":")
    if (
        not separator
        or not topics.is_name(model)
        or not (version.isascii() and version.isdigit() and 0 < len(version) <= 9 and int(version))
    ):
        raise DeploymentError(f"{spec.model[:80]!r} is not name:version, such as shelf-detector:3", field="model")
    if (spec.replicas.per_node is None) == (spec.replicas.count is None):
        raise DeploymentError("give either per_node or count", field="replicas")
    if not spec.place.tier:
        raise DeploymentError("names no tier; give edge, cloud or both", field="place.tier")
    if spec.place.accelerator not in ("any", "gpu", "none"):
        raise DeploymentError(f"{spec.place.accelerator[:40]!r} is not one of any, gpu, none", field="place.accelerator")
    memory_bytes = _size(spec.resources.memory, "resources.memory")
    who, least_mib = ("a worker needs", 64) if spec.server is None else ("a server of one's own and its relay need", 128)
    if memory_bytes < least_mib * 2**20:
        raise DeploymentError(f"{who} {least_mib}MiB at the least", field="resources.memory")
    _check_images(spec)
    return Deployment(
        name=spec.name,
        model=model,
        version=int(version),
        replicas=spec.replicas,
        labels=spec.place.labels,
        tiers=spec.place.tier,
        accelerator=spec.place.accelerator,
        memory_bytes=memory_bytes,
        cpus=spec.resources.cpus,
        gpu_memory_bytes=_size(spec.resources.gpu_memory, "resources.gpu_memory"),
        isolation_at_least=spec.isolation.at_least,
        deadline_ms=spec.slo.deadline_ms,
        target=spec.slo.target,
        split=spec.split.mode,
        warnings=_warnings(spec),
        image=spec.image or "",
        server=msgspec.convert(msgspec.to_builtins(spec.server), Server) if spec.server else None,
        update=_update_mode(spec.update),
        batching=_batching(spec.batching),
        cloud_budget=_cloud_budget(spec.split.cloud_budget),
        disconnect=_policy(spec.disconnect or Disconnect()),
        rollout=rules_of(spec.rollout) if spec.rollout else None,
    )


def _warnings(spec: Spec) -> list[str]:
    found = []
    if spec.disconnect is not None and spec.disconnect.replace and spec.replicas.count is None:
        found.append("disconnect.replace: nothing is placed elsewhere, since per_node gives every box its own; it acts on count")
    if spec.server is not None and spec.batching.max_batch > 1:
        found.append("batching: a server of one's own gets each request by itself, and forms batches where it does so itself")
    return found


def _batching(batches: Batches) -> Batching:
    try:
        max_wait_us = units.parse_duration_us(batches.max_wait)
    except ValueError as exc:
        raise DeploymentError(str(exc), field="batching.max_wait") from exc
    if max_wait_us > MAX_WAIT_US:
        raise DeploymentError(f"{batches.max_wait!r} is longer than 1s", field="batching.max_wait")
    return Batching(batches.max_batch, max_wait_us)


def _cloud_budget(budget: Budget | None) -> CloudBudget | None:
    if budget is None:
        return None
    if budget.requests_per_hour is None and budget.bytes_per_hour is None:
        raise DeploymentError("give requests_per_hour, bytes_per_hour or both", field="split.cloud_budget")
    if budget.bytes_per_hour is None:
        return CloudBudget(budget.requests_per_hour)
    bytes_per_hour = _size(budget.bytes_per_hour, "split.cloud_budget.bytes_per_hour")
    if bytes_per_hour > MAX_BYTES_PER_HOUR:
        raise DeploymentError(f"{budget.bytes_per_hour!r} is more than 1024TiB", field="split.cloud_budget.bytes_per_hour")
    return CloudBudget(budget.requests_per_hour, bytes_per_hour)


def rules_of(rollout: Rollout) -> Rules:
    """Raises DeploymentError."""
    if len(rollout.waves) > MAX_WAVES:
        raise DeploymentError(f"names more than {MAX_WAVES}", field="rollout.waves")
    return Rules(
        waves=[_wave(wave) for wave in rollout.waves],
        success=rollout.success,
        observe_ms=_duration_ms(rollout.observe, "rollout.observe"),
        deadline_ms=_duration_ms(rollout.deadline, "rollout.deadline"),
        most_restarts=rollout.max_restarts,
        most_failed=rollout.max_failed,
        slower=rollout.max_slower,
        false_alarm=rollout.false_alarm,
        approve=rollout.approve,
        compared=_compared(rollout.shadow) if rollout.shadow else None,
    )


def _compared(asked: ShadowOf) -> Compared:
    share = _SHARE.fullmatch(asked.share)
    if share is None or not 0 < float(share[1]) <= 100:
        raise DeploymentError(f"{asked.share[:40]!r} is not a share such as 10%", field="rollout.shadow.share")
    return Compared(Shadow(float(share[1]) / 100, Agreement(asked.by, asked.tolerance)), asked.max_differing)


def _wave(wave: int | str) -> int | float:
    """A number of units, or a share of them."""
    if isinstance(wave, int):
        if wave < 1:
            raise DeploymentError(f"{wave} is not a number of boxes or replicas", field="rollout.waves")
        return wave
    share = _SHARE.fullmatch(wave)
    if share is None or not 0 < float(share[1]) <= 100:
        raise DeploymentError(f"{wave[:40]!r} is neither a number nor a share such as 10%", field="rollout.waves")
    return float(share[1]) / 100


def _duration_ms(text: str, field: str) -> int:
    try:
        return units.parse_duration_ms(text)
    except ValueError as exc:
        raise DeploymentError(str(exc), field=field) from exc


def _policy(disconnect: Disconnect) -> Policy:
    lost_after_ms = _silence_ms(disconnect.lost_after, "disconnect.lost_after")
    stop = disconnect.stop_on_box_after
    stop_after_ms = 0 if stop == "never" else _silence_ms(stop, "disconnect.stop_on_box_after")
    return Policy(lost_after_ms, disconnect.replace, disconnect.reconcile, stop_after_ms)


def _silence_ms(text: str, field: str) -> int:
    silence_ms = _duration_ms(text, field)
    if not LEAST_SILENCE_MS <= silence_ms <= MOST_SILENCE_MS:
        raise DeploymentError(f"{text[:40]!r} is not between 1s and 10 years", field=field)
    return silence_ms


def _update_mode(update: Update) -> UpdateMode:
    if update.strategy == "recreate":
        return "recreate"
    return "hand_over" if update.no_room == "refuse" else "hand_over_if_room"


def _check_images(spec: Spec) -> None:
    server = spec.server
    for field, image in (("image", spec.image), ("server.image", server.image if server else None)):
        if image is not None and not _IMAGE.fullmatch(image):
            message = f"{image[:80]!r} is not an image's id, sha256: and 64 hexadecimal digits, as 'skerry image build' and 'load' print it"
            raise DeploymentError(message, field=field)
    if server is not None and spec.image is not None:
        raise DeploymentError("image is the worker's, and a server of one's own takes its place: give one of the two", field="server")
    if server is not None:
        _check_server(server)


def _check_server(server: OwnServer) -> None:
    if server.model and not _SERVED_MODEL.fullmatch(server.model):
        message = f"{server.model[:80]!r} is not a model's name: letters, digits, '.', '_' and '-', at most 128"
        raise DeploymentError(message, field="server.model")
    for name in server.environment:
        if not _VARIABLE.fullmatch(name):
            raise DeploymentError(f"{name[:80]!r} is not a variable's name: letters, digits and '_'", field="server.environment")
    for field, texts in (("server.argv", server.argv), ("server.environment", [*server.environment, *server.environment.values()])):
        if len(texts) > MAX_ARGUMENTS or sum(len(text.encode()) for text in texts) > MAX_ARGUMENTS_BYTES:
            raise DeploymentError(f"more than {MAX_ARGUMENTS} entries or {MAX_ARGUMENTS_BYTES} bytes", field=field)
        if any("\0" in text for text in texts):
            raise DeploymentError("a text holds a NUL character, which no program can be given", field=field)
