"""A deployment's versions side by side: how the one that a change brings serves, and how the one before it does or did."""

import time

import msgspec
from sqlite_utils import Database as Tables

from coordinator.registry import deployments, measurements, rollouts
from coordinator.registry.measurements import Served
from coordinator.registry.rollouts import Rollout
from skerry.wire import latency
from skerry.wire.fleet import QUANTILES, VersionView

SPAN_S = 3600
MOST_BOXES = 500
"""Of a version: enough to know."""


def read(tables: Tables, name: str, *, now_s: float | None = None) -> list[VersionView]:
    """The present version first, then the one before it if there was a change; none where there is no such deployment.

    While a change spreads, and where it failed, both are seen on their own boxes in the time since it began. Once it is everywhere, the one
    before is seen in the hour before it began.
    """
    stored = deployments.read_deployment(tables, name)
    if stored is None:
        return []
    now = int(time.time() if now_s is None else now_s)
    held = rollouts.read_rollout(tables, name)
    if held is None or held.state.is_shadow:
        return [
            _view(stored.spec.model, stored.spec.version, stored.generation, _whole(tables, name, now - SPAN_S, now), now - SPAN_S, now)
        ]
    began, changed = held.state.began_ms // 1000, held.changed_at_ms // 1000
    if held.state.phase == "done":
        since = max(now - SPAN_S, changed)
        after, before = _whole(tables, name, since, now), _whole(tables, name, began - SPAN_S, began)
        return [_of(held, after, since, now, is_new=True), _of(held, before, began - SPAN_S, began, is_new=False)]
    until = changed if held.state.is_over else now
    new, old = _boxes(tables, name, held)
    after, before = (_some(tables, name, boxes, began, until) for boxes in (new, old))
    return [_of(held, after, began, until, is_new=True, boxes=len(new)), _of(held, before, began, until, is_new=False, boxes=len(old))]


def _boxes(tables: Tables, name: str, held: Rollout) -> tuple[list[str], list[str]]:
    """Those that were let in, and the others."""
    units = held.state.let_in
    found = list(tables.query("SELECT DISTINCT node, replica FROM said WHERE deployment = ? ORDER BY node", [name]))
    new = {row["node"] for row in found if row["node"] in units or row["replica"] in units}
    return sorted(new), sorted({row["node"] for row in found} - new)


def _whole(tables: Tables, name: str, since_s: int, until_s: int) -> Served:
    served = measurements.read_served(tables, since_s=since_s, deployment=name)
    return measurements.total(one for one in served if one.at_s < until_s)


def _some(tables: Tables, name: str, boxes: list[str], since_s: int, until_s: int) -> Served:
    served = measurements.read_served_by(tables, boxes[:MOST_BOXES], since_s=since_s, deployment=name)
    return measurements.total(one for one in served if one.at_s < until_s)


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
