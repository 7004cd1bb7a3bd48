"""In which language a page speaks: the browser's, or the one that somebody chose.

English stands in the source. ``words/`` has gettext's catalogues for other languages, of pages and of scripts; ``make words`` finds what is
new in the source, and makes of them what is read here and in browsers.
"""

import gettext
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from pathlib import Path

from aiohttp import web

WORDS = Path(__file__).parent / "words"
LANGUAGES = {"en": "English", "zh": "简体中文"}
"""By code, as each calls itself."""
TAGS = {"en": "en", "zh": "zh-Hans"}
"""As HTML has them (BCP 47)."""
COOKIE = "skerry_language"
DEFAULT = "en"
MOST_ACCEPTED = 20
_catalogues: Mapping[str, gettext.NullTranslations] = {
    code: gettext.NullTranslations() if code == DEFAULT else gettext.translation("pages", WORDS, [code]) for code in LANGUAGES
}
_current: ContextVar[str] = ContextVar("language", default=DEFAULT)


def N_(text: str) -> str:  # noqa: N802 - gettext's name for it
    """Marks a text that is translated where it is shown."""
    return text


def current() -> str:
    """The language of the request that is answered."""
    return _current.get()


def _(text: str, **values: object) -> str:
    """A text in that language; ``values`` go where it says ``%(name)s``."""
    found = plain(text)
    return found % values if values else found


def plain(text: str) -> str:
    """For templates, which put values in themselves."""
    return _catalogues[current()].gettext(text)


def plural(one: str, many: str, count: int) -> str:
    """As ``plain``, by a number."""
    return _catalogues[current()].ngettext(one, many, count)


def chosen(request: web.Request) -> str:
    """What was chosen in this browser, else what the browser prefers (RFC 9110, 12.5.4)."""
    cookie = request.cookies.get(COOKIE, "")
    return cookie if cookie in LANGUAGES else _preferred(request.headers.get("Accept-Language", ""))


def _preferred(header: str) -> str:
    wishes: list[tuple[float, int, str]] = []
    for place, part in enumerate(header.split(",")[:MOST_ACCEPTED]):
        tag, _sep, quality = part.strip().partition(";q=")
        try:
            weight = float(quality) if quality else 1.0
        except ValueError:
            continue
        wishes.append((-weight, place, tag.partition("-")[0].lower()))
    return next((code for weight, _place, code in sorted(wishes) if code in LANGUAGES and weight < 0), DEFAULT)


@web.middleware
async def speak(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    """Answers in the request's language."""
    token = _current.set(chosen(request))
    try:
        return await handler(request)
    finally:
        _current.reset(token)
