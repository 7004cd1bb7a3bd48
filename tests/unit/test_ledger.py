"""The counters: added up exactly, told to the agent, and shown to Prometheus under our names and Triton's."""

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from edge_agent.gateway import exposition
from edge_agent.gateway.ledger import REASONS, Account, Ledger, merged, merged_by_name
from skerry.wire.messages import Gpu, GpuSample

METRICS_PAGE = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"
GPUS = [Gpu("GPU-1", "L4", 24576, "580")]
READINGS = [GpuSample("GPU-1", 0.25, 1024, 50.0, 60.5)]


def busy() -> Account:
    """Three answers of this box, two of which shared a run; one of the cloud; four that failed."""
    account = Account("m", 2, waiting=3, slots=2, late=1, hedged=1, retried=2, shed=1)
    for rows in (1, 3):
        account.served("edge", total_ms=10.5, queue_ms=2, compute_ms=5, input_ms=0.25, output_ms=0.125, rows=rows, at_ms=1000)
    account.ran(4, 5)
    account.served("peer", total_ms=3, queue_ms=0, compute_ms=2, rows=1, at_ms=2000)
    account.ran(1, 2)
    account.served("cloud", total_ms=40, at_ms=1500)
    account.refused(1)
    account.cancelled(2)
    account.failed("BACKEND", 3)
    account.failed("OTHER", 4)
    return account


def samples(text: str) -> dict[str, float]:
    """Value by the sample as it is written."""
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if not line.startswith("#")}


def test_a_run_that_requests_share_counts_once_and_their_rows_all():
    account = busy()
    assert (account.executions, account.rows, account.computed, account.runs_rows) == (2, 5, 3, 5)
    assert account.executed_ns == 7_000_000
    assert account.compute_ns == 12_000_000
    assert (account.answered, account.unanswered, account.failures_ns) == (4, 4, 10_000_000)
    assert (account.edge, account.peer, account.cloud, account.last_at_ms) == (2, 1, 1, 2000)


def test_a_caller_can_not_fill_the_memory_with_sizes():
    account = Account("m", 1)
    for rows in range(1, 100_000, 7):
        account.ran(rows, 1)
    assert len(account.runs) < 80
    assert account.executions == len(range(1, 100_000, 7))
    assert account.runs_rows == sum(range(1, 100_000, 7))


def test_the_sum_of_processes_is_exact_and_goes_over_the_wire_and_back():
    once = busy()
    twice = merged([busy(), msgspec.json.decode(msgspec.json.encode(busy()), type=Account)])
    for name in Account.__struct_fields__:
        one, two = getattr(once, name), getattr(twice, name)
        if name in ("model", "version", "slots", "last_at_ms"):
            assert two == one
        elif name == "runs":
            assert {rows: (r.count, r.compute_ns) for rows, r in two.items()} == {
                rows: (2 * r.count, 2 * r.compute_ns) for rows, r in one.items()
            }
        elif isinstance(one, dict):
            assert two == {key: 2 * value for key, value in one.items()}
        else:
            assert two == 2 * one, name
    assert once == busy(), "adding up changes nothing"
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(twice), type=Account) == twice
    assert merged_by_name([{"a": busy()}, {"a": busy(), "b": once}, {}]) == {"a": twice, "b": once}


@given(st.lists(st.tuples(st.sampled_from(["served", "ran", "failed"]), st.integers(0, 2), st.integers(0, 300), st.floats(0, 1e6))))
def test_it_does_not_matter_which_process_counted_what(happenings):
    together, apart = Account("m", 1), [Account("m", 1) for _ in range(3)]
    for what, process, rows, ms in happenings:
        for account in (together, apart[process]):
            if what == "served":
                account.served("edge", total_ms=ms, queue_ms=ms / 3, compute_ms=ms / 7, rows=rows, at_ms=rows)
            elif what == "ran":
                account.ran(rows + 1, ms)
            else:
                account.failed("OTHER", ms)
    assert merged(apart) == together


def test_the_agent_is_told_what_it_was_told_before_and_the_sum_where_there_is_one():
    ledger = Ledger("box", "edge")
    account = ledger.account("d", "m", 2)
    account.refused(1)
    account.failed("BACKEND", 1)
    account.failed("OTHER", 1)
    account.cancelled(1)
    (told,) = ledger.totals().deployments
    assert (told.deployment, told.refused, told.failed) == ("d", 1, 2)
    (told,) = ledger.totals({"d": merged([account, account])}, started_at_ms=5).deployments
    assert (told.refused, told.failed) == (2, 4)
    assert ledger.totals(started_at_ms=5).started_at_ms == 5


TRITONS = {
    "nv_inference_request_success": "counter",
    "nv_inference_request_failure": "counter",
    "nv_inference_count": "counter",
    "nv_inference_exec_count": "counter",
    "nv_inference_pending_request_count": "gauge",
    "nv_inference_request_duration_us": "counter",
    "nv_inference_queue_duration_us": "counter",
    "nv_inference_compute_input_duration_us": "counter",
    "nv_inference_compute_infer_duration_us": "counter",
    "nv_inference_compute_output_duration_us": "counter",
    "nv_gpu_utilization": "gauge",
    "nv_gpu_memory_total_bytes": "gauge",
    "nv_gpu_memory_used_bytes": "gauge",
    "nv_gpu_power_usage": "gauge",
}


def test_tritons_names_have_its_types_and_labels():
    text = exposition.page({"d": busy()}, gpus=GPUS, readings=READINGS).decode()
    types = dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE nv_"))
    assert types == TRITONS
    labels = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(family.name, set()).add(frozenset(sample.labels))
    for name in TRITONS:
        wanted = (
            {"gpu_uuid"} if name.startswith("nv_gpu") else {"model", "version", "reason"} if "failure" in name else {"model", "version"}
        )
        assert labels[name] == {frozenset(wanted)}


