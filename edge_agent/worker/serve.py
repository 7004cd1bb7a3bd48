"""The worker's socket: frames in, frames out. One thread a connection, which reads the next frame when the last one is answered."""

import contextlib
import os
import socket
import sys
import threading
from pathlib import Path

import msgspec

from edge_agent.worker.calls import Calls
from edge_agent.worker.frames import MAX_CONNECTIONS, Reader, listen, send
from edge_agent.worker.memory import CantMap, Memory, attach
from edge_agent.worker.session import Session
from skerry.wire import codec, ipc

CONTROL_TIMEOUT_S = 5.0


class Worker:
    """What all connections share: the calls' desk, and what each connection is told first."""

    def __init__(self, session: Session, *, confinement: str = "") -> None:
        self.calls = Calls(session)
        self.refused = 0
        self.hello = ipc.Hello(
            session.inputs,
            session.outputs,
            session.provider,
            session.load_ms,
            session.warm,
            confinement,
            shares_memory=True,
            batches=session.batches,
            state=session.state,
        )

    def refuse(self, why: codec.Malformed) -> None:
        """Count who does not speak our protocol, and say so now and then: the log is bounded, and others want room in it."""
        self.refused += 1
        if self.refused & (self.refused - 1) == 0:
            sys.stderr.write(f"frame.malformed count={self.refused} {str(why)[:200]}\n")

    def attach(self, header: memoryview, body: memoryview, descriptors: list[int]) -> Memory:
        """The memory that a connection's first frame came with. Raises codec.Malformed; where it is this kernel that does not map it, the
        next connection is told so."""
        if len(descriptors) != 1 or len(body):
            raise codec.Malformed(f"attach: {len(descriptors)} descriptors and a body of {len(body)} bytes, one descriptor is expected")
        try:
            return attach(descriptors[0], ipc.parse_header(header, ipc.Attach).size_bytes)
        except CantMap as exc:
            self.hello = msgspec.structs.replace(self.hello, shares_memory=False)
            raise codec.Malformed(f"attach: {exc}") from exc


def _first(reader: Reader, worker: Worker) -> tuple[tuple[memoryview, memoryview] | None, Memory | None]:
    """The first frame with calls, and the memory that was attached before it, if any."""
    try:
        frame = reader.first()
        if frame is None or not reader.descriptors:
            return frame, None
        memory = worker.attach(*frame, reader.descriptors)
    finally:
        for descriptor in reader.descriptors:
            os.close(descriptor)
        reader.descriptors.clear()
    try:
        return reader.frame(), memory
    except (OSError, codec.Malformed, MemoryError):
        memory.close()
        raise


def serve_connection(connection: socket.socket, worker: Worker, slots: threading.Semaphore) -> None:
    """Answer batches, in their order, until the peer hangs up; frees a place in ``slots`` then."""
    memory: Memory | None = None
    try:
        with connection:
            send(connection, worker.hello, [])
            reader = Reader(connection)
            frame, memory = _first(reader, worker)
            while frame is not None:
                send(connection, *worker.calls.answer(*frame, memory, by=reader))
                frame = reader.frame()
    except codec.Malformed as exc:
        worker.refuse(exc)  # its connection alone ends
    except (OSError, MemoryError):
        return  # the peer went away
    finally:
        if memory is not None:
            memory.close()
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


def serve(listener: socket.socket, worker: Worker) -> None:
    """Accept connections for ever."""
    slots = threading.Semaphore(MAX_CONNECTIONS)
    with listener:
        while True:
            slots.acquire()
            connection, _ = listener.accept()
            threading.Thread(target=serve_connection, args=(connection, worker, slots), daemon=True).start()
