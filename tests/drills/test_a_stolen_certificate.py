"""(e) Somebody has a box's certificate, key and token, and uses them from elsewhere against its neighbour and the coordinator."""

import asyncio
import contextlib
import shutil
import time
from collections.abc import Iterator

import aiomqtt
import pytest
from cryptography import x509

from skerry.demo.broker import find_mosquitto
from skerry.runtime import keys, mqtt
from skerry.runtime.settings import Broker
from skerry.wire import codec, topics
from skerry.wire.messages import Event, EventBatch, Presence
from tests.conftest import need
from tests.e2e.world import wait_until
from tests.integration.test_enrolment import FLEET, UP, Box, Fleet, joined, revoked_list_is_read

WATCHES_S = 4.0


@pytest.fixture(scope="module")
def reef(tmp_path_factory) -> Iterator[tuple[Fleet, Box, Box]]:
    """A fleet with the box whose keys were stolen, and another one."""
    need("mosquitto", "" if find_mosquitto() else "not installed")
    fleet = Fleet(tmp_path_factory.mktemp("reef"))
    try:
        fleet.start_coordinator()
        fleet.start_broker()
        yield fleet, joined(fleet, "robbed"), joined(fleet, "neighbour")
    finally:
        fleet.stop()
        shutil.rmtree(fleet.folder, ignore_errors=True)


def broker_as(fleet: Fleet, box: Box) -> Broker:
    folder = box.folder / "id"
    return Broker("127.0.0.1", fleet.broker_port, ca_file=f"{folder}/ca.crt", cert_file=f"{folder}/box.crt", key_file=f"{folder}/box.key")


@pytest.fixture
def thief(reef) -> Iterator[Broker]:
    """The robbed box itself is off meanwhile: two of one name would throw each other off."""
    fleet, robbed, _ = reef
    fleet.programs["robbed"].end()
    yield broker_as(fleet, robbed)
    robbed.start()
    wait_until(lambda: fleet.state_of("robbed") == "online", 30, lambda: robbed.log)


def test_nothing_is_believed_that_it_says_under_another_name(reef, thief):
    fleet, _, _ = reef
    before = fleet.ask("GET", "/v1/nodes/neighbour")[1]
    lie = codec.encode(EventBatch([Event("evil", time.time_ns() // 10**6, time.time_ns() // 10**6, "test.evil", "neighbour")]))
    words = {"presence": codec.encode(Presence(False, "evil", 99)), "events": lie}

    async def scene() -> None:
        async with mqtt.connected(thief, "anything", last_will=None, queue=10) as client:
            for branch in UP:
                with contextlib.suppress(aiomqtt.MqttError):
                    await client.publish(topics.up(FLEET, "neighbour", branch), words.get(branch, b"{}"), qos=1)
            with contextlib.suppress(aiomqtt.MqttError):
                await client.publish(topics.desired(FLEET, "neighbour"), b"{}", qos=1, retain=True)
            await client.publish(topics.up(FLEET, "robbed", "events"), lie.replace(b"test.evil", b"test.mark"), qos=1)

    asyncio.run(scene())
    wait_until(lambda: any(event["kind"] == "test.mark" for event in fleet.ask("GET", "/v1/events?node=robbed")[1]), 15)
    kinds = [event["kind"] for event in fleet.ask("GET", "/v1/events?node=neighbour")[1]]
    after = fleet.ask("GET", "/v1/nodes/neighbour")[1]
    assert "test.evil" not in kinds
    assert "node.duplicate" not in kinds
    assert (after["state"], after["changed_at_ms"], after["refused"]) == ("online", before["changed_at_ms"], "")


def test_it_hears_nothing_that_is_not_for_the_robbed_box(reef, thief):
    fleet, _, neighbour = reef
    heard: list[str] = []

    async def scene() -> None:
        async with mqtt.connected(thief, "anything", last_will=None, queue=1000) as client:
            for pattern in ("#", "skerry/v1/+/+/#", f"skerry/v1/{FLEET}/neighbour/#", f"skerry/v1/{FLEET}/+/desired", "$SYS/#"):
                with contextlib.suppress(aiomqtt.MqttError):
                    await client.subscribe(pattern, qos=1)
            await asyncio.to_thread(fleet.programs["neighbour"].end)
            neighbour.start()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCHES_S):
                    async for message in client.messages:
                        heard.append(str(message.topic))  # noqa: PERF401 - what came before the time is over counts

    asyncio.run(scene())
    wait_until(lambda: fleet.state_of("neighbour") == "online", 30, lambda: neighbour.log)
    assert {topic.split("/")[3] for topic in heard} <= {"robbed"}, heard
    assert {topic.split("/")[4] for topic in heard} <= {"desired", "command"}, heard


def test_the_coordinator_gives_it_no_other_name_and_no_other_call(reef):
    fleet, robbed, neighbour = reef
    key, token = keys.load(robbed.folder / "id" / "box.key"), (robbed.folder / "id" / "token").read_text().strip()
    for certificate in (robbed, neighbour):
        asked = {
            "certificate": (certificate.folder / "id" / "box.crt").read_text(),
            "csr": keys.signing_request(key, "neighbour"),
        }
        status, answer = fleet.ask("POST", "/v1/renew", asked, role=None)
        if status == 200:
            assert "CN=robbed" in _subject(answer["certificate"]), "a name is the certificate's, whatever the request says"
        else:
            assert status in (403, 422)
    for method, path in (("GET", "/v1/nodes"), ("GET", "/v1/audit"), ("POST", "/v1/claims"), ("POST", "/v1/nodes/neighbour/revoke"),
                         ("POST", "/v1/login-links"), ("POST", "/v1/tokens"), ("GET", "/v1/nodes/neighbour/replicas/x/logs")):  # fmt: skip
        assert fleet.ask(method, path, {} if method == "POST" else None, role=None, token=token)[0] == 403, path


def _subject(pem: str) -> str:
    return x509.load_pem_x509_certificates(pem.encode())[0].subject.rfc4514_string()


def test_in_the_end_an_operator_ends_it(reef):
    fleet, robbed, neighbour = reef
    assert fleet.ask("POST", "/v1/nodes/robbed/revoke", {"reason": "stolen"})[0] == 204
    revoked_list_is_read(fleet)
    fleet.programs["robbed"].end()

    async def scene() -> None:
        async with mqtt.connected(broker_as(fleet, robbed), "anything", last_will=None, queue=10) as client:
            await client.subscribe(topics.desired(FLEET, "robbed"), qos=1)

    with pytest.raises(aiomqtt.MqttError):
        asyncio.run(scene())
    token = (robbed.folder / "id" / "token").read_text().strip()
    assert fleet.ask("GET", f"/v1/artifacts/{'0' * 64}", role=None, token=token)[0] == 401
    assert fleet.state_of("neighbour") == "online", neighbour.log
