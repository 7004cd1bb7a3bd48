"""Ten thousand malformed messages to each program while it serves: service goes on, memory stays flat, each is refused and counted."""

import asyncio
import concurrent.futures
import contextlib
import json
import random
import re
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from skerry.runtime import mqtt
from skerry.runtime.refusals import EVERY_S
from tests.drills.fleet import DEPLOYMENT, Target, broker_of
from tests.e2e.world import World, running, wait_until

MANY = 10_000
MOST_GROWTH_BYTES = 6 * 2**20
"""What an allocator keeps of ten thousand messages; a program that kept the messages themselves, of two kilobytes, would keep more."""
MOST_SLOWEST_S = 5.0


@pytest.fixture(scope="module")
def world(scale_model) -> Iterator[World]:
    with running() as world:
        world.push(scale_model, "scale")
        world.deploy(DEPLOYMENT)
        world.wait_ready("scale")
        yield world


class Callers:
    """Asks the box over and over; no answer may fail."""

    def __init__(self, target: Target) -> None:
        self._target, self._stop = target, threading.Event()
        self.answered, self.slowest_s, self.wrong = 0, 0.0, ""
        self._thread = threading.Thread(target=self._run, name="callers")

    def _run(self) -> None:
        while not self._stop.is_set() and not self.wrong:
            started = time.monotonic()
            try:
                answer = self._target.ask()
            except OSError as exc:
                self.wrong = repr(exc)
                return
            if answer != self._target.answer:
                self.wrong = repr(answer)
            self.answered += 1
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)
            time.sleep(0.02)

    def __enter__(self) -> "Callers":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def rss(world: World, name: str) -> int:
    return psutil.Process(world.fleet.pid(name)).memory_info().rss


def counted(world: World, name: str, reasons: set[str]) -> int:
    """The sum of the last counts that the program's log has of these reasons."""
    lines = (world.fleet.logs / f"{name}.log").read_text(errors="replace").splitlines()
    last = {said["event"]: said["count"] for said in map(json.loads, lines) if "count" in said and said["event"] in reasons}
    return sum(last.values())


def nonsense(number: int) -> bytes:
    """A different one each time, and never what it should be: cut JSON, other types, other fields, bytes, something long."""
    source = random.Random(number)
    return source.choice(
        [
            lambda: source.randbytes(source.randint(0, 6000)),
            lambda: b'{"events":[{"epoch":"e","seq":' + str(source.randint(1, 10**30)).encode(),
            lambda: b'{"generation":"x","replicas":%d}' % number,
            lambda: b"[" * source.randint(1, 900),
            lambda: b'{"key_id":"' + bytes(str(number), "ascii") + b'","signature":"AAAA","payload":{"fleet":"demo"}}',
            lambda: b'{"a":"' + b"x" * source.randint(0, 6000),
        ]
    )()


def assert_held(world: World, target: Target, name: str, before: int, callers: Callers, reasons: set[str], many: int = MANY) -> None:
    assert callers.wrong == ""
    assert callers.answered > 10
    assert callers.slowest_s < MOST_SLOWEST_S
    wait_until(lambda: counted(world, name, reasons) >= many, EVERY_S + 15, lambda: counted(world, name, reasons))
    assert rss(world, name) - before < MOST_GROWTH_BYTES
    assert world.fleet.dead() == []
    wait_until(target.is_in_step, 20, world.log_tails)


def publish(world: World, topics: list[str], many: int) -> None:
    async def sending() -> None:
        async with mqtt.connected(broker_of(world), f"test-flood-{secrets.token_hex(4)}", last_will=None, queue=10) as client:
            for number in range(many):
                await client.publish(topics[number % len(topics)], nonsense(number), qos=1)

    asyncio.run(sending())


def warm_up(world: World, topics: list[str]) -> None:
    """What a first few hundred leave behind is not counted: buffers, compiled decoders, log handlers."""
    publish(world, topics, 500)
    time.sleep(1)


def test_the_coordinator_by_mqtt(world):
    target = Target(world, "store-1")
    topics = [f"skerry/v1/demo/store-2/{branch}" for branch in ("presence", "birth", "reported", "events", "metrics")]
    warm_up(world, topics)
    before, had = rss(world, "coordinator"), world.status().refused.get("message.malformed", 0)
    with Callers(target) as callers:
        publish(world, topics, MANY)
        wait_until(lambda: world.status().refused.get("message.malformed", 0) - had >= MANY, 60, world.status)
    assert_held(world, target, "coordinator", before, callers, {"message.malformed"})
    assert {node.state for node in world.nodes()} == {"online"}, "nothing of it was believed"


