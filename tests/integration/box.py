"""One box's warden for tests, in this process: its real loop, store, slots and journal on disk, over any drivers."""

import asyncio
import contextlib
import gc
import hashlib
import os
import re
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from edge_agent.core.admission import Limits
from edge_agent.core.report import models_wanted
from edge_agent.warden.config import Config
from edge_agent.warden.daemon import make_driver
from edge_agent.warden.drivers.fake import FakeDriver, FakeSandbox, FakeWorld
from edge_agent.warden.journal import Journal
from edge_agent.warden.offer import Offer
from edge_agent.warden.ports import Driver
from edge_agent.warden.reconcile import Reconciler
from edge_agent.warden.slots import Slot, Slots
from edge_agent.warden.software import BoxSoftware
from edge_agent.warden.store import Store
from edge_agent.warden.verify import unvouched
from skerry.wire import codec, ipc
from skerry.wire.box import Entry, RouteTable
from skerry.wire.bundle import Bundle
from skerry.wire.messages import Desired, ModelRef, ReplicaReport, ReplicaSpec, RouteSpec, Rung
from tests.conftest import scaling

T = TypeVar("T")

MIB = 2**20
PATIENCE_S = 40.0
FAST: dict[str, Any] = {"drain_s": 0.05, "restart_first_s": 0.05, "restart_most_s": 1.0, "warm_most": 0}
"""Settings under which nothing waits longer than a test must."""


