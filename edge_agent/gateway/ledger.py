"""What the gateway has answered: counters by deployment, for the agent, for Prometheus and for Triton's statistics call."""

import time
from collections.abc import Iterator

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from skerry.wire import latency
from skerry.wire.box import GatewayTotals, ServeTotals
from skerry.wire.messages import Tier

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Account(msgspec.Struct):
    """One deployment's counters since the gateway started; sums in milliseconds."""

    model: str
    version: int
    edge: int = 0
    peer: int = 0
    cloud: int = 0
    refused: int = 0
    failed: int = 0
    late: int = 0
    latency: dict[int, int] = {}
    total_ms: float = 0.0
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    computed: int = 0
    last_at_ms: int = 0
    slots: int = 0
    waiting: int = 0

    @property
    def answered(self) -> int:
        """Requests that got an answer."""
        return self.edge + self.peer + self.cloud

    def served(self, by: str, total_ms: float) -> None:
        """Count an answer by ``edge``, ``peer`` or ``cloud``."""
        setattr(self, by, getattr(self, by) + 1)
        self.total_ms += total_ms
        self.last_at_ms = time.time_ns() // 1_000_000
        bucket = latency.bucket_of(total_ms)
        self.latency[bucket] = self.latency.get(bucket, 0) + 1


class Ledger(Collector):
    """Every deployment's account; collects itself for Prometheus when asked."""

    def __init__(self, node: str, tier: Tier) -> None:
        self._node = node
        self._tier: Tier = tier
        self._started_at_ms = time.time_ns() // 1_000_000
        self.accounts: dict[str, Account] = {}

    def account(self, deployment: str, model: str, version: int) -> Account:
        """The account of a deployment, opened on first use."""
        found = self.accounts.get(deployment)
        if found is None:
            found = self.accounts[deployment] = Account(model, version)
        found.model, found.version = model, version
        return found

    def totals(self) -> GatewayTotals:
        """What the agent is told."""
        return GatewayTotals(
            self._started_at_ms,
            self._node,
            self._tier,
            [
                ServeTotals(name, a.edge, a.peer, a.cloud, a.refused, a.failed, a.late, dict(a.latency))
                for name, a in sorted(self.accounts.items())
            ],
        )

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        labels = ["deployment", "model", "version"]
        answers = CounterMetricFamily("skerry_requests", "Requests, by who answered them.", labels=[*labels, "outcome"])
        slots = GaugeMetricFamily("skerry_replica_slots", "Calls that ready replicas on this box can run at once.", labels=labels)
        waiting = GaugeMetricFamily("skerry_queue_length", "Requests that wait for a replica.", labels=labels)
        compute = CounterMetricFamily("skerry_compute_seconds", "Time that replicas on this box computed.", labels=labels)
        durations = HistogramMetricFamily("skerry_request_duration_seconds", "From request to answer.", labels=labels)
        for name, account in sorted(self.accounts.items()):
            values = [name, account.model, str(account.version)]
            for outcome in ("edge", "peer", "cloud", "refused", "failed", "late"):
                answers.add_metric([*values, outcome], getattr(account, outcome))
            slots.add_metric(values, account.slots)
            waiting.add_metric(values, account.waiting)
            compute.add_metric(values, account.compute_ms / 1000)
            durations.add_metric(values, buckets=_cumulative(account.latency), sum_value=account.total_ms / 1000)
        yield from (answers, slots, waiting, compute, durations)


def _cumulative(histogram: dict[int, int]) -> list[tuple[str, float]]:
    """Prometheus buckets of one of our histograms; each of our buckets is counted at its middle."""
    counts = [(latency.middle_ms(bucket) / 1000, count) for bucket, count in histogram.items()]
    bounded = [(str(bound), float(sum(count for at, count in counts if at <= bound))) for bound in BOUNDS_S]
    return [*bounded, ("+Inf", float(sum(histogram.values())))]