def test_the_agent_by_mqtt(world):
    target = Target(world, "store-1")
    topics = [f"skerry/v1/demo/store-1/command/{verb}" for verb in ("ack", "logs")]
    warm_up(world, topics)
    before = rss(world, "store-1.agent")
    with Callers(target) as callers:
        publish(world, topics, MANY)
    assert_held(world, target, "store-1.agent", before, callers, {"ack.malformed", "command.malformed", "command.unanswerable"})


def test_the_warden_by_documents_that_the_broker_invents(world):
    target = Target(world, "store-1")
    warm_up(world, ["skerry/v1/demo/store-1/desired"])
    before, journal = rss(world, "store-1.warden"), len(world.events(node="store-1", kind="desired.refused"))
    with Callers(target) as callers:
        publish(world, ["skerry/v1/demo/store-1/desired"], MANY)
    wait_until(lambda: counted(world, "store-1.warden", {"desired.refused"}) >= MANY * 9 // 10, 40, world.log_tails)
    assert callers.wrong == ""
    assert rss(world, "store-1.warden") - before < MOST_GROWTH_BYTES
    assert len(world.events(node="store-1", kind="desired.refused")) - journal < 60, "lies must not write the journal full"
    target.assert_it_still_obeys()


def test_the_warden_on_its_socket(world):
    target = Target(world, "store-1")
    path = str(target.box.folder / "warden.sock")

    def one(number: int) -> None:
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
            client.settimeout(10)
            client.connect(path)
            client.sendall(nonsense(number).replace(b"\n", b" ") + b"\n")
            while client.recv(65536):
                pass

    def flood(many: int) -> None:
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            list(pool.map(one, range(many)))

    flood(500)
    before = rss(world, "store-1.warden")
    with Callers(target) as callers:
        flood(MANY)
    assert_held(world, target, "store-1.warden", before, callers, {"agent.malformed"})


def test_the_signer_on_its_socket(world):
    target = Target(world, "store-1")
    path = str(world.fleet.folder / "signer" / "signer.sock")

    def flood(many: int) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(path)
            reader = client.makefile("rb")
            for number in range(many):
                body = nonsense(number)
                client.sendall(b"POST /v1/sign HTTP/1.1\r\nHost: s\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                assert reader.readline().split()[1] == b"422"
                size = 0
                while (line := reader.readline()) != b"\r\n":
                    size = int(line.split()[1]) if line.lower().startswith(b"content-length") else size
                reader.read(size)

    flood(500)
    before = rss(world, "signer")
    with Callers(target) as callers:
        flood(MANY)
    assert_held(world, target, "signer", before, callers, {"document.refused"})


def test_the_gateway_by_http(world):
    target = Target(world, "store-1")
    port = int(target.box.gateway_url.rpartition(":")[2])

    def one(number: int) -> None:
        body = nonsense(number)
        texts = (
            b"POST /v2/models/scale/infer HTTP/1.1\r\nHost: g\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body,
            b"NONSENSE %d\r\n\r\n" % number,
        )
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client, contextlib.suppress(ConnectionError):
            client.sendall(texts[number % 2])
            answer = client.recv(65536)
            assert answer.startswith(b"HTTP/1.1 400 "), answer[:100]

    def flood(many: int) -> None:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(one, range(many)))

    flood(500)
    before = rss(world, "store-1.gateway")
    with Callers(target) as callers:
        flood(MANY)
    assert_held(world, target, "store-1.gateway", before, callers, {"request.malformed", "http.malformed"})


def test_a_worker_on_its_socket(world):
    target = Target(world, "store-1")
    (replica,) = world.node("store-1").replicas
    path: Path = target.box.folder / "warden" / "sandboxes" / replica.sandbox / "run" / "worker.sock"

    def one(number: int) -> None:
        body = nonsense(number) or b"x"
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
            client.settimeout(10)
            client.connect(str(path))
            client.sendall(struct.pack("<II", len(body), 0) + body)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass

    def memory() -> int:
        return sum(
            process.info["memory_info"].rss
            for process in psutil.process_iter(["cmdline", "memory_info"])
            if "edge_agent.worker" in (process.info["cmdline"] or []) and replica.sandbox in " ".join(sandbox_of(process.pid))
        )

    def flood(many: int) -> None:
        for number in range(many):
            one(number)

    flood(500)
    before = memory()
    assert before > 0
    with Callers(target) as callers:
        flood(MANY)
    assert callers.wrong == ""
    assert memory() - before < MOST_GROWTH_BYTES
    target.assert_untouched()
    said = target.world.cli("logs", "store-1", replica.name).stdout.decode()
    assert max(int(count) for count in re.findall(r"frame\.malformed count=(\d+)", said)) >= 8192, said[-500:]


def sandbox_of(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return re.findall(r"/sandboxes/([^/ ]+)/run ", Path(f"/proc/{pid}/mountinfo").read_text())
    return []
