"""Warm sandboxes in the hands of the warden: whose they become, whose not, and that they never cost a replica its memory."""

import msgspec
import pytest

from edge_agent.warden.drivers.fake import BAD_MODEL, FakeDriver
from edge_agent.warden.slots import Slot
from skerry.wire import codec
from skerry.wire.messages import Server
from tests.integration.box import MIB, Box, answer_of, bubblewrap, scaling_file


async def one_waits(box: Box) -> str:
    """Until one warm sandbox waits for a model; returns its name."""
    await box.until(lambda: len(box.warm()) == 1)
    return box.warm()[0]


def test_after_the_first_of_a_kind_the_next_one_is_started_warm(folder):
    box = Box(folder, warm_most=1)

    async def scene():
        async with box.up():
            first = box.spec("a-0")
            await box.want(first)
            await box.until_ready()
            warm = await one_waits(box)
            assert [entry.subject for entry in box.entries("warm.started")] == [warm]
            assert not box.report("a-0").is_warm
            await box.want(first, box.spec("b-0", version=2))
            await box.until_ready()
            assert box.report("b-0").is_warm
            assert box.report("b-0").sandbox == warm
            assert [entry.text for entry in box.entries("replica.started", subject="b-0")] == [f"fake, m:2, sandbox {warm}"]
            assert await answer_of(box.socket("b")) == (2, 4, 6)
            assert await one_waits(box) != warm, "another one takes its place"

    box.play(scene)


def test_one_that_waits_is_taken_however_short_the_time_since(folder):
    box = Box(folder, warm_most=1)

    async def scene():
        async with box.up():
            first = box.spec("a-0")
            await box.want(first)
            await box.until_ready()
            warm = await one_waits(box)
            await box.want(first, box.spec("b-0"))  # its model is here already
            await box.until_ready()
            assert box.report("b-0").sandbox == warm

    box.play(scene)


@pytest.mark.usefixtures("needs_bubblewrap")
def test_a_real_warm_worker_answers_with_the_model_that_it_was_told(folder):
    box = Box(folder, bubblewrap, warm_most=1)

    async def scene():
        async with box.up():
            first = box.spec("a-0", content=scaling_file(10))
            await box.want(first)
            await box.until_ready()
            warm = await one_waits(box)
            await box.want(first, box.spec("b-0", content=scaling_file(20)))
            await box.until_ready()
            assert (box.report("b-0").is_warm, box.report("b-0").sandbox) == (True, warm)
            assert await answer_of(box.socket("b")) == (20, 40, 60)
            assert await answer_of(box.socket("a")) == (10, 20, 30)

    box.play(scene)


def test_a_warm_one_becomes_no_other_kind_no_server_and_nothing_with_a_gpu(folder):
    box = Box(
        folder, lambda box: [FakeDriver(box.world, rung="container")], gpus={"GPU-1": 1024 * MIB}, memory_bytes=4096 * MIB, warm_most=1
    )
    unlike = {
        "more-0": {"memory_bytes": 300 * MIB},
        "less-0": {"memory_bytes": 200 * MIB},
        "cpus-0": {"cpus": 2.0},
        "image-0": {"image": "sha256:" + "0" * 64},
        "server-0": {"server": Server("sha256:" + "0" * 64)},
        "gpu-0": {"gpu_memory_bytes": 512 * MIB},
    }

    async def scene():
        async with box.up():
            like = box.spec("a-0")
            await box.want(like)
            await box.until_ready()
            warm = await one_waits(box)
            others = [box.spec(name, **fields) for name, fields in unlike.items()]
            await box.want(like, *others)
            await box.until_ready()
            assert [box.report(name).is_warm for name in unlike] == [False] * len(unlike)
            assert warm in box.running
            await box.want(like, *others, box.spec("z-0"))
            await box.until_ready()
            assert box.report("z-0").sandbox == warm

    box.play(scene)


def test_a_server_and_a_replica_with_a_gpu_are_no_reason_to_hold_one_warm(folder):
    box = Box(folder, lambda box: [FakeDriver(box.world, rung="container")], gpus={"GPU-1": 1024 * MIB}, warm_most=2)

    async def scene():
        async with box.up():
            await box.want(box.spec("s-0", server=Server("sha256:" + "0" * 64)), box.spec("g-0", gpu_memory_bytes=512 * MIB))
            await box.until_ready()
            await box.looked(5)
            assert box.entries("warm.started") == []
            assert len(box.running) == 2

    box.play(scene)


def test_a_replica_that_needs_the_memory_of_a_warm_one_gets_it(folder):
    box = Box(folder, memory_bytes=600 * MIB, warm_most=1)

    async def scene():
        async with box.up():
            first = box.spec("a-0")
            await box.want(first)
            await box.until_ready()
            warm = await one_waits(box)
            async with box.sampling(lambda: box.granted_bytes) as held:
                await box.want(first, box.spec("b-0", memory_bytes=300 * MIB))
                await box.until_ready()
            (given,) = box.entries("warm.given_back")
            assert given.subject == warm
            assert "a replica needs its memory" in given.text
            assert held == [512 * MIB, 256 * MIB, 556 * MIB]

    box.play(scene)


def test_a_warm_one_that_ends_is_removed_and_none_is_started_for_a_while(folder):
    box = Box(folder, warm_most=1)

    async def scene():
        async with box.up():
            first = box.spec("a-0")
            await box.want(first)
            await box.until_ready()
            warm = await one_waits(box)
            box.world.kill(warm, "the cat pulled the plug")
            await box.until_noticed(lambda: warm not in box.world.sandboxes)
            assert [(entry.subject, entry.text.rpartition(": ")[2]) for entry in box.entries("warm.given_back")] == [(warm, "it ended")]
            await box.want(first, box.spec("b-0"))
            await box.until_ready()
            assert not box.report("b-0").is_warm
            await box.looked(5)
            assert len(box.entries("warm.started")) == 1
            assert sorted(box.slots.all()) == sorted(box.running) == sorted(box.report(name).sandbox for name in ("a-0", "b-0"))

    box.play(scene)


