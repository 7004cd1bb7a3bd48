"""An engine that hangs holds up what is its own alone: the box's other rungs start, end and change as ever."""

import os
import signal
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from edge_agent.warden.daemon import make_driver
from edge_agent.warden.drivers.fake import FakeDriver, FakeWorld
from edge_agent.warden.ports import Driver
from tests.conftest import need, unreachable
from tests.contract.test_drivers import docker_socket
from tests.integration.box import MIB, Box, bubblewrap, scaling_file
from tests.integration.test_warden_endings import worker_of

PROMPTLY_S = 4.0
"""Longer than an engine is waited for once, and far below what it may take."""


class Rungs(Box):
    """Sandboxes of the rung ``process`` beside those of an engine that can hang. ``e-0`` runs by the engine, ``p-0`` does not."""

    def __init__(self, folder: Path, **settings: object) -> None:
        super().__init__(folder, lambda box: [FakeDriver(box.world, name="plain"), box.by_engine()], **settings)
        self.engine = FakeWorld()

    def by_engine(self) -> Driver:
        return FakeDriver(self.engine, rung="container", name="engine")

    def both(self, version: int = 1, **fields: object):
        return self.spec("e-0", isolation_at_least="container", version=version, **fields), self.spec("p-0", version=version, **fields)

    def play(self, scene: Callable[[], Awaitable[None]]) -> None:
        async def and_go_on() -> None:
            try:
                await scene()
            finally:
                self.engine.hang.clear()
                self.engine.fail.clear()

        super().play(and_go_on)

    async def plain_is_as_ever(self) -> None:
        """What ends there is started again at once."""
        began, before = time.monotonic(), len(self.entries("replica.ended"))
        (name,) = self.running
        self.world.kill(name, "fell over")
        await self.until(lambda: len(self.entries("replica.ended")) > before and self.running and name not in self.running)
        await self.until_ready("p-0")
        assert time.monotonic() - began < PROMPTLY_S

    def engines(self) -> list[str]:
        return [name for name, one in self.engine.sandboxes.items() if one.running]


@pytest.fixture
def box(tmp_path) -> Rungs:
    return Rungs(tmp_path, warm_most=0)


def test_what_an_engine_runs_is_taken_to_run_while_it_does_not_answer_and_the_others_are_as_ever(box):
    async def scene():
        async with box.up():
            await box.want(*box.both())
            await box.until_ready()
            box.engine.hang |= {"sandboxes", "stats", "stop", "start", "logs"}
            for _ in range(2):
                await box.plain_is_as_ever()
            assert box.report("e-0").phase == "ready"
            assert {replica.name for route in box.routes().routes for replica in route.replicas} == {"e-0", "p-0"}
            box.engine.hang.clear()
            await box.looked(5)
            assert box.kinds("e-0") == ["replica.started", "replica.ready"]

    box.play(scene)


def test_a_start_that_hangs_is_waited_for_alone_and_its_memory_is_not_given_twice(tmp_path):
    box = Rungs(tmp_path, memory_bytes=768 * MIB)

    async def scene():
        async with box.up():
            engines, plain = box.both()
            await box.want(plain)
            await box.until_ready()
            box.engine.hang.add("start")
            await box.want(plain, engines)
            await box.plain_is_as_ever()
            assert box.report("e-0").phase == "starting"
            await box.want(plain, engines, box.spec("p-1", memory_bytes=300 * MIB))  # 768 less twice 256
            await box.until(lambda: (report := box.report("p-1")) and "memory" in report.reason)
            await box.looked(5)
            assert len(box.running) == 1
            box.engine.hang.clear()
            await box.until_ready("e-0")
            assert len(box.engines()) == 1

    box.play(scene)


def test_an_end_that_hangs_is_waited_for_alone_and_happens_in_the_end(box):
    async def scene():
        async with box.up():
            await box.want(*box.both())
            await box.until_ready()
            box.engine.hang.add("stop")
            await box.want(box.both()[1])
            await box.plain_is_as_ever()
            assert len(box.engines()) == 1
            await box.want(*box.both(version=2)[1:])
            await box.until_ready("p-0")
            box.engine.hang.clear()
            await box.until(lambda: box.engines() == [] and len(box.slots.all()) == 1)

    box.play(scene)


def test_the_removal_of_an_orphan_that_hangs_is_waited_for_alone_and_happens_in_the_end(box):
    async def scene():
        async with box.up():
            await box.want(*box.both())
            await box.until_ready()
        for path in box.config.state_dir.glob("sandboxes/e-0*/slot.json"):
            path.unlink()  # nobody knows any more whose it is
        (orphan,) = box.engines()
        box.config = msgspec.structs.replace(box.config, orphan_grace_s=0)
        box.engine.hang.add("stop")
        async with box.up():
            await box.until_ready()
            await box.plain_is_as_ever()
            assert orphan in box.engines()
            assert len(box.engines()) == 2
            box.engine.hang.clear()
            await box.until(lambda: orphan not in box.engines() and box.entries("sandbox.orphan_removed"))
            assert len(box.engines()) == 1
            assert [entry.subject for entry in box.entries("sandbox.orphan_removed")] == [orphan]

    box.play(scene)


