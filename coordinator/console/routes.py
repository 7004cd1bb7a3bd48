"""Which page is at which address, and who may see it."""

from aiohttp import web

from coordinator.api.access import Access
from coordinator.console import assets, rendering
from coordinator.console.entrance import CALLBACK, Entrance
from coordinator.console.guide import Guide
from coordinator.console.pages import SPANS_MIN, Pages, deployment_mark
from coordinator.console.people import People


def attach(
    app: web.Application, *, fleet: str, elsewhere: str, access: Access, entrance: Entrance, pages: Pages, people: People, guide: Guide
) -> None:
    """Add the console to the application; ``elsewhere`` is what people are told of where else they may log in."""
    rendering.set_up(
        app, access, names={"fleet": fleet, "spans": SPANS_MIN, "elsewhere": elsewhere}, filters={"ready_mark": deployment_mark}
    )
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
            web.get("/language/{code}", entrance.speak, allow_head=False),
            web.get("/static/{path:.+}", assets.make_handler()),
            web.get("/", see(pages.overview)),
            web.get("/nodes", see(pages.nodes)),
            web.get("/nodes/{id}", see(pages.node)),
            web.get("/nodes/{id}/logs/{replica}", see(pages.logs, "operator")),
            web.get("/deployments/{name}", see(pages.deployment)),
            web.get("/deployments/{name}/edit", see(pages.edit, "operator")),
            web.get("/deploy", see(pages.edit, "operator")),
            web.get("/models", see(pages.models)),
            web.get("/models/{name}/{version}", see(pages.model)),
            web.get("/split", see(pages.split)),
            web.get("/rollouts", see(pages.rollouts)),
            web.get("/start", see(guide.start)),
            web.get("/api", see(guide.calls)),
            web.get("/settings", see(guide.settings, "operator")),
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
