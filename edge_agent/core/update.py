"""How a box changes its own programs: what to do next, each step safe to be cut off in and to be taken again. Pure.

The release on trial has its programs running, has reached the coordinator and lets the gateway answer for all that it answered for before,
for a while without a break; else the box goes back to the release before. What went back is not tried again by itself.
"""

import math
from collections.abc import Mapping, Sequence

import msgspec

from skerry.wire.box import Outcome, Update, UpdateRecord
from skerry.wire.messages import Software, SoftwareReport

MOST_OUTCOMES = 16
NOT_HEARD = "the coordinator was not reached"
NO_UPDATER = "this box has no updater: its software is not the coordinator's to change"


class Limits(msgspec.Struct, frozen=True):
    """How long a release must be well at a stretch, and has for it in all; how long what it replaced has to come back. ``most_ends``: how
    often a program may end; ``most_begun``: how often the whole may be taken up, after power cuts mostly; ``settle_s``: how long a
    restart has to show; ``linger_s``: how long to look for another change at the end, since systemd overlooks one that comes before it."""

    observe_s: float = 30.0
    trial_s: float = 300.0
    back_s: float = 120.0
    settle_s: float = 30.0
    linger_s: float = 3.0
    most_ends: int = 3
    most_begun: int = 4


class Unit(msgspec.Struct, frozen=True):
    """A program as the service manager sees it: the release that it runs from (empty where it does not run), whether it is up, and how
    often it ended since it was first looked at."""

    version: str = ""
    is_active: bool = False
    ends: int = 0


class Seen(msgspec.Struct, frozen=True):
    """The box now. ``current`` is the release that starts; ``waiting_for`` what the gateway can answer for by nobody, None where it does
    not answer itself."""

    current: str
    units: Mapping[str, Unit]
    is_heard: bool
    waiting_for: frozenset[str] | None


class Watch(msgspec.Struct, frozen=True):
    """What was seen so far, in seconds of a clock that does not go back: since when this stage is watched, since when nothing was wrong,
    when programs were told to start anew, and how often they had ended."""

    stage: str = ""
    since_s: float = 0.0
    well_since_s: float = 0.0
    restarted_s: float = -math.inf
    ends: int = 0


class Point(msgspec.Struct, frozen=True):
    """Have ``version`` be what starts."""

    version: str


class Restart(msgspec.Struct, frozen=True):
    """Have programs start anew."""

    units: tuple[str, ...]


class Wait(msgspec.Struct, frozen=True):
    """Look again; ``why`` is what is wrong, or nothing."""

    why: str = ""


class TurnBack(msgspec.Struct, frozen=True):
    """Go back to what was there before."""

    reason: str
    is_unreached: bool = False


class Settle(msgspec.Struct, frozen=True):
    """It is over."""

    is_good: bool


Step = Point | Restart | Wait | TurnBack | Settle


def key(software: Software | Update | Outcome) -> tuple[str, str]:
    """What tells releases apart."""
    return software.version, software.sha256


def outcome_of(record: UpdateRecord, software: Software) -> Outcome | None:
    """How the last try of it ended, where it is not to be tried again."""
    found = next((one for one in reversed(record.outcomes) if key(one) == key(software)), None)
    return found if found is not None and found.attempt >= software.attempt else None


def wanted_next(record: UpdateRecord, wanted: Software | None, current: str) -> Software | None:
    """What to begin with; None where there is nothing to do."""
    if wanted is None or wanted.version == current:
        return None
    known = outcome_of(record, wanted)
    return wanted if known is None or known.is_good else None


def begun(wanted: Software, current: str) -> Update:
    """A change that is taken up for the first time."""
    return Update(wanted.version, current, wanted.sha256, wanted.attempt)


def faults(update: Update, seen: Seen) -> list[str]:
    """What is wrong with the release that should run now, the worst first."""
    target = aim(update)
    found = [f"{name} does not run" for name, unit in sorted(seen.units.items()) if not unit.is_active]
    found += [f"{name} does not run from it" for name in update.units if seen.units[name].is_active and seen.units[name].version != target]
    if update.waiting_for is None:
        pass  # what did not answer before is not asked to answer now
    elif seen.waiting_for is None:
        found.append("the gateway does not answer")
    elif lost := sorted(seen.waiting_for - set(update.waiting_for)):
        found.append(f"nobody answers for {', '.join(lost[:5])}")
    if not seen.is_heard:
        found.append(NOT_HEARD)
    return found


