"""Watches a release of the box software while it spreads over the fleet, lets the next wave in, and has it taken back where it is no good.
What is decided is coordinator.core.rollout's and coordinator.core.software's; here it is asked, kept, and told."""

from collections.abc import Iterable, Mapping

import msgspec
from sqlite_utils import Database as Tables

from coordinator.core import rollout, software
from coordinator.core.rollout import Baseline, Counts, State, Unit
from coordinator.core.software import Spread
from coordinator.deployment_rollout import BASELINE_S, MOST_MEASURED
from coordinator.registry import identity, measurements, nodes, releases
from coordinator.registry.measurements import Served
from coordinator.rollout_events import tell_steps
from skerry.wire import latency
from skerry.wire.messages import Birth, SoftwareReport

BEFORE = "the releases that ran before"


def title(spread: Spread) -> str:
    """By which its events are found."""
    return f"skerry-{spread.version}"


class Fleet:
    """Boxes that are the fleet's, as they say they are, read once."""

    def __init__(self, tables: Tables) -> None:
        enrolled, told = identity.read_enrolled(tables), nodes.read_desired(tables)
        self.builds = releases.by_build(tables)
        self._told = {node: document.software for node, document in told.items()}
        self.births: dict[str, Birth] = {}
        self.said: dict[str, SoftwareReport] = {}
        self._online: dict[str, bool] = {}
        self._since_ms: dict[str, int] = {}
        for stored in nodes.read_nodes(tables):
            is_out = stored.id in enrolled and enrolled[stored.id].revoked_at_ms
            if stored.birth is not None and not is_out:
                self.births[stored.id] = stored.birth
                self.said[stored.id] = stored.reported.software if stored.reported else SoftwareReport()
                self._online[stored.id], self._since_ms[stored.id] = stored.online, stored.changed_at_ms

    def units(self, spread: Spread, asked: Mapping[str, int]) -> dict[str, Unit]:
        """Every box as core/rollout takes it."""
        is_told = spread.planned >= len(spread.state.waves)
        found = {
            node: software.unit_of(
                birth, self.said[node], self._told.get(node), spread, self.builds,
                is_there=software.is_there(node, spread, is_online=self._online[node], since_ms=self._since_ms[node]),
                asked=asked.get(node, 0),
            )
            for node, birth in self.births.items()
        }  # fmt: skip
        for node in [] if is_told else spread.state.waves[-1]:
            if node in found:
                found[node] = msgspec.structs.replace(found[node], ready=False)
        return found


def turn(tables: Tables, *, now_ms: int) -> Spread | None:
    """Look at what spreads; returns how it is now where that changed."""
    held = releases.read_spread(tables)
    if held is None or held.state.is_over:
        return None
    fleet, since_s = Fleet(tables), now_ms // 1000 - BASELINE_S
    units = fleet.units(held, measurements.read_asked(tables, since_s=since_s))
    if not held.state.waves:
        state = rollout.begin(held.rules, units, Baseline(), seed=held.version, now_ms=now_ms)
    else:
        counts = _counts(tables, held) if held.state.ready_since_ms else Counts()
        state = rollout.step(held.state, held.rules, units, counts, seed=held.version, now_ms=now_ms)
    stands = rollout.standing(state, units, before=held.state.admitted)
    if state == held.state:
        if stands != held.standing:
            releases.save_spread(tables, msgspec.structs.replace(held, standing=stands))
        return None
    now = msgspec.structs.replace(held, state=state, changed_at_ms=now_ms, standing=stands)
    if new := state.admitted - held.state.admitted:
        now = _let_in(tables, now, new, fleet, since_s)
    releases.save_spread(tables, now)
    tell(tables, held.state, now, now_ms)
    return now


def tell(tables: Tables, before: State, after: Spread, now_ms: int) -> None:
    """Each step is an event."""
    tell_steps(tables, title(after), before, after.state, now_ms, unit="boxes", done=f"every box runs {after.version}", back=BEFORE)


def _let_in(tables: Tables, spread: Spread, new: Iterable[str], fleet: Fleet, since_s: int) -> Spread:
    """With what ran on the boxes of the wave that begins, and how they served."""
    ran = {node: fleet.births[node].version for node in new if node in fleet.births and fleet.births[node].version != spread.version}
    by_deployment = _served(tables, spread.state.waves[-1], since_s)
    total = measurements.total(by_deployment.values())
    known = {name: served for name, served in by_deployment.items() if served.asked >= rollout.LEAST_BASELINE}
    p99_ms = {name: latency.quantile_ms(served.latency, 0.99) for name, served in known.items()}
    baseline = Baseline(total.asked, total.refused + total.failed, latency.quantile_ms(total.latency, 0.99))
    state = msgspec.structs.replace(spread.state, baseline=baseline)
    return msgspec.structs.replace(spread, ran=spread.ran | ran, p99_ms=p99_ms, state=state)


def _served(tables: Tables, boxes: list[str], since_s: int) -> dict[str, Served]:
    """By deployment, what these boxes answered."""
    found: dict[str, Served] = {}
    for bucket in measurements.read_served_by(tables, sorted(boxes)[:MOST_MEASURED], since_s=since_s):
        found[bucket.deployment] = measurements.plus(found[bucket.deployment], bucket) if bucket.deployment in found else bucket
    return found


def _counts(tables: Tables, spread: Spread) -> Counts:
    """What the present wave's boxes served since it was ready. Slow is what takes longer than is usual for its deployment there."""
    by_deployment = _served(tables, spread.state.waves[-1], -(-spread.state.ready_since_ms // 1000))
    total = measurements.total(by_deployment.values())
    slow = 0
    for name, served in by_deployment.items():
        if (usual_ms := spread.p99_ms.get(name)) is not None:
            limit_ms = usual_ms * spread.rules.slower
            slow += sum(count for bucket, count in served.latency.items() if latency.middle_ms(bucket) > limit_ms)
    return Counts(total.asked, total.refused + total.failed, slow)
