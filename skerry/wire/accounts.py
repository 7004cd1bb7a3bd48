"""Who may look and act: users, their roles, and the tokens with which programs act for them."""

import re
from typing import Annotated, Literal

import msgspec

Role = Literal["viewer", "operator", "admin"]
RANK: dict[str, int] = {"viewer": 1, "operator": 2, "admin": 3}
"""Whoever has a role may do what those below it may."""

USER_NAME = r"^[a-z0-9][a-z0-9._@+-]{0,62}\Z"
UserName = Annotated[str, msgspec.Meta(pattern=USER_NAME)]
Title = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f-\x9f]{1,63}\Z")]
LEAST_PASSWORD, MOST_PASSWORD = 12, 1024
"""Characters; NIST SP 800-63B asks for length and for nothing else."""
Password = Annotated[str, msgspec.Meta(min_length=LEAST_PASSWORD, max_length=MOST_PASSWORD)]
TOKEN_PREFIX = "skt_"  # noqa: S105 - what secret scanners look for, not a secret
MOST_TOKEN_S = 366 * 24 * 3600


class UserRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Somebody to let in."""

    name: UserName
    role: Role = "viewer"


class RoleRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What somebody may do from now on."""

    role: Role


class Invited(msgspec.Struct, frozen=True):
    """A link with which the user sets a password, once."""

    name: str
    role: Role
    url: str
    expires_at_ms: int


class UserView(msgspec.Struct, frozen=True):
    """A user; ``is_invited`` says that a link is out that was not used."""

    name: str
    role: Role
    created_at_ms: int
    has_password: bool
    is_invited: bool
    seen_at_ms: int = 0


class TokenRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A token to make: what it is for, what it may do (at most what its maker may), and for how long."""

    title: Title
    role: Role = "viewer"
    expires_s: Annotated[int, msgspec.Meta(ge=60, le=MOST_TOKEN_S)] = 90 * 24 * 3600


class PasswordRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A name and a password for a token of a program that a person sits at."""

    name: Annotated[str, msgspec.Meta(max_length=63)]
    password: Annotated[str, msgspec.Meta(max_length=MOST_PASSWORD)]
    title: Title = "command line"


class TokenMade(msgspec.Struct, frozen=True):
    """A token, told once: it is kept hashed."""

    id: str
    token: str
    title: str
    role: Role
    expires_at_ms: int


class TokenView(msgspec.Struct, frozen=True):
    """A token as it stands; ``user`` is who made it."""

    id: str
    title: str
    user: str
    role: Role
    created_at_ms: int
    expires_at_ms: int
    used_at_ms: int = 0


class WhoView(msgspec.Struct, frozen=True):
    """Who the caller is, what it may do, and by what that is known."""

    name: str
    role: str
    via: str


def is_user_name(text: str) -> bool:
    """Whether a user can bear that name."""
    return re.match(USER_NAME, text) is not None


def may(role: str, least: str) -> bool:
    """Whether somebody with ``role`` may do what is for ``least`` and above."""
    return RANK.get(role, 0) >= RANK[least]


def lesser(one: Role, other: Role) -> Role:
    """Of two roles the one that may do less."""
    return min(one, other, key=RANK.__getitem__)
