"""Frames of skerry.wire.ipc on a Unix socket, for whatever answers the gateway from inside a sandbox."""

import socket
import struct
from pathlib import Path

import msgspec

from skerry.wire import ipc, oip

MAX_CONNECTIONS = 64
RECEIVE_BYTES = 64 * 1024
_MOST_PARTS = 512
"""The kernel takes 1024 in one call (IOV_MAX)."""
_DESCRIPTOR = struct.Struct("=i")


class BodyTooLarge(ValueError):
    """A frame whose body is more than this end takes; ``header`` is the frame's."""

    def __init__(self, header: bytes, message: str) -> None:
        super().__init__(message)
        self.header = header


class Reader:
    """Frames from one connection. Small ones come together with one system call; the buffer is used again for the next ones."""

    def __init__(self, connection: socket.socket, *, most_body_bytes: int = ipc.MAX_BODY_BYTES) -> None:
        self._connection = connection
        self._most_body_bytes = most_body_bytes
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._filled = 0
        self._taken = 0
        self.descriptors: list[int] = []
        """What came with the first bytes; whoever calls ``first`` closes them."""

    def first(self) -> tuple[memoryview, memoryview] | None:
        """As ``frame``, for the first frame alone, which descriptors may come with. The kernel drops those that come later."""
        self._filled, ancillary, _, _ = self._connection.recvmsg_into(
            [self._buffer], socket.CMSG_SPACE(_DESCRIPTOR.size), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = len(data) - len(data) % _DESCRIPTOR.size
                self.descriptors += [descriptor for (descriptor,) in _DESCRIPTOR.iter_unpack(data[:whole])]
        return self.frame() if self._filled else None

    def frame(self) -> tuple[memoryview, memoryview] | None:
        """Header and body, good until the next call; None where the peer closed.

        Raises codec.Malformed over the protocol's limits, and BodyTooLarge over ours: its body was passed over, and the next frame can be
        read.
        """
        if self._filled - self._taken < ipc.PREFIX.size:
            self._move_to_front()
            if not self._fill(ipc.PREFIX.size):
                return None
        header_at = self._taken + ipc.PREFIX.size
        header_bytes, body_bytes = ipc.parse_prefix(bytes(self._buffer[self._taken : header_at]))
        body_at = header_at + header_bytes
        end = body_at + body_bytes
        too_large = body_bytes > self._most_body_bytes
        if too_large or end > self._filled:
            moved = self._move_to_front()
            header_at, body_at, end = header_at - moved, body_at - moved, end - moved
            if not (self._pass_over(body_at, body_bytes) if too_large else self._fill(end)):
                return None
        self._taken = end
        return self._buffer[header_at:body_at], self._buffer[body_at:end]

    def _move_to_front(self) -> int:
        """Make room behind what has not been taken; returns by how much that moved."""
        moved = self._taken
        left = self._filled - moved
        if left and moved:
            self._buffer[:left] = bytes(self._buffer[moved : self._filled])
        self._filled, self._taken = left, 0
        return moved

    def _pass_over(self, body_at: int, body_bytes: int) -> bool:
        """Read a body and keep none of it. Raises BodyTooLarge at its end; false where the peer closed before."""
        if not self._fill(body_at):
            return False
        header = bytes(self._buffer[ipc.PREFIX.size : body_at])
        here = min(self._filled - body_at, body_bytes)
        left = body_bytes - here
        if left:
            self._filled = 0
        else:
            self._taken = body_at + here
        while left > 0:
            got = self._connection.recv_into(self._buffer[: min(left, len(self._buffer))])
            if got == 0:
                return False
            left -= got
        raise BodyTooLarge(header, f"a body of {body_bytes} bytes, at most {self._most_body_bytes} are taken")

    def _fill(self, size: int) -> bool:
        """Have ``size`` bytes in the buffer; false where the peer closed before."""
        if size > len(self._buffer):
            larger = memoryview(bytearray(size))
            larger[: self._filled] = self._buffer[: self._filled]
            self._buffer = larger
        while self._filled < size:
            got = self._connection.recv_into(self._buffer[self._filled :])
            if got == 0:
                return False
            self._filled += got
        return True


def send(connection: socket.socket, header: msgspec.Struct, body: list[oip.Bytes]) -> None:
    """A whole frame, with one system call where the kernel takes it all."""
    parts = ipc.frame(header, body)
    if len(parts) > _MOST_PARTS:
        parts = [b"".join(parts)]
    sent = connection.sendmsg(parts)
    for part in parts:
        if sent < len(part):
            connection.sendall(memoryview(part)[sent:])
        sent = max(0, sent - len(part))


def listen(path: Path) -> socket.socket:
    """A listening socket at ``path``, which appears when it can be connected to."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    staging = path.with_name(path.name + ".new")
    staging.unlink(missing_ok=True)
    listener.bind(str(staging))
    listener.listen(MAX_CONNECTIONS)
    staging.chmod(0o666)  # the directory above is what keeps strangers out: gateway and sandbox are different users
    staging.rename(path)
    return listener