def test_tritons_values_are_in_its_units():
    found = samples(exposition.page({"d": busy()}, gpus=GPUS, readings=READINGS).decode())
    at = '{model="m",version="2"}'
    assert found[f"nv_inference_request_success{at}"] == 4
    assert found[f"nv_inference_count{at}"] == 5
    assert found[f"nv_inference_exec_count{at}"] == 2
    assert found[f"nv_inference_pending_request_count{at}"] == 3
    assert found[f"nv_inference_request_duration_us{at}"] == 64_000
    assert found[f"nv_inference_queue_duration_us{at}"] == 4_000
    assert found[f"nv_inference_compute_input_duration_us{at}"] == 500
    assert found[f"nv_inference_compute_infer_duration_us{at}"] == 12_000
    assert found[f"nv_inference_compute_output_duration_us{at}"] == 250
    failures = {reason: found[f'nv_inference_request_failure{{model="m",reason="{reason}",version="2"}}'] for reason in REASONS}
    assert failures == {"REJECTED": 1, "CANCELED": 1, "BACKEND": 1, "OTHER": 1}
    assert found['nv_gpu_utilization{gpu_uuid="GPU-1"}'] == 0.25
    assert found['nv_gpu_memory_total_bytes{gpu_uuid="GPU-1"}'] == 24 * 2**30
    assert found['nv_gpu_memory_used_bytes{gpu_uuid="GPU-1"}'] == 2**30
    assert found['nv_gpu_power_usage{gpu_uuid="GPU-1"}'] == 60.5


@pytest.mark.parametrize(
    "query",
    [
        'sum by (model) (rate(nv_inference_request_success{model="m"}[1m]))',
        'sum(rate(nv_inference_request_failure{reason!="CANCELED"}[1m])) by (model, version)',
        "rate(nv_inference_count[1m]) / rate(nv_inference_exec_count[1m])",
        "rate(nv_inference_queue_duration_us[1m]) / rate(nv_inference_request_success[1m]) / 1000",
        "delta(nv_inference_request_duration_us[30s]) / delta(nv_inference_request_success[30s])",
        "increase(nv_inference_compute_infer_duration_us[1m]) + increase(nv_inference_compute_input_duration_us[1m])",
        "nv_inference_pending_request_count",
        "avg(nv_gpu_utilization) by (gpu_uuid) * 100",
        "nv_gpu_memory_used_bytes / nv_gpu_memory_total_bytes",
    ],
)
def test_what_a_dashboard_for_triton_asks_for_is_there(query):
    found = {sample.split("{")[0] for sample in samples(exposition.page({"d": busy()}, gpus=GPUS, readings=READINGS).decode())}
    asked = set(re.findall(r"nv_\w+", query))
    assert asked
    assert asked <= found


def test_deployments_of_one_model_are_one_to_triton_and_no_sample_comes_twice():
    text = exposition.page({"a": busy(), "b": busy()}).decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len({line.rsplit(" ", 1)[0] for line in lines}) == len(lines)
    assert samples(text)['nv_inference_exec_count{model="m",version="2"}'] == 4
    assert "nv_gpu" not in text


def test_a_name_can_not_break_out_of_its_label():
    text = exposition.page({"d": Account('m"} 1\nevil 7\\', 1)}).decode()
    names = {family.name for family in text_string_to_metric_families(text)}
    assert "evil" not in names
    (family,) = [f for f in text_string_to_metric_families(text) if f.name == "nv_inference_count"]
    assert family.samples[0].labels["model"] == 'm"} 1\nevil 7\\'


def test_our_own_counters_say_what_became_of_each_request():
    found = samples(exposition.page({"d": busy()}).decode())

    def value(name: str, **labels: str) -> float:
        given = sorted({"deployment": "d", "model": "m", "version": "2", **labels}.items())
        told = ",".join(f'{label}="{text}"' for label, text in given)
        return found[f"{name}{{{told}}}"]

    wanted = {"edge": 2, "peer": 1, "cloud": 1, "refused": 1, "failed": 2, "cancelled": 1, "late": 1}
    assert {outcome: value("skerry_requests_total", outcome=outcome) for outcome in wanted} == wanted
    assert value("skerry_compute_seconds_total") == 0.007
    assert [value("skerry_batch_rows_bucket", le=bound) for bound in ("1.0", "2.0", "4.0", "+Inf")] == [1, 1, 2, 2]
    assert (value("skerry_batch_rows_count"), value("skerry_batch_rows_sum")) == (2, 5)
    assert (value("skerry_request_duration_seconds_count"), value("skerry_request_duration_seconds_sum")) == (4, 0.064)
    assert [value(f"skerry_{name}_total") for name in ("hedged", "retried", "shed")] == [1, 2, 1]


def test_every_metric_is_documented_with_its_type_and_labels():
    text = exposition.page({"d": busy()}, gpus=GPUS, readings=READINGS).decode()
    types = dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE"))
    emitted = {name: (kind, set()) for name, kind in types.items()}
    for sample in samples(text):
        name, labels = sample.split("{", 1)
        family = name if name in types else re.sub(r"_(bucket|sum|count)$", "", name)
        emitted[family][1].update(set(re.findall(r'(\w+)="', labels)) - {"deployment", "model", "version"})
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in METRICS_PAGE.read_text().splitlines() if line.startswith("| `")
    ]
    told = {row[0].strip("`"): (row[1], set(re.findall(r"`(\w+)`", row[2]))) for row in cells}
    assert told == emitted
