"""Reading and writing what belongs to the host or to a neighbour."""

import contextlib
import errno
import os
import re
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from .verdict import NOT_THERE, Verdict, World, attempt, try_each

HELD = NOT_THERE | {errno.ELOOP, errno.EINVAL, errno.EXDEV}
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")
"""cap_sys_admin in the form of the attribute security.capability, version 2."""
SETUID_PROGRAMS = ("/usr/bin/su", "/usr/bin/passwd", "/usr/bin/newgrp", "/usr/bin/mount", "/usr/bin/chsh", "/usr/bin/sudo")


def _create(folder: str | Path) -> str:
    """Make a file in ``folder`` and take it away again. Raises OSError."""
    path = Path(folder) / f"skerry-escape-{os.getpid()}"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    path.unlink()
    return "a file was created"


def _open(path: str | Path, flags: int) -> str:
    os.close(os.open(path, flags | os.O_NONBLOCK))
    return "opened for writing" if flags & (os.O_WRONLY | os.O_RDWR) else "opened"


def _read(path: str | Path, size: int = 4096) -> bytes:
    with Path(path).open("rb", buffering=0) as file:
        return file.read(size)


def _readable(path: str, content: str = "") -> str:
    """Says so where there is something to read at ``path``, with ``content`` in it. Raises OSError."""
    found = _read(path)
    return "it was read" if found and content.encode() in found else ""


def _did(act: Callable[..., None], *arguments: object) -> str:
    """For what returns nothing. Raises OSError."""
    act(*arguments)
    return "it was done"


def _creating(folders: list[str]) -> Verdict:
    return try_each(((f"create in {folder}", partial(_create, folder)) for folder in folders), held=HELD)


@attempt("filesystem")
def write_to_the_root(_: World) -> Verdict:
    """Creates files in / and in the folders of a system."""
    return _creating(["/", "/etc", "/var", "/var/tmp", "/root", "/home", "/opt", "/srv", "/run", "/boot", "/dev"])


@attempt("filesystem")
def write_to_usr(_: World) -> Verdict:
    """Creates files in /usr and overwrites the shell."""
    folders = ["/usr", "/usr/bin", "/usr/lib", "/usr/local/bin", "/bin", "/lib"]
    verdict = _creating(folders)
    return verdict if not verdict.held else try_each([("open /bin/sh", lambda: _open("/bin/sh", os.O_WRONLY))], held=HELD)


@attempt("filesystem")
def write_to_the_model(world: World) -> Verdict:
    """Overwrites the model, changes its mode, renames it and puts a file beside it."""
    folder = Path(world.model_dir)
    file = next(path for path in folder.iterdir() if path.is_file())
    tries: list[tuple[str, Callable[[], object]]] = [
        ("open for writing", lambda: _open(file, os.O_RDWR)),
        ("truncate", lambda: _did(os.truncate, file, 1)),
        ("chmod", lambda: _did(file.chmod, 0o777)),
        ("rename", lambda: file.rename(folder / "other")),
        ("utime", lambda: _did(os.utime, file)),
        ("create", lambda: _create(folder)),
    ]
    return try_each(tries, held=HELD)


@attempt("filesystem")
def write_to_the_interpreter(_: World) -> Verdict:
    """Overwrites the interpreter that all workers run, and creates files among its modules."""
    verdict = _creating(
        [str(Path(os.__file__).parent), str(Path(sys.executable).parent), *(p for p in sys.path if Path(p).is_dir() and p != "/model")]
    )
    return verdict if not verdict.held else try_each([("open", lambda: _open(sys.executable, os.O_WRONLY))], held=HELD)


def _views(path: str) -> Iterator[str]:
    """A path of the host, as it may be named from inside."""
    yield path
    for root in ("/proc/1/root", "/proc/self/root/..", "/proc/self/cwd/../..", "/run/skerry/../../..", "/model/../.."):
        yield root + path


@attempt("filesystem")
def write_to_a_neighbours_socket_directory(world: World) -> Verdict:
    """Creates a file in the socket directory of another replica that runs now."""
    beside = Path(world.socket_dir).parent / Path(world.neighbour_dir).name
    return _creating([*_views(world.neighbour_dir), str(beside)])


