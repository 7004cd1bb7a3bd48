"""The console's pages about the fleet: read from the views, kept fresh by ``static/live.js``. They work without scripts, for reading."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from aiohttp import web

from coordinator.api import releases, rollouts
from coordinator.console.rendering import is_fragment, missing, page
from coordinator.console.verdict import judge
from coordinator.console.wording import Mark, ready_mark
from coordinator.core.rollout import OVER
from coordinator.core.search import MOST_CHARS, NotUnderstood, Search, parse
from coordinator.registry.database import Database
from coordinator.views import Views
from skerry.wire import codec
from skerry.wire.api import DeploymentView, NodeView, SplitView, StatusView

SPANS_MIN = {15: "15 min", 60: "1 h", 360: "6 h"}
MOST_BOXES = 30
"""On the overview; what needs a look comes first, the others are one click away."""
BOXES_A_PAGE = 100
EVENTS_HERE = 10
NEW = "name: \nmodel: \nreplicas: {per_node: 1}\nresources: {memory: 512MiB}\nslo: {deadline_ms: 100}\n"
"""What the editor begins with."""
EVENT_LIMITS = (200, 1000)


class Pages:
    """The handlers; ``status`` is the API's call of that name, which knows whether the broker is there."""

    def __init__(self, views: Views, database: Database, status: Callable[[web.Request], Awaitable[web.Response]]) -> None:
        self._views = views
        self._database = database
        self._ask_status = status

    async def _status(self, request: web.Request) -> StatusView:
        answer = await self._ask_status(request)
        return codec.decode((answer.text or "").encode(), StatusView)

    async def overview(self, request: web.Request) -> web.StreamResponse:
        """The fleet at one glance."""
        status, nodes, deployments, events = await asyncio.gather(
            self._status(request), self._views.nodes(), self._views.deployments(), self._views.events(limit=EVENTS_HERE)
        )
        verdict = judge(status, nodes, deployments, now_ms=time.time_ns() // 1_000_000)
        worst_first = sorted(nodes, key=lambda node: (not _needs_a_look(node), node.id))
        context = {
            "status": status,
            "verdict": verdict,
            "nodes": worst_first[:MOST_BOXES],
            "more_nodes": max(0, len(nodes) - MOST_BOXES),
            "silent": _silent(nodes),
            "deployments": deployments,
            "events": events,
            "per_second": sum(view.serve.per_second for view in deployments),
            "refused": sum(view.serve.refused for view in deployments),
            **await self._span(request),
        }
        return page(request, "overview.html", context)

    async def nodes(self, request: web.Request) -> web.StreamResponse:
        """Boxes, a page at a time, narrowed by what stands in the address."""
        text, after = request.query.get("q", "")[:MOST_CHARS], request.query.get("after", "")
        wrong = ""
        try:
            search = parse(text)
        except NotUnderstood as exc:
            search, wrong = Search(), str(exc)
        found, (count, states) = await asyncio.gather(
            self._views.found(search, after=after, limit=BOXES_A_PAGE), self._views.found_in_all(search)
        )
        context = {"nodes": found.nodes, "last": found.last, "after": after, "q": text, "wrong": wrong, "count_found": count}
        return page(request, "nodes.html", {**context, "states": states, "total": sum(states.values())})

    async def node(self, request: web.Request) -> web.StreamResponse:
        """One box."""
        name = request.match_info["id"]
        node = await self._views.node(name)
        if node is None:
            return missing(
                request, f"There is no box “{name[:80]}” in this fleet.", "It may never have connected, or the name is misspelt."
            )
        context = {"node": node, "events": await self._views.events(node=name, limit=EVENTS_HERE), **await self._span(request, node=name)}
        return page(request, "node.html", context)

    async def logs(self, request: web.Request) -> web.StreamResponse:
        """What a replica's sandbox writes; its script asks the API, and so the box, while somebody looks."""
        name, replica = request.match_info["id"], request.match_info["replica"]
        node = await self._views.node(name)
        if node is None or all(one.name != replica for one in node.replicas):
            return missing(request, f"Box “{name[:80]}” reports no replica “{replica[:80]}”.", "It may have been stopped, or moved.")
        return page(request, "logs.html", {"node": node, "replica": replica})

    async def deployment(self, request: web.Request) -> web.StreamResponse:
        """One deployment: where it runs, why there, what is wanted against what is reported, who answered."""
        name = request.match_info["name"]
        view = await self._views.deployment(name)
        if view is None:
            return missing(request, f"There is no deployment “{name[:80]}”.", "It may have been deleted, or the name is misspelt.")
        nodes = {node.id: node for node in await self._views.nodes()}
        reported = {(node.id, replica.name): replica.generation for node in nodes.values() for replica in node.replicas}
        used = [nodes[box] for box in sorted({placement.node for placement in view.placements}) if box in nodes]
        context = {
            "view": view,
            "nodes": nodes,
            "silent": _silent(used),
            "reported": reported,
            "rollout": await self._database.read(lambda tables: rollouts.shown(tables, name)),
            "now_ms": time.time_ns() // 1_000_000,
            "events": await self._views.events(subject=name, limit=EVENTS_HERE),
            **await self._span(request, deployment=name),
        }
        return page(request, "deployment.html", context)

    async def edit(self, request: web.Request) -> web.StreamResponse:
        """A deployment's file to be changed, or a new one's; its script asks the API what that would do."""
        name = request.match_info.get("name", "")
        view = await self._views.deployment(name) if name else None
        if name and view is None:
            return missing(request, f"There is no deployment “{name[:80]}”.", "It may have been deleted, or the name is misspelt.")
        return page(request, "edit.html", {"name": name, "text": view.text if view else NEW})

    async def models(self, request: web.Request) -> web.StreamResponse:
        """Every model version."""
        return page(request, "models.html", {"models": await self._views.models()})

    async def rollouts(self, request: web.Request) -> web.StreamResponse:
        """What spreads in waves, or did last: the box software, and changes of deployments, those that go on first."""
        software, found = await self._database.read(lambda tables: (releases.view(tables), rollouts.views(tables)))
        found.sort(key=lambda view: (view.phase in OVER, -view.changed_at_ms))
        return page(request, "rollouts.html", {"software": software, "rollouts": found})

    async def events(self, request: web.Request) -> web.StreamResponse:
        """What happened, newest first; ``node`` and ``subject`` in the address narrow it down."""
        node, subject = request.query.get("node", "").strip()[:80], request.query.get("subject", "").strip()[:80]
        limit = EVENT_LIMITS[-1] if request.query.get("limit") == str(EVENT_LIMITS[-1]) else EVENT_LIMITS[0]
        events = await self._views.events(node=node, subject=subject, limit=limit)
        names = [one.id for one in await self._views.nodes()]
        context = {"events": events, "node": node, "subject": subject, "limit": limit, "most": EVENT_LIMITS[-1], "names": names}
        return page(request, "events.html", context)

    async def missing(self, request: web.Request) -> web.StreamResponse:
        """Nothing is at this address."""
        return missing(request, "There is no page at this address.", "")

    async def _span(self, request: web.Request, *, deployment: str = "", node: str = "") -> dict[str, Any]:
        """The time that plots show, and who answered in it. A fragment goes without the sums: the page's script adds them up itself."""
        asked = request.query.get("minutes", "")
        minutes = next((span for span in SPANS_MIN if asked == str(span)), min(SPANS_MIN))
        if is_fragment(request):
            return {"minutes": minutes, "totals": {}}
        split = await self._views.split(minutes=minutes, deployment=deployment, node=node)
        return {"minutes": minutes, "totals": _totals(split)}


def _totals(split: SplitView) -> dict[str, int]:
    return {who: sum(getattr(point, who) for point in split.points) for who in ("edge", "peer", "cloud", "refused")}


def _silent(nodes: Sequence[NodeView]) -> list[str]:
    return [node.id for node in nodes if node.is_silent]


def _needs_a_look(node: NodeView) -> bool:
    return (
        node.state in ("unknown", "lost") or bool(node.refused) or any(replica.phase in ("backoff", "failed") for replica in node.replicas)
    )


def deployment_mark(view: DeploymentView) -> Mark:
    return ready_mark(view.ready, view.wanted)
