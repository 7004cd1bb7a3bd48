"""Whoever follows the news is told of all that changed, however often it is cut off."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from coordinator.news import News

TOPICS = ("nodes", "deployments", "events")
steps_ = st.lists(st.one_of(st.sets(st.sampled_from(TOPICS), min_size=1), st.sampled_from(["read", "read", "cut", "lose"])), max_size=12)


async def told_of(steps) -> tuple[list[str], list[str]]:
    """What changed and the reader never heard of, and what it heard of and did not change, once it has read all."""
    news, reader, place = News(), None, ""
    pending: set[str] = set()
    missed: list[str] = []

    async def read() -> list[str]:
        nonlocal reader
        if reader is None:
            since = news.since(place)
            reader = news.follow(since=news.version if since is None else since, pause_s=0, idle_s=0.002)
        return await anext(reader)

    async def cut() -> None:
        nonlocal reader
        if reader is not None:
            await reader.aclose()
            reader = None

    await read()
    place = news.place
    for step in [*steps, "read", "read"]:
        if isinstance(step, set):
            news.tell(*step)
            pending |= step
        elif step == "cut":
            await cut()
        else:
            got = await read()
            if step == "lose":  # the link broke while it was on its way
                await cut()
                continue
            place = news.place
            missed += sorted(set(got) - pending)
            pending -= set(got)
    await cut()
    return sorted(pending), missed


@given(steps_)
def test_nothing_that_changed_is_missed_and_nothing_else_is_told(steps):
    assert asyncio.run(told_of(steps)) == ([], [])


def test_a_place_of_another_process_is_none():
    news, other = News(), News()
    news.tell("nodes")
    assert news.since(news.place) == 1
    assert news.since(other.place) is None
    epoch = news.place.partition("-")[0]
    for nonsense in ("", "-", epoch, f"{epoch}-", f"{epoch}--1", f"{epoch}-2", f"{epoch}-{'9' * 400}", f"{epoch}-x", f"{epoch}-٣"):
        assert news.since(nonsense) is None, nonsense


def test_silence_is_told_of_too():
    async def scene() -> list[str]:
        return await anext(News().follow(since=0, pause_s=0, idle_s=0.001))

    assert asyncio.run(scene()) == []
