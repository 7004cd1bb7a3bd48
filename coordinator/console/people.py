"""The pages about people: one's own account, the users, and the record of who changed what."""

from aiohttp import web
from sqlite_utils import Database as Tables

from coordinator.accounts.changes import Changes
from coordinator.accounts.directory import OPERATOR
from coordinator.accounts.refusals import NotDone, NotLetIn, NotThere, TryLater
from coordinator.api.calls import ACTOR, CALLER
from coordinator.console.entrance import Entrance, Form, redirect
from coordinator.console.language import _
from coordinator.console.rendering import page
from coordinator.registry import audit
from coordinator.registry.database import Database
from skerry.wire import codec
from skerry.wire.accounts import LEAST_PASSWORD, RANK, RoleRequest, TokenMade, TokenRequest, UserRequest, may
from skerry.wire.audit import AuditPage

RECORDS = 100
TOKEN_DAYS = (7, 30, 90, 366)
DAY_S = 24 * 3600


class People:
    """The handlers."""

    def __init__(self, database: Database, changes: Changes, entrance: Entrance) -> None:
        self._database = database
        self._changes = changes
        self._entrance = entrance

    # -- one's own

    async def account(self, request: web.Request) -> web.StreamResponse:
        """Who one is, and one's tokens."""
        return self._account(request)

    def _account(self, request: web.Request, *, problem: str = "", made: TokenMade | None = None, status: int = 200) -> web.Response:
        caller = request[CALLER]
        context = {
            "tokens": [view for view in self._changes.tokens(caller) if view.user == caller.name],
            "roles": [role for role in RANK if may(caller.role, role)],
            "days": TOKEN_DAYS,
            "has_password": caller.name != OPERATOR,
            "least": LEAST_PASSWORD,
            "problem": problem,
            "made": made,
        }
        return page(request, "account.html", context, status=status)

    async def change_password(self, request: web.Request, form: Form) -> web.StreamResponse:
        """One's own."""
        caller, actor = request[CALLER], request[ACTOR]
        try:
            if form.get("new", "") != form.get("again", ""):
                raise NotDone("invalid_password", "password: the two are not the same")
            cookie = await self._changes.change_password(caller, form.get("old", ""), form.get("new", ""), address=actor.address)
        except NotLetIn:
            return self._account(request, problem=_("The old password is another one."), status=403)
        except (NotDone, NotThere, TryLater) as exc:
            return self._account(request, problem=str(exc), status=422)
        response = redirect("/account")
        self._entrance.give_cookie(request, response, cookie)
        return response

    async def make_token(self, request: web.Request, form: Form) -> web.StreamResponse:
        """Shown on this answer and never again."""
        caller = request[CALLER]
        days = form.get("days", "")
        fields = {
            "title": form.get("title", "").strip(),
            "role": form.get("role", "viewer"),
            "expires_s": int(days) * DAY_S if days in map(str, TOKEN_DAYS) else DAY_S,
        }
        try:
            made = await self._changes.make_token(caller, codec.decode(codec.encode(fields), TokenRequest), request[ACTOR])
        except (NotDone, codec.Malformed) as exc:
            return self._account(request, problem=str(exc), status=422)
        return self._account(request, made=made)

    async def withdraw_token(self, request: web.Request, form: Form) -> web.StreamResponse:
        """It is good for nothing from now on."""
        try:
            await self._changes.withdraw_token(request[CALLER], form.get("id", ""), request[ACTOR])
        except NotThere as exc:
            return self._account(request, problem=str(exc), status=404)
        return redirect("/account")

    # -- everybody

    async def users(self, request: web.Request) -> web.StreamResponse:
        """Who may log in."""
        return self._users(request)

    def _users(self, request: web.Request, *, problem: str = "", link: str = "", name: str = "", status: int = 200) -> web.Response:
        context = {"users": self._changes.users(), "roles": list(RANK), "problem": problem, "link": link, "name": name}
        return page(request, "users.html", context, status=status)

    async def invite(self, request: web.Request, form: Form) -> web.StreamResponse:
        """The link is shown on this answer and never again."""
        fields = {"name": form.get("name", "").strip(), "role": form.get("role", "viewer")}
        try:
            invited = await self._changes.invite(codec.decode(codec.encode(fields), UserRequest), request[ACTOR])
        except (NotDone, codec.Malformed) as exc:
            return self._users(request, problem=str(exc), status=422)
        return self._users(request, link=invited.url, name=invited.name)

    async def change_user(self, request: web.Request, form: Form) -> web.StreamResponse:
        """Another role, a new link, or an end."""
        name, actor = request.match_info["name"], request[ACTOR]
        try:
            match form.get("do"):
                case "invite":
                    invited = await self._changes.invite_again(name, actor)
                    return self._users(request, link=invited.url, name=invited.name)
                case "remove":
                    await self._changes.remove(name, actor)
                case "role":
                    wanted = codec.decode(codec.encode({"role": form.get("role", "")}), RoleRequest)
                    await self._changes.set_role(name, wanted.role, actor)
                case _:
                    return self._users(request, problem=_("That is nothing that can be done to a user."), status=422)
        except (NotDone, NotThere, codec.Malformed) as exc:
            return self._users(request, problem=str(exc), status=422)
        return redirect("/users")

    # -- the record

    async def audit(self, request: web.Request) -> web.StreamResponse:
        """Who changed what, the newest first."""
        before = request.query.get("before", "")
        before_id = int(before) if before.isascii() and before.isdigit() and len(before) < 16 else 0
        subject, who = request.query.get("subject", "").strip()[:80], request.query.get("who", "").strip()[:80]

        def read(tables: Tables) -> AuditPage:
            return audit.read_newest(tables, before_id=before_id, subject=subject, who=who, limit=RECORDS)

        found = await self._database.read(read)
        context = {"records": found.records, "subject": subject, "who": who, "is_full": len(found.records) == RECORDS, "before": before_id}
        return page(request, "audit.html", context)
