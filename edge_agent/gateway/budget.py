"""What may still go to the cloud this hour: small leases from an account on disk, which all processes of this gateway share.

A lease counts as spent when it is taken, so that neither a crash nor a second process can make more of the budget than there is. What
blocks, the file and its lock, happens in a thread, ahead of need.
"""

import asyncio
import fcntl
import os
import time
from pathlib import Path

import msgspec

from edge_agent.core import budget
from edge_agent.core.budget import Account, Lease
from skerry.runtime import durable, log
from skerry.wire import codec
from skerry.wire.messages import CloudBudget

logger = log.get("gateway.budget")

MAX_FILE_BYTES = 4 * 1024 * 1024
ANSWER_BYTES = 64 * 1024
"""What is set aside for an answer whose size is not known."""


SHORT_REQUESTS = 4
"""A lease for no more than so many requests is topped up."""
SPENT_FOR_S = 2.0


class Reserved(msgspec.Struct, frozen=True):
    """Set aside for one request: what goes there and comes back may be ``size_bytes`` at most."""

    deployment: str
    size_bytes: int


NO_LIMIT = Reserved("", 2**62)


class Budgets:
    """The budget of every deployment that has one."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._budgets: dict[str, CloudBudget] = {}
        self._leases: dict[str, Lease] = {}
        self._wanted: dict[str, int] = {}
        """Bytes that a request wanted and did not get."""
        self._answers: dict[str, int] = {}
        """Bytes of the largest answer so far."""
        self._again_at: dict[str, float] = {}
        """When the account is asked again, where it had nothing left."""
        self._task: asyncio.Task[None] | None = None

    def update(self, budgets: dict[str, CloudBudget | None]) -> None:
        """From now on it is these; None is without limit."""
        self._budgets = {name: one for name, one in budgets.items() if one is not None}
        for name in [name for name in self._leases if name not in self._budgets]:
            del self._leases[name]
        self.top_up()

    def has(self, deployment: str, size_bytes: int) -> bool:
        """Whether a request of that size may go to the cloud now."""
        if deployment not in self._budgets:
            return True
        reserved = self._set_aside(deployment, size_bytes)
        lease = self._leases.get(deployment)
        if lease is not None and budget.spend(lease, reserved, now_hour=_hour()) is not None:
            return True
        self._wanted[deployment] = max(reserved, self._wanted.get(deployment, 0))
        self.top_up()
        return False

    def reserve(self, deployment: str, size_bytes: int) -> Reserved | None:
        """Set aside what a request and its answer may take; None where the budget is spent."""
        if deployment not in self._budgets:
            return NO_LIMIT
        lease, reserved = self._leases.get(deployment), self._set_aside(deployment, size_bytes)
        left = budget.spend(lease, reserved, now_hour=_hour()) if lease is not None else None
        if left is None:
            return None
        self._leases[deployment] = left
        self.top_up()
        return Reserved(deployment, reserved)

    def used(self, reserved: Reserved, size_bytes: int) -> None:
        """What a request took in fact: the rest may be used by others."""
        lease = self._leases.get(reserved.deployment)
        if lease is None or reserved is NO_LIMIT:
            return
        self._answers[reserved.deployment] = max(size_bytes, self._answers.get(reserved.deployment, 0))
        if lease.bytes_left is not None and lease.hour == _hour():
            self._leases[reserved.deployment] = msgspec.structs.replace(
                lease, bytes_left=lease.bytes_left + max(0, reserved.size_bytes - size_bytes)
            )

    def _set_aside(self, deployment: str, size_bytes: int) -> int:
        return size_bytes + max(ANSWER_BYTES, 2 * self._answers.get(deployment, 0))

    # -- leases

    def top_up(self) -> None:
        """See to it that leases are there when they are needed."""
        if self._budgets and (self._task is None or self._task.done()):
            now = time.monotonic()
            short = [name for name in self._budgets if now >= self._again_at.get(name, 0.0) and self._is_short(name)]
            if short:
                self._task = asyncio.create_task(self._lease(short), name="gateway.budget")

    def _is_short(self, deployment: str) -> bool:
        lease = self._leases.get(deployment)
        if lease is None or lease.hour != _hour() or deployment in self._wanted:
            return True
        reserved = self._set_aside(deployment, ANSWER_BYTES)
        return (lease.requests_left is not None and lease.requests_left <= SHORT_REQUESTS) or (
            lease.bytes_left is not None and lease.bytes_left < SHORT_REQUESTS * reserved
        )

    async def _lease(self, deployments: list[str]) -> None:
        wanted = {name: self._wanted.pop(name, ANSWER_BYTES) for name in deployments}
        try:
            leases = await asyncio.to_thread(_leased, self._file, {name: self._budgets[name] for name in deployments}, wanted)
        except (OSError, codec.Malformed) as exc:
            logger.error("budget.unusable", path=str(self._file), reason=str(exc)[:300])  # and nothing goes to the cloud
            return
        for name, lease in leases.items():
            if name in self._budgets:
                self._leases[name] = _joined(self._leases.get(name, budget.NOTHING), lease)
            if lease.requests_left == 0 or lease.bytes_left == 0:
                self._again_at[name] = time.monotonic() + SPENT_FOR_S


def _joined(held: Lease, more: Lease) -> Lease:
    """Both together, where they are of one hour; else the later."""
    if held.hour != more.hour:
        return max(held, more, key=lambda lease: lease.hour)
    return Lease(
        more.hour,
        None if more.requests_left is None else (held.requests_left or 0) + more.requests_left,
        None if more.bytes_left is None else (held.bytes_left or 0) + more.bytes_left,
    )


def _hour() -> int:
    return int(time.time() // 3600)


def _leased(file: Path, budgets: dict[str, CloudBudget], wanted: dict[str, int]) -> dict[str, Lease]:
    """Take leases from the account on disk. Blocks. Raises OSError and codec.Malformed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file.with_name(f"{file.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            accounts = codec.decode(file.read_bytes(), dict[str, Account], max_bytes=MAX_FILE_BYTES)
        except FileNotFoundError:
            accounts = {}
        leases = {}
        for name, one in budgets.items():
            accounts[name], leases[name] = budget.lease(
                accounts.get(name, Account()), one, now_hour=_hour(), want_requests=1, want_bytes=wanted[name]
            )
        durable.write(file, codec.encode(accounts))
        return leases
    finally:
        os.close(descriptor)
