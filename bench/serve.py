"""Any of our endpoints, bare ONNX Runtime and the servers that others made: the same models, one client, in turn, on one machine.

``python -m bench.serve [--servers ...] [--models ...] [--concurrency 1,8] [--cores 0,1] [--client-cores 2] [--bars]``
``python -m bench.serve --prepare`` only makes the environments of the peers, below ``--cache``.

Concurrency 1 is latency: blocks of ``--block`` requests in rotation over the servers, each with one replica of each model, so that all
see the same noise; ``added`` is a server's quantile less that of bare ONNX Runtime in the same rotation. A larger concurrency is
throughput: ``--replicas`` of each model, blocks of ``--seconds`` in rotation, the median of ``--turns``; bare ONNX Runtime is so many
processes of its own, which run just before each server's block, so that a share is one of the same moment. A line of JSON for each
server, model and concurrency goes to standard output, a table and the bars to standard error.

A server that uses a core while nobody asks it anything is measured in a rotation of its own, beside bare ONNX Runtime alone. The client
takes time from the same cores unless it is given its own: ``client_cpu_s`` says how much.
"""

import argparse
import contextlib
import functools
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort

from bench import boxes, calls, load, models, serve_bars, shm
from bench.added_latency import driver_called
from bench.models import Model
from bench.peers import PEERS, running
from bench.report import report
from bench.sandboxes import RUNGS
from edge_agent.warden.ports import Driver

BARE = "bare"
OURS = ("skerry", "skerry-uds", "skerry-grpc", "skerry-shm")
WARM_UP_CALLS = 30
SETTLE_S = 2.0
RANDOM_SEED = 11


class Server(msgspec.Struct):
    """One server in one of its ways of being asked. ``front_s`` and ``worker_s`` are processor seconds used so far."""

    name: str
    targets: dict[str, calls.Target]
    front_s: Callable[[], float]
    worker_s: Callable[[], float]
    versions: dict[str, str]
    idle_cores: float = 0.0


class Bench(msgspec.Struct):
    """What is measured and how, with what was found so far. ``absent`` says why a server could not be measured."""

    arguments: argparse.Namespace
    folder: Path
    models: list[Model]
    driver: Driver
    rows: list[dict[str, object]] = []
    absent: dict[str, str] = {}

    def told(self, **row: object) -> None:
        """One result."""
        self.rows.append(row)
        report("serve", **row)


@contextlib.contextmanager
def ours(bench: Bench, wanted: list[str], *, folder: Path, replicas: int) -> Iterator[list[Server]]:
    """One box with our gateway, asked in the ways that are wanted; what it does not offer is noted as absent.

    The box's own gateway is asked over TCP; what needs further settings is asked of a second one over the same workers.
    """
    folder.mkdir(mode=0o755)
    processes = bench.arguments.processes
    with contextlib.ExitStack() as stack:
        box = stack.enter_context(boxes.box(folder, bench.driver, bench.models, replicas=replicas))
        settings = boxes.in_all_ways(folder, processes=processes)
        second = box.gateway
        if settings and (processes > 1 or not set(wanted) <= {"skerry"}):
            second = stack.enter_context(boxes.further_gateway(folder, "second", boxes.usual_routes(box), **settings))
        first = second if processes > 1 else box.gateway
        servers = []
        for name in wanted:
            gateway = first if name == "skerry" else second
            try:
                targets = {model.name: stack.enter_context(_our_target(name, gateway, model)) for model in bench.models}
            except shm.NotOffered as exc:
                bench.absent[name] = f"not offered: {exc}"
                continue
            server = Server(name, targets, functools.partial(boxes.cpu_s, gateway.pid), box.worker_cpu_s, {"onnxruntime": ort.__version__})
            if answers(bench, server):
                servers.append(server)
        yield servers


@contextlib.contextmanager
def _our_target(name: str, gateway: boxes.Gateway, model: Model) -> Iterator[calls.Target]:
    """How a gateway is asked for one model in one of our ways. Raises shm.NotOffered."""
    match name:
        case "skerry-uds":
            yield calls.binary(f"{load.UNIX}{gateway.local}", model)
        case "skerry-grpc":
            if not gateway.grpc:
                raise shm.NotOffered("the gateway has no gRPC")
            yield calls.grpc(gateway.grpc, model)
        case "skerry-shm":
            with shm.target(gateway.address, model) as target:
                yield target
        case _:
            yield calls.binary(gateway.address, model)


