"""A deployment's versions side by side: how the one that a change brings serves, and how the one before it does or did."""

import time

import msgspec
from sqlite_utils import Database as Tables

from coordinator.registry import deployments, measurements, rollouts
from coordinator.registry.measurements import ALL, Served
from coordinator.registry.rollouts import Rollout
from skerry.wire import latency
from skerry.wire.fleet import QUANTILES, VersionView

SPAN_S = 3600
MOST_BOXES = 100
"""Of a version: enough to know."""


def read(tables: Tables, name: str, *, now_s: float | None = None) -> list[VersionView]:
    """The version that a change brings first, then the one before it; the present one alone where nothing spreads or spread, none where
    there is no such deployment.

    While a change spreads, and where it was taken back, both are seen on their own boxes at the same time: since all that were let in ran
    it, or, while the present wave does not run it yet, on those of earlier waves since it was let in. Once it is everywhere, the one before
    is seen in the hour before it began.
    """
    stored = deployments.read_deployment(tables, name)
    if stored is None:
        return []
    now = int(time.time() if now_s is None else now_s)
    held = rollouts.read_rollout(tables, name)
    if held is None or held.state.is_shadow:
        since, spec = max(now - SPAN_S, stored.changed_at_ms // 1000), stored.spec
        served = measurements.sum_up(tables, name, [ALL], since_s=since, until_s=now)
        return [_view(spec.model, spec.version, stored.generation, served, since, now)]
    began, changed, state = held.state.began_ms // 1000, held.changed_at_ms // 1000, held.state
    if state.phase == "done":
        since = max(now - SPAN_S, changed)
        after = measurements.sum_up(tables, name, [ALL], since_s=since, until_s=now)
        before = measurements.sum_up(tables, name, [ALL], since_s=began - SPAN_S, until_s=began)
        return [_of(held, after, since, now, is_new=True), _of(held, before, began - SPAN_S, began, is_new=False)]
    until = changed if state.is_over else now
    since = max(until - SPAN_S, -(-(state.ready_since_ms or state.wave_since_ms) // 1000))
    running = {unit for wave in (state.waves if state.ready_since_ms else state.waves[:-1]) for unit in wave}
    new, old = _boxes(tables, name, running), _boxes(tables, name, set(state.let_in), is_among=False)
    after, before = (measurements.sum_up(tables, name, boxes, since_s=since, until_s=until) for boxes in (new, old))
    return [_of(held, after, since, until, is_new=True, boxes=len(new)), _of(held, before, since, until, is_new=False, boxes=len(old))]


def _boxes(tables: Tables, name: str, units: set[str], *, is_among: bool = True) -> list[str]:
    """Boxes that run some of a deployment's units, or others; MOST_BOXES at the most."""
    among = "(SELECT value FROM json_each(:units))"
    condition = f"(node IN {among} OR replica IN {among})"
    rows = tables.query(
        f"SELECT DISTINCT node FROM said WHERE deployment = :name AND {'' if is_among else 'NOT '}{condition} LIMIT :most",  # noqa: S608 - constants
        {"name": name, "units": msgspec.json.encode(sorted(units)).decode(), "most": MOST_BOXES},
    )
    return sorted(row["node"] for row in rows)


def _of(held: Rollout, served: Served, since_s: int, until_s: int, *, is_new: bool, boxes: int | None = None) -> VersionView:
    version = held.after if is_new else held.before
    view = _view(version.spec.model, version.spec.version, version.generation, served, since_s, until_s)
    return msgspec.structs.replace(view, boxes=boxes)


def _view(model: str, version: int, generation: int, served: Served, since_s: int, until_s: int) -> VersionView:
    return VersionView(
        model=f"{model}:{version}",
        generation=generation,
        since_s=since_s,
        until_s=until_s,
        boxes=None,
        asked=served.asked,
        refused=served.refused,
        failed=served.failed,
        late=served.late,
        latency_ms={str(quantile): latency.quantile_ms(served.latency, quantile) for quantile in QUANTILES},
    )
