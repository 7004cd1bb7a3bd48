"""How a change of a deployment spreads: in waves, each watched for a while, and back to what was there before if it is no good. Pure.

A *unit* is what changes at once: a box where each box has its own replicas, else a replica by its name. Units of boxes that are not there
are let in with their wave and judged by nobody: they get the change when they come back.
"""

import math
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Literal

import msgspec

from coordinator.core import sequential
from skerry.wire.messages import Shadow

TESTS = 2
"""Of failures and of slow answers; the chance of a false alarm is shared out among them, and among waves. Before the first one there may be
a third, of answers that differ."""
LEAST_BASELINE = 200
"""Requests before the change without which nothing is known of how long answers took."""

Phase = Literal["rolling", "waiting", "done", "failed", "aborted"]
"""``waiting``: for somebody's word before the next wave."""
OVER = ("done", "failed", "aborted")


class Compared(msgspec.Struct, frozen=True):
    """How answers are compared before the first wave: see skerry.wire.messages.Shadow. ``most_differing`` is a share of them."""

    shadow: Shadow
    most_differing: float = 0.01


class Rules(msgspec.Struct, frozen=True):
    """As the deployment's ``rollout`` says. ``waves`` are numbers of units, or shares of all (above 0, at most 1); each counts those of
    earlier ones too, and the last is all.

    A wave is over when ``success`` (a share) of its units that are there were ready for ``observe_ms``. The change is no good when more
    than the rest fail, when a wave is not ready within ``deadline_ms``, when a replica that was ready is started again more often than
    ``most_restarts``, and when the requests say so, with a chance of ``false_alarm`` at the most of saying it of a change that is no
    worse: of ``most_failed`` (a share) more that fail than before, or more than 1 of 100 that take ``slower`` times as long as 99 of 100
    did. With ``compared`` the first wave's boxes run the change beside what they have for ``observe_ms`` first, and it is no good either
    when more of its answers differ than is borne.
    """

    waves: list[int | float]
    success: float = 0.95
    observe_ms: int = 120_000
    deadline_ms: int = 600_000
    most_restarts: int = 0
    most_failed: float = 0.01
    slower: float = 1.5
    false_alarm: float = 0.01
    approve: bool = False
    compared: Compared | None = None


class Unit(msgspec.Struct, frozen=True):
    """A unit as it is now. ``is_there``: its box is connected and may run things. ``ready``: it runs the change, if it was let in.
    ``failure`` says why it does not and will not. ``asked``: requests that its box was asked lately."""

    is_there: bool
    ready: bool = False
    failure: str = ""
    restarts: int = 0
    asked: int = 0


class Baseline(msgspec.Struct, frozen=True):
    """How the deployment served before: requests, how many of them failed or were refused, and within what 99 of 100 were answered."""

    asked: int = 0
    failed: int = 0
    p99_ms: float = 0.0


class Counts(msgspec.Struct, frozen=True):
    """What the present wave's boxes served since it was ready; ``slow`` took longer than ``slow_ms`` says. ``compared`` are answers of the
    change beside which there was one to compare it with, ``differed`` those that were others."""

    asked: int = 0
    failed: int = 0
    slow: int = 0
    compared: int = 0
    differed: int = 0