def answers(bench: Bench, server: Server) -> bool:
    """Whether it answers every model rightly; else it is noted as absent."""
    try:
        for target in server.targets.values():
            boxes.wait_until_right(target, within_s=boxes.READY_WITHIN_S)
    except RuntimeError as exc:
        bench.absent[server.name] = f"no right answer: {exc}"
        return False
    return True


@contextlib.contextmanager
def a_peer(bench: Bench, name: str, *, folder: Path, replicas: int) -> Iterator[list[Server]]:
    """A peer's server in all of its ways."""
    peer, cache = PEERS[name], bench.arguments.cache
    with running.serving(peer, cache, folder, wanted=bench.models, replicas=replicas) as (pid, targets):
        known = running.versions(peer, cache)
        yield [Server(way, by_model, functools.partial(boxes.cpu_s, pid), lambda: 0.0, known) for way, by_model in targets.items()]


@contextlib.contextmanager
def started(bench: Bench, names: list[str], *, replicas: int, turn: str) -> Iterator[list[Server]]:
    """All of these at once, each on the cores that servers are given."""
    with contextlib.ExitStack() as stack:
        servers: list[Server] = []
        with load.on_cores(bench.arguments.cores):
            wanted = [name for name in names if name in OURS]
            if wanted:
                try:
                    servers += stack.enter_context(ours(bench, wanted, folder=bench.folder / f"{turn}-ours", replicas=replicas))
                except RuntimeError as exc:
                    bench.absent |= dict.fromkeys(wanted, f"not started: {exc}")
            for name in [name for name in names if name in PEERS]:
                try:
                    servers += stack.enter_context(a_peer(bench, name, folder=bench.folder / f"{turn}-{name}", replicas=replicas))
                except running.Absent as exc:
                    bench.absent[name] = str(exc)
        time.sleep(SETTLE_S)
        before = [(server.front_s() + server.worker_s(), time.monotonic()) for server in servers]
        time.sleep(SETTLE_S)
        for server, (used_s, at_s) in zip(servers, before, strict=True):
            server.idle_cores = round((server.front_s() + server.worker_s() - used_s) / (time.monotonic() - at_s), 3)
        yield servers


def groups_of(names: list[str]) -> list[list[str]]:
    """Who is measured together: each restless peer alone, all others in one rotation."""
    restless = [name for name in names if name in PEERS and PEERS[name].restless]
    calm = [name for name in names if name not in restless]
    return [group for group in (calm, *([name] for name in restless)) if group]


class Kept:
    """A caller whose connection is made anew where a server hung up, as some do between two blocks."""

    def __init__(self, target: calls.Target) -> None:
        self._target = target
        self.ask = load.asking(target.call)

    def refresh(self) -> None:
        """Ask once, unmeasured, and look at the answer. Raises where that fails twice."""
        try:
            self._target.check(*self.ask())
        except Exception:  # noqa: BLE001 - whatever it is, it is seen again where it was not the connection
            self.close()
            self.ask = load.asking(self._target.call)
            self._target.check(*self.ask())

    def close(self) -> None:
        """Hang up."""
        self.ask.close()


