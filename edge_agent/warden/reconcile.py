"""The loop that makes the box what the desired document says: look, ask core/diff for steps, run them, look again.

want (signed document) --+
                         +--> core.diff.next_steps --> run --> publish report and routes --> wait for a change
seen (drivers, slots) ---+
"""

import asyncio
import contextlib
import math
import random
import time
from collections.abc import Callable, Coroutine
from typing import Any, assert_never

import msgspec

from edge_agent.core import crash, diff
from edge_agent.core.admission import Limits, free
from edge_agent.core.report import ReplicaStatus, models_wanted, report_of, routes_of
from edge_agent.warden import launch
from edge_agent.warden.config import Config
from edge_agent.warden.journal import Journal
from edge_agent.warden.ports import Driver, DriverFailed, Ending
from edge_agent.warden.slots import Slots
from edge_agent.warden.store import Store, StoreFailed
from edge_agent.warden.warm import WarmPool
from skerry.runtime import durable, lifecycle, log
from skerry.wire import codec
from skerry.wire.box import RouteTable, State
from skerry.wire.messages import RUNGS, Desired, LogsReply, LogsRequest, ModelRef, Phase, ReplicaSpec, Rung

logger = log.get("warden.reconcile")

STEADY_POLL_S = 1.0
STARTING_POLL_S = 0.005
DRIVER_POLL_S = 0.2
"""While a worker starts its socket is looked at often, its driver not: an engine's answer takes longer than a load."""
USAGE_POLL_S = 5.0
STOP_GRACE_S = 3.0
REMOVE_AGAIN_S = 5.0
MOST_REASON = 500
"""Characters of what a sandbox said that are passed on."""
FORGIVE_AFTER_S = 60.0
"""A replica that served this long starts its back-off anew when it ends."""


class Known(msgspec.Struct):
    """What the warden remembers of one sandbox between two looks; a restart of the warden rebuilds it from slots and drivers."""

    spec: ReplicaSpec
    phase: diff.SeenPhase
    driver: Driver | None = None
    since: float = 0.0
    ready_since: float = 0.0
    reason: str = ""
    failed: bool = False
    crash_loop: bool = False
    provider: str = ""
    retry_at: float = 0.0
    drained_at: float = 0.0
    gpu: str = ""
    is_warm: bool = False
    oom_kills: int = 0
    pids_refused: int = 0

    @property
    def ready(self) -> bool:
        """Whether it answered and has not ended since."""
        return self.phase in ("running", "draining") and self.ready_since > 0


