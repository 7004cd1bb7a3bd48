"""Boxes that are to run nothing for a while: what can run elsewhere does, and goes on here until it is ready there."""

import time
from collections.abc import Callable

from aiohttp import web
from sqlite_utils import Database as Tables

from coordinator.api.access import Access
from coordinator.api.answers import Handler, refuse
from coordinator.api.bodies import json_body
from coordinator.api.calls import ACTOR, Call, checked
from coordinator.news import News
from coordinator.registry import audit, events, nodes
from coordinator.registry.database import Database
from coordinator.registry.nodes import Drained
from skerry.wire.api import DrainRequest

CALLS = [
    Call("PUT", "/v1/nodes/{id}/drain", "drain", "Have a box run nothing", str, 204, role="operator", body=DrainRequest),
    Call("DELETE", "/v1/nodes/{id}/drain", "undrain", "Let a box run things again", str, 204, role="operator"),
]


class DrainCalls:
    """The handlers of CALLS."""

    def __init__(self, database: Database, access: Access, news: News, *, replan: Callable[[], None]) -> None:
        self._database = database
        self._access = access
        self._news = news
        self._replan = replan

    def handler(self, call: Call) -> Handler:
        """The call's method, behind the check of who calls."""
        return checked(self._access, call, getattr(self, call.handler))

    async def drain(self, request: web.Request) -> web.Response:
        """See CALLS."""
        now_ms = time.time_ns() // 1_000_000
        return await self._set(request, Drained(now_ms, (await json_body(request, DrainRequest)).reason), now_ms)

    async def undrain(self, request: web.Request) -> web.Response:
        """See CALLS."""
        return await self._set(request, None, time.time_ns() // 1_000_000)

    async def _set(self, request: web.Request, wanted: Drained | None, now_ms: int) -> web.Response:
        node = request.match_info["id"]
        kind = "node.drained" if wanted else "node.undrained"

        def work(tables: Tables) -> None:
            if nodes.read_node(tables, node) is None:
                raise refuse(404, "not_found", f"no node {node[:80]!r}", hint="see 'skerry node list'")
            held = nodes.read_drained_one(tables, node)
            if (held is None) == (wanted is None) and (held is None or wanted is None or held.reason == wanted.reason):
                return
            nodes.save_drained(tables, node, wanted)
            reason = wanted.reason if wanted else ""
            audit.append(tables, request[ACTOR], kind, node, before=held.reason if held else "", after=reason, now_ms=now_ms)
            events.add_own_event(tables, node, kind, node, reason, now_ms)

        await self._database.write(work)
        self._news.tell("nodes", "events")
        self._replan()
        return web.Response(status=204)
