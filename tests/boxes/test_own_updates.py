"""Boxes that change their own programs to a release that the coordinator sends, without anybody's ssh."""

import time
from typing import Any

import pytest

from tests.boxes.fleet import Load, Operator
from tests.boxes.machine import Machine
from tests.boxes.test_a_site import UNITS, pids, went_well

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def boxes(operator: Operator, scale_model) -> list[Machine]:
    """Those that serve, all of one release."""
    if not (operator.hub.root / "etc/skerry/coordinator.toml").exists():
        went_well(operator.play("site", version="0.1.0"))
        operator.deploy(scale_model.read_bytes())
    online = {view["id"] for view in operator.api("GET", "/v1/nodes") if view["state"] == "online"}
    return [box for box in operator.boxes if box.name in online]


def over(operator: Operator, within_s: float = 240) -> dict[str, Any]:
    """How it ended."""
    operator.until(lambda: operator.software()["rollout"]["phase"] not in ("rolling", "waiting"), within_s=within_s)
    return operator.software()["rollout"]


def all_run(operator: Operator, boxes: list[Machine], version: str) -> None:
    operator.until(lambda: operator.software()["versions"].get(version, 0) >= len(boxes), within_s=120)
    for box in boxes:
        operator.until(lambda box=box: box.run("readlink", "/opt/skerry/current", "/opt/skerry/proven").stdout.split() == [version] * 2)


def phase(operator: Operator, box: Machine) -> str:
    return str(operator.api("GET", f"/v1/nodes/{box.name}")["software"]["phase"])


def test_boxes_bring_themselves_to_a_release_and_lose_no_request(operator, boxes, record_property):
    gateways = [box.show("skerry-gateway.service", "MainPID") for box in boxes]
    operator.push("0.4.0")
    began = time.monotonic()
    with Load(operator.ground, boxes) as load:
        operator.roll_out("0.4.0", observe="10s")
        ended = over(operator)
        record_property("own_update_s", time.monotonic() - began)
    assert (ended["phase"], ended["ready"], ended["reason"]) == ("done", len(boxes), "")
    assert load.failed == []
    assert min(load.answered.values()) > 100
    all_run(operator, boxes, "0.4.0")
    assert [box.show("skerry-gateway.service", "MainPID") for box in boxes] == gateways, "the data plane's code is the same"
    kinds = [event["kind"] for event in operator.api("GET", "/v1/events?subject=0.4.0&limit=50") if event["node"] == boxes[0].name]
    assert kinds == ["software.done", "software.trial", "software.preparing"]


def test_a_release_that_does_not_stay_up_is_taken_back_by_the_box_itself_and_goes_no_further(operator, boxes):
    operator.push("0.3.3")
    before = {box.name: pids(box) for box in boxes}
    with Load(operator.ground, boxes) as load:
        operator.roll_out("0.3.3", observe="10s")
        ended = over(operator)
    assert ended["phase"] == "failed"
    assert "skerry-warden ended 3 times" in ended["reason"]
    assert load.failed == []
    all_run(operator, boxes, "0.4.0")
    touched = [box for box in boxes if pids(box) != before[box.name]]
    assert len(touched) == 1, "the others never heard of it"
    assert [touched[0].show(f"{unit}.service", "ActiveState") for unit in UNITS] == ["active"] * 3
    with pytest.raises(AssertionError, match=r"0\.3\.3 was taken back"):
        operator.roll_out("0.3.3", observe="10s")


def test_a_release_that_answers_slowly_is_good_to_the_box_and_not_to_the_coordinator(operator, boxes):
    operator.push("0.3.1")
    with Load(operator.ground, boxes) as load:
        time.sleep(20)  # so that it is known how long answers take
        operator.roll_out("0.3.1", observe="25s")
        ended = over(operator)
        operator.until(lambda: operator.software()["versions"].get("0.4.0", 0) >= len(boxes), within_s=120)
    assert ended["phase"] == "failed"
    assert "answers were slow" in ended["reason"]
    assert ended["admitted"] == 1
    assert load.failed == []
    all_run(operator, boxes, "0.4.0")


def test_power_that_is_cut_in_the_middle_of_a_trial_leaves_a_box_that_serves_and_goes_on(operator, boxes):
    operator.push("0.2.0")
    operator.roll_out("0.2.0", observe="5s")
    in_trial: list[Machine] = []
    operator.until(lambda: bool(in_trial or in_trial.extend(box for box in boxes if phase(operator, box) == "trial") or in_trial), 120)
    canary = in_trial[0]  # asked for once: a trial takes some seconds, and each question one
    canary.cut_power()
    canary.power_on()
    canary.booted()
    with Load(operator.ground, boxes) as load:
        assert over(operator)["phase"] == "done"
    assert load.failed == []
    all_run(operator, boxes, "0.2.0")
    kinds = [event["kind"] for event in operator.api("GET", "/v1/events?subject=0.2.0&limit=50") if event["node"] == canary.name]
    assert kinds[:2] == ["software.done", "software.resumed"]


def test_a_release_that_nobody_signed_is_not_rolled_out(operator, boxes):
    path = operator.releases / "skerry-0.3.0.tar"
    operator.api("PUT", "/v1/releases", path.read_bytes(), media="application/octet-stream")
    with pytest.raises(AssertionError, match="is not signed, and boxes take no other"):
        operator.roll_out("0.3.0", observe="5s")
