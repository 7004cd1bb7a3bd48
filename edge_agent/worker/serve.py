"""The worker's socket: frames in, frames out. One thread a connection; ONNX Runtime lets go of the interpreter while it computes."""

import contextlib
import socket
import threading
import time
from pathlib import Path

import msgspec

from edge_agent.worker.session import Refused, Session
from skerry.wire import codec, ipc, oip

MAX_CONNECTIONS = 64
RECEIVE_BYTES = 64 * 1024
CONTROL_TIMEOUT_S = 5.0


class _Reader:
    """Frames from one connection. Small ones come with one system call; the buffers are used again for the next frame."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._filled = 0
        self._taken = 0

    def frame(self) -> tuple[memoryview, memoryview] | None:
        """Header and body, good until the next call; None where the peer closed. Raises codec.Malformed over the limits."""
        left = self._filled - self._taken
        if left and self._taken:
            self._buffer[:left] = bytes(self._buffer[self._taken : self._filled])
        self._filled, self._taken = left, 0
        if not self._fill(ipc.PREFIX.size):
            return None
        header_bytes, body_bytes = ipc.parse_prefix(bytes(self._buffer[: ipc.PREFIX.size]))
        body_at = ipc.PREFIX.size + header_bytes
        end = body_at + body_bytes
        if not self._fill(end):
            return None
        self._taken = end
        return self._buffer[ipc.PREFIX.size : body_at], self._buffer[body_at:end]

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


def _send(connection: socket.socket, header: msgspec.Struct, body: list[oip.Bytes]) -> None:
    """A whole frame, with one system call where the kernel takes it all."""
    parts = [memoryview(part).cast("B") for part in ipc.frame(header, body) if len(part)]
    while parts:
        sent = connection.sendmsg(parts)
        while parts and sent >= len(parts[0]):
            sent -= len(parts.pop(0))
        if parts and sent:
            parts[0] = parts[0][sent:]


def _answer(session: Session, call: ipc.Call, body: memoryview) -> tuple[ipc.Answer, list[oip.Bytes]]:
    started = time.perf_counter_ns()
    try:
        outputs = session.run(ipc.tensors_of(call.inputs, body), call.outputs)
    except (Refused, codec.Malformed) as exc:
        return ipc.Answer(call.call, error=str(exc), refused=True), []
    except Exception as exc:  # noqa: BLE001 - whatever a model does in its run must become an answer, not a silent socket
        return ipc.Answer(call.call, error=f"{type(exc).__name__}: {str(exc)[:500]}"), []
    compute_us = (time.perf_counter_ns() - started) // 1000
    return ipc.Answer(call.call, ipc.heads_of(outputs), compute_us), [output.data for output in outputs]


def _serve_connection(connection: socket.socket, session: Session, hello: ipc.Hello, slots: threading.Semaphore) -> None:
    try:
        with connection:
            _send(connection, hello, [])
            reader = _Reader(connection)
            while (frame := reader.frame()) is not None:
                header, body = frame
                _send(connection, *_answer(session, ipc.parse_header(header, ipc.Call), body))
    except (OSError, codec.Malformed, MemoryError):
        return  # the peer went away or does not speak our protocol; its connection alone ends
    finally:
        slots.release()


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


def wait_for_load(path: Path) -> ipc.Load:
    """Wait at the Unix socket ``path`` until it is said what to load; whoever says nothing sensible is let go. The socket is gone then."""
    with listen(path) as listener:
        while True:
            connection, _ = listener.accept()
            connection.settimeout(CONTROL_TIMEOUT_S)
            with connection, contextlib.suppress(OSError, codec.Malformed):
                frame = _Reader(connection).frame()
                if frame is not None:
                    load = ipc.parse_header(frame[0], ipc.Load)
                    path.unlink(missing_ok=True)
                    return load


def serve(listener: socket.socket, session: Session, hello: ipc.Hello) -> None:
    """Accept connections for ever."""
    slots = threading.Semaphore(MAX_CONNECTIONS)
    with listener:
        while True:
            slots.acquire()
            connection, _ = listener.accept()
            threading.Thread(target=_serve_connection, args=(connection, session, hello, slots), daemon=True).start()
