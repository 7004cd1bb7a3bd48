"""Memory that this gateway shares with one worker: a sealed file without a name, and who holds which part of it.

The worker is hostile. It can write anywhere in this memory at any time, and nothing else: the file is sealed (memfd_create(2)) before it
is passed on, so that it can be made neither shorter, which would kill whoever reads it (SIGBUS), nor longer.
"""

import ctypes
import fcntl
import mmap
import os

from skerry.wire.oip import Bytes

ALIGN_BYTES = 64
"""Of every part: a cache line, and what vector instructions like best."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def _address_of(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


class Region:
    """A part of an arena, from ``at`` on. It is given back when all that hold it, at first one, have let go of it."""

    __slots__ = ("_holds", "_span", "arena", "at", "view")

    def __init__(self, arena: "Arena", start: int, end: int, at: int, size_bytes: int) -> None:
        self.arena = arena
        self.at = at
        self.view = arena.view[at : at + size_bytes]
        self._span = (start, end)
        self._holds = 1

    def hold(self) -> "Region":
        """One more needs it: each call under way that names it, and whoever reads or writes it here."""
        self._holds += 1
        return self

    def release(self) -> None:
        """One less needs it."""
        self._holds -= 1
        if self._holds == 0:
            self.arena.give_back(*self._span)


class Arena:
    """``size_bytes`` of shared memory; pages that were never used cost nothing."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.descriptor = os.memfd_create("skerry-tensors", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, size_bytes)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self.descriptor, size_bytes)
        except BaseException:
            os.close(self.descriptor)
            raise
        self.view = memoryview(self._map)
        self._base = _address_of(self.view)
        self._free = [(0, size_bytes)]
        """What nobody holds, in order. The lowest is given out first: its pages have been used before."""

    def take(self, size_bytes: int, *, lead_bytes: int = 0) -> Region | None:
        """A part of that size, or None where there is none. What comes ``lead_bytes`` after its beginning is aligned."""
        before = -lead_bytes % ALIGN_BYTES
        wanted = -(-(before + size_bytes) // ALIGN_BYTES) * ALIGN_BYTES
        for index, (start, end) in enumerate(self._free):
            if end - start >= wanted:
                if end - start == wanted:
                    del self._free[index]
                else:
                    self._free[index] = (start + wanted, end)
                return Region(self, start, start + wanted, start + before, size_bytes)
        return None

    def offset_of(self, data: Bytes) -> int:
        """Where in this arena ``data`` lies; negative where it lies elsewhere."""
        if not isinstance(data, memoryview) or data.readonly or not len(data):
            return -1
        at = _address_of(data) - self._base
        return at if 0 <= at <= self.size_bytes - len(data) else -1

    def give_back(self, start: int, end: int) -> None:
        """For Region: the part is free again, and one with its free neighbours."""
        index = 0
        while index < len(self._free) and self._free[index][0] < start:
            index += 1
        if index < len(self._free) and self._free[index][0] == end:
            end = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == start:
            start = self._free.pop(index - 1)[0]
            index -= 1
        self._free.insert(index, (start, end))

    @property
    def held_bytes(self) -> int:
        """What is given out."""
        return self.size_bytes - sum(end - start for start, end in self._free)

    def close_descriptor(self) -> None:
        """The worker has it; from here on the mapping is enough. It goes with the last that holds a part."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
