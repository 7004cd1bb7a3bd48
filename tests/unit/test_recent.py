"""An answer that many ask for is made once, again when something changed, and no more often than a large fleet can bear."""

import asyncio
import time

import pytest

from coordinator import recent
from coordinator.news import News
from coordinator.recent import MOST, Recent


class Maker:
    """Counts how often it made something, each time in ``takes_s``."""

    def __init__(self, takes_s: float = 0.0) -> None:
        self.made = 0
        self.takes_s = takes_s

    async def __call__(self) -> int:
        await asyncio.sleep(self.takes_s)
        self.made += 1
        return self.made


def test_who_asks_at_the_same_time_gets_the_same():
    async def main():
        make, held = Maker(0.05), Recent(News())
        assert await asyncio.gather(*(held.get("a", make) for _ in range(50))) == [1] * 50
        assert await held.get("b", make) == 2

    asyncio.run(main())


def test_a_cheap_answer_is_of_the_last_change():
    async def main():
        make, news = Maker(), News()
        held = Recent(news)
        assert [await held.get("a", make) for _ in range(3)] == [1, 1, 1]
        for expected in (2, 3):
            news.tell("nodes")
            assert await held.get("a", make) == expected

    asyncio.run(main())


def test_an_answer_that_was_begun_before_a_change_is_not_given_to_who_asks_after_it():
    async def main():
        make, news = Maker(0.03), News()
        held = Recent(news)
        first = asyncio.create_task(held.get("a", make))
        await asyncio.sleep(0.01)
        news.tell("nodes")
        assert await held.get("a", make) == 2
        assert await first == 1

    asyncio.run(main())


def test_an_answer_that_changes_by_itself_is_made_again_after_a_while():
    async def main():
        make, held = Maker(), Recent(News(), by_itself_s=0.05)
        assert [await held.get("a", make) for _ in range(2)] == [1, 1]
        await asyncio.sleep(0.06)
        assert await held.get("a", make) == 2

    asyncio.run(main())


def test_a_dear_answer_rests_although_the_fleet_changes():
    async def main():
        make, news = Maker(0.08), News()
        held = Recent(news)
        assert await held.get("a", make) == 1
        for _ in range(5):
            news.tell("nodes")
            assert await held.get("a", make) == 1
        await asyncio.sleep(0.08 * recent.REST + 0.1)
        began = time.monotonic()
        assert await held.get("a", make) == 1, "the one that is there, while another is made"
        assert time.monotonic() - began < 0.06
        assert await held.get("a", make) == 1
        await asyncio.sleep(0.15)
        assert await held.get("a", make) == 2

    asyncio.run(main())


def test_what_fails_fails_for_all_who_wait_and_is_tried_again():
    async def main():
        calls = []

        async def make() -> int:
            calls.append(1)
            if len(calls) == 1:
                raise RuntimeError("the disk")
            return 7

        held = Recent(News())
        failed = await asyncio.gather(held.get("a", make), held.get("a", make), return_exceptions=True)
        assert [str(one) for one in failed] == ["the disk", "the disk"]
        assert await held.get("a", make) == 7

    asyncio.run(main())


def test_who_goes_away_does_not_end_it_for_the_others():
    async def main():
        make, held = Maker(0.05), Recent(News())
        gone = asyncio.create_task(held.get("a", make))
        await asyncio.sleep(0.01)
        gone.cancel()
        assert await held.get("a", make) == 1

    asyncio.run(main())


def test_so_many_are_kept_and_no_more():
    async def main():
        make, held = Maker(), Recent(News())
        for key in range(MOST + 1):
            await held.get(key, make)
        assert await held.get(MOST, make) == MOST + 1, "the last is held"
        assert await held.get(0, make) == MOST + 2, "the first was let go"

    asyncio.run(main())


@pytest.mark.parametrize("topic", ["nodes", "metrics"])
def test_every_change_counts(topic):
    news = News()
    before = news.version
    news.tell(topic)
    assert news.version > before
