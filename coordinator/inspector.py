"""Looks into a pushed model, as a process of its own that has nothing but the file: what the file does to it happens to nobody else.

``python -m coordinator.inspector FD``: the model is open as FD, the kept state's tensors come as JSON on stdin, a Verdict goes to stdout.
Before the first byte is read it gives up the file system and the network (Landlock), and every system call that it does not need
(policy INSPECTING); its memory and time are bounded. What is looked at: coordinator/core/onnx_file.
"""

import contextlib
import mmap
import os
import platform
import resource
import sys

import msgspec

from coordinator.core import onnx_file
from skerry.confine import bpf, kernel, policy
from skerry.wire import codec
from skerry.wire.messages import StateTensor

MOST_S = 120.0
MOST_DATA_BYTES = 512 * 2**20
"""Beside the file itself, which is mapped."""
MOST_ANSWER = 64 * 1024


class Verdict(msgspec.Struct, frozen=True):
    """What is wrong with a file: a short fixed ``code``, and why. Both are empty where nothing is."""

    code: str = ""
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


def main(descriptor: int) -> None:
    """Answer on stdout."""
    state = codec.decode(sys.stdin.buffer.read(), list[StateTensor], max_bytes=codec.NO_LIMIT_BYTES)
    if os.fstat(descriptor).st_size == 0:
        verdict = Verdict("not_onnx", "the file is empty")
    else:
        _limit()
        with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as mapped:
            confine()
            view = memoryview(mapped)
            verdict = _judge(view, state)
            view.release()
    sys.stdout.buffer.write(codec.encode(verdict))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
