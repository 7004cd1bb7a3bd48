"""Prometheus' page, from accounts: our own names, and beside them Triton's, so that dashboards made for Triton work.

Source: triton-inference-server/server ``docs/user_guide/metrics.md``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from edge_agent.gateway.ledger import REASONS, Account, merged
from skerry.wire import latency
from skerry.wire.messages import Gpu, GpuSample

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BOUNDS_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NS_PER_S = 1_000_000_000
NS_PER_US = 1000


class _Collected(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def page(accounts: Mapping[str, Account], *, gpus: Sequence[Gpu] = (), readings: Sequence[GpuSample] = ()) -> bytes:
    """The page in Prometheus' text format, CONTENT_TYPE, of the accounts by deployment and of the box's GPUs as they were last read."""
    families = [*_own(accounts), _pending(accounts), *_of_gpus(gpus, readings)]
    return generate_latest(_Collected(families)) + _tritons_counters(accounts).encode()


def _own(accounts: Mapping[str, Account]) -> Iterator[Metric]:
    labels = ["deployment", "model", "version"]
    answers = CounterMetricFamily("skerry_requests", "Requests, by what became of them.", labels=[*labels, "outcome"])
    slots = GaugeMetricFamily("skerry_replica_slots", "Calls that ready replicas on this box can run at once.", labels=labels)
    waiting = GaugeMetricFamily("skerry_queue_length", "Requests that wait for a replica.", labels=labels)
    compute = CounterMetricFamily("skerry_compute_seconds", "Time that replicas on this box computed.", labels=labels)
    durations = HistogramMetricFamily("skerry_request_duration_seconds", "From request to answer.", labels=labels)
    rows = HistogramMetricFamily("skerry_batch_rows", "Rows in one run of the model on this box.", labels=labels)
    hedged = CounterMetricFamily("skerry_hedged", "Requests run here because an answer from elsewhere was overdue.", labels=labels)
    retried = CounterMetricFamily("skerry_retried", "Tries after the first.", labels=labels)
    shed = CounterMetricFamily("skerry_shed", "Requests refused in favour of more urgent ones.", labels=labels)
    compared = CounterMetricFamily("skerry_shadow_compared", "Answers of shadows that were compared with what was answered.", labels=labels)
    differed = CounterMetricFamily("skerry_shadow_differed", "Those of them that did not agree.", labels=labels)
    for name, account in sorted(accounts.items()):
        values = [name, account.model, str(account.version)]
        for outcome, count in _outcomes(account).items():
            answers.add_metric([*values, outcome], count)
        slots.add_metric(values, account.slots)
        waiting.add_metric(values, account.waiting)
        compute.add_metric(values, account.executed_ns / NS_PER_S)
        durations.add_metric(values, buckets=_durations(account), sum_value=account.total_ns / NS_PER_S)
        rows.add_metric(values, buckets=_rows(account), sum_value=account.runs_rows)
        hedged.add_metric(values, account.hedged)
        retried.add_metric(values, account.retried)
        shed.add_metric(values, account.shed)
        compared.add_metric(values, account.compared)
        differed.add_metric(values, account.differed)
    yield from (answers, slots, waiting, compute, durations, rows, hedged, retried, shed, compared, differed)


def _outcomes(account: Account) -> dict[str, int]:
    failures = account.failures
    return {
        "edge": account.edge,
        "peer": account.peer,
        "cloud": account.cloud,
        "refused": failures.get("REJECTED", 0),
        "failed": failures.get("BACKEND", 0) + failures.get("OTHER", 0),
        "cancelled": failures.get("CANCELED", 0),
        "late": account.late,
    }


def _durations(account: Account) -> list[tuple[str, float]]:
    """Prometheus' buckets of our histogram; each of our buckets is counted at its middle."""
    counts = [(latency.middle_ms(bucket) / 1000, count) for bucket, count in account.latency.items()]
    bounded = [(str(bound), float(sum(count for at, count in counts if at <= bound))) for bound in BOUNDS_S]
    return [*bounded, ("+Inf", float(sum(account.latency.values())))]


