"""A whole real fleet for tests: it runs in an event loop of its own thread, tests talk to it as anybody would."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.gateway.routes import LOOK_S
from skerry.cli.client import Coordinator, Login
from skerry.demo.fleet import Box, Fleet
from skerry.wire.api import DeploymentView, EventView, NodeView, StatusView


class World:
    """``fleet`` is up; ``api`` is its coordinator's."""

    def __init__(self, fleet: Fleet, loop: asyncio.AbstractEventLoop) -> None:
        self.fleet = fleet
        self._loop = loop

    @property
    def api(self) -> Coordinator:
        return Coordinator(Login(self.fleet.url, self.fleet.token))

    def do(self, coroutine: Any) -> Any:
        """Run something in the fleet's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    def box(self, name: str) -> Box:
        return next(box for box in self.fleet.boxes if box.name == name)

    def nodes(self) -> list[NodeView]:
        return self.api.call("GET", "/v1/nodes", list[NodeView])

    def node(self, name: str) -> NodeView:
        return self.api.call("GET", f"/v1/nodes/{name}", NodeView)

    def deployment(self, name: str) -> DeploymentView:
        return self.api.call("GET", f"/v1/deployments/{name}", DeploymentView)

    def status(self) -> StatusView:
        return self.api.call("GET", "/v1/status", StatusView)

    def events(self, **query: str) -> list[EventView]:
        return self.api.call("GET", "/v1/events", list[EventView], query={"limit": "1000", **query})

    def push(self, path: Path, name: str, version: int = 1) -> None:
        self.api.call("PUT", f"/v1/models/{name}/versions/{version}", msgspec.Raw, body=path.read_bytes())

    def deploy(self, text: str) -> None:
        self.api.call("POST", "/v1/deployments", msgspec.Raw, body=text.encode())

    def wait_ready(self, name: str, within_s: float = 40) -> DeploymentView:
        wait_until(
            lambda: (view := self.deployment(name)).wanted > 0 and view.ready == view.wanted, within_s, lambda: self.deployment(name)
        )
        time.sleep(3 * LOOK_S)  # a gateway may look at its route table only after its box has said that a replica is ready
        return self.deployment(name)

    def cli(self, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """The command line, as a process of its own."""
        env = {**os.environ, "SKERRY_URL": self.fleet.url, "SKERRY_TOKEN": self.fleet.token, "COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, "-m", "skerry", *arguments], input=stdin, env=env, capture_output=True, timeout=120, check=False
        )

    def log_tails(self) -> str:
        """The ends of all logs, for a failure's message."""
        return "\n".join(
            f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-8:])
            for path in sorted(self.fleet.logs.glob("*.log"))
        )


def wait_until(holds: Callable[[], bool], within_s: float, what: Callable[[], object] = lambda: "") -> None:
    """Poll until it holds; says what stood instead."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what()}"
        time.sleep(0.1)


@contextlib.contextmanager
def running(
    *,
    broker_kind: str = "embedded",
    drivers: tuple[str, ...] = ("bubblewrap",),
    wait: bool = True,
    warm_most: int = 0,
    model_keys: bytes = b"",
) -> Iterator[World]:
    """Bring a fleet up in a directory of its own and take it down again, to the last process. ``model_keys`` are public ones (PEM), by
    which coordinator and boxes then ask models to be signed."""
    folder = Path(tempfile.mkdtemp(prefix="sk-", dir="/tmp"))
    fleet = Fleet(folder, broker_kind=broker_kind, drivers=list(drivers), warm_most=warm_most)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="fleet")
    thread.start()
    world = World(fleet, loop)
    try:
        fleet.prepare()
        if model_keys:
            (folder / "model-keys.pem").write_bytes(model_keys)
            for config in (folder / "coordinator" / "coordinator.toml", *folder.glob("boxes/*/warden.toml")):
                config.write_text(f'model_keys_file = "{folder}/model-keys.pem"\n{config.read_text()}')
        world.do(fleet.start())
        if wait:
            wait_until(
                lambda: len(nodes := world.nodes()) == len(fleet.boxes) and all(n.state == "online" and n.rungs for n in nodes),
                40,
                lambda: f"{[(n.id, n.state, n.rungs) for n in world.nodes()]}\n{world.log_tails()}",
            )
        yield world
    finally:
        stubborn = world.do(fleet.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        left = fleet.left_behind()
        shutil.rmtree(folder, ignore_errors=True)
        assert not stubborn, f"had to be killed: {stubborn}"
        assert not left, left
