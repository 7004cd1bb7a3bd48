"""What the warden remembers of each sandbox between two looks, and what it says of them. A restart rebuilds it from slots and drivers."""

import math
import random
import time
from collections.abc import Mapping
from typing import assert_never

import msgspec

from edge_agent.core import crash, diff
from edge_agent.core.report import ReplicaStatus
from edge_agent.warden.config import Config
from edge_agent.warden.journal import Journal
from edge_agent.warden.ports import SOCKET_NAME, Driver, Ending
from edge_agent.warden.slots import Slots
from skerry.runtime import log
from skerry.wire.messages import Desired, Phase, ReplicaSpec

logger = log.get("warden.roster")

MOST_REASON = 500
"""Characters of what a sandbox said that are passed on."""
FORGIVE_AFTER_S = 60.0
"""A replica that served this long starts its back-off anew when it ends."""
_CAUSES: dict[str, crash.ReasonKind] = {"oom": "oom", "load_failed": "load_failed", "killed": "killed", "refused_call": "killed"}


class Known(msgspec.Struct):
    """One sandbox of a replica; "fetched" ones do not exist yet. Times are seconds on the monotonic clock."""

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
    is_moving: bool = False
    """Whether its driver is starting or stopping it now."""

    @property
    def ready(self) -> bool:
        """Whether it answered and has not ended since."""
        return self.phase in ("running", "draining") and self.ready_since > 0

    @property
    def is_awaited(self) -> bool:
        """Whether its worker was started and has not answered yet."""
        return self.phase == "running" and not self.ready and not self.is_moving

    @property
    def exists(self) -> bool:
        """Whether there is a sandbox that should run."""
        return self.phase in ("running", "draining")


class Roster:
    """``known`` is keyed by sandbox name; ``attempts`` by replica, of the specification that is named with them."""

    def __init__(self, config: Config, slots: Slots, journal: Journal) -> None:
        self._config = config
        self._slots = slots
        self._journal = journal
        self.known: dict[str, Known] = {}
        self.attempts: dict[str, tuple[ReplicaSpec, crash.Attempts]] = {}

    def say(self, kind: str, subject: str, text: str = "") -> None:
        """Put it on record."""
        self._journal.note(kind, subject, text, at_ms=time.time_ns() // 1_000_000)
        logger.info(kind, subject=subject, text=text)

    def seen(self) -> dict[str, diff.Seen]:
        """The same as core/diff takes it."""
        return {name: diff.Seen(k.spec, k.phase, k.retry_at, k.drained_at, gpu=k.gpu, is_ready=k.ready) for name, k in self.known.items()}

    def attempts_of(self, spec: ReplicaSpec) -> crash.Attempts:
        """Endings in a row of this very specification: a new one begins anew."""
        of, attempts = self.attempts.get(spec.name, (spec, crash.Attempts()))
        return attempts if of == spec else crash.Attempts()

    def take_over(self, want: Mapping[str, ReplicaSpec]) -> None:
        """What is no longer wanted has no past; what would run no differently goes on under the new specification."""
        for name in self.attempts.keys() - want.keys():
            del self.attempts[name]
        for known in self.known.values():
            new = want.get(known.spec.name)
            if new is not None and known.phase in ("fetched", "running") and diff.runs_alike(known.spec, new):
                known.spec = new

    def give_up(self, name: str, known: Known, reason: str) -> None:
        """It is not tried again until its specification changes."""
        known.phase, known.ready_since, known.reason = "dead", 0.0, reason
        known.failed, known.crash_loop, known.retry_at = True, True, math.inf
        self.known[name] = known

    def die(self, name: str, known: Known, ending: Ending, *, was_started: bool = True) -> None:
        """A sandbox ended, or could not be started: remember why, and when to try again."""
        replica, now = known.spec.name, time.monotonic()
        reason = "".join(c if c.isprintable() else " " for c in ending.reason[:MOST_REASON])
        kind = _CAUSES.get(ending.cause, "exited") if was_started else "start_failed"
        verdict = crash.after(
            crash.Ending(now, kind, now - known.ready_since if known.ready else 0.0),
            self.attempts_of(known.spec),
            first_s=self._config.restart_first_s,
            most_s=self._config.restart_most_s,
            limit=self._config.crash_loop_after,
            forgive_after_s=FORGIVE_AFTER_S,
            jitter=random.random(),
        )
        if known.phase != "draining":  # an old version that ends while it leaves says nothing of the new one
            self.attempts[replica] = (known.spec, verdict.attempts)
        if ending.cause in ("oom", "refused_call"):
            self.say("sandbox.contained", replica, reason)
        said = "\n".join(ending.lines)
        if verdict.retry_in_s is None:
            self.give_up(name, known, reason)
            self._slots.give_up(name, reason)
            self.say("replica.crash_loop", replica, f"{reason}; not tried again until it changes\n{said}")
            return
        known.phase, known.ready_since, known.reason = "dead", 0.0, reason
        known.failed, known.retry_at = kind in ("load_failed", "start_failed"), now + verdict.retry_in_s
        self.known[name] = known
        self.say("replica.ended", replica, f"{reason}; next try in {verdict.retry_in_s:.1f} s\n{said}")

    # -- what others see

    def order(self, known: Known, desired: Desired | None) -> tuple[bool, bool, bool]:
        """Of two sandboxes of one replica the one to speak of comes first: the wanted one, else the one that serves."""
        is_wanted = desired is not None and known.spec in desired.replicas
        return (not is_wanted, not known.ready, known.phase == "draining")

    def speaker(self, replica: str, desired: Desired | None) -> str:
        """The sandbox that stands for a replica; empty where there is none."""
        found = [(self.order(known, desired), name) for name, known in self.known.items() if known.spec.name == replica and known.driver]
        return min(found)[1] if found else ""

    def statuses(self, desired: Desired | None, waiting: dict[str, str]) -> list[ReplicaStatus]:
        """Every sandbox, of two of one replica first the one that stands for it. ``waiting`` says by replica why it is not started."""
        ordered = sorted(self.known.items(), key=lambda item: (self.order(item[1], desired), item[0]))
        return [self._status(name, known, waiting) for name, known in ordered]

    def _status(self, name: str, known: Known, waiting: dict[str, str]) -> ReplicaStatus:
        return ReplicaStatus(
            spec=known.spec,
            phase=_phase_of(known),
            reason=known.reason or (waiting.get(known.spec.name, "") if known.phase == "fetched" else ""),
            driver=known.driver.name if known.driver else "",
            rung=known.driver.rung if known.driver else None,
            provider=known.provider,
            socket=str(self._slots.socket_dir(name) / SOCKET_NAME) if known.ready else "",
            restarts=self.attempts_of(known.spec).count,
            sandbox=name if known.phase != "fetched" else "",
            limits=known.driver.limits if known.driver else "",
            is_crash_loop=known.crash_loop,
            is_warm=known.is_warm,
        )


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
