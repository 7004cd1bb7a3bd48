"""Who may see the pages: the ways in, by password, one-time link and token, and the way out."""

from collections.abc import Awaitable, Callable
from urllib.parse import parse_qs, quote, urlsplit

from aiohttp import web

from coordinator.accounts.changes import Changes
from coordinator.accounts.directory import Caller
from coordinator.accounts.entry import SESSION_S, Entry
from coordinator.accounts.provider import PENDING_S, Provider
from coordinator.accounts.refusals import NotDone, NotLetIn, TryLater
from coordinator.api.access import COOKIE, CSRF_HEADER, Access, is_csrf_token
from coordinator.api.bodies import beginning
from coordinator.api.calls import ACTOR, CALLER
from coordinator.console import language
from coordinator.console.language import LANGUAGES, _
from coordinator.console.rendering import missing, page
from skerry.wire.accounts import LEAST_PASSWORD, Role, may

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Form = dict[str, str]
FormHandler = Callable[[web.Request, Form], Awaitable[web.StreamResponse]]

FORM_BYTES = 8192
BROWSER_COOKIE = "skerry_login"
CALLBACK = "/login/back"
"""Where a provider sends browsers to: it is registered there, under ``public_url``."""
HOME = "/"
YEAR_S = 365 * 86400


def local_path(text: str, *, is_login_ours: bool = False) -> str:
    """Where to go then: ``text`` where it is a path of ours, the login page only if asked for, else HOME. No other site can be meant."""
    is_plain = text.isascii() and text.isprintable() and "\\" not in text
    if not is_plain or not text.startswith("/") or text.startswith("//"):
        return HOME
    try:
        parts = urlsplit(text)
    except ValueError:
        return HOME
    return HOME if parts.scheme or parts.netloc or (parts.path == "/login" and not is_login_ours) else text


def login_path(request: web.Request) -> str:
    """The login page that leads back to what was asked for."""
    wanted = local_path(str(request.rel_url.without_query_params("fragment")))
    return "/login" if wanted == HOME else f"/login?next={quote(wanted, safe='')}"


def redirect(where: str) -> web.Response:
    """Go there, and ask for it anew."""
    return web.Response(status=303, headers={"Location": where})


async def read_form(request: web.Request) -> Form | None:
    """The first value of each field; None for a form that is larger than any of ours, which is not read to its end."""
    body = await beginning(request, FORM_BYTES)
    if len(body) > FORM_BYTES:
        return None
    return {key: values[0] for key, values in parse_qs(body.decode(errors="replace")).items()}


def is_own_form(request: web.Request) -> bool:
    """Whether a form comes from one of our own pages, as far as the browser says where it comes from."""
    origin = request.headers.get("Origin", "")
    return not origin or urlsplit(origin).netloc == request.host


