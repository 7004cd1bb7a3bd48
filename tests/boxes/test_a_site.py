"""An operator's days with a site, in order: bare machines, a first inference, upgrades good and bad, a box that was away, the end."""

import json
import time
from typing import Any

import pytest

from tests.boxes.fleet import Load, Operator, Play
from tests.boxes.machine import Machine

pytestmark = pytest.mark.timeout(900)
UNITS = ("skerry-warden", "skerry-gateway", "skerry-agent")
CHANGED_BY_BOOTING = (
    "/dev", "/proc", "/run", "/sys", "/tmp", "/var/cache", "/var/lib/private", "/var/lib/systemd", "/var/log", "/var/tmp",
    "/etc/.", "/etc/machine-id", "/root/.ansible", "/root/.cache",
    "/etc/group-", "/etc/gshadow-", "/etc/passwd-", "/etc/shadow-", "/etc/subgid-", "/etc/subuid-",
)  # fmt: skip


def went_well(play: Play) -> None:
    assert play.status == 0, play.text[-6000:]


def files(machine: Machine) -> set[str]:
    """All that lies on a box, but what any boot leaves."""
    listed = machine.run("find", "/", "-xdev", within_s=60).stdout.splitlines()
    return {path for path in listed if not path.startswith(CHANGED_BY_BOOTING)}


def pids(machine: Machine) -> list[str]:
    return [machine.show(f"{unit}.service", "MainPID") for unit in UNITS]


def versions(operator: Operator) -> dict[str, str]:
    return {view["id"]: view["version"] for view in operator.api("GET", "/v1/nodes")}


@pytest.fixture(scope="session")
def bare(operator) -> dict[str, set[str]]:
    """What lay on each box before anything was installed."""
    return {box.name: files(box) for box in operator.boxes}


def test_check_mode_tells_and_does_nothing(operator, bare):
    play = operator.play("site", "--check", version="0.1.0")
    went_well(play)
    assert play.recap["hub"]["changed"] > 0
    assert {box.name: files(box) - bare[box.name] for box in operator.boxes} == {box.name: set() for box in operator.boxes}


def test_bare_machines_become_a_fleet_that_serves(operator, bare, scale_model, record_property):
    play = operator.play("site", version="0.1.0")
    went_well(play)
    record_property("site_s", play.took_s)
    assert [view["state"] for view in operator.api("GET", "/v1/nodes")] == ["online"] * 3
    assert all(view["is_enrolled"] and view["bound"] == ["site"] for view in operator.api("GET", "/v1/nodes"))
    operator.deploy(scale_model.read_bytes())
    with Load(operator.ground, operator.boxes) as load:
        time.sleep(3)
    assert load.failed == []
    assert min(load.answered.values()) >= 20


def test_a_second_run_changes_nothing(operator):
    play = operator.play("site", version="0.1.0")
    went_well(play)
    assert {name: counts["changed"] for name, counts in play.recap.items() if counts["changed"]} == {}
    again = operator.play("site", "--check", version="0.1.0")
    went_well(again)
    assert {name: counts["changed"] for name, counts in again.recap.items() if counts["changed"]} == {}


@pytest.mark.parametrize(
    ("unit", "does"),
    [
        ("skerry-gateway", "restarts"),
        ("skerry-warden", "restarts"),
        ("skerry-agent", "restarts"),
        ("skerry-gateway", "hangs"),
    ],
)
def test_systemd_starts_again_what_ends_and_what_hangs(operator, unit, does):
    box = operator.boxes[0]
    before = box.show(f"{unit}.service", "MainPID")
    box.run("systemctl", "kill", f"--signal={'KILL' if does == 'restarts' else 'STOP'}", "--kill-whom=main", f"{unit}.service")
    operator.until(lambda: box.show(f"{unit}.service", "MainPID") not in (before, "0"), within_s=40)
    operator.until(lambda: box.show(f"{unit}.service", "ActiveState") == "active")
    with Load(operator.ground, [box]) as load:
        time.sleep(1)
    assert (load.failed, min(load.answered.values()) > 3) == ([], True)


def test_each_program_sees_what_is_its_own_and_no_more(operator):
    box = operator.boxes[0]

    def can(unit: str, *words: str) -> bool:
        """Whether a command does it in a program's place: its user, its mounts, its network."""
        pid = box.show(f"{unit}.service", "MainPID")
        enter = ["nsenter", "-t", pid, "-m", "-n", "setpriv", f"--reuid={unit}", f"--regid={unit}", "--init-groups"]
        return box.run(*enter, *words, check=False).returncode == 0

    assert can("skerry-warden", "ls", "/var/lib/skerry/warden/models")
    assert can("skerry-agent", "ip", "route", "get", operator.hub.address)
    assert not can("skerry-warden", "ip", "route", "get", operator.hub.address), "the warden has a network"
    for unit in ("skerry-agent", "skerry-gateway"):
        assert not can(unit, "ls", "/root")
        assert not can(unit, "touch", "/usr/x")
        assert not can(unit, "ls", "/var/lib/skerry/warden/models")
    assert not can("skerry-gateway", "cat", "/var/lib/skerry/agent/tls/agent.key")
    assert not can("skerry-agent", "cat", "/var/lib/skerry/gateway/gateway.key")


