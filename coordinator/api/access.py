"""Who may call: bearer tokens for programs, one-time links and a signed cookie for browsers. Roles: ``operator`` and ``box``."""

import base64
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from aiohttp import web

from skerry.runtime import durable

Role = Literal["operator", "box"]
ROLES: tuple[Role, ...] = ("operator", "box")

COOKIE = "skerry_session"
SESSION_S = 12 * 3600
LINK_S = 600
MOST_LINKS = 100


class Access:
    """Tokens lie in ``state_dir/<role>.token``, made on first start, readable by the coordinator's user alone.

    ``is_box`` says whether a token is one that an enrolled box was given.
    """

    def __init__(self, state_dir: Path, is_box: Callable[[str], bool]) -> None:
        self._is_box = is_box
        self._tokens: dict[Role, str] = {role: _token(state_dir / f"{role}.token") for role in ROLES}
        self._cookie_key = hashlib.sha256(b"skerry console cookie\0" + self._tokens["operator"].encode()).digest()
        self._links: dict[str, float] = {}

    def role_of(self, request: web.Request) -> Role | None:
        """What the caller may act as; None for a stranger. A cookie counts for reading alone, so that no other site can make it act."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            for role, known in self._tokens.items():
                if hmac.compare_digest(known.encode(), token.strip().encode(errors="surrogateescape")):
                    return role
            return "box" if self._is_box(token.strip()) else None
        if request.method in ("GET", "HEAD") and self._is_session(request.cookies.get(COOKIE, "")):
            return "operator"
        return None

    def make_link(self) -> str:
        """A code that logs one browser in, once."""
        now = time.monotonic()
        self._links = {code: until for code, until in self._links.items() if until > now}
        while len(self._links) >= MOST_LINKS:
            self._links.pop(next(iter(self._links)))
        code = secrets.token_urlsafe(24)
        self._links[code] = now + LINK_S
        return code

    def redeem(self, code: str) -> str | None:
        """The cookie's value for a code that is good; the code is spent."""
        until = self._links.pop(code, 0.0)
        if until <= time.monotonic():
            return None
        return self._sign(int(time.time()) + SESSION_S)

    def cookie_for_token(self, token: str) -> str | None:
        """The cookie's value for somebody who typed the operator's token."""
        return (
            self._sign(int(time.time()) + SESSION_S)
            if hmac.compare_digest(token.strip().encode(errors="surrogateescape"), self._tokens["operator"].encode())
            else None
        )

    def _sign(self, until: int) -> str:
        text = f"{until}.{secrets.token_urlsafe(8)}"
        seal = base64.urlsafe_b64encode(hmac.digest(self._cookie_key, text.encode(errors="surrogateescape"), "sha256")).decode().rstrip("=")
        return f"{text}.{seal}"

    def _is_session(self, cookie: str) -> bool:
        text, _, seal = cookie.rpartition(".")
        good = base64.urlsafe_b64encode(hmac.digest(self._cookie_key, text.encode(errors="surrogateescape"), "sha256")).decode().rstrip("=")
        until = text.partition(".")[0]
        return hmac.compare_digest(seal.encode(errors="surrogateescape"), good.encode()) and until.isdigit() and int(until) > time.time()


def _token(path: Path) -> str:
    if not path.exists():
        durable.write(path, f"{secrets.token_urlsafe(32)}\n".encode(), mode=0o600)
    return path.read_text().strip()
