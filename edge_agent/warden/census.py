"""What is there: sandboxes that an earlier warden left, those that ended, those that overstep, those that nobody knows of."""

import asyncio
import contextlib
import time
from collections.abc import Callable

from edge_agent.warden import launch
from edge_agent.warden.config import Config
from edge_agent.warden.kernel_log import KernelLog
from edge_agent.warden.ports import Driver, DriverFailed, Ending
from edge_agent.warden.roster import Known, Roster
from edge_agent.warden.slots import Slot, Slots
from edge_agent.warden.warm import WarmPool
from skerry.runtime import lifecycle, log

logger = log.get("warden.census")

DRIVER_POLL_S = 0.2
"""While a worker starts its socket is looked at often, its driver not: an engine's answer takes longer than a load."""
LATELY_S = 1.5
USAGE_POLL_S = 5.0
ASK_AGAIN_S = 5.0
SUSPECT_POLL_S, SUSPECT_FOR_S = 0.01, 0.5
"""How often and how long the driver of a replica whose worker hung up is asked: an engine hears of it a moment later."""


class Census:
    """Brings the roster and the warm pool up to date with what the drivers see."""

    def __init__(
        self, config: Config, *, drivers: list[Driver], roster: Roster, warm: WarmPool, slots: Slots, wake: Callable[[], None]
    ) -> None:
        self._config = config
        self._drivers = drivers
        self._roster = roster
        self._warm = warm
        self._slots = slots
        self._wake = wake
        self._kernel_log = KernelLog()
        self._orphans: dict[str, tuple[Driver, float]] = {}
        self._drivers_seen_at = self._usage_seen_at = 0.0
        self._lines: dict[str, asyncio.Task[None]] = {}
        self._suspects: dict[str, float] = {}

    @property
    def due_at(self) -> list[float]:
        """When something has to be looked at, on the monotonic clock."""
        return [at for _, at in self._orphans.values()] + [time.monotonic() + SUSPECT_POLL_S] * bool(self._suspects)

    # -- at the start

    async def adopt(self, stop: asyncio.Event) -> None:
        """Take over what an earlier warden started. Nothing is begun before it is known what runs."""
        seen: dict[str, tuple[Driver, Ending | None]] = {}
        for driver in self._drivers:
            await self._list_all(driver, seen, stop)
        for name, (driver, ending) in seen.items():
            self._adopt(name, driver, ending)
        for name in self._slots.all().keys() - seen.keys():
            self._adopt_absent(name)

    async def _list_all(self, driver: Driver, seen: dict[str, tuple[Driver, Ending | None]], stop: asyncio.Event) -> None:
        """An engine that does not answer is asked again."""
        while not stop.is_set():
            try:
                seen |= {sandbox.name: (driver, sandbox.ending) for sandbox in await driver.sandboxes()}
            except DriverFailed as exc:
                logger.warning("driver.silent", driver=driver.name, reason=str(exc))
                await lifecycle.sleep_until(stop, ASK_AGAIN_S)
            else:
                return

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
            known = Known(slot.replica, "running", driver, since=now, gpu=slot.gpu, is_warm=slot.is_warm)
            self._roster.attempts[slot.replica.name] = (slot.replica, slot.attempts)
            if slot.given_up:
                self._roster.give_up(name, known, slot.given_up)
            elif ending is not None:
                self._roster.die(name, known, ending)
            else:
                self._roster.known[name] = known
                self._roster.say("replica.adopted", slot.replica.name, driver.name)

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
        asked = {driver.name for name in self._suspects if (driver := known[name].driver) is not None}
        if now - self._drivers_seen_at >= (LATELY_S if is_urgent else DRIVER_POLL_S):
            self._drivers_seen_at = now
            asked = {one.driver.name for one in known.values() if one.driver} | {kind.driver for kind in self._warm.kinds.values()}
        for driver in self._drivers:
            if driver.name in asked:
                await self._look_at(driver)
        await self._remove_orphans(now)
        if now - self._usage_seen_at >= USAGE_POLL_S:
            self._usage_seen_at = now
            await self._look_at_usage()
            self._look_at_refusals()
        starting = [(name, k) for name, k in self._roster.known.items() if k.phase == "running" and not k.ready]
        await asyncio.gather(*(self._ask_ready(name, known, now) for name, known in starting))

    async def _look_at(self, driver: Driver) -> None:
        try:
            seen = {sandbox.name: sandbox for sandbox in await driver.sandboxes()}
        except DriverFailed as exc:
            logger.warning("driver.silent", driver=driver.name, reason=str(exc))
            return
        for name, known in list(self._roster.known.items()):
            if known.driver is not driver or not known.exists:
                continue
            ending = seen[name].ending if name in seen else Ending(lines=["the sandbox is gone"])
            if ending is None and (excess := await asyncio.to_thread(self._slots.overfull, name)):
                await self._kill(name, known)
                ending = Ending(lines=[excess])
                self._roster.say("sandbox.contained", known.spec.name, excess)
            if ending is not None:
                self._roster.die(name, known, ending)
        await self._warm.look(driver, {name for name, sandbox in seen.items() if sandbox.running})

    @staticmethod
    async def _kill(name: str, known: Known) -> None:
        if known.driver is not None:
            with contextlib.suppress(DriverFailed):
                await known.driver.stop(name, grace_s=0)

    async def _look_at_usage(self) -> None:
        """What the kernel refused a sandbox that lives on is told each time the count moved."""
        for name, known in list(self._roster.known.items()):
            if known.phase != "running" or known.driver is None:
                continue
            try:
                usage = await known.driver.stats(name)
            except DriverFailed:
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
        for name, (driver, due_at) in list(self._orphans.items()):
            if now < due_at:
                continue
            try:
                await driver.stop(name, grace_s=0)
            except DriverFailed as exc:
                logger.warning("orphan.not_removed", sandbox=name, reason=str(exc))
                self._orphans[name] = (driver, now + ASK_AGAIN_S)
                continue
            del self._orphans[name]
            if name not in self._slots.all():
                self._roster.say("sandbox.orphan_removed", name, driver.name)
            self._slots.close(name)

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
        """Hang up."""
        lines = list(self._lines.values())
        for line in lines:
            line.cancel()
        await asyncio.gather(*lines, return_exceptions=True)
