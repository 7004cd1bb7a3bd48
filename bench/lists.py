"""A registry with a hundred thousand boxes: how fast do lists of them come, by the API and as pages?

``python -m bench.lists [--boxes N] [--rounds N]``

The coordinator is the real program, on a registry that was filled by its own functions: boxes that were enrolled, said what they are,
were told what to do and reported. A caller asks one thing after the other: the first page, a page in the middle, boxes by part of a name,
by a label and by state, as JSON and as the console's page.
"""

import argparse
import asyncio
import sqlite3
import statistics
import sys
import time

import aiohttp
from sqlite_utils import Database as Tables

from bench.report import report
from coordinator.registry import identity, nodes
from sim.ground import Ground, run, standing, until
from skerry.wire.api import StatusView
from skerry.wire.messages import Birth, Desired, Presence, Reported

BAR_P95_MS = 200.0
ASKED = {
    "first page, API": "/v1/nodes?limit=100",
    "middle page, API": "/v1/nodes?limit=100&after=box-050000",
    "part of a name, API": "/v1/nodes?limit=100&q=-0999",
    "label, API": "/v1/nodes?limit=100&q=site%3Dstore-7*",
    "lost, API": "/v1/nodes?limit=100&q=state:lost",
    "first page": "/nodes",
    "part of a name": "/nodes?q=-0999",
    "label": "/nodes?q=site%3Dstore-77",
    "label and state": "/nodes?q=region%3Dnorth+state:lost",
    "nothing is found": "/nodes?q=site%3Dnowhere",
}
UP_WITHIN_S = 120.0


def fill(ground: Ground, boxes: int) -> None:
    """What a hundred thousand boxes leave in a registry."""
    connection = sqlite3.connect(ground.folder / "coordinator" / "registry.db", isolation_level=None)
    tables = Tables(connection, execute_plugins=False)
    tables.execute("BEGIN")
    for number in range(boxes):
        name, labels = f"box-{number:06}", {"site": f"store-{number % 3000}", "region": ("north", "south")[number % 2]}
        online = number % 200 > 1
        birth = Birth("edge", labels, f"https://{name}.example.org:8444", "b", 1, "0.2.0", 8, 2**35, rungs=["process", "container"])
        tables.execute(
            "INSERT INTO enrolled (node, tier, labels, key_sha256, token_sha256, enrolled_at_ms) VALUES (?, 'edge', ?, ?, ?, 1)",
            [name, f'{{"site": "{labels["site"]}"}}', name, name],
        )
        nodes.save_birth(tables, name, birth, 1)
        nodes.save_presence(tables, name, Presence(online, "b", 1), 1)
        nodes.save_desired(tables, Desired(ground.name, name, 1, 1, expires_at_ms=4_000_000_000_000))
        nodes.save_reported(tables, name, Reported(1), 1)
    tables.execute("COMMIT")
    assert len(identity.read_enrolled(tables)) == boxes
    connection.close()


async def measure(boxes: int, rounds: int) -> dict[str, object]:
    """All of it."""
    jar = aiohttp.CookieJar(unsafe=True)  # the coordinator is known by an address here
    async with standing() as ground, aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60), cookie_jar=jar) as session:
        await ground.kill("coordinator")
        began = time.monotonic()
        await asyncio.to_thread(fill, ground, boxes)
        filled_s, began = time.monotonic() - began, time.monotonic()
        await ground.start_process("coordinator")

        async def is_up() -> bool:
            try:
                return (await ground.call(session, "GET", "/v1/status", StatusView)).broker_connected
            except aiohttp.ClientError:
                return False

        await until(is_up, within_s=UP_WITHIN_S, what="a coordinator that answers")
        up_s = time.monotonic() - began
        async with session.post(f"{ground.url}/login", data={"token": ground.token}, headers={"Origin": ground.url}) as entered:
            entered.raise_for_status()
        took_ms: dict[str, list[float]] = {title: [] for title in ASKED}
        size: dict[str, int] = {}
        for _ in range(rounds):
            for title, path in ASKED.items():
                headers = {"Authorization": f"Bearer {ground.token}"} if path.startswith("/v1/") else {}
                began = time.perf_counter()
                async with session.get(ground.url + path, headers=headers) as answer:
                    body = await answer.read()
                    answer.raise_for_status()
                if answer.url.path == "/login":
                    raise RuntimeError("not logged in")
                took_ms[title].append((time.perf_counter() - began) * 1000)
                size[title] = len(body)
    p95 = {title: round(statistics.quantiles(each, n=20, method="inclusive")[18], 1) for title, each in took_ms.items()}
    return {
        "boxes": boxes,
        "filled_s": round(filled_s, 1),
        "up_s": round(up_s, 1),
        "p50_ms": {title: round(statistics.median(each), 1) for title, each in took_ms.items()},
        "p95_ms": p95,
        "kb": {title: round(bytes_ / 1000) for title, bytes_ in size.items()},
        "bar_p95_ms": BAR_P95_MS,
        "met": max(p95.values()) <= BAR_P95_MS,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="bench.lists", description="How fast lists of boxes come from a large registry.")
    parser.add_argument("--boxes", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        sys.exit("bench.lists: --rounds: two at the least")
    report("lists", **run(lambda: measure(arguments.boxes, arguments.rounds)))


if __name__ == "__main__":
    main()
