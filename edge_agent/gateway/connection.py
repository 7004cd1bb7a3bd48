"""One connection to a worker: batches out, answers in, several under way. What comes from the sandbox is hostile until parsed.

A plain socket rather than a transport: a batch is on its way when ``send`` returns, and the memory that both map travels along.
"""

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable
from pathlib import Path

from edge_agent.gateway.arena import Arena
from skerry.runtime import unix_socket
from skerry.wire import codec, ipc
from skerry.wire.oip import Bytes

HELLO_TIMEOUT_S = 10.0
SEND_BUFFER_BYTES = 4 * 1024 * 1024
"""Tensors that do not lie in shared memory go to the worker in as few system calls as the kernel's own limit allows."""
SMALL_BYTES = 64 * 1024
"""Frames up to this size arrive with one system call; a larger one gets a buffer of its own."""
ROOM_AT_ONCE_BYTES = 4 * 1024 * 1024
"""Room that a frame gets because it says that it needs it; for more, as much has to have come first."""
MAX_ANSWERS_BYTES = 256 * 1024 * 1024
"""Largest frame that answers a batch."""
MAX_HELLO_BYTES = 1024 * 1024
MOST_PARTS = 512
"""Buffers in one system call; the kernel takes 1024."""

OnAnswers = Callable[[list[ipc.Answer], memoryview], None]
OnLost = Callable[["ReplicaLost"], None]


class ReplicaLost(Exception):
    """The worker went away, or spoke nonsense, in the middle of a call; nothing is known of the call's fate."""


