"""What a sandbox gets of the host: the interpreter and libraries, read-only, and the worker's command. All drivers use this one list.

No image is pulled or built: a sandbox runs the very interpreter, ONNX Runtime and code that the warden itself runs.
"""

import os
import sys
from pathlib import Path

import msgspec

from edge_agent.warden.ports import SandboxSpec

MODEL = "/model/model.onnx"
SOCKET_DIR = "/run/skerry"
SOCKET_NAME = "worker.sock"
TMP_MAX_BYTES = 64 * 1024 * 1024

_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d")
_OURS = Path(__file__).resolve().parents[3]


def system_links() -> dict[str, str]:
    """The system's folders that are symbolic links here (a merged /usr), with what they say."""
    return {folder: str(Path(folder).readlink()) for folder in _SYSTEM if Path(folder).is_symlink()}


def system_mounts() -> list[str]:
    """Paths that a sandbox sees read-only in their own place: the dynamic loader, the libraries, this interpreter, our own code."""
    system = [folder for folder in _SYSTEM if Path(folder).exists() and not Path(folder).is_symlink()]
    interpreter = [path for path in dict.fromkeys([Path(sys.base_prefix), Path(sys.prefix)]) if not path.is_relative_to("/usr")]
    packages = [_OURS / package for package in ("edge_agent", "skerry")]
    ours = [path for path in packages if not path.is_relative_to(sys.prefix) and not path.is_relative_to("/usr")]
    return [*system, *map(str, interpreter), *map(str, ours)]


def _threads_of(spec: SandboxSpec) -> int:
    return max(1, int(spec.cpus))


def worker_environment(spec: SandboxSpec) -> dict[str, str]:
    """All that a worker's environment holds."""
    return {
        "PYTHONPATH": str(_OURS),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": str(_threads_of(spec)),
        "HOME": "/tmp",  # noqa: S108 - the sandbox's own
    }


def worker_argv(spec: SandboxSpec) -> list[str]:
    """The worker's command line, in the sandbox's own paths."""
    return [
        *(sys.executable, "-m", "edge_agent.worker", "--model", MODEL),
        *("--socket", f"{SOCKET_DIR}/{SOCKET_NAME}", "--threads", str(_threads_of(spec))),
        *("--warmup", msgspec.json.encode(spec.warmup).decode()),
    ]


def make_socket_dir(folder: Path, *, owner_uid: int) -> None:
    """The shared directory, empty of an earlier worker's sockets, owned by whom the worker will be. Raises OSError.

    The owner is set even where the folder exists: another driver may have made it for another user.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in (SOCKET_NAME, f"{SOCKET_NAME}.new"):
        (folder / left_over).unlink(missing_ok=True)
    if folder.stat().st_uid != owner_uid:
        os.chown(folder, owner_uid, -1)  # the group stays: it is how a gateway of another user gets in
