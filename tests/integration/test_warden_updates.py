"""How a box goes from one version to the next: who serves meanwhile, what memory is held, and what becomes of versions that fail."""

import asyncio
import contextlib
from pathlib import Path

import pytest

from edge_agent.warden.drivers.fake import BAD_MODEL
from tests.integration.box import MIB, Box, Caller, answer_of, bubblewrap, scaling_file


def versions(box: Box) -> list[tuple[int, list[str]]]:
    """The route of deployment ``d``: its version, and the sandboxes that serve it."""
    found = [route for route in box.routes().routes if route.deployment == "d"]
    return [(route.version, [Path(replica.socket).parent.parent.name for replica in route.replicas]) for route in found]


async def settled(box: Box) -> None:
    """Until what is wanted is ready and nothing else runs."""
    await box.until_ready()
    await box.until(lambda: len(box.world.sandboxes) == len(box.desired.replicas))


def test_a_new_version_takes_over_from_one_moment_to_the_next_and_the_old_one_leaves_after_it(folder):
    box = Box(folder, drain_s=0.2)

    async def scene():
        async with box.up():
            await box.want(box.spec(version=1))
            await settled(box)
            (old,) = box.running
            box.world.start_delay_s = 0.1
            async with box.sampling(lambda: (versions(box), set(box.running))) as samples:
                await box.want(box.spec(version=2))
                await settled(box)
            (new,) = box.running
            tables = [table for n, (table, _) in enumerate(samples) if n == 0 or table != samples[n - 1][0]]
            assert tables == [[(1, [old])], [(2, [new])]]
            assert {old, new} in [running for table, running in samples if table == [(2, [new])]], "it went before its time"
            assert samples[-1] == ([(2, [new])], {new})
            happened = [entry for entry in box.kinds("d-0") if entry != "model.admitted"]
            assert happened == ["replica.started", "replica.ready", "replica.started", "replica.ready", "replica.removed"]

    box.play(scene)


@pytest.mark.usefixtures("needs_bubblewrap")
def test_no_request_is_lost_while_a_real_worker_takes_over_from_another(folder):
    box = Box(folder, bubblewrap, drain_s=0.3)
    answers: list[tuple[int, float]] = []

    async def ask_all_the_time():
        while True:
            table = box.routes()
            version, socket = table.routes[0].version, box.socket()
            try:
                async with Caller.to(socket) as caller:
                    while True:
                        answers.append((version, (await caller.ask(1, 2, 3))[0]))
                        await asyncio.sleep(0.001)
                        if box.routes() != table:
                            break
            except (OSError, asyncio.IncompleteReadError):
                assert box.routes() != table, "a replica that the route names does not answer"

    async def scene():
        async with box.up():
            await box.want(box.spec(version=1, content=scaling_file(10)))
            await box.until_ready()
            asking = asyncio.create_task(ask_all_the_time())
            await box.until(lambda: len(answers) > 5)
            async with box.sampling(lambda: versions(box)) as tables:
                await box.want(box.spec(version=2, content=scaling_file(20)))
                await box.until(lambda: asking.done() or (2, 20.0) in answers)
                await box.until(lambda: "replica.removed" in box.kinds("d-0"))
            before = len(answers)
            await box.until(lambda: asking.done() or len(answers) > before + 5)
            assert not asking.done(), await asking
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asking
            assert [[(version, len(sandboxes)) for version, sandboxes in table] for table in tables] == [[(1, 1)], [(2, 1)]]
            assert set(answers) == {(1, 10.0), (2, 20.0)}
            assert answers == sorted(answers)

    box.play(scene)


def test_where_both_do_not_fit_a_hand_over_waits_and_says_why_until_there_is_room(folder):
    box = Box(folder, memory_bytes=700 * MIB)

    async def scene():
        async with box.up():
            other = box.spec("o-0")
            await box.want(other, box.spec(version=1))
            await settled(box)
            (old,) = (name for name in box.running if name.startswith("d-0"))
            async with box.sampling(lambda: (box.granted_bytes, versions(box))) as samples:
                update = box.spec(version=2, update="hand_over")
                await box.want(update, other)
                await box.until(lambda: (report := box.report()) and report.phase == "pending" and "update.no_room" in report.reason)
                assert "needs 256 MiB of memory, 188 MiB is free" in box.report().reason
                await box.looked(5)
            assert samples == [(512 * MIB, [(1, [old])])]
            await box.want(update)
            await settled(box)
            assert [version for version, _ in versions(box)] == [2]

    box.play(scene)


def test_a_hand_over_if_there_is_room_goes_one_after_the_other_where_there_is_none(folder):
    box = Box(folder, memory_bytes=300 * MIB)

    async def scene():
        async with box.up():
            await box.want(box.spec(version=1))
            await settled(box)
            async with box.sampling(lambda: box.granted_bytes) as held:
                await box.want(box.spec(version=2, update="hand_over_if_room"))
                await settled(box)
            assert held == [256 * MIB, 0, 256 * MIB]

    box.play(scene)


