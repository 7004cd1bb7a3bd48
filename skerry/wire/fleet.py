"""The fleet at a glance, as the coordinator's REST API answers it: sums for pages that stay light however many boxes there are."""

from typing import Literal

import msgspec

from skerry.wire.api import NodeState, ServeView
from skerry.wire.messages import CloudBudget

Cell = Literal["o", "t", "f", "s", "l", "g", "d", "n", "x"]
"""One box in a letter: ``o`` online and well, ``t`` online and a replica backs off, ``f`` a replica failed or the box refuses what it is
told, ``s`` silent, ``l`` lost, ``g`` signed off, ``d`` drained, ``n`` not seen yet, ``x`` thrown out. One that is not heard now is told by
that, whatever else it last said."""


class DeploymentSummary(msgspec.Struct, frozen=True):
    """A deployment without its placements. ``unheard`` of those that are ready are on boxes that are silent now. ``asked`` requests came in
    the time that was asked for, ``in_time`` of them were answered within their deadline; ``cloud_used`` requests went to the
    cloud since the clock hour began; ``cloud_budget`` is what each of its ``boxes`` may send there in one."""

    name: str
    generation: int
    model: str
    ready: int
    wanted: int
    unheard: int
    boxes: int
    problem: str
    deadline_ms: int
    target: float
    changed_at_ms: int
    serve: ServeView
    asked: int = 0
    in_time: int = 0
    cloud_used: int = 0
    cloud_budget: CloudBudget | None = None

    @property
    def attained(self) -> float | None:
        """The part that was answered in time; None where nobody asked."""
        return self.in_time / self.asked if self.asked else None


QUANTILES = (0.5, 0.9, 0.99, 0.999)


class VersionView(msgspec.Struct, frozen=True):
    """How one version of a deployment serves, or served, from ``since_s`` to ``until_s`` (Unix time); ``boxes`` is null where all did.

    ``latency_ms`` is by QUANTILES, in milliseconds, off by 4.5 % at most; 0 where nothing was answered.
    """

    model: str
    generation: int
    since_s: int
    until_s: int
    boxes: int | None
    asked: int
    refused: int
    failed: int
    late: int
    latency_ms: dict[str, float]


class FleetView(msgspec.Struct, frozen=True):
    """All of it: how many boxes are in which state, how many need a look, and every deployment in short. ``needy`` are those boxes, the
    worst first, fifty at the most."""

    states: dict[NodeState, int]
    urgent: int
    needy: list[str]
    deployments: list[DeploymentSummary]
    minutes: int


class MapGroup(msgspec.Struct, frozen=True):
    """Boxes with one value of a label, by name; "" for those that have none."""

    value: str
    names: list[str]


class MapView(msgspec.Struct, frozen=True):
    """Every box in a letter (Cell), in the order of ``groups``. ``layout`` stands for which boxes are where: who has the groups of it
    already names it in the next call, and gets the letters alone. ``keys`` are the labels by which boxes can be put together."""

    layout: str
    cells: str
    by: str
    keys: list[str] = []
    groups: list[MapGroup] = []


class DifferenceLine(msgspec.Struct, frozen=True):
    """One thing that is wanted of a replica, or of the box where ``replica`` is empty, and what the box says of it; empty for nothing."""

    replica: str
    field: str
    wanted: str
    found: str
    is_alike: bool


class Difference(msgspec.Struct, frozen=True):
    """What a box should be against what it says that it is."""

    generation: int
    reported_generation: int
    lines: list[DifferenceLine]

    @property
    def is_alike(self) -> bool:
        """Whether there is none."""
        return all(line.is_alike for line in self.lines)


WHO = ("edge", "peer", "cloud", "refused")
"""Who answers; ``refused``: nobody."""


class FlowRow(msgspec.Struct, frozen=True):
    """Requests that came to boxes with one value of a label ("" for none), by who answered them."""

    value: str
    edge: int = 0
    peer: int = 0
    cloud: int = 0
    refused: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.edge + self.peer + self.cloud + self.refused


class FlowView(msgspec.Struct, frozen=True):
    """From where requests came within ``minutes``, those first that asked most; ``others`` of them are put together in a last row."""

    minutes: int
    by: str
    rows: list[FlowRow]
    others: int = 0
