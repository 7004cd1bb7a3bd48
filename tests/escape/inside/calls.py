"""Raw system calls by name, for those that Python does not offer."""

import ctypes
import errno
import os
import platform
import signal

from .verdict import REFUSED, Verdict, say

X86_64 = {
    "acct": 163, "add_key": 248, "bpf": 321, "chroot": 161, "clock_settime": 227, "clone": 56, "delete_module": 176, "finit_module": 313,
    "fsopen": 430, "init_module": 175, "io_uring_setup": 425, "ioperm": 173, "iopl": 172, "kcmp": 312, "kexec_load": 246, "keyctl": 250,
    "modify_ldt": 154, "mount": 165, "open_by_handle_at": 304, "open_tree": 428, "perf_event_open": 298, "personality": 135,
    "pidfd_getfd": 438, "pidfd_open": 434, "pivot_root": 155, "process_vm_readv": 310, "ptrace": 101, "quotactl": 179, "reboot": 169,
    "setdomainname": 171, "sethostname": 170, "setns": 308, "settimeofday": 164, "swapon": 167, "syslog": 103, "umount2": 166,
    "unshare": 272, "userfaultfd": 323,
}  # fmt: skip
AARCH64 = {
    "acct": 89, "add_key": 217, "bpf": 280, "chroot": 51, "clock_settime": 112, "clone": 220, "delete_module": 106, "finit_module": 273,
    "fsopen": 430, "init_module": 105, "io_uring_setup": 425, "kcmp": 272, "kexec_load": 104, "keyctl": 219, "mount": 40,
    "open_by_handle_at": 265, "open_tree": 428, "perf_event_open": 241, "personality": 92, "pidfd_getfd": 438, "pidfd_open": 434,
    "pivot_root": 41, "process_vm_readv": 270, "ptrace": 117, "quotactl": 60, "reboot": 142, "setdomainname": 162, "sethostname": 161,
    "setns": 268, "settimeofday": 170, "swapon": 224, "syslog": 116, "umount2": 39, "unshare": 97, "userfaultfd": 282,
}  # fmt: skip
NUMBERS = {"x86_64": X86_64, "aarch64": AARCH64}[platform.machine()]
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

Argument = int | bytes | ctypes.Array[ctypes.c_char] | None


def call(name: str, *arguments: Argument) -> int:
    """The system call ``name``. Raises OSError."""
    say(name)
    ready = [ctypes.c_long(a) if isinstance(a, int) else ctypes.c_long(0) if a is None else a for a in arguments]
    ctypes.set_errno(0)
    result: int = _libc.syscall(ctypes.c_long(NUMBERS[name]), *ready)
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def is_refused(name: str, *arguments: Argument, also: tuple[int, ...] = ()) -> Verdict:
    """Held where the call is refused, or there is none of that name here; an error from deeper within says that it was reached.

    It is made in a child, since a filter may end who makes it. Raises RuntimeError where the child ends in any other way.
    """
    if name not in NUMBERS:
        return Verdict(True, f"{platform.machine()} has no {name}")
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write_fd, f"0 {call(name, *arguments)}".encode())
        except OSError as exc:
            os.write(write_fd, f"{exc.errno} 0".encode())
        finally:
            os._exit(0)
    os.close(write_fd)
    _, status = os.waitpid(pid, 0)
    error, _, result = os.read(read_fd, 64).decode().partition(" ")
    os.close(read_fd)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSYS:
        return Verdict(True, f"SIGSYS from {name}")
    if not result:
        raise RuntimeError(f"{name}: the child ended with status {status}")
    if error == "0":
        return Verdict(False, f"{name} returned {result}")
    held = int(error) in REFUSED or int(error) in also
    return Verdict(held, f"{'' if held else 'reached: '}{errno.errorcode.get(int(error), error)} from {name}")


def all_refused(*verdicts: Verdict) -> Verdict:
    """The first that was not held, else all their reasons."""
    for verdict in verdicts:
        if not verdict.held:
            return verdict
    return Verdict(True, ", ".join(dict.fromkeys(verdict.how for verdict in verdicts)))
