"""Looks into a pushed model, as a process of its own that has nothing but the file: what the file does to it happens to nobody else.

``python -m coordinator.inspector FD``: the model is open as FD, the kept state's tensors come as JSON on stdin, a Verdict goes to stdout.
``python -m coordinator.inspector FD graph``: a Drawn goes to stdout, the network that is in it.
Before the first byte is read it gives up the file system and the network (Landlock), and every system call that it does not need
(policy INSPECTING); its memory and time are bounded. What is looked at: coordinator/core/onnx_file and onnx_graph.
"""

import contextlib
import mmap
import os
import platform
import resource
import sys
from collections.abc import Callable

import msgspec

from coordinator.core import onnx_file, onnx_graph
from skerry.confine import bpf, kernel, policy
from skerry.wire import codec
from skerry.wire.messages import StateTensor
from skerry.wire.model_graph import ModelGraph

MOST_S = 120.0
MOST_DATA_BYTES = 512 * 2**20
"""Beside the file itself, which is mapped."""
MOST_ANSWER = 64 * 1024
MOST_GRAPH_BYTES = 8 * 2**20


class Verdict(msgspec.Struct, frozen=True):
    """What is wrong with a file: a short fixed ``code``, and why. Both are empty where nothing is."""

    code: str = ""
    reason: str = ""


class Drawn(msgspec.Struct, frozen=True):
    """The network in a file, or why it can't be told."""

    graph: ModelGraph | None = None
    reason: str = ""


def _limit() -> None:
    for kind, most in (
        (resource.RLIMIT_DATA, MOST_DATA_BYTES),
        (resource.RLIMIT_CPU, int(MOST_S)),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def confine() -> None:
    """Give up all but what is open. Raises ConfineFailed where the kernel has a confinement and does not give it."""
    kernel.landlock([])
    with contextlib.suppress(bpf.UnknownArchitecture):
        kernel.seccomp(bpf.program(policy.INSPECTING, platform.machine()))


def _judge(view: memoryview, state: list[StateTensor]) -> Verdict:
    try:
        onnx_file.check(view)
        onnx_file.check_state(view, state)
    except onnx_file.NotOnnx as exc:
        return Verdict("not_onnx", str(exc))
    except onnx_file.NoSuchTensor as exc:
        return Verdict("invalid_state", f"state: {exc}")
    return Verdict()


def _draw(view: memoryview) -> Drawn:
    try:
        drawn = Drawn(onnx_graph.graph(view))
    except onnx_file.NotOnnx as exc:
        return Drawn(reason=str(exc))
    return drawn if len(codec.encode(drawn)) <= MOST_GRAPH_BYTES else Drawn(reason="the network is too large to be shown")


def _look(descriptor: int, judge: Callable[[memoryview], msgspec.Struct]) -> msgspec.Struct:
    if os.fstat(descriptor).st_size == 0:
        return Verdict("not_onnx", "the file is empty")
    _limit()
    mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)  # until the process ends
    confine()
    return judge(memoryview(mapped))


def main(descriptor: int, what: str = "") -> None:
    """Answer on stdout."""
    if what == "graph":
        answer = _look(descriptor, _draw)
    else:
        state = codec.decode(sys.stdin.buffer.read(), list[StateTensor], max_bytes=codec.NO_LIMIT_BYTES)
        answer = _look(descriptor, lambda view: _judge(view, state))
    sys.stdout.buffer.write(codec.encode(answer))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
