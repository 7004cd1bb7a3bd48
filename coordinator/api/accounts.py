"""The calls about users, tokens and the record of changes."""

from aiohttp import web
from sqlite_utils import Database as Tables

from coordinator.accounts.changes import Changes
from coordinator.accounts.entry import LINK_S, Entry
from coordinator.api.access import Access
from coordinator.api.answers import Handler, json_answer
from coordinator.api.bodies import json_body
from coordinator.api.calls import ACTOR, CALLER, Call, checked, number
from coordinator.registry import audit
from coordinator.registry.database import Database
from skerry.wire.accounts import (
    Invited,
    PasswordRequest,
    RoleRequest,
    TokenMade,
    TokenRequest,
    TokenView,
    UserRequest,
    UserView,
    WhoView,
)
from skerry.wire.api import LoginLink
from skerry.wire.audit import AuditPage

CALLS = [
    Call("GET", "/v1/me", "show_me", "Who the caller is and what it may do", WhoView),
    Call("POST", "/v1/login", "log_in", "A token for a name and a password", TokenMade, 201, body=PasswordRequest, is_open=True),
    Call("POST", "/v1/login-links", "make_login_link", "A link that logs one browser of yours in, once", LoginLink, 201),
    Call("GET", "/v1/users", "list_users", "Every user", list[UserView], role="admin"),
    Call(
        "POST", "/v1/users", "invite", "Let somebody in: a link with which they set a password, once", Invited, 201,
        role="admin", body=UserRequest,
    ),
    Call("POST", "/v1/users/{name}/invitation", "invite_again", "A new link for somebody who lost theirs", Invited, 201, role="admin"),
    Call("PUT", "/v1/users/{name}/role", "set_role", "What somebody may do from now on", str, 204, role="admin", body=RoleRequest),
    Call("DELETE", "/v1/users/{name}", "remove_user", "Remove a user with all sessions and tokens", str, 204, role="admin"),
    Call("GET", "/v1/tokens", "list_tokens", "Your tokens; an admin sees everybody's", list[TokenView]),
    Call("POST", "/v1/tokens", "make_token", "A token that may do at most what you may, told once", TokenMade, 201, body=TokenRequest),
    Call("DELETE", "/v1/tokens/{id}", "withdraw_token", "A token is good for nothing from now on", str, 204),
    Call(
        "GET", "/v1/audit", "list_audit", "Who changed what: the newest first, or in order behind a number", AuditPage, role="operator",
        query={
            "after": "a number: in order from there", "before": "a number: the newest before it", "subject": "only about this",
            "who": "only by this one", "limit": "1 to 1000, default 200",
        },
    ),
]  # fmt: skip


class AccountCalls:
    """The handlers of CALLS."""

    def __init__(self, database: Database, changes: Changes, entry: Entry, access: Access, *, public_url: str) -> None:
        self._database = database
        self._changes = changes
        self._entry = entry
        self._access = access
        self._public_url = public_url.rstrip("/")

    def handler(self, call: Call) -> Handler:
        """The call's method, behind the check of who calls."""
        return checked(self._access, call, getattr(self, call.handler))

    async def show_me(self, request: web.Request) -> web.Response:
        """See CALLS."""
        caller = request[CALLER]
        return json_answer(WhoView(caller.name, caller.role, caller.via))

    async def log_in(self, request: web.Request) -> web.Response:
        """See CALLS."""
        asked = await json_body(request, PasswordRequest)
        address = self._access.address_of(request)
        return json_answer(await self._changes.token_for_password(asked.name, asked.password, asked.title, address=address), status=201)

    async def make_login_link(self, request: web.Request) -> web.Response:
        """See CALLS."""
        code = self._entry.make_link(request[CALLER])
        return json_answer(LoginLink(f"{self._public_url}/login?code={code}", LINK_S), status=201)

    async def list_users(self, _: web.Request) -> web.Response:
        """See CALLS."""
        return json_answer(self._changes.users())

    async def invite(self, request: web.Request) -> web.Response:
        """See CALLS."""
        return json_answer(await self._changes.invite(await json_body(request, UserRequest), request[ACTOR]), status=201)

    async def invite_again(self, request: web.Request) -> web.Response:
        """See CALLS."""
        return json_answer(await self._changes.invite_again(request.match_info["name"], request[ACTOR]), status=201)

    async def set_role(self, request: web.Request) -> web.Response:
        """See CALLS."""
        await self._changes.set_role(request.match_info["name"], (await json_body(request, RoleRequest)).role, request[ACTOR])
        return web.Response(status=204)

    async def remove_user(self, request: web.Request) -> web.Response:
        """See CALLS."""
        await self._changes.remove(request.match_info["name"], request[ACTOR])
        return web.Response(status=204)

    async def list_tokens(self, request: web.Request) -> web.Response:
        """See CALLS."""
        return json_answer(self._changes.tokens(request[CALLER]))

    async def make_token(self, request: web.Request) -> web.Response:
        """See CALLS."""
        made = await self._changes.make_token(request[CALLER], await json_body(request, TokenRequest), request[ACTOR])
        return json_answer(made, status=201)

    async def withdraw_token(self, request: web.Request) -> web.Response:
        """See CALLS."""
        await self._changes.withdraw_token(request[CALLER], request.match_info["id"], request[ACTOR])
        return web.Response(status=204)

    async def list_audit(self, request: web.Request) -> web.Response:
        """See CALLS."""
        limit = number(request, "limit", 200, most=1000)
        if "after" in request.query:
            after = number(request, "after", 0, least=0, most=2**53)
            return json_answer(await self._database.read(lambda tables: audit.read_after(tables, after, limit=limit)))
        before = number(request, "before", 0, least=0, most=2**53)
        subject, who = request.query.get("subject", ""), request.query.get("who", "")

        def read(tables: Tables) -> AuditPage:
            return audit.read_newest(tables, before_id=before, subject=subject, who=who, limit=limit)

        return json_answer(await self._database.read(read))
