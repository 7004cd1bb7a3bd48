"""The loop that makes the box what the desired document says: look, ask core/diff for steps, run them, look again.

want (signed document) --+
                         +--> core.diff.next_steps --> run --> publish report and routes --> wait for a change
seen (drivers, slots) ---+
"""

import asyncio
import functools
import math
import os
import time
from collections.abc import Callable, Coroutine
from typing import Any, assert_never

import msgspec

from edge_agent.core import cut_off, diff, predecessor
from edge_agent.core.admission import Limits, free
from edge_agent.core.report import Withheld, models_wanted, report_of, routes_of
from edge_agent.warden import launch
from edge_agent.warden.census import DRIVER_POLL_S, Census
from edge_agent.warden.config import Config
from edge_agent.warden.journal import Journal
from edge_agent.warden.offer import Offer
from edge_agent.warden.ports import SOCKET_NAME, Driver, DriverFailed, Ending
from edge_agent.warden.roster import Known, Roster
from edge_agent.warden.served import Served
from edge_agent.warden.shelf import Shelf
from edge_agent.warden.slots import Slots
from edge_agent.warden.software import BoxSoftware
from edge_agent.warden.store import Store, StoreFailed
from edge_agent.warden.under_way import UnderWay
from edge_agent.warden.warm import WarmPool
from skerry.runtime import durable, lifecycle, log, refusals
from skerry.wire import codec
from skerry.wire.box import RouteTable, State
from skerry.wire.logs import UNKNOWN_REPLICA
from skerry.wire.messages import RUNGS, Addresses, Desired, LogsReply, LogsRequest, ModelRef, ReplicaSpec
from skerry.wire.proof import Proof

logger = log.get("warden.reconcile")

TEND_EVERY_S, TEND_SOON_S = 60.0, 5.0
"""How often it is looked whether models must go, and while some are to come."""
STEADY_POLL_S = 1.0
STARTING_POLL_S = 0.005
SOCKET_POLL_S = 0.001
STOP_GRACE_S = 3.0
REMOVE_AGAIN_S = 5.0
IDLE_POLL_S = 10.0
STEPS_WITHIN_S, ENDS_WITHIN_S = 1.0, 4.0
"""Steps that take longer are waited for no more, and at the end of the warden for so long."""
REFUSED_EVERY_S = 5.0


