"""What the kernel's log says of system calls that it refused to our sandboxes (audit record 1326, kernel/auditsc.c).

Read where the kernel lets the warden: /dev/kmsg is root's on most boxes. A sandbox is known by its user id, which nobody else has.
"""

import os
import platform
import re
from collections import Counter

import msgspec

from skerry.confine.numbers import AARCH64, X86_64

MOST_RECORDS = 2000
"""Records that one look reads; the kernel keeps the rest."""
_RECORD_BYTES = 8192
_SECCOMP = re.compile(r"type=1326 .*?\buid=(\d+) .*?\bsig=(\d+) .*?\bsyscall=(\d+) ")
_QUOTED = re.compile(r'"[^"]*"')
"""What a process may call itself; the kernel writes names with a quote or a space in them as hexadecimal digits."""
_NAMES = {number: name for name, number in (AARCH64 if platform.machine() == "aarch64" else X86_64).items()}
_EXPECTED = {"clone3"}
"""Refused to every thread that is made, so that libraries ask for clone: nobody's fault."""


class RefusedCall(msgspec.Struct, frozen=True):
    """A system call that was refused to a sandbox of that user id; ``is_killed`` where it ended the process."""

    uid: int
    call: str
    is_killed: bool


def refused_call(record: str) -> RefusedCall | None:
    """What a record of the kernel's log says of a refused call; None for every other record."""
    found = _SECCOMP.search(_QUOTED.sub("", record))
    if found is None:
        return None
    uid, signal, number = (int(text) for text in found.groups())
    name = _NAMES.get(number, f"number {number}")
    return None if name in _EXPECTED and not signal else RefusedCall(uid, name, signal != 0)


class KernelLog:
    """The log from now on. ``new_refusals`` gives nothing where it may not be read."""

    def __init__(self) -> None:
        self._descriptor = -1
        try:
            self._descriptor = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._descriptor, 0, os.SEEK_END)
        except OSError:
            self.close()

    @property
    def is_readable(self) -> bool:
        """Whether the kernel lets us read it."""
        return self._descriptor >= 0

    def new_refusals(self) -> Counter[RefusedCall]:
        """What was refused since the last look, and how often."""
        found: Counter[RefusedCall] = Counter()
        for _ in range(MOST_RECORDS if self.is_readable else 0):
            try:
                record = os.read(self._descriptor, _RECORD_BYTES)
            except BlockingIOError:
                break
            except BrokenPipeError:
                continue  # the kernel overwrote what was not read yet
            except OSError:
                self.close()
                break
            refused = refused_call(record.decode(errors="replace"))
            if refused is not None:
                found[refused] += 1
        return found

    def close(self) -> None:
        """Let go of it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
