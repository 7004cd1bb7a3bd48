"""A registry with a hundred thousand boxes: how fast do lists of them come, by the API and as pages?

``python -m bench.lists [--boxes N] [--rounds N]``

The coordinator is the real program, on a registry that was filled by its own functions: boxes that were enrolled, said what they are, were
told by the planner what to do, one deployment on all of them, and reported. A caller asks one thing after the other: the first page, a page
in the middle, boxes by part of a name, by a label and by state, the fleet at a glance and its map, as JSON and as the console's page.
"""

import argparse
import asyncio
import sqlite3
import statistics
import sys
import time

import aiohttp
import msgspec
import psutil
from sqlite_utils import Database as Tables

from bench.report import report
from coordinator.core import deployment
from coordinator.plan_loop import Terms, replan
from coordinator.registry import deployments, identity, models, nodes
from sim.ground import Ground, run, standing, until
from skerry.wire.api import StatusView
from skerry.wire.fleet import FleetView
from skerry.wire.messages import Birth, ModelRef, Presence, ReplicaReport, Reported

BAR_P95_MS = 200.0
SPEC = "name: scale\nmodel: scale:1\nreplicas: {per_node: 1}\nresources: {memory: 256MiB}\n"
ASKED = {
    "first page, API": "/v1/nodes?limit=100",
    "middle page, API": "/v1/nodes?limit=100&after=box-050000",
    "part of a name, API": "/v1/nodes?limit=100&q=-0999",
    "label, API": "/v1/nodes?limit=100&q=site%3Dstore-7*",
    "lost, API": "/v1/nodes?limit=100&q=state:lost",
    "fleet, API": "/v1/fleet",
    "map, API": "/v1/map",
    "status, API": "/v1/status",
    "fleet": "/",
    "first page": "/nodes",
    "part of a name": "/nodes?q=-0999",
    "label": "/nodes?q=site%3Dstore-77",
    "label and state": "/nodes?q=region%3Dnorth+state:lost",
    "nothing is found": "/nodes?q=site%3Dnowhere",
}
UP_WITHIN_S = 600.0
RESTS_PERCENT = 30.0


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
    model = ModelRef("scale", 1, "a" * 64, 1000)
    models.save_model(tables, model, 1)
    deployments.save_deployment(tables, deployment.parse(SPEC), SPEC, 1)
    terms = Terms(30 * 86_400_000, None)
    now_ms = time.time_ns() // 1_000_000
    for told in replan(tables, fleet=ground.name, now_ms=now_ms, terms=terms, listening_since_ms=now_ms).changed:
        replicas = [ReplicaReport(one.name, one.deployment, one.generation, "ready", sha256=one.model.sha256) for one in told.replicas]
        nodes.save_reported(tables, told.node, Reported(told.generation, replicas), 1)
    tables.execute("COMMIT")
    assert len(identity.read_enrolled(tables)) == boxes
    connection.close()


async def rests(process: psutil.Process) -> bool:
    """Whether it does little for a second: a coordinator that comes up plans once."""
    process.cpu_percent(None)
    await asyncio.sleep(1.0)
    return process.cpu_percent(None) < RESTS_PERCENT


class Begun(msgspec.Struct, frozen=True):
    """How long it took to fill the registry, and the coordinator on it to answer, and to rest."""

    filled_s: float
    up_s: float
    planned_s: float


async def begin_filled(ground: Ground, session: aiohttp.ClientSession, boxes: int) -> Begun:
    """A coordinator on a filled registry that has planned and told all boxes; the session is logged in at its console."""
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
    process = psutil.Process(ground.pid("coordinator"))
    await until(lambda: rests(process), within_s=UP_WITHIN_S, what="a coordinator that has planned")
    planned_s = time.monotonic() - began
    async with session.post(f"{ground.url}/login", data={"token": ground.token}, headers={"Origin": ground.url}) as entered:
        entered.raise_for_status()
    return Begun(round(filled_s, 1), round(up_s, 1), round(planned_s, 1))


async def measure(boxes: int, rounds: int) -> dict[str, object]:
    """All of it."""
    jar = aiohttp.CookieJar(unsafe=True)  # the coordinator is known by an address here
    async with standing() as ground, aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60), cookie_jar=jar) as session:
        begun = await begin_filled(ground, session, boxes)
        fleet = await ground.call(session, "GET", "/v1/fleet", FleetView)
        coordinator = psutil.Process(ground.pid("coordinator"))
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
        resident = coordinator.memory_info().rss
    p95 = {title: round(statistics.quantiles(each, n=20, method="inclusive")[18], 1) for title, each in took_ms.items()}
    return {
        "boxes": boxes,
        "replicas_ready": fleet.deployments[0].ready,
        **msgspec.structs.asdict(begun),
        "resident_mib": round(resident / 2**20),
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
