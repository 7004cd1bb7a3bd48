"""How the console says things: a state as colour, symbol and word; numbers with their units. Pure, but for the language of the request."""

from datetime import UTC, datetime
from typing import Literal

import msgspec

from coordinator.console.language import N_, _
from skerry.wire.api import RolloutView, ServeView
from skerry.wire.units import format_bytes

Level = Literal["good", "busy", "warn", "bad", "idle"]
"""``busy``: on its way, nobody need act. ``idle``: says nothing good or bad."""

NOTHING = "\u2013"
THIN = "\u202f"
"""A narrow space that does not break."""


class Mark(msgspec.Struct, frozen=True):
    """A state; the symbol says the same as the colour, for those who do not see it. The word is translated where it is shown."""

    level: Level
    symbol: str
    word: str


class Share(msgspec.Struct, frozen=True):
    """Who answered how much; ``start`` and ``width`` in percent of a bar."""

    who: str
    count: int
    start: float
    width: float


NODE_MARKS: dict[str, Mark] = {
    "online": Mark("good", "●", N_("online")),
    "unknown": Mark("warn", "▲", N_("silent")),
    "lost": Mark("bad", "✕", N_("lost")),
    "offline": Mark("idle", "○", N_("signed off")),
    "new": Mark("idle", "○", N_("not seen yet")),
    "revoked": Mark("idle", "⊘", N_("thrown out")),
}
PHASE_MARKS: dict[str, Mark] = {
    "ready": Mark("good", "●", N_("ready")),
    "pending": Mark("idle", "○", N_("pending")),
    "fetching": Mark("busy", "↓", N_("fetching")),
    "starting": Mark("busy", "◐", N_("starting")),
    "draining": Mark("busy", "◑", N_("draining")),
    "backoff": Mark("warn", "▲", N_("backing off")),
    "failed": Mark("bad", "✕", N_("failed")),
    "crash_loop": Mark("bad", "✕", N_("crash loop")),
}
SYMBOLS: dict[Level, str] = {"good": "●", "busy": "◐", "warn": "▲", "bad": "✕", "idle": "○"}
_EVENT_ENDINGS: dict[str, Level] = {
    "silent": "warn",
    "offline": "idle",
    "damaged": "bad",
    "failed": "bad",
    "refused": "bad",
    "lost": "warn",
    "ended": "warn",
    "replaces": "warn",
    "online": "good",
    "back": "good",
    "up": "good",
    "ready": "good",
    "done": "good",
    "waiting": "busy",
    "aborted": "warn",
}


def node_mark(state: str) -> Mark:
    """A box's state."""
    return NODE_MARKS.get(state) or Mark("idle", "○", state)


def phase_mark(phase: str) -> Mark:
    """A replica's phase."""
    return PHASE_MARKS.get(phase) or Mark("idle", "○", phase)


def ready_mark(ready: int, wanted: int) -> Mark:
    """How much of what is wanted is there."""
    if not wanted:
        return Mark("warn", "▲", N_("nothing placed"))
    return (
        Mark("good", "●", N_("ready")) if ready >= wanted else Mark("busy", "◐", _("%(ready)s of %(wanted)s", ready=ready, wanted=wanted))
    )


ROLLOUT_MARKS: dict[str, Mark] = {
    "rolling": Mark("busy", "◐", N_("spreading")),
    "waiting": Mark("warn", "▲", N_("waits to be approved")),
    "done": Mark("good", "●", N_("done")),
    "failed": Mark("bad", "✕", N_("failed, taken back")),
    "aborted": Mark("warn", "▲", N_("aborted, taken back")),
}


def rollout_mark(view: RolloutView) -> Mark:
    """How a change stands."""
    is_held = view.is_paused and view.phase in ("rolling", "waiting")
    return Mark("warn", "▲", N_("paused")) if is_held else ROLLOUT_MARKS[view.phase]


def event_level(kind: str) -> Level:
    """How an event reads at a glance; the last word of its kind says it."""
    return _EVENT_ENDINGS.get(kind.rpartition(".")[2], "idle")


def shares(serve: ServeView) -> list[Share]:
    """Who answered, as parts of a bar, refusals included; no parts where nobody asked."""
    counts = {"edge": serve.edge, "peer": serve.peer, "cloud": serve.cloud, "refused": serve.refused}
    total = sum(counts.values())
    parts, start = [], 0.0
    for who, count in counts.items():
        width = 100 * count / total if total else 0.0
        parts.append(Share(who, count, round(start, 2), round(width, 2)))
        start += width
    return parts if total else []


def iso(at_ms: int) -> str:
    """Machine-readable, for ``<time datetime>``."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def utc(at_ms: int) -> str:
    """What is read where no script puts it into the viewer's zone."""
    return f"{datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"


def count(value: int) -> str:
    """``12 345``."""
    return f"{value:,}".replace(",", THIN)


def decimal(value: float) -> str:
    """Two or three digits that matter: ``0.4``, ``12.3``, ``1 240``."""
    return f"{value:.1f}".removesuffix(".0") if value < 100 else count(round(value))


def rate(per_second: float) -> str:
    """``12.3/s``."""
    return f"{decimal(per_second)}/s"


def ms(value: float) -> str:
    """``3.2 ms``, ``48 ms``, ``1.2 s``; a dash where nothing was measured."""
    if value <= 0:
        return NOTHING
    if value >= 10_000:
        return f"{value / 1000:.3g}{THIN}s"
    return f"{value:.1f}{THIN}ms" if value < 10 else f"{value:.0f}{THIN}ms"


def percent(ratio: float) -> str:
    """``98.2 %`` near the ends, else ``42 %``."""
    value = 100 * ratio
    near_an_end = 0 < value < 1 or 99 < value < 100
    return f"{value:.1f}{THIN}%" if near_an_end else f"{value:.0f}{THIN}%"


def size(value: int) -> str:
    """``512 MiB``."""
    return format_bytes(value).replace(" ", THIN)


FILTERS = {
    "node_mark": node_mark,
    "rollout_mark": rollout_mark,
    "phase_mark": phase_mark,
    "event_level": event_level,
    "shares": shares,
    "iso": iso,
    "utc": utc,
    "count": count,
    "decimal": decimal,
    "rate": rate,
    "ms": ms,
    "percent": percent,
    "size": size,
}

SAID = [
    *(N_("edge"), N_("peer"), N_("cloud"), N_("refused")),
    *(N_("none"), N_("unchecked"), N_("fetching"), N_("unpacking"), N_("trial"), N_("returning"), N_("failed"), N_("waiting")),
    *(N_("viewer"), N_("operator"), N_("admin"), N_("edge"), N_("cloud"), N_("process"), N_("container")),
    *(N_("generation"), N_("software"), N_("replica"), N_("model"), N_("phase"), N_("isolation")),
]
"""Words of others that pages show: who answered, how a signature and an update stand, what of a box is compared."""
