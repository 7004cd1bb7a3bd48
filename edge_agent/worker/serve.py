"""The worker's socket: frames in, frames out. One thread a connection; ONNX Runtime lets go of the interpreter while it computes."""

import socket
import threading
import time
from pathlib import Path

import msgspec

from edge_agent.worker.session import Refused, Session
from skerry.wire import codec, ipc, oip

MAX_CONNECTIONS = 64


def _read_exactly(connection: socket.socket, size: int) -> memoryview | None:
    """``size`` bytes, or None where the peer closed."""
    buffer = memoryview(bytearray(size))
    done = 0
    while done < size:
        got = connection.recv_into(buffer[done:])
        if got == 0:
            return None
        done += got
    return buffer


def _send(connection: socket.socket, header: msgspec.Struct, body: list[oip.Bytes]) -> None:
    for part in ipc.frame(header, body):
        connection.sendall(part)


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
            while (prefix := _read_exactly(connection, ipc.PREFIX.size)) is not None:
                header_bytes, body_bytes = ipc.parse_prefix(bytes(prefix))
                header, body = _read_exactly(connection, header_bytes), _read_exactly(connection, body_bytes)
                if header is None or body is None:
                    return
                _send(connection, *_answer(session, ipc.parse_header(header, ipc.Call), body))
    except (OSError, codec.Malformed, MemoryError):
        return  # the peer went away or does not speak our protocol; its connection alone ends
    finally:
        slots.release()


def serve(path: Path, session: Session, hello: ipc.Hello) -> None:
    """Accept connections on the Unix socket ``path`` for ever."""
    slots = threading.Semaphore(MAX_CONNECTIONS)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        staging = path.with_name(path.name + ".new")
        staging.unlink(missing_ok=True)
        listener.bind(str(staging))
        listener.listen(MAX_CONNECTIONS)
        staging.chmod(0o660)  # the gateway is another user of the same group
        staging.rename(path)  # whoever sees the path can connect
        while True:
            slots.acquire()
            connection, _ = listener.accept()
            threading.Thread(target=_serve_connection, args=(connection, session, hello, slots), daemon=True).start()
