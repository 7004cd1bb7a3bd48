"""Who may see the pages: the way in with a one-time link or the operator's token, and the way out."""

from urllib.parse import parse_qs, quote, urlsplit

from aiohttp import web

from coordinator.api.access import COOKIE, SESSION_S, Access
from coordinator.api.bodies import beginning

FORM_BYTES = 8192
HOME = "/"


def local_path(text: str) -> str:
    """Where to go after the login: ``text`` where it is a path of ours, else HOME. No other site can be meant."""
    is_plain = text.isascii() and text.isprintable() and "\\" not in text
    if not is_plain or not text.startswith("/") or text.startswith("//"):
        return HOME
    try:
        parts = urlsplit(text)
    except ValueError:
        return HOME
    return HOME if parts.scheme or parts.netloc or parts.path == "/login" else text


def login_path(request: web.Request) -> str:
    """The login page that leads back to what was asked for."""
    wanted = local_path(str(request.rel_url.without_query_params("fragment")))
    return "/login" if wanted == HOME else f"/login?next={quote(wanted, safe='')}"


def is_in(access: Access, request: web.Request) -> bool:
    """Whether the pages may be shown to the caller."""
    return access.role_of(request) == "operator"


async def read_form(request: web.Request) -> dict[str, str] | None:
    """The first value of each field; None for a form that is larger than any of ours, which is not read to its end."""
    body = await beginning(request, FORM_BYTES)
    if len(body) > FORM_BYTES:
        return None
    return {key: values[0] for key, values in parse_qs(body.decode(errors="replace")).items()}


def let_in(request: web.Request, response: web.StreamResponse, cookie: str) -> None:
    """Give the browser its cookie: not for scripts, not for other sites, and where the page came over TLS for TLS alone."""
    is_tls = request.secure or request.headers.get("X-Forwarded-Proto") == "https"
    response.set_cookie(COOKIE, cookie, max_age=SESSION_S, httponly=True, samesite="Strict", secure=is_tls, path="/")


def let_out(response: web.StreamResponse) -> None:
    """Take the cookie back."""
    response.del_cookie(COOKIE, path="/")
