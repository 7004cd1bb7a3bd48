"""What the benchmarks of sandboxes share: a warden's loop around one driver, and a caller on a worker's socket.

Neither numpy nor ONNX Runtime is imported here: pages of theirs that this process had too would be counted to it in a sandbox's memory.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog
import uvloop

from edge_agent.core.admission import Limits
from edge_agent.warden import daemon, launch
from edge_agent.warden.config import Config
from edge_agent.warden.drivers import host_runtime
from edge_agent.warden.journal import Journal
from edge_agent.warden.offer import Offer
from edge_agent.warden.ports import SOCKET_NAME
from edge_agent.warden.reconcile import Reconciler
from edge_agent.warden.slots import Slots
from edge_agent.warden.store import Store
from skerry.cli import catalogue
from skerry.runtime import unix_socket
from skerry.wire import codec, ipc, oip
from skerry.wire.box import RouteTable, State
from skerry.wire.messages import Desired, ModelRef, ReplicaSpec, RouteSpec, WarmupTensor

T = TypeVar("T")

MODELS = Path(__file__).resolve().parents[1] / "models"
CACHE = Path(".cache/models")
RUNGS = ("bubblewrap", "docker", "gvisor")
MEMORY_BYTES = 512 * 2**20
CPUS = 1.0
WITHIN_S = 60.0
POLL_S = 0.005
TOLERANCE = 1e-4
QUIET_WITHIN_S, QUIET_LOOK_S, QUIET_SHARE = 2.0, 0.2, 0.8
TRUTH = """
import json, sys
import numpy as np, onnxruntime as ort
feeds = {n: np.frombuffer(bytes.fromhex(h), d).reshape(s) for n, d, s, h in json.load(sys.stdin)}
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
print(json.dumps([np.asarray(output, "f4").ravel().tolist() for output in session.run(None, feeds)]))
"""


class Question:
    """One call of a model and what the model says to it outside of any sandbox, computed by another process."""

    def __init__(self, model: Path, tensors: list[oip.Tensor]) -> None:
        self.tensors = tensors
        heads = ipc.heads_of(tensors)
        self.frame = b"".join(bytes(part) for part in ipc.frame(ipc.Batch([ipc.Call(1, heads)]), [tensor.data for tensor in tensors]))
        feeds = [(t.name, oip.NUMPY_DTYPES[t.datatype], t.shape, bytes(t.data).hex()) for t in tensors]
        said = subprocess.run(
            [sys.executable, "-c", TRUTH, str(model)], input=json.dumps(feeds), capture_output=True, text=True, check=True, timeout=WITHIN_S
        )
        self._truth = array("f", (number for output in json.loads(said.stdout) for number in output))

    def check(self, answer: ipc.Answer, body: bytes) -> None:
        """Raise unless the answer is the right one."""
        if answer.error:
            raise RuntimeError(answer.error)
        self.check_numbers(array("f", body))

    def check_numbers(self, got: Sequence[float]) -> None:
        """The same for all outputs' numbers, one after the other."""
        if len(got) != len(self._truth) or any(abs(a - b) > TOLERANCE for a, b in zip(got, self._truth, strict=True)):
            raise RuntimeError(f"a wrong answer: {got[:4]} for {self._truth[:4]}")


class Caller:
    """One connection to a worker, by a caller that costs next to nothing itself."""

    def __init__(self, path: Path, question: Question) -> None:
        self._question = question
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(WITHIN_S)
        with unix_socket.pinned(path) as short:
            self._socket.connect(short)
        self._read()

    def _read(self) -> tuple[bytes, bytes]:
        """One frame: its header and its body."""
        got = self._socket.recv(65536)
        while len(got) < ipc.PREFIX.size or len(got) < ipc.PREFIX.size + sum(ipc.parse_prefix(got[: ipc.PREFIX.size])):
            more = self._socket.recv(65536)
            if not more:
                raise RuntimeError("the worker closed the connection")
            got += more
        header_bytes, _ = ipc.parse_prefix(got[: ipc.PREFIX.size])
        return got[ipc.PREFIX.size : ipc.PREFIX.size + header_bytes], got[ipc.PREFIX.size + header_bytes :]

    def ask(self) -> tuple[bytes, bytes]:
        """Ask once; the answer is not looked at."""
        self._socket.sendall(self._question.frame)
        return self._read()

    def ask_and_check(self) -> None:
        """Ask once; raises unless the answer is right."""
        header, body = self.ask()
        (answer,) = ipc.parse_header(header, ipc.Answers).answers
        self._question.check(answer, body)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def first_answer(path: Path, question: Question) -> None:
    """Connect, ask once, check and hang up."""
    with contextlib.closing(Caller(path, question)) as caller:
        caller.ask_and_check()