@attempt("filesystem")
def connect_to_a_neighbours_socket(world: World) -> Verdict:
    """Connects to the socket of another replica that runs now."""

    def reach(path: str) -> str:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(2)
            sock.connect(path)
            return "connected"

    return try_each((("connect", partial(reach, p)) for p in _views(f"{world.neighbour_dir}/worker.sock")), held=HELD)


@attempt("filesystem")
def read_password_hashes(_: World) -> Verdict:
    """Reads /etc/shadow."""
    return try_each((("open", partial(_readable, p)) for p in _views("/etc/shadow")), held=HELD)


@attempt("filesystem")
def read_home_folders(world: World) -> Verdict:
    """Lists the host's /root and /home, looking for what is there outside."""

    def look(folder: str, names: list[str]) -> str:
        found = {entry.name for entry in Path(folder).iterdir()} & set(names)
        return f"{len(found)} of the host's entries are seen" if found else ""

    return try_each((("list", partial(look, folder, names)) for folder, names in world.hidden_folders), held=HELD)


@attempt("filesystem")
def read_a_secret_of_the_host(world: World) -> Verdict:
    """Reads a file of the host that anybody outside may read, by its path and through /proc."""
    return try_each((("open", partial(_readable, p, world.secret)) for p in _views(world.secret_file)), held=HELD)


@attempt("filesystem")
def read_the_wardens_state(world: World) -> Verdict:
    """Reads a file in the warden's state directory."""
    return try_each((("open", partial(_readable, p)) for p in _views(world.state_file)), held=HELD)


@attempt("filesystem")
def raw_devices(_: World) -> Verdict:
    """Opens memory, kernel log and disks as devices."""
    names = [
        "mem",
        "kmem",
        "port",
        "sda",
        "vda",
        "xvda",
        "nvme0n1",
        "loop0",
        "loop-control",
        "mapper/control",
        "snapshot",
    ]
    return try_each(((f"open /dev/{name}", partial(_open, f"/dev/{name}", os.O_RDONLY)) for name in names), held=HELD)


@attempt("filesystem")
def virtual_machine_device(_: World) -> Verdict:
    """Opens /dev/kvm and its like."""
    names = ["kvm", "vhost-net", "vhost-vsock", "vfio/vfio"]
    return try_each(((f"open /dev/{name}", partial(_open, f"/dev/{name}", os.O_RDWR)) for name in names), held=HELD)


@attempt("filesystem")
def making_a_device(world: World) -> Verdict:
    """Makes a device node for the host's disk, in each folder that can be written to, and opens it."""
    device = os.makedev(*world.block_device)

    def make(folder: str) -> str:
        path = Path(folder) / f"disk-{os.getpid()}"
        os.mknod(path, 0o600 | stat.S_IFBLK, device)
        try:
            return _open(path, os.O_RDONLY)
        finally:
            path.unlink()

    return try_each(((f"mknod in {folder}", partial(make, folder)) for folder in ("/tmp", world.socket_dir, "/dev", "/dev/shm")), held=HELD)


