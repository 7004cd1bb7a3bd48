"""What dashboards and alerts ask for is what the programs tell."""

import json
import re
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

from coordinator.api import exposition
from skerry.wire.api import DeploymentView, RolloutView, ServeView, StatusView

MONITORING = Path(__file__).parents[2] / "docs" / "monitoring"
NAME = re.compile(r"\bskerry_[a-z_]+")


def told() -> dict[str, set[str]]:
    """Every metric of the coordinator's page, with its labels."""
    serve = ServeView(10.0, per_second=2.0, p50_ms=5.0, p99_ms=9.0, edge=18, late=1, refused=2)
    deployment = DeploymentView(
        name="d", generation=1, model="m:1", ready=1, wanted=2, placements=[], refusals=[], problem="no room", deadline_ms=50, target=0.9,
        split="overflow", text="", created_at_ms=1, changed_at_ms=1, serve=serve,
    )  # fmt: skip
    rollout = RolloutView(
        deployment="d", phase="rolling", is_paused=False, generation=2, model="m:2", before_generation=1, before_model="m:1", unit="box",
        total=4, targets=[1, 4], admitted=1, ready=1, away=0, wave=1, wave_units=["a"], began_ms=1, wave_since_ms=1, ready_since_ms=0,
        observe_ms=1, changed_at_ms=1,
    )  # fmt: skip
    status = StatusView("f", "1", broker_connected=True, nodes_online=1, nodes=2, deployments=1, deployments_ready=0, events=5,
                        events_missing=1, events_lost=2, samples_missing=3, samples_lost=4, refused={"ack.malformed": 3})  # fmt: skip
    page = exposition.page(status, {"online": 1, "lost": 1}, {"0.2.0": 2}, [deployment], [rollout]).decode()
    families = {family.name: family for family in text_string_to_metric_families(page)}
    assert {sample.labels["state"]: sample.value for sample in families["skerry_boxes"].samples}["lost"] == 1
    assert {s.labels["quantile"]: s.value for s in families["skerry_answer_seconds"].samples} == {"0.5": 0.005, "0.99": 0.009}
    assert [s.labels["phase"] for s in families["skerry_rollout"].samples if s.value] == ["rolling"]
    return {sample.name: set(sample.labels) for family in families.values() for sample in family.samples}


def asked(text: str) -> set[str]:
    return set(NAME.findall(text))


def test_dashboard_and_alerts_ask_for_what_there_is():
    known = told()
    dashboard = json.loads((MONITORING / "fleet-dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [variable["query"]["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    alerts = yaml.safe_load((MONITORING / "alerts.yml").read_text())
    rules = [rule for group in alerts["groups"] for rule in group["rules"]]
    expressions += [rule["expr"] for rule in rules]
    for expression in expressions:
        names = asked(expression)
        assert names, expression
        assert names <= known.keys(), expression
        for name, matcher in re.findall(r"(skerry_[a-z_]+)\{([^}]*)\}", expression):
            assert set(re.findall(r"([a-z_]+)(?:=|!)", matcher)) <= known[name], expression
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for rule in rules:
        assert set(rule) >= {"alert", "expr", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("page", "ticket")
    assert {rule["alert"] for rule in rules} >= {"SkerryBrokerGone", "SkerryBoxesLost", "SkerryDeadlineMissed", "SkerryRolloutTakenBack"}


def test_every_metric_of_the_coordinator_is_documented_with_its_labels():
    page = (MONITORING / "README.md").read_text().partition("## What the coordinator tells")[2]
    rows = re.findall(r"(?m)^\| `(skerry_\w+)` \| (?:gauge|counter) \|([^|]*)\|", page)
    listed = {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}
    assert listed == told()
