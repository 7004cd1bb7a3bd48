"""A worker in an enemy's hands: what it says to the gateway and the warden, one socket for each way to misbehave.

The frames are written out plainly here: the sandbox sees no code of the product.
"""

import contextlib
import fcntl
import json
import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .bombs import tell
from .verdict import World, name_of

MIB = 2**20
GIB = 2**30
SWELL_BYTES = 192 * MIB
Connection = socket.socket


def _frame(header: object, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<II", len(text), len(body)) + text + body


HELLO = _frame({"inputs": [], "outputs": [], "provider": "hostile", "load_ms": 1.0, "warm": True})


SHARING = _frame({"inputs": [], "outputs": [], "provider": "hostile", "load_ms": 1.0, "warm": True, "shares_memory": True})


def _asked(connection: Connection) -> dict[str, Any]:
    """Read one call."""
    stream = connection.makefile("rb")
    header_bytes, body_bytes = struct.unpack("<II", stream.read(8))
    (call,) = json.loads(stream.read(header_bytes))["calls"]
    stream.read(body_bytes)
    return dict(call)


def _call_of(connection: Connection) -> int:
    """Read one call and return its number."""
    return int(_asked(connection)["call"])


def _answers(number: int, head: dict[str, object]) -> dict[str, object]:
    return {"answers": [{"call": number, "outputs": [head], "compute_us": 1}]}


def _answer(number: int, size_bytes: int) -> dict[str, object]:
    return _answers(number, {"name": "y", "datatype": "FP32", "shape": [1, 2], "size_bytes": size_bytes})


def _attached(connection: Connection) -> tuple[int, int]:
    """Offer to share memory, and take it: its descriptor and its size."""
    connection.sendall(SHARING)
    data, descriptors, _, _ = socket.recv_fds(connection, 4096, 4)
    size: int = json.loads(data[8:])["size_bytes"]
    return descriptors[0], size


def silent(_: Connection) -> None:
    """Accepts a connection and says nothing."""


def trickle(connection: Connection) -> None:
    """Says who it is at a byte in 0.2 s."""
    for byte in _frame({"provider": "x" * 4000}):
        connection.sendall(bytes([byte]))
        time.sleep(0.2)


def garbage(connection: Connection) -> None:
    """Begins with bytes that are no frame."""
    connection.sendall(b"\xff" * 65536)


def huge_header(connection: Connection) -> None:
    """Announces a header of 512 MiB and begins to send it."""
    connection.sendall(struct.pack("<II", 512 * MIB, 0) + b"[" * MIB)


def deep_header(connection: Connection) -> None:
    """Sends a header of a million nested brackets."""
    text = b"[" * (MIB - 16)
    connection.sendall(struct.pack("<II", len(text), 0) + text)


def swollen_hello(connection: Connection) -> None:
    """Says who it is with 192 MiB behind it."""
    text = b"{}"
    connection.sendall(struct.pack("<II", len(text), SWELL_BYTES) + text)
    for _ in range(SWELL_BYTES // MIB):
        connection.sendall(bytes(b"x" * MIB))


def swells_when_idle(connection: Connection) -> None:
    """Sends 192 MiB of one frame while no call is under way."""
    connection.sendall(HELLO + struct.pack("<II", 2, SWELL_BYTES + 1) + b"{}")
    for _ in range(SWELL_BYTES // MIB):
        connection.sendall(b"x" * MIB)


def never_answers(connection: Connection) -> None:
    """Takes a call and never answers it."""
    connection.sendall(HELLO)
    _call_of(connection)


def answers_garbage(connection: Connection) -> None:
    """Answers a call with bytes that are no frame."""
    connection.sendall(HELLO)
    _call_of(connection)
    connection.sendall(b"\xfe" * 65536)


def answers_another_call(connection: Connection) -> None:
    """Answers a call that nobody made."""
    connection.sendall(HELLO)
    connection.sendall(_frame(_answer(_call_of(connection) + 1, 8), bytes(8)))


def floods(connection: Connection) -> None:
    """Sends answers that nobody asked for, without end."""
    connection.sendall(HELLO)
    frames = _frame(_answer(1, 8), bytes(8)) * 1000
    for _ in range(500):
        connection.sendall(frames)


def announces_a_gibibyte(connection: Connection) -> None:
    """Answers a call with a frame of 1 GiB, of which nothing comes."""
    connection.sendall(HELLO)
    text = json.dumps(_answer(_call_of(connection), GIB)).encode()
    connection.sendall(struct.pack("<II", len(text), GIB) + text)


def breaks_off(connection: Connection) -> None:
    """Goes away in the middle of an answer."""
    connection.sendall(HELLO)
    whole = _frame(_answer(_call_of(connection), 4096), bytes(4096))
    connection.sendall(whole[:200])
    connection.close()


def lies_about_sizes(connection: Connection) -> None:
    """Answers with a tensor whose bytes do not fit its shape."""
    connection.sendall(HELLO)
    connection.sendall(_frame(_answer(_call_of(connection), 4000), bytes(4000)))


def shared_memory_truncated(connection: Connection) -> None:
    """Shortens or lengthens shared memory while the gateway uses it, so that the gateway dies of SIGBUS."""
    descriptor, size = _attached(connection)
    for act in (
        lambda: os.ftruncate(descriptor, 0),
        lambda: os.ftruncate(descriptor, 2 * size),
        lambda: fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        lambda: os.truncate(f"/proc/self/fd/{descriptor}", 0),
    ):
        with contextlib.suppress(OSError):
            act()
            break
    else:
        return
    asked = _asked(connection)
    connection.sendall(_frame(_answer(asked["call"], 8), bytes(8)))


def shared_memory_changed(connection: Connection) -> None:
    """Changes a tensor in shared memory after the gateway has checked it."""
    descriptor, size = _attached(connection)
    memory = mmap.mmap(descriptor, size)
    asked = _asked(connection)
    at = asked["room"]["at"]
    memory[at : at + 8] = struct.pack("<I", 4) + b"abcd"
    connection.sendall(_frame(_answers(asked["call"], {"name": "y", "datatype": "BYTES", "shape": [1], "size_bytes": 8, "at": at})))
    until = time.monotonic() + 5
    while time.monotonic() < until:
        memory[at : at + 4] = struct.pack("<I", 2**31)
        memory[at : at + 8] = struct.pack("<I", 4) + b"wxyz"


def answers_beyond_shared_memory(connection: Connection) -> None:
    """Answers with a tensor that lies beyond the end of the shared memory."""
    _, size = _attached(connection)
    head = {"name": "y", "datatype": "FP32", "shape": [1, 2], "size_bytes": 8, "at": size - 4}
    connection.sendall(_frame(_answers(_asked(connection)["call"], head)))


def answers_outside_its_room(connection: Connection) -> None:
    """Answers with a tensor that lies where another request's may lie."""
    _attached(connection)
    head = {"name": "y", "datatype": "FP32", "shape": [1, 2], "size_bytes": 8, "at": 0}
    connection.sendall(_frame(_answers(_asked(connection)["call"], head)))


WAYS: dict[str, Callable[[Connection], None]] = {
    way.__name__.replace("_", "-"): way
    for way in (
        *(silent, trickle, garbage, huge_header, deep_header, swollen_hello, swells_when_idle, never_answers, answers_garbage),
        *(answers_another_call, floods, announces_a_gibibyte, breaks_off, lies_about_sizes),
        *(shared_memory_truncated, shared_memory_changed, answers_beyond_shared_memory, answers_outside_its_room),
    )
}


def _serve(listener: socket.socket, way: Callable[[Connection], None]) -> None:
    while True:
        connection, _ = listener.accept()

        def handle(connection: Connection = connection) -> None:
            with contextlib.suppress(OSError, ValueError, KeyError, struct.error):
                way(connection)
                time.sleep(30)  # the other end is to give up first

        threading.Thread(target=handle, daemon=True).start()


def serve(world: World) -> None:
    """One socket for each way, and beside them what is no socket: links to what others listen on, a folder, a pipe, a file."""
    folder = Path(world.socket_dir)
    for name, way in WAYS.items():
        (folder / name).mkdir()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / name / "worker.sock"))
        (folder / name / "worker.sock").chmod(0o666)
        listener.listen(64)
        threading.Thread(target=_serve, args=(listener, way), daemon=True).start()
    beside: dict[str, Callable[[Path], object]] = {
        "link-to-the-host": lambda path: path.symlink_to(world.unix_socket),
        "link-to-a-neighbour": lambda path: path.symlink_to(f"{world.neighbour_dir}/worker.sock"),
        "folder": lambda path: path.mkdir(),
        "pipe": os.mkfifo,
        "file": lambda path: path.write_text("no socket"),
    }
    refused = {}
    for name, make in beside.items():
        try:
            (folder / name).mkdir()
            make(folder / name / "worker.sock")
        except OSError as exc:
            refused[name] = name_of(exc)
    tell(ready=True, refused=refused)
    time.sleep(120)
