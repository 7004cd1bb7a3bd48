"""Passwords hashed by argon2id (RFC 9106, its second recommended setting: 64 MiB, three passes), one after the other."""

import asyncio
import secrets
from collections.abc import Callable
from typing import TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from coordinator.accounts.refusals import TryLater

T = TypeVar("T")

MOST_WAITING = 16
"""Each takes 64 MiB and some tens of milliseconds of a core."""


class Passwords:
    """Hashes and checks in a thread, one at a time: whoever sends passwords can't take the coordinator's memory or all its cores."""

    def __init__(self) -> None:
        self._hasher = PasswordHasher()
        self._turn = asyncio.Semaphore(1)
        self._waiting = 0
        self._nobodys = ""

    async def hash(self, password: str) -> str:
        """What is kept of a password. Raises TryLater."""
        return await self._in_turn(lambda: self._hasher.hash(password))

    async def match(self, known: str, password: str) -> bool:
        """Whether it is that password; as slow where ``known`` is empty, as of somebody who does not exist. Raises TryLater."""
        if not self._nobodys:
            self._nobodys = await self.hash(secrets.token_urlsafe())

        def verify() -> bool:
            try:
                return self._hasher.verify(known or self._nobodys, password) and known != ""
            except (VerificationError, InvalidHashError):
                return False

        return await self._in_turn(verify)

    def is_outdated(self, known: str) -> bool:
        """Whether it was hashed with less than is asked for today."""
        return self._hasher.check_needs_rehash(known)

    async def _in_turn(self, work: Callable[[], T]) -> T:
        if self._waiting >= MOST_WAITING:
            raise TryLater("too many people are logging in", after_s=2.0)
        self._waiting += 1
        try:
            async with self._turn:
                return await asyncio.to_thread(work)
        finally:
            self._waiting -= 1
