"""The coordinator's page for Prometheus: the fleet as numbers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import get_args

from aiohttp import web
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from coordinator.api.access import Access
from coordinator.api.answers import Handler
from coordinator.api.calls import Call, checked
from coordinator.api.releases import spreading
from coordinator.glance import Glance
from coordinator.registry import finding
from coordinator.registry.database import Database
from skerry.wire.api import NodeState, RolloutPhase, RolloutView, StatusView
from skerry.wire.fleet import DeploymentSummary

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
QUANTILES = {"0.5": "p50_ms", "0.99": "p99_ms"}
OUTCOMES = ("edge", "peer", "cloud", "refused", "failed", "late")


CALLS = [Call("GET", "/metrics", "show_metrics", "The fleet as numbers, in Prometheus' text format", "text/plain")]


class MetricsCalls:
    """The handlers of CALLS."""

    def __init__(self, database: Database, glance: Glance, access: Access) -> None:
        self._database = database
        self._glance = glance
        self._access = access

    def handler(self, call: Call) -> Handler:
        """The call's method, behind the check of who calls."""
        return checked(self._access, call, getattr(self, call.handler))

    async def show_metrics(self, _: web.Request) -> web.Response:
        """See CALLS."""
        status, fleet = await self._glance.status(), await self._glance.fleet(minutes=1)
        states, versions, rollouts = await self._database.read(
            lambda tables: (finding.count_by_state(tables), finding.count_by_version(tables), spreading(tables))
        )
        return web.Response(body=page(status, states, versions, fleet.deployments, rollouts), headers={"Content-Type": CONTENT_TYPE})


class _Collected(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def page(
    status: StatusView,
    states: Mapping[NodeState, int],
    versions: Mapping[str, int],
    deployments: Sequence[DeploymentSummary],
    rollouts: Sequence[RolloutView],
) -> bytes:
    """In Prometheus' text format, CONTENT_TYPE."""
    return generate_latest(_Collected([*_of_fleet(status, states, versions), *_of_deployments(deployments), *_of_rollouts(rollouts)]))


def _of_fleet(status: StatusView, states: Mapping[NodeState, int], versions: Mapping[str, int]) -> Iterator[Metric]:
    boxes = GaugeMetricFamily("skerry_boxes", "Boxes, by state.", labels=["state"])
    for state in get_args(NodeState):
        boxes.add_metric([state], states.get(state, 0))
    running = GaugeMetricFamily("skerry_boxes_by_version", "Boxes, by the release that they run.", labels=["version"])
    for version, count in sorted(versions.items()):
        running.add_metric([version], count)
    connected = GaugeMetricFamily(
        "skerry_broker_connected", "Whether the coordinator has its broker.", value=float(status.broker_connected)
    )
    missing = GaugeMetricFamily("skerry_missing", "Numbers that boxes gave out and that may still come.", labels=["stream"])
    lost = CounterMetricFamily("skerry_lost", "Numbers that boxes gave out and that never will.", labels=["stream"])
    for stream in ("events", "samples"):
        missing.add_metric([stream], getattr(status, f"{stream}_missing"))
        lost.add_metric([stream], getattr(status, f"{stream}_lost"))
    refused = CounterMetricFamily("skerry_refused", "Messages that were refused since the coordinator started.", labels=["reason"])
    for reason, count in sorted(status.refused.items()):
        refused.add_metric([reason], count)
    yield from (boxes, running, connected, missing, lost, refused)


def _of_deployments(deployments: Sequence[DeploymentSummary]) -> Iterator[Metric]:
    names = ["deployment"]
    wanted = GaugeMetricFamily("skerry_replicas_wanted", "Replicas that a deployment asks for.", labels=names)
    ready = GaugeMetricFamily("skerry_replicas_ready", "Those of them that run what is wanted.", labels=names)
    problem = GaugeMetricFamily("skerry_deployment_problem", "Whether the planner found no place for all of it.", labels=names)
    rate = GaugeMetricFamily("skerry_answers_per_second", "Answers over the last seconds, over all boxes.", labels=names)
    lately = GaugeMetricFamily("skerry_answers_lately", "Requests of the last seconds, by what became of them.", labels=[*names, "outcome"])
    latency = GaugeMetricFamily("skerry_answer_seconds", "How long answers took over the last seconds.", labels=[*names, "quantile"])
    deadline = GaugeMetricFamily("skerry_deadline_seconds", "Within which a deployment's answers are wanted.", labels=names)
    for view in deployments:
        wanted.add_metric([view.name], view.wanted)
        ready.add_metric([view.name], view.ready)
        problem.add_metric([view.name], float(bool(view.problem)))
        rate.add_metric([view.name], view.serve.per_second)
        deadline.add_metric([view.name], view.deadline_ms / 1000)
        for outcome in OUTCOMES:
            lately.add_metric([view.name, outcome], getattr(view.serve, outcome))
        for quantile, field in QUANTILES.items():
            latency.add_metric([view.name, quantile], getattr(view.serve, field) / 1000)
    yield from (wanted, ready, problem, rate, lately, latency, deadline)


def _of_rollouts(rollouts: Sequence[RolloutView]) -> Iterator[Metric]:
    phases = GaugeMetricFamily("skerry_rollout", "1 for the phase that a change is in.", labels=["change", "phase"])
    units = GaugeMetricFamily("skerry_rollout_ready", "Boxes or replicas that have a change and are ready.", labels=["change"])
    total = GaugeMetricFamily("skerry_rollout_total", "Those that it is for.", labels=["change"])
    for view in rollouts:
        for phase in get_args(RolloutPhase):
            phases.add_metric([view.deployment, phase], float(view.phase == phase))
        units.add_metric([view.deployment], view.ready)
        total.add_metric([view.deployment], view.total)
    yield from (phases, units, total)