def test_an_engines_socket_is_out_of_sight_of_what_faces_the_network_and_comes_late_or_again(operator):
    box = operator.boxes[0]
    box.run("touch", "/run/docker.sock")
    try:
        assert box.run("nsenter", "-t", box.show("skerry-warden.service", "MainPID"), "-m", "ls", "/run/docker.sock").returncode == 0
        for unit in ("skerry-agent", "skerry-gateway"):
            there = ["nsenter", "-t", box.show(f"{unit}.service", "MainPID"), "-m", "ls", "-A"]
            assert box.run(*there, "/run/docker.sock", check=False).returncode != 0
            assert set(box.run(*there, "/run").stdout.split()) <= {"skerry", "systemd", "credentials"}
    finally:
        box.run("rm", "/run/docker.sock")


BOXED = """
name: boxed
model: scale:1
replicas: {per_node: 1}
isolation: {at_least: container}
resources: {memory: 256MiB}
slo: {deadline_ms: 5000}
"""


def containers_of(machine: Machine, deployment: str) -> list[str]:
    """Ids of the containers that are its replicas, those that ended among them."""
    words = ["docker", "ps", "--all", "--no-trunc", "--filter", "label=skerry.owner", "--format", '{{.ID}} {{.Label "skerry.name"}}']
    found = [line.split() for line in machine.run(*words).stdout.splitlines()]
    return [container for container, name in found if name.startswith(f"{deployment}-0")]


def test_a_container_engine_that_a_box_has_runs_its_sandboxes_under_the_same_units(operator):
    box = operator.boxes[2]
    box.run("systemctl", "start", "docker")
    try:
        operator.api("POST", "/v1/deployments", BOXED.encode(), media="application/yaml")

        def standing() -> dict[str, Any]:
            return operator.api("GET", "/v1/deployments/boxed")

        operator.until(lambda: standing()["ready"] == 1, within_s=90)
        (placement,) = standing()["placements"]
        assert (placement["node"], placement["rung"], placement["driver"]) == (box.name, "container", "docker")
        assert {refusal["node"] for refusal in standing()["refusals"]} == {"box-1", "box-2"}, "they have an engine that does not run"
        (running,) = containers_of(box, "boxed")
        with Load(operator.ground, [box], deployment="boxed") as load:
            time.sleep(1)
            before = box.show("skerry-warden.service", "MainPID")
            box.run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", "skerry-warden.service")
            operator.until(lambda: box.show("skerry-warden.service", "MainPID") not in (before, "0"), within_s=40)
            time.sleep(3)
        assert (load.failed, min(load.answered.values()) > 20) == ([], True)
        assert containers_of(box, "boxed") == [running], "it was adopted"
        box.run("docker", "kill", running)
        operator.until(lambda: standing()["placements"][0]["restarts"] == 1 and standing()["ready"] == 1, within_s=60)
        operator.api("DELETE", "/v1/deployments/boxed")
        operator.until(lambda: not containers_of(box, "boxed"), within_s=60)
    finally:
        box.run("systemctl", "stop", "docker.service", "docker.socket")
    with Load(operator.ground, [box]) as load:
        time.sleep(1)
    assert (load.failed, min(load.answered.values()) > 3) == ([], True)


def test_a_box_that_boots_without_a_network_serves(operator, record_property):
    box = operator.boxes[0]
    box.link("down")
    try:
        box.cut_power()
        began = time.monotonic()
        box.power_on()
        box.booted()
        program = "import urllib.request as u,sys;print(u.urlopen(u.Request('http://127.0.0.1:8000/v2/models/scale/infer',data=sys.stdin.buffer.read()),timeout=9).read())"
        body = json.dumps(
            {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}], "parameters": {"timeout": 9_000_000}}
        )
        answer = box.run("python3", "-c", program, stdin=body).stdout
        record_property("cold_boot_s", time.monotonic() - began)
        assert "[2.0,4.0,6.0]" in answer.replace(" ", "")
        assert box.show("skerry-agent.service", "ActiveState") == "active"
    finally:
        box.link("up")
    operator.until(lambda: operator.api("GET", f"/v1/nodes/{box.name}")["state"] == "online")


