"""Simulated boxes on a real broker and coordinator, and the books that bench/fleet.py keeps of them."""

import asyncio

import aiohttp
import pytest
import uvloop

from bench import fleet
from bench.fleet import Books
from sim.ground import standing, until
from skerry.wire.api import DeploymentView, NodeView

BOXES = 4


async def _run() -> tuple[Books, dict[str, Books], list[NodeView], list[DeploymentView]]:
    """Four boxes for a few seconds, one of them cut off meanwhile; the books as they stand, and as they stand after planted faults."""
    async with (
        standing() as ground,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session,
        fleet.boxes_on(fleet.Where.of(ground), count=BOXES, drops=0.25) as plugged,
    ):
        boxes = [one.box for one in plugged]

        async def all_online() -> bool:
            views = await ground.call(session, "GET", "/v1/nodes", list[NodeView])
            return sum(1 for view in views if view.state == "online" and view.rungs) == BOXES

        await until(all_online, within_s=30, what="all boxes online")
        await fleet.deploy(ground, session, BOXES)
        await asyncio.sleep(1.5)
        uplink = plugged[0].uplink
        assert uplink is not None
        uplink.cut()
        await asyncio.sleep(3)
        uplink.mend()
        await asyncio.sleep(1.5)
        for box in boxes:
            box.quieten()
        books, _ = await fleet.settle(ground, session, boxes)
        views = await ground.call(session, "GET", "/v1/nodes", list[NodeView])
        deployments = await ground.call(session, "GET", "/v1/deployments", list[DeploymentView])
        registry = ground.folder / "coordinator" / "registry.db"

        def books_now() -> Books:
            return fleet.compare(registry, views, boxes)

        box, planted = boxes[0], {}
        box.outbox.said.append(("planted", box.node, "never sent"))
        planted["an event that never came"] = books_now()
        box.outbox.said.pop()
        last = box.outbox.said.pop()
        planted["an event that nobody said"] = books_now()
        box.outbox.said.append((last[0], last[1], "something else"))
        planted["an event with another text"] = books_now()
        box.outbox.said[-1] = last
        box.sampled += 1
        planted["a sample that never came"] = books_now()
        box.sampled -= 1
        next(iter(box.served.values())).update({"edge": 3})
        planted["answers that were not counted"] = books_now()
        return books, planted, views, deployments


@pytest.fixture(scope="module")
def outcome():
    return uvloop.run(asyncio.wait_for(_run(), 150))


@pytest.mark.timeout(180)
def test_what_boxes_say_stands_in_the_registry_once_even_if_one_is_cut_off_meanwhile(outcome):
    books, _, views, deployments = outcome
    assert books.wrong == 0, books
    assert books.events > 4 * BOXES
    assert books.samples > 3 * BOXES
    assert [view.state for view in views] == ["online"] * BOXES
    assert [(view.ready, view.wanted) for view in deployments] == [(BOXES, BOXES)] * 2


@pytest.mark.parametrize(
    ("fault", "field", "least"),
    [
        ("an event that never came", "events_absent", 1),
        ("an event that nobody said", "events_twice", 1),
        ("an event with another text", "events_altered", 1),
        ("a sample that never came", "samples_absent", 1),
        ("answers that were not counted", "answers_miscounted", 3),
    ],
)
def test_the_books_show_a_planted_fault(outcome, fault, field, least):
    assert getattr(outcome[1][fault], field) >= least