def test_a_warm_one_that_fills_its_socket_directory_is_ended(folder):
    box = Box(folder, warm_most=1)

    async def scene():
        async with box.up():
            await box.want(box.spec("a-0"))
            await box.until_ready()
            warm = await one_waits(box)
            (box.slots.socket_dir(warm) / "large").write_bytes(bytes(5 * MIB))
            await box.until_noticed(lambda: warm not in box.world.sandboxes)
            (entry,) = box.entries("warm.given_back")
            assert "it filled its socket directory" in entry.text

    box.play(scene)


def test_a_warm_one_that_is_gone_when_it_is_to_be_told_its_model_costs_the_replica_no_failure(folder):
    box = Box(folder, warm_most=1)

    async def scene():
        async with box.up():
            first = box.spec("a-0")
            await box.want(first)
            await box.until_ready()
            warm = await one_waits(box)
            await box.looked()
            box.world.fail.add("sandboxes")  # so that the warden can't have noticed
            box.world.kill(warm, "the cat pulled the plug")
            await box.want(first, box.spec("b-0"))
            await box.until_ready("b-0")
            box.world.fail.clear()
            report = box.report("b-0")
            assert (report.is_warm, report.restarts, report.sandbox != warm) == (False, 0, True)
            assert warm not in box.world.sandboxes
            assert box.entries("replica.ended") == []
            assert await answer_of(box.socket("b")) == (2, 4, 6)

    box.play(scene)


def test_a_warm_one_that_is_told_a_bad_model_ends_and_the_replica_is_to_blame(folder):
    box = Box(folder, warm_most=1, crash_loop_after=4)

    async def scene():
        async with box.up():
            first = box.spec("a-0")
            await box.want(first)
            await box.until_ready()
            warm = await one_waits(box)
            await box.want(first, box.spec("b-0", content=BAD_MODEL))
            await box.until(lambda: (report := box.report("b-0")) and report.is_crash_loop)
            assert "load failed" in box.report("b-0").reason
            assert box.kinds("b-0") == ["replica.started", "replica.ended", "replica.started", "replica.crash_loop"]
            assert next(entry.subject for entry in box.entries("warm.started")) == warm
            assert warm not in box.world.sandboxes

    box.play(scene)


def test_a_warden_that_starts_again_uses_the_warm_ones_that_are_there(folder):
    box = Box(folder, warm_most=1)

    async def scene():
        first = box.spec("a-0")
        async with box.up():
            await box.want(first)
            await box.until_ready()
            warm = await one_waits(box)
        async with box.up():
            await box.until_ready()
            await box.looked()
            assert warm in box.running
            await box.want(first, box.spec("b-0"))
            await box.until_ready()
            assert (box.report("b-0").is_warm, box.report("b-0").sandbox) == (True, warm)
        async with box.up():
            await box.until_ready()
            assert box.report("b-0").is_warm, "it is forgotten how it was started"

    box.play(scene)


def test_a_warm_one_that_ended_while_no_warden_ran_is_cleared_away_and_nobody_is_blamed(folder):
    box = Box(folder, warm_most=1)

    async def scene():
        async with box.up():
            await box.want(box.spec("a-0"))
            await box.until_ready()
            warm = await one_waits(box)
        box.world.kill(warm, "the cat pulled the plug")
        async with box.up():
            await box.until(lambda: warm not in box.world.sandboxes and warm not in box.slots.all())
            await box.until_ready()
            assert box.entries("replica.ended", "sandbox.orphan_removed") == []

    box.play(scene)


def test_one_that_was_never_told_the_model_it_was_taken_for_is_replaced_by_the_next_warden(folder):
    box = Box(folder, warm_most=1)

    async def scene():
        async with box.up():
            first = box.spec("a-0")
            await box.want(first)
            await box.until_ready()
            warm = await one_waits(box)
        path = box.config.state_dir / "sandboxes" / warm / "slot.json"
        slot = codec.decode(path.read_bytes(), Slot)  # the warden died between writing this down and speaking
        path.write_bytes(codec.encode(msgspec.structs.replace(slot, replica=box.spec("b-0"))))
        async with box.up():
            await box.want(first, box.spec("b-0"))
            await box.until_ready()
            await box.until(lambda: warm not in box.world.sandboxes)
            assert box.report("b-0").restarts == 0
            assert box.entries("replica.ended") == []

    box.play(scene)


def test_running_and_warm_ones_together_never_hold_more_than_the_box_may_give(folder):
    box = Box(folder, memory_bytes=1000 * MIB, warm_most=4)
    sizes_mib = [100, 150, 100, 400, 100, 250, 150]

    async def scene():
        async with box.up(), box.sampling(lambda: box.granted_bytes) as held:
            for version in (1, 2, 3):
                for count in (1, 3, 2, 5, 7):
                    specs = [
                        box.spec(f"r{n}-0", version=version, memory_bytes=size_mib * MIB) for n, size_mib in enumerate(sizes_mib[:count])
                    ]
                    await box.want(*specs)
                    room_mib = sum(sizes_mib[:count])
                    await (box.until_ready() if room_mib <= 900 else box.looked(10))
                    await box.looked(4)
            await box.want()
            await box.until(lambda: not [name for name in box.running if not name.startswith("warm-")])
        assert max(held) <= 1000 * MIB
        assert max(held) > 900 * MIB, "it was never tight"
        assert len(box.world.sandboxes) <= 4

    box.play(scene)
