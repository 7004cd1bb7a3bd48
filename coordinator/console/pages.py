"""The console's pages."""

from aiohttp import web

from coordinator.api.access import COOKIE, SESSION_S, Access
from coordinator.views import Views


def attach(app: web.Application, views: Views, access: Access, *, fleet: str) -> None:
    """Add the console's routes to the application."""

    async def login(request: web.Request) -> web.StreamResponse:
        cookie = access.redeem(request.query.get("code", ""))
        if cookie is None:
            return web.Response(status=403, text="This link was used already or is too old: make a new one with 'skerry login-link'.\n")
        response = web.HTTPSeeOther("/")
        response.set_cookie(COOKIE, cookie, max_age=SESSION_S, httponly=True, samesite="Strict", path="/")
        raise response

    async def home(_: web.Request) -> web.StreamResponse:
        return web.Response(text=f"{fleet}: {len(await views.nodes())} boxes\n")

    app.add_routes([web.get("/login", login), web.get("/", home)])
