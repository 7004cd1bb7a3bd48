"""One connection to a worker: frames out, frames in, one call at a time. What comes from the sandbox is hostile until parsed."""

import asyncio
import socket
from pathlib import Path
from typing import cast

from skerry.wire import codec, ipc, oip

HELLO_TIMEOUT_S = 10.0
SEND_BUFFER_BYTES = 4 * 1024 * 1024
"""A whole image goes to the worker in one system call."""


class ReplicaLost(Exception):
    """The worker went away, or spoke nonsense, in the middle of a call; nothing is known of the call's fate."""


class WorkerConnection(asyncio.BufferedProtocol):
    """Reads each frame into a buffer of its own, made once its size is known, so that an answer is never copied."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._transport: asyncio.WriteTransport | None = None
        self._hello: asyncio.Future[ipc.Hello] = loop.create_future()
        self._answer: asyncio.Future[tuple[ipc.Answer, memoryview]] | None = None
        self._call = 0
        self.closed: asyncio.Future[None] = loop.create_future()
        self.retired = False
        self._sizes: tuple[int, int] | None = None
        self._buffer = memoryview(bytearray(ipc.PREFIX.size))
        self._filled = 0

    @classmethod
    async def open(cls, path: Path) -> tuple["WorkerConnection", ipc.Hello]:
        """Connect and hear what the worker serves. Raises ReplicaLost."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                _, connection = await loop.create_unix_connection(cls, str(path))
                return connection, await connection._hello
        except (OSError, TimeoutError) as exc:
            raise ReplicaLost(f"{path.parent.name}: {exc}") from exc

    async def call(self, inputs: list[oip.Tensor], outputs: list[str]) -> tuple[ipc.Answer, list[oip.Tensor]]:
        """One inference. Raises ReplicaLost. Cancelling the caller leaves the connection busy until the answer came."""
        if self._transport is None or self._transport.is_closing() or self._answer is not None:
            raise ReplicaLost("the connection is not free")
        self._call += 1
        answer = self._answer = asyncio.get_running_loop().create_future()
        self._transport.writelines(ipc.frame(ipc.Call(self._call, ipc.heads_of(inputs), outputs), [tensor.data for tensor in inputs]))
        head, body = await answer
        try:
            return head, ipc.tensors_of(head.outputs, body)
        except codec.Malformed as exc:
            self.close()
            raise ReplicaLost(str(exc)) from exc

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
        lost = ReplicaLost(f"the worker closed the connection{f': {exc}' if exc else ''}")
        for future in (self._hello, self._answer):
            if future is not None and not future.done():
                future.set_exception(lost)
                future.exception()  # nobody may be waiting any more
        if not self.closed.done():
            self.closed.set_result(None)

    def get_buffer(self, _sizehint: int) -> memoryview:
        """See asyncio."""
        return self._buffer[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """See asyncio."""
        self._filled += nbytes
        if self._filled < len(self._buffer):
            return
        try:
            if self._sizes is None:
                self._sizes = ipc.parse_prefix(bytes(self._buffer))
                self._buffer, self._filled = memoryview(bytearray(sum(self._sizes))), 0
                if self._sizes != (0, 0):
                    return
            header_bytes, _ = self._sizes
            self._deliver(self._buffer[:header_bytes], self._buffer[header_bytes:])
            self._begin_prefix()
        except codec.Malformed as exc:
            self._fail(ReplicaLost(f"the worker speaks nonsense: {exc}"))

    def _begin_prefix(self) -> None:
        self._buffer, self._filled = memoryview(bytearray(ipc.PREFIX.size)), 0
        self._sizes = None

    def _deliver(self, header: memoryview, body: memoryview) -> None:
        if not self._hello.done():
            self._hello.set_result(ipc.parse_header(header, ipc.Hello))
            return
        answer = ipc.parse_header(header, ipc.Answer)
        waiting, self._answer = self._answer, None
        if waiting is None or answer.call != self._call:
            raise codec.Malformed(f"answer to call {answer.call}, which is not under way")
        if not waiting.done():
            waiting.set_result((answer, body))

    def _fail(self, exc: ReplicaLost) -> None:
        for future in (self._hello, self._answer):
            if future is not None and not future.done():
                future.set_exception(exc)
                future.exception()
        self.close()
