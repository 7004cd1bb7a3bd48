"""A box that has no link stops what is not to run without one, and nothing else; it knows for how long across restarts."""

import asyncio
import time

import msgspec
import pytest

from edge_agent.warden.link_watch import LinkWatch
from skerry.runtime.proved_time import ProvedTime
from tests.integration.box import Box

HOUR_MS = 3_600_000


@pytest.fixture
def box(tmp_path) -> Box:
    return Box(tmp_path)


def test_what_has_a_limit_is_stopped_once_it_is_reached_and_comes_back_with_the_link(box):
    async def scene():
        cut_off_ms = 0
        async with box.up():
            box.warden.cut_off_ms = lambda: cut_off_ms
            await box.want(box.spec("a-0", stop_after_ms=HOUR_MS), box.spec("b-0"))
            await box.until_ready("a-0")
            await box.until_ready("b-0")
            running = box.running
            cut_off_ms = HOUR_MS - 1
            box.warden.wake()
            await box.looked()
            assert box.running == running
            cut_off_ms = HOUR_MS
            box.warden.wake()
            await box.until(lambda: box.report("a-0").phase == "pending")
            assert "stopped: no link for 3600 s, disconnect.stop_on_box_after is 3600 s" in box.report("a-0").reason
            assert [name for name in box.running if name.startswith("a-0")] == []
            assert box.report("b-0").phase == "ready"
            assert [(entry.subject, entry.text[:7]) for entry in box.entries("replica.cut_off")] == [("a-0", "stopped")]
            cut_off_ms = 0
            box.warden.wake()
            await box.until_ready("a-0")

    box.play(scene)


def test_a_limit_that_is_set_or_changed_restarts_nothing(box):
    async def scene():
        async with box.up():
            spec = box.spec("a-0")
            await box.want(spec)
            await box.until_ready("a-0")
            before = box.running
            await box.want(msgspec.structs.replace(spec, stop_after_ms=HOUR_MS, replaces="another"))
            await box.looked()
            assert box.running == before
            assert box.report("a-0").phase == "ready"

    box.play(scene)


@pytest.fixture
def watch(tmp_path):
    """As each start of the warden makes it, with the grace of the start over."""

    def start(grace_s: float = 0.0) -> LinkWatch:
        proved = ProvedTime(tmp_path / "proved_time.json")
        proved.prove(1_800_000_000_000)
        return LinkWatch(tmp_path / "link.json", proved, grace_s=grace_s, look_s=0.02)

    return start


def test_it_counts_while_nobody_says_that_there_is_a_link(watch):
    link = watch()
    one, other = object(), object()
    link.hear(one, is_up=True)
    link.hear(other, is_up=True)
    time.sleep(0.05)
    assert link.cut_off_ms == 0
    link.hear(one, is_up=False)
    assert link.cut_off_ms == 0, "the other one still says so"
    link.hear(other, is_up=False)
    time.sleep(0.1)
    counted = link.cut_off_ms
    assert 90 <= counted < 5000
    again = watch()
    assert again.cut_off_ms >= counted, "a restart forgets nothing of it"
    again.hear(one, is_up=True)
    assert again.cut_off_ms == 0


def test_after_its_start_it_waits_for_the_agents_word(watch):
    watch().hear(one := object(), is_up=True)
    before = watch()
    before.hear(one, is_up=True)
    before.hear(one, is_up=False)
    time.sleep(0.05)
    assert watch(grace_s=30.0).cut_off_ms == 0


def test_that_there_is_a_link_is_written_down_now_and_then_and_at_the_end(watch, tmp_path):
    async def scene() -> None:
        link, stop = watch(), asyncio.Event()
        link.keep_every_s = lambda: 0.05
        running = asyncio.create_task(link.run(stop))
        link.hear(link, is_up=True)
        async with asyncio.timeout(5):
            while not (tmp_path / "link.json").exists():
                await asyncio.sleep(0.01)
        first = (tmp_path / "link.json").read_bytes()
        link.keep_every_s = lambda: 1000.0
        await asyncio.sleep(0.1)
        stop.set()
        await running
        assert (tmp_path / "link.json").read_bytes() != first

    asyncio.run(scene())
    (tmp_path / "link.json").write_bytes(b"{")
    assert watch().cut_off_ms < 5000, "a damaged file costs what it held, and no start"
