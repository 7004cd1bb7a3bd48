"""Users let in, changed and removed; passwords set by one-time links; tokens made and withdrawn. Each with its record."""

import secrets
from pathlib import Path

import msgspec
from sqlite_utils import Database as Tables

from coordinator.accounts import admin_link
from coordinator.accounts.directory import Caller, Directory, now_ms
from coordinator.accounts.entry import Entry
from coordinator.accounts.passwords import Passwords
from coordinator.accounts.provider import Known
from coordinator.accounts.refusals import NotDone, NotLetIn, NotThere
from coordinator.registry import accounts, audit
from coordinator.registry.audit import Actor
from coordinator.registry.database import Database
from coordinator.registry.identity import digest_of
from skerry.wire.accounts import (
    LEAST_PASSWORD,
    MOST_PASSWORD,
    TOKEN_PREFIX,
    Invited,
    Role,
    TokenMade,
    TokenRequest,
    TokenView,
    UserRequest,
    UserView,
    is_user_name,
    may,
)

INVITATION_S = 7 * 24 * 3600
CLI_TOKEN_S = 30 * 24 * 3600
MOST_USERS = 10_000
MOST_TOKENS_OF_ONE = 100


class Changes:
    """``actor`` is who changes something, for the record."""

    def __init__(
        self, database: Database, directory: Directory, entry: Entry, passwords: Passwords, *, state_dir: Path, public_url: str
    ) -> None:
        self._database = database
        self._directory = directory
        self._entry = entry
        self._passwords = passwords
        self._state_dir = state_dir
        self._public_url = public_url.rstrip("/")

    # -- users

    def users(self) -> list[UserView]:
        """Everybody, by name."""
        invited = {name for name, one in self._directory.invitations.items() if one.expires_at_ms > now_ms()}
        seen: dict[str, int] = {}
        for session in self._directory.sessions.values():
            seen[session.user] = max(seen.get(session.user, 0), session.began_at_ms)
        return [
            UserView(user.name, user.role, user.created_at_ms, bool(user.password_hash), user.name in invited, seen.get(user.name, 0))
            for user in sorted(self._directory.users.values(), key=lambda user: user.name)
        ]

    async def invite(self, request: UserRequest, actor: Actor) -> Invited:
        """Let somebody in. Raises NotDone."""
        if request.name in self._directory.users:
            raise NotDone("user_exists", f"name: {request.name!r} is a user already", field="name")
        if len(self._directory.users) >= MOST_USERS:
            raise NotDone("too_many_users", f"there are {MOST_USERS} users already")
        user = accounts.User(request.name, request.role, "", now_ms())
        return await self._invite(user, actor, "user.invited")

    async def invite_again(self, name: str, actor: Actor) -> Invited:
        """A new link for somebody who lost the first one, or the password, which stays good until the link is used. Raises NotThere."""
        return await self._invite(self._user(name), actor, "user.invited_again")

    async def _invite(self, user: accounts.User, actor: Actor, action: str) -> Invited:
        code, at_ms = secrets.token_urlsafe(32), now_ms()
        invitation = accounts.Invitation(user.name, digest_of(code), at_ms + INVITATION_S * 1000)

        def work(tables: Tables) -> None:
            accounts.save_user(tables, user)
            accounts.save_invitation(tables, invitation)
            audit.append(tables, actor, action, user.name, after=f"role {user.role}", now_ms=at_ms)

        await self._database.write(work)
        self._directory.users[user.name] = user
        self._directory.invitations[user.name] = invitation
        return Invited(user.name, user.role, f"{self._public_url}/welcome?code={code}", invitation.expires_at_ms)

    async def set_role(self, name: str, role: Role, actor: Actor) -> None:
        """What somebody may do from now on, in sessions that stand too. Raises NotThere and NotDone."""
        user = self._user(name)
        if role != "admin":
            self._check_not_last(user)
        changed = msgspec.structs.replace(user, role=role)

        def work(tables: Tables) -> None:
            accounts.save_user(tables, changed)
            audit.append(tables, actor, "user.role", name, before=f"role {user.role}", after=f"role {role}", now_ms=now_ms())

        await self._database.write(work)
        self._directory.users[name] = changed

    async def remove(self, name: str, actor: Actor) -> None:
        """Nobody gets in under that name any more, nor with its tokens. Raises NotThere and NotDone."""
        user = self._user(name)
        self._check_not_last(user)

        def work(tables: Tables) -> None:
            accounts.delete_user(tables, name)
            audit.append(tables, actor, "user.removed", name, before=f"role {user.role}", now_ms=now_ms())

        await self._database.write(work)
        self._directory.forget_user(name)

    def _user(self, name: str) -> accounts.User:
        user = self._directory.users.get(name)
        if user is None:
            raise NotThere(f"there is no user {name[:80]!r}")
        return user

    def _check_not_last(self, user: accounts.User) -> None:
        admins = [one.name for one in self._directory.users.values() if one.role == "admin" and one.password_hash]
        if admins == [user.name]:
            raise NotDone("last_admin", f"{user.name!r} is the only admin who can log in; make another one first")

    async def let_in(self, known: Known, *, address: str) -> str:
        """The cookie of a new session for somebody whom a provider vouches for, with the role that it gives them now. Raises NotLetIn.

        A name that is somebody else's here stays theirs: whoever may choose a name at the provider must not become them.
        """
        user = next((one for one in self._directory.users.values() if one.subject == known.subject), None)
        if user is None:
            if known.name in self._directory.users:
                raise NotLetIn(f"{known.name} is the name of somebody else here.")
            if len(self._directory.users) >= MOST_USERS:
                raise NotLetIn(f"There are {MOST_USERS} users already.")
        at_ms = now_ms()
        changed = accounts.User(known.name, known.role, "", at_ms, known.subject) if user is None else user
        changed = msgspec.structs.replace(changed, role=known.role)
        if changed != user:
            actor, before = Actor(changed.name, "single sign-on", address), f"role {user.role}" if user else ""

            def work(tables: Tables) -> None:
                accounts.save_user(tables, changed)
                audit.append(
                    tables,
                    actor,
                    "user.role" if user else "user.known",
                    changed.name,
                    before=before,
                    after=f"role {known.role}",
                    now_ms=at_ms,
                )

            await self._database.write(work)
            self._directory.users[changed.name] = changed
        return await self._entry.session_for(Caller(changed.name, "admin", "single sign-on"), address=address)

    # -- passwords

    def welcome(self, code: str) -> str:
        """Whom a link was made for; "" where its holder chooses the name. Raises NotLetIn."""
        shown = digest_of(code)
        for name, invitation in self._directory.invitations.items():
            if secrets.compare_digest(invitation.secret_sha256, shown) and invitation.expires_at_ms > now_ms():
                return name
        if admin_link.is_good(self._state_dir, code):
            return ""
        raise NotLetIn("this link was used already or is too old")

    async def accept(self, code: str, name: str, password: str, *, address: str) -> str:
        """Set the password by a link, which is spent; the cookie of a new session. Raises NotLetIn, NotDone and TryLater.

        Whoever was logged in under that name is not any more.
        """
        meant = self.welcome(code)
        name = meant or name
        if not is_user_name(name):
            raise NotDone("invalid_name", "name: 1 to 63 of a-z, 0-9 and . _ @ + -, the first one a letter or digit", field="name")
        check_password(password)
        password_hash, at_ms = await self._passwords.hash(password), now_ms()
        actor = Actor(name, "invitation" if meant else "admin link", address)
        if self.welcome(code) != meant or (not meant and not admin_link.spend(self._state_dir, code)):
            raise NotLetIn("this link was used already or is too old")
        self._directory.invitations.pop(name, None)
        held = self._directory.users.get(name) or accounts.User(name, "admin", "", at_ms)
        user = msgspec.structs.replace(held, role=held.role if meant else "admin", password_hash=password_hash)

        def work(tables: Tables) -> None:
            accounts.delete_invitation(tables, name)
            accounts.delete_sessions(tables, name)
            accounts.save_user(tables, user)
            audit.append(tables, actor, "user.password", name, after=f"role {user.role}", now_ms=at_ms)

        await self._database.write(work)
        self._directory.forget_sessions(name)
        self._directory.users[name] = user
        return await self._entry.session_for(Caller(name, "admin", actor.via), address=address)

    async def change_password(self, caller: Caller, old: str, new: str, *, address: str) -> str:
        """The caller's own; a new session's cookie, all others end. Raises NotLetIn, NotDone, NotThere and TryLater."""
        self._user(caller.name)
        check_password(new)
        await self._entry.check(caller.name, old, address=address)
        password_hash, at_ms = await self._passwords.hash(new), now_ms()
        user = msgspec.structs.replace(self._user(caller.name), password_hash=password_hash)

        def work(tables: Tables) -> None:
            accounts.save_user(tables, user)
            accounts.delete_sessions(tables, user.name)
            audit.append(tables, Actor(caller.name, caller.via, address), "user.password", user.name, now_ms=at_ms)

        await self._database.write(work)
        self._directory.users[user.name] = user
        self._directory.forget_sessions(user.name)
        return await self._entry.session_for(caller, address=address)

    # -- tokens

    def tokens(self, caller: Caller) -> list[TokenView]:
        """The caller's own; an admin sees everybody's."""
        found = [token.view for token in self._directory.tokens.values() if caller.role == "admin" or token.view.user == caller.name]
        return [
            msgspec.structs.replace(view, used_at_ms=self._directory.used_at_ms(view.id))
            for view in sorted(found, key=lambda view: (-view.created_at_ms, view.id))
        ]

    async def make_token(self, caller: Caller, request: TokenRequest, actor: Actor) -> TokenMade:
        """A token that may do at most what the caller may. Raises NotDone."""
        if not may(caller.role, request.role):
            raise NotDone("not_allowed", f"role: a token may do at most what you may, and you are {caller.role}", field="role")
        at_ms = now_ms()
        own = [token.view for token in self._directory.tokens.values() if token.view.user == caller.name]
        ended = [view.id for view in own if view.expires_at_ms <= at_ms]
        if len(own) - len(ended) >= MOST_TOKENS_OF_ONE:
            raise NotDone("too_many_tokens", f"you have {MOST_TOKENS_OF_ONE} tokens already; withdraw one first")
        token_id, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
        view = TokenView(token_id, request.title, caller.name, request.role, at_ms, at_ms + request.expires_s * 1000)
        token = accounts.Token(view, digest_of(secret))

        def work(tables: Tables) -> None:
            if not accounts.is_there(tables, caller.name):
                raise NotThere(f"there is no user {caller.name!r} any more")
            for gone in ended:
                accounts.delete_token(tables, gone)
            accounts.save_token(tables, token)
            after = f"{view.title}: role {view.role}, {request.expires_s} s"
            audit.append(tables, actor, "token.made", token_id, after=after, now_ms=at_ms)

        await self._database.write(work)
        for gone in ended:
            self._directory.tokens.pop(gone, None)
        self._directory.tokens[token_id] = token
        return TokenMade(token_id, f"{TOKEN_PREFIX}{token_id}_{secret}", view.title, view.role, view.expires_at_ms)

    async def token_for_password(self, name: str, password: str, title: str, *, address: str) -> TokenMade:
        """A token for a program that a person sits at. Raises NotLetIn, TryLater and NotDone."""
        await self._entry.check(name, password, address=address)
        caller = Caller(name, self._user(name).role, "password")
        return await self.make_token(caller, TokenRequest(title, self._user(name).role, CLI_TOKEN_S), Actor(name, "password", address))

    async def withdraw_token(self, caller: Caller, token_id: str, actor: Actor) -> None:
        """The caller's own, or with an admin anybody's. Raises NotThere."""
        token = self._directory.tokens.get(token_id)
        if token is None or (caller.role != "admin" and token.view.user != caller.name):
            raise NotThere(f"there is no token {token_id[:80]!r} of yours")

        def work(tables: Tables) -> None:
            accounts.delete_token(tables, token_id)
            before = f"{token.view.title}: role {token.view.role}, of {token.view.user}"
            audit.append(tables, actor, "token.withdrawn", token_id, before=before, now_ms=now_ms())

        await self._database.write(work)
        self._directory.tokens.pop(token_id, None)


def check_password(password: str) -> None:
    """Length alone. Raises NotDone."""
    if not LEAST_PASSWORD <= len(password) <= MOST_PASSWORD:
        raise NotDone("invalid_password", f"password: {LEAST_PASSWORD} characters at least, {MOST_PASSWORD} at most", field="password")
