"""Which page is at which address, and who may see it."""

from collections.abc import Awaitable, Callable

from aiohttp import web

from coordinator.accounts.changes import Changes
from coordinator.accounts.entry import Entry
from coordinator.accounts.provider import Provider
from coordinator.api.access import Access
from coordinator.console import assets, rendering
from coordinator.console.entrance import CALLBACK, Entrance
from coordinator.console.pages import SPANS_MIN, Pages, deployment_mark
from coordinator.console.people import People
from coordinator.registry.database import Database
from coordinator.views import Views


def attach(
    app: web.Application,
    *,
    fleet: str,
    views: Views,
    database: Database,
    access: Access,
    entry: Entry,
    changes: Changes,
    provider: Provider | None,
    status: Callable[[web.Request], Awaitable[web.Response]],
) -> None:
    """Add the console to the application; ``status`` is the API's call of that name."""
    rendering.set_up(
        app,
        access,
        names={"fleet": fleet, "spans": SPANS_MIN, "elsewhere": provider.title if provider else ""},
        filters={"ready_mark": deployment_mark},
    )
    entrance = Entrance(access, entry, changes, provider)
    pages, people = Pages(views, database, status), People(database, changes, entrance)
    see, do = entrance.guarded, entrance.guarded_form
    app.add_routes(
        [
            web.get("/login", entrance.login, allow_head=False),
            web.post("/login", entrance.log_in),
            web.get("/login/elsewhere", entrance.elsewhere, allow_head=False),
            web.get(CALLBACK, entrance.back, allow_head=False),
            web.get("/welcome", entrance.welcome, allow_head=False),
            web.post("/welcome", entrance.accept),
            web.post("/logout", do(entrance.log_out)),
            web.get("/static/{path:.+}", assets.make_handler()),
            web.get("/", see(pages.overview)),
            web.get("/nodes", see(pages.nodes)),
            web.get("/nodes/{id}", see(pages.node)),
            web.get("/nodes/{id}/logs/{replica}", see(pages.logs, "operator")),
            web.get("/deployments/{name}", see(pages.deployment)),
            web.get("/deployments/{name}/edit", see(pages.edit, "operator")),
            web.get("/deploy", see(pages.edit, "operator")),
            web.get("/models", see(pages.models)),
            web.get("/rollouts", see(pages.rollouts)),
            web.get("/events", see(pages.events)),
            web.get("/account", see(people.account)),
            web.post("/account/password", do(people.change_password)),
            web.post("/account/tokens", do(people.make_token)),
            web.post("/account/tokens/withdraw", do(people.withdraw_token)),
            web.get("/users", see(people.users, "admin")),
            web.post("/users", do(people.invite, "admin")),
            web.post("/users/{name}", do(people.change_user, "admin")),
            web.get("/audit", see(people.audit, "operator")),
            web.get("/{path:(?!v1/).*}", see(pages.missing)),
        ]
    )
