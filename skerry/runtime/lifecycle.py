"""How a Skerry program starts and stops: settings, lock, logs, signals, systemd, exit status."""

import argparse
import asyncio
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import uvloop

from skerry import __version__
from skerry.runtime import durable, log, sdnotify, settings

T = TypeVar("T")

STOP_BUDGET_S = 6.0
"""What a program may take to end by itself after SIGTERM; then whatever it waits for is cut short. Under the units' TimeoutStopSec."""
CANCEL_AGAIN_S = 0.2
EXIT_CONFIG = 78
"""EX_CONFIG of sysexits(3): the settings are wrong, starting again will not help."""


async def sleep_until(stop: asyncio.Event, seconds: float) -> bool:
    """Wait for ``seconds`` or until ``stop`` is set; says whether it was set."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)
    return stop.is_set()


def in_a_thread_of_its_own(work: Callable[[], T]) -> "asyncio.Future[T]":
    """The result of a call that may never return: of a driver that hangs, mostly. Nothing waits for its thread, not even the end of the
    program."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: BaseException | None) -> None:
        if result.done():
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(cast("T", value))

    def run() -> None:
        value, error = None, None
        try:
            value = work()
        except Exception as exc:  # noqa: BLE001 - whoever awaits it gets it
            error = exc
        with contextlib.suppress(RuntimeError):  # the loop is over
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, name="lifecycle.own", daemon=True).start()
    return result


async def first_of(*events: asyncio.Event, within_s: float | None) -> None:
    """Wait until one of ``events`` is set, ``within_s`` at most; None for however long it takes."""
    waits = [asyncio.create_task(event.wait(), name="lifecycle.first_of") for event in events]
    try:
        await asyncio.wait(waits, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks until they are over; what they raise is theirs alone.

    Once is not enough: ``wait_for`` of Python 3.11, which aiomqtt uses too, forgets a cancellation that comes in the moment in which
    what it waits for is there, and a loop around it would go on for ever.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN_S)
    await asyncio.gather(*tasks, return_exceptions=True)


class Pulse:
    """Of a loop that does a program's work: it beats on each turn, and whoever feeds the watchdog asks whether it still does."""

    def __init__(self) -> None:
        self._at = time.monotonic()

    def beat(self) -> None:
        """Another turn."""
        self._at = time.monotonic()

    def beats(self, *, within_s: float) -> bool:
        """Whether there was one lately."""
        return time.monotonic() - self._at < within_s


async def feed_watchdog(stop: asyncio.Event, alive: Callable[[], bool]) -> None:
    """Tell systemd that the program works for as long as ``alive`` says so."""
    interval_s = sdnotify.watchdog_interval_s()
    while interval_s and not await sleep_until(stop, interval_s):
        if alive():
            sdnotify.notify("WATCHDOG=1")


async def _until_signalled(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    working = asyncio.ensure_future(main(stop))
    stopping = asyncio.create_task(stop.wait(), name="lifecycle.stop")
    await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    sdnotify.notify("STOPPING=1")
    if not working.done():
        await asyncio.wait([working], timeout=STOP_BUDGET_S)
    if not working.done():
        log.get("lifecycle").warning("stop.forced", after_s=STOP_BUDGET_S)
        working.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await working


def run(
    program: str,
    kind: type[T],
    main: Callable[..., Awaitable[None]],
    *,
    state_dir: Callable[[T], Path | None],
    before_loop: Callable[[T], dict[str, object]] | None = None,
) -> None:
    """Parse ``--config``, take the state directory's lock and run ``main(config, stop)`` until SIGTERM or SIGINT.

    ``before_loop`` is called with the settings while there is neither a thread nor an event loop, and returns further keyword arguments
    for ``main``. ``main`` calls ``sdnotify.notify("READY=1")`` itself once it serves, and returns soon after ``stop`` is set.
    """
    parser = argparse.ArgumentParser(prog=program, description=(sys.modules["__main__"].__doc__ or "").strip())
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(f"/etc/skerry/{program.removeprefix('skerry-')}.toml"),
        help="TOML settings (default: %(default)s)",
    )
    parser.add_argument("--check", action="store_true", help="check the settings and exit")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    arguments = parser.parse_args()
    try:
        config = settings.load(arguments.config, kind)
    except settings.SettingsError as exc:
        sys.stderr.write(f"{program}: {exc}\n")
        sys.exit(EXIT_CONFIG)
    if arguments.check:
        sys.stdout.write(f"{arguments.config}: fine\n")
        return
    log.configure(program)
    folder = state_dir(config)
    try:
        held = None if folder is None else durable.lock(folder, program)
    except (durable.AlreadyRunning, OSError) as exc:
        sys.stderr.write(f"{program}: {exc}\n")
        sys.exit(EXIT_CONFIG)
    try:
        more = before_loop(config) if before_loop is not None else {}
        uvloop.run(_until_signalled(lambda stop: main(config, stop, **more)))
    except settings.SettingsError as exc:
        sys.stderr.write(f"{program}: {exc}\n")
        sys.exit(EXIT_CONFIG)
    finally:
        del held
