"""What a worker does while nobody waits for it yet, so that its model then loads faster; and what it gives back once it serves.

Half of a first load is not the model's: pages of the heap that the kernel has to find and clear one by one, and parts of ONNX Runtime that
are set up or read from disk when they are first used. In a sandbox whose kernel is gVisor both cost several times as much.
"""

import contextlib
import ctypes
import math
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_agent.worker import serve
from edge_agent.worker.session import Session
from skerry.wire import ipc

HEAP_BYTES = 16 * 2**20
"""About what loading a model of a few megabytes takes at its peak; a waiting worker holds it."""
GIVE_BACK_AFTER_S = 1.0
SERVE_ONCE_WITHIN_S = 10.0
INPUT_SHAPE = (1, 1, 8)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST_THRESHOLD_BYTES = 32 * 2**20
"""What glibc itself raises its thresholds to once a block of that size was freed (mallopt(3)); that for trimming is twice as much."""

_INT64, _FLOAT = 7, 1
_VARINT, _BYTES = 0, 2

_libc = ctypes.CDLL(None)


def prepare() -> None:
    """For a worker that waits for its model. Nothing here is needed: where it can't be done, the load is as slow as it was."""
    with contextlib.suppress(AttributeError):  # a C library without these
        _fill_heap()
    with contextlib.suppress(Exception):  # an ONNX Runtime that does not like our model
        _serve_once()


def _fill_heap() -> None:
    """Have pages in the heap, and keep them there when they are freed."""
    _libc.malloc.restype, _libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    _libc.free.restype, _libc.free.argtypes = None, [ctypes.c_void_p]
    _libc.mallopt(_M_MMAP_THRESHOLD, _MOST_THRESHOLD_BYTES)
    _libc.mallopt(_M_TRIM_THRESHOLD, 2 * _MOST_THRESHOLD_BYTES)
    block = _libc.malloc(HEAP_BYTES)
    if block:
        ctypes.memset(block, 1, HEAP_BYTES)
        _libc.free(block)


def _serve_once() -> None:
    """Load a small model and answer one call on a connection, as the real one will: what is used for the first time is used here."""
    import tempfile  # a worker that has its model already does without

    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(small_model())
        file.flush()
        session = Session(Path(file.name), threads=1, warmup=[])
    content = bytes(4 * math.prod(INPUT_SHAPE))
    call = ipc.Call(1, [ipc.TensorHead("x", "FP32", INPUT_SHAPE, len(content))])
    ours, its = socket.socketpair()
    with ours:
        ours.settimeout(SERVE_ONCE_WITHIN_S)
        slots = threading.Semaphore()
        hello = ipc.Hello(session.inputs, session.outputs, session.provider)
        server = threading.Thread(target=serve.serve_connection, args=(its, session, hello, slots), daemon=True)
        server.start()
        ours.sendall(b"".join(ipc.frame(call, [content])))
        ours.shutdown(socket.SHUT_WR)
        while ours.recv(serve.RECEIVE_BYTES):
            pass
        server.join()


def give_back_soon() -> None:
    """Once the first requests are through, return to the kernel what loading needed and serving does not."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim.argtypes = [ctypes.c_size_t]
        timer = threading.Timer(GIVE_BACK_AFTER_S, trim, args=(0,))
        timer.daemon = True
        timer.start()


# -- a model, written out in its format (onnx.proto3; the encoding of protocol buffers)


def _varint(number: int) -> bytes:
    parts = []
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3 | _VARINT) + _varint(value)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


def _node(kind: str, inputs: Sequence[str], output: str, attributes: bytes = b"") -> bytes:
    """In a GraphProto."""
    names = b"".join(_field(1, name) for name in inputs) + _field(2, output)
    return _field(1, names + _field(4, kind) + attributes)


def _integers(name: str, numbers: Sequence[int]) -> bytes:
    """In a NodeProto: an attribute that is a list of integers."""
    return _field(5, _field(1, name) + b"".join(_field(8, number) for number in numbers) + _field(20, 7))


def _weights(name: str, shape: Sequence[int], kind: int = _FLOAT, content: bytes = b"") -> bytes:
    """In a GraphProto: an initializer, of ones where its content is not given."""
    data = content or np.ones(shape, np.float32).tobytes()
    return _field(5, b"".join(_field(1, extent) for extent in shape) + _field(2, kind) + _field(8, name) + _field(9, data))


def _value(number: int, name: str, shape: Sequence[int]) -> bytes:
    """In a GraphProto: an input (11) or an output (12) of floats."""
    extents = b"".join(_field(1, _field(1, extent)) for extent in shape)
    return _field(number, _field(1, name) + _field(2, _field(1, _field(1, _FLOAT) + _field(2, extents))))


def small_model() -> bytes:
    """Some of what most networks do, in the smallest size: convolution, recurrence, shapes that can be computed ahead."""
    graph = b"".join(
        [
            _node("Conv", ["x", "filter"], "c", _integers("pads", [1, 1])),
            _node("Relu", ["c"], "r"),
            _node("Transpose", ["r"], "t", _integers("perm", [2, 0, 1])),
            _node("LSTM", ["t", "w", "u"], "l", _field(5, _field(1, "hidden_size") + _field(3, 4) + _field(20, 2))),
            _node("Squeeze", ["l", "one"], "s"),
            _node("MatMul", ["t", "m"], "p"),
            _node("Sigmoid", ["p"], "g"),
            _node("Shape", ["g"], "h"),
            _node("Reshape", ["g", "h"], "y"),
            _field(2, "small"),
            _weights("filter", [4, 1, 3]),
            _weights("w", [1, 16, 4]),
            _weights("u", [1, 16, 4]),
            _weights("m", [4, 4]),
            _weights("one", [1], _INT64, (1).to_bytes(8, "little")),
            _value(11, "x", INPUT_SHAPE),
            _value(12, "y", [8, 1, 4]),
            _value(12, "s", [8, 1, 4]),
        ]
    )
    return _field(1, 8) + _field(7, graph) + _field(8, _field(2, 17))
