"""The loop that makes the box what the desired document says: look, ask core/diff for steps, run them, look again.

want (signed document) --+
                         +--> core.diff.next_steps --> run --> publish report and routes --> wait for a change
seen (drivers, store) ---+
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, assert_never

import msgspec

from edge_agent.core import diff
from edge_agent.core.report import ReplicaStatus, models_wanted, report_of, routes_of
from edge_agent.warden.config import Config
from edge_agent.warden.journal import Journal
from edge_agent.warden.ports import Driver, DriverFailed, Sandbox, SandboxSpec
from edge_agent.warden.store import Store, StoreFailed
from skerry.runtime import backoff, durable, lifecycle, log
from skerry.wire import codec, ipc
from skerry.wire.box import RouteTable, State
from skerry.wire.messages import RUNGS, Desired, ModelRef, Phase, ReplicaSpec

logger = log.get("warden.reconcile")

STEADY_POLL_S = 1.0
STARTING_POLL_S = 0.02
HELLO_TIMEOUT_S = 2.0
STOP_GRACE_S = 3.0
REMOVE_AGAIN_S = 5.0
MOST_REASON = 500
"""Characters of what a sandbox said that are passed on."""
FORGIVE_AFTER_S = 60.0
"""A replica that served this long starts its back-off anew when it ends."""


class Known(msgspec.Struct):
    """What the warden remembers of one replica between two looks; a restart of the warden rebuilds it from the drivers."""

    spec: ReplicaSpec
    phase: diff.SeenPhase
    driver: Driver | None = None
    since: float = 0.0
    ready: bool = False
    reason: str = ""
    failed: bool = False
    provider: str = ""
    retry_at: float = 0.0
    drained_at: float = 0.0


class Reconciler:
    """Owns the sandboxes of this box. ``wake`` asks for a look now; ``on_change`` hears of every new State."""

    def __init__(
        self, config: Config, *, drivers: list[Driver], store: Store, journal: Journal, limits: diff.Limits, desired: Desired | None
    ) -> None:
        self._config = config
        self._drivers = drivers
        self._store = store
        self._journal = journal
        self._limits = limits
        self.desired = desired
        self.refused = ""
        self._known: dict[str, Known] = {}
        self._attempts: dict[str, int] = {}
        self._waiting: dict[str, str] = {}
        self._wake = asyncio.Event()
        self._state: State | None = None
        self._routes: RouteTable | None = None
        self.on_change: Callable[[State], None] = lambda _: None
        self.looked_at = time.monotonic()

    @property
    def state(self) -> State | None:
        """What the agent is told; None until the first look is over."""
        return self._state

    def wake(self) -> None:
        """Look again now."""
        self._wake.set()

    def _say(self, kind: str, subject: str, text: str = "") -> None:
        self._journal.add(kind, subject, text, at_ms=time.time_ns() // 1_000_000)
        logger.info(kind, subject=subject, text=text)

    # -- what the listener asks

    def accept(self, desired: Desired) -> None:
        """Act on a document that was verified and persisted."""
        if self.desired is None or desired.generation != self.desired.generation:
            self._say("desired.accepted", str(desired.generation), f"{len(desired.replicas)} replicas wanted")
        self.desired, self.refused = desired, ""
        self.wake()

    def refuse(self, reason: str) -> None:
        """Note a document that changes nothing."""
        if reason != self.refused:
            self._say("desired.refused", "", reason)
        self.refused = reason
        self.wake()

    async def arrived(self, sha256: str, reason: str) -> None:
        """The agent says that a model's bytes lie in the incoming folder, or why not."""
        model = next((m for m in self._needs() if m.sha256 == sha256), None)
        if model is None:
            return
        if not reason:
            try:
                await asyncio.to_thread(self._store.admit, self._config.incoming_dir / sha256, model)
                self._say("model.admitted", f"{model.name}:{model.version}", sha256)
            except StoreFailed as exc:
                reason = str(exc)
                self._say("model.refused", f"{model.name}:{model.version}", reason)
        self._waiting[sha256] = reason
        self.wake()

    def _needs(self) -> list[ModelRef]:
        return models_wanted(self.desired, self._store.models())

    # -- the loop

    async def run(self, stop: asyncio.Event) -> None:
        """Adopt what an earlier warden started, then converge until ``stop`` is set. Sandboxes are left running."""
        for driver in self._drivers:
            await self._adopt_all(driver, stop)
        while not stop.is_set():
            self._wake.clear()
            await self._look()
            moved = await self._converge()
            self._publish()
            self._journal.flush()
            self.looked_at = time.monotonic()
            if not moved:
                await self._rest(stop)

    async def _rest(self, stop: asyncio.Event) -> None:
        """Until something asks for a look, or it is time for one."""
        if any(k.phase == "running" and not k.ready for k in self._known.values()):
            pause_s: float = STARTING_POLL_S
        else:
            now = time.monotonic()
            times = [k.retry_at if k.phase == "dead" else k.drained_at for k in self._known.values() if k.phase in ("dead", "draining")]
            pause_s = max(0.01, min([STEADY_POLL_S, *(t - now for t in times)]))
        if not self._known and not (self.desired and self.desired.replicas):
            pause_s = 10.0  # an idle box has nothing to look at
        await lifecycle.first_of(self._wake, stop, within_s=pause_s)

    async def _adopt_all(self, driver: Driver, stop: asyncio.Event) -> None:
        """Nothing is started before it is known what runs: an engine that does not answer is asked again."""
        while not stop.is_set():
            try:
                for sandbox in await driver.sandboxes():
                    await self._adopt(driver, sandbox)
            except DriverFailed as exc:
                logger.warning("driver.silent", driver=driver.name, reason=str(exc))
                await lifecycle.sleep_until(stop, REMOVE_AGAIN_S)
            else:
                return

    async def _adopt(self, driver: Driver, sandbox: Sandbox) -> None:
        try:
            spec = codec.decode(sandbox.label.encode(), ReplicaSpec)
        except codec.Malformed:
            await driver.stop(sandbox.name, grace_s=0)
            return
        if sandbox.running:
            self._known[sandbox.name] = Known(spec, "running", driver, since=time.monotonic())
            self._say("replica.adopted", spec.name, driver.name)
        else:
            self._die(Known(spec, "running", driver, since=time.monotonic()), sandbox.exit_reason)

    async def _look(self) -> None:
        """Bring ``_known`` up to date with what the drivers see, and ask starting workers whether they are ready."""
        now = time.monotonic()
        for driver in {id(k.driver): k.driver for k in self._known.values() if k.driver}.values():
            try:
                seen = {sandbox.name: sandbox for sandbox in await driver.sandboxes()}
            except DriverFailed as exc:
                logger.warning("driver.silent", driver=driver.name, reason=str(exc))
                continue
            for name, known in self._known.items():
                if known.driver is driver and known.phase in ("running", "draining") and not (name in seen and seen[name].running):
                    self._die(known, seen[name].exit_reason if name in seen else "the sandbox is gone")
        starting = [k for k in self._known.values() if k.phase == "running" and not k.ready]
        await asyncio.gather(*(self._ask_ready(known, now) for known in starting))

    async def _ask_ready(self, known: Known, now: float) -> None:
        hello = await read_hello(self._socket_dir(known.spec.name) / "worker.sock")
        if hello is not None:
            known.ready, known.provider, known.reason = True, hello.provider[:64], ""
            self._say("replica.ready", known.spec.name, f"{hello.provider[:64]}, loaded in {hello.load_ms:.0f} ms")
        elif now - known.since > self._config.start_timeout_s and known.driver is not None:
            with contextlib.suppress(DriverFailed):
                await known.driver.stop(known.spec.name, grace_s=0)
            self._die(known, f"not ready within {self._config.start_timeout_s:.0f} s")

    def _die(self, known: Known, reason: str) -> None:
        """A sandbox ended, or could not be started: remember why, and when to try again."""
        name, reason = known.spec.name, "".join(c if c.isprintable() else " " for c in reason[:MOST_REASON])
        if known.ready and time.monotonic() - known.since > FORGIVE_AFTER_S:
            self._attempts[name] = 0
        attempt = self._attempts.get(name, 0)
        self._attempts[name] = attempt + 1
        delay_s = backoff.delay_s(attempt, random.random(), first_s=self._config.restart_first_s, most_s=self._config.restart_most_s)
        known.phase, known.ready, known.reason = "dead", False, reason
        known.failed = "load failed" in reason or known.driver is None
        known.retry_at = time.monotonic() + delay_s
        self._known[name] = known
        self._say("replica.ended", name, f"{reason}; next try in {delay_s:.1f} s")

    async def _converge(self) -> bool:
        """Run one batch of steps; says whether anything moved."""
        if self.desired is None:
            return False  # nothing is known of what is wanted: what runs is left alone
        now = time.monotonic()
        want = {spec.name: spec for spec in self.desired.replicas}
        for name in [n for n in self._attempts if n not in want]:
            del self._attempts[name]
        seen = {name: diff.Seen(k.spec, k.phase, k.retry_at, k.drained_at) for name, k in self._known.items()}
        steps = diff.next_steps(want, seen, limits=self._limits, now=now)
        results = await asyncio.gather(*(self._run(step, now) for step in steps))
        return any(results)

    def _run(self, step: diff.Step, now: float) -> Coroutine[Any, Any, bool]:
        match step:
            case diff.Fetch(spec):
                return self._fetch(spec)
            case diff.Start(spec):
                return self._start(spec)
            case diff.Drain(name):
                return self._drain(name, now)
            case diff.Remove(name):
                return self._remove(name)
            case _:
                assert_never(step)

    async def _fetch(self, spec: ReplicaSpec) -> bool:
        """Whether the model is here; the agent is told of what is not by the state's ``needs``."""
        if spec.model.sha256 not in self._store.models():
            return False
        self._waiting.pop(spec.model.sha256, None)
        self._known[spec.name] = Known(spec, "fetched")
        return True

    def _driver_for(self, spec: ReplicaSpec) -> Driver | None:
        least = RUNGS.index(spec.isolation_at_least)
        return next((driver for driver in self._drivers if RUNGS.index(driver.rung) >= least), None)

    async def _start(self, spec: ReplicaSpec) -> bool:
        known = self._known[spec.name]
        known.driver = self._driver_for(spec)
        known.since = time.monotonic()
        if known.driver is None:
            offered = ", ".join(driver.rung for driver in self._drivers) or "none"
            self._die(known, f"isolation.at_least: {spec.isolation_at_least} is asked for, this box offers {offered}")
            return True
        sandbox = SandboxSpec(
            name=spec.name,
            model=self._store.model_path(spec.model.sha256),
            socket_dir=self._socket_dir(spec.name),
            memory_bytes=spec.memory_bytes,
            cpus=spec.cpus,
            warmup=spec.model.warmup,
            label=codec.encode(spec).decode(),
        )
        try:
            await known.driver.start(sandbox)
        except (DriverFailed, OSError) as exc:
            self._die(known, f"{known.driver.name}: {exc}")
            return True
        known.phase = "running"
        self._say("replica.started", spec.name, f"{known.driver.name}, {spec.model.name}:{spec.model.version}")
        return True

    async def _drain(self, name: str, now: float) -> bool:
        self._known[name].phase = "draining"
        self._known[name].drained_at = now + self._config.drain_s
        self._publish()  # out of the route table first
        return True

    async def _remove(self, name: str) -> bool:
        known = self._known[name]
        if known.driver is not None:
            try:
                await known.driver.stop(name, grace_s=STOP_GRACE_S)
            except DriverFailed as exc:
                logger.warning("replica.not_removed", replica=name, reason=str(exc))
                known.retry_at = known.drained_at = time.monotonic() + REMOVE_AGAIN_S
                return False
        del self._known[name]
        if known.phase == "draining":
            self._say("replica.removed", name)
        return True

    # -- what others see

    def _socket_dir(self, name: str) -> Path:
        return self._config.state_dir / "sockets" / name

    def _statuses(self) -> Mapping[str, ReplicaStatus]:
        return {
            name: ReplicaStatus(
                spec=known.spec,
                phase=_phase_of(known),
                reason=known.reason,
                driver=known.driver.name if known.driver else "",
                rung=known.driver.rung if known.driver else None,
                provider=known.provider,
                socket=str(self._socket_dir(name) / "worker.sock") if known.ready else "",
                restarts=self._attempts.get(name, 0),
            )
            for name, known in self._known.items()
        }

    def _publish(self) -> None:
        """Write the route table and tell the agent, each only where it changed."""
        statuses = self._statuses()
        routes = routes_of(self.desired, statuses.values())
        if routes != self._routes:
            try:
                durable.write(self._config.routes_file, codec.encode(routes), mode=0o644)
                self._routes = routes
            except OSError as exc:
                logger.error("routes.not_written", reason=exc.strerror)
        rungs = sorted({driver.rung for driver in self._drivers}, key=RUNGS.index)
        state = State(report_of(self.desired, statuses, self._waiting, self.refused), self._needs(), rungs)
        if state != self._state:
            self._state = state
            self.on_change(state)


def _phase_of(known: Known) -> Phase:
    match known.phase:
        case "fetched":
            return "pending"
        case "running":
            return "ready" if known.ready else "starting"
        case "draining":
            return "draining"
        case "dead":
            return "failed" if known.failed else "backoff"
        case _:
            assert_never(known.phase)


async def read_hello(socket: Path) -> ipc.Hello | None:
    """What the worker at ``socket`` serves, or None while there is none that answers."""
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_unix_connection(str(socket)), HELLO_TIMEOUT_S)
    except (OSError, TimeoutError):
        return None
    try:
        header_bytes, body_bytes = ipc.parse_prefix(await asyncio.wait_for(reader.readexactly(ipc.PREFIX.size), HELLO_TIMEOUT_S))
        header = await asyncio.wait_for(reader.readexactly(header_bytes), HELLO_TIMEOUT_S)
        return ipc.parse_header(header, ipc.Hello) if body_bytes == 0 else None
    except (OSError, TimeoutError, asyncio.IncompleteReadError, codec.Malformed):
        return None
    finally:
        writer.close()
