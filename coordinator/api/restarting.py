"""Replicas that are to be started anew: the wish travels in the box's signed document like all else, and holds for a box that is away."""

import time
from collections.abc import Callable

from aiohttp import web
from sqlite_utils import Database as Tables

from coordinator.api.access import Access
from coordinator.api.answers import Handler
from coordinator.api.calls import ACTOR, Call, checked, unknown
from coordinator.news import News
from coordinator.registry import audit, events, nodes
from coordinator.registry.database import Database

CALLS = [
    Call(
        "POST", "/v1/nodes/{id}/replicas/{replica}/restart", "restart_replica",
        "Have a replica started anew: as an update of it, the new one beside the old one where both fit", str, 204, role="operator",
    ),
]  # fmt: skip


class RestartCalls:
    """The handlers of CALLS."""

    def __init__(self, database: Database, access: Access, news: News, *, replan: Callable[[], None]) -> None:
        self._database = database
        self._access = access
        self._news = news
        self._replan = replan

    def handler(self, call: Call) -> Handler:
        """The call's method, behind the check of who calls."""
        return checked(self._access, call, getattr(self, call.handler))

    async def restart_replica(self, request: web.Request) -> web.Response:
        """See CALLS."""
        node, replica = request.match_info["id"], request.match_info["replica"]
        now_ms = time.time_ns() // 1_000_000

        def work(tables: Tables) -> None:
            told = nodes.read_desired_of(tables, node)
            if told is None:
                raise unknown("node", node, "skerry node list")
            if all(one.name != replica for one in told.replicas):
                raise unknown("replica", replica, f"skerry node show {node[:80]}")
            nodes.ask_restart(tables, node, replica)
            audit.append(tables, request[ACTOR], "replica.restart", f"{node}/{replica}", now_ms=now_ms)
            events.add_own_event(tables, node, "replica.restart", replica, "an operator asked for it", now_ms)

        await self._database.write(work)
        self._news.tell("events")
        self._replan()
        return web.Response(status=204)