def watched(watch: Watch, update: Update, seen: Seen, now_s: float) -> Watch:
    """With what is seen now. A program that ended between two looks was not well, though it is up again."""
    ends = sum(unit.ends for unit in seen.units.values())
    if watch.stage != update.stage:
        return Watch(update.stage, now_s, now_s, ends=ends)
    is_well = not faults(update, seen) and ends == watch.ends
    return msgspec.structs.replace(watch, well_since_s=watch.well_since_s if is_well else now_s, ends=ends)


def aim(update: Update) -> str:
    """The release that should run at this stage."""
    return update.before if update.stage == "returning" else update.version


def _others(update: Update, seen: Seen) -> tuple[str, ...]:
    """Programs that must start anew: those of another release. On trial those that do not run are left to the service manager, which
    counts how often they end; on the way back it would take ever longer, and any program may have come to run from what is left."""
    target = aim(update)
    if update.stage == "trial":
        return tuple(name for name in update.units if seen.units[name].version not in ("", target))
    return tuple(
        name
        for name, unit in seen.units.items()
        if not unit.is_active or unit.version == update.version or (name in update.units and unit.version != target)
    )


def next_step(update: Update, seen: Seen, watch: Watch, now_s: float, limits: Limits) -> Step:
    """What to do now with a change that is prepared."""
    target = aim(update)
    if update.stage == "trial" and update.begun > limits.most_begun:
        return TurnBack(f"it was begun {update.begun} times and never came through")
    if seen.current != target:
        return Point(target)
    others = _others(update, seen)
    if others and now_s - watch.restarted_s >= limits.settle_s:
        return Restart(others)
    if update.stage == "returning":
        is_back = all(unit.is_active for unit in seen.units.values()) and not others
        return Settle(False) if is_back or now_s - watch.since_s >= limits.back_s else Wait()
    wrong = faults(update, seen)
    tired = [f"{name} ended {unit.ends} times" for name, unit in sorted(seen.units.items()) if unit.ends >= limits.most_ends]
    if tired:
        return TurnBack(tired[0])
    if not wrong and now_s - watch.well_since_s >= limits.observe_s:
        return Settle(True)
    if now_s - watch.since_s >= limits.trial_s:
        reason = wrong[0] if wrong else f"it was never well for {limits.observe_s:.0f} s at a stretch"
        return TurnBack(f"after {limits.trial_s:.0f} s {reason}", is_unreached=wrong == [NOT_HEARD])
    return Wait(wrong[0] if wrong else "")


def settled(record: UpdateRecord, *, is_good: bool) -> UpdateRecord:
    """With what was under way as an outcome."""
    update = record.under_way
    if update is None:
        return record
    reason, is_unreached = ("", False) if is_good else (update.reason, update.is_unreached)
    outcome = Outcome(update.version, update.sha256, update.attempt, is_good, reason, is_unreached)
    kept: Sequence[Outcome] = [one for one in record.outcomes if key(one) != key(outcome)]
    return msgspec.structs.replace(record, under_way=None, outcomes=[*kept, outcome][-MOST_OUTCOMES:])


def report(wanted: Software | None, record: UpdateRecord | None, *, running: str, is_here: bool, waiting: str = "") -> SoftwareReport:
    """What the coordinator is told. ``record`` is None where there is no updater; ``running`` is the release that says this, ``waiting``
    why the bytes are not here yet."""
    if wanted is None:
        return SoftwareReport()
    said = SoftwareReport(wanted.version, wanted.attempt)
    if record is None:
        if wanted.version == running:
            return msgspec.structs.replace(said, phase="done")
        return msgspec.structs.replace(said, phase="failed", reason=NO_UPDATER)
    update, ended = record.under_way, outcome_of(record, wanted)
    if update is not None and key(update) == key(wanted):
        return msgspec.structs.replace(said, phase=update.stage, reason=update.reason)
    if wanted.version == running and update is None:
        return msgspec.structs.replace(said, phase="done")
    if ended is not None and not ended.is_good:
        return msgspec.structs.replace(said, phase="failed", reason=ended.reason, is_unreached=ended.is_unreached)
    return msgspec.structs.replace(said, phase="preparing" if is_here else "fetching", reason=waiting)
