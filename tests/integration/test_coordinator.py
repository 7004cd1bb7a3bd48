"""A real coordinator process on a real broker, spoken to by boxes in an enemy's hands and by careless clients."""

import asyncio
import json
import socket
import time
import urllib.request
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import msgspec
import pytest

from skerry.cli.client import CliError
from skerry.runtime import mqtt
from skerry.runtime.settings import Broker
from skerry.wire import codec, topics
from skerry.wire.api import EventView, ModelView
from skerry.wire.messages import (
    Batching,
    Birth,
    CloudBudget,
    Event,
    EventBatch,
    MetricsBatch,
    Presence,
    Reported,
    Sample,
    ServeSample,
    StateTensor,
)
from tests.e2e.world import World, running, wait_until


@pytest.fixture(scope="module")
def world(scale_model):
    with running(wait=False) as world:
        for name in world.fleet.names():
            if "." in name:
                world.do(world.fleet.kill(name))  # the coordinator and the broker alone are wanted
        world.push(scale_model, "m")
        yield world


def say(world: World, node: str, *messages: tuple[str, bytes]) -> None:
    """Publish as a box would, byte for byte."""

    async def scene() -> None:
        async with mqtt.connected(Broker("127.0.0.1", world.fleet.broker_port), f"test-{node}", last_will=None, queue=10) as client:
            for branch, payload in messages:
                await client.publish(topics.up("demo", node, branch), payload, qos=1)

    asyncio.run(scene())


def birth(**more) -> bytes:
    box = Birth("edge", {}, "http://127.0.0.1:9", "b", 1, "v", 4, 64 * 2**30, rungs=["process"], outbox_epoch="e")
    return codec.encode(msgspec.structs.replace(box, **more))


def is_alive(world: World) -> bool:
    return world.fleet.dead() == [] or "coordinator" not in world.fleet.dead()