def test_a_worker_that_ends_while_its_engine_hangs_is_out_of_the_routes_and_started_again_when_it_answers(box):
    async def scene():
        async with box.up():
            await box.want(*box.both())
            await box.until_ready()
            box.engine.hang |= {"sandboxes", "stats"}
            await box.plain_is_as_ever()  # by now it is known that the engine does not answer
            (name,) = box.engines()
            box.engine.kill(name, "fell over")
            await box.until(lambda: {replica.name for route in box.routes().routes for replica in route.replicas} == {"p-0"})
            await box.plain_is_as_ever()
            box.engine.hang.clear()
            await box.until(lambda: box.engines() and name not in box.engines())
            await box.until_ready("e-0")

    box.play(scene)


@pytest.mark.parametrize("is_offered", [True, False])
def test_a_warden_that_starts_while_the_engine_hangs_serves_by_what_runs_and_begins_nothing_twice(box, is_offered):
    async def scene():
        async with box.up():
            await box.want(*box.both())
            await box.until_ready()
        running = box.engines()
        box.engine.hang |= {"sandboxes", "stats", "stop", "start", "probe"}
        box.not_yet = set() if is_offered else {"container"}
        began = time.monotonic()
        async with box.up():
            await box.until_ready("e-0", "p-0")
            assert time.monotonic() - began < PROMPTLY_S
            await box.plain_is_as_ever()
            assert box.engines() == running
            box.engine.hang.clear()
            assert await box.offer.look() is not is_offered
            box.warden.wake()
            await box.looked(5)
            assert box.engines() == running
            assert box.report("e-0").phase == "ready"
            await box.want(box.both()[1])
            await box.until(lambda: box.engines() == [])

    box.play(scene)


@pytest.mark.parametrize("is_offered", [True, False])
def test_after_a_boot_what_only_the_engine_can_run_waits_for_it_and_is_not_given_up(box, is_offered):
    box.config = msgspec.structs.replace(box.config, crash_loop_after=2)

    async def scene():
        async with box.up():
            await box.want(*box.both())
            await box.until_ready()
        box.lose_power()
        for name in box.engines():
            box.engine.kill(name, "the power went away")
        box.engine.hang |= {"sandboxes", "stats", "stop", "start", "probe"}
        box.not_yet = set() if is_offered else {"container"}
        async with box.up():
            await box.until_ready("p-0")
            await box.until(lambda: (report := box.report("e-0")) and report.phase == "pending" and "engine" in report.reason)
            await box.plain_is_as_ever()
            box.engine.hang.clear()
            await box.offer.look()
            box.warden.wake()
            await box.until_ready("e-0")
            assert len(box.engines()) == 1
            assert box.entries("replica.crash_loop") == []

    box.play(scene)


def test_what_an_engine_that_is_down_should_start_waits_for_it_and_is_not_given_up(tmp_path):
    box = Rungs(tmp_path, crash_loop_after=6)

    async def scene():
        async with box.up():
            engines, plain = box.both()
            await box.want(plain)
            await box.until_ready()
            box.engine.fail |= {"sandboxes", "start", "stop", "stats"}
            await box.looked(3)
            await box.want(engines, plain)
            for _ in range(4):
                await box.plain_is_as_ever()
            assert not box.report("e-0").is_crash_loop
            box.engine.fail.clear()
            await box.until_ready("e-0")
            assert box.entries("replica.crash_loop") == []

    box.play(scene)


def test_a_kind_of_sandbox_that_does_not_answer_when_it_is_tried_holds_no_other_up(box):
    async def scene():
        async with box.up():
            box.offer.working.clear()
            box.engine.hang |= {"sandboxes", "probe"}
            began = time.monotonic()
            assert await box.offer.look(within_s=0.5)
            assert time.monotonic() - began < PROMPTLY_S
            assert [driver.name for driver in box.offer.working] == ["plain"]
            assert box.offer.absent["container"] == "no answer within 0.5 s"
            box.engine.hang.clear()
            assert await box.offer.look()
            assert [driver.name for driver in box.offer.working] == ["plain", "engine"]

    box.play(scene)


def process_at(path: Path) -> int:
    """Who listens there (unix(7), SO_PEERCRED)."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        return struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]


@pytest.mark.usefixtures("needs_bubblewrap")
def test_a_real_engine_that_is_stopped_in_the_middle_costs_the_other_rung_nothing(tmp_path):
    need("docker", unreachable(docker_socket()))
    need("root", "" if os.geteuid() == 0 else "stopping the engine needs root")
    box = Box(tmp_path, lambda box: [*bubblewrap(box), make_driver("docker", box.config)], docker_socket=docker_socket())
    engine = process_at(docker_socket())

    async def scene():
        async with box.up():
            content = scaling_file(10)
            await box.want(box.spec("e-0", isolation_at_least="container", content=content), box.spec("p-0", content=content))
            await box.until_ready()
            os.kill(engine, signal.SIGSTOP)
            try:
                for times in (1, 2):
                    began = time.monotonic()
                    os.kill(worker_of(box), signal.SIGKILL)
                    await box.until(lambda n=times: len([e for e in box.entries("replica.ready") if e.subject == "p-0"]) > n)
                    assert time.monotonic() - began < PROMPTLY_S
                assert box.report("e-0").phase == "ready"
            finally:
                os.kill(engine, signal.SIGCONT)
            await box.want()
            await box.until(lambda: box.slots.all() == {})

    box.play(scene)
