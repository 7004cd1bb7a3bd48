"""What all processes of this gateway have counted, as any of them can tell it: to the agent, to Prometheus, to Triton's statistics call."""

import asyncio
import time
from collections.abc import Mapping

import msgspec

from edge_agent.gateway import exposition
from edge_agent.gateway.ledger import Account, Ledger, merged_by_name
from edge_agent.gateway.processes import Place
from edge_agent.gateway.samples import MOST, Samples
from skerry.runtime import nvml
from skerry.wire import codec
from skerry.wire.box import Routed

SETTLED_MS = 1000
"""Samples of several processes are told in the order of their times, once no page can still bring an earlier one."""
_PLACES = 64


class Counted(msgspec.Struct):
    """A process's page on the board."""

    accounts: dict[str, Account] = {}
    routed: list[Routed] = []


class Books:
    """Reads what the others have put on the board, and puts there what this process has counted."""

    def __init__(self, place: Place, ledger: Ledger, samples: Samples) -> None:
        self._place = place
        self._ledger = ledger
        self._samples = samples
        self._gpus = nvml.gpus()

    def resume(self) -> None:
        """Go on counting from where the process ended that was in this place before."""
        before = self._place.board.read(self._place.number, Counted)
        for name, account in ({} if before is None else before.accounts).items():
            account.waiting = account.slots = 0
            self._ledger.accounts[name] = account

    def write(self) -> None:
        """Put what this process has counted where the others see it."""
        if self._place.is_shared:
            self._place.board.write(self._place.number, Counted(self._ledger.accounts, self._samples.latest()))

    def _pages(self) -> list[Counted]:
        own = Counted(self._ledger.accounts, self._samples.latest())
        if not self._place.is_shared:
            return [own]
        self.write()  # what was told once must not be forgotten with this process
        board = self._place.board
        pages = (own if number == self._place.number else board.read(number, Counted) for number in range(board.processes))
        return [page or Counted() for page in pages]

    def accounts(self) -> Mapping[str, Account]:
        """The sum, by deployment."""
        return merged_by_name(page.accounts for page in self._pages())

    async def page(self) -> bytes:
        """For Prometheus."""
        readings = await asyncio.to_thread(nvml.samples) if self._gpus else []
        return exposition.page(self.accounts(), gpus=self._gpus, readings=readings)

    def totals(self) -> bytes:
        """For the agent."""
        pages, since_ms = self._pages(), self._place.started_at_ms
        if self._place.is_shared:
            routed = in_order([page.routed for page in pages], since_ms=since_ms, until_ms=time.time_ns() // 1_000_000 - SETTLED_MS)
        else:
            routed = pages[0].routed
        accounts = merged_by_name(page.accounts for page in pages)
        return codec.encode(self._ledger.totals(accounts, started_at_ms=since_ms, routed=routed))


def in_order(pages: list[list[Routed]], *, since_ms: int, until_ms: int) -> list[Routed]:
    """The samples of several processes as if one had numbered them: by their times, those up to ``until_ms``.

    A number depends on its sample alone, so that it stays the same however often it is told.
    """
    found = [
        msgspec.structs.replace(one, seq=(max(0, one.at_ms - since_ms) * _PLACES + place) * MOST + one.seq % MOST + 1)
        for place, routed in enumerate(pages)
        for one in routed
        if one.at_ms <= until_ms
    ]
    return sorted(found, key=lambda one: one.seq)
