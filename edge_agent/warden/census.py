"""What is there: sandboxes that an earlier warden left, those that ended, those that overstep, those that nobody knows of."""

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Collection

from edge_agent.warden import launch
from edge_agent.warden.config import Config
from edge_agent.warden.kernel_log import KernelLog
from edge_agent.warden.offer import Offer
from edge_agent.warden.ports import Driver, DriverFailed, Ending, Sandbox
from edge_agent.warden.roster import Known, Roster
from edge_agent.warden.slots import Slot, Slots
from edge_agent.warden.under_way import UnderWay
from edge_agent.warden.warm import WarmPool
from skerry.runtime import log
from skerry.wire.messages import ReplicaSpec

logger = log.get("warden.census")

DRIVER_POLL_S = 0.2
"""While a worker starts its socket is looked at often, its driver not: an engine's answer takes longer than a load."""
LATELY_S = 1.5
USAGE_POLL_S = 5.0
ASK_AGAIN_S = 5.0
ANSWERS_WITHIN_S = 2.0
"""A driver whose engine takes longer is silent: the others are not held up by it."""
SUSPECT_POLL_S, SUSPECT_FOR_S = 0.01, 0.5
"""How often and how long the driver of a replica whose worker hung up is asked: an engine hears of it a moment later."""


class Census:
    """Brings the roster and the warm pool up to date with what the drivers see.

    What a driver ran is left alone until that has said what it has; one that does not answer holds nobody else up.
    """

    def __init__(
        self,
        config: Config,
        *,
        offer: Offer,
        roster: Roster,
        warm: WarmPool,
        slots: Slots,
        wake: Callable[[], None],
    ) -> None:
        self._config = config
        self._drivers = offer.working
        self._by_name = {driver.name: driver for driver in offer.drivers}
        self._roster = roster
        self._warm = warm
        self._slots = slots
        self._wake = wake
        self._kernel_log = KernelLog()
        self._orphans: dict[str, tuple[Driver, float]] = {}
        self._drivers_seen_at = self._usage_seen_at = 0.0
        self._lines: dict[str, asyncio.Task[None]] = {}
        self._suspects: dict[str, float] = {}
        self._asked: dict[Driver, tuple[float, asyncio.Task[list[Sandbox]]]] = {}
        self._silent: set[Driver] = set()
        self._adopted: set[Driver] = set()
        self._removing = UnderWay(wake)

    @property
    def due_at(self) -> list[float]:
        """When something has to be looked at, on the monotonic clock."""
        return [at for _, at in self._orphans.values()] + [time.monotonic() + SUSPECT_POLL_S] * bool(self._suspects)

    def why_not(self, driver: Driver) -> str:
        """Why nothing can be started by this driver now; empty where it can."""
        if driver in self._silent:
            return f"{driver.name} does not answer"
        return "" if driver in self._adopted else f"{driver.name} has not said yet what it runs"

    # -- at the start

    async def adopt(self) -> None:
        """Take over what an earlier warden started. What was, since the boot, by a driver that does not answer is taken to run."""
        heard = await self._ask(self._drivers)
        for driver, (_, listed) in heard.items():
            self._adopt_all(driver, listed)
        names = {driver.name for driver in heard}
        for name, slot in self._slots.all().items():
            if slot.driver in names:
                continue
            if slot.driver not in self._by_name or slot.given_up or slot.boot_id != self._slots.boot_id:
                self._adopt_absent(name)
            elif slot.replica is not None:
                self._take_over(name, slot, slot.replica, self._by_name[slot.driver])

    def _adopt_all(self, driver: Driver, listed: list[Sandbox]) -> None:
        """What it says for the first time that it has."""
        self._adopted.add(driver)
        for sandbox in listed:
            if sandbox.name not in self._roster.known:
                self._adopt(sandbox.name, driver, sandbox.ending)
        absent = self._slots.all().keys() - {sandbox.name for sandbox in listed}
        for name in absent:
            if self._slots.all()[name].driver == driver.name:
                self._roster.known.pop(name, None)
                self._adopt_absent(name)

    async def _ask(self, drivers: Collection[Driver]) -> dict[Driver, tuple[float, list[Sandbox]]]:
        """What each says that it has, and since when that is so. One that does not answer soon is heard when it does."""
        for driver in drivers:
            if driver not in self._asked:
                self._asked[driver] = (time.monotonic(), asyncio.create_task(driver.sandboxes(), name=f"warden.{driver.name}"))
        if waited := [self._asked[driver][1] for driver in drivers if driver not in self._silent]:
            await asyncio.wait(waited, timeout=ANSWERS_WITHIN_S)
        heard = {}
        for driver in drivers:
            asked_at, answer = self._asked[driver]
            if not answer.done():
                if driver not in self._silent:
                    logger.warning("driver.silent", driver=driver.name, reason=f"no answer within {ANSWERS_WITHIN_S:.0f} s")
                    self._silent.add(driver)
                    answer.add_done_callback(lambda _: self._wake())
                continue
            del self._asked[driver]
            try:
                heard[driver] = (asked_at, answer.result())
                self._silent.discard(driver)
            except DriverFailed as exc:
                logger.warning("driver.silent", driver=driver.name, reason=str(exc))
                self._silent.add(driver)
        return heard

    def _adopt(self, name: str, driver: Driver, ending: Ending | None) -> None:
        slot = self._slots.all().get(name)
        now = time.monotonic()
        if slot is None:
            self._orphans[name] = (driver, now + self._config.orphan_grace_s)
        elif self._is_to_begin_anew(name, slot, ending):
            self._orphans[name] = (driver, now)
        elif slot.replica is None:
            self._warm.adopt(name, slot.kind, driver)
        else:
            self._take_over(name, slot, slot.replica, driver, ending)

    def _take_over(self, name: str, slot: Slot, replica: ReplicaSpec, driver: Driver, ending: Ending | None = None) -> None:
        known = Known(replica, "running", driver, since=time.monotonic(), gpu=slot.gpu, is_warm=slot.is_warm)
        self._roster.attempts[replica.name] = (replica, slot.attempts)
        if slot.given_up:
            self._roster.give_up(name, known, slot.given_up)
        elif ending is not None:
            self._roster.die(name, known, ending)
        else:
            self._roster.known[name] = known
            self._roster.say("replica.adopted", replica.name, driver.name)

    def _is_to_begin_anew(self, name: str, slot: Slot, ending: Ending | None) -> bool:
        """Whether what an earlier warden left is of no use, and no replica is to blame for it."""
        if slot.given_up:
            return False
        if ending is None:  # taken for a replica by a warden that died before it told it so?
            return slot.is_warm and slot.replica is not None and launch.is_waiting(self._slots.socket_dir(name))
        return ending.was_cut_off or slot.replica is None or slot.boot_id != self._slots.boot_id

    def _adopt_absent(self, name: str) -> None:
        """A slot whose sandbox is gone: remembered where its replica was given up, else begun anew."""
        slot = self._slots.all()[name]
        if slot.given_up and slot.replica is not None:
            self._roster.give_up(name, Known(slot.replica, "dead"), slot.given_up)
        else:
            self._slots.close(name)

    # -- from then on

    async def look(self, *, is_urgent: bool = False) -> None:
        """Who ended, who is ready now, who oversteps, whose grace is over. Where it is urgent, drivers that were asked lately are not."""
        now = time.monotonic()
        known = self._roster.known
        self._suspects = {name: until for name, until in self._suspects.items() if now < until and name in known and known[name].exists}
        asked = {driver for name in self._suspects if (driver := known[name].driver) is not None}
        if now - self._drivers_seen_at >= (LATELY_S if is_urgent else DRIVER_POLL_S):
            self._drivers_seen_at = now
            names = {kind.driver for kind in self._warm.kinds.values()}
            asked = {one.driver for one in known.values() if one.driver} | {driver for driver in self._drivers if driver.name in names}
        heard = await self._ask([driver for driver in self._drivers if driver in asked or driver not in self._adopted])
        for driver, (asked_at, listed) in heard.items():
            if driver in self._adopted:
                await self._look_at(driver, asked_at, listed)
            else:
                self._adopt_all(driver, listed)
        for one in (known[name] for name in self._suspects if name in known):
            if one.ready and one.driver is not None and self.why_not(one.driver):
                one.ready_since, one.since = 0.0, now  # nobody can say what became of it: it has to answer again
        await self._remove_orphans(now)
        if now - self._usage_seen_at >= USAGE_POLL_S:
            self._usage_seen_at = now
            await self._look_at_usage()
            self._look_at_refusals()
        starting = [(name, k) for name, k in self._roster.known.items() if k.is_awaited]
        await asyncio.gather(*(self._ask_ready(name, known, now) for name, known in starting))

    async def _look_at(self, driver: Driver, asked_at: float, listed: list[Sandbox]) -> None:
        """What was begun since it was asked, and what it is about, it can't know."""
        seen = {sandbox.name: sandbox for sandbox in listed}
        for name, known in list(self._roster.known.items()):
            if known.driver is not driver or not known.exists or known.is_moving or known.since > asked_at:
                continue
            ending = seen[name].ending if name in seen else Ending(lines=["the sandbox is gone"])
            if ending is None and (excess := await asyncio.to_thread(self._slots.overfull, name)):
                await self._kill(name, known)
                ending = Ending(lines=[excess])
                self._roster.say("sandbox.contained", known.spec.name, excess)
            if ending is not None:
                self._roster.die(name, known, ending)
        running = {name for name, sandbox in seen.items() if sandbox.running}
        await self._warm.look(driver, running, asked_at=asked_at)

    @staticmethod
    async def _kill(name: str, known: Known) -> None:
        """It is stopped again before it is forgotten: no need to wait for long."""
        if known.driver is not None:
            with contextlib.suppress(DriverFailed, TimeoutError):
                await asyncio.wait_for(known.driver.stop(name, grace_s=0), ANSWERS_WITHIN_S)

    async def _look_at_usage(self) -> None:
        """What the kernel refused a sandbox that lives on is told each time the count moved."""
        for name, known in list(self._roster.known.items()):
            if known.phase != "running" or known.driver is None or known.driver in self._silent:
                continue
            try:
                usage = await asyncio.wait_for(known.driver.stats(name), ANSWERS_WITHIN_S)
            except (DriverFailed, TimeoutError):
                continue
            if usage is None:
                continue
            if usage.oom_kills > known.oom_kills:
                self._roster.say("sandbox.contained", known.spec.name, f"{usage.oom_kills} of its processes killed: out of memory")
            if usage.pids_refused > known.pids_refused:
                self._roster.say("sandbox.contained", known.spec.name, f"{usage.pids_refused} times over its limit of processes")
            known.oom_kills, known.pids_refused = usage.oom_kills, usage.pids_refused

    def _look_at_refusals(self) -> None:
        """System calls that the kernel refused to a sandbox, by its user id."""
        replicas = {slot.uid: slot.replica.name for slot in self._slots.all().values() if slot.replica is not None}
        for refused, times in self._kernel_log.new_refusals().items():
            if refused.uid in replicas:
                what = "ended for" if refused.is_killed else "refused"
                self._roster.say("sandbox.contained", replicas[refused.uid], f"{what} the system call {refused.call}, {times} times")

    async def _remove_orphans(self, now: float) -> None:
        """What carries our label and is on no record, once its grace is over. What is not ours no driver lists."""
        due = [(name, driver) for name, (driver, due_at) in self._orphans.items() if now >= due_at]
        self._orphans |= {name: (driver, now + ASK_AGAIN_S) for name, driver in due}
        removals = [(name, functools.partial(self._remove_orphan, name, driver)) for name, driver in due if not self.why_not(driver)]
        await self._removing.take(removals, within_s=ANSWERS_WITHIN_S)

    async def _remove_orphan(self, name: str, driver: Driver) -> bool:
        try:
            await driver.stop(name, grace_s=0)
        except DriverFailed as exc:
            logger.warning("orphan.not_removed", sandbox=name, reason=str(exc))
            return False
        del self._orphans[name]
        if name not in self._slots.all():
            self._roster.say("sandbox.orphan_removed", name, driver.name)
        self._slots.close(name)
        return True

    async def _ask_ready(self, name: str, known: Known, now: float) -> None:
        line = await launch.connect(self._slots.socket_dir(name))
        if line is not None:
            self._hold(name, line)
            hello = line.hello
            known.ready_since, known.provider, known.reason = time.monotonic(), hello.provider[:64], ""
            held = f"; {hello.confinement[:80]}" if hello.confinement else ""
            self._roster.say("replica.ready", known.spec.name, f"{hello.provider[:64]}, loaded in {hello.load_ms:.0f} ms{held}")
        elif now - known.since > self._config.start_timeout_s:
            await self._kill(name, known)
            self._roster.die(name, known, Ending(lines=[f"not ready within {self._config.start_timeout_s:.0f} s"]))

    def _hold(self, name: str, line: launch.Line) -> None:
        """When it ends, the sandbox is looked at at once."""

        def suspect(_: object) -> None:
            self._lines.pop(name, None)
            self._suspects[name] = time.monotonic() + SUSPECT_FOR_S
            self._wake()

        self._lines[name] = task = asyncio.create_task(line.ended(), name="warden.line")
        task.add_done_callback(suspect)

    async def close(self) -> None:
        """Hang up, and let removals end."""
        await self._removing.end(within_s=ANSWERS_WITHIN_S)
        lines = list(self._lines.values())
        for line in lines:
            line.cancel()
        await asyncio.gather(*lines, return_exceptions=True)
