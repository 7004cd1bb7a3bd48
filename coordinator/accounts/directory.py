"""Who there is: users, sessions, tokens and invitations, held in memory to answer who calls. What counts is in the registry first."""

import secrets
import time
from typing import Literal

import msgspec
from sqlite_utils import Database as Tables

from coordinator.registry import accounts
from coordinator.registry.database import Database
from coordinator.registry.identity import digest_of
from skerry.wire.accounts import TOKEN_PREFIX, Role, lesser

OPERATOR = "(operator)"
"""Whoever holds ``operator.token`` goes by this name, which no user can bear."""


class Caller(msgspec.Struct, frozen=True):
    """Who acts, what it may do, and by what that is known."""

    name: str
    role: Role | Literal["box"]
    via: str
    token: str = ""
    """The number of the token that it came by, now or when the session began."""


class Directory:
    """Changed by ``entry`` and ``changes`` alone, after the registry was."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.users: dict[str, accounts.User] = {}
        self.sessions: dict[str, accounts.Session] = {}
        self.tokens: dict[str, accounts.Token] = {}
        self.invitations: dict[str, accounts.Invitation] = {}
        self._used_at_ms: dict[str, int] = {}

    async def begin(self) -> None:
        """Read what the registry holds."""

        def read(tables: Tables) -> None:
            self.users = {user.name: user for user in accounts.read_users(tables)}
            self.sessions = {session.secret_sha256: session for session in accounts.read_sessions(tables, now_ms=now_ms())}
            self.tokens = {token.view.id: token for token in accounts.read_tokens(tables)}
            self.invitations = {invitation.name: invitation for invitation in accounts.read_invitations(tables)}

        await self._database.read(read)

    def of_session(self, cookie: str) -> Caller | None:
        """Who a browser is."""
        session = self.sessions.get(digest_of(cookie)) if cookie else None
        if session is None or session.expires_at_ms <= now_ms():
            return None
        role = self.role_of(session.user)
        if role is None or (session.token and self._token(session.token) is None):
            return None
        return Caller(session.user, lesser(session.role, role), "session", session.token)

    def of_token(self, text: str) -> Caller | None:
        """Whom a program acts for: at most what its maker may do now."""
        token_id, _, secret = text.removeprefix(TOKEN_PREFIX).partition("_")
        token = self._token(token_id)
        if token is None or not secrets.compare_digest(token.secret_sha256, digest_of(secret)):
            return None
        role = self.role_of(token.view.user)
        if role is None:
            return None
        self._used_at_ms[token_id] = now_ms()
        return Caller(token.view.user, lesser(token.view.role, role), f"token {token_id}", token_id)

    def _token(self, token_id: str) -> accounts.Token | None:
        token = self.tokens.get(token_id)
        return token if token is not None and token.view.expires_at_ms > now_ms() else None

    def role_of(self, name: str) -> Role | None:
        """What somebody may do; None for somebody who is not known."""
        if name == OPERATOR:
            return "operator"
        user = self.users.get(name)
        return user.role if user is not None else None

    def used_at_ms(self, token_id: str) -> int:
        """When a token was last used, also if that is not written down yet."""
        token = self.tokens.get(token_id)
        return max(self._used_at_ms.get(token_id, 0), token.view.used_at_ms if token else 0)

    async def write_uses(self) -> None:
        """Keep when tokens were last used."""
        used, self._used_at_ms = self._used_at_ms, {}
        if not used:
            return
        await self._database.write(lambda tables: accounts.save_uses(tables, used))
        for token_id, at_ms in used.items():
            if token := self.tokens.get(token_id):
                self.tokens[token_id] = msgspec.structs.replace(token, view=msgspec.structs.replace(token.view, used_at_ms=at_ms))

    def forget_user(self, name: str) -> None:
        """All that lets somebody in under a name."""
        self.users.pop(name, None)
        self.invitations.pop(name, None)
        self.forget_sessions(name)
        self.tokens = {key: token for key, token in self.tokens.items() if token.view.user != name}

    def forget_sessions(self, name: str) -> None:
        """Somebody is logged out everywhere."""
        self.sessions = {key: session for key, session in self.sessions.items() if session.user != name}


def now_ms() -> int:
    """Wall clock."""
    return time.time_ns() // 1_000_000