class State(msgspec.Struct, frozen=True):
    """How far it is. ``waves`` are the units that were let in, by wave; ``ready_since_ms`` is 0 while the present wave is not ready;
    ``approved`` counts the waves that somebody let begin; ``restarts`` are each unit's when it was first ready. ``is_shadow``: the first
    wave's boxes run the change beside what they have, and answer nobody by it; ``seen`` is what was compared there."""

    phase: Phase
    waves: list[list[str]]
    began_ms: int
    wave_since_ms: int
    ready_since_ms: int = 0
    is_paused: bool = False
    approved: int = 1
    reason: str = ""
    baseline: Baseline = Baseline()
    restarts: dict[str, int] = {}
    is_shadow: bool = False
    seen: Counts = Counts()

    @property
    def let_in(self) -> frozenset[str]:
        """Units of all waves so far."""
        return frozenset(unit for wave in self.waves for unit in wave)

    @property
    def admitted(self) -> frozenset[str]:
        """Units that are to have the change."""
        return frozenset() if self.is_shadow else self.let_in

    @property
    def shadowing(self) -> frozenset[str]:
        """Units that are to have it beside what they have."""
        return self.let_in if self.is_shadow and not self.is_over else frozenset()

    @property
    def stage(self) -> int:
        """Rises with each wave, and from the shadow to the first."""
        return 2 * len(self.waves) - self.is_shadow

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens."""
        return self.phase in OVER


class Standing(msgspec.Struct, frozen=True):
    """How far a change was when it was last looked at: of ``total`` units those that were let in and ``ready``, and those that were let in
    and whose box was ``away``."""

    total: int = 0
    ready: int = 0
    away: int = 0


def standing(state: State, units: Mapping[str, Unit], *, before: frozenset[str] | None = None) -> Standing:
    """How far it is. ``before`` are the units that were admitted when ``units`` were looked at: what runs on others is no word on it."""
    known = state.admitted if before is None else state.admitted & before
    ready = sum(1 for name in known if name in units and units[name].ready)
    away = sum(1 for name in state.admitted if name not in units or not units[name].is_there)
    return Standing(len(state.admitted | set(units)), 0 if state.phase in ("failed", "aborted") else ready, away)


def begin(rules: Rules, units: Mapping[str, Unit], baseline: Baseline, *, seed: str, now_ms: int, can_compare: bool = False) -> State:
    """With the first wave let in, or to be asked besides where that is asked for and ``can_compare``."""
    first = _next_wave(rules, units, frozenset(), 0, seed)
    is_shadow = bool(first) and can_compare and rules.compared is not None
    return State("rolling" if first else "done", [first] if first else [], now_ms, now_ms, baseline=baseline, is_shadow=is_shadow)


def slow_ms(rules: Rules, baseline: Baseline, target_ms: float) -> float:
    """Longer than this is slow: where too little was asked before to know, the deployment's own deadline is the measure."""
    known = baseline.p99_ms * rules.slower if baseline.asked >= LEAST_BASELINE else 0.0
    return known or target_ms


def step(state: State, rules: Rules, units: Mapping[str, Unit], counts: Counts, *, seed: str, now_ms: int) -> State:
    """What becomes of it now. ``units`` are all that the deployment has; ``counts`` are the present wave's since it was ready."""
    if state.is_over:
        return state
    if state.is_shadow:
        state = msgspec.structs.replace(state, seen=counts)
    if why := _is_bad(state, rules, units, counts):
        return msgspec.structs.replace(state, phase="failed", reason=why)
    if not state.is_paused and (extended := _extended(state, units, now_ms)) != state:
        return extended
    state = _seen_ready(state, rules, units, now_ms)
    if not state.ready_since_ms:
        if not _judged(state, units):
            return msgspec.structs.replace(state, wave_since_ms=now_ms)  # nobody is there at all: that is not the change's fault
        is_late = now_ms - state.wave_since_ms >= rules.deadline_ms
        return msgspec.structs.replace(state, phase="failed", reason=_late(state, rules, units)) if is_late else state
    if now_ms - state.ready_since_ms < rules.observe_ms or state.is_paused:
        return state
    if state.is_shadow:
        return msgspec.structs.replace(state, is_shadow=False, wave_since_ms=now_ms, ready_since_ms=0, restarts={})
    return _onward(state, rules, units, seed, now_ms)


def paused(state: State, *, is_paused: bool) -> State:
    """No further wave begins while it is paused; the present one is watched on."""
    return state if state.is_over else msgspec.structs.replace(state, is_paused=is_paused)


def approved(state: State) -> State:
    """The next wave may begin, once the present one was watched for long enough."""
    return state if state.is_over else msgspec.structs.replace(state, approved=len(state.waves) + 1)


def aborted(state: State, reason: str) -> State:
    """Somebody ends it."""
    return state if state.is_over else msgspec.structs.replace(state, phase="aborted", reason=reason)


def targets(rules: Rules, total: int) -> list[int]:
    """How many of ``total`` units have the change after each wave, without waves that let in nobody."""
    found: list[int] = []
    for wave in [*rules.waves, 1.0]:
        wanted = math.ceil(wave * total - 1e-9) if isinstance(wave, float) else wave
        if min(wanted, total) > (found[-1] if found else 0):
            found.append(min(wanted, total))
    return found


def _next_wave(rules: Rules, units: Mapping[str, Unit], admitted: frozenset[str], number: int, seed: str) -> list[str]:
    """Who is let in with wave ``number``; nobody where all are."""
    total = len(admitted | set(units))
    wanted = next((target for target in targets(rules, total)[number:] if target > len(admitted)), total)
    return _ordered([name for name in units if name not in admitted], units, seed)[: wanted - len(admitted)]


