"""Frames of skerry.wire.ipc on a Unix socket, for whatever answers the gateway from inside a sandbox."""

import socket
from pathlib import Path

import msgspec

from skerry.wire import ipc, oip

MAX_CONNECTIONS = 64
RECEIVE_BYTES = 64 * 1024


class BodyTooLarge(ValueError):
    """A frame whose body is more than this end takes; ``header`` is the frame's."""

    def __init__(self, header: bytes, message: str) -> None:
        super().__init__(message)
        self.header = header


class Reader:
    """Frames from one connection. Small ones come with one system call; the buffers are used again for the next frame."""

    def __init__(self, connection: socket.socket, *, most_body_bytes: int = ipc.MAX_BODY_BYTES) -> None:
        self._connection = connection
        self._most_body_bytes = most_body_bytes
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._filled = 0
        self._taken = 0

    def frame(self) -> tuple[memoryview, memoryview] | None:
        """Header and body, good until the next call; None where the peer closed.

        Raises codec.Malformed over the protocol's limits, and BodyTooLarge over ours: its body was passed over, and the next frame can be
        read.
        """
        left = self._filled - self._taken
        if left and self._taken:
            self._buffer[:left] = bytes(self._buffer[self._taken : self._filled])
        self._filled, self._taken = left, 0
        if not self._fill(ipc.PREFIX.size):
            return None
        header_bytes, body_bytes = ipc.parse_prefix(bytes(self._buffer[: ipc.PREFIX.size]))
        body_at = ipc.PREFIX.size + header_bytes
        end = body_at + body_bytes
        too_large = body_bytes > self._most_body_bytes
        if not (self._pass_over(body_at, body_bytes) if too_large else self._fill(end)):
            return None
        self._taken = end
        return self._buffer[ipc.PREFIX.size : body_at], self._buffer[body_at:end]

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
    parts = [memoryview(part).cast("B") for part in ipc.frame(header, body) if len(part)]
    while parts:
        sent = connection.sendmsg(parts)
        while parts and sent >= len(parts[0]):
            sent -= len(parts.pop(0))
        if parts and sent:
            parts[0] = parts[0][sent:]


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