class Reconciler:
    """Owns the sandboxes of this box. ``wake`` asks for a look now; ``on_change`` hears of every new State.
    ``time_proof`` is what agent and gateway are told of the time; ``cut_off_ms`` is how long there has been no link; ``shelf``
    makes room for models; ``software`` is about the box's own programs."""

    def __init__(
        self,
        config: Config,
        *,
        offer: Offer,
        store: Store,
        slots: Slots,
        journal: Journal,
        limits: Limits,
        desired: Desired | None,
        unvouched: Callable[[Desired | None], dict[str, str]],
    ) -> None:
        self._config = config
        self._drivers = offer.working
        self._offer = offer
        self._store = store
        self._slots = slots
        self._journal = journal
        self._limits = limits
        self.desired = desired
        self._judge_models = unvouched
        self._unvouched = unvouched(desired)
        self._served = Served(config.state_dir / "served.json")
        self._distrusted = set(unvouched(self._served.as_document(desired))) if desired else set()
        self.refused = ""
        self._refused_at = -math.inf
        self._wake = asyncio.Event()
        self._roster = Roster(config, slots, journal)
        self._known = self._roster.known
        self._say = self._roster.say
        self._warm = WarmPool(config, slots, journal)
        self._census = Census(config, offer=offer, roster=self._roster, warm=self._warm, slots=slots, wake=self.wake)
        self._under_way = UnderWay(self.wake)
        self._waiting: dict[str, str] = {}
        self._not_fetched: dict[str, str] = {}
        self._state: State | None = None
        self._routes: RouteTable | None = None
        self.on_change: Callable[[State], None] = lambda _: None
        self.time_proof: Callable[[], Proof] = Proof
        self.cut_off_ms: Callable[[], int] = lambda: 0
        self.shelf: Shelf | None = None
        self.software: BoxSoftware | None = None
        self._stopped: dict[str, str] = {}
        self.looked_at = time.monotonic()

    @property
    def state(self) -> State | None:
        """What the agent is told; None until the first look is over."""
        return self._state

    def wake(self) -> None:
        """Look again now."""
        self._wake.set()

    def keep_link_every_s(self) -> float:
        """How often the warden must write down that there is a link, for what it stops without one."""
        return cut_off.keep_every_s(self.desired.replicas if self.desired else [], least_s=5, most_s=600)

    # -- what the listener asks

    def accept(self, desired: Desired) -> None:
        """Act on a document that was verified and persisted."""
        if self.desired is None or desired.generation != self.desired.generation:
            self._say("desired.accepted", str(desired.generation), f"{len(desired.replicas)} replicas wanted")
        unvouched = self._judge_models(desired)
        for name, reason in unvouched.items():
            if self._unvouched.get(name) != reason:
                self._say("model.refused", name, reason)
        self.desired, self.refused, self._unvouched = desired, "", unvouched
        if self.shelf is not None:
            self.shelf.note(desired)
        self.wake()

    def refuse(self, reason: str) -> None:
        """Note a document that changes nothing."""
        refusals.count("desired.refused", reason)
        now = time.monotonic()
        if reason != self.refused and now - self._refused_at >= REFUSED_EVERY_S:  # whoever sends lies must not write the journal
            self._refused_at = now
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
                self._say("model.admitted", model.title.removeprefix("model "), sha256)
            except StoreFailed as exc:
                reason = str(exc)
                self._say("model.refused", model.title.removeprefix("model "), reason)
        self._not_fetched[sha256] = reason
        self.wake()

    async def read_logs(self, request: LogsRequest) -> LogsReply:
        """What a replica's sandbox wrote, or in ``error`` why that can't be said."""
        name = self._roster.speaker(request.replica, self.desired)
        if not name:
            is_known = any(known.spec.name == request.replica for known in self._known.values())
            return LogsReply() if is_known else LogsReply(error=UNKNOWN_REPLICA)  # one that had no sandbox yet wrote nothing
        driver = self._known[name].driver
        assert driver is not None  # noqa: S101 - for the type checker
        try:
            read = await driver.logs(name, lines=request.lines, after=request.after)
        except DriverFailed as exc:
            return LogsReply(error=f"{driver.name}: {exc}")
        return LogsReply(read.lines, read.position)

    def _needs(self) -> list[ModelRef]:
        own = self.software.needs(self.desired) if self.software else []
        return [*models_wanted(self.desired, self._store.models(), self._unvouched), *own]

    def _may_stay(self, spec: ReplicaSpec) -> bool:
        """Whether it is wanted. One whose model nobody vouches for is not fetched, so that the version before goes on; if it runs
        already, since the keys were others then, it is stopped."""
        return spec.name not in self._unvouched or not any(known.spec == spec for known in self._known.values())

    # -- the loop

    async def run(self, stop: asyncio.Event) -> None:
        """Adopt what an earlier warden started, then converge until ``stop`` is set. Sandboxes are left running."""
        await self._census.adopt()
        while not stop.is_set():
            is_news = self._wake.is_set()
            self._wake.clear()
            await self._census.look(is_urgent=is_news)  # what it does not see now it sees once the news are acted on
            moved = await self._converge()
            self._note_served()
            self._publish()
            await self._tend_disk()
            self._journal.flush()
            self.looked_at = time.monotonic()
            if not moved:
                await self._rest(stop)
        await self._census.close()
        await self._warm.close()
        await self._under_way.end(within_s=ENDS_WITHIN_S)

    async def _rest(self, stop: asyncio.Event) -> None:
        """Until something asks for a look, or it is time for one."""
        starting = [name for name, k in self._known.items() if k.is_awaited]
        is_settled = not starting and not any(k.phase == "fetched" for k in self._known.values())
        able = [driver for driver in self._drivers if not self._census.why_not(driver)]
        warms = is_settled and await self._warm.tend(able, free_bytes=self._free_for_warm())
        if starting:
            await self._until_one_listens(starting, stop)
            return
        now = time.monotonic()
        times = [k.retry_at if k.phase == "dead" else k.drained_at for k in self._known.values() if k.phase in ("dead", "draining")]
        times += self._census.due_at
        pause_s = max(0.01, min([DRIVER_POLL_S if warms else STEADY_POLL_S, *(t - now for t in times)]))
        if not self._known and not times and not self._warm.kinds and not (self.desired and self.desired.replicas):
            pause_s = IDLE_POLL_S  # an idle box has nothing to look at
        await lifecycle.first_of(self._wake, stop, within_s=pause_s)

    async def _until_one_listens(self, starting: list[str], stop: asyncio.Event) -> None:
        """The whole look is taken once a socket is there that was not: it costs more than a small model's load may."""
        silent = [path for name in starting if not os.path.lexists(path := self._slots.socket_dir(name) / SOCKET_NAME)]
        deadline = time.monotonic() + (DRIVER_POLL_S if len(silent) == len(starting) else STARTING_POLL_S)
        while time.monotonic() < deadline and not self._wake.is_set() and not stop.is_set():
            await asyncio.sleep(SOCKET_POLL_S)
            if any(os.path.lexists(path) for path in silent):
                return

    def _free_for_warm(self) -> int:
        """Memory that no replica holds."""
        held = [seen.holding for seen in self._roster.seen().values() if seen.holds_memory]
        return max(0, free(self._limits, held).memory_bytes)

    # -- what is done

    async def _converge(self) -> bool:
        """Run one batch of steps; says whether anything moved."""
        if self.desired is None:
            return False  # nothing is known of what is wanted: what runs is left alone
        now = time.monotonic()
        self._look_at_link(self.desired)
        want = {spec.name: spec for spec in self.desired.replicas if self._may_stay(spec) and spec.name not in self._stopped}
        served = {name: spec for name, spec in self._served.specs.items() if name not in self._distrusted}
        aim = predecessor.aim(want, self._roster.seen(), served=served, here=self._store.models(), barred=self._unvouched)
        self._roster.take_over(aim.want)
        self._warm.notice()  # only now: one that came to wait while nothing happened is taken too
        takes = {spec.name: self._warm.takes(spec, driver) for spec in aim.want.values() if (driver := self._driver_for(spec)) is not None}
        seen = aim.shown(self._roster.seen())  # as it was taken over
        plan = diff.next_steps(aim.want, seen, warm=self._warm.holdings, limits=self._limits, now=now, takes=takes)
        self._waiting = plan.waiting
        ended = {name for name, known in self._known.items() if known.phase == "dead"}
        is_quiet = all(isinstance(step, diff.Fetch) or (isinstance(step, diff.Remove) and step.sandbox in ended) for step in plan.steps)
        steps = [(self._subject_of(step), functools.partial(self._run, step, now)) for step in plan.steps]
        moved = await self._under_way.take(steps, within_s=STEPS_WITHIN_S)
        if moved and is_quiet:
            await self._converge()  # to find a model in the store, or to be rid of what ended, is not worth telling before what follows
        return moved

    def _subject_of(self, step: diff.Step) -> str:
        """The replica, or the warm sandbox."""
        match step:
            case diff.Fetch(spec) | diff.Start(spec):
                return spec.name
            case diff.Drain(sandbox) | diff.Remove(sandbox):
                return self._known[sandbox].spec.name
            case diff.GiveBack(sandbox):
                return sandbox
            case _:
                assert_never(step)

    def _note_served(self) -> None:
        """What answers as it is wanted is what this box falls back on."""
        if self.desired is None:
            return
        now, wanted = time.monotonic(), {spec.name: spec for spec in self.desired.replicas}
        ready = [
            known
            for known in self._known.values()
            if known.phase == "running" and known.ready and known.spec == wanted.get(known.spec.name) and not known.spec.is_shadow
        ]
        self._served.note([(known.spec, now - known.ready_since) for known in ready], self.desired)
        self._distrusted -= {known.spec.name for known in ready}

    def _look_at_link(self, desired: Desired) -> None:
        """What is stopped for want of a link, said once."""
        stopped = cut_off.stopped(desired.replicas, self.cut_off_ms())
        for name in stopped.keys() - self._stopped.keys():
            self._say("replica.cut_off", name, stopped[name])
        self._stopped = {name: self._stopped.get(name, reason) for name, reason in stopped.items()}

    async def _tend_disk(self) -> None:
        """Have models go that nobody needs, before those come that somebody does: each for a while in the agent's folder and in ours."""
        needs = self._needs()
        if self.shelf is None or not self.shelf.is_due(TEND_SOON_S if needs else TEND_EVERY_S):
            return
        in_use = {known.spec.model.sha256 for known in self._known.values()}
        in_use |= {spec.model.sha256 for spec in [*self._served.specs.values(), *(self.desired.replicas if self.desired else [])]}
        in_use |= self.software.in_use(self.desired) if self.software else set()
        for model in await asyncio.to_thread(self.shelf.tend, in_use, 2 * sum(model.size_bytes for model in needs)):
            self._say("model.evicted", model.sha256, f"{model.size_bytes} bytes, not deployed here any more")

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
        is_barred = spec.name in self._unvouched and self.desired is not None and spec in self.desired.replicas
        if is_barred or spec.model.sha256 not in self._store.models():
            return False
        self._not_fetched.pop(spec.model.sha256, None)
        self._known[launch.new_name(spec.name)] = Known(spec, "fetched")
        return True

    def _driver_for(self, spec: ReplicaSpec) -> Driver | None:
        return next((driver for driver in self._drivers if not launch.unable(driver, spec)), None)

    def _why_not_yet(self, spec: ReplicaSpec, driver: Driver | None) -> str:
        """Why it is too early to start it; empty where it is not."""
        if driver is not None:
            return self._census.why_not(driver)
        later = [one for one in self._offer.drivers if one not in self._drivers and not launch.unable(one, spec)]
        return "; ".join(f"{one.name}: {self._offer.absent.get(one.rung, 'not tried yet')}" for one in later)

    def _no_driver(self, spec: ReplicaSpec) -> str:
        reasons = dict.fromkeys(launch.unable(driver, spec) for driver in self._drivers)
        offered = ", ".join(driver.rung for driver in self._drivers) or "none"
        return f"{'; '.join(reasons) or 'no sandbox works here'}; this box offers {offered}"

    def _deadline_ms(self, spec: ReplicaSpec) -> int:
        """What its callers are promised; a day where nobody is."""
        routes = self.desired.routes if self.desired else []
        return next((route.deadline_ms for route in routes if route.deployment == spec.deployment), 86_400_000)

    async def _start(self, spec: ReplicaSpec, gpu: str, warm: str) -> bool:
        name = next(name for name, known in self._known.items() if known.phase == "fetched" and known.spec == spec)
        known = self._known[name]
        known.driver, known.since, known.gpu = self._driver_for(spec), time.monotonic(), gpu
        known.reason = self._why_not_yet(spec, known.driver)
        if known.reason:
            return False
        if known.driver is None:
            self._roster.die(name, known, Ending(lines=[self._no_driver(spec)]), was_started=False)
            return True
        kind = launch.kind_of(spec, known.driver)
        model = self._store.model_path(spec.model.sha256)
        if spec.server is None and not gpu:
            self._warm.demand(kind, self._deadline_ms(spec))
        try:
            if warm:
                await self._warm.take(warm, spec, model, self._roster.attempts_of(spec))
                del self._known[name]
                self._known[warm], name, known.is_warm = known, warm, True
            else:
                slot = self._slots.open(
                    name, driver=known.driver.name, kind=kind, replica=spec, model=model, gpu=gpu, attempts=self._roster.attempts_of(spec)
                )
                known.phase, known.is_moving = "running", True
                await known.driver.start(launch.sandbox_spec(name, slot, self._slots))
        except (DriverFailed, OSError) as exc:
            if warm:
                logger.warning("warm.not_taken", sandbox=warm, reason=str(exc))
                return True  # a cold one, then
            self._roster.die(name, known, Ending(lines=[f"{known.driver.name}: {exc}"]), was_started=False)
            return True
        finally:
            known.is_moving = False
        known.phase, known.since = "running", time.monotonic()
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
            known.is_moving = True
            try:
                await known.driver.stop(name, grace_s=STOP_GRACE_S)
            except DriverFailed as exc:
                logger.warning("replica.not_removed", replica=known.spec.name, reason=str(exc))
                known.retry_at = known.drained_at = time.monotonic() + REMOVE_AGAIN_S
                return False
            finally:
                known.is_moving = False
        self._slots.close(name)
        del self._known[name]
        if known.phase == "draining":
            self._say("replica.removed", known.spec.name)
        return True

    # -- what others see

    def _publish(self) -> None:
        """Write the route table and tell the agent, each only where it changed."""
        statuses = self._roster.statuses(self.desired, self._waiting)
        routes = routes_of(self.desired, statuses, self.time_proof())
        if routes != self._routes:
            try:
                durable.write(self._config.routes_file, codec.encode(routes), mode=0o644, is_synced=False)
                self._routes = routes
            except OSError as exc:
                logger.error("routes.not_written", reason=exc.strerror)
        rungs = sorted({driver.rung for driver in self._drivers}, key=RUNGS.index)
        by_replica = {status.spec.name: status for status in reversed(statuses)}
        reported = report_of(self.desired, by_replica, self._not_fetched, Withheld(self._unvouched, self._stopped), self.refused)
        if self.software is not None:
            reported = msgspec.structs.replace(reported, software=self.software.look(self.desired, self._not_fetched))
        addresses = self.desired.addresses if self.desired else Addresses()
        state = State(reported, self._needs(), rungs, dict(self._offer.absent), self.time_proof(), addresses)
        if state != self._state:
            self._state = state
            self.on_change(state)