def _ordered(names: Sequence[str], units: Mapping[str, Unit], seed: str) -> list[str]:
    """Those that are there first, and of them those that are asked, since nothing is seen of the others; else in an order that is another
    for each change, so that not always the same box goes first."""
    return sorted(names, key=lambda name: (not units[name].is_there, not units[name].asked, blake2b(f"{seed} {name}".encode()).digest()))


def _present(names: Sequence[str], units: Mapping[str, Unit]) -> list[str]:
    return [name for name in names if name in units and units[name].is_there]


def _judged(state: State, units: Mapping[str, Unit]) -> list[str]:
    """Whose readiness counts: the present wave's, or everybody's where nobody of it is there."""
    return _present(state.waves[-1], units) or _present(sorted(state.let_in), units)


def _failures(state: State, rules: Rules, names: Sequence[str], units: Mapping[str, Unit]) -> list[str]:
    found = []
    for name in names:
        unit = units[name]
        more = unit.restarts - state.restarts.get(name, unit.restarts)
        if unit.failure:
            found.append(f"{name}: {unit.failure}")
        elif more > rules.most_restarts:
            found.append(f"{name}: started again {more} times after it had been ready")
    return found


def _is_bad(state: State, rules: Rules, units: Mapping[str, Unit], counts: Counts) -> str:
    """Why the change is no good; empty where nothing says so."""
    for names in (state.waves[-1], [name for wave in state.waves for name in wave]):
        there = _present(names, units)
        failures = _failures(state, rules, there, units)
        if len(failures) > (1 - rules.success) * len(there) + 1e-9:
            return f"{len(failures)} of {len(there)} failed: {failures[0]}"
    share = rules.false_alarm / (TESTS * len(targets(rules, len(state.let_in | set(units))) or [1]) + (rules.compared is not None))
    if (asked := rules.compared) is not None and sequential.is_too_many(counts.differed, counts.compared, asked.most_differing, share):
        return f"{counts.differed} of {counts.compared} answers were others than those of what serves now"
    before = state.baseline.failed / state.baseline.asked if state.baseline.asked else 0.0
    if sequential.is_too_many(counts.failed, counts.asked, before + rules.most_failed, share):
        return f"{counts.failed} of {counts.asked} requests failed, {before:.2%} did before"
    if sequential.is_too_many(counts.slow, counts.asked, 0.01, share):
        return f"{counts.slow} of {counts.asked} answers were slow: 99 of 100 took at most {state.baseline.p99_ms:.1f} ms before"
    return ""


def _is_ready(state: State, rules: Rules, units: Mapping[str, Unit]) -> bool:
    there = _judged(state, units)
    return bool(there) and sum(units[name].ready for name in there) >= rules.success * len(there) - 1e-9


def _seen_ready(state: State, rules: Rules, units: Mapping[str, Unit], now_ms: int) -> State:
    ready = [name for name in state.let_in if name in units and units[name].ready]
    new = {name: units[name].restarts for name in ready if name not in state.restarts}
    since_ms = (state.ready_since_ms or now_ms) if _is_ready(state, rules, units) else 0
    if not new and since_ms == state.ready_since_ms:
        return state
    phase: Phase = state.phase if since_ms else "rolling"
    return msgspec.structs.replace(state, phase=phase, restarts=state.restarts | new, ready_since_ms=since_ms)


def _late(state: State, rules: Rules, units: Mapping[str, Unit]) -> str:
    there = _judged(state, units)
    waits = [name for name in there if not units[name].ready]
    return f"{len(there) - len(waits)} of {len(there)} were ready after {rules.deadline_ms // 1000} s; {waits[0]} was not"


def _extended(state: State, units: Mapping[str, Unit], now_ms: int) -> State:
    """With another unit where nobody of the present wave is there any more: it would be judged by nobody."""
    others = [name for name in units if name not in state.let_in and units[name].is_there]
    if _present(state.waves[-1], units) or not others:
        return state
    waves = [*state.waves[:-1], [*state.waves[-1], min(others)]]
    return msgspec.structs.replace(state, waves=waves, wave_since_ms=now_ms, ready_since_ms=0)


def _onward(state: State, rules: Rules, units: Mapping[str, Unit], seed: str, now_ms: int) -> State:
    following = _next_wave(rules, units, state.let_in, len(state.waves), seed)
    if not following:
        return msgspec.structs.replace(state, phase="done", reason="")
    if rules.approve and state.approved <= len(state.waves):
        return msgspec.structs.replace(state, phase="waiting")
    waves = [*state.waves, following]
    return msgspec.structs.replace(state, phase="rolling", waves=waves, wave_since_ms=now_ms, ready_since_ms=0)
