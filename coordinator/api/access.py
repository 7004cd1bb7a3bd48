"""Who calls: programs by bearer tokens, browsers by a session's cookie. What a cookie changes needs the page's own CSRF token besides."""

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from aiohttp import web

from coordinator.accounts.directory import OPERATOR, Caller, Directory
from coordinator.registry.audit import Actor
from skerry.runtime import durable
from skerry.wire.accounts import TOKEN_PREFIX

COOKIE = "skerry_session"
CSRF_HEADER = "X-CSRF-Token"
SAFE_METHODS = ("GET", "HEAD")


class Access:
    """``state_dir/operator.token`` and ``box.token`` are made on first start, readable by the coordinator's user alone.

    ``is_box`` says whether a token is one that an enrolled box was given. With ``behind_proxy`` a caller's address is what the nearest
    proxy says it is, and so is whether it came over TLS.
    """

    def __init__(self, state_dir: Path, directory: Directory, is_box: Callable[[str], bool], *, behind_proxy: bool) -> None:
        self._directory = directory
        self._is_box = is_box
        self._behind_proxy = behind_proxy
        self._files: dict[Literal["operator", "box"], str] = {"operator": "", "box": ""}
        for role in self._files:
            self._files[role] = _token(state_dir / f"{role}.token")

    def caller_of(self, request: web.Request) -> Caller | None:
        """None for a stranger, and for a browser that would change something without its page's token."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self.of_token(token.strip())
        cookie = request.cookies.get(COOKIE, "")
        if request.method not in SAFE_METHODS and not is_csrf_token(cookie, request.headers.get(CSRF_HEADER, "")):
            return None
        return self.of_cookie(cookie)

    def of_cookie(self, cookie: str) -> Caller | None:
        """Whose session that is. For what changes something the caller checks the CSRF token besides."""
        return self._directory.of_session(cookie)

    def of_token(self, token: str) -> Caller | None:
        """Whoever shows that token."""
        if token.startswith(TOKEN_PREFIX):
            return self._directory.of_token(token)
        for role, known in self._files.items():
            if hmac.compare_digest(known.encode(), token.encode(errors="surrogateescape")):
                return Caller(OPERATOR if role == "operator" else "(box)", role, f"{role}.token")
        return Caller("(box)", "box", "a box's token") if self._is_box(token) else None

    def address_of(self, request: web.Request) -> str:
        """Where a request comes from, as text."""
        told = request.headers.get("X-Forwarded-For", "").rpartition(",")[2].strip() if self._behind_proxy else ""
        try:
            return str(ipaddress.ip_address(told or request.remote or ""))
        except ValueError:
            return request.remote or ""

    def is_tls(self, request: web.Request) -> bool:
        """Whether the caller's browser sees TLS."""
        return request.secure or (self._behind_proxy and request.headers.get("X-Forwarded-Proto") == "https")

    def actor_of(self, request: web.Request, caller: Caller) -> Actor:
        """For the record."""
        return Actor(caller.name, caller.via, self.address_of(request))


def csrf_token(cookie: str) -> str:
    """What a page of the session's own sends with what it changes. Another site sees neither it nor the cookie."""
    return hashlib.sha256(b"skerry console csrf\0" + cookie.encode(errors="surrogateescape")).hexdigest()


def is_csrf_token(cookie: str, text: str) -> bool:
    """Whether ``text`` is the session's."""
    return bool(cookie) and hmac.compare_digest(csrf_token(cookie).encode(), text.encode(errors="surrogateescape"))


def _token(path: Path) -> str:
    if not path.exists():
        durable.write(path, f"{secrets.token_urlsafe(32)}\n".encode(), mode=0o600)
    return path.read_text().strip()
