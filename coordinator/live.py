"""What is only true now and kept in memory: when each box was last heard, its last sample, the last minute's requests."""

import time

from coordinator.registry.measurements import REQUESTS, Served, plus
from skerry.wire import latency
from skerry.wire.api import ServeView
from skerry.wire.messages import Sample

WINDOW_S = 15.0
LATE_S = 60.0
"""How far a box's clock may be off, and a sample on its way, to count as of now."""


class Live:
    """Filled by ingest and read by the views, all on the event loop. Lost with the process: the next samples bring it back."""

    def __init__(self) -> None:
        self.heard_at_ms: dict[str, int] = {}
        self.samples: dict[str, Sample] = {}
        self._seconds: dict[str, dict[int, Served]] = {}

    def hear(self, node: str) -> None:
        """A message came from ``node``."""
        self.heard_at_ms[node] = time.time_ns() // 1_000_000

    def take(self, node: str, sample: Sample, served: list[Served]) -> None:
        """A sample that is new; ``served`` is what it says of each deployment."""
        held = self.samples.get(node)
        if held is None or held.epoch != sample.epoch or held.seq <= sample.seq:  # by number: clocks jump
            self.samples[node] = sample
        second, now = sample.at_ms // 1000, int(time.time())
        if not now - WINDOW_S - LATE_S <= second <= now + LATE_S:
            return  # out of an outbox, or of a box whose clock is wrong: not of this minute
        for one in served:
            seconds = self._seconds.setdefault(one.deployment, {})
            seconds[second] = plus(seconds[second], one) if second in seconds else one
            for old in [at for at in seconds if at < now - WINDOW_S - LATE_S]:
                del seconds[old]

    def serve(self, deployment: str) -> ServeView:
        """A deployment's last WINDOW_S seconds, over all boxes."""
        oldest = time.time() - WINDOW_S
        total = Served(deployment, 0, "")
        for second, served in self._seconds.get(deployment, {}).items():
            if second >= oldest:
                total = plus(total, served)
        return serve_view(total, WINDOW_S)


def serve_view(total: Served, window_s: float) -> ServeView:
    """What was counted within ``window_s``."""
    counts = {name: getattr(total, name) for name in REQUESTS}
    return ServeView(
        window_s=window_s,
        per_second=(total.edge + total.peer + total.cloud) / window_s,
        p50_ms=latency.quantile_ms(total.latency, 0.5),
        p99_ms=latency.quantile_ms(total.latency, 0.99),
        **counts,
    )
