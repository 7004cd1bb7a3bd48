"""A link between two boxes that is as slow and as often down as a recorded one: a TCP proxy that a trace holds back.

``python -m bench.link --listen PORT --to PORT --plan FILE``

While the link is down nothing passes and nobody is told: connections hang, as they do on a road. Both directions share one trace and
have a queue each.
"""

import argparse
import asyncio
import contextlib
import csv
import gzip
import math
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec

from skerry.demo.fleet import free_ports

CHUNK_BYTES = 16 * 1024
MOST_QUEUED = 64
STEP_S = 1.0
MEAN_MBPS, SPREAD, STICKS = 45.0, 0.5, 0.85
OUTAGE_EVERY_S, OUTAGE_LEAST_S, OUTAGE_MOST_S = 12.0, 1.0, 5.0
STEPS_MOST = 24 * 3600
CONNECT_WITHIN_S = 10.0


class Link(msgspec.Struct, frozen=True):
    """Megabits by second in each second, and what a packet takes at least on its way."""

    mbps: list[float]
    one_way_ms: float = 15.0

    def done_s(self, began_s: float, size_bytes: int) -> float:
        """When so many bytes that begin then are through, in seconds from the link's start; after its last second it starts anew."""
        at_s, bits = began_s, size_bytes * 8.0
        for _ in range(STEPS_MOST):
            end_s = math.floor(at_s / STEP_S + 1e-9) * STEP_S + STEP_S
            rate = self.mbps[int(at_s / STEP_S + 1e-9) % len(self.mbps)] * 1e6
            if rate * (end_s - at_s) >= bits:
                return at_s + bits / rate
            bits -= rate * (end_s - at_s)
            at_s = end_s
        return math.inf

    @property
    def down_s(self) -> int:
        """Seconds in which nothing passes."""
        return sum(1 for rate in self.mbps if rate == 0)


def made(seconds: int, seed: int) -> list[float]:
    """A mobile link as those recorded are: rates that stick, spread like a log-normal, and outages."""
    noise = random.Random(seed)
    rates, level, until = [], 0.0, 0
    for second in range(seconds):
        level = STICKS * level + math.sqrt(1 - STICKS**2) * noise.gauss(0, SPREAD)
        if second >= until and noise.random() < STEP_S / OUTAGE_EVERY_S:
            until = second + round(noise.uniform(OUTAGE_LEAST_S, OUTAGE_MOST_S))
        rates.append(0.0 if second < until else MEAN_MBPS * math.exp(level))
    return rates


def recorded(file: Path, name: str, seconds: int) -> tuple[str, list[float]]:
    """A trace of a file of ``trace,t_s,mbps``: the one of that name, else the longest; at most so many seconds, one value each."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with gzip.open(file, "rt", newline="") as lines:
        for row in csv.DictReader(lines):
            found[row["trace"]].append((float(row["t_s"]), float(row["mbps"])))
    chosen = name or max(found, key=lambda one: len(found[one]))
    if chosen not in found:
        raise SystemExit(f"{file.name} has no trace {chosen!r}")
    points = found[chosen]
    seconds = min(seconds, int(points[-1][0] - points[0][0]) + 1)
    rates, index = [], 0
    for second in range(seconds):
        while index + 1 < len(points) and points[index + 1][0] <= points[0][0] + second:
            index += 1
        rates.append(points[index][1])
    return chosen, rates


def with_outages(rates: list[float], seed: int) -> list[float]:
    """The same with outages, where the recording has none."""
    down = made(len(rates), seed)
    return [0.0 if outage == 0 else rate for rate, outage in zip(rates, down, strict=True)]


class Direction:
    """All connections' bytes one way: one after the other through the link."""

    def __init__(self, link: Link, began_s: float) -> None:
        self._link = link
        self._began_s = began_s
        self._free_s = 0.0

    def arrives_s(self, size_bytes: int) -> float:
        """When bytes that are handed over now come out, on time.monotonic."""
        self._free_s = self._link.done_s(max(self._free_s, time.monotonic() - self._began_s), size_bytes)
        return self._began_s + self._free_s + self._link.one_way_ms / 1000


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction) -> None:
    """Carry one connection's bytes one way, in order."""
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MOST_QUEUED)

    async def deliver() -> None:
        while True:
            at_s, data = await queue.get()
            await asyncio.sleep(max(0.0, at_s - time.monotonic()))
            if not data:
                return
            writer.write(data)
            await writer.drain()

    delivery = asyncio.create_task(deliver(), name="link.deliver")
    try:
        while data := await reader.read(CHUNK_BYTES):
            await queue.put((direction.arrives_s(len(data)), data))
        await queue.put((direction.arrives_s(1), b""))
        await delivery
    finally:
        delivery.cancel()


async def proxy(link: Link, listen: int, to: int) -> None:
    """For ever."""
    began_s = time.monotonic()
    there, back = Direction(link, began_s), Direction(link, began_s)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            async with asyncio.timeout(CONNECT_WITHIN_S):
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", to)
            ways = [asyncio.create_task(pump(reader, far_writer, there)), asyncio.create_task(pump(far_reader, writer, back))]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            far_writer.close()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", listen)
    await server.serve_forever()


@contextlib.contextmanager
def running(link: Link, *, to: int, folder: Path) -> Iterator[int]:
    """The link in a process of its own, from now on; yields its port."""
    (port,) = free_ports(1)
    plan = folder / f"link-{port}.json"
    plan.write_bytes(msgspec.json.encode(link))
    argv = [sys.executable, "-m", "bench.link", "--listen", str(port), "--to", str(to), "--plan", str(plan)]
    process = subprocess.Popen(argv)
    try:
        yield port
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Carry until ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listen", type=int, required=True)
    parser.add_argument("--to", type=int, required=True)
    parser.add_argument("--plan", type=Path, required=True)
    arguments = parser.parse_args()
    asyncio.run(proxy(msgspec.json.decode(arguments.plan.read_bytes(), type=Link), arguments.listen, arguments.to))


if __name__ == "__main__":
    main()
