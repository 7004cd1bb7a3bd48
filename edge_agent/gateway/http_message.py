"""What an application says and hears of HTTP: who is at the other end, a request's head, where its body lies, a response."""

import asyncio
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Protocol
from urllib.parse import unquote

import msgspec

from skerry.wire.identity import Subject
from skerry.wire.oip import Bytes


class Memory(Protocol):
    """Where a body lies; given back when the request is over."""

    view: memoryview

    def release(self) -> None:
        """Nobody reads or writes it any more."""
        ...


class PrivateMemory:
    """A body in memory of this process alone."""

    def __init__(self, size_bytes: int) -> None:
        self.view = memoryview(bytearray(size_bytes))

    def release(self) -> None:
        """Nothing to do."""


class Peer(msgspec.Struct):
    """Who is at the other end. ``address`` is empty for a Unix socket; ``uid`` is the user on this box, if known.

    ``certificate`` (DER) was shown and held then; ``subject`` is whose it is, and ``certificate_ends_ms`` its end, once somebody asked.
    """

    address: str
    port: int
    local_port: int
    is_local: bool
    uid: int | None = None
    certificate: bytes = b""
    certificate_ends_ms: int = 0
    subject: Subject | None = None


class Head:
    """What stands before a body. Names of headers are in lower case; of several of one name the last counts."""

    __slots__ = ("headers", "method", "path", "peer", "query", "size_bytes", "started")

    def __init__(self, method: str, target: bytes, headers: dict[str, str], size_bytes: int, started: float, peer: Peer) -> None:
        self.method = method
        path, _, self.query = target.decode("latin-1").partition("?")
        if not path.startswith("/") and "://" in path:  # as a proxy is asked
            path = "/" + path.partition("://")[2].partition("/")[2]
        self.path = unquote(path) if "%" in path else path
        self.headers = headers
        self.size_bytes = size_bytes
        """-1 where the body comes in chunks."""
        self.started = started
        """When its first byte came, on time.perf_counter, in seconds."""
        self.peer = peer


class Response:
    """``parts`` are written one after the other; ``release`` is called when they may be written over."""

    __slots__ = ("headers", "parts", "release", "status")

    def __init__(self, status: int, parts: list[Bytes], headers: list[tuple[str, str]], release: Callable[[], None] | None = None) -> None:
        self.status = status
        self.parts = parts
        self.headers = headers
        self.release = release


class Application(Protocol):
    """What a connection serves."""

    def begin(self, head: Head) -> Memory | Response | None:
        """Where the body shall lie if its size is known, or an answer that does not wait for it; None leaves it to the connection."""
        ...

    async def answer(self, head: Head, body: memoryview, memory: Memory | None) -> Response:
        """The answer. Raises nothing. It owns ``memory`` from now on; ``body`` may be written over once it has returned."""
        ...

    def refusal(self, status: int, message: str) -> Response:
        """An answer of the application's own shape to what broke the protocol."""
        ...


def peer_of(transport: asyncio.Transport) -> Peer:
    """Who is at the other end of a connection."""
    raw = transport.get_extra_info("socket")
    if raw is None:
        return Peer("", 0, 0, is_local=False)
    if raw.family == socket.AF_UNIX:
        _, uid, _ = struct.unpack("3i", raw.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        return Peer("", 0, 0, is_local=True, uid=uid)
    address, port = (transport.get_extra_info("peername") or ("", 0))[:2]
    local_port = (transport.get_extra_info("sockname") or ("", 0))[1]
    tls = transport.get_extra_info("ssl_object")
    shown = tls.getpeercert(binary_form=True) if tls is not None and tls.context.verify_mode == ssl.CERT_REQUIRED else None
    is_local = address.removeprefix("::ffff:").startswith("127.") or address == "::1"
    return Peer(address, port, local_port, is_local=is_local, certificate=shown or b"")
