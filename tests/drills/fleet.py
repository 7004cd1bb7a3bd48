"""One box under attack: what it runs and answers, and what was signed for it."""

import asyncio
import json
import secrets
import time
from urllib.request import Request, urlopen

import msgspec

from skerry.runtime import mqtt
from skerry.runtime.settings import Broker
from skerry.wire.messages import Desired
from skerry.wire.signing import Envelope
from tests.e2e.world import World, wait_until

DEPLOYMENT = """\
name: scale
model: scale:1
place: {tier: [edge, cloud]}
resources: {memory: 256MiB}
slo: {deadline_ms: 5000}
"""
OBEYS_WITHIN_S = 30


class Target:
    """A box, and what of it an enemy must not change."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.box = world.box(name)
        wait_until(self.is_in_step, OBEYS_WITHIN_S, lambda: world.node(name))
        self.runs = self._running()
        self.answer = self.ask()

    def is_in_step(self) -> bool:
        node = self.world.node(self.name)
        return node.state == "online" and node.generation == node.reported_generation and not node.refused and len(node.replicas) == 1

    def _running(self) -> list[tuple[str, str, int, int]]:
        return [(one.name, one.sandbox, one.generation, one.restarts) for one in self.world.node(self.name).replicas]

    def ask(self) -> object:
        body = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1.0, 2.0, 3.0]}]}
        request = Request(f"{self.box.gateway_url}/v2/models/scale/infer", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=20) as answer:
            return json.loads(answer.read())["outputs"]

    def assert_untouched(self) -> None:
        """It answers as before, from the very sandbox of before, and all its programs live."""
        assert self.world.fleet.dead() == []
        assert self.ask() == self.answer
        assert self._running() == self.runs, self.world.log_tails()

    def assert_it_still_obeys(self) -> None:
        """What the coordinator wants next is done."""
        before = self.world.node(self.name).generation
        self.world.deploy(DEPLOYMENT.replace("5000", str(5000 + time.time_ns() % 1000 + 1)))
        wait_until(lambda: self.world.node(self.name).generation > before and self.is_in_step(), OBEYS_WITHIN_S, self.world.log_tails)
        assert self.ask() == self.answer


def broker_of(world: World) -> Broker:
    return Broker("127.0.0.1", world.fleet.broker_port)


def signed_documents(world: World) -> dict[str, list[bytes]]:
    """What a broker has seen for each box: three generations, the oldest first. In a new session: a broker keeps what an old one missed."""
    seen: dict[str, list[bytes]] = {}

    async def scene() -> None:
        async with mqtt.connected(broker_of(world), f"test-drill-{secrets.token_hex(4)}", last_will=None, queue=100) as client:
            await client.subscribe("skerry/v1/demo/+/desired", qos=1)
            loop = asyncio.get_running_loop()
            for number in range(2):
                text = DEPLOYMENT.replace("5000", str(6000 + time.time_ns() % 1000 * 2 + number))
                await loop.run_in_executor(None, world.deploy, text)
                until = loop.time() + OBEYS_WITHIN_S
                async for message in client.messages:
                    documents = seen.setdefault(str(message.topic).split("/")[3], [])
                    if isinstance(message.payload, bytes) and message.payload not in documents:
                        documents.append(message.payload)
                    if len(seen) == len(world.fleet.boxes) and all(len(held) >= number + 2 for held in seen.values()):
                        break
                    assert loop.time() < until

    asyncio.run(scene())
    for documents in seen.values():
        documents.sort(key=lambda payload: document_in(payload).generation)
    return seen


def document_in(payload: bytes) -> Desired:
    return msgspec.json.decode(msgspec.json.decode(payload, type=Envelope).payload, type=Desired)