def speech() -> tuple[ModelRef, Path, Question]:
    """The speech detector, its file and a call with noise in it."""
    manifest = next(manifest for manifest in catalogue.read_catalogue(MODELS) if manifest.name == "speech-detector")
    path = catalogue.materialise(manifest, CACHE).resolve()
    noise = array("f", (((i * 7919) % 1009 - 504) / 5040 for i in range(576)))
    tensors = [
        oip.Tensor("input", "FP32", (1, 576), noise.tobytes()),
        oip.Tensor("state", "FP32", (2, 1, 128), bytes(4 * 256)),
        oip.Tensor("sr", "INT64", (), (16000).to_bytes(8, "little")),
    ]
    return reference(manifest.name, path, manifest.warmup), path, Question(path, tensors)


def reference(name: str, path: Path, warmup: list[WarmupTensor] | None = None) -> ModelRef:
    """A model's file, pinned."""
    content = path.read_bytes()
    return ModelRef(name, 1, hashlib.sha256(content).hexdigest(), len(content), warmup or [])


def engine_socket() -> Path:
    """The engine: SKERRY_DOCKER_SOCKET, DOCKER_HOST, or the machine's own."""
    host = os.environ.get("DOCKER_HOST", "").removeprefix("unix://")
    return Path(os.environ.get("SKERRY_DOCKER_SOCKET") or host or "/var/run/docker.sock")


async def until(holds: Callable[[], bool], what: str) -> None:
    """Poll; raises where it does not come true."""
    deadline = time.monotonic() + WITHIN_S
    while not holds():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {WITHIN_S:.0f} s: {what}")
        await asyncio.sleep(POLL_S)


