"""The worker's socket: frames in, frames out. One thread a connection; ONNX Runtime lets go of the interpreter while it computes."""

import contextlib
import socket
import threading
import time
from pathlib import Path

from edge_agent.worker.frames import MAX_CONNECTIONS, Reader, listen, send
from edge_agent.worker.session import Refused, Session
from skerry.wire import codec, ipc, oip

CONTROL_TIMEOUT_S = 5.0


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


def serve_connection(connection: socket.socket, session: Session, hello: ipc.Hello, slots: threading.Semaphore) -> None:
    """Answer calls until the peer hangs up; frees a place in ``slots`` then."""
    try:
        with connection:
            send(connection, hello, [])
            reader = Reader(connection)
            while (frame := reader.frame()) is not None:
                header, body = frame
                send(connection, *_answer(session, ipc.parse_header(header, ipc.Call), body))
    except (OSError, codec.Malformed, MemoryError):
        return  # the peer went away or does not speak our protocol; its connection alone ends
    finally:
        slots.release()


def wait_for_load(path: Path) -> ipc.Load:
    """Wait at the Unix socket ``path`` until it is said what to load; whoever says nothing sensible is let go. The socket is gone then."""
    with listen(path) as listener:
        while True:
            connection, _ = listener.accept()
            connection.settimeout(CONTROL_TIMEOUT_S)
            with connection, contextlib.suppress(OSError, codec.Malformed):
                frame = Reader(connection).frame()
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
            threading.Thread(target=serve_connection, args=(connection, session, hello, slots), daemon=True).start()
