"""What a sandbox gets of the host: the interpreter and libraries, read-only, and the worker's command. All drivers use this one list.

No image is pulled or built: a sandbox runs the very interpreter, ONNX Runtime and code that the warden itself runs.
"""

import compileall
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from edge_agent.warden.ports import MODEL_DIR, MODEL_FILE, SOCKET_DIR, SOCKET_NAME
from skerry.wire.messages import StateTensor, WarmupTensor

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


def compile_ours() -> None:
    """Have bytecode of the worker and what it imports of ours, as an installed package has: a sandbox can keep none, and would compile
    all of it at each start. A folder that may not be written to is left as it is."""
    for part in ("edge_agent/worker", "skerry/confine", "skerry/wire"):
        compileall.compile_dir(_OURS / part, quiet=2)
    for package in ("edge_agent", "skerry"):
        compileall.compile_file(_OURS / package / "__init__.py", quiet=2)


def _threads(cpus: float) -> int:
    return max(1, int(cpus))


def worker_environment(cpus: float) -> dict[str, str]:
    """All that a worker's environment holds."""
    return {"PYTHONPATH": str(_OURS), "PYTHONDONTWRITEBYTECODE": "1", **image_environment(cpus)}


def image_environment(cpus: float) -> dict[str, str]:
    """What the environment of a worker in an image of its own holds beside what the image sets: where our code lies is the image's."""
    return {
        "OMP_NUM_THREADS": str(_threads(cpus)),
        "ORT_DISABLE_TELEMETRY": "1",  # else ONNX Runtime keeps a database of events and a thread to send them
        "HOME": "/tmp",  # noqa: S108 - the sandbox's own
    }


def worker_argv(cpus: float, *, interpreter: str = sys.executable) -> list[str]:
    """The command of a worker that waits to be told its model."""
    return [
        *(interpreter, "-m", "edge_agent.worker", "--threads", str(_threads(cpus))),
        *("--socket", f"{SOCKET_DIR}/{SOCKET_NAME}"),
    ]


def with_model(argv: list[str], warmup: list[WarmupTensor], state: Sequence[StateTensor] = (), *, gpu_memory_bytes: int = 0) -> list[str]:
    """The same for a worker that loads the model in its model directory at once."""
    said = ("--warmup", msgspec.json.encode(warmup).decode(), "--state", msgspec.json.encode(state).decode())
    gpu = ("--gpu-memory", str(gpu_memory_bytes)) if gpu_memory_bytes else ()
    return [*argv, "--model", f"{MODEL_DIR}/{MODEL_FILE}", *said, *gpu]
