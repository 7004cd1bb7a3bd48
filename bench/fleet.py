"""A hundred boxes on one coordinator: is every event and sample in its registry once, and how fast are its pages meanwhile?

``python -m bench.fleet [--boxes N] [--seconds S] [--drops SHARE] [--history-min M]``

The broker and the coordinator are the real programs. The boxes are sim/box.py: the agent's own session and outbox, all in this
process. Some are cut off for a while, as a pulled plug does it. At the end the registry is compared with what the boxes remember.

Pages show the last quarter of an hour. A registry that is as full as that fleet's would be comes with ``--history-min 15``: each
box then has so long a backlog when it connects, as after an outage of the broker, and that must arrive too.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import random
import sqlite3
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import msgspec
import structlog

from bench.idle_box import cpu_s, memory_mb
from bench.report import report
from sim.box import SimulatedBox
from sim.ground import Ground, run, standing, until
from skerry.cli import catalogue
from skerry.demo.fleet import free_ports
from skerry.demo.story import CACHE, MODELS
from skerry.demo.uplink import Uplink
from skerry.runtime.settings import Broker
from skerry.wire import signing
from skerry.wire.api import Accepted, DeploymentView, NodeView, Pushed, StatusView

DEPLOYMENTS = ("speech-one", "speech-two")
DEPLOYMENT = """\
name: {name}
model: speech-detector:1
replicas: {{per_node: 1}}
resources: {{memory: 512MiB, cpus: 1.0}}
slo: {{deadline_ms: 300}}
"""
BAR_PAGE_MS = 300.0
KEEPALIVE_S = 10
RAMP_S = 5.0
"""In which the boxes are switched on."""
CUT_S = (5.0, 20.0)
"""How long a box is cut off, at least and at most: some are back before anybody noticed, some after the broker sent their will."""
SETTLE_S = 90.0
"""What the last messages may take: a box that was cut off for long tries again after up to a minute."""
READY_WITHIN_S = 60.0
END_WITHIN_S = 15.0
PAGE_TIMEOUT_S = 10.0
LOOK_EVERY_S = 5.0


class Plugged(msgspec.Struct):
    """A box and, for one that will be cut off, the plug."""

    box: SimulatedBox
    uplink: Uplink | None = None


class Books(msgspec.Struct):
    """What boxes said against what the registry holds, over all boxes. All but the first two must be 0."""

    events: int = 0
    samples: int = 0
    events_absent: int = 0
    events_twice: int = 0
    events_altered: int = 0
    samples_absent: int = 0
    samples_lost: int = 0
    dropped_by_boxes: int = 0
    answers_miscounted: int = 0

    @property
    def wrong(self) -> int:
        """How much does not agree."""
        return sum(getattr(self, name) for name in self.__struct_fields__[2:])


# -- the fleet


class Where(msgspec.Struct, frozen=True):
    """Where boxes connect, and whom they believe."""

    broker_port: int
    fleet: str
    public_keys: str

    @staticmethod
    def of(ground: Ground) -> "Where":
        """That ground."""
        return Where(ground.broker_port, ground.name, (ground.folder / "signer" / "signing.pub").read_text())


@contextlib.asynccontextmanager
async def boxes_on(
    where: Where, *, count: int, drops: float, history_s: float = 0.0, ramp_s: float = RAMP_S
) -> AsyncIterator[list[Plugged]]:
    """So many boxes, switched on over ``ramp_s``; all of them are ended when this closes."""
    trusted = signing.parse_public_keys(where.public_keys)
    plugged, doors = [], iter(free_ports(2 * round(count * drops)))
    for index in range(count):
        uplink, port = None, where.broker_port
        if index < round(count * drops):
            port = next(doors)
            uplink = Uplink(broker_port=where.broker_port, door_port=port, proxy_port=next(doors))
        broker = Broker("127.0.0.1", port, keepalive_s=KEEPALIVE_S)
        box = SimulatedBox(broker=broker, fleet=where.fleet, node=f"box-{index:03}", trusted=trusted)
        box.look_back(history_s, list(DEPLOYMENTS))
        plugged.append(Plugged(box, uplink))
    stop = asyncio.Event()

    async def live(one: Plugged, after_s: float) -> None:
        await asyncio.sleep(after_s)
        if one.uplink is not None:
            await one.uplink.start()
        await one.box.run(stop)

    try:
        async with asyncio.TaskGroup() as tasks:
            lives = [tasks.create_task(live(one, ramp_s * index / count), name=one.box.node) for index, one in enumerate(plugged)]
            try:
                yield plugged
            finally:
                stop.set()
                await asyncio.wait(lives, timeout=END_WITHIN_S)  # else the group would cancel them where this was interrupted
    finally:
        for one in plugged:
            if one.uplink is not None:
                await one.uplink.stop()


async def deploy(ground: Ground, session: aiohttp.ClientSession, count: int) -> float:
    """Two deployments to every box; seconds until every box said that it is ready."""
    manifest = next(manifest for manifest in catalogue.read_catalogue(MODELS) if manifest.name == "speech-detector")
    model = await asyncio.to_thread(catalogue.materialise, manifest, CACHE)
    await ground.call(session, "PUT", f"/v1/models/{manifest.name}/versions/1", Pushed, body=model.read_bytes())
    started = time.monotonic()
    for name in DEPLOYMENTS:
        await ground.call(session, "POST", "/v1/deployments", Accepted, body=DEPLOYMENT.format(name=name).encode())

    async def all_ready() -> bool:
        views = await ground.call(session, "GET", "/v1/deployments", list[DeploymentView])
        return len(views) == len(DEPLOYMENTS) and all(view.ready == view.wanted == count for view in views)

    await until(all_ready, within_s=READY_WITHIN_S, what=f"both deployments are ready on all {count} boxes")
    return time.monotonic() - started


async def cut_off(uplink: Uplink, *, within_s: float, chance: random.Random) -> None:
    """Pull the plug once for a while, and be done after ``within_s``."""
    for_s = min(chance.uniform(*CUT_S), within_s / 2)
    await asyncio.sleep(chance.uniform(0, within_s - for_s))
    uplink.cut()
    try:
        await asyncio.sleep(for_s)
    finally:
        uplink.mend()


# -- what is watched


class Pages:
    """Loads the console's pages, and what their plots ask for, and keeps how long each took that came."""

    def __init__(self, ground: Ground, session: aiohttp.ClientSession, nodes: list[str]) -> None:
        self._ground = ground
        self._session = session
        self._nodes = nodes
        self._chance = random.Random(1)
        self.took_ms: dict[str, list[float]] = {}
        self.failures: Counter[str] = Counter()

    async def load_all(self) -> None:
        """Each once, one after the other."""
        node = self._chance.choice(self._nodes)
        name = self._chance.choice(DEPLOYMENTS)
        for kind, path in (
            ("/", "/"),
            ("/nodes/ID", f"/nodes/{node}"),
            ("/deployments/NAME", f"/deployments/{name}"),
            ("/events", "/events"),
            ("data: /v1/split", f"/v1/split?deployment={name}&node="),
            ("data: /v1/nodes/ID/load", f"/v1/nodes/{node}/load"),
        ):
            started = time.perf_counter()
            failure = await self._load(path)
            if failure:
                self.failures[f"{kind}: {failure}"] += 1
            else:
                self.took_ms.setdefault(kind, []).append((time.perf_counter() - started) * 1000)

    async def _load(self, path: str) -> str:
        """Empty, or why the page did not come."""
        headers = {"Authorization": f"Bearer {self._ground.token}"}
        timeout = aiohttp.ClientTimeout(total=PAGE_TIMEOUT_S)
        try:
            url = self._ground.url + path
            async with self._session.get(url, headers=headers, allow_redirects=False, timeout=timeout) as response:
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError) as exc:
            return str(exc) or type(exc).__name__
        return "" if response.status == 200 and body else f"status {response.status}"

    def figures(self) -> dict[str, dict[str, object]]:
        """Quantiles by page."""
        found: dict[str, dict[str, object]] = {}
        for kind, took_ms in self.took_ms.items():
            cuts = statistics.quantiles(took_ms, n=20, method="inclusive") if len(took_ms) > 1 else took_ms * 19
            found[kind] = {"loads": len(took_ms), "p50": round(cuts[9]), "p95": round(cuts[18]), "max": round(max(took_ms))}
        return found


