"""What is told of a change that spreads in waves, whatever it is that changes."""

from sqlite_utils import Database as Tables

from coordinator.core.rollout import State
from coordinator.registry import events


def _title(state: State) -> str:
    return "the shadow" if state.is_shadow else f"wave {len(state.waves)}"


def tell_steps(tables: Tables, name: str, old: State, new: State, now_ms: int, *, unit: str, done: str, back: str) -> None:
    """Each step is an event. ``done`` and ``back`` are what is so at the end, and what comes back."""
    if new.is_shadow and not old.waves:
        text = f"{len(new.waves[-1])} {unit} run it beside what serves, and its answers are compared"
        events.add_own_event(tables, "", "rollout.shadow", name, text, now_ms)
    elif len(new.waves) > len(old.waves) or old.is_shadow != new.is_shadow:
        text = f"wave {len(new.waves)}: {len(new.waves[-1])} more {unit}, {len(new.admitted)} in all are to have it"
        events.add_own_event(tables, "", "rollout.wave", name, text, now_ms)
    if new.ready_since_ms and not old.ready_since_ms:
        events.add_own_event(tables, "", "rollout.ready", name, f"{_title(new)} is ready, and watched", now_ms)
    if new.phase == old.phase:
        return
    match new.phase:
        case "waiting":
            events.add_own_event(
                tables, "", "rollout.waiting", name, f"wave {len(new.waves)} was good; the next waits to be approved", now_ms
            )
        case "done":
            events.add_own_event(tables, "", "rollout.done", name, done, now_ms)
        case "failed":
            events.add_own_event(tables, "", "rollout.failed", name, f"{new.reason}; back to {back}", now_ms)
        case "rolling" | "aborted":  # who aborts it says so
            pass
