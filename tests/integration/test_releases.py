"""A real coordinator with a store of releases, spoken to by the command line and by boxes that say what boxes would."""

import asyncio
import contextlib
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from skerry.cli.client import EXIT_FAILED, EXIT_REFUSED, EXIT_USAGE
from skerry.release import archive
from skerry.runtime import mqtt
from skerry.runtime.settings import Broker
from skerry.wire import codec, model_signature, signing, topics
from skerry.wire.api import ReleaseView, SoftwareView
from skerry.wire.messages import Birth, Desired, Presence, Reported, Software, SoftwareReport
from tests.e2e.world import World, running, wait_until

PYTHON, MACHINE = "3.11", "x86_64"
WAVES = ("--waves", "1,100%", "--observe", "1s", "--deadline", "20s")


class Box:
    """An agent, a warden and an updater by their words alone."""

    def __init__(self, world: World, name: str, *, fails: str = "") -> None:
        self.name, self.fails, self.version = name, fails, "1.0"
        self.told: list[Software | None] = []
        self._world, self._stop = world, asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._live(),))
        self._thread.start()

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        self._loop.close()

    async def _live(self) -> None:
        async with mqtt.connected(
            Broker("127.0.0.1", self._world.fleet.broker_port), topics.client_id("demo", self.name), last_will=None, queue=100
        ) as client:
            for pattern in topics.down_filters("demo", self.name):
                await client.subscribe(pattern, qos=1)
            await self._say(client, Presence(True, "b", 1), self._birth(), Reported(0))
            listening = asyncio.create_task(self._listen(client))
            await self._stop.wait()
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listening

    def _birth(self) -> Birth:
        return Birth("edge", {}, "http://127.0.0.1:9", "b", 1, self.version, 4, 2**34, rungs=["process"], machine=MACHINE, python=PYTHON)

    async def _say(self, client: Any, *messages: msgspec.Struct) -> None:
        for message in messages:
            branch = {Presence: "presence", Birth: "birth", Reported: "reported"}[type(message)]
            await client.publish(topics.up("demo", self.name, branch), codec.encode(message), qos=1, retain=branch != "birth")

    async def _listen(self, client: Any) -> None:
        async for message in client.messages:
            topic = topics.parse(str(message.topic))
            if topic is None or topic.branch != "desired":
                continue
            desired = codec.decode(bytes(codec.decode(message.payload, signing.Envelope).payload), Desired)
            if not self.told or self.told[-1] != desired.software:
                self.told.append(desired.software)
            software, said = desired.software, SoftwareReport()
            if software is not None and self.fails and software.version != self.version:
                said = SoftwareReport(software.version, software.attempt, "failed", self.fails)
            elif software is not None:
                self.version = software.version
                said = SoftwareReport(software.version, software.attempt, "done")
            await self._say(client, self._birth(), Reported(desired.generation, software=said))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with running(wait=False) as world:
        for name in world.fleet.names():
            if "." in name:
                world.do(world.fleet.kill(name))  # the coordinator and the broker alone are wanted
        yield world


