"""A console that people leave open: how soon does a page show something, what does it weigh, and what do fifty viewers of it cost?

``python -m bench.console [--boxes N] [--viewers N] [--seconds N]``

The coordinator is the real program on a registry as of ``bench.lists``. Pages are opened in a real Chromium, and timed by its own clock.
Then viewers follow the stream as the console's script does, and ask for the first page again when something changed, while a box is drained
and let go again every second; a few of them read nothing of what they are sent.
"""

import argparse
import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator

import aiohttp
import psutil
from playwright.async_api import async_playwright

from bench.lists import begin_filled
from bench.report import report
from sim.ground import Ground, run, standing
from skerry.wire.api import LoginLink

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
PAGES = {"fleet": "/", "boxes": "/nodes", "a box": "/nodes/box-000002", "a deployment": "/deployments/scale", "rollouts": "/rollouts"}
OPENED = 5
BAR_FCP_MS, BAR_KB = 500.0, 300.0
EVERY_S = 1.0
STALLED = 5
TIMES = """() => ({
  fcp: performance.getEntriesByName("first-contentful-paint")[0]?.startTime ?? null,
  bytes: [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")]
    .reduce((sum, one) => sum + one.transferSize, 0),
})"""


async def pages(ground: Ground, session: aiohttp.ClientSession) -> tuple[dict[str, float], dict[str, float]]:
    """By page, the median of the first contentful paint in milliseconds, and kB that went over the wire with nothing kept before."""
    paints: dict[str, float] = {}
    weights: dict[str, float] = {}
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        for title, path in PAGES.items():
            times, bytes_ = [], []
            for _ in range(OPENED):
                context = await browser.new_context()
                page = await context.new_page()
                link = await ground.call(session, "POST", "/v1/login-links", LoginLink)
                await page.goto(link.url.replace("/login?", "/login?next=%2Faccount&"))
                fresh = await browser.new_context(storage_state=await context.storage_state())
                shown = await fresh.new_page()
                await shown.goto(ground.url + path)
                await shown.wait_for_timeout(1200)
                found = await shown.evaluate(TIMES)
                times.append(float(found["fcp"]))
                bytes_.append(found["bytes"] / 1000)
                await fresh.close()
                await context.close()
            paints[title], weights[title] = round(statistics.median(times), 1), round(statistics.median(bytes_), 1)
        await browser.close()
    return paints, weights


class Viewer:
    """Follows the stream, and asks for the first page when it says that something changed."""

    def __init__(self, ground: Ground, session: aiohttp.ClientSession) -> None:
        self._ground = ground
        self._session = session
        self.heard: list[float] = []
        self.took_ms: list[float] = []

    async def run(self) -> None:
        headers = {"Authorization": f"Bearer {self._ground.token}"}
        async with self._session.get(f"{self._ground.url}/v1/stream", headers=headers) as stream:
            looked = 0.0
            async for line in stream.content:
                if line.startswith(b"event: nodes"):
                    self.heard.append(time.monotonic())
                    if time.monotonic() - looked >= EVERY_S:
                        looked = time.monotonic()
                        async with self._session.get(f"{self._ground.url}/?fragment=1") as answer:
                            await answer.read()
                            answer.raise_for_status()
                        self.took_ms.append((time.monotonic() - looked) * 1000)


@contextlib.asynccontextmanager
async def stalled(ground: Ground, count: int) -> AsyncIterator[None]:
    """Viewers who ask for the stream and read nothing of it."""
    host, _, port = ground.url.removeprefix("http://").partition(":")
    opened = [await asyncio.open_connection(host, int(port)) for _ in range(count)]
    for _, writer in opened:
        writer.write(f"GET /v1/stream HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {ground.token}\r\n\r\n".encode())
    yield
    for _, writer in opened:
        writer.close()


async def viewers(ground: Ground, session: aiohttp.ClientSession, count: int, seconds: float) -> dict[str, object]:
    """What they get, and what they cost."""
    process = psutil.Process(ground.pid("coordinator"))
    before = process.memory_info().rss
    async with stalled(ground, STALLED):
        looking = [Viewer(ground, session) for _ in range(count)]
        tasks = [asyncio.create_task(viewer.run()) for viewer in looking]
        await asyncio.sleep(3)
        process.cpu_percent(None)
        changed, end = [], time.monotonic() + seconds
        headers = {"Authorization": f"Bearer {ground.token}"}
        while time.monotonic() < end:
            method = "DELETE" if len(changed) % 2 else "PUT"
            async with session.request(method, f"{ground.url}/v1/nodes/box-000002/drain", headers=headers, json={"reason": ""}) as answer:
                answer.raise_for_status()
            changed.append(time.monotonic())
            await asyncio.sleep(EVERY_S)
        cpu = process.cpu_percent(None)
        failed = [task for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    lags = [
        min((at - change for at in viewer.heard if at >= change - 0.05), default=9.9) * 1000
        for viewer in looking
        for change in changed[:-1]
    ]
    took = [ms for viewer in looking for ms in viewer.took_ms]
    return {
        "viewers": count,
        "ended_early": len(failed),
        "heard_p95_ms": round(statistics.quantiles(lags, n=20)[18], 1),
        "fragment_p50_ms": round(statistics.median(took), 1),
        "fragment_p95_ms": round(statistics.quantiles(took, n=20)[18], 1),
        "coordinator_cpu_percent": round(cpu, 1),
        "grown_mib": round((process.memory_info().rss - before) / 2**20, 1),
    }


async def measure(boxes: int, count: int, seconds: float) -> dict[str, object]:
    """All of it."""
    jar = aiohttp.CookieJar(unsafe=True)  # the coordinator is known by an address here
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        standing() as ground,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None), cookie_jar=jar, connector=connector) as session,
    ):
        await begin_filled(ground, session, boxes)
        paints, weights = await pages(ground, session)
        followed = await viewers(ground, session, count, seconds)
    return {
        "boxes": boxes,
        "first_contentful_paint_ms": paints,
        "kb": weights,
        **followed,
        "bar_first_contentful_paint_ms": BAR_FCP_MS,
        "bar_kb": BAR_KB,
        "met": max(paints.values()) <= BAR_FCP_MS and max(weights.values()) <= BAR_KB,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="bench.console", description="What a page of the console costs who opens it, and fifty viewers the coordinator."
    )
    parser.add_argument("--boxes", type=int, default=1000)
    parser.add_argument("--viewers", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=30.0)
    arguments = parser.parse_args()
    report("console", **run(lambda: measure(arguments.boxes, arguments.viewers, arguments.seconds)))


if __name__ == "__main__":
    main()