def test_an_upgrade_loses_no_request(operator, record_property):
    with Load(operator.ground, operator.boxes) as load:
        play = operator.play("upgrade", version="0.2.0")
    went_well(play)
    record_property("upgrade_s", play.took_s)
    assert load.failed == []
    assert min(load.answered.values()) > 100
    operator.until(lambda: versions(operator) == dict.fromkeys(("box-1", "box-2", "box-3"), "0.2.0"))
    assert "3 of 3 boxes run 0.2.0" in play.text


@pytest.mark.parametrize(("version", "why"), [("0.3.0", "does not start"), ("0.3.1", "99 of 100 were answered within")])
def test_a_bad_release_is_stopped_at_the_canary_and_taken_back(operator, version, why):
    others = {box.name: pids(box) for box in operator.boxes[1:]}
    with Load(operator.ground, operator.boxes) as load:
        play = operator.play("boxes", version=version)
    assert play.status == 2, play.text[-3000:]
    assert why in play.text
    assert "box-1: " in play.text
    assert "0.2.0 is back" in play.text
    assert load.failed == []
    operator.until(lambda: versions(operator) == dict.fromkeys(("box-1", "box-2", "box-3"), "0.2.0"))
    assert {box.name: pids(box) for box in operator.boxes[1:]} == others, "boxes of later waves are not touched"


def test_a_box_beside_one_that_fails_is_taken_back_with_its_wave(operator):
    with Load(operator.ground, operator.boxes) as load:
        play = operator.play("boxes", version="0.3.2")
    assert play.status == 2, play.text[-3000:]
    assert load.failed == []
    assert "box-2: well, but another box of its wave was not; 0.2.0 is back" in play.text, play.text[-6000:]
    operator.until(lambda: versions(operator) == {"box-1": "0.3.2", "box-2": "0.2.0", "box-3": "0.2.0"})


def test_releases_that_nothing_runs_from_are_removed_and_the_sandboxes_own_is_not(operator):
    box = operator.boxes[1]
    assert box.run("ls", "/opt/skerry").stdout.split() == ["0.1.0", "0.2.0", "0.3.2", "current", "previous", "proven"]
    assert box.run("readlink", "/opt/skerry/current", "/opt/skerry/previous").stdout.split() == ["0.2.0", "0.2.0"]
    assert box.show("skerry-housekeeping.timer", "ActiveState") == "active"
    box.run("systemctl", "start", "skerry-housekeeping.service")
    kept = box.run("ls", "/opt/skerry").stdout.split()
    assert kept == ["0.1.0", "0.2.0", "current", "previous", "proven"], "the sandbox runs from the first one still"
    with Load(operator.ground, [box]) as load:
        time.sleep(1)
    assert load.failed == []


def test_a_box_goes_back_to_what_it_ran_before(operator):
    with Load(operator.ground, operator.boxes) as load:
        play = operator.play("rollback", "--limit", "box-1")
    went_well(play)
    assert load.failed == []
    operator.until(lambda: versions(operator)["box-1"] == "0.2.0")


def test_a_box_that_is_offline_is_left_and_caught_up(operator):
    away = operator.boxes[2]
    away.link("down")
    try:
        play = operator.play("boxes", version="0.1.0")
    finally:
        away.link("up")
    went_well(play)
    assert "offline, to be caught up: box-3" in play.text
    assert "2 of 3 boxes run 0.1.0: box-1, box-2" in play.text
    operator.until(lambda: operator.api("GET", "/v1/nodes/box-3")["state"] == "online")
    operator.until(lambda: versions(operator) == {"box-1": "0.1.0", "box-2": "0.1.0", "box-3": "0.2.0"})
    went_well(operator.play("boxes", version="0.1.0"))
    operator.until(lambda: versions(operator) == dict.fromkeys(("box-1", "box-2", "box-3"), "0.1.0"))


def test_a_box_that_was_thrown_out_joins_again(operator):
    operator.api("POST", "/v1/nodes/box-2/revoke", b'{"reason": "by mistake"}')
    operator.until(lambda: operator.api("GET", "/v1/nodes/box-2")["state"] == "revoked")
    went_well(operator.play("enroll", "--limit", "box-2,hub"))
    operator.until(lambda: operator.api("GET", "/v1/nodes/box-2")["state"] == "online")


def test_uninstalling_leaves_nothing(operator, bare):
    went_well(operator.play("uninstall", "--limit", "box-2,hub"))
    box = operator.boxes[1]
    assert files(box) - bare[box.name] == set()
    assert "skerry" not in box.run("getent", "passwd").stdout + box.run("getent", "group").stdout
    assert "skerry" not in box.run("systemctl", "list-units", "--all", "--no-pager").stdout
    assert "bwrap" not in box.run("ps", "-eo", "comm").stdout
    assert operator.api("GET", "/v1/nodes/box-2")["state"] == "revoked"