class Watched(msgspec.Struct):
    """The coordinator's processor time and memory, and this process's, over the run."""

    coordinator_cpu_share: float = 0.0
    coordinator_pss_mb: list[float] = []
    boxes_cpu_share: float = 0.0


async def watch(ground: Ground, seconds: float) -> Watched:
    """Look at the coordinator for so long."""
    pid, found = ground.pid("coordinator"), Watched(coordinator_pss_mb=[])
    before_s, own_before_s, started = cpu_s(pid), cpu_s(os.getpid()), time.monotonic()
    while (left_s := started + seconds - time.monotonic()) > 0:
        await asyncio.sleep(min(LOOK_EVERY_S, left_s))
        found.coordinator_pss_mb.append(memory_mb(pid)[0])
    window_s = time.monotonic() - started
    found.coordinator_cpu_share = (cpu_s(pid) - before_s) / window_s
    found.boxes_cpu_share = (cpu_s(os.getpid()) - own_before_s) / window_s
    return found


# -- the books


def compare(registry: Path, views: list[NodeView], boxes: list[SimulatedBox]) -> Books:
    """The registry, read only, against the boxes' memory."""
    books = Books()
    nodes = {view.id: view for view in views}
    with contextlib.closing(sqlite3.connect(f"file:{registry}?mode=ro", uri=True)) as db:
        for box in boxes:
            epoch = box.outbox.epoch
            rows = db.execute("SELECT seq, kind, subject, text FROM events WHERE node = ? AND epoch = ?", (box.node, epoch)).fetchall()
            said = dict(enumerate(box.outbox.said, 1))
            held = {row[0]: tuple(row[1:]) for row in rows}
            books.events += len(said)
            books.events_absent += len(said.keys() - held.keys())
            books.events_twice += sum((Counter(held.values()) - Counter(said.values())).values()) + len(rows) - len(held)
            books.events_altered += sum(1 for seq, event in said.items() if held.get(seq, event) != event)
            books.samples += box.sampled
            streams = {stream.stream: stream for stream in (nodes[box.node].streams if box.node in nodes else []) if stream.epoch == epoch}
            samples = streams.get("samples")
            books.samples_absent += box.sampled - samples.high + samples.missing if samples else box.sampled
            books.samples_lost += sum(stream.lost for stream in streams.values())
            books.dropped_by_boxes += sum(stream.dropped for stream in streams.values())
        sums = db.execute("SELECT deployment, node, sum(edge), sum(cloud), sum(refused) FROM serve_rollups GROUP BY deployment, node")
        counted = {(deployment, node): (edge, cloud, refused) for deployment, node, edge, cloud, refused in sums}
    for box in boxes:
        for deployment, served in box.served.items():
            truth = (served["edge"], served["cloud"], served["refused"])
            in_registry = counted.get((deployment, box.node), (0, 0, 0))
            books.answers_miscounted += sum(abs(a - b) for a, b in zip(truth, in_registry, strict=True))
    return books


