"""Tasks that are ended are over, whatever they make of it."""

import asyncio
import contextlib

from skerry.runtime import lifecycle


def test_a_task_that_loses_its_cancellation_is_ended_all_the_same():
    async def scene() -> None:
        news = asyncio.Event()

        async def loop() -> None:
            while True:
                with contextlib.suppress(asyncio.CancelledError):  # once, as wait_for of Python 3.11 does
                    await news.wait()
                    return
                await asyncio.sleep(60)

        async def fails() -> None:
            raise ValueError("its own affair")

        tasks = [asyncio.create_task(loop()), asyncio.create_task(fails()), asyncio.create_task(asyncio.sleep(60))]
        await asyncio.sleep(0)
        await asyncio.wait_for(lifecycle.end(*tasks), 5)
        assert all(task.done() for task in tasks)
        await lifecycle.end()

    asyncio.run(scene())
