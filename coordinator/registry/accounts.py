"""Users, invitations, sessions of browsers and tokens of programs. Secrets are kept hashed: passwords by argon2id, all others, which are
long and random, by SHA-256."""

from typing import Any

import msgspec
from sqlite_utils import Database as Tables

from skerry.wire.accounts import Role, TokenView

SESSIONS_OF_ONE = 20


class User(msgspec.Struct, frozen=True):
    """Somebody who may log in. ``password_hash`` is empty until the invitation was taken up, ``subject`` for all who do not log in
    elsewhere."""

    name: str
    role: Role
    password_hash: str
    created_at_ms: int
    subject: str = ""


class Session(msgspec.Struct, frozen=True):
    """A browser that is logged in; its secret stands in the browser's cookie alone.

    It may do at most what ``role`` may, and where it came in by a ``token``, lasts no longer than that.
    """

    secret_sha256: str
    user: str
    role: Role
    token: str
    began_at_ms: int
    expires_at_ms: int


class Token(msgspec.Struct, frozen=True):
    """A program's token: its view, and what is kept of its secret."""

    view: TokenView
    secret_sha256: str


class Invitation(msgspec.Struct, frozen=True):
    """A link that was made for a user."""

    name: str
    secret_sha256: str
    expires_at_ms: int


# -- users


def read_users(tables: Tables) -> list[User]:
    """Everybody, by name."""
    return [User(**row) for row in tables.query("SELECT * FROM users ORDER BY name")]


def read_user(tables: Tables, name: str) -> User | None:
    """One of them."""
    return next((User(**row) for row in tables.query("SELECT * FROM users WHERE name = ?", [name])), None)


def save_user(tables: Tables, user: User) -> None:
    """Keep a new user, or what became of one."""
    tables.execute(
        "INSERT OR REPLACE INTO users (name, role, password_hash, created_at_ms, subject) VALUES (?, ?, ?, ?, ?)",
        [user.name, user.role, user.password_hash, user.created_at_ms, user.subject],
    )


def delete_user(tables: Tables, name: str) -> None:
    """Forget a user, with all that lets somebody in under the name."""
    for statement in (
        "DELETE FROM users WHERE name = ?",
        "DELETE FROM invitations WHERE name = ?",
        "DELETE FROM sessions WHERE user = ?",
        "DELETE FROM api_tokens WHERE user = ?",
    ):
        tables.execute(statement, [name])


def is_there(tables: Tables, name: str) -> bool:
    """Whether somebody may be let in under that name: not one who was removed meanwhile. Names in brackets are no users'."""
    return name.startswith("(") or read_user(tables, name) is not None


# -- invitations


def read_invitations(tables: Tables) -> list[Invitation]:
    """Links that were not used, those that ended among them."""
    return [Invitation(**row) for row in tables.query("SELECT * FROM invitations")]


def save_invitation(tables: Tables, invitation: Invitation) -> None:
    """Keep a link; an earlier one for the same user is good for nothing any more."""
    tables.execute(
        "INSERT OR REPLACE INTO invitations (name, secret_sha256, expires_at_ms) VALUES (?, ?, ?)",
        [invitation.name, invitation.secret_sha256, invitation.expires_at_ms],
    )


def invited(tables: Tables, secret_sha256: str, *, now_ms: int) -> str | None:
    """Whom a link was made for; None where it is good for nobody."""
    rows = tables.query("SELECT name FROM invitations WHERE secret_sha256 = ? AND expires_at_ms > ?", [secret_sha256, now_ms])
    return next((row["name"] for row in rows), None)


def delete_invitation(tables: Tables, name: str) -> None:
    """It was used."""
    tables.execute("DELETE FROM invitations WHERE name = ?", [name])


# -- sessions


def read_sessions(tables: Tables, *, now_ms: int) -> list[Session]:
    """Those that have not ended."""
    return [Session(**row) for row in tables.query("SELECT * FROM sessions WHERE expires_at_ms > ?", [now_ms])]


def save_session(tables: Tables, session: Session) -> list[str]:
    """Keep a session; returns the secrets' digests of the user's oldest ones, which had to make way, and of all that ended."""
    gone = "SELECT secret_sha256 FROM sessions WHERE expires_at_ms <= ? UNION SELECT secret_sha256 FROM ("
    gone += "SELECT secret_sha256 FROM sessions WHERE user = ? ORDER BY began_at_ms DESC LIMIT -1 OFFSET ?)"
    old = [row["secret_sha256"] for row in tables.query(gone, [session.began_at_ms, session.user, SESSIONS_OF_ONE - 1])]
    for secret_sha256 in old:
        delete_session(tables, secret_sha256)
    tables.execute(
        "INSERT INTO sessions (secret_sha256, user, role, token, began_at_ms, expires_at_ms) VALUES (?, ?, ?, ?, ?, ?)",
        [session.secret_sha256, session.user, session.role, session.token, session.began_at_ms, session.expires_at_ms],
    )
    return old


def delete_session(tables: Tables, secret_sha256: str) -> None:
    """Somebody logged out."""
    tables.execute("DELETE FROM sessions WHERE secret_sha256 = ?", [secret_sha256])


def delete_sessions(tables: Tables, user: str) -> None:
    """Log a user out everywhere."""
    tables.execute("DELETE FROM sessions WHERE user = ?", [user])


# -- tokens


def _token(row: dict[str, Any]) -> Token:
    secret_sha256 = row.pop("secret_sha256")
    return Token(TokenView(**row), secret_sha256)


def read_tokens(tables: Tables) -> list[Token]:
    """Every token, the newest first; those that ended among them, until they are tidied away."""
    return [_token(row) for row in tables.query("SELECT * FROM api_tokens ORDER BY created_at_ms DESC, id")]


def save_token(tables: Tables, token: Token) -> None:
    """Keep a new token."""
    view = token.view
    tables.execute(
        "INSERT INTO api_tokens (id, secret_sha256, title, user, role, created_at_ms, expires_at_ms) VALUES (?, ?, ?, ?, ?, ?, ?)",
        [view.id, token.secret_sha256, view.title, view.user, view.role, view.created_at_ms, view.expires_at_ms],
    )


def delete_token(tables: Tables, token_id: str) -> None:
    """It is good for nothing from now on."""
    tables.execute("DELETE FROM api_tokens WHERE id = ?", [token_id])


def save_uses(tables: Tables, used_at_ms: dict[str, int]) -> None:
    """When tokens were last used."""
    for token_id, at_ms in used_at_ms.items():
        tables.execute("UPDATE api_tokens SET used_at_ms = ? WHERE id = ?", [at_ms, token_id])
