"""``python -m tests.integration.locked_down FOLDER OUTSIDE``: confined as a worker is, it tries what it may no longer do.

What each try came to is printed as JSON. Each has a process of its own, made before the confinement, since some are answered with a
kill. In it the confinement comes as in a worker: the first layer, a thread as ONNX Runtime has them, the second layer and the filter,
a thread as connections have them.
"""

import ctypes
import errno
import importlib
import json
import mmap
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from edge_agent.worker import lockdown
from skerry.confine.numbers import AARCH64, X86_64
from skerry.confine.policy import NEVER

NUMBERS = {"x86_64": X86_64, "aarch64": AARCH64}[os.uname().machine]
FOLDER = Path(sys.argv[1]) if __name__ == "__main__" else Path()
LIBC = ctypes.CDLL(None, use_errno=True)
BARE = (
    "openat2",
    "execveat",
    "fork",
    "vfork",
    "clone3",
    "io_uring_setup",
    "prlimit64",
    "setrlimit",
    "seccomp",
    "memfd_create",
    "ftruncate",
)
"""Calls that are answered by their number alone."""
THREADS = ("old", "main", "new")
RESERVED_BYTES = 4096
LATER = {"pidfd_open": 434, "pidfd_send_signal": 424}
"""Calls that the tables leave out."""
if os.uname().machine == "x86_64":
    LATER |= {"pkey_mprotect": 329, "userfaultfd": 323, "perf_event_open": 298, "io_setup": 206, "a call of the x32 table": 0x40000000 | 59}


def call(name: str, *arguments: int) -> None:
    """A system call by its number, with all its arguments given."""
    words = [ctypes.c_long(argument) for argument in (*arguments, *[0] * (6 - len(arguments)))]
    if LIBC.syscall(ctypes.c_long((NUMBERS | LATER)[name]), *words) < 0:
        raise OSError(ctypes.get_errno(), name)


def write(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))


def read(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.read(descriptor, 1)
    os.close(descriptor)


def tries(folder: Path) -> dict[str, Callable[[], object]]:
    """What is tried; what it needs of the time before is made here."""
    (folder / "file").write_text("x")
    caller = socket.socket(socket.AF_UNIX)
    pages = mmap.mmap(-1, RESERVED_BYTES)
    pages_at = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    null = os.open("/dev/null", os.O_WRONLY)
    return {
        "write to /tmp": lambda: write(Path(f"/tmp/skerry-{os.getpid()}")),
        "write to the socket directory": lambda: write(folder / "new"),
        "open for writing without making": lambda: os.open(folder / "file", os.O_RDWR),
        "cut a file by opening it": lambda: os.open(folder / "file", os.O_RDONLY | os.O_TRUNC),
        "make a file without a name": lambda: os.open(folder, os.O_TMPFILE | os.O_RDWR),
        "write to its own memory": lambda: os.open("/proc/self/mem", os.O_RDWR),
        "unlink": (folder / "file").unlink,
        "rename": lambda: (folder / "file").rename(folder / "other"),
        "make a directory": (folder / "d").mkdir,
        "make a link": lambda: (folder / "l").symlink_to("/"),
        "change a mode": lambda: (folder / "file").chmod(0o777),
        "truncate": lambda: os.truncate(folder / "file", 0),
        "execve": lambda: os.execv("/bin/true", ["true"]),
        "fork by glibc": os.fork,
        "clone with a name space": lambda: call("clone", 0x10000000),
        "clone, the thread's bit in the high half": lambda: call("clone", 0x10000 << 32 | signal.SIGCHLD),
        "connect": lambda: caller.connect(str(folder / "listening")),
        "a new socket": lambda: socket.socket(socket.AF_UNIX),
        "a new Internet socket": lambda: socket.socket(socket.AF_INET),
        "a pair of sockets": socket.socketpair,
        "listen to another name": lambda: caller.bind(str(folder / "another")),
        "set an option of a socket": lambda: caller.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20),
        "map code": lambda: mmap.mmap(-1, RESERVED_BYTES, prot=mmap.PROT_READ | mmap.PROT_EXEC),
        "make memory code": lambda: call("mprotect", pages_at, RESERVED_BYTES, mmap.PROT_READ | mmap.PROT_EXEC),
        "make memory code by a key": lambda: call("pkey_mprotect", pages_at, RESERVED_BYTES, mmap.PROT_READ | mmap.PROT_EXEC, -1),
        "signal another process": lambda: os.kill(os.getppid(), 0),
        "ioctl": lambda: os.get_terminal_size(null),
        "take off the filter": lambda: call("prctl", 22),
        "say that it may be looked into": lambda: call("prctl", 4, 1),
        "read /etc/passwd": lambda: read("/etc/passwd"),
        "read a file of its socket directory": lambda: read(folder / "file"),
        "read its own environment": lambda: read("/proc/self/environ"),
        "list a directory": lambda: list(Path("/").iterdir()),
        "read a library": lambda: read(os.__file__),
        "import what was not imported": lambda: importlib.import_module("colorsys"),
        "start a thread": lambda: threading.Thread(target=int).start(),
        "signal a thread of its own": lambda: signal.pthread_kill(threading.get_ident(), 0),
        "map memory": lambda: mmap.mmap(-1, 64 * 2**20).close(),
        "random numbers": lambda: os.urandom(8),
        **{f"call {name}": (lambda name=name: call(name)) for name in (*NEVER, *BARE, *LATER) if name in NUMBERS | LATER},
    }