class Box:
    """A box's disk, and the warden that ``up`` starts on it. Without ``drivers`` its sandboxes are those of ``world``."""

    def __init__(
        self,
        folder: Path,
        drivers: Callable[["Box"], list[Driver]] = lambda box: [FakeDriver(box.world)],
        *,
        memory_bytes: int = 1024 * MIB,
        gpus: dict[str, int] | None = None,
        **settings: Any,
    ) -> None:
        self.folder = folder
        # Processes are also counted by user: another warden on this machine must not have given the same ids out.
        uid_first = 1_900_000_000 + int.from_bytes(os.urandom(2)) * 100
        self.world = FakeWorld()
        self.limits = Limits(memory_bytes, gpus or {})
        self.config = Config(
            fleet="f",
            node=folder.name,
            state_dir=folder / "w",
            socket=folder / "w.sock",
            incoming_dir=folder / "in",
            routes_file=folder / "routes.json",
            trusted_keys_file=folder / "keys",
            **{**FAST, "uid_first": uid_first, **settings},
        )
        self.config.incoming_dir.mkdir(exist_ok=True)
        self.desired: Desired | None = None
        self.not_yet: set[Rung] = set()
        """Of whom the warden's drivers do not work when it starts."""
        self.model_keys: list[EllipticCurvePublicKey] | None = None
        self._drivers = drivers
        self._models: dict[str, bytes] = {}
        self._look: Callable[[], object] = lambda: None

    # -- its life

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        """From one start of the warden to its end; sandboxes live on. What is wanted is what was wanted before."""
        state_dir = self.config.state_dir
        store = Store(state_dir)
        self.journal = Journal(state_dir / "journal.db", most=self.config.journal_entries)
        self.slots = Slots(state_dir / "sandboxes", uid_first=self.config.uid_first)
        self.offer = Offer(self._drivers(self))
        self.offer.working += [driver for driver in self.offer.drivers if driver.rung not in self.not_yet]
        self.warden = Reconciler(
            self.config,
            offer=self.offer,
            store=store,
            slots=self.slots,
            journal=self.journal,
            limits=self.limits,
            desired=self.desired,
            unvouched=lambda document: unvouched(document, self.model_keys),
        )
        self.warden.software = BoxSoftware(
            state_dir, self.config.updater_record_file, store,
            on_step=lambda step: self.journal.note(step.kind, step.subject, step.text, at_ms=step.at_ms),
        )  # fmt: skip
        self.warden.on_change = self.journal.on_add = lambda *_: self._look()
        stop = asyncio.Event()
        self._running = asyncio.create_task(self.warden.run(stop), name="box.warden")
        try:
            yield
        finally:
            stop.set()
            await self._running
            self.journal.close()

    def play(self, scene: Callable[[], Awaitable[None]]) -> None:
        """Run ``scene``, and end every sandbox in the same event loop: the fake ones live in it."""

        async def whole() -> None:
            try:
                await scene()
            finally:
                self.world.fail.clear()
                for driver in self._drivers(self):
                    for sandbox in await driver.sandboxes():
                        await driver.stop(sandbox.name, grace_s=0)

        asyncio.run(whole())

    def lose_power(self) -> None:
        """While no warden runs: every fake sandbox ended, in what is an earlier boot when the next warden starts."""
        for name in self.world.sandboxes:
            self.world.kill(name, "the power went away")
        for path in self.config.state_dir.glob("sandboxes/*/slot.json"):
            slot = codec.decode(path.read_bytes(), Slot)
            path.write_bytes(codec.encode(msgspec.structs.replace(slot, boot_id="an earlier one")))

    # -- what is wanted

    def spec(self, name: str = "d-0", *, version: int = 1, content: bytes = b"", **fields: Any) -> ReplicaSpec:
        """A replica of ``version`` of its deployment's model; the fake driver takes any ``content``."""
        content = content or f"version {version}".encode()
        digest = hashlib.sha256(content).hexdigest()
        self._models[digest] = content
        model = ModelRef("m", version, digest, len(content), fields.pop("warmup", []))
        fields = {"generation": version, "memory_bytes": 256 * MIB, "cpus": 1.0, **fields}
        return ReplicaSpec(name, name.rpartition("-")[0], model=model, **fields)

    def document(self, *replicas: ReplicaSpec, signatures: dict[str, Bundle] | None = None) -> Desired:
        """The next document, by which these replicas are wanted, each deployment's with a route."""
        routes = {r.deployment: RouteSpec(r.deployment, r.model.name, r.model.version, 1000) for r in replicas}
        generation = 1 if self.desired is None else self.desired.generation + 1
        self.desired = Desired(
            self.config.fleet,
            self.config.node,
            generation,
            issued_at_ms=1,
            replicas=list(replicas),
            routes=list(routes.values()),
            signatures=signatures or {},
        )
        return self.desired

    async def want(self, *replicas: ReplicaSpec, signatures: dict[str, Bundle] | None = None) -> None:
        """Have a new document accepted, and bring the models that it needs, as the agent would."""
        desired = self.document(*replicas, signatures=signatures)
        self.warden.accept(desired)
        for model in models_wanted(desired, Store(self.config.state_dir).models()):
            self.bring(model)
            await self.warden.arrived(model.sha256, "")

    def bring(self, model: ModelRef) -> Path:
        """Put a model's bytes where the agent would."""
        path = self.config.incoming_dir / model.sha256
        path.write_bytes(self._models[model.sha256])
        return path

    # -- what is

    def report(self, name: str = "d-0") -> ReplicaReport | None:
        """What the warden says of a replica."""
        state = self.warden.state
        return next((report for report in state.reported.replicas if report.name == name), None) if state else None

    def routes(self) -> RouteTable:
        """The gateway's file."""
        return codec.decode(self.config.routes_file.read_bytes(), RouteTable)

    def socket(self, deployment: str = "d") -> Path:
        """Where the one ready replica of a deployment listens."""
        ((socket,),) = [[replica.socket for replica in route.replicas] for route in self.routes().routes if route.deployment == deployment]
        return Path(socket)

    def entries(self, *kinds: str, subject: str = "") -> list[Entry]:
        """The journal, or what is of these kinds and of this subject in it."""
        found: list[Entry] = []
        while batch := self.journal.after(found[-1].seq if found else 0).entries:
            found += batch
        return [e for e in found if (not kinds or e.kind in kinds) and subject in ("", e.subject)]

    def kinds(self, subject: str) -> list[str]:
        """What happened to a subject, in order."""
        return [entry.kind for entry in self.entries(subject=subject)]

    @property
    def running(self) -> dict[str, FakeSandbox]:
        """The fake sandboxes that run."""
        return {name: sandbox for name, sandbox in self.world.sandboxes.items() if sandbox.running}

    @property
    def granted_bytes(self) -> int:
        """The memory that they may use in all."""
        return sum(sandbox.spec.memory_bytes for sandbox in self.running.values())

    def warm(self) -> list[str]:
        """The warm sandboxes whose worker waits for a model."""
        return sorted(path.parent.parent.name for path in (self.config.state_dir / "sandboxes").glob("warm-*/run/control.sock"))

    @contextlib.asynccontextmanager
    async def sampling(self, look: Callable[[], T]) -> AsyncIterator[list[T]]:
        """What ``look`` returned at every change of the state, at every entry of the journal and every millisecond, repeats left out."""
        samples: list[T] = []

        def take() -> None:
            sample = look()
            if not samples or samples[-1] != sample:
                samples.append(sample)

        async def poll() -> None:
            while True:
                take()
                await asyncio.sleep(0.001)

        self._look = take
        polling = asyncio.create_task(poll(), name="box.sampling")
        try:
            yield samples
            take()
        finally:
            self._look = lambda: None
            polling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await polling

    # -- waiting

    async def until(self, holds: Callable[[], object]) -> None:
        """Until it holds; says what stood instead. Fails at once where the warden's loop has failed."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            if self._running.done():
                self._running.result()
            if time.monotonic() > deadline:
                last = [f"{entry.kind} {entry.subject}: {entry.text}" for entry in self.entries()[-12:]]
                pytest.fail("\n".join([f"not within {PATIENCE_S} s; {self.warden.state}", *last]))
            await asyncio.sleep(0.002)

    async def until_noticed(self, holds: Callable[[], object]) -> None:
        """The same of what happened to a sandbox: the warden is made to look, which by itself it does once a second."""

        def look_and_see() -> object:
            self.warden.wake()
            return holds()

        await self.until(look_and_see)

    async def until_ready(self, *names: str) -> None:
        """Until these replicas, or all that are wanted, are ready in the generation that is wanted and no other sandbox serves."""
        wanted = {spec.name: spec.generation for spec in (self.desired.replicas if self.desired else [])}
        names = names or tuple(wanted)

        def are_ready() -> bool:
            reports = [self.report(name) for name in names]
            return all(report and (report.phase, report.generation) == ("ready", wanted[report.name]) for report in reports)

        await self.until(are_ready)

    async def looked(self, times: int = 3) -> None:
        """Until the warden has looked and decided anew so many times."""
        for _ in range(times):
            before = self.warden.looked_at
            self.warden.wake()
            await self.until(lambda before=before: self.warden.looked_at != before)


class Caller:
    """The gateway's end of a worker's socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    @contextlib.asynccontextmanager
    async def to(cls, socket: Path) -> AsyncIterator["Caller"]:
        """Connected, and greeted."""
        reader, writer = await asyncio.open_unix_connection(str(socket))
        try:
            caller = cls(reader, writer)
            await caller._frame()
            yield caller
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _frame(self) -> tuple[bytes, bytes]:
        async with asyncio.timeout(PATIENCE_S):
            header_bytes, body_bytes = ipc.parse_prefix(await self._reader.readexactly(ipc.PREFIX.size))
            return await self._reader.readexactly(header_bytes), await self._reader.readexactly(body_bytes)

    async def ask(self, *x: float) -> tuple[float, ...]:
        """What the model makes of three numbers. Raises OSError or IncompleteReadError where the connection ends."""
        body = struct.pack("<3f", *x)
        call = ipc.Call(1, [ipc.TensorHead("x", "FP32", (1, 3), len(body))])
        self._writer.writelines(ipc.frame(ipc.Batch([call]), [body]))
        header, answer = await self._frame()
        assert [answer.error for answer in ipc.parse_header(header, ipc.Answers).answers] == [""]
        return struct.unpack("<3f", answer)


async def answer_of(socket: Path) -> tuple[float, ...]:
    """What the worker there makes of 1, 2, 3."""
    async with Caller.to(socket) as caller:
        return await caller.ask(1, 2, 3)


def scaling_file(factor: float) -> bytes:
    """An ONNX file of ``y = factor x``."""
    return scaling(factor).SerializeToString()


def bubblewrap(box: Box) -> list[Driver]:
    """The real thing, as the warden's own process has it."""
    return [make_driver("bubblewrap", box.config)]


def sandboxes_with_processes(folder: Path) -> set[str]:
    """Sandboxes below ``folder`` of which a process lives, by the socket directory that it was given."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                found |= set(re.findall(f"/{folder.name}/w/sandboxes/([^/ ]+)/run ", (entry / "mountinfo").read_text()))
    return found


def groups_of(folder: Path) -> set[str]:
    """Sandboxes below ``folder`` that have a control group."""
    return {path.name for path in Path("/sys/fs/cgroup").glob(f"*/skerry-f-{folder.name}-*/*") if path.is_dir()}


def open_descriptors() -> int:
    """Files that this process has open, without those that nobody holds any more."""
    gc.collect()
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