def _rows(account: Account) -> list[tuple[str, float]]:
    bounded = [(str(float(bound)), float(sum(r.count for size, r in account.runs.items() if size <= bound))) for bound in BOUNDS_ROWS]
    return [*bounded, ("+Inf", float(account.executions))]


def _by_model(accounts: Mapping[str, Account]) -> list[tuple[list[str], Account]]:
    """Triton knows no deployments: those of one model in one version are one there."""
    found: dict[tuple[str, int], list[Account]] = {}
    for account in accounts.values():
        found.setdefault((account.model, account.version), []).append(account)
    return [([model, str(version)], merged(same)) for (model, version), same in sorted(found.items())]


def _pending(accounts: Mapping[str, Account]) -> Metric:
    family = GaugeMetricFamily("nv_inference_pending_request_count", "Requests that wait for a replica.", labels=["model", "version"])
    for values, account in _by_model(accounts):
        family.add_metric(values, account.waiting)
    return family


def _of_gpus(gpus: Sequence[Gpu], readings: Sequence[GpuSample]) -> list[Metric]:
    if not readings:
        return []
    labels = ["gpu_uuid"]
    utilization = GaugeMetricFamily("nv_gpu_utilization", "Share of the time in which the GPU computed, 0 to 1.", labels=labels)
    total = GaugeMetricFamily("nv_gpu_memory_total_bytes", "The GPU's memory.", labels=labels)
    used = GaugeMetricFamily("nv_gpu_memory_used_bytes", "Memory of the GPU that is in use.", labels=labels)
    power = GaugeMetricFamily("nv_gpu_power_usage", "Power that the GPU draws, in watts.", labels=labels)
    for gpu in gpus:
        total.add_metric([gpu.uuid], gpu.memory_mib * 2**20)
    for reading in readings:
        utilization.add_metric([reading.uuid], reading.utilization_ratio)
        used.add_metric([reading.uuid], reading.memory_used_mib * 2**20)
        power.add_metric([reading.uuid], reading.power_w)
    return [utilization, total, used, power]


TRITONS_COUNTERS: dict[str, tuple[str, Callable[[Account], int]]] = {
    "nv_inference_request_success": ("Requests that were answered.", lambda a: a.answered),
    "nv_inference_count": ("Rows that replicas on this box computed for answered requests.", lambda a: a.rows),
    "nv_inference_exec_count": ("Runs of the model on this box.", lambda a: a.executions),
    "nv_inference_request_duration_us": ("From request to answer, summed over answered requests.", lambda a: a.total_ns // NS_PER_US),
    "nv_inference_queue_duration_us": ("Waiting for a replica, summed over requests.", lambda a: a.queue_ns // NS_PER_US),
    "nv_inference_compute_input_duration_us": ("Handing inputs to a replica, summed over requests.", lambda a: a.input_ns // NS_PER_US),
    "nv_inference_compute_infer_duration_us": ("Computing, summed over requests.", lambda a: a.compute_ns // NS_PER_US),
    "nv_inference_compute_output_duration_us": ("Taking outputs from a replica, summed over requests.", lambda a: a.output_ns // NS_PER_US),
}


def _tritons_counters(accounts: Mapping[str, Account]) -> str:
    """Triton's counters do not end in ``_total``; prometheus_client gives every counter that ending, so these lines are written here."""
    models = [({"model": model, "version": version}, account) for (model, version), account in _by_model(accounts)]
    refusals = [({**labels, "reason": reason}, a.failures.get(reason, 0)) for labels, a in models for reason in REASONS]
    lines = _counter("nv_inference_request_failure", "Requests that got no answer.", refusals)
    for name, (text, value_of) in TRITONS_COUNTERS.items():
        lines += _counter(name, text, [(labels, value_of(account)) for labels, account in models])
    return "".join(f"{line}\n" for line in lines)


def _counter(name: str, text: str, samples: Sequence[tuple[dict[str, str], int]]) -> list[str]:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} counter"]
    for labels, value in samples:
        told = ",".join(f'{label}="{_escaped(given)}"' for label, given in sorted(labels.items()))
        lines.append(f"{name}{{{told}}} {value}")
    return lines


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