def in_turn(bench: Bench, of: Callable[[], object], callers: dict[str, Kept]) -> dict[str, list[float]]:
    """Milliseconds of each call, by server and of bare ONNX Runtime, in blocks that take turns, each after one call that is not measured.

    Whoever fails is noted as absent and left out.
    """
    block, rounds = bench.arguments.block, bench.arguments.rounds
    order = [BARE, *callers]
    took: dict[str, list[float]] = {name: [] for name in order}
    shuffle = random.Random(RANDOM_SEED).shuffle
    for number in range(-1, -(-rounds // block)):
        shuffle(order)
        for name in list(order):
            try:
                if name == BARE:
                    of()
                else:
                    callers[name].refresh()
                times = load.timed(of if name == BARE else callers[name].ask, WARM_UP_CALLS if number < 0 else block)
            except Exception as exc:  # noqa: BLE001 - another's server may fail in any way, and the run goes on
                bench.absent[name] = f"failed in the run: {str(exc)[:200]}"
                order.remove(name)
                took.pop(name)
                continue
            if number >= 0:
                took[name] += times
    return took


def p99(values: list[float]) -> float:
    """The quantile."""
    return float(np.percentile(values, 99))


def latency(bench: Bench, servers: list[Server]) -> None:
    """Every model at concurrency 1."""
    for model in bench.models:
        with contextlib.ExitStack() as stack:
            callers = {server.name: stack.enter_context(contextlib.closing(Kept(server.targets[model.name]))) for server in servers}
            took = in_turn(bench, models.bare(model), callers)
        bare = took[BARE]
        for name, times in took.items():
            server = next((server for server in servers if server.name == name), None)
            bench.told(
                server=name, model=model.name, concurrency=1, requests=len(times), tensor_bytes=model.tensor_bytes,
                p50_ms=round(statistics.median(times), 4), p99_ms=round(p99(times), 4),
                added_p50_ms=round(statistics.median(times) - statistics.median(bare), 4), added_p99_ms=round(p99(times) - p99(bare), 4),
                beside=sorted(took), **({"versions": server.versions, "idle_cores": server.idle_cores} if server else {}),
            )  # fmt: skip


class BareProcesses:
    """Bare ONNX Runtime in processes of its own, which run a model as often as they can when told to."""

    def __init__(self, model: Model, count: int, *, folder: Path, cores: list[int]) -> None:
        inputs = folder / f"{model.name}.npz"
        np.savez(inputs, **model.feeds)
        argv = [sys.executable, "-m", "bench.models", str(model.file), str(inputs)]
        with load.on_cores(cores):
            self._processes = [
                subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **models.ENVIRONMENT})
                for _ in range(count)
            ]
        for process in self._processes:
            self._line(process)

    @staticmethod
    def _line(process: "subprocess.Popen[str]") -> str:
        assert process.stdout is not None
        return process.stdout.readline()

    def per_second(self, seconds: float) -> float:
        """Runs by second, all together."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{seconds}\n")
            process.stdin.flush()
        return sum(float(self._line(process)) for process in self._processes)

    def close(self) -> None:
        """End them."""
        for process in self._processes:
            process.kill()
            process.wait()


class Block(msgspec.Struct, frozen=True):
    """What one server did in one block."""

    per_second: float
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    failed: int = 0
    answered: int = 0
    front_cpu_s: float = 0.0
    worker_cpu_s: float = 0.0
    client_cpu_s: float = 0.0


def one_block(bench: Bench, server: Server, model: Model, connections: int) -> Block:
    """So many connections for so long."""
    arguments = bench.arguments
    plan = load.Plan([server.targets[model.name].call], connections, arguments.seconds, cores=arguments.client_cores)
    front_s, worker_s = server.front_s(), server.worker_s()
    told = load.driven(plan, bench.folder)
    front_s, worker_s = server.front_s() - front_s, server.worker_s() - worker_s
    good = told.latency_ms[told.good]
    if not len(good):
        raise RuntimeError(f"none of {len(told.status)} requests was answered")
    quantiles = np.percentile(good, [50, 99])
    failed = int(np.count_nonzero(~told.good))
    return Block(told.per_second, *map(float, quantiles), failed, len(good), front_s, worker_s, told.cpu_s)


def throughput(bench: Bench, servers: list[Server], connections: int) -> None:
    """Every model with so many connections."""
    arguments = bench.arguments
    for model in [model for model in bench.models if model.name in arguments.throughput_models]:
        blocks: dict[str, list[Block]] = {server.name: [] for server in servers}
        beside: dict[str, list[Block]] = {server.name: [] for server in servers}
        with contextlib.closing(BareProcesses(model, arguments.replicas, folder=bench.folder, cores=arguments.cores)) as bare:
            for _ in range(arguments.turns):
                for server in list(servers):
                    alone = Block(bare.per_second(arguments.seconds))
                    try:
                        blocks[server.name].append(one_block(bench, server, model, connections))
                    except Exception as exc:  # noqa: BLE001 - another's server may fail in any way, and the run goes on
                        bench.absent[server.name] = f"failed at concurrency {connections}: {str(exc)[:200]}"
                        servers.remove(server)
                        blocks.pop(server.name)
                        continue
                    beside[server.name].append(alone)
        every = [block for name in blocks for block in beside[name]]
        if every:
            bench.told(server=BARE, model=model.name, concurrency=connections, **throughput_row(every, every, arguments))
        for name, found in blocks.items():
            bench.told(server=name, model=model.name, concurrency=connections, **throughput_row(found, beside[name], arguments))


def throughput_row(found: list[Block], bare: list[Block], arguments: argparse.Namespace) -> dict[str, object]:
    """Medians over blocks. ``share_of_bare`` is that of bare ONNX Runtime just before, as measured; ``share_less_client`` leaves out what
    the client took of the same cores."""
    per_second = statistics.median(block.per_second for block in found)
    share = statistics.median(block.per_second / alone.per_second for block, alone in zip(found, bare, strict=True))
    row: dict[str, object] = {
        "replicas": arguments.replicas, "per_second": round(per_second, 1), "share_of_bare": round(share, 4),
    }  # fmt: skip
    if not found[0].answered:
        return row
    answered = sum(block.answered for block in found)
    front_s, worker_s, client_s = (sum(getattr(block, name) for block in found) for name in ("front_cpu_s", "worker_cpu_s", "client_cpu_s"))
    cores = len(arguments.cores or os.sched_getaffinity(0))
    if not arguments.client_cores or set(arguments.client_cores) & set(arguments.cores or os.sched_getaffinity(0)):
        left = 1 - client_s / (cores * arguments.seconds * len(found))
        row["share_less_client"] = round(share / left, 4)
    return row | {
        "p50_ms": round(statistics.median(block.p50_ms for block in found), 3),
        "p99_ms": round(statistics.median(block.p99_ms for block in found), 3),
        "failed": sum(block.failed for block in found), "front_cpu_s": round(front_s, 2), "worker_cpu_s": round(worker_s, 2),
        "client_cpu_s": round(client_s, 2), "per_front_core_second": round(answered / front_s) if front_s else None,
    }  # fmt: skip


def measure(bench: Bench) -> None:
    """Latency with one replica of each model, then throughput with as many as are wanted."""
    arguments = bench.arguments
    many = [count for count in arguments.concurrency if count > 1]
    for number, group in enumerate(groups_of(arguments.servers)):
        if 1 in arguments.concurrency:
            with started(bench, group, replicas=1, turn=f"l{number}") as servers:
                latency(bench, servers)
        if many:
            with started(bench, group, replicas=arguments.replicas, turn=f"t{number}") as servers:
                for count in many:
                    throughput(bench, servers, count)


def prepare(arguments: argparse.Namespace) -> None:
    """The environments of all peers that are wanted."""
    for name in [name for name in arguments.servers if name in PEERS]:
        try:
            running.prepare(PEERS[name], arguments.cache)
            sys.stderr.write(f"{name}: {running.versions(PEERS[name], arguments.cache)}\n")
        except running.Absent as exc:
            sys.stderr.write(f"{name}: {exc}\n")


def numbers(text: str) -> list[int]:
    """``1,8,32``."""
    return [int(part) for part in text.split(",") if part]


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    parser.add_argument("--models", nargs="+", choices=models.NAMES, default=list(models.NAMES))
    parser.add_argument("--throughput-models", nargs="+", choices=models.NAMES, default=["tiny", "shufflenet"])
    parser.add_argument("--concurrency", type=numbers, default=[1, 8], help="1 is latency; others are throughput")
    parser.add_argument("--rounds", type=int, default=1000, help="requests of latency, each server and model")
    parser.add_argument("--block", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one block of throughput")
    parser.add_argument("--turns", type=int, default=3, help="blocks of throughput, each server and model")
    parser.add_argument("--replicas", type=int, default=2, help="of each model, for throughput")
    parser.add_argument("--processes", type=int, default=1, help="of our gateway, where it can have several")
    parser.add_argument("--cores", type=numbers, default=[], help="for the servers and bare ONNX Runtime; all where none is named")
    parser.add_argument("--client-cores", type=numbers, default=[])
    parser.add_argument("--driver", choices=RUNGS, default="bubblewrap")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "skerry-bench")
    parser.add_argument("--prepare", action="store_true", help="make the environments of the peers, and no more")
    parser.add_argument("--bars", action="store_true", help="say at the end which bars were reached")
    return parser.parse_args()


def main() -> None:
    """Measure and report."""
    arguments = parsed()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    if arguments.prepare:
        prepare(arguments)
        return
    boxes.end_orderly()
    ort.disable_telemetry_events()
    folder = Path(tempfile.mkdtemp(prefix="sk-"))
    folder.chmod(0o755)
    bench = Bench(arguments, folder, models.models(folder, arguments.models), driver_called(arguments.driver, folder))
    try:
        measure(bench)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, reason in bench.absent.items():
        report("serve", server=name, absent=reason)
    sys.stderr.write(serve_bars.table(bench.rows, bench.absent))
    if arguments.bars:
        found = serve_bars.bars(bench.rows)
        report("serve", bars=[{**msgspec.to_builtins(bar), "reached": bar.reached} for bar in found])
        sys.stderr.write(serve_bars.bars_table(found))


if __name__ == "__main__":
    main()
