"""HTTP/1.1 on one connection: heads by llhttp (httptools), bodies straight into the memory where the tensors are wanted.

It knows nothing of inference. What callers send is hostile: heads, bodies, their number and the time that they take are bounded, and
whatever breaks the protocol is answered once and closed. Source: RFC 9112.
"""

import asyncio
import select
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import cast

import httptools
import msgspec

from edge_agent.gateway.http_message import Application, Head, Memory, Peer, PrivateMemory, Response, peer_of
from skerry.runtime import refusals
from skerry.wire.oip import Bytes

SMALL_BYTES = 64 * 1024
"""Heads and small bodies arrive in a buffer of this size; a head that does not fit is refused."""
MAX_HEADERS = 100
DRAIN_BYTES = 8 * 1024 * 1024
"""The rest of a body that nobody wants is read up to this size, so that the connection can go on; for more it is closed."""

_HEAD_ENDS = b"\r\n\r\n"
_ENDLESS = 2**62
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_CHUNKED = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
_ONCE = frozenset([b"host", b"transfer-encoding", b"content-length"])
"""Two programs that take different ones of two such headers for the true one can be played off against each other."""


class Limits(msgspec.Struct, frozen=True):
    """How long callers may take."""

    head_within_s: float = 10.0
    progress_within_s: float = 20.0
    """Without a byte of a body, or of an answer taken."""
    slowest_bytes_per_s: int = 16 * 1024
    """Of bodies and answers, after ``progress_within_s``."""
    idle_for_s: float = 75.0
    linger_s: float = 2.0
    """For so long a caller that is being hung up on may go on sending before it is cut off."""
    sweep_s: float = 1.0


LIMITS = Limits()


class Server:
    """All connections of one application, and the bounds on them together."""

    def __init__(
        self, application: Application, *, body_limit_bytes: int, memory_limit_bytes: int, connection_limit: int, limits: Limits = LIMITS
    ) -> None:
        self.application = application
        self.body_limit_bytes = body_limit_bytes
        self.memory_limit_bytes = memory_limit_bytes
        self.connection_limit = connection_limit
        self.limits = limits
        self.connections: set[Connection] = set()
        self.body_bytes = 0
        """Bodies of requests that are not over: as announced, or as far as they have come in chunks."""
        self.is_stopping = False

    def connection(self) -> "Connection":
        """For asyncio's servers."""
        return Connection(self)

    async def sweep(self, stop: asyncio.Event) -> None:
        """Close connections on which nothing moves, until ``stop``."""
        while not stop.is_set():
            now = time.perf_counter()
            for connection in list(self.connections):
                connection.close_if_stalled(now)
            try:
                async with asyncio.timeout(self.limits.sweep_s):
                    await stop.wait()
            except TimeoutError:
                pass

    async def drain(self, within_s: float) -> None:
        """Let requests under way end, for so long; then close everything."""
        self.is_stopping = True
        for connection in list(self.connections):
            connection.close_if_idle()
        until = time.perf_counter() + within_s
        while self.connections and time.perf_counter() < until:
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.abort()


class _Refused(Exception):
    """What the head says can't be done, or can't be understood."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Chunks:
    """A body in chunks. Its parser is its own: trailers are not headers, and what follows the body is not read."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.is_complete = False
        self.seen = 0
        """So many bytes in front of the buffer were read before."""
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(_CHUNKED)

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        self.body += body

    def on_message_complete(self) -> None:
        """See httptools."""
        self.is_complete = True

    def feed(self, raw: bytearray, small: memoryview, filled: int) -> int:
        """How many bytes are done with. Raises HttpParserError."""
        begin = self.seen
        while begin < filled and not self.is_complete:
            at = raw.find(_HEAD_ENDS, max(0, begin - 3), filled)  # a body ends so too: the parser never gets more than may be its own
            end = at + 4 if at >= 0 else filled
            self._parser.feed_data(small[begin:end])
            begin = end
        self.seen = 0 if self.is_complete else min(3, begin)
        return begin - self.seen


def _size_of(headers: dict[str, str], *, is_old: bool) -> int:
    """Of the body that follows such a head; -1 if it comes in chunks. Raises _Refused."""
    if "host" not in headers and not is_old:
        raise _Refused(400, "host: missing")
    length = headers.get("content-length")
    coding = headers.get("transfer-encoding")
    if coding is not None:
        if coding.lower() != "chunked" or is_old or length is not None:
            raise _Refused(400, "transfer-encoding: only 'chunked' is understood, in HTTP/1.1, without a content-length")
        return -1
    if length is None:
        return 0
    if not (length.isascii() and length.isdigit() and len(length) < 16):
        raise _Refused(400, f"content-length: {length[:40]!r} is not a number of bytes")
    return int(length)