async def settle(ground: Ground, session: aiohttp.ClientSession, boxes: list[SimulatedBox]) -> tuple[Books, float]:
    """The books once they agree, or as they stand after SETTLE_S; and how long that took."""
    started = time.monotonic()
    while True:
        views = await ground.call(session, "GET", "/v1/nodes", list[NodeView])
        books = compare(ground.folder / "coordinator" / "registry.db", views, boxes)
        online = sum(1 for view in views if view.state == "online")
        took_s = time.monotonic() - started
        held = sum(box.outbox.depth()[0] for box in boxes)
        if (books.wrong == 0 and held == 0 and online == len(boxes)) or took_s > SETTLE_S:
            return books, took_s
        await asyncio.sleep(0.5)


async def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """The whole run."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))  # a hundred boxes' words
    logging.disable(logging.WARNING)
    count: int = arguments.boxes
    async with (
        standing() as ground,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session,
        boxes_on(Where.of(ground), count=count, drops=arguments.drops, history_s=arguments.history_min * 60) as plugged,
    ):
        boxes = [one.box for one in plugged]

        async def all_online() -> bool:
            views = await ground.call(session, "GET", "/v1/nodes", list[NodeView])
            return sum(1 for view in views if view.state == "online" and view.rungs) == count

        await until(all_online, within_s=RAMP_S + 60, what=f"{count} boxes online")
        ready_s = await deploy(ground, session, count)

        async def backlog_is_taken() -> bool:
            status = await ground.call(session, "GET", "/v1/status", StatusView)
            return status.samples_missing == 0

        await until(backlog_is_taken, within_s=SETTLE_S, what="every box's backlog arrived", every_s=1.0)
        pages = Pages(ground, session, [box.node for box in boxes])
        chance = random.Random(2)
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(watch(ground, arguments.seconds), name="watch")
            for one in plugged:
                if one.uplink is not None:
                    tasks.create_task(cut_off(one.uplink, within_s=0.75 * arguments.seconds, chance=chance), name=f"{one.box.node}.cut")
            while not watching.done():
                due = time.monotonic() + 1.0
                await pages.load_all()
                await asyncio.sleep(max(0.0, due - time.monotonic()))
        for box in boxes:
            box.quieten()
        books, settled_s = await settle(ground, session, boxes)
        if arguments.log:
            arguments.log.write_bytes((ground.logs / "coordinator.log").read_bytes())
    took = watching.result()
    slowest_ms = max((max(took_ms) for kind, took_ms in pages.took_ms.items() if not kind.startswith("data")), default=0.0)
    return {
        "boxes": count,
        "seconds": arguments.seconds,
        "history_min": arguments.history_min,
        "cut_off": sum(1 for one in plugged if one.uplink is not None),
        "deployments_ready_s": round(ready_s, 2),
        "settled_s": round(settled_s, 1),
        "books": msgspec.to_builtins(books),
        "reached_books": books.wrong == 0,
        "pages_ms": pages.figures(),
        "pages_failed": dict(pages.failures),
        "bar_page_ms": BAR_PAGE_MS,
        "slowest_page_ms": round(slowest_ms),
        "reached_pages": slowest_ms < BAR_PAGE_MS and not pages.failures,
        "coordinator_cpu_share_of_one_core": round(took.coordinator_cpu_share, 3),
        "coordinator_pss_mb": round(max(took.coordinator_pss_mb), 1),
        "boxes_cpu_share_of_one_core": round(took.boxes_cpu_share, 3),
        "load_1min": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--boxes", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--drops", type=float, default=0.2, help="share of the boxes that is cut off once for 5 to 20 s")
    parser.add_argument("--history-min", type=float, default=0.0, help="minutes of samples that each box holds when it connects")
    parser.add_argument("--log", type=Path, help="keep the coordinator's log in this file")
    arguments = parser.parse_args()
    report("fleet", **msgspec.to_builtins(run(lambda: measure(arguments))))


if __name__ == "__main__":
    main()
