"""The whole fleet at a glance: sums, for pages and callers who do not ask for each box; the same for all who ask at a time."""

import hashlib
import time
from collections.abc import Callable
from itertools import groupby

import msgspec
from sqlite_utils import Database as Tables

from coordinator.core.planner import Outcome
from coordinator.core.search import Search
from coordinator.live import Live
from coordinator.news import News
from coordinator.recent import Recent
from coordinator.registry import deployments, finding, glance, measurements
from coordinator.registry.database import Database
from coordinator.registry.deployments import Stored
from coordinator.registry.events import Stream
from coordinator.registry.measurements import Served
from skerry import __version__
from skerry.runtime import refusals
from skerry.wire.api import NodeState, ServeView, StatusView
from skerry.wire.fleet import DeploymentSummary, FleetView, MapGroup, MapView

MOST_NEEDY = 50
MOST_KEYS = 20
HOUR_S = 3600


class _Sums(msgspec.Struct, frozen=True):
    """What is the same whichever time is asked for."""

    states: dict[NodeState, int]
    needy: glance.Needy
    deployments: list[DeploymentSummary]
    streams: dict[Stream, glance.Streams]
    events: int


class _Layout(msgspec.Struct, frozen=True):
    key: str
    cells: str
    keys: list[str]
    groups: list[MapGroup]


class Glance:
    """Reads; changes nothing. ``is_connected`` says whether the broker is there."""

    def __init__(self, database: Database, live: Live, news: News, *, fleet: str, is_connected: Callable[[], bool]) -> None:
        self._database = database
        self._live = live
        self._fleet = fleet
        self._is_connected = is_connected
        self._recent = Recent(news)

    async def status(self) -> StatusView:
        """The fleet in numbers."""
        sums = await self._sums()
        online = sums.states.get("online", 0)
        return StatusView(
            fleet=self._fleet,
            version=__version__,
            broker_connected=self._is_connected(),
            nodes_online=online,
            nodes=sum(sums.states.values()),
            deployments=len(sums.deployments),
            deployments_ready=sum(1 for one in sums.deployments if one.wanted and one.ready == one.wanted),
            events=sums.events,
            events_missing=sums.streams["events"].missing,
            events_lost=sums.streams["events"].lost,
            samples_missing=sums.streams["samples"].missing,
            samples_lost=sums.streams["samples"].lost,
            refused=refusals.totals(),
        )

    async def fleet(self, *, minutes: int) -> FleetView:
        """States, what needs a look, and each deployment with what it attained over so many minutes."""
        sums = await self._sums()
        attained = await self._recent.get(("attained", minutes), lambda: self._database.read(lambda tables: _attained(tables, minutes)))
        used = await self._recent.get(("cloud",), lambda: self._database.read(_cloud_used))
        shown = []
        for one in sums.deployments:
            total = attained.get(one.name, Served(one.name, 0, ""))
            in_time = total.edge + total.peer + total.cloud - total.late
            shown.append(
                msgspec.structs.replace(
                    one, serve=self._live.serve(one.name), asked=total.asked, in_time=max(0, in_time), cloud_used=used.get(one.name, 0)
                )
            )
        return FleetView(sums.states, sums.needy.urgent, sums.needy.names, shown, minutes)

    async def map(self, search: Search, *, by: str, layout: str) -> MapView:
        """Every box that is looked for as a letter, put together by a label; names only for who has not got those of ``layout``."""
        key = ("map", by, msgspec.json.encode(search))
        held = await self._recent.get(key, lambda: self._database.read(lambda tables: _layout(tables, search, by)))
        if held.key == layout:
            return MapView(held.key, held.cells, by)
        return MapView(held.key, held.cells, by, held.keys, held.groups)

    async def _sums(self) -> _Sums:
        return await self._recent.get("sums", lambda: self._database.read(_sums))


def _sums(tables: Tables) -> _Sums:
    silent = glance.read_silent(tables)
    outcomes = deployments.read_outcomes(tables)
    shown = [_summary(tables, stored, outcomes.get(stored.name), silent) for stored in deployments.read_deployments(tables)]
    needy = glance.read_needy(tables, limit=MOST_NEEDY)
    states = finding.count_by_state(tables)
    return _Sums(states, needy, shown, glance.read_streams(tables), glance.count_events(tables))


def _summary(tables: Tables, stored: Stored, outcome: Outcome | None, silent: set[str]) -> DeploymentSummary:
    running = glance.read_running(tables, stored.name)
    spec = stored.spec
    ready, unheard = set(), 0
    for placed in outcome.placements if outcome else []:
        unheard += placed.node in silent
        if (placed.node, placed.replica) in running and not placed.is_lost:
            ready.add((placed.replica, placed.node if spec.replicas.count is None else ""))
    return DeploymentSummary(
        name=stored.name,
        generation=stored.generation,
        model=f"{spec.model}:{spec.version}",
        ready=len(ready),
        wanted=outcome.wanted if outcome else 0,
        unheard=unheard,
        boxes=len({placed.node for placed in outcome.placements}) if outcome else 0,
        problem=outcome.problem if outcome else "not planned yet",
        deadline_ms=spec.deadline_ms,
        target=spec.target,
        changed_at_ms=stored.changed_at_ms,
        serve=ServeView(window_s=0.0),
        cloud_budget=spec.cloud_budget,
    )


def _attained(tables: Tables, minutes: int) -> dict[str, Served]:
    """By deployment, all that was asked of it."""
    return measurements.totals(tables, since_s=int(time.time()) - minutes * 60)


def _cloud_used(tables: Tables) -> dict[str, int]:
    """By deployment, what went to the cloud since the clock hour began: budgets begin anew with it."""
    since_s = int(time.time()) // HOUR_S * HOUR_S
    return {name: total.cloud for name, total in measurements.totals(tables, since_s=since_s).items()}


def _layout(tables: Tables, search: Search, by: str) -> _Layout:
    found = glance.read_cells(tables, search, by)
    groups = [MapGroup(value, [name for _, name, _ in each]) for value, each in groupby(found, key=lambda one: one[0])]
    key = hashlib.sha256(msgspec.json.encode([by, groups])).hexdigest()[:16]
    return _Layout(key, "".join(cell for _, _, cell in found), glance.read_label_keys(tables, most=MOST_KEYS), groups)