@pytest.fixture(scope="module")
def key(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("keys") / "releases.key"


def made(folder: Path, version: str, *, machine: str = MACHINE) -> Path:
    """A release in a file, as far as a coordinator looks."""
    wheels = folder / f"wheels-{version}-{machine}"
    wheels.mkdir()
    (wheels / f"skerry-{version}-py3-none-any.whl").write_bytes(f"{version} {machine}".encode())
    (wheels / "library-1.0-py3-none-any.whl").write_bytes(b"library")
    digest = hashlib.sha256(b"library").hexdigest()
    (wheels / "lock.txt").write_text(f"library==1.0 --hash=sha256:{digest}\n")
    path = folder / f"skerry-{version}-{machine}.tar"
    archive.build(wheels, wheels / "lock.txt", path, python=PYTHON, machine=machine)
    return path


def cli(world: World, *words: str | Path, status: int = 0) -> str:
    done = world.cli(*map(str, words))
    assert done.returncode == status, (done.stdout + done.stderr).decode()
    return (done.stdout if status == 0 else done.stderr).decode()


def software(world: World) -> SoftwareView:
    return world.api.call("GET", "/v1/software", SoftwareView)


def test_a_release_is_signed_pushed_rolled_out_and_the_boxes_run_it(world, tmp_path, key):
    release = made(tmp_path, "2.0")
    cli(world, "release", "keygen", "--key", key)
    assert "not signed" in _unsigned(world, release)
    cli(world, "release", "sign", release, "--key", key)
    pushed = msgspec.json.decode(cli(world, "release", "push", release, "--json"), type=ReleaseView)
    assert (pushed.version, pushed.python, pushed.machine, pushed.signature) == ("2.0", PYTHON, MACHINE, "unchecked")
    assert "2.0" in cli(world, "release", "list")
    boxes = [Box(world, f"r-{number}") for number in range(3)]
    try:
        wait_until(lambda: software(world).versions.get("1.0", 0) == 3, 20, lambda: software(world))
        assert [box.told for box in boxes] == [[]] * 3, "nobody is told anything before"
        shown = cli(world, "release", "roll-out", "2.0", *WAVES, "--watch")
        assert "boxes are to run 2.0; 3 run 2.0" in shown
        [told] = {msgspec.json.encode(box.told[-1]) for box in boxes}
        wanted = msgspec.json.decode(told, type=Software)
        assert (wanted.version, wanted.sha256, wanted.size_bytes) == ("2.0", pushed.sha256, release.stat().st_size)
        trusted = model_signature.parse_keys(key.with_name("releases.key.pub").read_bytes())
        model_signature.verify_file(wanted.signature, trusted, path="skerry/2.0/release.tar", sha256=wanted.sha256)
        kinds = [event.kind for event in world.events(subject="skerry-2.0")]
        assert kinds == ["rollout.done", "rollout.ready", "rollout.wave", "rollout.ready", "rollout.wave", "rollout.began"]
        assert {"release.pushed", "release.signed", "release.spread"} <= {
            record["action"] for record in json.loads(cli(world, "audit", "list", "--json"))
        }
        assert "boxes are to run 2.0, or would go back to it" in cli(world, "release", "remove", "2.0", status=EXIT_REFUSED)
        bad(world, tmp_path, key, boxes)
        goes_on_after_a_kill(world, tmp_path, key, boxes)
    finally:
        for box in boxes:
            box.end()


def _unsigned(world: World, release: Path) -> str:
    cli(world, "release", "push", release)
    return cli(world, "release", "roll-out", "2.0", status=EXIT_REFUSED)


def bad(world: World, folder: Path, key: Path, boxes: list[Box]) -> None:
    """One that fails on the box that gets it first is known to no other, and all are told to go back; another try needs a word."""
    release = made(folder, "3.0")
    cli(world, "release", "sign", release, "--key", key)
    cli(world, "release", "push", release)
    for box in boxes:
        box.fails, box.told = "self-test: the worker: no runtime", []
    said = cli(world, "release", "roll-out", "3.0", *WAVES, "--watch", status=EXIT_FAILED)
    assert "self-test: the worker: no runtime" in said
    wait_until(lambda: software(world).wanted == "2.0", 10, lambda: software(world))
    [touched] = [box for box in boxes if box.told]
    wait_until(lambda: [told.version for told in touched.told if told] == ["3.0", "2.0"], 10, lambda: touched.told)
    assert "3.0 was taken back" in cli(world, "release", "roll-out", "3.0", status=EXIT_REFUSED)
    for box in boxes:
        box.fails = ""
    assert "3 run 3.0" in cli(world, "release", "roll-out", "3.0", *WAVES, "--watch", "--again")


def goes_on_after_a_kill(world: World, folder: Path, key: Path, boxes: list[Box]) -> None:
    """It is paused, approved and goes on though the coordinator is killed in between."""
    release = made(folder, "4.0")
    cli(world, "release", "sign", release, "--key", key)
    cli(world, "release", "push", release)
    cli(world, "release", "roll-out", "4.0", *WAVES, "--approve")
    wait_until(lambda: (view := software(world)).rollout is not None and view.rollout.phase == "waiting", 20, lambda: software(world))
    assert "4.0 spreads: abort it first" in cli(world, "release", "roll-out", "2.0", status=EXIT_REFUSED)
    assert "skerry release approve" in cli(world, "release", "status")
    world.do(world.fleet.kill("coordinator"))
    world.do(world.fleet.start_process("coordinator"))
    wait_until(lambda: _answers(world), 20, world.log_tails)
    cli(world, "release", "pause")
    cli(world, "release", "resume")
    cli(world, "release", "approve")
    assert "3 run 4.0" in cli(world, "release", "status", "--watch")
    cli(world, "release", "abort", status=EXIT_REFUSED)
    assert [box.told[-1].version for box in boxes if box.told[-1]] == ["4.0"] * 3
    cli(world, "release", "remove", "2.0")


def _answers(world: World) -> bool:
    try:
        return world.status().broker_connected
    except Exception:  # noqa: BLE001 - it is coming up
        return False


@pytest.mark.parametrize("content", [b"", b"no archive at all" * 100, b"\0" * 10240])
def test_what_is_no_release_is_not_taken(world, tmp_path, content):
    path = tmp_path / "skerry-9.0.tar"
    path.write_bytes(content)
    assert "this is no release" in cli(world, "release", "push", path, status=EXIT_USAGE)
    with pytest.raises(Exception, match="this is no release"):
        world.api.call("PUT", "/v1/releases", ReleaseView, body=content)


def test_a_header_that_asks_for_memory_is_refused_before_it_is_read(world):
    header = bytearray(512)
    header[0:4], header[124:136], header[156:157], header[257:265] = b"long", b"77777777777\0", b"L", b"ustar  \0"
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    with pytest.raises(Exception, match="it does not begin with a file"):
        world.api.call("PUT", "/v1/releases", ReleaseView, body=bytes(header) + bytes(10240))


def test_other_bytes_under_the_same_name_are_refused(world, tmp_path, key):
    first = made(tmp_path, "5.0")
    cli(world, "release", "push", first)
    shutil.rmtree(tmp_path / f"wheels-5.0-{MACHINE}")
    other = made(tmp_path / "x" if (tmp_path / "x").mkdir() is None else tmp_path, "5.0")
    content = bytearray(other.read_bytes())
    content[-600] ^= 1
    other.write_bytes(bytes(content))
    assert "is in the store already" in cli(world, "release", "push", other, status=EXIT_REFUSED)
    elsewhere = made(tmp_path, "5.0", machine="aarch64")
    assert "on aarch64 pushed" in cli(world, "release", "push", elsewhere)
