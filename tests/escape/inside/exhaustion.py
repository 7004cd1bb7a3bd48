"""Using up what is shared, from within one process that cleans up after itself. Each has a bound of its own far above the policy's."""

import contextlib
import errno
import mmap
import os
import resource
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .verdict import NOT_THERE, Verdict, World, attempt, name_of, try_each

MIB = 2**20
MOST_BYTES = 512 * MIB
SLACK_BYTES = 16 * MIB
MOST_DESCRIPTORS = 5000


def _fill(folder: str, *, most_bytes: int, file_bytes: int = 32 * MIB) -> tuple[int, str]:
    """Write files into ``folder`` until an error or ``most_bytes``; returns how much went in and why it ended. Leaves nothing."""
    written, reason = 0, ""
    files: list[Path] = []
    try:
        while written < most_bytes:
            files.append(Path(folder) / f"fill-{os.getpid()}-{len(files)}")
            with files[-1].open("wb", buffering=0) as file:
                while file.tell() < file_bytes and written < most_bytes:
                    written += file.write(bytes(MIB))
    except OSError as exc:
        reason = name_of(exc)
    finally:
        for path in files:
            with contextlib.suppress(OSError):
                path.unlink()
    return written, reason


def _bounded(folder: str, bound_bytes: int) -> Verdict:
    written, reason = _fill(folder, most_bytes=min(MOST_BYTES, 2 * bound_bytes + 2 * SLACK_BYTES))
    if not written:
        return Verdict(True, f"{reason} from {folder}")
    held = written <= bound_bytes + SLACK_BYTES
    return Verdict(held, f"{reason or 'no end'} after {written // MIB} MiB in {folder}")


@attempt("exhaustion", killed_ok=True)
def fill_tmp(world: World) -> Verdict:
    """Fills /tmp, which is memory."""
    return _bounded("/tmp", world.tmp_max_bytes)


@attempt("exhaustion", killed_ok=True)
def fill_shared_memory(world: World) -> Verdict:
    """Fills /dev/shm, which is memory; held where it takes no more than /tmp may."""
    return _bounded("/dev/shm", world.tmp_max_bytes)


def _mount_points() -> Iterator[str]:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        yield line.split()[1].replace("\\040", " ")


@attempt("exhaustion", killed_ok=True)
def fill_any_other_mount(world: World) -> Verdict:
    """Writes into every other mount point, looking for one that takes files without a bound."""
    known = ("/tmp", "/dev/shm", world.socket_dir, "/proc")
    for folder in dict.fromkeys(["/", "/dev", "/run", "/var/tmp", "/dev/mqueue", *_mount_points()]):
        if Path(folder).is_dir() and not folder.startswith(known):
            written, reason = _fill(folder, most_bytes=world.tmp_max_bytes + 2 * SLACK_BYTES)
            if written > world.tmp_max_bytes + SLACK_BYTES:
                return Verdict(False, f"{written // MIB} MiB went into {folder}, {reason or 'no end'}")
    return Verdict(True, "nothing else can be written to without a bound")


@attempt("exhaustion")
def large_file_in_the_socket_directory(world: World) -> Verdict:
    """Writes one file without end into the socket directory, which is on the host's disk."""
    written, reason = _fill(world.socket_dir, most_bytes=MOST_BYTES, file_bytes=MOST_BYTES)
    return Verdict(written <= world.file_max_bytes + SLACK_BYTES, f"{reason or 'no end'} after {written // MIB} MiB")


@attempt("exhaustion")
def descriptors(world: World) -> Verdict:
    """Opens files without end."""
    opened = 0
    try:
        while opened < MOST_DESCRIPTORS:
            os.open("/dev/null", os.O_RDONLY)
            opened += 1
    except OSError as exc:
        return Verdict(exc.errno == errno.EMFILE and opened <= world.files_max, f"{name_of(exc)} after {opened}")
    return Verdict(False, f"{opened} files are open")


@attempt("exhaustion")
def raising_its_limits(_: World) -> Verdict:
    """Raises its own resource limits."""

    def lift(kind: int, want: int) -> str:
        try:
            resource.setrlimit(kind, (want, want))
        except ValueError as exc:  # what Python makes of EPERM
            raise PermissionError(errno.EPERM, str(exc)) from exc
        return f"raised to {want}"

    kinds = (
        resource.RLIMIT_NOFILE,
        resource.RLIMIT_FSIZE,
        resource.RLIMIT_NPROC,
        resource.RLIMIT_CORE,
        resource.RLIMIT_AS,
        resource.RLIMIT_MEMLOCK,
    )
    tries = []
    for kind in kinds:
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            tries.append(("setrlimit", partial(lift, kind, hard + 1)))
    return try_each(tries, held=NOT_THERE)


@attempt("exhaustion", killed_ok=True)
def locked_memory(_: World) -> Verdict:
    """Locks 64 MiB of memory, which the host can't page out."""
    import ctypes

    area = mmap.mmap(-1, 64 * MIB)
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(64 * MIB)) == 0:
        return Verdict(False, "64 MiB are locked")
    return Verdict(True, errno.errorcode[ctypes.get_errno()])


@attempt("exhaustion")
def message_queues(_: World) -> Verdict:
    """Makes System V message queues and semaphores in an IPC namespace that others share; held where the namespace is its own and empty."""
    rows = []
    for kind in ("msg", "sem", "shm"):
        with contextlib.suppress(OSError):
            rows += Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]
    return Verdict(not rows, f"{len(rows)} objects of others are seen" if rows else "the IPC namespace is empty")
