"""What people ask of decisions: what would become of a request now, and what would have become of those that came."""

import asyncio
import math
import time
from typing import Any

import msgspec

from edge_agent.core.replay import Replay
from edge_agent.core.routing import Forward, Here, Refuse
from edge_agent.gateway.samples import Samples
from edge_agent.gateway.service import Served, Service
from skerry.wire.decision import MOST_KEPT_MIN, Changed, Decisions
from skerry.wire.messages import Tier
from skerry.wire.slowest import Slowest

MOST_MOVED = 20
AT_A_TIME = 4
"""Cases decided anew, about a tenth of a millisecond each; then those whose requests wait go first."""


class Inquiry:
    """Asks ``service`` and looks into what it put by."""

    def __init__(self, service: Service, samples: Samples, *, node: str, tier: Tier) -> None:
        self._service = service
        self._samples = samples
        self._node = node
        self._tier: Tier = tier

    def foreseen(self, served: Served, *, deadline_ms: float, size_bytes: int, priority: int) -> dict[str, Any]:
        """What would become of such a request now, and what became of others lately."""
        decision = self._service.foreseen(served, deadline_ms=deadline_ms, size_bytes=size_bytes, priority=priority)
        route = served.route
        tiers = {upstream.node: upstream.tier for upstream in route.upstreams}
        facts: dict[str, Any] = {"deployment": route.deployment, "model": route.model, "version": str(route.version)}
        match decision:
            case Here():
                facts |= {"decision": "here", "served_by": "cloud" if self._tier == "cloud" else "edge", "node": self._node}
            case Forward(node=node):
                facts |= {"decision": "forward", "served_by": "cloud" if tiers[node] == "cloud" else "peer", "node": node}
            case Refuse():
                facts |= {"decision": "refuse", "served_by": "", "node": ""}
        numbers = _finite(msgspec.to_builtins(decision.numbers))
        for considered in numbers["upstreams"]:
            considered["tier"] = tiers.get(considered["node"], "")
        recent = [{"at_ms": one.at_ms, "text": one.text} for one in self._samples.of(route.deployment)]
        return facts | {"reason": decision.reason, "numbers": numbers, "recent": recent}

    async def replayed(self, served: Served, change: Changed, *, minutes: float) -> Decisions:
        """What would have become of the requests of the last ``minutes``, MOST_KEPT_MIN at most."""
        since_ms = time.time_ns() // 1_000_000 - int(min(minutes, MOST_KEPT_MIN) * 60_000)
        kept = self._samples.cases.since(served.route.deployment, since_ms)
        replay = Replay(change, own_tier=self._tier)
        for number, one in enumerate(kept):
            if number % AT_A_TIME == 0:
                await asyncio.sleep(0)
            replay.add(one.case, one.count)
        since_ms = kept[0].case.at_ms if kept else since_ms
        moved = replay.moved[: -MOST_MOVED - 1 : -1]
        return Decisions(served.route.deployment, since_ms, len(kept), replay.before, replay.after, moved)

    def slowest(self, served: Served, *, minutes: float) -> Slowest:
        """The requests of the last ``minutes`` that took longest."""
        since_ms = time.time_ns() // 1_000_000 - int(minutes * 60_000)
        return Slowest(served.route.deployment, self._samples.slowest.since(served.route.deployment, since_ms))


def _finite(value: Any) -> Any:
    """For JSON, which has no infinity."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
