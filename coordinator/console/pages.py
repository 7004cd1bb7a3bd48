"""The console's pages about the fleet: read from the views, kept fresh by ``static/live.js``. They work without scripts, for reading."""

import asyncio
import time
from typing import Any

import msgspec
from aiohttp import web
from sqlite_utils import Database as Tables

from coordinator.api import releases, rollouts
from coordinator.console.flow import picture
from coordinator.console.language import N_, _
from coordinator.console.rendering import is_fragment, missing, page
from coordinator.console.verdict import judge
from coordinator.console.wording import Mark, ready_mark
from coordinator.core.rollout import OVER
from coordinator.core.search import MOST_CHARS, NotUnderstood, Search, parse
from coordinator.glance import Glance
from coordinator.model_store import ModelStore, NotTaken
from coordinator.registry import finding, glance
from coordinator.registry.database import Database
from coordinator.views import Views
from skerry.wire.api import SILENT, DeploymentView, SignatureState, SplitView
from skerry.wire.fleet import WHO, DeploymentSummary

SPANS_MIN = {15: N_("15 min"), 60: N_("1 h"), 360: N_("6 h")}
MOST_BOXES = 30
"""On the overview; what needs a look comes first, the others are one click away."""
MOST_PLACEMENTS = 200
"""And refusals, of a deployment; those that are not as they should be come first."""
MOST_OFFERED = 200
"""Boxes of which a name is offered while it is typed."""
MOST_HOSTS = 50
"""Boxes among which one may be chosen to try a model."""
HOUR_MIN = 60
MOST_NOTED = 30
ROUTED = "request.routed"
SITE = "site"
SIGNATURES: dict[SignatureState, str] = {
    "verified": N_("Signed with a key that this coordinator trusts."),
    "not_trusted": N_("Signed with a key that this coordinator does not trust."),
    "unchecked": N_("Signed; this coordinator has no keys to check it by."),
    "none": N_("Not signed."),
}
BOXES_A_PAGE = 50
EVENTS_HERE = 10
NEW = "name: \nmodel: \nreplicas: {per_node: 1}\nresources: {memory: 512MiB}\nslo: {deadline_ms: 100}\n"
"""What the editor begins with."""
EVENT_LIMITS = (200, 1000)


