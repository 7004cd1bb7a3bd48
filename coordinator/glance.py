"""The whole fleet at a glance: sums, for pages and callers who do not ask for each box; the same for all who ask at a time."""

import gzip
import hashlib
import time
from collections.abc import Callable

import msgspec
from sqlite_utils import Database as Tables

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
from skerry.wire.fleet import WHO, DeploymentSummary, FleetView, FlowRow, FlowView, MapView

MOST_NEEDY = 50
MOST_KEYS = 20
MOST_FLOWS = 15
HOUR_S = 3600
PACKED = 5
"""How hard gzip tries."""
UNPLANNED = glance.Standing(0, 0, 0, 0, "not planned yet")


class _Sums(msgspec.Struct, frozen=True):
    """What is the same whichever time is asked for."""

    states: dict[NodeState, int]
    needy: glance.Needy
    deployments: list[DeploymentSummary]
    streams: dict[Stream, glance.Streams]
    events: int


class MapAnswer(msgspec.Struct, frozen=True):
    """A MapView as JSON, packed by gzip: all of it, and without what stands for one ``layout`` of the map already."""

    layout: str
    whole: bytes
    letters: bytes


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

    async def map(self, search: Search, *, by: str) -> MapAnswer:
        """Every box that is looked for as a letter, put together by a label."""
        key = ("map", by, msgspec.json.encode(search))
        return await self._recent.get(key, lambda: self._database.read(lambda tables: _map(tables, search, by)))

    async def flow(self, *, minutes: int, by: str, deployment: str = "") -> FlowView:
        """From where requests came, and who answered."""
        key = ("flow", minutes, by, deployment)
        since_s = int(time.time()) - minutes * 60
        found = await self._recent.get(
            key, lambda: self._database.read(lambda tables: measurements.read_flow(tables, since_s=since_s, by=by, deployment=deployment))
        )
        rows = [FlowRow(*row) for row in found]
        rest = rows[MOST_FLOWS:]
        together = FlowRow("…", *(sum(getattr(row, who) for row in rest) for who in WHO))
        return FlowView(minutes, by, [*rows[:MOST_FLOWS], *([together] if rest else [])], len(rest))

    async def label_keys(self) -> list[str]:
        """By which boxes can be put together."""
        return await self._recent.get("keys", lambda: self._database.read(lambda tables: glance.read_label_keys(tables, most=MOST_KEYS)))

    async def _sums(self) -> _Sums:
        return await self._recent.get("sums", lambda: self._database.read(_sums))


def _sums(tables: Tables) -> _Sums:
    shown = [_summary(tables, stored) for stored in deployments.read_deployments(tables)]
    needy, states = glance.read_needy(tables, limit=MOST_NEEDY), finding.count_by_state(tables)
    return _Sums(states, needy, shown, glance.read_streams(tables), glance.count_events(tables))


def _summary(tables: Tables, stored: Stored) -> DeploymentSummary:
    spec = stored.spec
    standing = glance.read_standing(tables, stored.name, by_box=spec.replicas.count is None) or UNPLANNED
    return DeploymentSummary(
        name=stored.name,
        generation=stored.generation,
        model=f"{spec.model}:{spec.version}",
        ready=standing.ready,
        wanted=standing.wanted,
        unheard=standing.unheard,
        boxes=standing.boxes,
        problem=standing.problem,
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


def _map(tables: Tables, search: Search, by: str) -> MapAnswer:
    """What is done for each box is done by SQLite and zlib, beside which the rest of the program goes on."""
    found = glance.read_cells(tables, search, by)
    groups = [{"value": one.value, "names": msgspec.Raw(one.names)} for one in found]
    placed = msgspec.json.encode(groups)
    layout = hashlib.sha256(by.encode() + b" " + placed).hexdigest()[:16]
    view = MapView(layout, "".join(one.letters for one in found), by)
    whole = {
        "layout": layout,
        "cells": view.cells,
        "by": by,
        "keys": glance.read_label_keys(tables, most=MOST_KEYS),
        "groups": msgspec.Raw(placed),
    }
    return MapAnswer(layout, *(gzip.compress(msgspec.json.encode(one), PACKED, mtime=0) for one in (whole, view)))
