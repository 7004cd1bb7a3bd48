"""System calls that reach beyond a process: namespaces, mounts, and what rules the whole machine. All arguments are harmless."""

import ctypes
import errno
import os
import platform
import signal
import socket
import struct
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .calls import all_refused, call, is_refused
from .verdict import NOT_THERE, REFUSED, Verdict, World, attempt, name_of, say, try_each

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
AT_FDCWD = -100
MNT_DETACH = 2
ADDR_NO_RANDOMIZE = 0x0040000
PAGE = 4096


@attempt("kernel")
def mount(_: World) -> Verdict:
    """Mounts a tmpfs, a proc and the control groups, and makes a mount writable again."""
    return all_refused(
        is_refused("mount", b"none", b"/tmp", b"tmpfs", 0, None),
        is_refused("mount", b"none", b"/tmp", b"proc", 0, None),
        is_refused("mount", b"none", b"/tmp", b"cgroup", 0, b"memory"),
        is_refused("mount", None, b"/usr", None, 0x20 | 0x1000, None),  # MS_REMOUNT | MS_BIND, without MS_RDONLY
    )


@attempt("kernel")
def new_mount_calls(_: World) -> Verdict:
    """The newer calls for mounts: fsopen, and open_tree with a clone of the root."""
    return all_refused(is_refused("fsopen", b"tmpfs", 0), is_refused("open_tree", AT_FDCWD, b"/", 1))


@attempt("kernel")
def umount(_: World) -> Verdict:
    """Unmounts /proc, which hides nothing then."""
    return is_refused("umount2", b"/proc", MNT_DETACH)


@attempt("kernel")
def pivot_root(_: World) -> Verdict:
    """Changes the root of the mount namespace."""
    return is_refused("pivot_root", b"/tmp", b"/tmp")


@attempt("kernel")
def chroot(_: World) -> Verdict:
    """Changes its root, the first step of the classic way out of one."""
    return is_refused("chroot", b"/tmp")


@attempt("kernel")
def unshare_user(_: World) -> Verdict:
    """A user namespace of its own by unshare, where it would have all capabilities."""
    return is_refused("unshare", CLONE_NEWUSER)


@attempt("kernel")
def unshare_mount(_: World) -> Verdict:
    """A mount namespace of its own by unshare."""
    return is_refused("unshare", CLONE_NEWNS)


@attempt("kernel")
def unshare_network(_: World) -> Verdict:
    """Network, PID, IPC and UTS namespaces of its own by unshare."""
    return all_refused(*(is_refused("unshare", flag) for flag in (CLONE_NEWNET, CLONE_NEWPID, CLONE_NEWIPC, CLONE_NEWUTS)))


def _clone(flags: int) -> Verdict:
    """Like fork, with ``flags``: the child ends at once."""
    try:
        pid = call("clone", flags | signal.SIGCHLD, None, None, None, None)
    except OSError as exc:
        return Verdict(exc.errno in REFUSED, f"{name_of(exc)} from clone")
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return Verdict(False, "clone made a process in new namespaces")


@attempt("kernel")
def clone_user(_: World) -> Verdict:
    """A user namespace of its own by clone."""
    return _clone(CLONE_NEWUSER)


@attempt("kernel")
def clone_all_namespaces(_: World) -> Verdict:
    """User, mount and network namespaces of its own by one clone, as sandboxes are made."""
    return _clone(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET)


@attempt("kernel")
def join_namespaces(world: World) -> Verdict:
    """Joins the namespaces of process 1, of a process outside, and its own anew, by setns."""

    def join(pid: int | str, kind: str) -> str:
        fd = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY)
        call("setns", fd, 0)
        return f"joined {kind}"

    kinds = ("net", "uts", "ipc", "cgroup", "mnt", "pid", "user")
    tries = [(f"setns {kind}", partial(join, pid, kind)) for pid in (1, world.victim_pid, "self") for kind in kinds]
    return try_each(tries, held=NOT_THERE)


@attempt("kernel")
def calls_of_another_abi(_: World) -> Verdict:
    """Asks for a user namespace by the 32-bit call gate, whose numbers a filter for 64 bits does not know."""
    if platform.machine() != "x86_64":
        return Verdict(True, f"{platform.machine()} has no such gate from 64-bit code")
    import mmap

    unshare_i386 = 310
    code = b"\x53\xb8" + struct.pack("<i", unshare_i386) + b"\xbb" + struct.pack("<I", CLONE_NEWUSER) + b"\xcd\x80\x5b\xc3"
    page = mmap.mmap(-1, PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)  # push rbx; mov eax, 310; mov ebx, flags; int 0x80; pop rbx; ret
    function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    say("unshare by int 0x80")
    result = function()
    held = -result in REFUSED
    return Verdict(held, f"{'' if held else 'reached: '}{errno.errorcode.get(-result, result)} from unshare by int 0x80")


@attempt("kernel")
def file_handles(world: World) -> Verdict:
    """Opens a file by its number on the disk, past all paths."""
    fd = os.open(world.model_dir, os.O_RDONLY)
    handle = ctypes.create_string_buffer(struct.pack("=IiII", 8, 1, 2, 0), 136)
    return is_refused("open_by_handle_at", fd, handle, 0)


