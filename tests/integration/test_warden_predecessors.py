"""A box whose wanted version can't run serves what served before, whatever befalls it meanwhile."""

import hashlib

import pytest

from edge_agent.warden.drivers.fake import BAD_MODEL
from edge_agent.warden.store import Store
from skerry.runtime import keys
from tests.integration.box import Box
from tests.integration.test_warden_updates import settled, versions
from tests.integration.test_warden_vouching import vouched


def served(box: Box) -> list[int]:
    return [version for version, sandboxes in versions(box) if sandboxes]


async def until_served(box: Box, version: int) -> None:
    """By a warden that has looked: the gateway's file alone may be of the one before it."""
    await box.until(lambda: box.warden.state and served(box) == [version] and len(box.running) == 1)


@pytest.mark.parametrize("update", ["hand_over", "recreate"])
def test_a_version_that_is_not_here_yet_leaves_the_one_before_serving_through_ends_and_a_boot_without_a_link(tmp_path, update):
    box = Box(tmp_path)

    async def scene():
        async with box.up():
            await box.want(box.spec(version=1, update=update))
            await settled(box)
            box.warden.accept(box.document(second := box.spec(version=2, update=update)))  # nobody brings its bytes
            await box.looked(5)
            assert served(box) == [1]
            box.world.kill(next(iter(box.running)), "fell over")
            await box.until_noticed(lambda: box.entries("replica.ended"))
            await until_served(box, 1)
        box.lose_power()
        async with box.up():
            await until_served(box, 1)
            assert [model.version for model in box.warden.state.needs] == [2]
            box.bring(second.model)
            await box.warden.arrived(second.model.sha256, "")
            await until_served(box, 2)
            assert box.report().generation == 2

    box.play(scene)


def test_a_version_that_was_given_up_leaves_the_one_before_serving_through_a_reboot_and_is_not_tried_again(tmp_path):
    box = Box(tmp_path, crash_loop_after=2)

    async def scene():
        async with box.up():
            await box.want(box.spec(version=1))
            await settled(box)
            await box.want(box.spec(version=2, content=BAD_MODEL))
            await box.until(lambda: box.report().is_crash_loop)
            tries = [entry.text for entry in box.entries("replica.started") if "m:2" in entry.text]
        for _ in range(2):
            box.lose_power()
            async with box.up():
                await until_served(box, 1)
                assert (box.report().phase, box.report().is_crash_loop, box.report().generation) == ("failed", True, 2)
                await box.looked(5)
                assert [entry.text for entry in box.entries("replica.started") if "m:2" in entry.text] == tries
        async with box.up():
            await box.want(box.spec(version=3))
            await until_served(box, 3)

    box.play(scene)


def test_what_served_before_is_nothing_to_a_replica_that_is_wanted_no_more(tmp_path):
    box = Box(tmp_path)

    async def scene():
        async with box.up():
            await box.want(box.spec(version=1))
            await settled(box)
            await box.want()
            await box.until(lambda: box.world.sandboxes == {})
            box.warden.accept(box.document(box.spec(version=2)))
            await box.looked(5)
            assert box.world.sandboxes == {}

    box.play(scene)


def test_the_version_before_does_not_come_back_where_its_key_is_trusted_no_more(tmp_path):
    box, old, new = Box(tmp_path), keys.made(), keys.made()

    async def scene():
        first, second = box.spec(version=1), box.spec(version=2)
        box.model_keys = [old.public_key()]
        async with box.up():
            await box.want(first, signatures=vouched(first, key=old))
            await settled(box)
            box.warden.accept(box.document(second, signatures=vouched(second, key=old)))
        box.lose_power()
        async with box.up():
            await until_served(box, 1)
        box.model_keys = [new.public_key()]
        box.lose_power()
        async with box.up():
            await box.until(lambda: (report := box.report()) and report.phase == "failed")
            await box.looked(5)
            assert box.running == {}

    box.play(scene)


def test_the_bytes_of_what_served_before_are_kept_and_a_damaged_record_of_it_costs_no_start(tmp_path):
    box = Box(tmp_path)

    async def scene():
        async with box.up():
            await box.want(box.spec(version=1))
            await settled(box)
        (box.config.state_dir / "served.json").write_bytes(b"{")
        box.lose_power()
        async with box.up():
            await until_served(box, 1)
            await box.want(box.spec(version=2))
            await until_served(box, 2)
            assert hashlib.sha256(b"version 1").hexdigest() in Store(box.config.state_dir).models()

    box.play(scene)
