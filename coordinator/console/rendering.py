"""How a page is made: a template, what every page knows, and the headers that browsers go by."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp_jinja2
import jinja2
from aiohttp import web

from coordinator.api.access import COOKIE, Access, csrf_token
from coordinator.api.calls import CALLER
from coordinator.console import language
from coordinator.console.wording import FILTERS, SYMBOLS
from skerry import __version__
from skerry.wire.accounts import may

TEMPLATES = Path(__file__).parent / "templates"
SECURITY = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
"""On every answer. No script and no style stands inside a page, and nothing is loaded from elsewhere."""
THEME = "skerry_theme"
"""A cookie: colours that somebody chose."""
THEMES = ("light", "dark")
PACKED_FROM_BYTES = 8 * 1024
HSTS = "max-age=31536000"


def set_up(app: web.Application, access: Access, *, names: Mapping[str, Any], filters: Mapping[str, Any]) -> None:
    """Templates, which know ``names`` and ``filters`` besides their own, and headers for the whole application."""
    aiohttp_jinja2.setup(
        app, loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env = aiohttp_jinja2.get_env(app)
    env.add_extension("jinja2.ext.i18n")
    env.install_gettext_callables(language.plain, language.plural, newstyle=True)  # type: ignore[attr-defined]  # the extension's
    app.middlewares.append(language.speak)
    env.filters.update({**FILTERS, **filters})
    env.globals.update({"version": __version__, "symbols": SYMBOLS, **names})

    async def harden(request: web.Request, response: web.StreamResponse) -> None:
        for name, value in SECURITY.items():
            response.headers.setdefault(name, value)
        if access.is_tls(request):
            response.headers.setdefault("Strict-Transport-Security", HSTS)

    app.on_response_prepare.append(harden)


def page(request: web.Request, template: str, context: Mapping[str, Any], *, status: int = 200) -> web.Response:
    """A page; ``?fragment=1`` gives what lies inside ``<main>`` alone."""
    caller = request.get(CALLER)
    known = {
        "layout": "fragment.html" if is_fragment(request) else "page.html",
        "path": request.path,
        "here": str(request.rel_url.without_query_params("fragment")),
        "tag": language.TAGS[language.current()],
        "languages": {code: name for code, name in language.LANGUAGES.items() if code != language.current()},
        "theme": theme if (theme := request.cookies.get(THEME, "")) in THEMES else "",
        "me": caller,
        "csrf": csrf_token(request.cookies.get(COOKIE, "")) if caller else "",
        "may": lambda role: caller is not None and may(caller.role, role),
    }
    made = aiohttp_jinja2.render_template(template, request, {**context, **known}, status=status)
    if len(made.body or b"") >= PACKED_FROM_BYTES:  # type: ignore[arg-type]  # it is bytes
        made.enable_compression()  # no other site can ask with our cookie (SameSite), and so none can guess by what length it has
    return made


def is_fragment(request: web.Request) -> bool:
    """Whether the page's own script asks, which has the rest already."""
    return request.query.get("fragment") == "1"


def missing(request: web.Request, what: str, why: str, *, status: int = 404) -> web.Response:
    """There is nothing to show, or not to this caller."""
    return page(request, "missing.html", {"what": what, "why": why}, status=status)
