"""What a program asks of the kernel to confine itself: Landlock (landlock(7)) and filters of system calls (seccomp(2)). No way back."""

import contextlib
import ctypes
import os
import platform
import struct
from collections.abc import Mapping

from skerry.confine.bpf import UnknownArchitecture
from skerry.confine.numbers import AARCH64, X86_64

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""landlock's system calls, the same on every architecture."""
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER = 1
_TSYNC, _LOG = 1, 2
"""SECCOMP_FILTER_FLAG_*: for all threads; what is refused is put into the kernel's log."""

_FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15}
"""How many kinds of access to files a version of Landlock knows; 16 from the fifth on."""

_libc = ctypes.CDLL(None, use_errno=True)


class ConfineFailed(Exception):
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


def landlock(rules: list[tuple[str, int]]) -> int:
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
                raise ConfineFailed("no-new-privileges could not be set")
            _call(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
        finally:
            os.close(ruleset)
    except OSError as exc:
        raise ConfineFailed(f"landlock: {exc.strerror}") from exc
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


def numbers() -> Mapping[str, int]:
    """This machine's numbers of system calls. Raises UnknownArchitecture."""
    known = {"x86_64": X86_64, "aarch64": AARCH64}.get(platform.machine())
    if known is None:
        raise UnknownArchitecture(f"no table of system calls for {platform.machine()!r}")
    return known


def seccomp(program: bytes) -> None:
    """Install a filter for all threads, with the kernel's log where it has one. Raises ConfineFailed."""
    number = numbers()["seccomp"]
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))  # struct sock_fprog
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    with contextlib.suppress(OSError):
        if _call(number, ctypes.c_uint(_SECCOMP_SET_MODE_FILTER), ctypes.c_uint(_TSYNC | _LOG), header) == 0:
            return
    try:
        thread = _call(number, ctypes.c_uint(_SECCOMP_SET_MODE_FILTER), ctypes.c_uint(_TSYNC), header)
    except OSError as exc:
        raise ConfineFailed(f"seccomp: {exc.strerror}") from exc
    if thread != 0:  # not an error to the kernel, and yet no thread has the filter
        raise ConfineFailed(f"seccomp: thread {thread} has a filter of its own")
