"""The one client that asks every server alike, at next to no cost of its own: requests are rendered before, answers are hardly looked at.

``asking`` is one caller on one connection, for latency. ``python -m bench.load FILE`` is a process of its own that drives many
connections, for throughput and for arrivals that wait for nobody: it reads a ``Plan`` as JSON on standard input and writes what became
of each request to FILE. Times are on time.monotonic, which all processes of a machine share.
"""

import contextlib
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

RECEIVE_BYTES = 1024 * 1024
TIMEOUT_S = 20
UNIX = "unix:"
LOST = 0
"""The status of a request that no answer came to."""
OK = 200
SLACK_S = 30.0
GRPC_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]


class Call(msgspec.Struct, frozen=True):
    """One request, rendered: all bytes of an HTTP request, or the message of a gRPC one to ``method``."""

    protocol: Literal["http", "grpc"]
    address: str
    request: bytes
    method: str = ""


class Plan(msgspec.Struct, frozen=True):
    """What to send. A ``rate_per_s`` of 0 has each connection ask again as soon as it was answered; else arrivals are Poisson's.

    Which of ``calls`` is sent is drawn by ``weights``; ``seed`` fixes the draw and the arrivals. After ``seconds`` nothing is sent any
    more, and what is under way gets ``drain_s``.
    """

    calls: list[Call]
    connections: int
    seconds: float
    weights: list[float] = []
    rate_per_s: float = 0.0
    seed: int = 1
    drain_s: float = 5.0
    cores: list[int] = []


class Told(msgspec.Struct):
    """What became of each request of a plan, in the order in which they were sent."""

    kind: np.ndarray
    intended_s: np.ndarray
    sent_s: np.ndarray
    done_s: np.ndarray
    status: np.ndarray
    began_s: float
    cpu_s: float
    seconds: float

    @property
    def latency_ms(self) -> np.ndarray:
        """From when it should have been sent until its answer was read."""
        return (self.done_s - self.intended_s) * 1000

    @property
    def good(self) -> np.ndarray:
        """Which were answered."""
        return self.status == OK

    @property
    def per_second(self) -> float:
        """Answered within the plan's time, by second."""
        return float(np.count_nonzero(self.good & (self.done_s <= self.began_s + self.seconds))) / self.seconds


def connect(address: str) -> socket.socket:
    """A connection whose reads and writes block, TIMEOUT_S at most."""
    if address.startswith(UNIX):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address.removeprefix(UNIX))
    else:
        host, _, port = address.rpartition(":")
        connection = socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # the kernel's own: Python's would ask for readiness before each read
        connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", TIMEOUT_S, 0))
    return connection


def frame_of(head: bytes) -> tuple[int, int]:
    """The status and the body's length that the head of an answer tells; -1 where it comes in chunks."""
    status = int(head[9:12])
    lower = head.lower()
    at = lower.find(b"\r\ncontent-length:")
    if at < 0:
        if b"transfer-encoding: chunked" in lower:
            return status, -1
        raise RuntimeError(f"an answer without a length: {head[:200]!r}")
    end = lower.find(b"\r\n", at + 17)
    return status, int(lower[at + 17 : end if end >= 0 else None])