def tries_while_loading(folder: Path, outside: Path, abstract: str, port: int) -> dict[str, Callable[[], object]]:
    """The same for the first layer alone."""
    (folder / "file").write_text("x")
    (outside / "file").write_text("x")
    writing = os.memfd_create("program", 0)
    os.write(writing, Path("/bin/true").read_bytes())
    program = os.open(f"/proc/self/fd/{writing}", os.O_RDONLY)
    os.close(writing)  # what is open for writing could not be executed anyhow
    return {
        "write to /tmp": lambda: os.close(os.open("/tmp", os.O_TMPFILE | os.O_RDWR)),
        "write to the socket directory": lambda: write(folder / "new"),
        "a socket in the socket directory": lambda: socket.socket(socket.AF_UNIX).bind(str(folder / "another")),
        "rename in the socket directory": lambda: (folder / "file").rename(folder / "other"),
        "a link in the socket directory": lambda: (folder / "link").symlink_to("/"),
        "a pipe in the socket directory": lambda: os.mkfifo(folder / "pipe"),
        "write elsewhere": lambda: write(outside / "new"),
        "unlink elsewhere": (outside / "file").unlink,
        "truncate elsewhere": lambda: os.truncate(outside / "file", 0),
        "write to its own memory": lambda: os.close(os.open("/proc/self/mem", os.O_RDWR)),
        "adjust how soon it is ended": lambda: Path("/proc/self/oom_score_adj").write_text("0"),
        "execve": lambda: os.execv("/bin/true", ["true"]),
        "the loader as a program": lambda: os.execv("/lib64/ld-linux-x86-64.so.2", ["ld", "/bin/true"]),
        "a program in memory": lambda: os.execv(f"/proc/self/fd/{program}", ["true"]),
        "connect by TCP": lambda: socket.socket().connect(("127.0.0.1", port)),
        "listen by TCP": lambda: socket.socket().bind(("127.0.0.1", 0)),
        "connect to an abstract name outside": lambda: socket.socket(socket.AF_UNIX).connect(abstract),
        "signal a process outside": lambda: os.kill(os.getppid(), 0),
        "read a file": lambda: read("/etc/passwd"),
        "map code": lambda: mmap.mmap(-1, RESERVED_BYTES, prot=mmap.PROT_READ | mmap.PROT_EXEC).close(),
    }


def outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as exc:
        return errno.errorcode.get(exc.errno or 0, str(exc))
    return "done"


class Thread:
    """One that does what it is handed, when it is handed it."""

    def __init__(self) -> None:
        self._work: Callable[[], None] | None = None
        self._handed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._handed.wait()
        assert self._work is not None
        self._work()

    def do(self, work: Callable[[], None]) -> None:
        self._work = work
        self._handed.set()
        self._thread.join()


def confined(attempt: Callable[[], object], where: str, result: int) -> None:
    """One try, in a process that is a worker's likeness."""
    lockdown.before_loading(FOLDER)
    old = Thread()
    if where == "loading":
        return old.do(lambda: said(attempt, result))
    lockdown.before_serving("CPUExecutionProvider")
    new = Thread()
    if where == "main":
        return said(attempt, result)
    return {"old": old, "new": new}[where].do(lambda: said(attempt, result))


def said(attempt: Callable[[], object], result: int) -> None:
    os.write(result, outcome(attempt).encode())


def tried(attempt: Callable[[], object], where: str) -> str:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            confined(attempt, where, writing)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as words_of:
        words = words_of.read()
    _, status = os.waitpid(child, 0)
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else words


def main() -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(FOLDER / "listening"))
        listener.listen()
        outcomes = {name: {where: tried(attempt, where) for where in THREADS} for name, attempt in tries(FOLDER).items()}
    with socket.socket(socket.AF_UNIX) as abstract, socket.create_server(("127.0.0.1", 0)) as tcp:
        abstract.bind("")  # a name of the kernel's choice (unix(7))
        abstract.listen()
        attempts = tries_while_loading(FOLDER, Path(sys.argv[2]), abstract.getsockname(), tcp.getsockname()[1])
        loading = {name: tried(attempt, "loading") for name, attempt in attempts.items()}
    sys.stdout.write(json.dumps({"serving": outcomes, "loading": loading}))


if __name__ == "__main__":
    main()