class Pages:
    """The handlers; ``status`` is the API's call of that name, which knows whether the broker is there."""

    def __init__(self, views: Views, glance: Glance, database: Database, store: ModelStore) -> None:
        self._store = store
        self._views = views
        self._glance = glance
        self._database = database

    async def overview(self, request: web.Request) -> web.StreamResponse:
        """The fleet at one glance. Of a large one only boxes that need a look are read, and a few beside."""
        minutes = _minutes(request, HOUR_MIN)
        status, fleet, events = await asyncio.gather(
            self._glance.status(), self._glance.fleet(minutes=minutes),
            self._views.events(limit=EVENTS_HERE),
        )  # fmt: skip
        names = fleet.needy[:MOST_BOXES]
        found = await self._views.some(names) if status.nodes > MOST_BOXES else await self._views.nodes()
        shown = {node.id: node for node in found}
        nodes = [shown.pop(name) for name in names if name in shown] + list(shown.values())
        context = {
            "status": status,
            "verdict": judge(status, nodes, fleet, now_ms=time.time_ns() // 1_000_000),
            "nodes": nodes,
            "more_nodes": max(0, status.nodes - len(nodes)),
            "silent": sum(fleet.states.get(state, 0) for state in SILENT),
            "states": fleet.states,
            "deployments": fleet.deployments,
            "events": events,
            "per_second": sum(view.serve.per_second for view in fleet.deployments),
            "refused": sum(view.serve.refused for view in fleet.deployments),
            "has_budget": any(view.cloud_budget is not None for view in fleet.deployments),
            **await self._span(request, minutes=minutes),
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
                request,
                _("There is no box “%(name)s” in this fleet.", name=name[:80]),
                _("It may never have connected, or the name is misspelt."),
            )
        context = {
            "node": node,
            "difference": await self._views.difference(name),
            "events": await self._views.events(node=name, limit=EVENTS_HERE),
            **await self._span(request, node=name),
        }
        return page(request, "node.html", context)

    async def logs(self, request: web.Request) -> web.StreamResponse:
        """What a replica's sandbox writes; its script asks the API, and so the box, while somebody looks."""
        name, replica = request.match_info["id"], request.match_info["replica"]
        node = await self._views.node(name)
        if node is None or all(one.name != replica for one in node.replicas):
            return missing(
                request,
                _("Box “%(box)s” reports no replica “%(replica)s”.", box=name[:80], replica=replica[:80]),
                _("It may have been stopped, or moved."),
            )
        return page(request, "logs.html", {"node": node, "replica": replica})

    async def deployment(self, request: web.Request) -> web.StreamResponse:
        """One deployment: where it runs, why there, what is wanted against what is reported, who answered."""
        name = request.match_info["name"]
        summary = next((one for one in (await self._glance.fleet(minutes=HOUR_MIN)).deployments if one.name == name), None)
        cut = await self._views.deployment_cut(name, most=MOST_PLACEMENTS, ready=summary.ready if summary else 0)
        if cut is None:
            return missing(
                request, _("There is no deployment “%(name)s”.", name=name[:80]), _("It may have been deleted, or the name is misspelt.")
            )
        view = cut.view
        nodes = {node.id: node for node in await self._views.some({one.node for one in view.placements})}
        reported = {(node.id, replica.name): replica.generation for node in nodes.values() for replica in node.replicas}
        compared = [] if is_fragment(request) else await self._views.versions(name)
        context = {
            "view": view,
            "placed": cut.placements,
            "refused": cut.refusals,
            "nodes": nodes,
            "unheard": summary.unheard if summary else 0,
            "boxes": summary.boxes if summary else len(nodes),
            "silent": [node.id for node in nodes.values() if node.is_silent],
            "reported": reported,
            "versions": compared,
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
            return missing(
                request, _("There is no deployment “%(name)s”.", name=name[:80]), _("It may have been deleted, or the name is misspelt.")
            )
        return page(request, "edit.html", {"name": name, "text": view.text if view else NEW})

    async def models(self, request: web.Request) -> web.StreamResponse:
        """Every model version."""
        return page(request, "models.html", {"models": await self._views.models()})

    async def model(self, request: web.Request) -> web.StreamResponse:
        """One model version: what is in its file, where it runs, and, for who may, trying it."""
        name, version = request.match_info["name"], request.match_info["version"]
        known = [one for one in await self._views.models() if one.name == name]
        model = next((one for one in known if str(one.version) == version), None)
        if model is None:
            why = _("It may have been removed, or the name is misspelt.")
            return missing(request, _("There is no model “%(name)s” in version “%(version)s”.", name=name[:80], version=version[:20]), why)
        graph, trouble = None, ""
        try:
            graph = await self._store.graph(model.sha256)
        except NotTaken as exc:
            trouble = str(exc)

        def work(tables: Tables) -> tuple[int, list[str]]:
            ready = {node for used in model.used_by for node, _replica in glance.read_running(tables, used)}
            return finding.count(tables, Search(model=f"{name}:{version}")), sorted(ready - glance.read_silent(tables))

        told, ready = await self._database.read(work)
        context = {
            "model": model,
            "versions": sorted(one.version for one in known),
            "signature": SIGNATURES[model.signature],
            "graph": graph,
            "trouble": trouble,
            "operators": sum(graph.operators.values()) if graph else 0,
            "told": told,
            "ready": len(ready),
            "hosts": ready[:MOST_HOSTS],
        }
        return page(request, "model.html", context)

    async def split(self, request: web.Request) -> web.StreamResponse:
        """From where requests came and who answered, what boxes noted of their decisions, and what one would do."""
        minutes, keys = _minutes(request, HOUR_MIN), await self._glance.label_keys()
        asked = request.query.get("by", "")
        by = asked if asked in keys else SITE if SITE in keys or not keys else keys[0]
        names = [view.name for view in (await self._glance.fleet(minutes=HOUR_MIN)).deployments]
        deployment = wanted if (wanted := request.query.get("deployment", "")) in names else ""
        flow, noted, boxes = await asyncio.gather(
            self._glance.flow(minutes=minutes, by=by, deployment=deployment),
            self._views.events(kind=ROUTED, subject=deployment, limit=MOST_NOTED),
            self._views.found(Search(), after="", limit=MOST_OFFERED),
        )
        context = {
            "picture": picture(flow.rows),
            "rows": [msgspec.structs.asdict(row) for row in flow.rows],
            "others": flow.others,
            "total": sum(row.total for row in flow.rows),
            "minutes": minutes,
            "by": by,
            "keys": keys or [SITE],
            "deployment": deployment,
            "deployments": names,
            "names": [one.id for one in boxes.nodes],
            "noted": noted,
        }
        return page(request, "split.html", context)

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
        names = (await self._views.found(Search(), after="", limit=MOST_OFFERED)).nodes
        context = {
            "events": events,
            "node": node,
            "subject": subject,
            "limit": limit,
            "most": EVENT_LIMITS[-1],
            "names": [one.id for one in names],
        }
        return page(request, "events.html", context)

    async def missing(self, request: web.Request) -> web.StreamResponse:
        """Nothing is at this address."""
        return missing(request, _("There is no page at this address."), "")

    async def _span(self, request: web.Request, *, deployment: str = "", node: str = "", minutes: int = 0) -> dict[str, Any]:
        """The time that plots show, and who answered in it. A fragment goes without the sums: the page's script adds them up itself."""
        minutes = minutes or _minutes(request, min(SPANS_MIN))
        if is_fragment(request):
            return {"minutes": minutes, "totals": {}}
        split = await self._views.split(minutes=minutes, deployment=deployment, node=node)
        return {"minutes": minutes, "totals": _totals(split)}


def _totals(split: SplitView) -> dict[str, int]:
    return {who: sum(getattr(point, who) for point in split.points) for who in WHO}


def _minutes(request: web.Request, usual: int) -> int:
    """The time that is asked for, out of SPANS_MIN."""
    asked = request.query.get("minutes", "")
    return next((span for span in SPANS_MIN if asked == str(span)), usual)


def deployment_mark(view: DeploymentView | DeploymentSummary) -> Mark:
    return ready_mark(view.ready, view.wanted)
