"""The worker takes from itself what it will not need again, so that its sandbox is not all that stands between a model and the box.

At the start, before a byte of the model is read and before there are threads: Landlock, in the kernel's own interface (landlock(7)).
Nothing may be executed, written but below /tmp and the socket directory, bound or connected by TCP, or signalled outside.
After loading, before the first request: a filter of system calls for every thread (seccomp(2), policy SERVING), and for the threads that
serve a second Landlock layer under which they may read libraries alone. A kernel without Landlock gives the
filter alone, and the worker says so; one without filters ends it.
"""

import contextlib
import platform
import sys
from pathlib import Path

from skerry.confine import bpf, policy
from skerry.confine.kernel import ConfineFailed, landlock, landlock_version, seccomp

__all__ = ["ConfineFailed", "before_loading", "before_serving", "landlock_version"]

_READ = (1 << 2) | (1 << 3)
_WRITE_FILE, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG, _MAKE_SOCK = 1 << 1, 1 << 5, 1 << 7, 1 << 8, 1 << 9
_REMOVE_DIR, _REFER, _TRUNCATE, _IOCTL_DEV = 1 << 4, 1 << 13, 1 << 14, 1 << 15
_WRITE = _WRITE_FILE | _REMOVE_FILE | _REMOVE_DIR | _MAKE_DIR | _MAKE_REG | _MAKE_SOCK | _REFER | _TRUNCATE


def before_loading(socket_dir: Path) -> int:
    """The first layer; returns Landlock's version, 0 where the kernel has none. Raises ConfineFailed."""
    rules = [("/", _READ), ("/tmp", _READ | _WRITE), (str(socket_dir), _READ | _WRITE)]  # noqa: S108 - the sandbox's own
    if Path("/dev/nvidiactl").exists():
        rules.append(("/dev", _READ | _WRITE_FILE | _IOCTL_DEV))
        rules.append(("/proc/self/task", _READ | _WRITE_FILE | _TRUNCATE))  # CUDA names its threads, or does not start
    return landlock(rules)


def before_serving(provider: str) -> str:
    """The second layer and the filter; returns what holds now, for people. Raises ConfineFailed."""
    libraries = [path for path in ("/usr/lib", "/usr/lib64", sys.base_prefix, sys.prefix) if path]
    is_gpu = provider != "CPUExecutionProvider"
    version = 0 if is_gpu else landlock([(path, _READ) for path in libraries])
    held = [f"landlock {version}"] if version else ["landlock before loading"] if is_gpu and landlock_version() else []
    with contextlib.suppress(bpf.UnknownArchitecture):
        seccomp(bpf.program(policy.SERVING_GPU if is_gpu else policy.SERVING, platform.machine()))
        held.append("seccomp")
    return ", ".join(held) or "nothing: this kernel has neither landlock nor seccomp for this machine"
