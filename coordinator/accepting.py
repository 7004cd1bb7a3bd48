"""A deployment that was sent in: new ones and those without ``rollout`` take effect at once, other changes spread in waves."""

import msgspec
from sqlite_utils import Database as Tables

from coordinator.core.deployment import Deployment
from coordinator.core.rollout import State
from coordinator.registry import deployments, events, rollouts
from coordinator.registry.rollouts import Rollout, Version


def accept(tables: Tables, spec: Deployment, text: str, now_ms: int) -> int:
    """Keep it, and have it spread where it is to; returns its generation. One that comes while another spreads takes its place: where
    that one had not come yet, the last good one goes on."""
    held, active = deployments.read_deployment(tables, spec.name), rollouts.read_rollout(tables, spec.name)
    generation = deployments.save_deployment(tables, spec, text, now_ms)
    if held is None or held.generation == generation:
        return generation
    rollouts.forget_failed(tables, spec.name, text)
    is_spreading = active is not None and not active.state.is_over
    before = active.before if active is not None and is_spreading else Version(held.generation, held.text, held.spec)
    if is_spreading:
        events.add_own_event(tables, "", "rollout.replaced", spec.name, f"generation {generation} came before it was over", now_ms)
    if spec.rollout is None or not _spreads(before.spec, spec):
        rollouts.forget_rollout(tables, spec.name)
        return generation
    state = State("rolling", [], now_ms, now_ms)
    rollouts.save_rollout(tables, Rollout(spec.name, before, Version(generation, text, spec), state, 0, now_ms))
    events.add_own_event(tables, "", "rollout.began", spec.name, f"from generation {before.generation} to {generation}", now_ms)
    return generation


def _spreads(before: Deployment, after: Deployment) -> bool:
    """Whether there is anything to spread, and can be: what each box has of its own can't turn box by box into what is counted."""
    same_kind = (before.replicas.count is None) == (after.replicas.count is None)
    return same_kind and _plain(before) != _plain(after)


def _plain(spec: Deployment) -> Deployment:
    return msgspec.structs.replace(spec, rollout=None, warnings=[])
