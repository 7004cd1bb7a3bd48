"""What is only true now and kept in memory: when each box was last heard, its last sample, the last minute's requests."""

import time
from collections import deque

from coordinator.registry.measurements import COUNTS, Served, plus
from skerry.wire import latency
from skerry.wire.api import ServeView
from skerry.wire.messages import Sample

WINDOW_S = 15.0


class Live:
    """Filled by ingest, read by the views. Lost with the process: the next samples bring it back."""

    def __init__(self) -> None:
        self.heard_at_ms: dict[str, int] = {}
        self.samples: dict[str, Sample] = {}
        self._recent: dict[str, deque[tuple[float, Served]]] = {}

    def hear(self, node: str) -> None:
        """A message came from ``node``."""
        self.heard_at_ms[node] = time.time_ns() // 1_000_000

    def take(self, node: str, sample: Sample, served: list[Served]) -> None:
        """A sample that is new; ``served`` is what it says of each deployment."""
        held = self.samples.get(node)
        if held is None or held.at_ms <= sample.at_ms:
            self.samples[node] = sample
        for one in served:
            self._recent.setdefault(one.deployment, deque(maxlen=100_000)).append((sample.at_ms / 1000, one))

    def serve(self, deployment: str) -> ServeView:
        """A deployment's last WINDOW_S seconds, over all boxes."""
        recent = self._recent.get(deployment)
        oldest = time.time() - WINDOW_S
        while recent and recent[0][0] < oldest - 60:
            recent.popleft()  # arrivals are only nearly in order of time
        total = Served(deployment, 0, "")
        for at_s, served in recent or ():
            if at_s >= oldest:
                total = plus(total, served)
        counts = {name: getattr(total, name) for name in COUNTS}
        return ServeView(
            window_s=WINDOW_S,
            per_second=(total.edge + total.peer + total.cloud) / WINDOW_S,
            p50_ms=latency.quantile_ms(total.latency, 0.5),
            p99_ms=latency.quantile_ms(total.latency, 0.99),
            **counts,
        )
