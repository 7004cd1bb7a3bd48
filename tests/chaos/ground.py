"""A whole fleet of a chaos run: broker, signer and coordinator in this process's network, boxes in networks of their own."""

import asyncio
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
from pathlib import Path
from typing import TypeVar

import aiohttp
import msgspec

from sim.checker import BoxState, Kept
from sim.faults import LINK, Fault
from skerry.demo.broker import find_mosquitto
from skerry.wire import codec
from skerry.wire.api import Accepted, DeploymentView, NodeView, Pushed, StatusView
from tests.chaos.callers import MODEL
from tests.chaos.machine import BROKER_PORT, CENTRE, COORDINATOR_PORT, Machine
from tests.chaos.supervisor import Program
from tests.chaos.wire import Weather, run

T = TypeVar("T")

BRIDGE = "br0"
CALL_S = 4.0
UP_WITHIN_S = 60.0
CHANGE_S = (3.0, 8.0)
BOXES = [
    ("edge-1", "edge", {"site": "site-1"}),
    ("edge-2", "edge", {"site": "site-1"}),
    ("edge-3", "edge", {"site": "site-2"}),
    ("cloud-1", "cloud", {"region": "one"}),
]
EVERYWHERE = """
name: everywhere
model: scale:{version}
replicas: {{per_node: 2}}
place: {{tier: [edge, cloud]}}
resources: {{memory: 160MiB}}
slo: {{deadline_ms: 1500}}
"""
COUNTED = """
name: counted
model: scale:1
replicas: {{count: {count}}}
place: {{tier: [edge]}}
resources: {{memory: 160MiB}}
slo: {{deadline_ms: 1500}}
disconnect: {{lost_after: 4s, replace: true}}
"""
BROKER = """
persistence true
persistence_location {folder}/data/
autosave_interval 10
max_queued_messages 50000
max_inflight_messages 200
set_tcp_nodelay true
listener {port} {address}
allow_anonymous true
"""


