"""Which sandboxes a warden can offer, and when it finds out."""

import asyncio

from edge_agent.warden.drivers.fake import FakeDriver, FakeWorld
from edge_agent.warden.offer import Offer
from edge_agent.warden.ports import NOBODY, SandboxSpec


def test_a_driver_that_works_later_is_found_later_and_stands_where_it_was_preferred():
    async def story() -> None:
        late, there = FakeWorld(), FakeWorld()
        late.fail.add("probe")
        first, second = FakeDriver(late, rung="container"), FakeDriver(there, rung="process")
        offer, found, stop = Offer([first, second], again_s=(0.05, 0.1)), asyncio.Event(), asyncio.Event()
        working, absent = offer.working, offer.absent
        await offer.look()
        assert working == [second]
        assert "the script says" in absent["container"]
        assert "process" not in absent
        looking = asyncio.create_task(offer.run(stop, found.set))
        await asyncio.sleep(0.3)
        assert working == [second]
        assert not found.is_set()
        late.fail.clear()
        await asyncio.wait_for(found.wait(), 10)
        assert working == [first, second]
        assert "container" not in absent
        assert absent["gvisor"]
        await asyncio.wait_for(looking, 10)  # all are there: nothing is left to try

    asyncio.run(story())


def test_a_driver_whose_sandboxes_run_works_although_no_other_can_be_tried_now(tmp_path):
    async def story() -> None:
        world = FakeWorld()
        driver = FakeDriver(world)
        (tmp_path / "model").mkdir()
        (tmp_path / "run").mkdir()
        spec = SandboxSpec(
            name="one", argv=["x"], model_dir=tmp_path / "model", socket_dir=tmp_path / "run", memory_bytes=2**20, cpus=1.0, uid=NOBODY
        )
        await driver.start(spec)
        world.fail.add("probe")
        offer = Offer([driver])
        assert await offer.look()
        assert offer.working == [driver]
        await driver.stop("one", grace_s=0)
        offer = Offer([driver])
        assert not await offer.look()
        assert offer.working == []
        world.close()

    asyncio.run(story())
