"""The gateway's HTTP/1.1, as attackers and hard-to-please clients see it: real sockets, on uvloop and on asyncio's own loop."""

import asyncio
import contextlib
import datetime
import itertools
import socket
import ssl
import struct
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent.gateway import http

KIB, MIB = 1024, 2**20
BODY_LIMIT_BYTES, MEMORY_LIMIT_BYTES = 24 * MIB, 32 * MIB
CONNECTIONS = 40
WAIT_S = 20
QUICK = http.Limits(head_within_s=0.2, progress_within_s=0.3, slowest_bytes_per_s=2**20, idle_for_s=0.6, linger_s=0.4, sweep_s=0.05)
PATIENT = http.Limits(sweep_s=0.05, linger_s=1.0)
GONE = (ConnectionError, asyncio.IncompleteReadError)


class Loan:
    """Memory that is written over as soon as it is given back: whatever is read after that is wrong."""

    def __init__(self, size_bytes: int) -> None:
        self.view = memoryview(bytearray(size_bytes))
        self.released = 0

    def release(self) -> None:
        self.released += 1
        self.view[:] = b"!" * len(self.view)


class Echo:
    """Answers with what it got. What the path says more: where the body lies, how the answer comes."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str, bytes]] = []
        self.heads: list[http.Head] = []
        self.loans: list[Loan] = []
        self.may_go_on = asyncio.Event()
        self.running = self.cancelled = 0

    def begin(self, head: http.Head) -> http.Memory | http.Response | None:
        if head.path.startswith("/refused"):
            return http.Response(404, [b"no such path"], [])
        return self._loan(max(head.size_bytes, 0)) if head.path.startswith("/loan") else None

    def refusal(self, status: int, message: str) -> http.Response:
        return http.Response(status, [message.encode()], [("Content-Type", "text/plain")])

    async def answer(self, head: http.Head, body: memoryview, memory: http.Memory | None) -> http.Response:
        self.heads.append(head)
        self.seen.append((head.method, head.path, head.query, bytes(body)))
        self.running += 1
        try:
            if "waits" in head.path:
                await self.may_go_on.wait()
            elif "yields" in head.path:
                await asyncio.sleep(0.001)
            elif "breaks" in head.path:
                raise ZeroDivisionError
            if "big" in head.path:
                loan = self._loan(int(head.query))
                loan.view[:] = pattern(len(loan.view))
                return http.Response(200, [loan.view], [], loan.release)
            return http.Response(200, [bytes(body)], [("Path", head.path)])
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
            if memory is not None:
                memory.release()

    def _loan(self, size_bytes: int) -> Loan:
        self.loans.append(Loan(size_bytes))
        return self.loans[-1]


def pattern(size_bytes: int) -> bytes:
    """Bytes of which no two stretches near each other are alike."""
    return b"".join(struct.pack("<Q", number * 0x9E3779B97F4A7C15 % 2**64) for number in range(size_bytes // 8 + 1))[:size_bytes]


class Caller:
    """A connection to the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()

    async def answer(self, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        """The next answer; raises IncompleteReadError where there is none."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        version, status, _ = lines[0].split(" ", 2)
        assert version == "HTTP/1.1"
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:])}
        if status == "100":
            return 100, headers, b""
        length = 0 if method == "HEAD" else int(headers["content-length"])
        return int(status), headers, await self.reader.readexactly(length)

    async def ask(self, *parts: bytes) -> tuple[int, bytes]:
        await self.send(*parts)
        status, _, body = await self.answer()
        return status, body

    async def is_closed(self) -> bool:
        """Nothing more comes but the end."""
        return await self.reader.read() == b""

    def reset(self) -> None:
        """Go as one whose power fails: no end of file, a reset."""
        sock = self.writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


class World:
    """A server and its callers."""

    def __init__(
        self, limits: http.Limits, tls: tuple[ssl.SSLContext, ssl.SSLContext] | None = None, connections: int = CONNECTIONS
    ) -> None:
        self.app = Echo()
        self.server = http.Server(
            self.app,
            body_limit_bytes=BODY_LIMIT_BYTES,
            memory_limit_bytes=MEMORY_LIMIT_BYTES,
            connection_limit=connections,
            limits=limits,
        )
        self.tls = tls
        self.callers: list[Caller] = []
        self.complaints: list[dict[str, Any]] = []
        self.path = f"/tmp/sk-{uuid.uuid4().hex[:8]}.sock"

    async def caller(self, *, unix: bool = False, receive_bytes: int = 0, limit_bytes: int = 64 * MIB) -> Caller:
        sock = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        sock.setblocking(False)
        if receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        if not unix:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(sock, self.path if unix else ("127.0.0.1", self.port))
        context = self.tls[1] if self.tls is not None else None
        reader, writer = await asyncio.open_connection(
            sock=sock, ssl=context, server_hostname="box" if context is not None else None, limit=limit_bytes
        )
        self.callers.append(Caller(reader, writer))
        return self.callers[-1]

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not is_so():
                await asyncio.sleep(0.002)

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        """Whatever callers do, the server is as it was before when they have gone."""
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        loop.set_exception_handler(lambda _loop, context: self.complaints.append(context))
        tcp = await loop.create_server(self.server.connection, "127.0.0.1", 0, ssl=self.tls[0] if self.tls is not None else None)
        self.port = tcp.sockets[0].getsockname()[1]
        local = await loop.create_unix_server(self.server.connection, self.path)
        sweep = loop.create_task(self.server.sweep(stop))
        try:
            yield
            for caller in self.callers:
                caller.writer.close()
            for caller in self.callers:
                with contextlib.suppress(*GONE, ssl.SSLError):
                    await caller.writer.wait_closed()
                with contextlib.suppress(AttributeError):  # asyncio's transports can't be aborted once they are closed
                    caller.writer.transport.abort()  # what is still being written holds uvloop up for ever when it is closed
            self.app.may_go_on.set()
            await self.until(lambda: not self.server.connections)
            await self.until(lambda: not self.app.running)
            await asyncio.sleep(0)
        finally:
            stop.set()
            await sweep
            tcp.close()
            local.close()
            Path(self.path).unlink(missing_ok=True)
        assert self.complaints == []
        assert self.server.body_bytes == 0
        assert [loan.released for loan in self.app.loans] == [1] * len(self.app.loans)


Scenario = Callable[[World], Awaitable[None]]
Run = Callable[..., None]


def run_on(factory: Callable[[], asyncio.AbstractEventLoop], scenario: Scenario, **world: Any) -> None:
    async def main() -> None:
        here = World(**{"limits": PATIENT, **world})
        async with asyncio.timeout(100), here.up():
            await scenario(here)

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


LOOPS = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a scenario, and sees to it that nothing of it stays behind."""
    return lambda scenario, **world: run_on(LOOPS[request.param], scenario, **world)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of a server, and of a caller that trusts it."""
    folder = tmp_path_factory.mktemp("tls")
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "box")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("box")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    hidden = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "both.pem").write_bytes(hidden + pem)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "both.pem")
    return server, ssl.create_default_context(cadata=pem.decode())


def get(path: str = "/", *headers: str, version: str = "1.1", method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: box", *headers, "", ""]).encode("latin-1")


def post(body: bytes, path: str = "/", *headers: str) -> bytes:
    return get(path, *headers, f"Content-Length: {len(body)}", method="POST") + body


def chunked(*chunks: bytes, path: str = "/", headers: tuple[str, ...] = (), trailers: bytes = b"") -> bytes:
    body = b"".join(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n" for chunk in chunks)
    return get(path, *headers, "Transfer-Encoding: chunked", method="POST") + body + b"0\r\n" + trailers + b"\r\n"


# -- what is right


@pytest.mark.parametrize("unix", [False, True])
def test_a_connection_serves_one_request_after_the_other(run, unix):
    async def scenario(world: World) -> None:
        caller = await world.caller(unix=unix)
        for number in range(5):
            assert await caller.ask(post(b"%d" % number, "/a?b=c&d")) == (200, b"%d" % number)
        assert await caller.ask(get("/only")) == (200, b"")
        assert world.app.seen[0] == ("POST", "/a", "b=c&d", b"0")
        peer = world.app.heads[0].peer
        assert (peer.is_local, peer.uid is not None, peer.address) == (True, unix, "" if unix else "127.0.0.1")
        assert len(world.server.connections) == 1

    run(scenario)


def test_thousands_of_requests_in_one_go_are_answered_in_order(run):
    async def scenario(world: World) -> None:
        caller = await world.caller()
        count = 5000
        sending = asyncio.ensure_future(caller.send(b"".join(get(f"/{number}") for number in range(count))))
        for number in range(count):
            status, headers, _ = await caller.answer()
            assert (status, headers["path"]) == (200, f"/{number}")
        await sending
        sending = asyncio.ensure_future(caller.send(get("/refused") * count))  # answered in begin, without a task
        for _ in range(count):
            assert (await caller.answer())[0] == 404
        await sending

    run(scenario)


def test_requests_that_wait_behind_a_body_in_lent_memory_are_answered_even_if_they_fill_the_buffer(run):
    async def scenario(world: World) -> None:
        for path in ("/loan/waits", "/waits", "/refused"):
            caller = await world.caller()
            first = post(b"x" * 100, path)
            rest = get("/next") * (3 * http.SMALL_BYTES // len(get("/next")))
            sending = asyncio.ensure_future(caller.send(first + rest))
            await asyncio.sleep(0.05)
            world.app.may_go_on.set()
            assert (await caller.answer())[0] == (404 if path == "/refused" else 200)
            for _ in range(rest.count(b"GET")):
                assert (await caller.answer())[0] == 200
            await sending
            world.app.may_go_on.clear()

    run(scenario)


def test_a_caller_that_asks_and_never_reads_is_not_answered_for_ever(run):
    async def scenario(world: World) -> None:
        caller = await world.caller(receive_bytes=4096, limit_bytes=1000)
        for _ in range(20):
            caller.writer.write(get("/big?4000000"))
        await world.until(lambda: len(world.app.seen) >= 1)
        await asyncio.sleep(0.3)
        assert len(world.app.seen) <= 3

    run(scenario)


@pytest.mark.parametrize("path", ["/", "/loan"])
def test_a_head_and_a_body_may_come_byte_by_byte(run, path):
    async def scenario(world: World) -> None:
        caller = await world.caller()
        for whole in (post(b"a body", path, "A: b"), chunked(b"a ", b"body", path=path, trailers=b"A: b\r\n")):
            for cut in range(1, len(whole)):
                await caller.send(whole[:cut])
                await asyncio.sleep(0.0005)
                assert await caller.ask(whole[cut:]) == (200, b"a body")
            for number in range(len(whole)):
                await caller.send(whole[number : number + 1])
                await asyncio.sleep(0)
            assert (await caller.answer())[2] == b"a body"

    run(scenario)


@pytest.mark.parametrize("padding", [0, 1, 100, 4000, 30_000])
def test_bodies_around_the_size_of_the_buffer_arrive_whole(run, padding):
    async def scenario(world: World) -> None:
        caller = await world.caller()
        filler = f"A: {'x' * padding}"
        head_bytes = len(get("/", filler, "Content-Length: 65000", method="POST"))
        around = [http.SMALL_BYTES + more for more in (-1, 0, 1)]
        sizes = [0, 1, *around, *(size - head_bytes for size in around), 300_000]
        for path, size in itertools.product(("/", "/loan"), sizes):
            body = pattern(size)
            assert await caller.ask(post(body, path, filler) + get("/after")) == (200, body)
            assert (await caller.answer())[1]["path"] == "/after"
            await caller.send(get(path, filler, f"Content-Length: {size}", method="POST"))
            await asyncio.sleep(0.001)
            assert await caller.ask(body[: size // 2], body[size // 2 :]) == (200, body)

    run(scenario)


def test_a_head_of_exactly_the_buffer_is_served_and_one_byte_more_is_not(run):
    async def scenario(world: World) -> None:
        bare = len(get("/", "A: "))
        caller = await world.caller()
        assert (await caller.ask(get("/", "A: " + "x" * (http.SMALL_BYTES - bare))))[0] == 200
        assert (await caller.ask(get("/", "A: " + "x" * (http.SMALL_BYTES - bare + 1))))[0] == 431
        assert await caller.is_closed()

    run(scenario)


def test_bodies_in_chunks_leave_the_connection_open_and_what_follows_them_alone(run):
    async def scenario(world: World) -> None:
        caller = await world.caller()
        body = pattern(200_000)
        tricky = b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: box\r\n\r\n" * 50
        pieces = [body[at : at + 7777] for at in range(0, len(body), 7777)]
        await caller.send(chunked(*pieces) + get("/one") + chunked(tricky, b"\r\n\r\n", b"\r") + chunked() + get("/two"))
        assert (await caller.answer())[2] == body
        assert (await caller.answer())[1]["path"] == "/one"
        assert (await caller.answer())[2] == tricky + b"\r\n\r\n\r"
        assert (await caller.answer())[2] == b""
        assert (await caller.answer())[1]["path"] == "/two"
        assert len(world.app.seen) == 5

    run(scenario)


def test_trailers_do_not_become_headers(run):
    async def scenario(world: World) -> None:
        caller = await world.caller()
        await caller.send(chunked(b"x", headers=("Mode: careful",), trailers=b"Mode: careless\r\nHost: other\r\nNew: x\r\n"))
        assert (await caller.answer())[0] == 200
        headers = world.app.heads[0].headers
        assert (headers["mode"], headers["host"], "new" in headers) == ("careful", "box", False)

    run(scenario)


def test_a_caller_that_asks_first_is_told_to_go_on_once(run):
    async def scenario(world: World) -> None:
        for path in ("/", "/loan"):
            caller = await world.caller()
            await caller.send(get(path, "Expect: 100-continue", "Content-Length: 4", method="POST"))
            assert (await caller.answer())[0] == 100
            assert await caller.ask(b"body") == (200, b"body")
            assert await caller.ask(post(b"body", path, "Expect: 100-continue")) == (200, b"body")
            await caller.send(get(path, "Expect: 100-continue", "Transfer-Encoding: chunked", method="POST"))
            assert (await caller.answer())[0] == 100
            assert await caller.ask(b"1\r\nx\r\n0\r\n\r\n") == (200, b"x")
        await caller.send(get("/", "Expect: 100-continue", "Content-Length: 1", method="POST", version="1.0"), b"x")
        assert (await caller.answer())[0] == 200

    run(scenario)


def test_a_caller_that_asks_first_and_is_refused_is_hung_up_on_for_it_may_not_send_the_body(run):
    async def scenario(world: World) -> None:
        caller = await world.caller()
        await caller.send(get("/refused", "Expect: 100-continue", "Content-Length: 100", method="POST"))
        status, headers, _ = await caller.answer()
        assert (status, headers["connection"]) == (404, "close")
        assert await caller.is_closed()

    run(scenario)


def test_head_gets_the_length_and_no_body(run):
    async def scenario(world: World) -> None:
        caller = await world.caller()
        await caller.send(get("/big?1000", method="HEAD") + get("/next"))
        status, headers, _ = await caller.answer("HEAD")
        assert (status, headers["content-length"]) == (200, "1000")
        assert (await caller.answer())[1]["path"] == "/next"

    run(scenario)


def test_connections_stay_open_or_close_as_the_caller_says(run):
    async def scenario(world: World) -> None:
        for request, connection in [
            (get("/"), None),
            (get("/", "Connection: close"), "close"),
            (post(b"abc", "/", "Connection: close"), "close"),
            (get("/", version="1.0"), "close"),
            (get("/", "Connection: keep-alive", version="1.0"), "keep-alive"),
            (chunked(b"x", headers=("Connection: close",)), "close"),
        ]:
            caller = await world.caller()
            await caller.send(request)
            status, headers, _ = await caller.answer()
            assert (status, headers.get("connection")) == (200, connection)
            if connection == "close":
                await caller.send(get("/too-late"))
                assert await caller.is_closed()
            else:
                assert (await caller.ask(get("/again")))[0] == 200
        assert all(path != "/too-late" for _, path, _, _ in world.app.seen)

    run(scenario)


def test_nothing_behind_a_last_request_is_served(run):
    async def scenario(world: World) -> None:
        for last in (get("/", "Connection: close"), get("/refused", "Connection: close"), post(b"x" * 9, "/loan", "Connection: close")):
            caller = await world.caller()
            await caller.send(get("/first") + last + get("/behind") * 3000)
            assert (await caller.answer())[0] == 200
            assert (await caller.answer())[1]["connection"] == "close"
            assert await caller.is_closed()
        assert all(path != "/behind" for _, path, _, _ in world.app.seen)

    run(scenario)


@pytest.mark.parametrize("upgrade", ["h2c", "websocket"])
def test_an_offer_to_upgrade_is_ignored(run, upgrade):
    async def scenario(world: World) -> None:
        caller = await world.caller()
        offer = (f"Upgrade: {upgrade}", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA")
        assert await caller.ask(get("/", *offer)) == (200, b"")
        assert await caller.ask(post(b"body", "/", *offer)) == (200, b"body")
        assert await caller.ask(chunked(b"bo", b"dy", headers=offer) + get("/last")) == (200, b"body")
        assert (await caller.answer())[1]["path"] == "/last"

    run(scenario)


def test_paths_are_what_was_meant(run):
    async def scenario(world: World) -> None:
        caller = await world.caller()
        for target, path, query in [
            ("/a%20b%2Fc", "/a b/c", ""),
            ("/%C3%A9?q=%20", "/é", "q=%20"),
            ("/%ff%00", "/\ufffd\0", ""),
            ("http://box:80/x/y?z", "/x/y", "z"),
            ("http://box", "/", ""),
            ("*", "*", ""),
            ("//x", "//x", ""),
            ("/?a=http://b/c", "/", "a=http://b/c"),
        ]:
            await caller.send(get(target, method="OPTIONS"))
            assert (await caller.answer())[0] == 200
            assert world.app.seen[-1][1:3] == (path, query)
        assert await caller.ask(b"\r\n\n\r\n" + post(b"x") + b"\r\n\r\n\r\n") == (200, b"x")
        assert await caller.ask(get("/", "A: caf\xe9")) == (200, b"")
        assert world.app.heads[-1].headers["a"] == "caf\xe9"

    run(scenario)


# -- what is wrong

HOST = b"Host: box\r\n"
WRONG = [
    (400, b"GET\r\n\r\n"),
    (400, b"GET /\r\n\r\n"),
    (400, b"nonsense\r\n\r\n"),
    (400, b"\x16\x03\x01\x02\x00\x01\r\n\r\n"),
    (400, b"get / HTTP/1.1\r\n" + HOST + b"\r\n"),
    (400, b"GET /a b HTTP/1.1\r\n" + HOST + b"\r\n"),
    (400, b"GET /\x00 HTTP/1.1\r\n" + HOST + b"\r\n"),
    (400, b"GET /\xc3\xa9 HTTP/1.1\r\n" + HOST + b"\r\n"),
    (400, b"GET / HTTP/1.1\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\n" + HOST * 2 + b"\r\n"),
    (400, b"GET / HTTP/1.1\nHost: box\n\nGET / HTTP/1.1\r\n" + HOST + b"\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: box\n\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n folded\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n\tContent-Length: 5\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\n" + HOST + b"A: \x00\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\n" + HOST + b"A: b\rInjected: c\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\n" + HOST + b"A b: c\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\n" + HOST + b": c\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\n" + HOST + b"no colon\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\n A: b\r\n" + HOST + b"\r\n"),
    (505, b"GET / HTTP/2.0\r\n" + HOST + b"\r\n"),
    (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    (400, b"SOURCE / ICE/1.0\r\n" + HOST + b"\r\n"),
    (431, b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n" * 101 + b"\r\n"),
    (431, b"GET / HTTP/1.1\r\n" + HOST + b"A: " + b"b" * 70_000 + b"\r\n\r\n"),
    (431, b"GET /" + b"b" * 200_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n"),
]
LENGTHS = [
    b"Content-Length: 5\r\nContent-Length: 5",
    b"Content-Length: 5\r\nContent-Length: 6",
    b"Content-Length: 5\r\ncontent-length: 0",
    b"Content-Length: 5, 5",
    b"Content-Length: -5",
    b"Content-Length: +5",
    b"Content-Length: 0x5",
    b"Content-Length: 5 5",
    b"Content-Length: ",
    b"Content-Length: 9999999999999999999999",
    b"Content-Length: 1234567890123456",
    b"Content-Length : 5",
    b"Content-Length: \xb2",
    b"Transfer-Encoding: chunked\r\nContent-Length: 5",
    b"Content-Length: 5\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: chunked, gzip",
    b"Transfer-Encoding: xchunked",
    b"Transfer-Encoding: \x0bchunked",
    b"Transfer-Encoding : chunked",
    b"Transfer-Encoding:\r\n chunked",
    b"Transfer-Encoding: ",
    b"Transfer-Encoding: chunked\r\nUpgrade: h2c\r\nConnection: upgrade\r\nContent-Length: 3",
]


@pytest.mark.parametrize("split", [False, True])
def test_what_is_not_http_is_answered_once_and_closed_and_nothing_behind_it_is_served(run, split):
    async def scenario(world: World) -> None:
        lengths = [(400, b"POST / HTTP/1.1\r\n" + HOST + length + b"\r\n\r\n0\r\n\r\n") for length in LENGTHS]
        for status, wrong in [*WRONG, *lengths, (400, b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")]:
            caller = await world.caller()
            if split:
                await caller.send(wrong[:10])
                await asyncio.sleep(0.001)
            await caller.send(wrong[10:] if split else wrong, get("/smuggled"))
            got, headers, body = await caller.answer()
            assert (got, headers["connection"]) == (status, "close"), (wrong[:100], body)
            assert await caller.is_closed()
        assert world.app.seen == []

    run(scenario, connections=1000)  # who is hung up on stays for a while


@pytest.mark.parametrize(
    "body",
    [
        b"x\r\n",
        b"-1\r\n",
        b"1\nx\r\n",
        b"1\r\nxy\r\n0\r\n\r\n",
        b"ffffffffffffffffffff\r\n",
        b"1 \r\nx\r\n",
        b"0\r\nA b: c\r\n\r\n",
        b"0\n\n",
    ],
)
def test_chunks_that_are_not_chunks_are_refused(run, body):
    async def scenario(world: World) -> None:
        caller = await world.caller()
        await caller.send(get("/", "Transfer-Encoding: chunked", method="POST") + body + get("/smuggled"))
        assert (await caller.answer())[0] == 400
        assert await caller.is_closed()
        assert world.app.seen == []

    run(scenario)


def test_bodies_beyond_the_limit_are_refused_however_they_come(run):
    async def scenario(world: World) -> None:
        caller = await world.caller()
        await caller.send(get("/", f"Content-Length: {BODY_LIMIT_BYTES + 1}", method="POST"))
        assert (await caller.answer())[0] == 413
        assert await caller.is_closed()
        caller = await world.caller()
        piece = chunked(bytes(MIB)).removesuffix(b"0\r\n\r\n").removeprefix(chunked().removesuffix(b"0\r\n\r\n"))
        await caller.send(chunked().removesuffix(b"0\r\n\r\n"))
        sending = asyncio.ensure_future(caller.send(*[piece] * (BODY_LIMIT_BYTES // MIB + 4)))
        assert (await caller.answer())[0] == 413
        await sending
        assert await caller.is_closed()
        assert world.app.seen == []

    run(scenario)


def test_all_bodies_together_are_bounded(run):
    async def scenario(world: World) -> None:
        most = await world.caller()
        await most.send(get("/loan", f"Content-Length: {BODY_LIMIT_BYTES}", method="POST"))
        await world.until(lambda: world.server.body_bytes == BODY_LIMIT_BYTES)
        other = await world.caller()
        size = MEMORY_LIMIT_BYTES - BODY_LIMIT_BYTES
        assert (await other.ask(post(bytes(size + 1))))[0] == 503
        assert (await other.ask(post(bytes(size))))[0] == 200
        assert (await other.ask(get("/"))) == (200, b"")
        sending = asyncio.ensure_future(other.send(chunked(*[bytes(MIB)] * (size // MIB + 1))))
        assert (await other.answer())[0] == 503
        await sending
        await world.until(lambda: world.server.body_bytes == BODY_LIMIT_BYTES)
        assert await most.ask(bytes(BODY_LIMIT_BYTES)) == (200, bytes(BODY_LIMIT_BYTES))

    run(scenario)


@pytest.mark.parametrize("size", [1, 1000, 70_000, 2 * MIB])
def test_the_body_of_a_refused_request_is_skipped_to_the_byte(run, size):
    async def scenario(world: World) -> None:
        caller = await world.caller()
        for head_alone in (False, True):
            request = post(pattern(size), "/refused")
            head, rest = (request[:-size], request[-size:]) if head_alone else (b"", request)
            await caller.send(head)
            await asyncio.sleep(0.005)
            assert (await caller.ask(rest + get("/next") + get("/last"))) == (404, b"no such path")
            assert (await caller.answer())[1]["path"] == "/next"
            assert (await caller.answer())[1]["path"] == "/last"

    run(scenario)


@pytest.mark.parametrize("with_tls", [False, True])
def test_a_caller_that_reads_only_when_all_is_sent_gets_its_refusal_and_no_reset(run, tls, with_tls):
    async def scenario(world: World) -> None:
        for request in (
            post(bytes(http.DRAIN_BYTES + 4 * MIB), "/refused"),
            post(bytes(BODY_LIMIT_BYTES + 1)),
            b"nonsense\r\n\r\n" + bytes(3 * MIB),
            chunked(*[bytes(MIB)] * 4, path="/refused"),
        ):
            caller = await world.caller()
            await caller.send(*[request[at : at + MIB] for at in range(0, len(request), MIB)])
            await asyncio.sleep(0.05)
            status, headers, _ = await caller.answer()
            assert status in (400, 404, 413)
            assert headers["connection"] == "close"

    run(scenario, tls=tls if with_tls else None)


# -- those who are slow, or leave


def test_answers_are_written_to_the_end_before_their_memory_is_given_back(run):
    async def scenario(world: World) -> None:
        for unix in (False, True):
            caller = await world.caller(unix=unix, receive_bytes=8192, limit_bytes=8192)
            await caller.send(get("/big?3000000") * 3 + get("/big?3000000", "Connection: close"))
            for _ in range(4):
                await asyncio.sleep(0.05)
                assert len([loan for loan in world.app.loans if not loan.released]) <= 1
                head = await caller.reader.readuntil(b"\r\n\r\n")
                assert b"200 OK" in head
                assert await caller.reader.readexactly(3_000_000) == pattern(3_000_000)
            assert await caller.is_closed()

    run(scenario)


def test_a_slow_reader_has_the_time_that_its_answer_may_take_and_one_that_stopped_has_not(run):
    async def scenario(world: World) -> None:
        slow = await world.caller(receive_bytes=8192, limit_bytes=8192)
        stopped = await world.caller(receive_bytes=8192, limit_bytes=8192)
        for caller in (slow, stopped):
            await caller.send(get("/big?6000000", "Connection: close"))
        await slow.reader.readuntil(b"\r\n\r\n")
        got = b""
        while len(got) < 6_000_000:
            more = await slow.reader.read(8192)
            assert more
            got += more
            await asyncio.sleep(0.0005)
        assert got == pattern(6_000_000)
        await world.until(lambda: not world.server.connections)

    run(scenario, limits=QUICK)


def test_callers_that_are_too_slow_are_told_and_closed(run):
    async def scenario(world: World) -> None:
        async def drips(caller: Caller, begin: bytes, drip: bytes) -> int:
            await caller.send(begin)
            with contextlib.suppress(*GONE):
                for _ in range(60):
                    if not caller.reader._buffer:
                        caller.writer.write(drip)
                    await asyncio.sleep(0.02)
            return (await caller.answer())[0]

        callers = [await world.caller() for _ in range(6)]
        assert (
            await asyncio.gather(
                drips(callers[0], b"", b"A"),
                drips(callers[1], b"GET / HTTP/1.1\r\n", b"A: b\r\n"),
                drips(callers[2], get("/loan", "Content-Length: 5000000", method="POST"), b"x"),
                drips(callers[3], get("/", "Content-Length: 5000000", method="POST") + bytes(100_000), b"x"),
                drips(callers[4], get("/", "Transfer-Encoding: chunked", method="POST"), b"1\r\nx\r\n"),
                drips(callers[5], get("/loan", "Content-Length: 5000000", method="POST") + bytes(4_000_000), b""),
            )
            == [408] * 6
        )
        assert world.app.seen == []

    run(scenario, limits=QUICK)


def test_idle_connections_are_closed_and_busy_ones_are_not(run):
    async def scenario(world: World) -> None:
        idle, never, busy = [await world.caller() for _ in range(3)]
        assert (await idle.ask(get("/")))[0] == 200
        await busy.send(get("/waits"))
        assert await idle.is_closed()
        assert await never.is_closed()
        await asyncio.sleep(0.5)
        world.app.may_go_on.set()
        assert (await busy.answer())[0] == 200

    run(scenario, limits=QUICK)


def test_a_caller_that_does_not_close_is_cut_off(run):
    async def scenario(world: World) -> None:
        caller = await world.caller()
        await caller.send(b"nonsense\r\n\r\n")
        assert (await caller.answer())[0] == 400
        with pytest.raises(ConnectionError):  # noqa: PT012 - one of them fails, and which is the system's affair
            for _ in range(1000):
                await caller.send(b"more")
                await asyncio.sleep(0.01)
        await world.until(lambda: not world.server.connections)

    run(scenario, limits=QUICK)


def test_connections_are_bounded(run):
    async def scenario(world: World) -> None:
        callers = [await world.caller() for _ in range(CONNECTIONS)]
        for caller in callers:
            assert (await caller.ask(get("/")))[0] == 200
        refused = await world.caller()
        assert (await refused.ask(get("/")))[0] == 503
        assert await refused.is_closed()
        refused.writer.close()
        for _ in range(2 * CONNECTIONS):
            await world.caller()
        await asyncio.sleep(0.05)
        assert len(world.server.connections) <= 2 * CONNECTIONS
        assert (await callers[0].ask(get("/")))[0] == 200
        callers.pop().writer.close()
        await world.until(lambda: len(world.server.connections) < CONNECTIONS)
        assert (await (await world.caller()).ask(get("/")))[0] == 200

    run(scenario)


@pytest.mark.parametrize("unix", [False, True])
def test_a_caller_that_closed_its_half_gets_all_its_answers(run, unix):
    async def scenario(world: World) -> None:
        for requests, paths in [
            ([get("/a")], ["/a"]),
            ([get("/yields"), get("/b"), post(b"x" * 100, "/loan/yields"), get("/c")], ["/yields", "/b", "/loan/yields", "/c"]),
            ([chunked(b"x", path="/yields"), chunked(b"y")], ["/yields", "/"]),
            ([post(b"x" * 100_000, "/loan"), get("/incomplete")[:-2]], ["/loan"]),
        ]:
            caller = await world.caller(unix=unix)
            await caller.send(b"".join(requests))
            caller.writer.write_eof()
            for path in paths:
                status, headers, _ = await caller.answer()
                assert (status, headers["path"]) == (200, path)
            assert await caller.is_closed()
        caller = await world.caller(unix=unix)
        await caller.send(get("/refused") * 2000)
        caller.writer.write_eof()
        for _ in range(2000):
            assert (await caller.answer())[0] == 404
        assert await caller.is_closed()
        big = await world.caller(unix=unix, receive_bytes=8192, limit_bytes=8192)
        await big.send(get("/big?3000000") + get("/last"))
        big.writer.write_eof()
        await asyncio.sleep(0.05)
        assert (await big.answer())[2] == pattern(3_000_000)
        assert (await big.answer())[1]["path"] == "/last"

    run(scenario)


@pytest.mark.parametrize(
    "request_", [get("/x")[:9], get("/x", "Content-Length: 9"), post(b"x" * 9, "/loan")[:-1], chunked(b"abc")[:-9], b""]
)
def test_half_a_request_of_a_caller_that_left_is_forgotten(run, request_):
    async def scenario(world: World) -> None:
        for leave in ("half", "close", "reset"):
            caller = await world.caller()
            await caller.send(request_)
            await world.until(lambda: len(world.server.connections) == 1)
            await asyncio.sleep(0.01)
            if leave == "half":
                caller.writer.write_eof()
                assert await caller.is_closed()
            elif leave == "close":
                caller.writer.close()
            else:
                caller.reset()
            await world.until(lambda: not world.server.connections)
            assert world.server.body_bytes == 0
        assert world.app.seen == []

    run(scenario)


@pytest.mark.parametrize("body", [10, 100_000])
@pytest.mark.parametrize("how", ["tcp reset", "unix close", "tls close"])
def test_work_for_a_caller_that_left_is_cancelled(run, tls, how, body):
    async def scenario(world: World) -> None:
        for path in ("/loan/waits", "/waits"):
            caller = await world.caller(unix=how == "unix close") if how != "tls close" else await world.caller()
            await caller.send(post(bytes(body), path))
            await world.until(lambda: world.app.running == 1)
            assert world.server.body_bytes == body
            caller.reset() if how == "tcp reset" else caller.writer.close()
            await world.until(lambda: world.app.running == 0)
            await world.until(lambda: not world.server.connections)
            assert world.server.body_bytes == 0
        assert world.app.cancelled == 2

    run(scenario, tls=tls if how == "tls close" else None)


def test_a_request_whose_caller_leaves_before_it_began_gives_its_memory_back(run):
    async def scenario(world: World) -> None:
        for _ in range(20):
            caller = await world.caller()
            await caller.send(post(bytes(1000), "/loan"))
            for connection in list(world.server.connections):
                connection.abort()
        for delay in range(20):
            caller = await world.caller()
            before = len(world.app.loans)
            caller.writer.write(post(bytes(1000), "/loan"))
            await world.until(lambda before=before: len(world.app.loans) > before)
            await asyncio.sleep(delay / 20000)
            for connection in list(world.server.connections):
                connection.abort()

    run(scenario)


def test_a_caller_that_leaves_in_the_middle_of_its_answer_costs_nothing(run):
    async def scenario(world: World) -> None:
        for leave in ("close", "reset"):
            caller = await world.caller(receive_bytes=8192, limit_bytes=8192)
            await caller.send(get("/big?5000000") * 3)
            await caller.reader.readexactly(10_000)
            assert not world.app.loans[-1].released
            caller.writer.close() if leave == "close" else caller.reset()
            await world.until(lambda: not world.server.connections)

    run(scenario)


def test_a_defect_of_the_application_ends_the_connection_and_is_reported(run):
    async def scenario(world: World) -> None:
        caller = await world.caller()
        await caller.send(post(b"x" * 100, "/loan/breaks"))
        assert await caller.is_closed()
        await world.until(lambda: not world.server.connections)
        import gc

        gc.collect()
        await asyncio.sleep(0)
        assert [type(complaint["exception"]) for complaint in world.complaints] == [ZeroDivisionError]
        world.complaints.clear()

    run(scenario)


def test_draining_lets_requests_end_and_closes_the_rest(run):
    async def scenario(world: World) -> None:
        idle, busy, sending, stuck = [await world.caller() for _ in range(4)]
        assert (await idle.ask(get("/")))[0] == 200
        await busy.send(post(b"x" * 100, "/loan/waits"))
        await sending.send(post(b"x" * 100_000, "/loan")[:-5])
        await stuck.send(post(b"x" * 100_000, "/loan")[:-5])
        await world.until(lambda: world.app.running == 1 and len(world.app.loans) == 3)
        draining = asyncio.ensure_future(world.server.drain(1.0))
        assert await idle.is_closed()
        world.app.may_go_on.set()
        for caller, rest in ((busy, b""), (sending, b"xxxxx")):
            await caller.send(rest)
            status, headers, _ = await caller.answer()
            assert (status, headers["connection"]) == (200, "close")
            assert await caller.is_closed()
            caller.writer.close()
        await draining
        with contextlib.suppress(ConnectionError):
            assert await stuck.is_closed()
        await world.until(lambda: not world.server.connections)

    run(scenario)


# -- TLS


def test_over_tls_everything_is_the_same_but_halves(run, tls):
    async def scenario(world: World) -> None:
        caller = await world.caller()
        body = pattern(5 * MIB)
        for path in ("/", "/loan"):
            assert await caller.ask(post(body, path)) == (200, body)
            assert await caller.ask(post(b"small", path) + get("/next")) == (200, b"small")
            assert (await caller.answer())[1]["path"] == "/next"
        assert await caller.ask(chunked(body, b"x")) == (200, body + b"x")
        await caller.send(get("/big?3000000") * 3 + get("/big?3000000", "Connection: close"))
        for _ in range(4):
            await asyncio.sleep(0.02)
            assert (await caller.answer())[2] == pattern(3_000_000)
        assert await caller.is_closed()
        assert world.app.heads[0].peer.address == "127.0.0.1"
        plain = socket.create_connection(("127.0.0.1", world.port))
        plain.sendall(get("/"))
        await asyncio.sleep(0.05)
        plain.close()

    run(scenario, tls=tls)


def test_over_tls_slow_readers_get_everything_and_idle_ones_are_closed(run, tls):
    async def scenario(world: World) -> None:
        slow = await world.caller(receive_bytes=8192, limit_bytes=8192)
        await slow.send(get("/big?3000000"))
        await slow.reader.readuntil(b"\r\n\r\n")
        got = b""
        while len(got) < 3_000_000:
            more = await slow.reader.read(8192)
            assert more
            got += more
            await asyncio.sleep(0.001)
        assert got == pattern(3_000_000)
        assert await slow.is_closed()

    run(scenario, tls=tls, limits=QUICK)


# -- everything at once

REQUESTS = [
    get("/a"),
    get("/yields"),
    get("/big?300000"),
    get("/refused"),
    post(b"small"),
    post(b"small", "/loan"),
    post(pattern(90_000), "/loan/yields"),
    post(pattern(66_000)),
    post(b"x" * 5000, "/refused"),
    chunked(b"abc", b"\r\n\r\n", pattern(70_000)),
    get("/", "Connection: close"),
    b"nonsense\r\n\r\n",
]
actions = st.one_of(
    st.tuples(st.just("send"), st.sampled_from(REQUESTS)),
    st.tuples(st.just("pipeline"), st.lists(st.sampled_from(REQUESTS), min_size=2, max_size=6).map(b"".join)),
    st.tuples(st.just("part"), st.tuples(st.sampled_from(REQUESTS), st.floats(0, 1)).map(lambda p: p[0][: int(len(p[0]) * p[1])])),
    st.tuples(st.sampled_from(["read", "pause", "half", "close", "reset", "abort"]), st.just(b"")),
)


async def act(world: World, unix: bool, script: list[tuple[str, bytes]]) -> None:
    caller = await world.caller(unix=unix, receive_bytes=8192, limit_bytes=8192)
    for action, data in script:
        with contextlib.suppress(*GONE, asyncio.LimitOverrunError, TimeoutError, OSError, RuntimeError):
            match action:
                case "read":
                    async with asyncio.timeout(0.02):
                        await caller.reader.read(100_000)
                case "pause":
                    await asyncio.sleep(0.004)
                case "half":
                    caller.writer.write_eof()
                case "close":
                    caller.writer.close()
                case "reset":
                    caller.reset()
                case "abort":
                    for connection in list(world.server.connections)[:1]:
                        connection.abort()
                case _:
                    caller.writer.write(data)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(scripts=st.lists(st.tuples(st.booleans(), st.lists(actions, max_size=8)), min_size=1, max_size=4))
def test_whatever_callers_do_nothing_of_it_stays(scripts):
    async def scenario(world: World) -> None:
        await asyncio.gather(*(act(world, unix, script) for unix, script in scripts))

    run_on(asyncio.new_event_loop, scenario, limits=QUICK)  # uvloop waits for ever, when it is closed, for what these callers left


@pytest.mark.parametrize("loop", LOOPS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(requests=st.lists(st.sampled_from(REQUESTS[:10]), min_size=1, max_size=12), cuts=st.lists(st.floats(0, 1), max_size=12))
def test_however_the_bytes_are_cut_the_server_sees_what_was_sent(loop, requests, cuts):
    async def scenario(world: World) -> None:
        caller = await world.caller()
        whole = b"".join(requests)
        places = sorted({0, len(whole), *(int(cut * len(whole)) for cut in cuts)})

        async def send() -> None:
            for begin, end in itertools.pairwise(places):
                await caller.send(whole[begin:end])
                await asyncio.sleep(0.0003)

        sending = asyncio.ensure_future(send())
        for request in requests:
            status, _, body = await caller.answer()
            assert status == (404 if b" /refused" in request else 200)
            if request.startswith(b"GET /big"):
                assert body == pattern(300_000)
            elif status == 200 and b"chunked" not in request:
                assert body == request.partition(b"\r\n\r\n")[2]
            elif status == 200:
                assert body == b"abc\r\n\r\n" + pattern(70_000)
        await sending

    run_on(LOOPS[loop], scenario)