class WorkerConnection:
    """Speaks skerry.wire.ipc. ``closed`` is done once the connection is lost."""

    def __init__(self, raw: socket.socket) -> None:
        self._raw = raw
        self._loop = asyncio.get_running_loop()
        self._hello: asyncio.Future[ipc.Hello] = self._loop.create_future()
        self._under_way: deque[tuple[list[ipc.Call], OnAnswers, OnLost]] = deque()
        self._unsent: list[memoryview] = []
        self._small = memoryview(bytearray(SMALL_BYTES))
        self._buffer = self._small
        self._filled = 0
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self.arena: Arena | None = None

    @classmethod
    async def open(cls, path: Path, *, arena_bytes: int) -> tuple["WorkerConnection", ipc.Hello]:
        """Connect, hear what the worker serves, and share memory with it if it will. Raises ReplicaLost."""
        raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        connection = cls(raw)
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                with unix_socket.pinned(path) as socket_path:
                    await connection._loop.sock_connect(raw, socket_path)
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
                connection._loop.add_reader(raw, connection._readable)
                hello = await asyncio.shield(connection._hello)
            if hello.shares_memory and arena_bytes:
                connection._attach(arena_bytes)
        except (OSError, TimeoutError) as exc:
            connection.close()
            raise ReplicaLost(f"{path.parent.parent.name}: {exc or type(exc).__name__}") from exc
        except BaseException:
            connection.close()
            raise
        return connection, hello

    def _attach(self, size_bytes: int) -> None:
        """Pass on a descriptor of new shared memory. Raises OSError."""
        arena = Arena(size_bytes)
        try:
            socket.send_fds(self._raw, ipc.frame(ipc.Attach(size_bytes), []), [arena.descriptor])
        finally:
            arena.close_descriptor()
        self.arena = arena

    def send(
        self, calls: list[ipc.Call], body: list[Bytes], on_answers: OnAnswers, on_lost: OnLost, *, forget: list[int] | None = None
    ) -> None:
        """Begin a batch; exactly one of the two is called when it is over, unless this raises ReplicaLost."""
        if self.closed.done():
            raise ReplicaLost("the connection is closed")
        self._under_way.append((calls, on_answers, on_lost))
        parts = [memoryview(part).cast("B") for part in ipc.frame(ipc.Batch(calls, forget or []), body) if len(part)]
        if self._unsent:
            self._unsent += parts
            return
        self._unsent = parts
        self._writable()

    def forget(self, call: int) -> None:
        """Have the worker drop what a step of a sequence left, once it has been done; a connection that is lost has nothing to say."""
        with contextlib.suppress(ReplicaLost):
            self.send([], [], lambda *_: None, lambda _: None, forget=[call])

    def _writable(self) -> None:
        """Send what the socket takes; the rest when it takes more."""
        parts = self._unsent
        try:
            while parts:
                sent = self._raw.sendmsg(parts[:MOST_PARTS])
                done = 0
                while done < len(parts) and sent >= len(parts[done]):
                    sent -= len(parts[done])
                    done += 1
                del parts[:done]
                if parts and sent:
                    parts[0] = parts[0][sent:]
        except BlockingIOError:
            self._loop.add_writer(self._raw, self._writable)
            return
        except OSError as exc:
            self._loop.call_soon(self._lose, f"the worker closed the connection: {exc}")  # not in the middle of ``send``
            return
        self._loop.remove_writer(self._raw)

    def close(self) -> None:
        """End the connection; what is under way fails."""
        self._lose("the connection was closed")

    def _lose(self, reason: str) -> None:
        if self.closed.done():
            return
        self.closed.set_result(None)  # first: whoever hears of the failure must see that the connection is gone
        with contextlib.suppress(OSError, ValueError):
            self._loop.remove_reader(self._raw)
            self._loop.remove_writer(self._raw)
        self._raw.close()
        self._unsent.clear()
        lost = ReplicaLost(reason)
        if not self._hello.done():
            self._hello.set_exception(lost)
            self._hello.exception()  # nobody may be waiting any more
        while self._under_way:
            self._under_way.popleft()[2](lost)

    def _readable(self) -> None:
        try:
            count = self._raw.recv_into(self._buffer[self._filled :])
        except BlockingIOError:
            return
        except OSError as exc:
            self._lose(f"the worker closed the connection: {exc}")
            return
        if count == 0:
            self._lose("the worker closed the connection")
            return
        self._filled += count
        try:
            self._frames()
        except codec.Malformed as exc:
            self._lose(f"the worker speaks nonsense: {exc}")

    def _frames(self) -> None:
        """Deliver every frame that is whole. Raises codec.Malformed."""
        while self._filled >= ipc.PREFIX.size and not self.closed.done():
            header_bytes, body_bytes = ipc.parse_prefix(self._buffer[: ipc.PREFIX.size])
            body_at = ipc.PREFIX.size + header_bytes
            end = body_at + body_bytes
            self._check_expected(end)
            if self._filled < end:
                self._make_room(end)
                return
            header = self._buffer[ipc.PREFIX.size : body_at]
            if self._buffer is self._small:  # used again for the next frame
                body = memoryview(bytes(self._small[body_at:end]))
                self._deliver(header, body)
                left = self._filled - end
                if left:
                    self._small[:left] = bytes(self._small[end : self._filled])
                self._filled = left
            else:
                body = self._buffer[body_at:end]
                self._buffer, self._filled = self._small, 0
                self._deliver(header, body)

    def _check_expected(self, frame_bytes: int) -> None:
        """A worker may speak when it was asked, and once at the start; how much is bounded by that. Raises codec.Malformed."""
        if not self._hello.done():
            most = MAX_HELLO_BYTES
        elif self._under_way:
            most = MAX_ANSWERS_BYTES
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

    def _deliver(self, header: memoryview, body: memoryview) -> None:
        if not self._hello.done():
            self._hello.set_result(ipc.parse_header(header, ipc.Hello))
            return
        answers = ipc.parse_header(header, ipc.Answers).answers
        calls, on_answers, _ = self._under_way[0]
        if [answer.call for answer in answers] != [call.call for call in calls]:
            raise codec.Malformed(f"answers to {[answer.call for answer in answers][:8]}, asked was {[call.call for call in calls][:8]}")
        # Whatever the answers hold: should reading them show that the worker lies, then on_lost must not be called as well.
        self._under_way.popleft()
        on_answers(answers, body)