class Ground:
    """``boxes`` and the centre, below ``folder``."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        self.folder = folder
        self.fleet = f"chaos-{os.getpid()}"
        self.url = f"http://{CENTRE}:{COORDINATOR_PORT}"
        self.boxes = [
            Machine(name, tier, labels, folder / name, index=index, fleet=self.fleet, centre=folder / "centre")
            for index, (name, tier, labels) in enumerate(BOXES)
        ]
        self.centre: dict[str, Program] = {}
        self.twins: list[str] = []
        self.changes = 0
        self._seed = seed
        self._wanted = {MODEL: EVERYWHERE.format(version=1), "counted": COUNTED.format(count=1)}
        self._session: aiohttp.ClientSession | None = None

    # -- up and down

    async def start(self, versions: list[Path]) -> None:
        """Bring everything up, push the model's versions and deploy. Raises RuntimeError."""
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "addr", "add", f"{CENTRE}/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CALL_S))
        await self._start_centre()
        for index, box in enumerate(self.boxes):
            box.make(BRIDGE, seed=self._seed + index)
            await box.boot()
        await self._until(self._all_online, "all boxes are online")
        for version, path in enumerate(versions, start=1):
            await self.call("PUT", f"/v1/models/scale/versions/{version}", Pushed, body=path.read_bytes())
        for text in self._wanted.values():
            await self.call("POST", "/v1/deployments", Accepted, body=text.encode())
        await self._until(self._all_ready, "all replicas are ready")

    async def _start_centre(self) -> None:
        centre = self.folder / "centre"
        for name in ("broker", "signer", "coordinator"):
            (centre / name).mkdir(parents=True)
        (centre / "broker" / "data").mkdir()
        (centre / "broker" / "mosquitto.conf").write_text(
            "user root\n" + BROKER.format(folder=centre / "broker", port=BROKER_PORT, address=CENTRE)
        )
        (centre / "signer" / "signer.toml").write_text(
            f'fleet = "{self.fleet}"\nstate_dir = "{centre}/signer"\nsocket = "{centre}/signer/signer.sock"\n'
        )
        (centre / "coordinator" / "coordinator.toml").write_text(
            f'fleet = "{self.fleet}"\nstate_dir = "{centre}/coordinator"\nlisten = "{CENTRE}:{COORDINATOR_PORT}"\nplain_http = true\n'
            f'public_url = "{self.url}"\nsigner_socket = "{centre}/signer/signer.sock"\nlost_after_s = 4.0\n'
            f'[broker]\nhost = "{CENTRE}"\nport = {BROKER_PORT}\nkeepalive_s = 2\n'
        )
        commands = {
            "broker": [str(find_mosquitto()), "-c", str(centre / "broker" / "mosquitto.conf")],
            "signer": [sys.executable, "-m", "coordinator.signer", "--config", str(centre / "signer" / "signer.toml")],
            "coordinator": [sys.executable, "-m", "coordinator", "--config", str(centre / "coordinator" / "coordinator.toml")],
        }
        for name, argv in commands.items():
            self.centre[name] = Program(name, argv, log=centre / f"{name}.log", sockets=centre, env=dict(os.environ), into=lambda: None)
            self.centre[name].has_watchdog = name != "broker"
            await self.centre[name].start()
        await self._until(self._is_reachable, "the coordinator answers")

    async def stop(self) -> list[str]:
        """End everything; what would not end, or was left."""
        wrong = [line for box in self.boxes for line in await box.destroy()]
        wrong += [f"{name} had to be killed" for name in ("coordinator", "signer", "broker") if not await self.centre[name].end()]
        if self._session is not None:
            await self._session.close()
        return wrong

    # -- what befalls it

    async def befall(self, fault: Fault) -> None:
        """Bring it about, and end it after its time."""
        box = next((box for box in self.boxes if box.name == fault.box), None)
        if box is None:
            await self._befall_centre(fault)
        elif fault.kind in LINK:
            box.wire.weather = weather_of(fault)
            await asyncio.sleep(fault.lasts_s)
            box.wire.weather = Weather()
        else:
            await self._befall_machine(box, fault)

    async def _befall_machine(self, box: Machine, fault: Fault) -> None:
        match fault.kind:
            case "kill":
                _signal(box.pid_of(fault.part, which=int(fault.at_s * 1000)), signal.SIGKILL)
            case "freeze":
                pid = box.pid_of(fault.part, which=int(fault.at_s * 1000))
                _signal(pid, signal.SIGSTOP)
                await asyncio.sleep(fault.lasts_s)
                _signal(pid, signal.SIGCONT)
            case "disk_full":
                await asyncio.to_thread(box.fill_disk)
                await asyncio.sleep(fault.lasts_s)
                await asyncio.to_thread(box.free_disk)
            case "disk_read_only":
                box.break_disk()
                await asyncio.sleep(fault.lasts_s)
                await box.power_off()
                await box.boot()
            case "disk_stuck":
                await asyncio.to_thread(box.stick_disk)
                try:
                    await asyncio.sleep(fault.lasts_s)
                finally:
                    box.free_stuck_disk()
            case "clock":
                box.set_clock(fault.amount)
                await asyncio.sleep(fault.lasts_s)
                box.set_clock(0.0)
            case "memory":
                eater = box.squeeze()
                await asyncio.sleep(fault.lasts_s)
                box.relax(eater)
            case "reboot":
                await box.power_off()
                await asyncio.sleep(fault.lasts_s)
                await box.boot()
            case "twin":
                await self._twin(box, fault)

    async def _twin(self, box: Machine, fault: Fault) -> None:
        """A second machine with a copy of the box's disk, and so with its name."""
        name = f"twin-{len(self.twins)}"
        folder = self.folder / "centre" / name
        self.twins.append(name)
        await asyncio.to_thread(shutil.copytree, box.disk / "agent", folder / "agent", ignore=shutil.ignore_patterns("incoming"))
        text = (box.folder / "settings" / "agent.toml").read_text().replace(f'"{box.disk}/agent"', f'"{folder}/agent"')
        (folder / "agent.toml").write_text(text.replace(f'"{box.folder}/run/', f'"{folder}/'))
        argv = [sys.executable, "-m", "edge_agent.link", "--config", str(folder / "agent.toml")]
        twin = Program(name, argv, log=folder / "agent.log", sockets=folder, env=dict(os.environ), into=lambda: None)
        await twin.start()
        await asyncio.sleep(fault.lasts_s)
        await twin.end(signal.SIGKILL)

    async def _befall_centre(self, fault: Fault) -> None:
        part = fault.part or "broker"
        program = self.centre[part]
        match fault.kind:
            case "broker_restart" | "broker_wipe":
                await program.end(signal.SIGKILL if fault.kind == "broker_wipe" else signal.SIGTERM)
                if fault.kind == "broker_wipe":
                    for path in list((self.folder / "centre" / "broker" / "data").iterdir()):
                        path.unlink()
                await asyncio.sleep(fault.lasts_s)
                await program.start()
            case "centre_kill":
                program.signal(signal.SIGKILL)
            case "centre_freeze":
                pid = program.pid
                _signal(pid, signal.SIGSTOP)
                await asyncio.sleep(fault.lasts_s)
                _signal(pid, signal.SIGCONT)

    async def change_now_and_then(self, until_s: float) -> None:
        """An operator who changes what is deployed; a change that was not acknowledged is tried again."""
        chance = random.Random(f"operator/{self._seed}")
        while time.monotonic() < until_s:
            await asyncio.sleep(chance.uniform(*CHANGE_S))
            name = chance.choice(list(self._wanted))
            self._wanted[name] = (
                EVERYWHERE.format(version=chance.choice((1, 2))) if name == MODEL else COUNTED.format(count=chance.choice((1, 2)))
            )
            await self.tell(name)

    async def tell(self, name: str, *, within_s: float = 60.0) -> None:
        """Deploy what is wanted now, until it is acknowledged. Raises TimeoutError."""
        async with asyncio.timeout(within_s):
            while True:
                with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, RuntimeError):
                    await self.call("POST", "/v1/deployments", Accepted, body=self._wanted[name].encode())
                    self.changes += 1
                    return
                await asyncio.sleep(0.3)

    # -- how it stands

    async def call(self, method: str, path: str, kind: type[T], *, body: bytes | None = None) -> T:
        """One call of the API. Raises RuntimeError on a refusal, and what aiohttp does."""
        assert self._session is not None
        token = (self.folder / "centre" / "coordinator" / "operator.token").read_text().strip()
        data = None if body is None else io.BytesIO(body)
        async with self._session.request(method, self.url + path, data=data, headers={"Authorization": f"Bearer {token}"}) as response:
            answer = await response.read()
            if response.status >= 400:
                raise RuntimeError(f"{method} {path}: {response.status} {answer[:300]!r}")
            return codec.decode(answer, kind, max_bytes=2**28)

    async def _is_reachable(self) -> bool:
        await self.call("GET", "/v1/status", StatusView)
        return True

    async def _all_online(self) -> bool:
        nodes = await self.call("GET", "/v1/nodes", list[NodeView])
        return len(nodes) == len(self.boxes) and all(node.state == "online" and node.rungs for node in nodes)

    async def _all_ready(self) -> bool:
        views = await self.call("GET", "/v1/deployments", list[DeploymentView])
        return len(views) == len(self._wanted) and all(view.wanted and view.ready == view.wanted for view in views)

    async def _until(self, holds, what: str) -> None:
        reason = ""
        deadline = time.monotonic() + UP_WITHIN_S
        while time.monotonic() < deadline:
            try:
                if await holds():
                    return
            except (aiohttp.ClientError, OSError, TimeoutError, RuntimeError) as exc:
                reason = str(exc)
            await asyncio.sleep(0.2)
        raise RuntimeError(f"not within {UP_WITHIN_S:.0f} s: {what} {reason}")

    async def states(self) -> list[BoxState]:
        """Every box, by what the coordinator says of it and by the sandboxes on its disk. Raises as ``call``."""
        nodes = await self.call("GET", "/v1/nodes", list[NodeView])
        views = await self.call("GET", "/v1/deployments", list[DeploymentView])
        wanted = {(placed.node, placed.replica) for view in views for placed in view.placements}
        sandboxes = {box.name: box.sandboxes() for box in self.boxes}
        return [
            BoxState(
                node=node.id,
                is_online=node.state == "online",
                told=node.generation,
                reported=node.reported_generation,
                refused=node.refused,
                wanted=[replica for name, replica in wanted if name == node.id],
                ready=[replica.name for replica in node.replicas if replica.phase == "ready"],
                running=len(sandboxes.get(node.id, [])),
            )
            for node in nodes
        ]

    async def unsettled(self) -> list[str]:
        """What is still on its way to the coordinator, and deployments that are not as they were wanted. Raises as ``call``."""
        found = []
        for node in await self.call("GET", "/v1/nodes", list[NodeView]):
            missing = sum(stream.missing for stream in node.streams if stream.stream == "events")
            if missing or node.outbox_events:
                found.append(f"{node.id}: {missing} events missing, {node.outbox_events} held back")
        views = {view.name: view for view in await self.call("GET", "/v1/deployments", list[DeploymentView])}
        for name, text in self._wanted.items():
            view = views.get(name)
            if view is None or view.text != text or not view.wanted or view.ready != view.wanted:
                found.append(
                    f"{name}: {view.ready if view else 'none'} of {view.wanted if view else 0} ready, {view.problem if view else ''}"
                )
        return found

    async def lost(self) -> dict[str, int]:
        """How many events each box said that it gave up. Raises as ``call``."""
        nodes = await self.call("GET", "/v1/nodes", list[NodeView])
        return {node.id: sum(stream.dropped for stream in node.streams if stream.stream == "events") for node in nodes}

    def kept(self) -> list[Kept]:
        """Every event that a box wrote down, by its own log."""
        return [event for box in self.boxes for event in _kept(box.name, box.folder / "log" / "agent.log")]

    def arrived(self) -> list[Kept]:
        """Every event in the registry."""
        with contextlib.closing(sqlite3.connect(self.folder / "centre" / "coordinator" / "registry.db")) as registry:
            rows = registry.execute("SELECT node, seq, at_ms, kind, subject, text FROM events").fetchall()
        return [Kept(*row) for row in rows]


def weather_of(fault: Fault) -> Weather:
    """What a link is like under a fault."""
    match fault.kind:
        case "cut":
            return Weather(up=False, down=False)
        case "one_way":
            return Weather(up=fault.part == "up", down=fault.part == "down")
        case "loss":
            return Weather(loss=fault.amount)
        case "latency":
            return Weather(latency_s=fault.amount / 2)
        case _:
            return Weather(bits_per_s=fault.amount)


def _kept(node: str, path: Path) -> list[Kept]:
    found = []
    for line in path.read_bytes().splitlines():
        if b'"event.kept"' in line:
            with contextlib.suppress(json.JSONDecodeError, msgspec.ValidationError):  # a line that was cut off
                found.append(msgspec.convert({**json.loads(line), "node": node}, Kept))
    return found


def _signal(pid: int, number: int) -> None:
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