class Connection(asyncio.BufferedProtocol):
    """One caller. Requests are answered in the order in which they came; the next is read when the answer before it has been taken."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._peer = Peer("", 0, 0, is_local=False)
        self._raw = bytearray(SMALL_BYTES)
        self._small = memoryview(self._raw)
        self._filled = 0
        self._searched = 0
        """No head ends before it."""
        self._head: Head | None = None
        """Of the request under way, from the end of its head until it is answered."""
        self._memory: Memory | None = None
        self._target: memoryview | None = None
        """Where the rest of a body of known size goes."""
        self._chunks: _Chunks | None = None
        self._received = 0
        self._counted = 0
        """Bytes of this request in the server's ``body_bytes``."""
        self._drop = 0
        """Bytes of a body that nobody wants; _ENDLESS of a caller that is being hung up on."""
        self._after_small = 0
        """So many bytes in front of the buffer belong to the request that is being answered."""
        self._task: asyncio.Task[None] | None = None
        self._keep_alive = True
        self._is_old = False
        """The request under way is of HTTP/1.0."""
        self._is_paused = False
        self._is_eof = False
        self._held: list[Callable[[], None]] = []
        """What is called once all that was written has gone."""
        self._head_since = self._body_since = self._moved_at = self._taken_by = time.perf_counter()
        """``_taken_by``: when the slowest caller has what was written; parts of it lie where asyncio does not tell of them."""
        self._parser: httptools.HttpRequestParser | None = None
        self._url = b""
        self._headers: dict[str, str] = {}

    # -- asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not of asyncio's class
        self._transport.set_write_buffer_limits(high=0)  # so that we hear when all was written
        self._peer = peer_of(self._transport)
        connections, limit = self._server.connections, self._server.connection_limit
        connections.add(self)
        if len(connections) > 2 * limit:  # even those that are being told so are too many
            self.abort()
        elif len(connections) > limit:
            self._give_up(503, f"more than {limit} connections")

    def connection_lost(self, _exc: Exception | None) -> None:
        """See asyncio."""
        self._server.connections.discard(self)
        self._transport = None
        if self._task is not None:
            self._task.cancel()
        self._end_request()
        self._release_held()

    def eof_received(self) -> bool:
        """A caller that only closed its own half may still want its answers; over TLS there are no halves."""
        self._is_eof = True
        transport = self._transport
        if transport is None or not transport.can_write_eof() or self._target is not None or self._drop:
            return False
        if self._peer.uid is not None and _is_gone(transport):
            return False
        asyncio.get_running_loop().call_soon(self._go_on)
        return True

    def pause_writing(self) -> None:
        """See asyncio."""

    def resume_writing(self) -> None:
        """See asyncio."""
        self._taken_by = max(self._taken_by, time.perf_counter())
        self._release_held()
        if self._head is None and not self._drop:
            self._next()

    def get_buffer(self, _sizehint: int) -> memoryview:
        """See asyncio."""
        if self._target is not None:
            return self._target[self._received :]
        return self._small[: min(self._drop, SMALL_BYTES)] if self._drop else self._small[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """See asyncio."""
        self._moved_at = time.perf_counter()
        if self._target is not None:
            self._received += nbytes
            if self._received == len(self._target):
                target, self._target = self._target, None
                self._answer(target)
        elif self._drop:
            self._drop -= nbytes if self._drop < _ENDLESS else 0
            if not self._drop:
                self._next()
        else:
            if not self._filled:
                self._head_since = self._moved_at
            self._filled += nbytes
            self._go_on()

    # -- what llhttp tells of a head

    def on_url(self, url: bytes) -> None:
        """See httptools."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """See httptools."""
        name = name.lower()
        if name in _ONCE and name.decode() in self._headers:
            raise _Refused(400, f"{name.decode()}: there are several")
        self._headers[name.decode("latin-1")] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """See httptools."""
        assert self._parser is not None  # noqa: S101 - for the type checker
        self._keep_alive = self._parser.should_keep_alive() and not self._server.is_stopping  # it forgets it after this

    # -- reading

    def _go_on(self) -> None:
        """Whatever can be done with what lies in the small buffer."""
        transport, before = self._transport, self._filled
        if transport is None or self._drop or transport.is_closing():
            return
        if self._chunks is not None:
            self._more_chunks()
        elif self._head is None:
            if transport.get_write_buffer_size():
                self._pause_if_full(transport)
                return  # resume_writing goes on: answers that nobody takes don't pile up
            if before:
                self._read_head()
        self._pause_if_full(transport)
        if self._is_eof and self._task is None and self._filled == before:
            transport.close()  # what is missing will not come

    def _pause_if_full(self, transport: asyncio.Transport) -> None:
        is_full = self._filled == SMALL_BYTES
        if is_full != self._is_paused:
            self._is_paused = is_full
            (transport.pause_reading if is_full else transport.resume_reading)()

    def _read_head(self) -> None:
        """Begin the next request if its head is here."""
        if self._raw[0] in b"\r\n":  # empty lines before a head are skipped
            self._shift(self._filled - len(self._raw[: self._filled].lstrip(b"\r\n")))
        at = self._raw.find(_HEAD_ENDS, self._searched, self._filled)
        if at >= 0:
            try:
                self._begin(at + 4)
            except _Refused as exc:
                self._give_up(exc.status, str(exc))
        elif self._filled == SMALL_BYTES:
            self._give_up(431, f"the head is longer than {SMALL_BYTES} bytes")
        else:
            self._searched = max(0, self._filled - 3)

    def _begin(self, head_bytes: int) -> None:
        """A whole head lies in front. Raises _Refused."""
        raw = self._raw
        if raw.count(b"\r\n", 0, head_bytes) > MAX_HEADERS + 2:
            raise _Refused(431, f"more than {MAX_HEADERS} headers")
        end = raw.find(b"\r\n")
        version = raw[end - 9 : end]
        self._is_old = version == b" HTTP/1.0"
        if version != b" HTTP/1.1" and not self._is_old:
            raise _Refused(505 if b" HTTP/" in version else 400, "not HTTP/1.1")
        parser = self._parser = httptools.HttpRequestParser(self)
        self._url, self._headers = b"", {}
        try:
            parser.feed_data(self._small[:head_bytes])
        except httptools.HttpParserUpgrade:
            pass  # we offer nothing to upgrade to, and go on as if it had not been asked for
        except httptools.HttpParserError as exc:
            if isinstance(exc.__context__, _Refused):
                raise exc.__context__ from None
            raise _Refused(400, f"not HTTP/1.1: {exc}") from exc
        size = _size_of(self._headers, is_old=self._is_old)
        method = parser.get_method().decode("latin-1")
        self._head = head = Head(method, self._url, self._headers, size, self._head_since, self._peer)
        self._begin_body(head, head_bytes)

    def _begin_body(self, head: Head, head_bytes: int) -> None:
        size, server = head.size_bytes, self._server
        if size > server.body_limit_bytes:
            place: Memory | Response | None = server.application.refusal(
                413, f"body: {size} bytes, at most {server.body_limit_bytes} are taken"
            )
        elif size > 0 and server.body_bytes + size > server.memory_limit_bytes:
            place = server.application.refusal(503, "too many bodies are under way here")
        else:
            place = server.application.begin(head)
        here = self._filled - head_bytes
        is_waiting = here < abs(size) and not self._is_old and head.headers.get("expect", "").lower() == "100-continue"
        if isinstance(place, Response):
            self._shift(head_bytes)
            self._keep_alive = self._keep_alive and not is_waiting  # who knows whether the body comes now
            self._respond(place, unread=size)
            return
        if is_waiting:
            self._write([_CONTINUE])
        self._body_since, self._received = self._moved_at, 0
        self._memory = place
        if size < 0:
            self._chunks = _Chunks()
            self._shift(head_bytes)
            self._more_chunks()
            return
        server.body_bytes += size
        self._counted = size
        if place is None and here >= size:  # a small body is used where it lies
            self._after_small = head_bytes + size
            self._answer(self._small[head_bytes : head_bytes + size])
            return
        if place is None:
            place = self._memory = PrivateMemory(size)
        self._received = first = min(here, size)
        place.view[:first] = self._small[head_bytes : head_bytes + first]
        self._shift(head_bytes + first)
        if first == size:
            self._answer(place.view[:size])
        else:
            self._target = place.view[:size]

    def _more_chunks(self) -> None:
        chunks, server = self._chunks, self._server
        assert chunks is not None  # noqa: S101 - for the type checker
        try:
            self._shift(chunks.feed(self._raw, self._small, self._filled))
        except httptools.HttpParserError as exc:
            self._give_up(400, f"body: {exc}")
            return
        self._received = len(chunks.body)
        server.body_bytes += self._received - self._counted
        self._counted = self._received
        if self._received > server.body_limit_bytes:
            self._give_up(413, f"body: more than {server.body_limit_bytes} bytes")
        elif server.body_bytes > server.memory_limit_bytes:
            self._give_up(503, "too many bodies are under way here")
        elif chunks.is_complete:
            self._chunks = None
            self._answer(memoryview(chunks.body))

    def _shift(self, count: int) -> None:
        """What follows the first ``count`` bytes moves to the front."""
        left = self._filled - count
        if left and count:
            self._raw[:left] = self._small[count : self._filled]
        self._filled = left
        self._searched = 0

    # -- answering

    def _answer(self, body: memoryview) -> None:
        self._task = asyncio.get_running_loop().create_task(self._serve(body), name="gateway.request")

    async def _serve(self, body: memoryview) -> None:
        head, memory, self._memory = self._head, self._memory, None
        assert head is not None  # noqa: S101 - for the type checker
        try:
            response = await self._server.application.answer(head, body, memory)
            self._task = None
            if self._after_small:
                self._shift(self._after_small)
                self._after_small = 0
            self._respond(response, unread=0)
        except BaseException:  # cancelled, or a defect: either way nobody may be left waiting
            self._task = None
            self.abort()
            raise

    def _respond(self, response: Response, *, unread: int) -> None:
        """Write an answer; ``unread`` bytes of the request's body are still to come (or -1: nobody knows how many)."""
        head = self._head
        here = min(self._filled, max(0, unread))
        if unread < 0 or unread - here > DRAIN_BYTES:
            self._keep_alive = False
        length = sum(map(len, response.parts))
        text = _STATUS_LINES.get(response.status) or f"HTTP/1.1 {response.status} \r\n"
        text += "".join([f"{name}: {value}\r\n" for name, value in response.headers])
        if not self._keep_alive:
            text += "Connection: close\r\n"
        elif self._is_old:
            text += "Connection: keep-alive\r\n"
        text += f"Content-Length: {length}\r\n\r\n"
        parts = response.parts if head is None or head.method != "HEAD" else []
        self._taken_by = time.perf_counter() + length / self._server.limits.slowest_bytes_per_s
        self._write([text.encode("latin-1", "replace"), *parts], response.release)
        self._end_request()
        self._shift(here)
        if self._keep_alive:
            self._drop = unread - here
            if not self._drop:
                self._next()
        else:
            self._hang_up(is_read=not unread)

    def _next(self) -> None:
        if self._filled or self._is_paused or self._is_eof:
            self._head_since = time.perf_counter()
            asyncio.get_running_loop().call_soon(self._go_on)  # not at once: a caller could make us call ourselves thousands of times

    def _end_request(self) -> None:
        """The request is over, answered or not."""
        self._server.body_bytes -= self._counted
        self._counted = 0
        self._head = self._chunks = self._target = None
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.release()

    def _give_up(self, status: int, message: str) -> None:
        """Answer what can't be understood, and close: where the next request begins is not known."""
        self._keep_alive = False
        refusals.count("http.malformed", message)
        self._respond(self._server.application.refusal(status, message), unread=-1)

    def _write(self, parts: list[Bytes], release: Callable[[], None] | None = None) -> None:
        transport = self._transport
        if transport is not None and not transport.is_closing():
            transport.writelines(parts)
            if release is not None and transport.get_write_buffer_size():
                self._held.append(release)
                return
        if release is not None:
            release()

    def _release_held(self) -> None:
        held, self._held = self._held, []
        for release in held:
            release()

    # -- closing

    def _hang_up(self, *, is_read: bool) -> None:
        """Close when the caller has closed: done over what it still sends, that resets the connection, and it might never read why."""
        transport = self._transport
        if transport is None:
            return
        self._drop, self._filled = _ENDLESS, 0
        self._pause_if_full(transport)
        if self._is_eof or (is_read and not transport.can_write_eof()):
            transport.close()
        elif transport.can_write_eof():
            transport.write_eof()

    def abort(self) -> None:
        """End at once."""
        if self._transport is not None:
            self._transport.abort()

    def close_if_idle(self) -> None:
        """Close if no request is under way; else the one under way is the last."""
        self._keep_alive = False
        if self._head is None and not self._filled and not self._drop and self._transport is not None:
            self._transport.close()

    def close_if_stalled(self, now: float) -> None:
        """Close if the caller has not moved for as long as it may in what it does."""
        limits, transport = self._server.limits, self._transport
        if self._task is not None or transport is None:
            return  # it is our turn
        has_unsent = transport.get_write_buffer_size() > 0
        if has_unsent or self._drop == _ENDLESS or transport.is_closing():
            if now > self._taken_by + (limits.progress_within_s if has_unsent else limits.linger_s):
                self.abort()
        elif self._head is not None or self._drop:
            least = 0 if self._drop else limits.slowest_bytes_per_s * (now - self._body_since - limits.progress_within_s)
            if self._received < least or now - self._moved_at > limits.progress_within_s:
                self._give_up(408, "body: it comes too slowly")
        elif self._filled:
            if now - self._head_since > limits.head_within_s:
                self._give_up(408, f"the head did not come within {limits.head_within_s:g} s")
        elif now - max(self._moved_at, self._taken_by) > limits.idle_for_s:
            transport.close()


def _is_gone(transport: asyncio.Transport) -> bool:
    """Both halves are closed at the other end of a Unix socket; of a port nobody can tell."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), select.POLLHUP)
    return bool(poll.poll(0))
