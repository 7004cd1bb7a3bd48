"""What an attempt is, what it is told of the world outside, and what it reports."""

import errno
import json
import mmap
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

REFUSED = frozenset({errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP})
"""How a sandbox says no. Any other answer to a call means that the kernel took it."""
NOT_THERE = REFUSED | {errno.ENOENT, errno.ENOTDIR, errno.ESRCH, errno.EROFS, errno.ENXIO, errno.ENODEV}
"""The same for files and processes: what is not seen, or is read-only, is out of reach."""


class Verdict(NamedTuple):
    """``held`` where the attempt failed; ``how`` names the error, or what was reached."""

    held: bool
    how: str


class World(NamedTuple):
    """What exists outside, so that an attempt aims at something real; made by ``tests.escape.stage``."""

    addresses: list[list[Any]]
    """Family, address and port of listeners outside; they greet who comes."""
    udp_addresses: list[list[Any]]
    abstract_socket: str
    unix_socket: str
    secret_file: str
    secret: str
    state_file: str
    hidden_folders: list[list[Any]]
    """A folder of the host and names in it that a sandbox has no business to see."""
    neighbour_dir: str
    victim_pid: int
    nameservers: list[str]
    log_line: str
    """A line of the host's kernel log."""
    block_device: list[int]
    oom_score_adj: int
    """What programs of the host run with."""
    model_dir: str = "/model"
    socket_dir: str = "/run/skerry"
    tmp_max_bytes: int = 0
    file_max_bytes: int = 0
    files_max: int = 0
    pids_max: int = 0

    @classmethod
    def load(cls, path: Path) -> "World":
        """Read what the stage wrote."""
        return cls(**json.loads(path.read_text()))


class Attempt(NamedTuple):
    """``killed_ok``: the sandbox may answer with SIGKILL, which is how memory limits speak."""

    name: str
    group: str
    tries: str
    run: Callable[[World], Verdict]
    killed_ok: bool


ATTEMPTS: dict[str, Attempt] = {}

note = mmap.mmap(-1, 256)
"""Shared with the parent: the system call that is under way, so that a death by SIGSYS can be told from any other."""


def attempt(group: str, *, killed_ok: bool = False) -> Callable[[Callable[[World], Verdict]], Callable[[World], Verdict]]:
    """Register a function as an attempt, named for itself."""

    def register(run: Callable[[World], Verdict]) -> Callable[[World], Verdict]:
        name = run.__name__.replace("_", "-")
        ATTEMPTS[name] = Attempt(name, group, (run.__doc__ or "").splitlines()[0], run, killed_ok)
        return run

    return register


def say(doing: str) -> None:
    """Note what is about to be tried."""
    note.seek(0)
    note.write(doing.encode()[:255].ljust(256, b"\0"))


def said() -> str:
    """What was noted last."""
    return bytes(note[:]).rstrip(b"\0").decode()


def name_of(exc: OSError) -> str:
    """EPERM and its like."""
    if isinstance(exc, TimeoutError) and exc.errno is None:
        return "no answer"
    return errno.errorcode.get(exc.errno or 0, type(exc).__name__)


def try_each(
    tries: Iterable[tuple[str, Callable[[], object]]], *, held: Collection[int] | None = NOT_THERE, nothing: str = "nothing to try it on"
) -> Verdict:
    """Held where each try raises an error in ``held`` (None: any error); the first that does not is the way out.

    A try that returns None, False or something empty found nothing; any other value is what it got.
    """
    reasons: dict[str, str] = {}
    for doing, act in tries:
        say(doing)
        try:
            got = act()
        except OSError as exc:
            if held is not None and exc.errno not in held:
                return Verdict(False, f"reached: {name_of(exc)} from {doing}")
            reasons.setdefault(name_of(exc), doing)
        else:
            if got:
                return Verdict(False, f"{doing}: {got}"[:160])
            reasons.setdefault("nothing found", doing)
    return Verdict(True, ", ".join(sorted(reasons)) or nothing)
