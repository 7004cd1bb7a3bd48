"""The memory that a gateway shares with the worker on one connection: a sealed file without a name, mapped here.

Who made it can write into it at any time, also while a model runs. What ONNX Runtime checks first and relies on later, such as indices,
is therefore copied out of it before a run (session.py); a number that changes while it is added up can only make a wrong sum.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
import stat
from pathlib import Path

from skerry.wire import codec, ipc

ALIGNMENT_BYTES = 64
"""Outputs begin at multiples of it: a line of the processor's cache, and the widest load that kernels use."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""Neither its size nor this can be changed any more."""


class CantMap(Exception):
    """The kernel does not map what it handed over: whoever asks again is told beforehand that memory is not shared here."""


class Memory:
    """What was attached. ``close`` gives it back to the kernel, at the latest with the last view of it."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped = mapped
        self.view = memoryview(mapped)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))

    def close(self) -> None:
        """Unmap it. What still looks into it keeps it until that is gone, too."""
        self.view.release()
        with contextlib.suppress(BufferError):
            self._mapped.close()


def attach(descriptor: int, size_bytes: int) -> Memory:
    """Map the whole of a sealed memory file; the descriptor stays the caller's. Raises codec.Malformed for what is none, and CantMap."""
    try:
        status = os.fstat(descriptor)
    except OSError as exc:
        raise codec.Malformed(f"attach: the descriptor says nothing of itself: {exc.strerror}") from exc
    if not stat.S_ISREG(status.st_mode):
        raise codec.Malformed("attach: the descriptor is not a memory file")
    if size_bytes <= 0 or status.st_size != size_bytes:
        raise codec.Malformed(f"attach: {size_bytes} bytes announced, the memory file has {status.st_size}")
    if not _is_sealed(descriptor):
        raise codec.Malformed("attach: the memory file is not sealed against shrinking, growing and further seals")
    try:
        return Memory(mmap.mmap(descriptor, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE))
    except PermissionError as exc:
        raise codec.Malformed(f"attach: the memory file can't be read and written: {exc.strerror}") from exc
    except (OSError, ValueError) as exc:
        raise CantMap(str(exc)) from exc


def _is_sealed(descriptor: int) -> bool:
    """gVisor's kernel hands over a file of the host and can't ask for its seals; there its maker's word must do.

    A maker that lies ends this worker by a signal, which it could do to itself alone: the sandbox is its own.
    """
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        with contextlib.suppress(OSError):
            return str(Path(f"/proc/self/fd/{descriptor}").readlink()).startswith("host:[")
        return False


class Room:
    """Where a call's outputs may be put: parts are handed out from its start on. Raises codec.Malformed unless it lies in the memory."""

    def __init__(self, memory: Memory | None, room: ipc.Room) -> None:
        if memory is None or room.at < 0 or not 0 <= room.size_bytes <= len(memory.view) - room.at:
            raise codec.Malformed(f"room: {room.size_bytes} bytes at {room.at} are not within the shared memory")
        self._memory = memory
        self._free = room.at
        self._end = room.at + room.size_bytes

    def part(self, size_bytes: int) -> int:
        """Where ``size_bytes`` may be put, which are taken then; -1 where they don't fit any more."""
        at = -(-self._free // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if size_bytes > self._end - at:
            return -1
        self._free = at + size_bytes
        return at

    def address(self, at: int) -> int:
        """The address, in this process, of a part."""
        return self._memory.address + at

    def put(self, at: int, data: memoryview) -> None:
        """Copy ``data`` into a part."""
        self._memory.view[at : at + len(data)] = data