def _idle_ticks() -> int:
    """Of all processors, those spent on what gives way counted too, since the machine started (proc_stat(5))."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()
    return int(fields[2]) + int(fields[4]) + int(fields[5])


async def quiet() -> bool:
    """Wait a while for other work on this machine to leave nearly all of its processors; says whether it did."""
    ticks_per_s = os.sysconf("SC_CLK_TCK") * (os.cpu_count() or 1)
    deadline = time.monotonic() + QUIET_WITHIN_S
    while time.monotonic() < deadline:
        before, started = _idle_ticks(), time.monotonic()
        await asyncio.sleep(QUIET_LOOK_S)
        if _idle_ticks() - before >= QUIET_SHARE * ticks_per_s * (time.monotonic() - started):
            return True
    return False


class Box:
    """A warden's own parts around one driver, its loop running in this process; the model is in its store."""

    def __init__(self, folder: Path, rung: str, *, model: ModelRef, file: Path, warm_most: int = 0) -> None:
        self.rung = rung
        folder.mkdir(mode=0o755, parents=True)
        self.config = Config(
            fleet="bench", node=f"{rung}-{warm_most}", state_dir=folder / "state", socket=folder / "warden.sock", incoming_dir=folder,
            routes_file=folder / "routes.json", trusted_keys_file=folder / "keys", drivers=[rung], docker_socket=engine_socket(),
            drain_s=0.0, warm_most=warm_most,
        )  # fmt: skip
        self.store = Store(self.config.state_dir)
        self.store.admit(file, model)
        self.slots = Slots(self.config.state_dir / "sandboxes", uid_first=self.config.uid_first)
        self.journal = Journal(self.config.state_dir / "journal.db", most=self.config.journal_entries)
        self.driver = daemon.make_driver(rung, self.config)
        offer = Offer([self.driver])
        offer.working.append(self.driver)
        self.reconciler = Reconciler(
            self.config, offer=offer, store=self.store, slots=self.slots, journal=self.journal, limits=Limits(16 * 2**30), desired=None,
            unvouched=lambda _: {},
        )  # fmt: skip
        self.model = model
        self._generation = 0
        self._news = asyncio.Event()
        self.reconciler.on_change = self._hear

    def _hear(self, _: State) -> None:
        self._news.set()

    def want(self, replicas: int) -> None:
        """Accept a document with that many replicas."""
        self._generation += 1
        name = self.model.name
        specs = [ReplicaSpec(f"{name}-{n}", name, self._generation, self.model, MEMORY_BYTES, CPUS) for n in range(replicas)]
        routes = [RouteSpec(name, name, 1, 1000)] if replicas else []
        self.reconciler.accept(Desired("bench", self.config.node, self._generation, time.time_ns() // 1_000_000, specs, routes))

    async def sockets(self, replicas: int) -> list[Path]:
        """Wait until the route table has that many replicas; returns where they listen."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                self._news.clear()
                with contextlib.suppress(FileNotFoundError):
                    table = codec.decode(self.config.routes_file.read_bytes(), RouteTable)
                    found = [Path(replica.socket) for route in table.routes for replica in route.replicas]
                    if table.generation == self._generation and len(found) == replicas:
                        return found
                await self._news.wait()

    @property
    def took_warm(self) -> bool:
        """Whether the first replica was started ahead."""
        state = self.reconciler.state
        return state is not None and bool(state.reported.replicas) and state.reported.replicas[0].is_warm

    async def empty(self) -> None:
        """Want nothing, and wait until no replica's sandbox is left."""
        self.want(0)
        await until(lambda: all(slot.replica is None for slot in self.slots.all().values()), "the replica is gone")

    async def warm(self) -> None:
        """Wait until a warm sandbox waits for its model."""

        def waits() -> bool:
            warm = [name for name, slot in self.slots.all().items() if slot.replica is None]
            return any(launch.is_waiting(self.slots.socket_dir(name)) for name in warm)

        await until(waits, f"a warm sandbox of {self.rung} waits for its model")


@contextlib.asynccontextmanager
async def running(box: Box) -> AsyncIterator[Box]:
    """The box's loop; what it started is stopped in the end."""
    await asyncio.to_thread(host_runtime.compile_ours)  # as a warden does when it starts
    reason = await box.driver.probe()
    if reason:
        raise RuntimeError(f"{box.rung} does not work here: {reason}")
    stop = asyncio.Event()
    task = asyncio.create_task(box.reconciler.run(stop))
    try:
        yield box
    finally:
        stop.set()
        await task
        for sandbox in await box.driver.sandboxes():
            await box.driver.stop(sandbox.name, grace_s=0)
        box.journal.close()


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder of our own that sandboxes may look into, with a short path."""
    folder = Path(tempfile.mkdtemp(prefix="sk-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def bare_worker(folder: Path, model: Path, warmup: list[WarmupTensor]) -> subprocess.Popen[bytes]:
    """The same worker with the same environment outside of any sandbox; it listens in ``folder``."""
    folder.mkdir(parents=True)
    argv = [sys.executable, "-m", "edge_agent.worker", "--threads", "1", "--socket", str(folder / SOCKET_NAME), "--model", str(model)]
    argv += ["--warmup", msgspec.json.encode(warmup).decode()]
    return subprocess.Popen(argv, env=host_runtime.worker_environment(CPUS))


def wait_for_socket(path: Path) -> None:
    """Until a worker listens there."""
    deadline = time.monotonic() + WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"no worker within {WITHIN_S:.0f} s")
        time.sleep(POLL_S)


def run(main: Callable[[], Awaitable[T]]) -> T:
    """Run it in the event loop that the warden uses, with warnings alone in its log, on standard error."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING), logger_factory=structlog.PrintLoggerFactory(sys.stderr)
    )

    async def whole() -> T:
        return await main()

    return uvloop.run(whole())


def summary(took_s: list[float], bar_s: float | None = None) -> dict[str, object]:
    """Median and ninth decile of times, and whether the bar was reached."""
    p50_s = statistics.median(took_s)
    p90_s = statistics.quantiles(took_s, n=10, method="inclusive")[8] if len(took_s) > 1 else p50_s
    figures: dict[str, object] = {"p50_s": round(p50_s, 4), "p90_s": round(p90_s, 4), "max_s": round(max(took_s), 4)}
    return figures if bar_s is None else {**figures, "bar_p50_s": bar_s, "reached": p50_s <= bar_s}
