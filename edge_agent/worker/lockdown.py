"""The worker takes from itself what it will not need again, so that its sandbox is not all that stands between a model and the box.

At the start, before a byte of the model is read and before there are threads: Landlock, in the kernel's own interface (landlock(7)).
Nothing may be executed, written but below /tmp and the socket directory, bound or connected by TCP, or signalled outside.
After loading, before the first request: a filter of system calls for every thread (seccomp(2), policy SERVING), and for the threads that
serve a second Landlock layer under which they may read libraries alone. A kernel without Landlock gives the
filter alone, and the worker says so; one without filters ends it.
"""

import contextlib
import ctypes
import os
import platform
import struct
import sys
from pathlib import Path

from edge_agent.confine import bpf, policy
from edge_agent.confine.numbers import AARCH64, X86_64

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""landlock's system calls, the same on every architecture."""
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER = 1
_TSYNC, _LOG = 1, 2
"""SECCOMP_FILTER_FLAG_*: for all threads; what is refused is put into the kernel's log."""

_READ = (1 << 2) | (1 << 3)
_WRITE_FILE, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG, _MAKE_SOCK = 1 << 1, 1 << 5, 1 << 7, 1 << 8, 1 << 9
_REMOVE_DIR, _REFER, _TRUNCATE, _IOCTL_DEV = 1 << 4, 1 << 13, 1 << 14, 1 << 15
_WRITE = _WRITE_FILE | _REMOVE_FILE | _REMOVE_DIR | _MAKE_DIR | _MAKE_REG | _MAKE_SOCK | _REFER | _TRUNCATE
_FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15}
"""How many kinds of access to files a version of Landlock knows; 16 from the fifth on."""

_libc = ctypes.CDLL(None, use_errno=True)


class LockdownFailed(Exception):
    """The kernel offers a confinement and then did not give it; the text says which."""


def _call(number: int, *arguments: object) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def landlock_version() -> int:
    """The kernel's version of Landlock; 0 where there is none."""
    try:
        return _call(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_CREATE_RULESET_VERSION))
    except OSError:
        return 0


def _landlock(rules: list[tuple[str, int]]) -> int:
    """Allow this thread, and those that it starts, what ``rules`` (path, accesses) name and nothing else. Returns the version."""
    version = landlock_version()
    if version == 0:
        return 0
    files = (1 << _FS_BITS.get(version, 16)) - 1
    attributes = struct.pack("=QQQ", files, 0b11, 0b11)[: 8 if version < 4 else 16 if version < 6 else 24]
    try:
        ruleset = _call(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
        try:
            for path, access in rules:
                _allow(ruleset, path, access & files)
            if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
                raise LockdownFailed("no-new-privileges could not be set")
            _call(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
        finally:
            os.close(ruleset)
    except OSError as exc:
        raise LockdownFailed(f"landlock: {exc.strerror}") from exc
    return version


def _allow(ruleset: int, path: str, access: int) -> None:
    """A path that is not there needs no rule."""
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        rule = struct.pack("=Qi", access, parent)
        _call(_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_RULE_PATH_BENEATH), rule, ctypes.c_uint32(0))
    finally:
        os.close(parent)


def before_loading(socket_dir: Path) -> int:
    """The first layer; returns Landlock's version, 0 where the kernel has none. Raises LockdownFailed."""
    rules = [("/", _READ), ("/tmp", _READ | _WRITE), (str(socket_dir), _READ | _WRITE)]  # noqa: S108 - the sandbox's own
    if Path("/dev/nvidiactl").exists():
        rules.append(("/dev", _READ | _WRITE_FILE | _IOCTL_DEV))
        rules.append(("/proc/self/task", _READ | _WRITE_FILE | _TRUNCATE))  # CUDA names its threads, or does not start
    return _landlock(rules)


def before_serving(provider: str) -> str:
    """The second layer and the filter; returns what holds now, for people. Raises LockdownFailed."""
    libraries = [path for path in ("/usr/lib", "/usr/lib64", sys.base_prefix, sys.prefix) if path]
    is_gpu = provider != "CPUExecutionProvider"
    version = 0 if is_gpu else _landlock([(path, _READ) for path in libraries])
    held = [f"landlock {version}"] if version else ["landlock before loading"] if is_gpu and landlock_version() else []
    numbers = {"x86_64": X86_64, "aarch64": AARCH64}.get(platform.machine())
    if numbers is not None:
        program = bpf.program(policy.SERVING_GPU if is_gpu else policy.SERVING, platform.machine())
        _filter(program, numbers["seccomp"])
        held.append("seccomp")
    return ", ".join(held) or "nothing: this kernel has neither landlock nor seccomp for this machine"


def _filter(program: bytes, number: int) -> None:
    """Install a filter for all threads, with the kernel's log where it has one."""
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))  # struct sock_fprog
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    with contextlib.suppress(OSError):
        if _call(number, ctypes.c_uint(_SECCOMP_SET_MODE_FILTER), ctypes.c_uint(_TSYNC | _LOG), header) == 0:
            return
    try:
        thread = _call(number, ctypes.c_uint(_SECCOMP_SET_MODE_FILTER), ctypes.c_uint(_TSYNC), header)
    except OSError as exc:
        raise LockdownFailed(f"seccomp: {exc.strerror}") from exc
    if thread != 0:  # not an error to the kernel, and yet no thread has the filter
        raise LockdownFailed(f"seccomp: thread {thread} has a filter of its own")