def _capabilities(pid: int | str = "self") -> int:
    found = re.search(r"CapEff:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1], 16) if found else 0


@attempt("filesystem")
def setuid_programs(_: World) -> Verdict:
    """Runs the system's setuid programs and looks whether one becomes root."""

    def run(program: str) -> str:
        process = subprocess.Popen([program], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 1
        try:
            while time.monotonic() < deadline:  # a zombie's credentials can still be read
                euid = re.search(r"Uid:\s*\d+\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
                if _capabilities(process.pid) or (euid and euid[1] == "0" and os.geteuid() != 0):
                    return "runs as root"
                if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    return ""
                time.sleep(0.01)
            return ""
        finally:
            process.kill()
            process.wait()

    return try_each(((f"run {Path(program).name}", partial(run, program)) for program in SETUID_PROGRAMS), held=HELD)


@attempt("filesystem")
def making_a_setuid_file(world: World) -> Verdict:
    """Leaves a setuid program in the socket directory, for somebody outside to run; held where it is not root's there."""
    path = Path(world.socket_dir) / "setuid"

    def make() -> str:
        path.write_bytes(b"#!/bin/true\n")
        path.chmod(0o4755)
        return ""

    verdict = try_each([("chmod 4755", make)], held=HELD)
    return Verdict(True, "made, and nobody's but its own outside") if verdict.how == "nothing found" else verdict


@attempt("filesystem")
def file_capabilities(world: World) -> Verdict:
    """Gives a file capabilities."""

    def give(folder: str) -> str:
        path = Path(folder) / "capable"
        path.write_bytes(b"x")
        try:
            os.setxattr(path, "security.capability", CAPABILITY)
        finally:
            path.unlink()
        return "the attribute was set"

    tries = ((f"setxattr in {folder}", partial(give, folder)) for folder in ("/tmp", world.socket_dir))
    return try_each(tries, held=HELD | {errno.ENOTSUP})


@attempt("filesystem")
def kernel_settings(_: World) -> Verdict:
    """Opens what sets the host's kernel for writing: core_pattern, modprobe, sysrq-trigger and others in /proc."""
    settings = ["sys/kernel/core_pattern", "sys/kernel/modprobe", "sys/kernel/hostname", "sys/kernel/panic", "sys/vm/panic_on_oom"]
    paths = [f"/proc/{name}" for name in [*settings, "sys/vm/drop_caches", "sys/fs/file-max", "sysrq-trigger", "irq/default_smp_affinity"]]
    return try_each(((f"open {path}", partial(_open, path, os.O_WRONLY)) for path in paths), held=HELD)


@attempt("filesystem")
def kernel_memory_in_proc(_: World) -> Verdict:
    """Reads kernel memory and keys in /proc: kcore, keys, kallsyms with addresses, kmsg, timer_list."""

    def addresses() -> bool:
        lines = _read("/proc/kallsyms", 4096).splitlines()
        return any(int(line.split()[0], 16) for line in lines[:-1])

    tries: list[tuple[str, Callable[[], object]]] = [("open /proc/kallsyms", addresses)]
    names = ("kcore", "keys", "kmsg", "timer_list", "sched_debug", "vmallocinfo")
    tries += [(f"open /proc/{name}", partial(_readable, f"/proc/{name}")) for name in names]
    return try_each(tries, held=HELD | {errno.EAGAIN})


@attempt("filesystem")
def sys_is_read_only(_: World) -> Verdict:
    """Opens files in /sys for writing that act on the host."""
    names = [
        "power/state",
        "kernel/mm/transparent_hugepage/enabled",
        "kernel/uevent_helper",
        "block/vda/queue/read_ahead_kb",
        "module/kernel/parameters/panic",
    ]
    names += ["devices/system/cpu/cpu1/online", "kernel/debug/sched/verbose", "firmware/efi/vars/new_var", "bus/pci/rescan"]
    return try_each(((f"open /sys/{name}", partial(_open, f"/sys/{name}", os.O_WRONLY)) for name in names), held=HELD)


@attempt("filesystem")
def control_groups(_: World) -> Verdict:
    """Opens control group files for writing: release_agent, its own limits, the lists of processes."""
    wanted = {
        "release_agent",
        "cgroup.procs",
        "memory.max",
        "memory.limit_in_bytes",
        "pids.max",
        "cpu.max",
        "cpu.cfs_quota_us",
        "devices.allow",
    }

    def paths() -> Iterator[str]:
        for root in ("/sys/fs/cgroup", "/proc/1/root/sys/fs/cgroup"):
            with contextlib.suppress(OSError):
                for folder, folders, files in os.walk(root):
                    folders[:] = folders[:8] if folder.count("/") < 8 else []
                    yield from (f"{folder}/{name}" for name in files if name in wanted)

    return try_each(
        ((f"open {Path(p).name}", partial(_open, p, os.O_WRONLY)) for p in paths()), held=HELD, nothing="no control group is seen"
    )


@attempt("filesystem")
def the_terminal(_: World) -> Verdict:
    """Opens the terminal that the warden was started from, to type into it."""
    return try_each(
        ((f"open {path}", partial(_open, path, os.O_RDWR)) for path in ("/dev/tty", "/dev/console", "/dev/tty0")),
        held=HELD | {errno.EIO},
    )
