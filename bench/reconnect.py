"""A thousand boxes whose broker comes back: how long until all are there again, and how fast does the coordinator answer meanwhile?

``python -m bench.reconnect [--boxes N] [--down-s S] [--rounds N]``

Broker and coordinator are the real programs; the boxes are sim/box.py, the agent's own session and outbox, all in one process that yields
to the others, since boxes are elsewhere. The broker is ended and started again. From that moment on the API is asked, one call after the
other, until every box is online again and nothing is held back.
"""

import argparse
import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import statistics
import time
from collections import Counter
from collections.abc import Iterator

import aiohttp
import msgspec
import structlog
import uvloop

from bench.fleet import Where, boxes_on, deploy
from bench.report import report
from sim.ground import Ground, run, standing, until
from skerry.wire.api import NodeView, StatusView

BAR_P99_MS = 300.0
CALLS = ("/v1/status", "/v1/nodes/box-007", "/v1/deployments/speech-one", "/v1/events?limit=100", "/v1/models", "/v1/nodes")
ONLINE_WITHIN_S = 240.0
BOXES_NICE = 10
ENDED_WITHIN_S = 60.0


def p99(took_ms: list[float]) -> float:
    """Of two at the least."""
    return round(statistics.quantiles(took_ms, n=100, method="inclusive")[98], 1)


class Asked:
    """How long each call took, and what failed."""

    def __init__(self, ground: Ground, session: aiohttp.ClientSession) -> None:
        self._ground = ground
        self._session = session
        self.took_ms: dict[str, list[float]] = {path: [] for path in CALLS}
        self.failed: Counter[str] = Counter()

    async def once(self, path: str) -> bytes:
        """One call; empty where it failed."""
        headers, began = {"Authorization": f"Bearer {self._ground.token}"}, time.perf_counter()
        try:
            async with self._session.get(self._ground.url + path, headers=headers) as response:
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError) as exc:
            self.failed[f"{path}: {type(exc).__name__}"] += 1
            return b""
        if response.status != 200:
            self.failed[f"{path}: {response.status}"] += 1
            return b""
        self.took_ms[path].append((time.perf_counter() - began) * 1000)
        return body

    def figures(self) -> dict[str, object]:
        """Quantiles over all calls, and by call."""
        every = [took for each in self.took_ms.values() for took in each]
        return {
            "calls": len(every), "failed": dict(self.failed), "p50_ms": round(statistics.median(every), 1),
            "p99_ms": p99(every), "max_ms": round(max(every), 1),
            "p99_ms_by_call": {path: p99(each) for path, each in self.took_ms.items() if len(each) > 1},
        }  # fmt: skip


def be_boxes(where: Where, count: int, ramp_s: float) -> None:
    """The boxes, until SIGTERM: a process of its own."""
    os.nice(BOXES_NICE)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))  # a thousand boxes' words
    logging.disable(logging.ERROR)

    async def live() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        async with boxes_on(where, count=count, drops=0.0, ramp_s=ramp_s):
            await stop.wait()

    uvloop.run(live())


@contextlib.contextmanager
def elsewhere(where: Where, count: int, ramp_s: float) -> Iterator[None]:
    """The process of the boxes; it is gone when this closes."""
    process = multiprocessing.get_context("spawn").Process(target=be_boxes, args=(where, count, ramp_s))
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join(ENDED_WITHIN_S)
        process.kill()


async def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """All rounds."""
    count: int = arguments.boxes
    online_s: list[float] = []
    async with (
        standing() as ground,
        contextlib.AsyncExitStack() as stack,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session,
    ):
        stack.enter_context(elsewhere(Where.of(ground), count, count / 40))

        async def all_online() -> bool:
            views = await ground.call(session, "GET", "/v1/nodes", list[NodeView])
            return sum(1 for view in views if view.state == "online" and view.rungs) == count

        await until(all_online, within_s=count / 40 + 120, what=f"{count} boxes online", every_s=1.0)
        await deploy(ground, session, count)
        asked = Asked(ground, session)
        for _ in range(arguments.rounds):
            await ground.kill("broker")
            await asyncio.sleep(arguments.down_s)
            began, is_over, online = time.monotonic(), False, 0
            await ground.start_process("broker")
            while True:
                for path in CALLS:
                    body = await asked.once(path)
                    if path == "/v1/status" and body and (status := msgspec.json.decode(body, type=StatusView)).broker_connected:
                        online, is_over = status.nodes_online, status.nodes_online == count and status.events_missing == 0
                if is_over and time.monotonic() - began > arguments.settle_s:
                    break
                if time.monotonic() - began > ONLINE_WITHIN_S:
                    raise RuntimeError(f"not within {ONLINE_WITHIN_S:.0f} s: {online} of {count} boxes online")
            online_s.append(time.monotonic() - began)
    found = asked.figures()
    return {
        "boxes": count, "rounds": arguments.rounds, "down_s": arguments.down_s,
        "all_online_s": [round(took, 1) for took in online_s], **found,
        "bar_p99_ms": BAR_P99_MS, "reached": float(str(found["p99_ms"])) <= BAR_P99_MS and not found["failed"],
        "load_1min": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.reconnect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--boxes", type=int, default=1000)
    parser.add_argument("--down-s", type=float, default=20.0, help="how long the broker is gone")
    parser.add_argument("--settle-s", type=float, default=45.0, help="how long the API is asked at the least after it is back")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    report("reconnect", **msgspec.to_builtins(run(lambda: measure(arguments))))


if __name__ == "__main__":
    main()