@attempt("kernel")
def kernel_keys(_: World) -> Verdict:
    """Adds a key to the kernel's keyrings, which no namespace separates, and reads the session's."""
    return all_refused(
        is_refused("add_key", b"user", b"skerry-escape", b"x", 1, -2), is_refused("keyctl", 0, -3, 0), is_refused("keyctl", 6, -3, None, 0)
    )


@attempt("kernel")
def bpf(_: World) -> Verdict:
    """Makes a BPF map, the first step of loading a program into the kernel."""
    return is_refused("bpf", 0, ctypes.create_string_buffer(struct.pack("=IIII", 2, 4, 4, 1), 128), 128)


@attempt("kernel")
def performance_events(_: World) -> Verdict:
    """Opens a performance counter on itself."""
    attributes = ctypes.create_string_buffer(struct.pack("=IIQ", 1, 112, 0) + bytes(24) + struct.pack("=Q", 0x61), 112)
    return is_refused("perf_event_open", attributes, 0, -1, -1, 0, also=(errno.ENODEV,))  # gVisor has none


@attempt("kernel")
def io_uring(_: World) -> Verdict:
    """Sets up an io_uring, whose operations no system call filter sees."""
    return is_refused("io_uring_setup", 1, ctypes.create_string_buffer(120))


@attempt("kernel")
def user_page_faults(_: World) -> Verdict:
    """Opens a userfaultfd, which stops the kernel where an exploit wants it."""
    return is_refused("userfaultfd", 1)


@attempt("kernel")
def load_another_kernel(_: World) -> Verdict:
    """kexec_load with no segments."""
    return is_refused("kexec_load", 0, 0, None, 0)


@attempt("kernel")
def kernel_modules(_: World) -> Verdict:
    """Loads an empty module from memory and from a file, and removes one that there is not."""
    fd = os.memfd_create("module")
    return all_refused(
        is_refused("init_module", b"", 0, b""),
        is_refused("finit_module", fd, b"", 0),
        is_refused("delete_module", b"skerry_no_such", 0o4000),
    )


@attempt("kernel")
def reboot(_: World) -> Verdict:
    """Calls reboot with a magic number that is wrong, so that the right to it is asked and nothing happens."""
    return is_refused("reboot", 1, 2, 3, None)


@attempt("kernel")
def setting_the_clock(_: World) -> Verdict:
    """Sets the clock to what it says, by both calls."""
    now = time.time()
    timespec = ctypes.create_string_buffer(struct.pack("=qq", int(now), int(now % 1 * 1e9)), 16)
    timeval = ctypes.create_string_buffer(struct.pack("=qq", int(now), int(now % 1 * 1e6)), 16)
    return all_refused(is_refused("clock_settime", 0, timespec), is_refused("settimeofday", timeval, None))


@attempt("kernel")
def host_name(_: World) -> Verdict:
    """Sets the host's name to what it is."""
    name = socket.gethostname().encode()
    return all_refused(is_refused("sethostname", name, len(name)), is_refused("setdomainname", b"(none)", 6))


@attempt("kernel")
def swap_space(_: World) -> Verdict:
    """Swaps to a file that there is not."""
    return is_refused("swapon", b"/tmp/skerry-no-such-file", 0)


@attempt("kernel")
def kernel_log(world: World) -> Verdict:
    """Reads the kernel's log by syslog and /dev/kmsg, looking for a line of the host's."""

    def by_call() -> str:
        buffer = ctypes.create_string_buffer(1 << 18)
        size = call("syslog", 3, buffer, len(buffer))
        return "a line of the host's log is read" if world.log_line.encode() in buffer.raw[:size] else ""

    def by_device() -> str:
        os.close(os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK))
        return "opened"

    return try_each([("open /dev/kmsg", by_device), ("syslog", by_call)], held=NOT_THERE)


@attempt("kernel")
def hardware_ports(_: World) -> Verdict:
    """Asks for access to I/O ports by iopl and ioperm."""
    return all_refused(is_refused("iopl", 3), is_refused("ioperm", 0x80, 1, 1))


@attempt("kernel")
def quotas_and_accounting(_: World) -> Verdict:
    """Asks for disk quotas and turns process accounting off."""
    return all_refused(is_refused("quotactl", 0x80000700, b"/dev/skerry-no-such", 0, None), is_refused("acct", None))


@attempt("kernel")
def address_randomisation(_: World) -> Verdict:
    """Turns the randomisation of addresses off for what it runs next."""
    return is_refused("personality", ADDR_NO_RANDOMIZE, also=(errno.EINVAL,))  # gVisor knows no such flag


@attempt("kernel")
def segment_descriptors(_: World) -> Verdict:
    """Reads its local descriptor table by modify_ldt, a call with a history of holes."""
    return is_refused("modify_ldt", 0, ctypes.create_string_buffer(64), 64)


@attempt("kernel")
def becoming_root(_: World) -> Verdict:
    """Sets its user and group to 0; held too where 0 there has no capability."""

    def become(change: Callable[[], None]) -> str:
        change()
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
        return f"root with capabilities {line.split()[1]}" if int(line.split()[1], 16) else ""

    tries = [("setresgid", lambda: become(lambda: os.setresgid(0, 0, 0))), ("setresuid", lambda: become(lambda: os.setresuid(0, 0, 0)))]
    verdict = try_each(tries, held=REFUSED | {errno.EINVAL})  # EINVAL: the user namespace has no 0
    return Verdict(True, verdict.how.replace("nothing found", "no capability as 0")) if verdict.held else verdict