def test_a_version_that_would_not_fit_even_alone_does_not_drive_the_old_one_out(folder):
    box = Box(folder, memory_bytes=300 * MIB)

    async def scene():
        async with box.up():
            await box.want(box.spec(version=1))
            await settled(box)
            async with box.sampling(lambda: versions(box)) as tables:
                await box.want(box.spec(version=2, memory_bytes=400 * MIB))
                await box.until(lambda: (report := box.report()) and "even without the old version" in report.reason)
                await box.looked(5)
            assert [[version for version, _ in table] for table in tables] == [[1]]
            assert len(box.running) == 1

    box.play(scene)


def test_to_recreate_is_to_end_the_old_one_before_the_new_one_is_started_however_much_room_there_is(folder):
    box = Box(folder)

    async def scene():
        async with box.up():
            await box.want(box.spec(version=1))
            await settled(box)
            async with box.sampling(lambda: len(box.running)) as running:
                await box.want(box.spec(version=2, update="recreate"))
                await settled(box)
            assert running == [1, 0, 1]
            happened = [entry for entry in box.kinds("d-0") if entry != "model.admitted"]
            assert happened == ["replica.started", "replica.ready", "replica.removed", "replica.started", "replica.ready"]

    box.play(scene)


def test_a_version_that_cannot_be_loaded_is_given_up_for_good_and_the_old_one_serves_on(folder):
    box = Box(folder, crash_loop_after=4)

    def is_given_up() -> bool:
        report = box.report()
        return report is not None and report.is_crash_loop

    def tries() -> list[str]:
        return [entry.text for entry in box.entries("replica.started") if "m:2" in entry.text]

    async def scene():
        async with box.up():
            await box.want(box.spec(version=1))
            await settled(box)
            table = versions(box)
            async with box.sampling(lambda: versions(box)) as tables:
                await box.want(box.spec(version=2, content=BAD_MODEL))
                await box.until(is_given_up)
                await box.looked(5)
            given_up = box.report()
            assert (given_up.phase, given_up.generation) == ("failed", 2)
            assert "load failed: model.onnx: this is not a model" in given_up.reason
            assert len(tries()) == 2, "one that can't load its model counts double"
            assert len(box.entries("replica.crash_loop")) == 1
            assert tables == [table]
        async with box.sampling(lambda: versions(box)) as tables, box.up():
            await box.until(is_given_up)
            await box.looked(5)
            assert box.report().reason == given_up.reason
            assert tables == [table]
            assert len(tries()) == 2, "it was tried again"
            assert len(box.entries("replica.crash_loop")) == 1, "it was said again"
            await box.want(box.spec(version=3))
            await settled(box)
            assert not box.report().is_crash_loop
            assert [version for version, _ in versions(box)] == [3]

    box.play(scene)


def test_the_same_model_of_another_generation_is_tried_again_at_once(folder):
    box = Box(folder, crash_loop_after=1, restart_first_s=60)

    async def scene():
        async with box.up():
            box.world.fail.add("start")
            await box.want(box.spec(version=1))
            await box.until(lambda: (report := box.report()) and report.is_crash_loop)
            assert "start fails, as the script says" in box.report().reason
            box.world.fail.clear()
            await box.looked(5)
            assert box.running == {}
            await box.want(box.spec(version=1, generation=2))
            await settled(box)
            assert box.report().restarts == 0

    box.play(scene)


@pytest.mark.usefixtures("needs_bubblewrap")
def test_a_real_file_that_is_no_model_is_given_up_with_the_runtimes_reason_and_the_old_version_answers(folder):
    box = Box(folder, bubblewrap, crash_loop_after=2)

    async def scene():
        async with box.up():
            await box.want(box.spec(version=1, content=scaling_file(10)))
            await box.until_ready()
            await box.want(box.spec(version=2, content=b"not a model"))
            await box.until(lambda: (report := box.report()) and report.is_crash_loop)
            assert "load failed" in box.report().reason
            assert await answer_of(box.socket()) == (10, 20, 30)

    box.play(scene)


@pytest.mark.parametrize("update", ["recreate", "hand_over"])
def test_what_does_not_change_how_a_replica_runs_leaves_its_sandbox_and_begins_no_other(folder, update):
    box = Box(folder)

    async def scene():
        async with box.up():
            await box.want(box.spec(update=update))
            await settled(box)
            before = box.report().sandbox
            await box.want(box.spec(update=update, stop_after_ms=86_400_000))
            await box.looked(5)
            assert (box.report().phase, box.report().sandbox) == ("ready", before)
            assert box.kinds("d-0") == ["replica.started", "replica.ready"]
            assert set(box.slots.all()) == {before}

    box.play(scene)
