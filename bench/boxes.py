"""Our own gateway over sandboxed workers, as a server to be measured: its processes, and further gateways beside it."""

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil

from bench import calls, load
from bench.added_latency import served
from bench.models import Model
from edge_agent.gateway.config import Config
from edge_agent.warden.ports import Driver
from skerry.demo.fleet import free_ports
from skerry.wire import codec
from skerry.wire.box import GatewayTotals, LocalReplica, Route, RouteTable

READY_WITHIN_S = 60.0
POLL_S = 0.05
STOP_WITHIN_S = 15.0
GATEWAY = "edge_agent.gateway"
ASK_TOTALS = b"GET /totals HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Gateway(msgspec.Struct, frozen=True):
    """A gateway that runs: where it listens, the pid of its first process, and where it speaks gRPC, if it does.

    ``socket`` is the agent's, ``local`` the one for callers on this box.
    """

    address: str
    socket: Path
    pid: int
    local: Path
    grpc: str = ""


class Box(msgspec.Struct):
    """A gateway with its workers; ``replicas`` are the sandboxes' names by model."""

    folder: Path
    driver: Driver
    gateway: Gateway
    replicas: dict[str, list[LocalReplica]]

    def worker_cpu_s(self) -> float:
        """What all workers together used so far."""
        names = [replica.name for replicas in self.replicas.values() for replica in replicas]
        return sum(usage.cpu_seconds for name in names if (usage := asyncio.run(self.driver.stats(name))) is not None)


def tree(pid: int) -> list[psutil.Process]:
    """A process and all that came of it, as far as they live."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_s(pid: int) -> float:
    """What a process and its living descendants used so far."""
    total = 0.0
    for process in tree(pid):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def grouped(table: RouteTable, models: list[Model], *, deadline_ms: int | None = None) -> RouteTable:
    """One route for each model over all sandboxes that ``MODEL-N`` names, where the table has a route for each sandbox."""
    by_name = {route.deployment: route for route in table.routes}
    routes = []
    for model in models:
        mine = [by_name[name] for name in sorted(by_name) if name.rpartition("-")[0] == model.name]
        replicas = [replica for route in mine for replica in route.replicas]
        changes = {"deployment": model.name, "model": model.name, "replicas": replicas}
        routes.append(msgspec.structs.replace(mine[0], **changes, **({"deadline_ms": deadline_ms} if deadline_ms else {})))
    return RouteTable(table.generation + 1, routes)


def write_routes(file: Path, table: RouteTable) -> None:
    """Swapped in whole, as a warden does."""
    staging = file.with_suffix(".new")
    staging.write_bytes(codec.encode(table))
    staging.rename(file)


def wait_until_right(target: calls.Target, *, within_s: float = READY_WITHIN_S, lives: Callable[[], str] = str) -> None:
    """Ask until the answer is right; ``lives`` says why that can't be waited for any longer. Raises RuntimeError."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            with contextlib.closing(load.asking(target.call)) as ask:
                target.check(*ask())
            return
        except Exception as exc:
            died = lives()
            if died or time.monotonic() > deadline:
                raise RuntimeError(died or f"no right answer within {within_s:.0f} s: {str(exc)[:300]}") from exc
            time.sleep(POLL_S)


def gateway_pid(folder: Path) -> int:
    """The gateway that ``served`` started with the settings in ``folder``."""
    settings = str(folder / "gateway.toml")
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if GATEWAY in command and settings in command:
                return process.pid
    raise RuntimeError(f"no gateway was started with {settings}")


@contextlib.contextmanager
def box(folder: Path, driver: Driver, models: list[Model], *, replicas: int, deadline_ms: int | None = None) -> Iterator[Box]:
    """So many sandboxes for each model behind one gateway."""
    files = {f"{model.name}-{number}": model.file for model in models for number in range(replicas)}
    with served(folder, driver, files) as port:
        table = grouped(codec.decode((folder / "routes.json").read_bytes(), RouteTable), models, deadline_ms=deadline_ms)
        write_routes(folder / "routes.json", table)
        socket = Path(tomllib.loads((folder / "gateway.toml").read_text())["socket"])
        found = Gateway(f"127.0.0.1:{port}", socket, gateway_pid(folder), socket)
        for model in models:
            wait_until_right(calls.binary(found.address, model))
        yield Box(folder, driver, found, {route.deployment: list(route.replicas) for route in table.routes})


def end_orderly() -> None:
    """From now on a request to end undoes what was started, as an interrupt from the keyboard does: nothing is left behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def toml(settings: dict[str, object]) -> str:
    """Flat settings: text, numbers, truth values."""
    return "".join(f"{key} = {msgspec.json.encode(value).decode()}\n" for key, value in settings.items())


@contextlib.contextmanager
def further_gateway(of: Path, name: str, routes: list[Route] | Path, **changes: object) -> Iterator[Gateway]:
    """Another gateway with the settings of that in ``of``, but for ``changes``, and routes of its own, or those in a file."""
    folder = of / f"gateway-{name}"
    folder.mkdir()
    settings = tomllib.loads((of / "gateway.toml").read_text())
    (port,) = free_ports(1)
    file = routes if isinstance(routes, Path) else folder / "routes.json"
    settings |= {"listen": f"127.0.0.1:{port}", "socket": str(folder / "g.sock"), "routes_file": str(file), **changes}
    if not isinstance(routes, Path):
        write_routes(file, RouteTable(1, routes))
    file = folder / "gateway.toml"
    file.write_text(toml(settings))
    process = subprocess.Popen([sys.executable, "-m", GATEWAY, "--config", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        local = Path(str(changes.get("http_socket", folder / "g.sock")))
        yield Gateway(f"127.0.0.1:{port}", folder / "g.sock", process.pid, local, str(changes.get("grpc_listen", "")))
    finally:
        process.terminate()
        try:
            process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def worker_pid(drivers: Path, sandbox: str) -> int:
    """The pid, on this machine, of a bubblewrapped worker; ``drivers`` is where its driver keeps its state."""
    init = msgspec.json.decode((drivers / sandbox / "handle.json").read_bytes())["pid"]
    return int(Path(f"/proc/{init}/task/{init}/children").read_text().split()[0])


def totals(gateway: Gateway) -> GatewayTotals:
    """What a gateway counted so far, as the agent asks for it."""
    with contextlib.closing(load.asking(load.Call("http", f"{load.UNIX}{gateway.socket}", ASK_TOTALS))) as ask:
        return codec.decode(ask()[1], GatewayTotals)


def has_setting(name: str) -> bool:
    """Whether the gateway knows it."""
    return name in Config.__struct_fields__


def in_all_ways(of: Path, *, processes: int = 1) -> dict[str, object]:
    """Settings of a gateway that answers in every way that it knows."""
    settings: dict[str, object] = {}
    if has_setting("grpc_listen"):
        settings["grpc_listen"] = f"127.0.0.1:{free_ports(1)[0]}"
    if has_setting("http_socket"):
        settings["http_socket"] = str(of / "h.sock")
    if has_setting("processes"):
        settings["processes"] = processes
    if has_setting("shared_memory"):
        settings["shared_memory"] = processes == 1  # a region is known to the one process that it was registered with
    return settings


def usual_routes(box_: Box) -> list[Route]:
    """The routes of a box's own gateway."""
    return codec.decode((box_.folder / "routes.json").read_bytes(), RouteTable).routes
