"""(a) The broker is an enemy's: it forges, replays, reorders, cuts, mixes up and bloats what boxes should do."""

import asyncio
import base64

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from skerry.runtime import mqtt
from skerry.wire import signing, topics
from skerry.wire.signing import Envelope
from tests.drills.fleet import Target, broker_of, document_in, signed_documents
from tests.e2e.world import World, wait_until


@pytest.fixture(scope="module")
def seen(world) -> dict[str, list[bytes]]:
    return signed_documents(world)


def publish(world: World, node: str, *payloads: bytes, retain: bool = False) -> None:
    """As the broker would deliver it."""

    async def scene() -> None:
        async with mqtt.connected(broker_of(world), "test-drill-lies", last_will=None, queue=10) as client:
            for payload in payloads:
                await client.publish(topics.desired("demo", node), payload, qos=1, retain=retain)

    asyncio.run(scene())


def lies(seen: dict[str, list[bytes]], node: str) -> dict[str, list[bytes]]:
    """By kind; each would be obeyed by a box that looked less closely."""
    oldest, newest = seen[node][0], seen[node][-1]
    envelope = msgspec.json.decode(newest, type=Envelope)
    emptied = msgspec.structs.replace(document_in(newest), generation=document_in(newest).generation + 1, replicas=[], routes=[])
    text = msgspec.json.encode(emptied)
    enemy = Ed25519PrivateKey.generate()
    by_enemy = signing.sign(emptied, enemy, context=signing.DESIRED_CONTEXT)
    of_enemy = msgspec.json.decode(by_enemy, type=Envelope)
    other = next(documents[-1] for name, documents in seen.items() if name != node)

    def flipped(at: int) -> bytes:
        return newest[:at] + bytes([newest[at] ^ 1]) + newest[at + 1 :]

    def rewritten(**more: object) -> bytes:
        return msgspec.json.encode(msgspec.structs.replace(envelope, **more))

    return {
        "another payload": [rewritten(payload=msgspec.Raw(text))],
        "an enemy's key": [by_enemy, msgspec.json.encode(msgspec.structs.replace(of_enemy, key_id=envelope.key_id))],
        "no signature": [
            rewritten(payload=msgspec.Raw(text), signature=""),
            rewritten(signature=base64.b64encode(bytes(64)).decode()),
            text,
        ],
        "a bit changed": [flipped(at) for at in range(0, len(newest), max(1, len(newest) // 40))],
        "an older one": [oldest, *seen[node][:-1]] * 5,
        "another box's": [other],
        "cut off": [newest[:at] for at in range(0, len(newest), max(1, len(newest) // 25))],
        "too long": [newest + b" " * 200_000, b"[" * 120_000, b'{"key_id":"' + b"a" * 120_000],
        "two in one": [newest + newest, newest.replace(b'"payload":', b'"payload":{},"payload":', 1)],
        "nothing": [b"", b"null", b"\x00" * 100, b"\xff\xfe"],
    }


KINDS = [
    "another payload",
    "an enemy's key",
    "no signature",
    "a bit changed",
    "an older one",
    "another box's",
    "cut off",
    "too long",
    "two in one",
    "nothing",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_lie_changes_nothing(world, seen, kind):
    target = Target(world, "store-1")
    publish(world, "store-1", *lies(seen, "store-1")[kind])
    publish(world, "store-1", seen["store-1"][-1])  # heard once it is through with the lies
    wait_until(target.is_in_step, 30, lambda: world.node("store-1"))
    target.assert_untouched()


def test_a_lie_that_the_broker_keeps_is_refused_with_its_reason_and_after_a_restart_of_the_box_too(world, seen):
    target = Target(world, "store-1")
    lie = lies(seen, "store-1")["an enemy's key"][0]
    publish(world, "store-1", lie, retain=True)
    wait_until(lambda: "not trusted" in world.node("store-1").refused, 30, lambda: world.node("store-1"))
    for program in ("agent", "warden"):
        world.do(world.fleet.kill(f"store-1.{program}"))
    for program in ("warden", "agent"):
        world.do(world.fleet.start_process(f"store-1.{program}"))
    wait_until(lambda: world.node("store-1").state == "online" and "not trusted" in world.node("store-1").refused, 30, world.log_tails)
    assert target.ask() == target.answer
    publish(world, "store-1", seen["store-1"][-1], retain=True)
    wait_until(target.is_in_step, 30, lambda: world.node("store-1"))
    target.assert_untouched()


def test_in_the_end_the_box_still_obeys_its_coordinator(world, seen):
    Target(world, "store-1").assert_it_still_obeys()