def joined(chunks: bytes) -> bytes:
    """The body that came in chunks."""
    parts, at = [], 0
    while (end := chunks.index(b"\r\n", at)) >= 0 and (size := int(chunks[at:end], 16)):
        parts.append(chunks[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    return b"".join(parts)


class HttpCaller:
    """One connection, one request at a time."""

    def __init__(self, call: Call) -> None:
        self._request = call.request
        self._socket = connect(call.address)
        self._view = memoryview(bytearray(RECEIVE_BYTES))

    def _more(self, filled: int) -> int:
        if filled == len(self._view):
            raise RuntimeError(f"an answer over {len(self._view)} bytes")
        got = self._socket.recv_into(self._view[filled:])
        if not got:
            raise RuntimeError("the server closed the connection")
        return filled + got

    def __call__(self) -> tuple[bytes, bytes]:
        """Ask once; the head and the body of the answer. Raises unless the status is 200."""
        self._socket.sendall(self._request)
        view, filled = self._view, self._more(0)
        while (end := bytes(view[: min(filled, 4096)]).find(b"\r\n\r\n")) < 0:
            filled = self._more(filled)
        head = bytes(view[:end])
        status, size = frame_of(head)
        while (filled < end + 4 + size) if size >= 0 else (bytes(view[filled - 5 : filled]) != b"0\r\n\r\n"):
            filled = self._more(filled)
        body = bytes(view[end + 4 : filled])
        if status != OK:
            raise RuntimeError(f"status {status}: {body[:300].decode(errors='replace')}")
        return head, body if size >= 0 else joined(body)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def _same(message: bytes) -> bytes:
    return message


class GrpcCaller:
    """The same by grpcio, messages passed as they are."""

    def __init__(self, call: Call) -> None:
        import grpc

        self._channel = grpc.insecure_channel(call.address, options=GRPC_OPTIONS)
        self._ask = self._channel.unary_unary(call.method, request_serializer=_same, response_deserializer=_same)
        self._request = call.request

    def __call__(self) -> tuple[bytes, bytes]:
        """Ask once. Raises grpc.RpcError."""
        return b"", self._ask(self._request, timeout=TIMEOUT_S)

    def close(self) -> None:
        """Hang up."""
        self._channel.close()


def asking(call: Call) -> HttpCaller | GrpcCaller:
    """A caller on a connection of its own."""
    return HttpCaller(call) if call.protocol == "http" else GrpcCaller(call)


class Request:
    """One that is under way or waits for a connection."""

    __slots__ = ("intended_s", "kind", "sent_s")

    def __init__(self, kind: int, intended_s: float) -> None:
        self.kind = kind
        self.intended_s = intended_s
        self.sent_s = intended_s


class Line:
    """One connection of many: what is still to be sent of a request, what came of its answer."""

    __slots__ = ("filled", "request", "socket", "to_send", "view", "want")

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self.request: Request | None = None
        self.to_send = memoryview(b"")
        self.view = memoryview(bytearray(65536))
        self.filled = 0
        self.want = -1


class HttpLoop:
    """Every connection of a plan in one loop."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._rows: list[tuple[int, float, float, float, int]] = []
        self._epoll = select.epoll()
        self._lines: dict[int, Line] = {}
        self._free: deque[Line] = deque()
        self._waiting: deque[Request] = deque()
        random = np.random.default_rng(plan.seed)
        self._random = random
        self._weights = np.array(plan.weights or [1.0] * len(plan.calls)) / sum(plan.weights or [1.0] * len(plan.calls))
        self._arrivals = iter(())
        if plan.rate_per_s:
            gaps = random.exponential(1 / plan.rate_per_s, int(plan.rate_per_s * plan.seconds * 1.5) + 100)
            at = np.cumsum(gaps)
            at = at[at < plan.seconds]
            self._arrivals = iter(zip(at.tolist(), self._kinds(len(at)), strict=True))
        self._began = 0.0

    def _kinds(self, count: int) -> list[int]:
        return self._random.choice(len(self._weights), count, p=self._weights).tolist()

    def run(self) -> tuple[float, list[tuple[int, float, float, float, int]]]:
        """When it began, and a row for each request."""
        plan = self._plan
        for _ in range(plan.connections):
            self._open(Line())
        self._began = time.monotonic()
        end, last = self._began + plan.seconds, self._began + plan.seconds + plan.drain_s
        if plan.rate_per_s:
            self._open_loop(last)
        else:
            while (now := time.monotonic()) < end:
                while self._free:
                    self._send(self._free.popleft(), Request(self._kinds(1)[0] if len(plan.calls) > 1 else 0, time.monotonic()))
                self._wait(end - now)
            while self._busy() and (now := time.monotonic()) < last:
                self._wait(last - now)
        for line in [line for line in self._lines.values() if line.request is not None]:
            self._lose(line, reopen=False)
        for request in self._waiting:
            self._rows.append((request.kind, request.intended_s, time.monotonic(), time.monotonic(), LOST))
        return self._began, self._rows

    def _busy(self) -> bool:
        return len(self._free) < len(self._lines)

    def _open_loop(self, last: float) -> None:
        upcoming = next(self._arrivals, None)
        while upcoming is not None or ((self._busy() or self._waiting) and time.monotonic() < last):
            now = time.monotonic()
            while upcoming is not None and self._began + upcoming[0] <= now:
                self._waiting.append(Request(upcoming[1], self._began + upcoming[0]))
                upcoming = next(self._arrivals, None)
            while self._waiting and self._free:
                self._send(self._free.popleft(), self._waiting.popleft())
            until = self._began + upcoming[0] if upcoming is not None else last
            self._wait(max(0.0, until - time.monotonic()))

    def _wait(self, timeout_s: float) -> None:
        """Handle what happens until then. epoll alone rounds up to whole milliseconds."""
        if timeout_s > 0:
            select.select([self._epoll.fileno()], [], [], min(timeout_s, 0.2))
        for number, events in self._epoll.poll(0):
            line = self._lines.get(number)
            if line is None:
                continue
            try:
                if events & select.EPOLLOUT:
                    self._push(line)
                if events & ~select.EPOLLOUT:
                    self._pull(line)
            except (OSError, RuntimeError, ValueError):
                self._lose(line)

    def _open(self, line: Line) -> None:
        line.socket = connect(self._plan.calls[0].address)
        line.socket.setblocking(False)
        self._lines[line.socket.fileno()] = line
        self._epoll.register(line.socket.fileno(), select.EPOLLIN)
        self._free.append(line)

    def _lose(self, line: Line, *, reopen: bool = True) -> None:
        """The connection broke: its request has no answer, and another connection takes its place."""
        if line.socket is None:
            return
        if line.request is not None:
            self._row(line.request, LOST)
            line.request = None
        elif line in self._free:
            self._free.remove(line)
        self._lines.pop(line.socket.fileno(), None)
        line.socket.close()
        line.filled, line.want, line.to_send = 0, -1, memoryview(b"")
        if reopen:
            with contextlib.suppress(OSError):
                self._open(line)

    def _row(self, request: Request, status: int) -> None:
        self._rows.append((request.kind, request.intended_s, request.sent_s, time.monotonic(), status))

    def _send(self, line: Line, request: Request) -> None:
        line.request = request
        line.to_send = memoryview(self._plan.calls[request.kind].request)
        request.sent_s = time.monotonic()
        try:
            self._push(line)
        except OSError:
            self._lose(line)

    def _push(self, line: Line) -> None:
        assert line.socket is not None
        waited = len(line.to_send) > 0 and line.to_send.nbytes != len(self._plan.calls[line.request.kind if line.request else 0].request)
        with contextlib.suppress(BlockingIOError):
            while line.to_send:
                line.to_send = line.to_send[line.socket.send(line.to_send) :]
        if line.to_send or waited:
            self._epoll.modify(line.socket.fileno(), select.EPOLLIN | (select.EPOLLOUT if line.to_send else 0))

    def _pull(self, line: Line) -> None:
        assert line.socket is not None
        if line.filled == len(line.view):
            line.view = memoryview(bytearray(bytes(line.view)) + bytearray(len(line.view)))
        try:
            got = line.socket.recv_into(line.view[line.filled :])
        except BlockingIOError:
            return
        if not got or line.request is None:
            raise OSError("closed")
        line.filled += got
        if line.want < 0:
            end = bytes(line.view[: min(line.filled, 4096)]).find(b"\r\n\r\n")
            if end < 0:
                return
            _, size = frame_of(bytes(line.view[:end]))
            if size >= 0:
                line.want = end + 4 + size
            elif bytes(line.view[line.filled - 5 : line.filled]) == b"0\r\n\r\n":
                line.want = line.filled
        if 0 <= line.want <= line.filled:
            self._row(line.request, int(bytes(line.view[9:12])))
            line.request, line.filled, line.want = None, 0, -1
            self._free.append(line)


def grpc_loop(plan: Plan) -> tuple[float, list[tuple[int, float, float, float, int]]]:
    """A thread and a channel for each connection: grpcio's own way. Closed loops alone."""
    rows: list[tuple[int, float, float, float, int]] = []
    callers = [GrpcCaller(plan.calls[0]) for _ in range(plan.connections)]
    for caller in callers:
        caller()
    began = time.monotonic()

    def ask_again(caller: GrpcCaller) -> None:
        while (sent := time.monotonic()) < began + plan.seconds:
            try:
                caller()
                status = OK
            except Exception:  # noqa: BLE001 - whatever grpcio raises, it was no answer
                status = LOST
            rows.append((0, sent, sent, time.monotonic(), status))

    threads = [threading.Thread(target=ask_again, args=(caller,), daemon=True) for caller in callers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(plan.seconds + TIMEOUT_S)
    return began, rows


class Driven(contextlib.AbstractContextManager["Driven"]):
    """A plan that another process carries out from now on."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan = plan
        self._file = folder / f"load-{time.monotonic_ns()}.npz"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.load", str(self._file)], stdin=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(plan))
        self._process.stdin.close()

    def told(self) -> Told:
        """Wait for its end. Raises RuntimeError where it failed."""
        plan = self._plan
        if self._process.wait(plan.seconds + plan.drain_s + SLACK_S):
            raise RuntimeError(f"the client failed with status {self._process.returncode}")
        with np.load(self._file) as found:
            rows, (began_s, cpu_s) = found["rows"], found["times"].tolist()
        self._file.unlink()
        kind, intended, sent, done, status = rows.T
        return Told(kind.astype(int), intended, sent, done, status.astype(int), began_s, cpu_s, plan.seconds)

    def __exit__(self, *_: Any) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def driven(plan: Plan, folder: Path) -> Told:
    """Carry out a plan by another process, to its end."""
    with Driven(plan, folder) as client:
        return client.told()


@contextlib.contextmanager
def on_cores(cores: list[int]) -> Iterator[None]:
    """Whatever is started within runs on these, where any are given."""
    before = os.sched_getaffinity(0)
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def timed(work: Callable[[], object], calls: int) -> list[float]:
    """Milliseconds of each of so many calls."""
    took = []
    for _ in range(calls):
        started = time.perf_counter()
        work()
        took.append((time.perf_counter() - started) * 1000)
    return took


def main() -> None:
    """Carry out the plan on standard input."""
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    if plan.cores:
        os.sched_setaffinity(0, plan.cores)
    before_s = time.process_time()
    began_s, rows = grpc_loop(plan) if plan.calls[0].protocol == "grpc" else HttpLoop(plan).run()
    cpu_s = time.process_time() - before_s
    table = np.array(rows, "f8").reshape(-1, 5)
    np.savez(sys.argv[1], rows=table, times=np.array([began_s, cpu_s]))


if __name__ == "__main__":
    main()