class Entrance:
    """The handlers of the login and welcome pages, and the checks that stand before all others."""

    def __init__(self, access: Access, entry: Entry, changes: Changes, provider: Provider | None) -> None:
        self._access = access
        self._provider = provider
        self._entry = entry
        self._changes = changes

    # -- checks

    def guarded(self, handler: Handler, least: Role = "viewer") -> Handler:
        """The page for those who may see it; the login page for strangers."""

        async def checked(request: web.Request) -> web.StreamResponse:
            caller = self._access.caller_of(request)
            if caller is None or caller.role == "box":
                return redirect(login_path(request))
            self._know(request, caller)
            if not may(caller.role, least):
                return missing(
                    request,
                    _("This page is for %(role)ss.", role=_(least)),
                    _("You are %(role)s; an admin can change that.", role=_(caller.role)),
                    status=403,
                )
            return await handler(request)

        return checked

    def guarded_form(self, handler: FormHandler, least: Role = "viewer") -> Handler:
        """What a form of one of our own pages asks for, by those who may."""

        async def checked(request: web.Request) -> web.StreamResponse:
            form = await read_form(request)
            cookie = request.cookies.get(COOKIE, "")
            caller = self._access.of_cookie(cookie)
            if caller is None:
                return redirect("/login")
            self._know(request, caller)
            shown = form.get("csrf", "") if form is not None else request.headers.get(CSRF_HEADER, "")
            if form is None or not is_own_form(request) or not is_csrf_token(cookie, shown):
                why = _("It was sent by no page of your session. Load the page again, and try once more.")
                return missing(request, _("Nothing was changed."), why, status=403)
            if not may(caller.role, least):
                return missing(
                    request,
                    _("That is for %(role)ss.", role=_(least)),
                    _("You are %(role)s; an admin can change that.", role=_(caller.role)),
                    status=403,
                )
            return await handler(request, form)

        return checked

    def _know(self, request: web.Request, caller: Caller) -> None:
        request[CALLER], request[ACTOR] = caller, self._access.actor_of(request, caller)

    # -- in

    async def speak(self, request: web.Request) -> web.StreamResponse:
        """From now on in that language, in this browser."""
        code = request.match_info["code"]
        if code not in LANGUAGES:
            return missing(request, _("There is no page at this address."), "")
        response = redirect(local_path(request.query.get("next", HOME), is_login_ours=True))
        response.set_cookie(
            language.COOKIE, code, max_age=YEAR_S, path="/", samesite="Strict", httponly=True, secure=self._access.is_tls(request)
        )
        return response

    async def login(self, request: web.Request) -> web.StreamResponse:
        """The form; with a good ``code`` the way in. HEAD is not served, so that a preview does not spend the code."""
        after = local_path(request.query.get("next", ""))
        if "code" not in request.query:
            return page(request, "login.html", {"after": after, "problem": "", "name": "", "by_token": False})
        try:
            cookie = await self._entry.redeem(request.query["code"], address=self._access.address_of(request))
        except NotLetIn:
            problem = _("This link was used already or is too old. Make a new one with 'skerry login-link', or log in here.")
            return page(request, "login.html", {"after": after, "problem": problem, "name": "", "by_token": False}, status=403)
        # Not a redirect: a browser that comes from another site's link would not send a Strict cookie along with it.
        return self._let_in(request, page(request, "entered.html", {"after": after}), cookie)

    async def log_in(self, request: web.Request) -> web.StreamResponse:
        """The form came back, with a name and a password or with a token."""
        form = (await read_form(request) if is_own_form(request) else None) or {}
        after, name, address = local_path(form.get("next", "")), form.get("name", "").strip()[:63], self._access.address_of(request)
        try:
            if "token" in form:
                caller = self._access.of_token(form["token"].strip())
                if caller is None or caller.role == "box":
                    raise NotLetIn(_("That is no token that lets you in."))
                cookie = await self._entry.session_for(caller, address=address)
            else:
                cookie = await self._entry.log_in(name, form.get("password", ""), address=address)
        except NotLetIn as exc:
            problem = str(exc) if "token" in form else _("The name or the password is wrong.")
            return page(request, "login.html", {"after": after, "problem": problem, "name": name, "by_token": "token" in form}, status=403)
        except TryLater as exc:
            return page(request, "login.html", {"after": after, "problem": _patience(exc), "name": name, "by_token": False}, status=429)
        return self._let_in(request, redirect(after), cookie)

    async def elsewhere(self, request: web.Request) -> web.StreamResponse:
        """To the provider, where people are known."""
        if self._provider is None:
            return missing(request, _("There is no page at this address."), _("Single sign-on is not set up here."))
        try:
            where, browser = await self._provider.begin(local_path(request.query.get("next", "")))
        except NotLetIn as exc:
            return self._refused(request, str(exc))
        response = redirect(where)
        # Lax, not Strict: the provider's page leads back here, and the cookie must come along.
        is_tls = self._access.is_tls(request)
        response.set_cookie(BROWSER_COOKIE, browser, max_age=PENDING_S, httponly=True, samesite="Lax", secure=is_tls, path=CALLBACK)
        return response

    async def back(self, request: web.Request) -> web.StreamResponse:
        """Back from the provider."""
        if self._provider is None:
            return missing(request, _("There is no page at this address."), _("Single sign-on is not set up here."))
        try:
            known, after = await self._provider.finish(request.cookies.get(BROWSER_COOKIE, ""), dict(request.query))
            cookie = await self._changes.let_in(known, address=self._access.address_of(request))
        except NotLetIn as exc:
            return self._refused(request, str(exc))
        response = self._let_in(request, page(request, "entered.html", {"after": after}), cookie)
        response.del_cookie(BROWSER_COOKIE, path=CALLBACK)
        return response

    @staticmethod
    def _refused(request: web.Request, problem: str) -> web.Response:
        return page(request, "login.html", {"after": HOME, "problem": problem, "name": "", "by_token": False}, status=403)

    async def welcome(self, request: web.Request) -> web.StreamResponse:
        """The page on which somebody who was invited sets a password."""
        code = request.query.get("code", "")
        try:
            name = self._changes.welcome(code)
        except NotLetIn:
            why = _("It was used already or is too old. Ask an admin for a new one.")
            return missing(request, _("This link lets nobody in."), why, status=403)
        return page(request, "welcome.html", {"code": code, "name": name, "typed": "", "problem": "", "least": LEAST_PASSWORD})

    async def accept(self, request: web.Request) -> web.StreamResponse:
        """The form came back."""
        form = (await read_form(request) if is_own_form(request) else None) or {}
        code, typed, password = form.get("code", ""), form.get("name", "").strip(), form.get("password", "")
        meant = ""
        try:
            meant = self._changes.welcome(code)
            if password != form.get("again", ""):
                raise NotDone("invalid_password", "password: the two are not the same")
            cookie = await self._changes.accept(code, typed, password, address=self._access.address_of(request))
        except NotLetIn:
            why = _("It was used already or is too old. Ask an admin for a new one.")
            return missing(request, _("This link lets nobody in."), why, status=403)
        except (NotDone, TryLater) as exc:
            problem = _patience(exc) if isinstance(exc, TryLater) else str(exc)
            context = {"code": code, "name": meant, "typed": typed, "problem": problem, "least": LEAST_PASSWORD}
            return page(request, "welcome.html", context, status=422)
        return self._let_in(request, page(request, "entered.html", {"after": HOME}), cookie)

    def _let_in(self, request: web.Request, response: web.Response, cookie: str) -> web.Response:
        self.give_cookie(request, response, cookie)
        return response

    def give_cookie(self, request: web.Request, response: web.StreamResponse, cookie: str) -> None:
        """The session's: not for scripts, not for other sites, and where the page came over TLS for TLS alone."""
        is_tls = self._access.is_tls(request)
        response.set_cookie(COOKIE, cookie, max_age=SESSION_S, httponly=True, samesite="Strict", secure=is_tls, path="/")

    # -- out

    async def log_out(self, request: web.Request, _: Form) -> web.StreamResponse:
        """End the session, here and at the coordinator."""
        await self._entry.log_out(request.cookies.get(COOKIE, ""))
        response = redirect("/login")
        response.del_cookie(COOKIE, path="/")
        return response


def _patience(exc: TryLater) -> str:
    wait = f"{exc.after_s / 60:.0f} min" if exc.after_s > 90 else f"{exc.after_s:.0f} s"
    return _("Too many tries. The next one is heard in %(wait)s.", wait=wait)
