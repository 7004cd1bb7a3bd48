"""What boxes tell of the requests of a deployment that came to them, put together: the coordinator asks those that had the most.

Whom it can't reach, or who does not understand the question, is named with the reason. Nothing that a box tells is kept.
"""

import asyncio
import time
from typing import Literal, TypeVar

import msgspec

from coordinator.gateways import MOST_TOLD_BYTES, Gateways, NotAnswered
from coordinator.views import Views
from skerry.wire import codec
from skerry.wire.api import NodeView
from skerry.wire.decision import Changed, Decisions, MovedOn, Tally, WhatIf
from skerry.wire.slowest import Slowest, SlowestOfAll, SlowRequestOf

T = TypeVar("T")

MOST_ASKED = 24
AT_A_TIME = 8
MOST_SHOWN = 30
MOST_OF_ONE = 10
"""One box's must not hide the others'."""
MOST_COUNT = 2**53
"""Sums stop here: a box in an enemy's hands must not make a number that JSON's readers can't hold."""


class _Told(msgspec.Struct, frozen=True):
    """The boxes that had requests are so many; of those asked, what each told, or why it did not."""

    boxes: int
    answers: dict[str, bytes]
    silent: list[str]


class Survey:
    """Asks through ``gateways``."""

    def __init__(self, views: Views, gateways: Gateways) -> None:
        self._views = views
        self._turns = asyncio.Semaphore(AT_A_TIME)
        self.gateways = gateways

    async def decisions(self, name: str, query: dict[str, str], *, minutes: int, node: str = "") -> WhatIf:
        """What would have become of the requests of the last ``minutes``; ``query`` as in skerry.wire.decision.changed."""
        asked = {key: query[key] for key in Changed.__struct_fields__ if query.get(key)}
        told = await self._told(name, "decisions", asked | {"minutes": str(minutes)}, minutes=minutes, node=node)
        found, silent = _understood(told, Decisions)
        moved = [MovedOn(**msgspec.structs.asdict(move), node=box) for box, one in found.items() for move in one.moved[:MOST_OF_ONE]]
        moved.sort(key=lambda move: -move.at_ms)
        return WhatIf(
            deployment=name,
            since_ms=min((one.since_ms for one in found.values()), default=_now_ms() - minutes * 60_000),
            boxes=told.boxes,
            asked=sorted(found),
            silent=silent,
            cases=min(MOST_COUNT, sum(one.cases for one in found.values())),
            before=_sum([one.before for one in found.values()]),
            after=_sum([one.after for one in found.values()]),
            moved=moved[:MOST_SHOWN],
        )

    async def slowest(self, name: str, *, minutes: int, node: str = "") -> SlowestOfAll:
        """The requests of the last ``minutes`` that took longest."""
        told = await self._told(name, "slowest", {"minutes": str(minutes)}, minutes=minutes, node=node)
        found, silent = _understood(told, Slowest)
        requests = [
            SlowRequestOf(**msgspec.structs.asdict(each), asked=box) for box, one in found.items() for each in one.requests[:MOST_OF_ONE]
        ]
        requests.sort(key=lambda one: (-one.took_ms, -one.at_ms, one.asked))
        return SlowestOfAll(name, minutes, told.boxes, sorted(found), silent, requests[:MOST_SHOWN])

    async def _told(
        self, name: str, what: Literal["decisions", "slowest"], query: dict[str, str], *, minutes: int, node: str
    ) -> _Told:  # fmt: skip
        names, boxes = await self._views.most_asked(name, minutes=minutes, limit=MOST_ASKED)
        views = await self._views.some([node] if node else names)
        answers: dict[str, bytes] = {}
        silent = [f"{node[:80]}: there is no such box"] if node and not views else []

        async def ask(view: NodeView) -> None:
            if reason := _why_not(view):
                silent.append(f"{view.id}: {reason}")
                return
            async with self._turns:
                try:
                    asked = await self.gateways.look(view.id, view.gateway_url, name, what, query)
                except NotAnswered as exc:
                    silent.append(str(exc))
                    return
            if asked.status == 200:
                answers[view.id] = asked.body
            else:
                silent.append(f"box {view.id} said {asked.status}: it does not have it any more, or its software is older")

        async with asyncio.TaskGroup() as tasks:
            for view in views:
                tasks.create_task(ask(view), name="survey.ask")
        return _Told(boxes, answers, silent)


def _why_not(view: NodeView) -> str:
    if view.state != "online":
        return f"it is {view.state}"
    return "" if view.gateway_url else "where its gateway is is not known"


def _understood(told: _Told, kind: type[T]) -> tuple[dict[str, T], list[str]]:
    """The answers that make sense, by box, and the others' reasons."""
    found: dict[str, T] = {}
    silent = [*told.silent]
    for box, body in sorted(told.answers.items()):
        try:
            found[box] = codec.decode(body, kind, max_bytes=MOST_TOLD_BYTES)
        except codec.Malformed as exc:
            silent.append(f"box {box} says what this version does not understand: {exc}")
    return found, sorted(silent)


def _sum(tallies: list[Tally]) -> Tally:
    counts = {name: min(MOST_COUNT, sum(max(0, getattr(one, name)) for one in tallies)) for name in Tally.__struct_fields__}
    return Tally(**counts)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
