"""The fleet at a glance: its numbers, every deployment in short, and every box in a letter."""

import gzip

from aiohttp import web

from coordinator.api.access import Access
from coordinator.api.answers import Handler, json_answer, refuse
from coordinator.api.calls import Call, checked, number, search_of
from coordinator.glance import Glance
from skerry.wire.api import StatusView
from skerry.wire.fleet import FleetView, FlowView, MapView

MOST_LABEL_CHARS = 128
CALLS = [
    Call("GET", "/v1/status", "status", "The fleet in numbers", StatusView),
    Call(
        "GET", "/v1/fleet", "show_fleet", "Boxes by state, those that need a look, and every deployment in short", FleetView,
        query={"minutes": "1 to 2880, default 60: over which it is told what was answered in time"},
    ),
    Call(
        "GET", "/v1/flow", "show_flow", "From where requests came, by a label of the boxes that were asked, and who answered", FlowView,
        query={"minutes": "1 to 2880, default 60", "by": "a label, default site", "deployment": "only this one's"},
    ),
    Call(
        "GET", "/v1/map", "show_map", "Every box in a letter, put together by a label", MapView,
        query={
            "q": "words that all must hold, as in /v1/nodes", "by": "a label, default site",
            "layout": "of an earlier answer: where boxes are as they were, the letters alone come",
        },
    ),
]  # fmt: skip


class GlanceCalls:
    """The handlers of CALLS."""

    def __init__(self, glance: Glance, access: Access) -> None:
        self._glance = glance
        self._access = access

    def handler(self, call: Call) -> Handler:
        """The call's method, behind the check of who calls."""
        return checked(self._access, call, getattr(self, call.handler))

    async def status(self, _: web.Request) -> web.Response:
        """See CALLS."""
        return json_answer(await self._glance.status())

    async def show_fleet(self, request: web.Request) -> web.Response:
        """See CALLS."""
        return json_answer(await self._glance.fleet(minutes=number(request, "minutes", 60, most=2880)))

    async def show_flow(self, request: web.Request) -> web.Response:
        """See CALLS."""
        minutes = number(request, "minutes", 60, most=2880)
        deployment = request.query.get("deployment", "")[:MOST_LABEL_CHARS]
        return json_answer(await self._glance.flow(minutes=minutes, by=label_of(request), deployment=deployment))

    async def show_map(self, request: web.Request) -> web.Response:
        """See CALLS."""
        by = label_of(request)
        found = await self._glance.map(search_of(request), by=by)
        body = found.letters if request.query.get("layout", "") == found.layout else found.whole
        headers = {"Content-Type": "application/json", "Vary": "Accept-Encoding"}
        if "gzip" not in request.headers.get("Accept-Encoding", ""):
            return web.Response(body=gzip.decompress(body), headers=headers)
        return web.Response(body=body, headers={**headers, "Content-Encoding": "gzip"})


def label_of(request: web.Request) -> str:
    """By which label boxes are put together. Raises Refused."""
    by = request.query.get("by", "site")
    if not by or len(by) > MOST_LABEL_CHARS or not by.isprintable():
        raise refuse(400, "invalid_query", "by: not the name of a label", field="by")
    return by
