"""One connection to a worker: frames out, frames in, one call at a time. What comes from the sandbox is hostile until parsed."""

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import cast

from skerry.runtime import unix_socket
from skerry.wire import codec, ipc, oip

HELLO_TIMEOUT_S = 10.0
SEND_BUFFER_BYTES = 4 * 1024 * 1024
"""A whole image goes to the worker in as few system calls as the kernel's own limit allows."""
RECEIVE_BYTES = 64 * 1024
"""Frames up to this size arrive with one system call; a larger one gets a buffer of its own."""
ROOM_AT_ONCE_BYTES = 4 * 1024 * 1024
"""Room that a frame gets because it says that it needs it; for more, as much has to have come first."""
MAX_ANSWER_BYTES = 256 * 1024 * 1024
"""Largest frame that answers a call."""
MAX_HELLO_BYTES = 1024 * 1024


class ReplicaLost(Exception):
    """The worker went away, or spoke nonsense, in the middle of a call; nothing is known of the call's fate."""


class WorkerConnection(asyncio.BufferedProtocol):
    """Speaks skerry.wire.ipc. ``closed`` is done once the connection is lost; ``retired`` ones take no further call."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._transport: asyncio.WriteTransport | None = None
        self._hello: asyncio.Future[ipc.Hello] = loop.create_future()
        self._answer: asyncio.Future[tuple[ipc.Answer, memoryview]] | None = None
        self._on_free: Callable[[], None] | None = None
        self._call = 0
        self.closed: asyncio.Future[None] = loop.create_future()
        self.retired = False
        self._small = memoryview(bytearray(RECEIVE_BYTES))
        self._buffer = self._small
        self._filled = 0

    @classmethod
    async def open(cls, path: Path) -> tuple["WorkerConnection", ipc.Hello]:
        """Connect and hear what the worker serves. Raises ReplicaLost."""
        loop = asyncio.get_running_loop()
        connection: WorkerConnection | None = None
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                with unix_socket.pinned(path) as socket_path:
                    _, connection = await loop.create_unix_connection(cls, socket_path)
                return connection, await asyncio.shield(connection._hello)
        except (OSError, TimeoutError) as exc:
            raise ReplicaLost(f"{path.parent.parent.name}: {exc or type(exc).__name__}") from exc
        finally:
            if connection is not None and not (connection._hello.done() and connection._hello.exception() is None):
                connection.close()

    def call(
        self, inputs: list[oip.Tensor], outputs: list[str], on_free: Callable[[], None]
    ) -> "asyncio.Future[tuple[ipc.Answer, memoryview]]":
        """Begin one inference. Raises ReplicaLost, at once or through the future.

        ``on_free`` is called once the worker is done with it, or gone, even where the future was cancelled in between.
        """
        if self._transport is None or self._transport.is_closing() or self._answer is not None:
            raise ReplicaLost("the connection is not free")
        self._call += 1
        self._answer = asyncio.get_running_loop().create_future()
        self._on_free = on_free
        self._transport.writelines(ipc.frame(ipc.Call(self._call, ipc.heads_of(inputs), outputs), [tensor.data for tensor in inputs]))
        return self._answer

    def give_up(self, call: "asyncio.Future[tuple[ipc.Answer, memoryview]]") -> None:
        """End the connection if that call is still not answered."""
        if self._answer is call:
            self.close()

    def close(self) -> None:
        """End the connection; a call under way fails."""
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's are not of asyncio's class
        raw = transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        if not self.closed.done():
            self.closed.set_result(None)  # first: a slot that is freed by the failure must be seen to be gone
        self._fail(ReplicaLost(f"the worker closed the connection{f': {exc}' if exc else ''}"))

    def get_buffer(self, _sizehint: int) -> memoryview:
        """See asyncio."""
        return self._buffer[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """See asyncio."""
        self._filled += nbytes
        try:
            while self._filled >= ipc.PREFIX.size:
                header_bytes, body_bytes = ipc.parse_prefix(bytes(self._buffer[: ipc.PREFIX.size]))
                body_at = ipc.PREFIX.size + header_bytes
                end = body_at + body_bytes
                self._check_expected(end)
                if self._filled < end:
                    self._make_room(end)
                    return
                frame = self._take(end)
                self._deliver(frame[ipc.PREFIX.size : body_at], frame[body_at:])
        except codec.Malformed as exc:
            self.retired = True
            self._fail(ReplicaLost(f"the worker speaks nonsense: {exc}"))
            self.close()

    def _check_expected(self, frame_bytes: int) -> None:
        """A worker may speak when it was asked, and once at the start; how much is bounded by that. Raises codec.Malformed."""
        if not self._hello.done():
            most = MAX_HELLO_BYTES
        elif self._answer is not None:
            most = MAX_ANSWER_BYTES
        else:
            raise codec.Malformed("a frame that nobody asked for")
        if frame_bytes > most:
            raise codec.Malformed(f"frame of {frame_bytes} bytes, over {most}")

    def _make_room(self, frame_bytes: int) -> None:
        """Go on in a buffer that holds the frame and nothing more, so that it can be handed out uncopied; a large one grows as it comes."""
        if frame_bytes <= len(self._buffer) or (self._filled < len(self._buffer) and self._buffer is not self._small):
            return
        larger = memoryview(bytearray(min(frame_bytes, max(ROOM_AT_ONCE_BYTES, 2 * len(self._buffer)))))
        larger[: self._filled] = self._buffer[: self._filled]
        self._buffer = larger

    def _take(self, end: int) -> memoryview:
        """The first frame; what follows it moves to the front."""
        if self._buffer is not self._small:
            frame, self._buffer, self._filled = self._buffer, self._small, 0
            return frame
        frame = memoryview(bytes(self._small[:end]))
        self._small[: self._filled - end] = bytes(self._small[end : self._filled])
        self._filled -= end
        return frame

    def _deliver(self, header: memoryview, body: memoryview) -> None:
        if not self._hello.done():
            self._hello.set_result(ipc.parse_header(header, ipc.Hello))
            return
        answer = ipc.parse_header(header, ipc.Answer)
        waiting = self._answer
        if waiting is None or answer.call != self._call:
            raise codec.Malformed(f"answer to call {answer.call}, which is not under way")
        self._answer = None
        if not waiting.done():
            waiting.set_result((answer, body))
        self._free()

    def _free(self) -> None:
        on_free, self._on_free = self._on_free, None
        if on_free is not None:
            on_free()

    def _fail(self, exc: ReplicaLost) -> None:
        for future in (self._hello, self._answer):
            if future is not None and not future.done():
                future.set_exception(exc)
                future.exception()  # nobody may be waiting any more
        self._free()
