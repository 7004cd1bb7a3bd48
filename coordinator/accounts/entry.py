"""The ways in: a name and a password, a one-time link, a token that is shown; and the way out."""

import ipaddress
import secrets
import time
from collections import OrderedDict

import msgspec
from sqlite_utils import Database as Tables

from coordinator.accounts.directory import Caller, Directory, now_ms
from coordinator.accounts.passwords import Passwords
from coordinator.accounts.refusals import NotLetIn, TryLater
from coordinator.core.attempts import Attempts
from coordinator.registry import accounts, audit
from coordinator.registry.audit import Actor
from coordinator.registry.database import Database
from coordinator.registry.identity import digest_of
from skerry.runtime import log

logger = log.get("coordinator.accounts")

SESSION_S = 12 * 3600
LINK_S = 600
MOST_LINKS = 100


class Entry:
    """Makes sessions, which are what a browser's cookie stands for."""

    def __init__(self, database: Database, directory: Directory, passwords: Passwords) -> None:
        self._database = database
        self._directory = directory
        self._passwords = passwords
        self._attempts = Attempts()
        self._links: OrderedDict[str, tuple[Caller, float]] = OrderedDict()

    async def log_in(self, name: str, password: str, *, address: str) -> str:
        """The cookie of a new session. Raises NotLetIn and TryLater."""
        await self.check(name, password, address=address)
        return await self.session_for(Caller(name, "admin", "password"), address=address)  # as much as the user may, whatever that becomes

    async def check(self, name: str, password: str, *, address: str) -> None:
        """Whether that is the user's password. Raises NotLetIn and TryLater."""
        near = _neighbourhood(address)
        wait_s = self._attempts.wait_s(near, name, time.monotonic())
        if wait_s:
            raise TryLater("too many failed logins", after_s=wait_s)
        # Counted before it is known: tries side by side are as many as tries one after the other.
        self._attempts.failed(near, name, time.monotonic())
        user = self._directory.users.get(name)
        is_right = await self._passwords.match(user.password_hash if user else "", password)
        if not is_right or user is None:
            logger.warning("login.refused", address=address)
            raise NotLetIn("the name or the password is wrong")
        self._attempts.forgive(near, name)
        if self._passwords.is_outdated(user.password_hash):
            password_hash = await self._passwords.hash(password)
            if (now := self._directory.users.get(name)) is not None:  # whatever became of the user meanwhile
                renewed = msgspec.structs.replace(now, password_hash=password_hash)
                await self._database.write(lambda tables: accounts.save_user(tables, renewed))
                self._directory.users[name] = renewed

    def make_link(self, caller: Caller) -> str:
        """A code that logs a browser of the caller's in, once, within LINK_S, for what the caller may."""
        now = time.monotonic()
        for code in [code for code, (_, until) in self._links.items() if until <= now]:
            del self._links[code]
        while len(self._links) >= MOST_LINKS:
            self._links.popitem(last=False)
        code = secrets.token_urlsafe(24)
        self._links[code] = (caller, now + LINK_S)
        return code

    async def redeem(self, code: str, *, address: str) -> str:
        """The cookie of a new session; the code is spent. Raises NotLetIn."""
        caller, until = self._links.pop(code, (None, 0.0))
        if caller is None or until <= time.monotonic():
            raise NotLetIn("this link was used already or is too old")
        return await self.session_for(msgspec.structs.replace(caller, via="login link"), address=address)

    async def session_for(self, caller: Caller, *, address: str) -> str:
        """The cookie of a new session for somebody who has shown who they are; it may do no more than ``caller`` may. Raises NotLetIn."""
        if caller.role == "box":
            raise NotLetIn("a box has no browser")
        cookie, began_at_ms = secrets.token_urlsafe(32), now_ms()
        session = accounts.Session(digest_of(cookie), caller.name, caller.role, caller.token, began_at_ms, began_at_ms + SESSION_S * 1000)

        def work(tables: Tables) -> list[str]:
            if not accounts.is_there(tables, caller.name):
                raise NotLetIn("that user was removed")
            audit.append(tables, Actor(caller.name, caller.via, address), "session.begun", caller.name, now_ms=began_at_ms)
            return accounts.save_session(tables, session)

        for gone in await self._database.write(work):
            self._directory.sessions.pop(gone, None)
        self._directory.sessions[session.secret_sha256] = session
        return cookie

    async def log_out(self, cookie: str) -> None:
        """End a session."""
        secret_sha256 = digest_of(cookie)
        if secret_sha256 in self._directory.sessions:
            await self._database.write(lambda tables: accounts.delete_session(tables, secret_sha256))
            self._directory.sessions.pop(secret_sha256, None)


def _neighbourhood(address: str) -> str:
    """What failed logins are counted for: of IPv6 the /64, within which one host has as many addresses as it likes."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    return address if parsed.version == 4 else str(ipaddress.ip_network((parsed, 64), strict=False))
