"""The console's pages: read from the views, rendered here, kept fresh by ``static/live.js``. They work without scripts, for reading."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp_jinja2
import jinja2
from aiohttp import web

from coordinator.api.access import Access
from coordinator.console import assets, entrance
from coordinator.console.verdict import judge
from coordinator.console.wording import FILTERS, SYMBOLS, Mark, ready_mark
from coordinator.views import Views
from skerry import __version__
from skerry.wire import codec
from skerry.wire.api import DeploymentView, NodeView, SplitView, StatusView

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

TEMPLATES = Path(__file__).parent / "templates"
SECURITY = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""On every page. No script and no style stands inside a page, and nothing is loaded from elsewhere."""
SPANS_MIN = {15: "15 min", 60: "1 h", 360: "6 h"}
MOST_BOXES = 30
"""On the overview; what needs a look comes first, the others are one click away."""
EVENTS_HERE = 10
EVENT_LIMITS = (200, 1000)


def attach(
    app: web.Application, views: Views, access: Access, *, fleet: str, status: Callable[[web.Request], Awaitable[web.Response]]
) -> None:
    """Add the console's routes to the application; ``status`` is the API's call of that name, which knows whether the broker is there."""
    aiohttp_jinja2.setup(
        app,
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env = aiohttp_jinja2.get_env(app)
    env.filters.update({**FILTERS, "ready_mark": _ready_mark})
    env.globals.update(fleet=fleet, version=__version__, spans=SPANS_MIN, symbols=SYMBOLS)
    pages = Pages(views, access, status)
    app.add_routes(
        [
            web.get("/login", pages.login, allow_head=False),
            web.post("/login", pages.log_in_with_token),
            web.post("/logout", pages.log_out),
            web.get("/static/{path:.+}", assets.make_handler()),
            web.get("/", pages.guarded(pages.overview)),
            web.get("/nodes", pages.guarded(pages.nodes)),
            web.get("/nodes/{id}", pages.guarded(pages.node)),
            web.get("/deployments/{name}", pages.guarded(pages.deployment)),
            web.get("/models", pages.guarded(pages.models)),
            web.get("/events", pages.guarded(pages.events)),
            web.get("/{path:(?!v1/).*}", pages.guarded(pages.missing)),
        ]
    )


class Pages:
    """The handlers. ``?fragment=1`` gives what lies inside ``<main>`` alone."""

    def __init__(self, views: Views, access: Access, status: Callable[[web.Request], Awaitable[web.Response]]) -> None:
        self._views = views
        self._access = access
        self._ask_status = status

    def guarded(self, handler: Handler) -> Handler:
        """The page for those who are logged in; the login page for all others."""

        async def checked(request: web.Request) -> web.StreamResponse:
            if not entrance.is_in(self._access, request):
                return web.Response(status=303, headers={**SECURITY, "Location": entrance.login_path(request)})
            return await handler(request)

        return checked

    async def _status(self, request: web.Request) -> StatusView:
        answer = await self._ask_status(request)
        return codec.decode((answer.text or "").encode(), StatusView)

    async def login(self, request: web.Request) -> web.StreamResponse:
        """The form; with a good ``code`` the way in. HEAD is not served, so that a preview does not spend the code."""
        after = entrance.local_path(request.query.get("next", ""))
        if "code" not in request.query:
            return _page(request, "login.html", {"after": after, "problem": ""})
        cookie = self._access.redeem(request.query["code"])
        if cookie is None:
            problem = "This link was used already or is too old. Make a new one with 'skerry login-link', or give the token."
            return _page(request, "login.html", {"after": after, "problem": problem}, status=403)
        # Not a redirect: a browser that comes from another site's link would not send a Strict cookie along with it.
        response = _page(request, "entered.html", {"after": after})
        entrance.let_in(request, response, cookie)
        return response

    async def log_in_with_token(self, request: web.Request) -> web.StreamResponse:
        """The form came back."""
        form = await entrance.read_form(request)
        after = entrance.local_path((form or {}).get("next", ""))
        cookie = self._access.cookie_for_token(form.get("token", "")) if form else None
        if cookie is None:
            problem = "That is not the operator's token. It lies in operator.token in the coordinator's state directory."
            return _page(request, "login.html", {"after": after, "problem": problem}, status=403)
        response = web.Response(status=303, headers={**SECURITY, "Location": after})
        entrance.let_in(request, response, cookie)
        return response

    async def log_out(self, _: web.Request) -> web.StreamResponse:
        """Forget the browser."""
        response = web.Response(status=303, headers={**SECURITY, "Location": "/login"})
        entrance.let_out(response)
        return response

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
        return _page(request, "overview.html", context)

    async def nodes(self, request: web.Request) -> web.StreamResponse:
        """Every box."""
        return _page(request, "nodes.html", {"nodes": await self._views.nodes()})

    async def node(self, request: web.Request) -> web.StreamResponse:
        """One box."""
        name = request.match_info["id"]
        node = await self._views.node(name)
        if node is None:
            return _missing(
                request, f"There is no box “{name[:80]}” in this fleet.", "It may never have connected, or the name is misspelt."
            )
        context = {"node": node, "events": await self._views.events(node=name, limit=EVENTS_HERE), **await self._span(request, node=name)}
        return _page(request, "node.html", context)

    async def deployment(self, request: web.Request) -> web.StreamResponse:
        """One deployment: where it runs, why there, what is wanted against what is reported, who answered."""
        name = request.match_info["name"]
        view = await self._views.deployment(name)
        if view is None:
            return _missing(request, f"There is no deployment “{name[:80]}”.", "It may have been deleted, or the name is misspelt.")
        nodes = {node.id: node for node in await self._views.nodes()}
        reported = {(node.id, replica.name): replica.generation for node in nodes.values() for replica in node.replicas}
        used = [nodes[box] for box in sorted({placement.node for placement in view.placements}) if box in nodes]
        context = {
            "view": view,
            "nodes": nodes,
            "silent": _silent(used),
            "reported": reported,
            "events": await self._views.events(subject=name, limit=EVENTS_HERE),
            **await self._span(request, deployment=name),
        }
        return _page(request, "deployment.html", context)

    async def models(self, request: web.Request) -> web.StreamResponse:
        """Every model version."""
        return _page(request, "models.html", {"models": await self._views.models()})

    async def events(self, request: web.Request) -> web.StreamResponse:
        """What happened, newest first; ``node`` and ``subject`` in the address narrow it down."""
        node, subject = request.query.get("node", "").strip()[:80], request.query.get("subject", "").strip()[:80]
        limit = EVENT_LIMITS[-1] if request.query.get("limit") == str(EVENT_LIMITS[-1]) else EVENT_LIMITS[0]
        events = await self._views.events(node=node, subject=subject, limit=limit)
        names = [one.id for one in await self._views.nodes()]
        context = {"events": events, "node": node, "subject": subject, "limit": limit, "most": EVENT_LIMITS[-1], "names": names}
        return _page(request, "events.html", context)

    async def missing(self, request: web.Request) -> web.StreamResponse:
        """Nothing is at this address."""
        return _missing(request, "There is no page at this address.", "")

    async def _span(self, request: web.Request, *, deployment: str = "", node: str = "") -> dict[str, Any]:
        """The time that plots show, and who answered in it. A fragment goes without the sums: the page's script adds them up itself."""
        asked = request.query.get("minutes", "")
        minutes = next((span for span in SPANS_MIN if asked == str(span)), min(SPANS_MIN))
        if _is_fragment(request):
            return {"minutes": minutes, "totals": {}}
        split = await self._views.split(minutes=minutes, deployment=deployment, node=node)
        return {"minutes": minutes, "totals": _totals(split)}


def _totals(split: SplitView) -> dict[str, int]:
    return {who: sum(getattr(point, who) for point in split.points) for who in ("edge", "peer", "cloud", "refused")}


def _silent(nodes: Sequence[NodeView]) -> list[str]:
    return [node.id for node in nodes if node.state == "offline"]


def _needs_a_look(node: NodeView) -> bool:
    return node.state == "offline" or bool(node.refused) or any(replica.phase in ("backoff", "failed") for replica in node.replicas)


def _ready_mark(view: DeploymentView) -> Mark:
    return ready_mark(view.ready, view.wanted)


def _is_fragment(request: web.Request) -> bool:
    return request.query.get("fragment") == "1"


def _page(request: web.Request, template: str, context: Mapping[str, Any], *, status: int = 200) -> web.Response:
    layout = "fragment.html" if _is_fragment(request) else "page.html"
    response = aiohttp_jinja2.render_template(template, request, {**context, "layout": layout, "path": request.path}, status=status)
    response.headers.update(SECURITY)
    return response


def _missing(request: web.Request, what: str, why: str) -> web.Response:
    return _page(request, "missing.html", {"what": what, "why": why}, status=404)
