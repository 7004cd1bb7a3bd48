"""Watches changes of deployments while they spread, lets the next wave in, and takes back what is no good. What is decided is
coordinator.core.rollout's; here it is asked, kept, and told."""

from collections.abc import Mapping

import msgspec
from sqlite_utils import Database as Tables

from coordinator.core import fit, planner, rollout
from coordinator.core.liveness import Ear
from coordinator.core.rollout import Baseline, Counts, Rules, Standing, State, Unit
from coordinator.plan_loop import node_of
from coordinator.registry import deployments, identity, measurements, nodes, rollouts
from coordinator.registry.rollouts import Failed, Rollout, Version
from coordinator.rollout_events import tell_steps
from skerry.wire import latency
from skerry.wire.messages import Desired, ReplicaReport, ReplicaSpec

BASELINE_S = 600
"""Before the change: that is how it served."""
MOST_MEASURED = 500
"""Boxes of a wave whose measurements are added up: enough to know, few enough to read every second."""
DEFAULT = Rules([1.0])


def turn(tables: Tables, *, now_ms: int) -> list[Rollout]:
    """Look at each change that spreads; returns those that were changed by it, as they are now."""
    active = rollouts.read_active(tables)
    if not active:
        return []
    world = World(tables)
    changed = []
    for held in active:
        after, stands = _looked_at(tables, held, world, now_ms)
        if after == held.state:
            if stands != held.standing:
                rollouts.save_rollout(tables, msgspec.structs.replace(held, standing=stands))
            continue
        now = msgspec.structs.replace(held, state=after, changed_at_ms=now_ms, standing=stands)
        rollouts.save_rollout(tables, now)
        _tell(tables, held, now, now_ms)
        if after.phase == "failed":
            take_back(tables, now, now_ms)
        changed.append(now)
    return changed


def take_back(tables: Tables, over: Rollout, now_ms: int) -> None:
    """Have the deployment be again what it was before; a change that failed is remembered."""
    deployments.save_deployment(tables, over.before.spec, over.before.text, now_ms)
    if over.state.phase == "failed":
        rollouts.note_failed(tables, over.deployment, over.after.text, Failed(now_ms, over.state.reason))


class World:
    """All that is known of the fleet, read once for every change."""

    def __init__(self, tables: Tables) -> None:
        enrolled, drained = identity.read_enrolled(tables), nodes.read_drained(tables)
        ear: Ear = nodes.read_ear(tables)
        self.desired: Mapping[str, Desired] = nodes.read_desired(tables)
        self.outcomes = deployments.read_outcomes(tables)
        self.boxes: dict[str, fit.Node] = {}
        self.reports: dict[str, dict[str, ReplicaReport]] = {}
        self.refused: dict[str, str] = {}
        for stored in nodes.read_nodes(tables):
            box = node_of(stored, enrolled.get(stored.id), ear, drained.get(stored.id))
            if box is not None:
                self.boxes[box.id] = box
                self.reports[box.id] = {replica.name: replica for replica in (stored.reported.replicas if stored.reported else [])}
                self.refused[box.id] = stored.reported.refused if stored.reported else ""


def units_of(held: Rollout, world: World, asked: Mapping[str, int]) -> dict[str, Unit]:
    """Every unit of a deployment as it is now. ``asked``: by box, the requests of late."""
    old, new = held.before.spec, held.after.spec
    outcome = world.outcomes.get(held.deployment, planner.Outcome(0))
    placed: dict[str, list[planner.Placement]] = {}
    is_counted = new.replicas.count is not None
    for placement in outcome.placements:
        placed.setdefault(placement.replica if is_counted else placement.node, []).append(placement)
    if held.state.shadowing:
        return _shadows(held, world, asked, outcome)
    is_planned = held.planned >= held.state.stage
    if is_counted:
        names = [f"{new.name}-{index}" for index in range(max(old.replicas.count or 0, new.replicas.count or 0))]
        gone = set(names[new.replicas.count or 0 :])
    else:
        names = [name for name, box in world.boxes.items() if not fit.unfit(box, old) or not fit.unfit(box, new)]
        gone = {name for name in names if fit.unfit(world.boxes[name], new)}
    reasons = {refusal.node: refusal.reason for refusal in outcome.refusals}
    return {
        name: _unit(placed.get(name, []), world, asked, is_planned=is_planned, is_gone=name in gone,
                    home="" if is_counted else name, refusal=reasons.get(name, "") or outcome.problem)
        for name in names
    }  # fmt: skip


def _shadows(held: Rollout, world: World, asked: Mapping[str, int], outcome: planner.Outcome) -> dict[str, Unit]:
    """The units of a change while it runs beside what serves. Where there is no room for that it is ready as it is."""
    want = planner.Wanted(held.after.spec, held.after.generation, None, shadowing=held.state.shadowing)
    homes: dict[str, list[str]] = {}
    for placement in outcome.placements:
        homes.setdefault(want.unit_of(placement), []).append(placement.node)
    name, is_planned = planner.shadow_of(held.after.spec), held.planned >= held.state.stage
    found = {}
    for unit, boxes in homes.items():
        is_there = any(world.boxes[node].online and not world.boxes[node].drained for node in boxes if node in world.boxes)
        pairs = [(spec, world.reports.get(node, {}).get(name)) for node in boxes if (spec := _spec(world.desired.get(node), name))]
        failure = next(filter(None, (_failure(spec, report) for spec, report in pairs)), "")
        failure = failure or next(
            (f"refuses what it is told: {world.refused[node]}" for node in sorted(boxes) if world.refused.get(node)), ""
        )
        is_ready = all(_is_current(spec, report) for spec, report in pairs)
        restarts = sum(report.restarts for _, report in pairs if report is not None)
        load = sum(asked.get(node, 0) for node in boxes)
        found[unit] = Unit(is_there, is_planned and is_ready, failure if is_planned else "", restarts, load)
    return found


