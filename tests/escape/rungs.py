"""The rungs that the suite climbs, each with its real driver."""

import asyncio
import contextlib
import functools
import json
import os
import tempfile
from pathlib import Path

from edge_agent.warden.drivers.bubblewrap import BubblewrapDriver
from edge_agent.warden.drivers.docker import DockerDriver
from edge_agent.warden.ports import Driver

RUNGS = ("process", "container", "gvisor")
OWNER = f"escape-{os.getpid()}"


def docker_socket() -> Path:
    """The engine for the tests: SKERRY_DOCKER_SOCKET, DOCKER_HOST, or the machine's own."""
    host = os.environ.get("DOCKER_HOST", "").removeprefix("unix://")
    return Path(os.environ.get("SKERRY_DOCKER_SOCKET") or host or "/var/run/docker.sock")


def driver_of(rung: str, run_dir: Path) -> Driver:
    """The driver that makes sandboxes of ``rung``; not yet probed."""
    if rung == "process":
        return BubblewrapDriver(run_dir)
    return DockerDriver(run_dir, socket=docker_socket(), runtime="runsc" if rung == "gvisor" else "", owner=OWNER)


@functools.cache
def absence(rung: str) -> str:
    """Why a rung can't be climbed here; asked once, since it takes a sandbox to know."""
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(driver_of(rung, Path(folder) / "run").probe())


def log_bytes(rung: str, run_dir: Path, name: str) -> int:
    """What a sandbox's log takes on the disk, all files together."""
    if rung == "process":
        return sum(_size(path) for path in (run_dir / name).rglob("*log*") if path.is_file())
    import docker

    with contextlib.closing(docker.APIClient(f"unix://{docker_socket()}")) as engine:
        path = Path(engine.inspect_container(f"skerry-{OWNER}-{name}")["LogPath"])
        return sum(_size(file) for file in path.parent.glob(f"{path.name}*"))


def _size(path: Path) -> int:
    """0 for a log that was turned over, and called otherwise, since it was found."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def processes(rung: str, run_dir: Path, name: str) -> int:
    """How many processes of the host a sandbox takes now, gVisor's own kernel included; 0 where it is gone."""
    if rung == "process":
        try:
            first = json.loads((run_dir / name / "handle.json").read_text())["pid"]
            space = Path(f"/proc/{first}/ns/pid").readlink()
        except OSError:
            return 0
        return sum(_pid_space(entry) == space for entry in Path("/proc").iterdir() if entry.name.isdigit())
    import docker

    with contextlib.closing(docker.APIClient(f"unix://{docker_socket()}")) as engine, contextlib.suppress(docker.errors.APIError):
        return int(engine.stats(f"skerry-{OWNER}-{name}", stream=False, one_shot=True)["pids_stats"].get("current", 0))
    return 0


def _pid_space(entry: Path) -> Path | None:
    try:
        return (entry / "ns" / "pid").readlink()
    except OSError:
        return None


def lines_of_json(lines: list[str]) -> list[dict[str, object]]:
    """The lines that are JSON objects; what else a sandbox writes is passed over."""
    found = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found