def assert_it_goes_on(world: World, node: str) -> None:
    """It takes what comes next, and still does after a restart."""
    say(
        world,
        node,
        ("events", codec.encode(EventBatch([Event("ep", time.time_ns() // 10**6, time.time_ns() // 10**6, "test.mark", node)]))),
    )
    wait_until(lambda: any(e.kind == "test.mark" for e in world.events(node=node)), 10, world.log_tails)
    world.do(world.fleet.kill("coordinator"))
    world.do(world.fleet.start_process("coordinator"))

    def answers() -> bool:
        try:
            return world.status().broker_connected
        except Exception:  # noqa: BLE001 - it is coming up
            return False

    wait_until(answers, 15, world.log_tails)
    assert world.nodes() is not None


def test_a_report_that_grows_when_it_is_written_out_is_dropped_and_harms_nobody(world):
    short = [{"name": f"r{i}", "deployment": "d", "generation": 1, "phase": "ready"} for i in range(1900)]
    payload = msgspec.json.encode({"generation": 1, "replicas": short})
    assert len(payload) < codec.MAX_MESSAGE_BYTES
    assert len(codec.encode(codec.decode(payload, Reported))) > codec.MAX_MESSAGE_BYTES
    say(world, "evil-1", ("birth", birth()), ("presence", codec.encode(Presence(True, "b", 1))), ("reported", payload))
    assert_it_goes_on(world, "evil-1")


def test_numbers_that_add_up_to_more_than_sqlite_holds_stop_at_what_it_holds(world):
    now_ms = time.time_ns() // 10**6
    samples = [Sample("s", i, now_ms, 0.1, 2**53, serve=[ServeSample("d", edge=2**53) for _ in range(500)]) for i in range(1, 4)]
    say(world, "evil-2", ("birth", birth()), *(("metrics", codec.encode(MetricsBatch([sample]))) for sample in samples))
    time.sleep(3)
    assert_it_goes_on(world, "evil-2")


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b'{"events":[{"epoch":"e","seq":9999999999999999999999,"at_ms":1,"kind":"k"}]}',
        b'{"events":[{"epoch":"e","seq":-1,"at_ms":1,"kind":"k"}]}',
        b'{"events":[{"epoch":"e","seq":1,"at_ms":9007199254740992,"kind":"k"}]}',
        b'{"events":[{"epoch":"coordinator","seq":1,"at_ms":1,"kind":"node.online"}]}',
        b"[" * 50_000,
    ],
)
def test_events_that_are_none_are_dropped(world, payload):
    before = len(world.events(node="evil-3"))
    say(world, "evil-3", ("events", payload), ("birth", payload), ("metrics", payload), ("presence", payload), ("reported", payload))
    good = codec.encode(EventBatch([Event("ok", int(time.time() * 1000), 1, "test.good")]))
    say(world, "evil-3", ("events", good))
    wait_until(lambda: len(world.events(node="evil-3")) == before + 1, 10, world.log_tails)
    assert is_alive(world)


def test_more_replicas_than_fit_into_one_document_are_a_problem_that_is_said_not_a_crash(world):
    say(world, "big-1", ("birth", birth(tier="cloud", memory_bytes=2**40)), ("presence", codec.encode(Presence(True, "b", 1))))
    for index in range(4):
        world.deploy(
            f"name: many-{index}\nmodel: m:1\nreplicas: {{per_node: 256}}\nplace: {{tier: [cloud]}}\nresources: {{memory: 64MiB}}\n"
        )
    wait_until(
        lambda: any("can't be told" in world.deployment(f"many-{i}").problem for i in range(4)),
        15,
        lambda: world.deployment("many-3").problem,
    )
    for index in range(4):
        world.api.call("DELETE", f"/v1/deployments/many-{index}", msgspec.Raw)
    assert_it_goes_on(world, "big-1")


def test_a_deployment_that_comes_in_pieces_is_taken_whole(world):
    text = "name: pieces\nmodel: m:1\nplace: {tier: [cloud], labels: {a: b}}\n"
    host, port = world.fleet.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = (
            f"POST /v1/deployments HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {world.fleet.token}\r\nContent-Length: {len(text)}\r\n\r\n"
        )
        connection.sendall(head.encode() + text[:25].encode())
        time.sleep(0.5)
        connection.sendall(text[25:].encode())
        assert b" 202 " in connection.recv(4096)
    assert world.deployment("pieces").text == text


def test_strangers_with_odd_credentials_are_turned_away_by_the_one_error_shape(world):
    for headers in ({"Authorization": "Bearer \xff"}, {"Cookie": "skerry_session=\xff.x"}, {"Authorization": "Bearer"}, {}):
        with pytest.raises(HTTPError) as refused:
            urlopen(Request(f"{world.fleet.url}/v1/nodes", headers=headers), timeout=10)
        with refused.value:
            assert refused.value.code == 401
            assert json.loads(refused.value.read())["error"]["code"] == "not_logged_in"


def test_paths_that_climb_find_nothing(world):
    for path in ("/v1/artifacts/..%2f..%2foperator.token", "/v1/artifacts/" + "a" * 64, "/static/..%2f..%2fpages.py", "/v1/nodes/..%2f"):
        with pytest.raises(HTTPError) as refused:
            urlopen(Request(f"{world.fleet.url}{path}", headers={"Authorization": f"Bearer {world.fleet.token}"}), timeout=10)
        with refused.value:
            assert refused.value.code == 404
    assert world.api.call("GET", "/v1/events", list[EventView]) is not None


def test_why_a_box_lacks_a_sandbox_is_told_to_whoever_asks_for_it(world):
    absent = {"gvisor": "the engine has no runtime runsc"}
    box = birth(labels={"only": "this"}, rungs_absent=absent)
    say(world, "plain-1", ("birth", box), ("presence", codec.encode(Presence(True, "b", 1))))
    world.deploy("name: strict\nmodel: m:1\nplace: {labels: {only: this}}\nisolation: {at_least: gvisor}\n")

    def refusals() -> dict[str, str]:
        return {refusal.node: refusal.reason for refusal in world.deployment("strict").refusals}

    wait_until(lambda: "plain-1" in refusals(), 15, world.log_tails)
    assert refusals()["plain-1"].endswith("gvisor is not available on this box: the engine has no runtime runsc")
    (view,) = [node for node in world.nodes() if node.id == "plain-1"]
    assert view.rungs_absent == absent
    request = urllib.request.Request(f"{world.fleet.url}/nodes/plain-1", headers={"Authorization": f"Bearer {world.fleet.token}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert "the engine has no runtime runsc" in answer.read().decode()
    world.api.call("DELETE", "/v1/deployments/strict", msgspec.Raw)


def test_what_a_model_remembers_is_kept_with_it_and_names_that_it_lacks_are_refused(world, scale_model):
    def push(state: str, version: int = 1):
        return world.cli("model", "push", str(scale_model), "--name", "keeps", "--version", str(version), "--state", state, "--json")

    for state, words in (
        ('[{"input": "h", "output": "y"}]', "state: 'h' is not an input of the model: it has 'x'"),
        ('[{"input": "x", "output": "hN"}]', "state: 'hN' is not an output of the model: it has 'y'"),
    ):
        done = push(state)
        assert (done.returncode, words in done.stderr.decode()) == (4, True), done.stderr
    assert push('[{"input": "x"}]').returncode == 2
    assert not [model for model in world.api.call("GET", "/v1/models", list[ModelView]) if model.name == "keeps"]
    done = push('[{"input": "x", "output": "y"}]')
    assert done.returncode == 0, done.stderr
    (kept,) = [model for model in world.api.call("GET", "/v1/models", list[ModelView]) if model.name == "keeps"]
    assert kept.state == [StateTensor("x", "y")]
    with pytest.raises(CliError, match=r"\$\[0\]"):
        world.api.call("PUT", "/v1/models/keeps/versions/2", msgspec.Raw, query={"state": "[7]"}, body=scale_model.read_bytes())


def test_batches_and_budget_reach_the_api_and_the_console(world):
    world.deploy("name: shared\nmodel: m:1\nbatching: {max_batch: 8, max_wait: 2.5ms}\nsplit: {cloud_budget: {bytes_per_hour: 5GiB}}\n")
    view = world.deployment("shared")
    assert (view.batching, view.cloud_budget) == (Batching(8, 2500), CloudBudget(None, 5 * 2**30))
    request = urllib.request.Request(f"{world.fleet.url}/deployments/shared", headers={"Authorization": f"Bearer {world.fleet.token}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        page = answer.read().decode()
    assert "Up to 8 rows share a run and wait 2.5 ms for company at most." in page
    assert "In an hour each box sends the cloud at most 5\u202fGiB." in page
    shown = world.cli("deployment", "show", "shared").stdout.decode()
    assert "up to 8 rows share a run, waiting for company 2.5 ms at most" in shown
    assert "each box sends 5 GiB an hour to the cloud at most" in shown


def test_explain_shows_what_boxes_noted_of_requests_apart_from_all_else(world):
    world.deploy("name: noted\nmodel: m:1\nplace: {labels: {only: nowhere}}\n")
    now_ms = time.time_ns() // 10**6
    for node in ("teller-1", "teller-2"):
        noted = [Event("ep", seq, now_ms, "request.routed", "noted", f"{node}: here, {seq} ms of 50 ms") for seq in range(1, 31)]
        noted.append(Event("ep", 31, now_ms, "request.routed", "noted-too", "of another deployment"))
        say(world, node, ("events", codec.encode(EventBatch(noted))))
    wait_until(lambda: len(world.events(kind="request.routed")) == 62, 10, world.log_tails)
    assert not world.events(kind="request.routed", except_kind="request.routed")
    assert {event.kind for event in world.events(subject="noted", except_kind="request.routed")} == {"deployment.accepted"}
    told = json.loads(world.cli("explain", "noted", "--json").stdout)
    assert [event["kind"] for event in told["events"]] == ["deployment.accepted"], "not crowded out"
    assert [event["subject"] for event in told["routed"]] == ["noted"] * 20
    shown = world.cli("explain", "noted", "--node", "teller-1").stdout.decode()
    assert "teller-1: here, 30 ms of 50 ms" in shown
    assert "teller-2" not in shown
    assert "of another deployment" not in shown
    assert world.cli("events", "--kind", "deployment.accepted", "--subject", "noted").stdout.count(b"deployment.accepted") == 1
    assert world.cli("explain", "nobody").returncode == 5


def test_prometheus_gets_the_fleet_as_numbers_and_a_stranger_none(world):
    address = f"{world.fleet.url}/metrics"
    with urlopen(Request(address, headers={"Authorization": f"Bearer {world.fleet.token}"}), timeout=10) as answer:
        text = answer.read().decode()
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert "skerry_broker_connected 1.0" in text
    assert 'skerry_boxes{state="online"}' in text
    with pytest.raises(HTTPError) as refused:
        urlopen(address, timeout=10)
    with refused.value:
        assert refused.value.code == 401