def _unit(
    placements: list[planner.Placement],
    world: World,
    asked: Mapping[str, int],
    *,
    is_planned: bool,
    is_gone: bool,
    home: str,
    refusal: str,
) -> Unit:
    """``is_gone``: the change leaves nothing here. ``home`` is the box that is the unit; "" for a replica, which is where it is placed."""
    homes = {placement.node for placement in placements} or ({home} if home else set())
    is_there = any(world.boxes[node].online and not world.boxes[node].drained for node in homes if node in world.boxes)
    reports = [world.reports.get(p.node, {}).get(p.replica) for p in placements]
    specs = [_spec(world.desired.get(p.node), p.replica) for p in placements]
    is_current = [_is_current(spec, report) for spec, report in zip(specs, reports, strict=True)]
    failure = next(filter(None, (_failure(spec, report) for spec, report in zip(specs, reports, strict=True))), "")
    failure = failure or next((f"refuses what it is told: {world.refused[node]}" for node in sorted(homes) if world.refused.get(node)), "")
    if is_planned and not placements and not is_gone:
        failure, is_there = refusal or "found no place", is_there or not home
    ready = is_planned and (is_gone if not placements else all(is_current) if home else any(is_current))
    restarts = sum(report.restarts for report in reports if report is not None)
    return Unit(is_there, ready, failure if is_planned else "", restarts, sum(asked.get(node, 0) for node in homes))


def _spec(document: Desired | None, replica: str) -> ReplicaSpec | None:
    return next((spec for spec in document.replicas if spec.name == replica), None) if document else None


def _is_current(spec: ReplicaSpec | None, report: ReplicaReport | None) -> bool:
    return spec is not None and report is not None and report.phase == "ready" and report.is_of(spec)


def _failure(spec: ReplicaSpec | None, report: ReplicaReport | None) -> str:
    """What a box says of the very replica that it is told to run; what it says of an older one is no word on the change."""
    if spec is None or report is None or report.generation != spec.generation:
        return ""
    return f"{report.state}: {report.reason}" if report.phase in ("failed", "backoff") else ""


def _looked_at(tables: Tables, held: Rollout, world: World, now_ms: int) -> tuple[State, Standing]:
    """What follows, and how far it is then."""
    rules, seed = held.after.spec.rollout or DEFAULT, f"{held.deployment} {held.after.generation}"
    since_s = now_ms // 1000 - BASELINE_S
    units = units_of(held, world, measurements.read_asked(tables, held.deployment, since_s=since_s))
    if not held.state.waves:
        can_compare = _model_of(held.before) != _model_of(held.after)
        baseline = _baseline(tables, held.deployment, since_s)
        after = rollout.begin(rules, units, baseline, seed=seed, now_ms=now_ms, can_compare=can_compare)
    else:
        counts = _counts(tables, held, world, rules) if held.state.ready_since_ms else Counts()
        after = rollout.step(held.state, rules, units, counts, seed=seed, now_ms=now_ms)
    return after, rollout.standing(after, units, before=held.state.admitted)


def _model_of(version: Version) -> tuple[str, int]:
    return version.spec.model, version.spec.version


def _baseline(tables: Tables, deployment: str, since_s: int) -> Baseline:
    total = measurements.total(measurements.read_served(tables, since_s=since_s, deployment=deployment))
    return Baseline(total.asked, total.refused + total.failed, latency.quantile_ms(total.latency, 0.99))


def _counts(tables: Tables, held: Rollout, world: World, rules: Rules) -> Counts:
    """What the present wave's boxes served since it was ready."""
    outcome, wave = world.outcomes.get(held.deployment, planner.Outcome(0)), set(held.state.waves[-1])
    boxes = sorted({p.node for p in outcome.placements if p.node in wave or p.replica in wave})[:MOST_MEASURED]
    since_s = -(-held.state.ready_since_ms // 1000)
    total = measurements.total(measurements.read_served_by(tables, boxes, since_s=since_s, deployment=held.deployment))
    limit_ms = rollout.slow_ms(rules, held.state.baseline, held.after.spec.deadline_ms)
    slow = sum(count for bucket, count in total.latency.items() if latency.middle_ms(bucket) > limit_ms)
    return Counts(total.asked, total.refused + total.failed, slow, total.compared, total.differed)


def _tell(tables: Tables, before: Rollout, after: Rollout, now_ms: int) -> None:
    unit = "replicas" if after.after.spec.replicas.count is not None else "boxes"
    done, back = f"generation {after.after.generation} is everywhere", f"what generation {after.before.generation} was"
    tell_steps(tables, after.deployment, before.state, after.state, now_ms, unit=unit, done=done, back=back)
