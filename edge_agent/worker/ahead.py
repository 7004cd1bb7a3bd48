"""What a worker does while nobody waits for it yet, so that its model then loads faster; and what it gives back once it serves.

Half of a first load is not the model's: pages of the heap that the kernel has to find and clear one by one, and parts of ONNX Runtime that
are set up or read from disk when they are first used. In a sandbox whose kernel is gVisor both cost several times as much.
"""

import contextlib
import ctypes
import fcntl
import math
import mmap
import os
import socket
import threading
from pathlib import Path

from edge_agent.worker import frames, serve
from edge_agent.worker.session import Session
from skerry.wire import ipc

HEAP_BYTES = 16 * 2**20
"""About what loading a model of a few megabytes takes at its peak; a waiting worker holds it."""
GIVE_BACK_AFTER_S = 1.0
SERVE_ONCE_WITHIN_S = 10.0
SMALL_MODEL = Path(__file__).with_name("small.onnx")
"""Some of what most networks do, in the smallest size: convolution, recurrence, shapes that can be computed ahead."""
INPUT_SHAPE = (1, 1, 8)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST_THRESHOLD_BYTES = 32 * 2**20
"""What glibc itself raises its thresholds to once a block of that size was freed (mallopt(3)); that for trimming is twice as much."""

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
    worker = serve.Worker(Session(SMALL_MODEL, threads=1, warmup=[]))
    size = 4 * math.prod(INPUT_SHAPE)
    call = ipc.Call(1, [ipc.TensorHead("x", "FP32", INPUT_SHAPE, size, at=0)], room=ipc.Room(mmap.PAGESIZE, mmap.PAGESIZE))
    ours, its = socket.socketpair()
    with ours:
        ours.settimeout(SERVE_ONCE_WITHIN_S)
        server = threading.Thread(target=serve.serve_connection, args=(its, worker, threading.Semaphore()), daemon=True)
        server.start()
        memory = _memory(2 * mmap.PAGESIZE)
        try:
            socket.send_fds(ours, ipc.frame(ipc.Attach(2 * mmap.PAGESIZE), []), [memory])
        finally:
            os.close(memory)
        ours.sendall(b"".join(ipc.frame(ipc.Batch([call]), [])))
        ours.shutdown(socket.SHUT_WR)
        while ours.recv(frames.RECEIVE_BYTES):
            pass
        server.join()


def _memory(size_bytes: int) -> int:
    """A descriptor of memory as a gateway makes it."""
    descriptor = os.memfd_create("ahead", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return descriptor


def give_back_soon() -> None:
    """Once the first requests are through, return to the kernel what loading needed and serving does not."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim.argtypes = [ctypes.c_size_t]
        timer = threading.Timer(GIVE_BACK_AFTER_S, trim, args=(0,))
        timer.daemon = True
        timer.start()
