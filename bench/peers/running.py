"""Environments of the peers, made on demand, and their servers, started and stopped."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from bench import boxes, calls, models
from bench.models import Model
from bench.peers import Peer, Way
from skerry.demo.fleet import free_ports

HERE = Path(__file__).resolve().parent
INSTALL_WITHIN_S = 1800
START_WITHIN_S = 120.0
STOP_WITHIN_S = 15.0
MARK = "installed.json"
SPEC = "SKERRY_BENCH_SPEC"
REPLICAS = "SKERRY_BENCH_REPLICAS"
LAST_BYTES = 8000


Targets = dict[str, dict[str, calls.Target]]


class Absent(Exception):
    """A peer that could not be installed or started; the text says why."""


def prepare(peer: Peer, cache: Path) -> None:
    """Make its environment unless it is there. Raises Absent."""
    place = cache / peer.name
    mark = place / MARK
    if mark.is_file() and json.loads(mark.read_text()) == peer.packages:
        return
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True, capture_output=True, timeout=INSTALL_WITHIN_S)
        install = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", *peer.packages]
        subprocess.run(install, check=True, capture_output=True, text=True, timeout=INSTALL_WITHIN_S)
    except subprocess.CalledProcessError as exc:
        said = (exc.stderr or "").strip() if isinstance(exc.stderr, str) else ""
        raise Absent(f"not installed: {said.splitlines()[-1][:200] if said else exc}") from exc
    except subprocess.TimeoutExpired as exc:
        raise Absent(f"not installed within {INSTALL_WITHIN_S} s") from exc
    mark.write_text(json.dumps(peer.packages))


def versions(peer: Peer, cache: Path) -> dict[str, str]:
    """Of what matters in its environment."""
    names = [*peer.versions, "onnxruntime"]
    program = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    argv = [str(cache / peer.name / "bin" / "python"), "-c", program, *names]
    said = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    found: dict[str, str] = json.loads(said.stdout) if said.returncode == 0 else {}
    return found


def _spec(folder: Path, wanted: list[Model]) -> Path:
    entries = [
        {"name": m.name, "file": str(m.file), "inputs": [[n, str(v.dtype), list(v.shape)] for n, v in m.feeds.items()]} for m in wanted
    ]
    path = folder / "spec.json"
    path.write_text(json.dumps(entries))
    return path


def _target(way: Way, model: Model, port: int) -> calls.Target:
    address, path = f"127.0.0.1:{port + way.port_offset}", way.path.format(name=model.name)
    match way.wire:
        case "raw":
            return calls.raw(address, model, path)
        case "json":
            return calls.in_json(address, model, path)
        case "grpc":
            return calls.grpc(address, model)


def _last_words(log: Path) -> str:
    lines = log.read_bytes()[-LAST_BYTES:].decode(errors="replace").strip().splitlines()
    telling = [line for line in lines if "Error" in line and not line.startswith(" ")]
    return (telling or lines or ["it said nothing"])[-1][:300]


def stop(process: subprocess.Popen[bytes]) -> None:
    """End it and all that came of it, some of which may outlive it."""
    family = boxes.tree(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_WITHIN_S)
    for member in family:
        with contextlib.suppress(psutil.Error):
            member.kill()
    process.wait(STOP_WITHIN_S)
    psutil.wait_procs(family, timeout=STOP_WITHIN_S)


@contextlib.contextmanager
def serving(peer: Peer, cache: Path, folder: Path, *, wanted: list[Model], replicas: int) -> Iterator[tuple[int, Targets]]:
    """Its server's first pid, and how to ask it, by way and model; it has answered rightly in each. Raises Absent."""
    prepare(peer, cache)
    folder.mkdir()
    port = _two_ports()
    python = str(cache / peer.name / "bin" / "python")
    argv = peer.argv or [str(HERE / f"{peer.name}_server.py"), "{port}", "{replicas}", "{scratch}"]
    words = {"port": str(port), "replicas": str(replicas), "scratch": str(folder), "folder": str(HERE)}
    environment = {
        **os.environ, **models.ENVIRONMENT, **peer.environment, SPEC: str(_spec(folder, wanted)), REPLICAS: str(replicas),
        "PYTHONPATH": str(HERE), "BENTOML_HOME": str(folder / "home"),
    }  # fmt: skip
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [python, *(word.format(**words) for word in argv)], env=environment, cwd=folder, stdout=output, stderr=output,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    try:
        targets: Targets = {name: {model.name: _target(way, model, port) for model in wanted} for name, way in peer.ways.items()}

        def lives() -> str:
            return "" if process.poll() is None else f"ended with status {process.returncode}: {_last_words(log)}"

        try:
            for by_model in targets.values():
                for target in by_model.values():
                    boxes.wait_until_right(target, within_s=START_WITHIN_S, lives=lives)
        except RuntimeError as exc:
            raise Absent(f"not started: {exc}") from exc
        time.sleep(1.0)
        yield process.pid, targets
    finally:
        stop(process)


def _two_ports() -> int:
    """A free port whose successor is free too."""
    for _ in range(50):
        (port,) = free_ports(1)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port + 1)):
            return port
    raise Absent("no two free ports in a row")
