"""Boxes that hold newer documents than this coordinator ever sent: it was restored from a backup of an earlier day. Nothing is told to
them, and so nothing on them stops, until somebody says that this coordinator is to lead them again."""

import time
from collections.abc import Callable, Mapping

from aiohttp import web
from sqlite_utils import Database as Tables

from coordinator.api.access import Access
from coordinator.api.answers import Handler, json_answer, refuse
from coordinator.api.bodies import json_body
from coordinator.api.calls import ACTOR, Call, checked
from coordinator.core.planner import Outcome
from coordinator.news import News
from coordinator.registry import audit, deployments, events, nodes
from coordinator.registry.database import Database
from coordinator.registry.nodes import Node
from skerry.wire.api import AheadView, TakeOver
from skerry.wire.messages import Desired

CALLS = [
    Call("GET", "/v1/ahead", "list_ahead", "Boxes that hold more than this coordinator ever told them", list[AheadView]),
    Call(
        "POST", "/v1/ahead/take-over", "take_over", "Lead such boxes again by what this coordinator knows", list[AheadView],
        role="operator", body=TakeOver,
    ),
]  # fmt: skip


class RecoveryCalls:
    """The handlers of CALLS."""

    def __init__(self, database: Database, access: Access, news: News, *, fleet: str, replan: Callable[[], None]) -> None:
        self._database = database
        self._access = access
        self._news = news
        self._fleet = fleet
        self._replan = replan

    def handler(self, call: Call) -> Handler:
        """The call's method, behind the check of who calls."""
        return checked(self._access, call, getattr(self, call.handler))

    async def list_ahead(self, _: web.Request) -> web.Response:
        """See CALLS."""
        return json_answer(await self._database.read(_ahead))

    async def take_over(self, request: web.Request) -> web.Response:
        """See CALLS."""
        asked = (await json_body(request, TakeOver)).nodes
        now_ms = time.time_ns() // 1_000_000

        def work(tables: Tables) -> list[AheadView]:
            found = {view.node: view for view in _ahead(tables)}
            if unknown := sorted(set(asked) - set(found)):
                hint = "see 'skerry recover --dry-run'"
                raise refuse(404, "not_ahead", f"box {unknown[0][:80]!r} holds nothing that is newer", hint=hint)
            taken = [view for name, view in found.items() if not asked or name in asked]
            for view in taken:
                # Of the box's own generation, and over: the next plan makes the following one of it.
                nodes.save_desired(tables, Desired(self._fleet, view.node, view.held_generation, 0, expires_at_ms=1))
                before = f"generation {view.held_generation} there, {view.known_generation} here"
                audit.append(tables, request[ACTOR], "node.taken_over", view.node, before=before, now_ms=now_ms)
                events.add_own_event(tables, view.node, "node.taken_over", view.node, before, now_ms)
            return taken

        taken = await self._database.write(work)
        self._news.tell("nodes", "events")
        self._replan()
        return json_answer(taken)


def _ahead(tables: Tables) -> list[AheadView]:
    desired, outcomes = nodes.read_desired(tables), deployments.read_outcomes(tables)
    found = ((node, nodes.ahead(node, desired.get(node.id))) for node in nodes.read_nodes(tables))
    return [_view(node, held, desired.get(node.id), outcomes) for node, held in found if held]


def _view(node: Node, held: int, told: Desired | None, outcomes: Mapping[str, Outcome]) -> AheadView:
    runs = {replica.name for replica in (node.reported.replicas if node.reported else [])}
    wanted = {placed.replica for outcome in outcomes.values() for placed in outcome.placements if placed.node == node.id}
    return AheadView(node.id, held, told.generation if told else 0, sorted(runs - wanted), sorted(wanted - runs), sorted(runs & wanted))