class Reconciler:
    """Owns the sandboxes of this box. ``wake`` asks for a look now; ``on_change`` hears of every new State."""

    def __init__(
        self,
        config: Config,
        *,
        drivers: list[Driver],
        absent: dict[Rung, str],
        store: Store,
        slots: Slots,
        journal: Journal,
        limits: Limits,
        desired: Desired | None,
    ) -> None:
        self._config = config
        self._drivers = drivers
        self._absent = absent
        self._store = store
        self._slots = slots
        self._journal = journal
        self._limits = limits
        self.desired = desired
        self.refused = ""
        self._known: dict[str, Known] = {}
        self._attempts: dict[str, tuple[ReplicaSpec, crash.Attempts]] = {}
        self._waiting: dict[str, str] = {}
        self._not_fetched: dict[str, str] = {}
        self._orphans: dict[str, tuple[Driver, float]] = {}
        self._warm = WarmPool(config, slots, journal)
        self._wake = asyncio.Event()
        self._state: State | None = None
        self._routes: RouteTable | None = None
        self.on_change: Callable[[State], None] = lambda _: None
        self.looked_at = time.monotonic()
        self._drivers_seen_at = self._usage_seen_at = 0.0

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
        self._not_fetched[sha256] = reason
        self.wake()

    async def read_logs(self, request: LogsRequest) -> LogsReply:
        """What a replica's sandbox wrote; of two the newer one's."""
        found = [(self._order(known), name) for name, known in self._known.items() if known.spec.name == request.replica and known.driver]
        if not found:
            return LogsReply(error=f"replica {request.replica[:80]!r} has no sandbox on this box")
        name = min(found)[1]
        driver = self._known[name].driver
        assert driver is not None  # noqa: S101 - for the type checker
        try:
            read = await driver.logs(name, lines=request.lines, after=request.after)
        except DriverFailed as exc:
            return LogsReply(error=f"{driver.name}: {exc}")
        return LogsReply(read.lines, read.position)

    def _needs(self) -> list[ModelRef]:
        return models_wanted(self.desired, self._store.models())

    # -- the loop

    async def run(self, stop: asyncio.Event) -> None:
        """Adopt what an earlier warden started, then converge until ``stop`` is set. Sandboxes are left running."""
        seen: dict[str, tuple[Driver, Ending | None]] = {}
        for driver in self._drivers:
            await self._list_all(driver, seen, stop)
        for name, (driver, ending) in seen.items():
            self._adopt(name, driver, ending)
        for name in self._slots.all().keys() - seen.keys():
            self._adopt_absent(name)
        while not stop.is_set():
            self._wake.clear()
            await self._look()
            moved = await self._converge()
            self._publish()
            self._journal.flush()
            self.looked_at = time.monotonic()
            if not moved:
                await self._rest(stop)
        await self._warm.close()

    async def _rest(self, stop: asyncio.Event) -> None:
        """Until something asks for a look, or it is time for one."""
        starting = any(k.phase == "running" and not k.ready for k in self._known.values())
        is_settled = not starting and not any(k.phase == "fetched" for k in self._known.values())
        if self._warm.notice():
            return
        warms = is_settled and await self._warm.tend(self._drivers, free_bytes=self._free_for_warm())
        if starting:
            pause_s = STARTING_POLL_S
        elif warms:
            pause_s = DRIVER_POLL_S
        else:
            now = time.monotonic()
            times = [k.retry_at if k.phase == "dead" else k.drained_at for k in self._known.values() if k.phase in ("dead", "draining")]
            times += [at for _, at in self._orphans.values()]
            pause_s = max(0.01, min([STEADY_POLL_S, *(t - now for t in times)]))
            if not self._known and not times and not self._warm.kinds and not (self.desired and self.desired.replicas):
                pause_s = 10.0  # an idle box has nothing to look at
        await lifecycle.first_of(self._wake, stop, within_s=pause_s)

    def _free_for_warm(self) -> int:
        """Memory that no replica holds."""
        held = [diff.Seen(k.spec, k.phase).holding for k in self._known.values() if k.phase in ("running", "draining")]
        return max(0, free(self._limits, held).memory_bytes)

    # -- what is there

    async def _list_all(self, driver: Driver, seen: dict[str, tuple[Driver, Ending | None]], stop: asyncio.Event) -> None:
        """Nothing is started before it is known what runs: an engine that does not answer is asked again."""
        while not stop.is_set():
            try:
                seen |= {sandbox.name: (driver, sandbox.ending) for sandbox in await driver.sandboxes()}
            except DriverFailed as exc:
                logger.warning("driver.silent", driver=driver.name, reason=str(exc))
                await lifecycle.sleep_until(stop, REMOVE_AGAIN_S)
            else:
                return

    def _adopt(self, name: str, driver: Driver, ending: Ending | None) -> None:
        slot = self._slots.all().get(name)
        now = time.monotonic()
        if slot is None or (slot.replica is None and ending is not None) or (slot.boot_id != self._slots.boot_id and ending is not None):
            # Not on record, or ended for no fault of its own: with the machine, or while it was warm.
            self._orphans[name] = (driver, now + (self._config.orphan_grace_s if slot is None else 0))
            return
        if slot.replica is None:
            self._warm.adopt(name, slot.kind, driver)
            return
        known = self._known[name] = Known(slot.replica, "running", driver, since=now, gpu=slot.gpu, is_warm=slot.is_warm)
        self._attempts[slot.replica.name] = (slot.replica, slot.attempts)
        if ending is None:
            self._say("replica.adopted", slot.replica.name, driver.name)
        elif slot.given_up:
            known.phase, known.reason, known.failed, known.crash_loop, known.retry_at = "dead", slot.given_up, True, True, math.inf
        else:
            self._die(name, known, ending)

    def _adopt_absent(self, name: str) -> None:
        """A slot whose sandbox is gone: remembered where its replica was given up, else begun anew."""
        slot = self._slots.all()[name]
        if slot.given_up and slot.replica is not None:
            reason = slot.given_up
            self._known[name] = Known(slot.replica, "dead", reason=reason, failed=True, crash_loop=True, retry_at=math.inf)
        else:
            self._slots.close(name)

    async def _look(self) -> None:
        """Bring ``_known`` up to date with what the drivers see, and ask starting workers whether they are ready."""
        now = time.monotonic()
        if now - self._drivers_seen_at >= DRIVER_POLL_S:
            self._drivers_seen_at = now
            for driver in {id(d): d for d in [*(k.driver for k in self._known.values()), *self._drivers] if d is not None}.values():
                if any(k.driver is driver for k in self._known.values()) or any(k.driver == driver.name for k in self._warm.kinds.values()):
                    await self._look_at(driver)
        await self._remove_orphans(now)
        if now - self._usage_seen_at >= USAGE_POLL_S:
            self._usage_seen_at = now
            await self._look_at_usage()
        starting = [(name, k) for name, k in self._known.items() if k.phase == "running" and not k.ready]
        await asyncio.gather(*(self._ask_ready(name, known, now) for name, known in starting))

    async def _look_at(self, driver: Driver) -> None:
        try:
            seen = {sandbox.name: sandbox for sandbox in await driver.sandboxes()}
        except DriverFailed as exc:
            logger.warning("driver.silent", driver=driver.name, reason=str(exc))
            return
        for name, known in list(self._known.items()):
            if known.driver is not driver or known.phase not in ("running", "draining"):
                continue
            ending = seen[name].ending if name in seen else Ending(lines=["the sandbox is gone"])
            if ending is None and (excess := await asyncio.to_thread(self._slots.overfull, name)):
                await self._stop(known, name)
                ending = Ending(lines=[excess])
                self._say("sandbox.contained", known.spec.name, excess)
            if ending is not None:
                self._die(name, known, ending)
        await self._warm.look(driver, {name for name, sandbox in seen.items() if sandbox.running})

    async def _look_at_usage(self) -> None:
        """What the kernel refused a sandbox that lives on is told once each time the count moved."""
        for known_name, known in list(self._known.items()):
            if known.phase != "running" or known.driver is None:
                continue
            with contextlib.suppress(DriverFailed):
                usage = await known.driver.stats(known_name)
                if usage is None:
                    continue
                if usage.oom_kills > known.oom_kills:
                    self._say("sandbox.contained", known.spec.name, f"{usage.oom_kills} processes killed: out of memory")
                if usage.pids_refused > known.pids_refused:
                    self._say("sandbox.contained", known.spec.name, f"{usage.pids_refused} processes refused: over its limit of processes")
                known.oom_kills, known.pids_refused = usage.oom_kills, usage.pids_refused

    async def _remove_orphans(self, now: float) -> None:
        """What carries our label and is on no record, once its grace is over. What is not ours no driver lists."""
        for name, (driver, due_at) in list(self._orphans.items()):
            if now < due_at:
                continue
            try:
                await driver.stop(name, grace_s=0)
            except DriverFailed as exc:
                logger.warning("orphan.not_removed", sandbox=name, reason=str(exc))
                self._orphans[name] = (driver, now + REMOVE_AGAIN_S)
                continue
            del self._orphans[name]
            if name not in self._slots.all():
                self._say("sandbox.orphan_removed", name, driver.name)
            self._slots.close(name)

    async def _ask_ready(self, name: str, known: Known, now: float) -> None:
        hello = await launch.read_hello(self._slots.socket_dir(name))
        if hello is not None:
            known.ready_since, known.provider, known.reason = time.monotonic(), hello.provider[:64], ""
            held = f"; {hello.confinement[:80]}" if hello.confinement else ""
            self._say("replica.ready", known.spec.name, f"{hello.provider[:64]}, loaded in {hello.load_ms:.0f} ms{held}")
        elif now - known.since > self._config.start_timeout_s:
            await self._stop(known, name)
            self._die(name, known, Ending(lines=[f"not ready within {self._config.start_timeout_s:.0f} s"]))

    @staticmethod
    async def _stop(known: Known, name: str) -> None:
        if known.driver is not None:
            with contextlib.suppress(DriverFailed):
                await known.driver.stop(name, grace_s=0)

    def _die(self, name: str, known: Known, ending: Ending, *, was_started: bool = True) -> None:
        """A sandbox ended, or could not be started: remember why, and when to try again."""
        replica, now = known.spec.name, time.monotonic()
        reason = "".join(c if c.isprintable() else " " for c in ending.reason[:MOST_REASON])
        causes: dict[str, crash.ReasonKind] = {"oom": "oom", "load_failed": "load_failed", "killed": "killed", "refused_call": "killed"}
        kind = causes.get(ending.cause, "exited") if was_started else "start_failed"
        verdict = crash.after(
            crash.Ending(now, kind, now - known.ready_since if known.ready else 0.0),
            self._attempts_of(known.spec),
            first_s=self._config.restart_first_s,
            most_s=self._config.restart_most_s,
            limit=self._config.crash_loop_after,
            forgive_after_s=FORGIVE_AFTER_S,
            jitter=random.random(),
        )
        if known.phase == "running":
            self._attempts[replica] = (known.spec, verdict.attempts)
        known.phase, known.ready_since, known.reason, known.crash_loop = "dead", 0.0, reason, verdict.is_crash_loop
        known.failed = verdict.is_crash_loop or kind in ("load_failed", "start_failed")
        known.retry_at = math.inf if verdict.retry_in_s is None else now + verdict.retry_in_s
        self._known[name] = known
        lines = "\n".join(ending.lines)
        if ending.cause in ("oom", "refused_call"):
            self._say("sandbox.contained", replica, reason)
        if verdict.retry_in_s is None:
            self._slots.give_up(name, reason)
            self._say("replica.crash_loop", replica, f"{reason}; given up after {verdict.attempts.count} until it changes\n{lines}")
        else:
            self._say("replica.ended", replica, f"{reason}; next try in {verdict.retry_in_s:.1f} s\n{lines}")

    def _attempts_of(self, spec: ReplicaSpec) -> crash.Attempts:
        """Endings in a row of this very specification: a new one begins anew."""
        of, attempts = self._attempts.get(spec.name, (spec, crash.Attempts()))
        return attempts if of == spec else crash.Attempts()

    # -- what is done

    async def _converge(self) -> bool:
        """Run one batch of steps; says whether anything moved."""
        if self.desired is None:
            return False  # nothing is known of what is wanted: what runs is left alone
        now = time.monotonic()
        want = {spec.name: spec for spec in self.desired.replicas}
        for name in [n for n in self._attempts if n not in want]:
            del self._attempts[name]
        seen = {name: diff.Seen(k.spec, k.phase, k.retry_at, k.drained_at, gpu=k.gpu, is_ready=k.ready) for name, k in self._known.items()}
        takes = {spec.name: self._warm.takes(spec, driver) for spec in want.values() if (driver := self._driver_for(spec)) is not None}
        plan = diff.next_steps(want, seen, warm=self._warm.holdings, limits=self._limits, now=now, takes=takes)
        self._waiting = plan.waiting
        results = await asyncio.gather(*(self._run(step, now) for step in plan.steps))
        return any(results)

    def _run(self, step: diff.Step, now: float) -> Coroutine[Any, Any, bool]:
        match step:
            case diff.Fetch(spec):
                return self._fetch(spec)
            case diff.Start(spec, gpu, warm):
                return self._start(spec, gpu, warm)
            case diff.Drain(sandbox):
                return self._drain(sandbox, now)
            case diff.Remove(sandbox):
                return self._remove(sandbox)
            case diff.GiveBack(sandbox):
                return self._warm.give_back(sandbox, "a replica needs its memory")
            case _:
                assert_never(step)

    async def _fetch(self, spec: ReplicaSpec) -> bool:
        """Whether the model is here; the agent is told of what is not by the state's ``needs``."""
        if spec.model.sha256 not in self._store.models():
            return False
        self._not_fetched.pop(spec.model.sha256, None)
        self._known[launch.new_name(spec.name)] = Known(spec, "fetched")
        return True

    def _driver_for(self, spec: ReplicaSpec) -> Driver | None:
        return next((driver for driver in self._drivers if not launch.unable(driver, spec)), None)

    def _no_driver(self, spec: ReplicaSpec) -> str:
        reasons = dict.fromkeys(launch.unable(driver, spec) for driver in self._drivers)
        offered = ", ".join(driver.rung for driver in self._drivers) or "none"
        return f"{'; '.join(reasons) or 'no sandbox works here'}; this box offers {offered}"

    async def _start(self, spec: ReplicaSpec, gpu: str, warm: str) -> bool:
        name = next(name for name, known in self._known.items() if known.phase == "fetched" and known.spec == spec)
        known = self._known[name]
        known.driver, known.since, known.gpu = self._driver_for(spec), time.monotonic(), gpu
        if known.driver is None:
            self._die(name, known, Ending(lines=[self._no_driver(spec)]), was_started=False)
            return True
        kind = launch.kind_of(spec, known.driver)
        model = self._store.model_path(spec.model.sha256)
        if spec.server is None and not gpu:
            self._warm.demand(kind, spec.deadline_ms)
        try:
            if warm:
                await self._warm.take(warm, spec, model, self._attempts_of(spec))
                del self._known[name]
                self._known[warm], name, known.is_warm = known, warm, True
            else:
                slot = self._slots.open(
                    name, driver=known.driver.name, kind=kind, replica=spec, model=model, gpu=gpu, attempts=self._attempts_of(spec)
                )
                await known.driver.start(launch.sandbox_spec(name, slot, self._slots))
        except (DriverFailed, OSError) as exc:
            if warm:
                logger.warning("warm.not_taken", sandbox=warm, reason=str(exc))
                return True  # a cold one, then
            self._die(name, known, Ending(lines=[f"{known.driver.name}: {exc}"]), was_started=False)
            return True
        known.phase = "running"
        how = f"{known.driver.name}, {spec.model.name}:{spec.model.version}, sandbox {name}"
        self._say("replica.started", spec.name, how)
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
                logger.warning("replica.not_removed", replica=known.spec.name, reason=str(exc))
                known.retry_at = known.drained_at = time.monotonic() + REMOVE_AGAIN_S
                return False
        self._slots.close(name)
        del self._known[name]
        if known.phase == "draining":
            self._say("replica.removed", known.spec.name)
        return True

    # -- what others see

    def _order(self, known: Known) -> tuple[bool, bool, bool]:
        """Of two sandboxes of one replica the one to speak of comes first: the wanted one, else the one that serves."""
        is_wanted = self.desired is not None and known.spec in self.desired.replicas
        return (not is_wanted, not known.ready, known.phase == "draining")

    def _status(self, name: str, known: Known) -> ReplicaStatus:
        reason = known.reason or (self._waiting.get(known.spec.name, "") if known.phase == "fetched" else "")
        return ReplicaStatus(
            spec=known.spec,
            phase=_phase_of(known),
            reason=reason,
            driver=known.driver.name if known.driver else "",
            rung=known.driver.rung if known.driver else None,
            provider=known.provider,
            socket=str(self._slots.socket_dir(name) / "worker.sock") if known.ready else "",
            restarts=self._attempts_of(known.spec).count,
            sandbox=name if known.phase != "fetched" else "",
            limits=known.driver.limits if known.driver else "",
            is_crash_loop=known.crash_loop,
            is_warm=known.is_warm,
        )

    def _publish(self) -> None:
        """Write the route table and tell the agent, each only where it changed."""
        ordered = sorted(self._known.items(), key=lambda item: (self._order(item[1]), item[0]))
        statuses = [self._status(name, known) for name, known in ordered]
        routes = routes_of(self.desired, statuses)
        if routes != self._routes:
            try:
                durable.write(self._config.routes_file, codec.encode(routes), mode=0o644)
                self._routes = routes
            except OSError as exc:
                logger.error("routes.not_written", reason=exc.strerror)
        rungs = sorted({driver.rung for driver in self._drivers}, key=RUNGS.index)
        by_replica = {status.spec.name: status for status in reversed(statuses)}
        reported = report_of(self.desired, by_replica, self._not_fetched, self.refused)
        state = State(reported, self._needs(), rungs, self._absent)
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
