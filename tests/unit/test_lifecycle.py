"""Tasks that are ended are over, whatever they make of it."""

import asyncio
import contextlib
import socket

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


def test_the_watchdog_is_fed_while_the_loop_that_works_turns_and_no_longer(tmp_path, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "n"))
    monkeypatch.setenv("WATCHDOG_USEC", str(3 * 50_000))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "n"))
        systemd.setblocking(False)

        def heard() -> int:
            count = 0
            with contextlib.suppress(BlockingIOError):
                while systemd.recv(100) == b"WATCHDOG=1":
                    count += 1
            return count

        async def scene() -> None:
            pulse, stop = lifecycle.Pulse(), asyncio.Event()
            feeding = asyncio.create_task(lifecycle.feed_watchdog(stop, lambda: pulse.beats(within_s=0.2)))
            for _ in range(10):
                pulse.beat()
                await asyncio.sleep(0.05)
            assert heard() >= 3
            await asyncio.sleep(0.3)
            heard()
            await asyncio.sleep(0.3)
            assert heard() == 0, "the program lives, and its work stands still"
            pulse.beat()
            await asyncio.sleep(0.15)
            assert heard() >= 1
            stop.set()
            await feeding

        asyncio.run(scene())
