"""A box that boots with no network, broker or coordinator: from the start of its three programs to the first correct answer, from disk.

``python -m bench.cold_boot [--driver bubblewrap|docker|gvisor] [--docker-socket PATH] [--rounds N]``

What a power cut leaves is what is on the disk: each round ends every process of the box, sandboxes included, and removes what lies in
/run on a real one: the route table and the sockets. Broker and coordinator are dead for all rounds.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import statistics
import time
from pathlib import Path

import aiohttp
import docker
import msgspec

from bench.deploy_time import DEPLOYMENT, MODEL, NAME, question
from bench.report import report
from sim.ground import Ground, run, standing, until
from skerry.cli import catalogue
from skerry.demo.fleet import Box, docker_socket
from skerry.demo.load import ask
from skerry.demo.story import CACHE, MODELS
from skerry.wire.api import Accepted, DeploymentView, NodeView, Pushed

POLL_S = 0.005
WITHIN_S = 60.0
BARS_S = {"bubblewrap": 3.0, "docker": 6.0}
PROGRAMS = ("warden", "gateway", "agent")


async def deploy(ground: Ground, session: aiohttp.ClientSession, manifest: catalogue.Manifest, model: Path) -> None:
    """Bring the box to where it serves."""

    async def is_up() -> bool:
        nodes = await ground.call(session, "GET", "/v1/nodes", list[NodeView])
        return bool(nodes) and all(node.state == "online" and node.rungs for node in nodes)

    async def is_ready() -> bool:
        view = await ground.call(session, "GET", f"/v1/deployments/{NAME}", DeploymentView)
        return view.wanted == view.ready == 1

    await until(is_up, within_s=60, what="the box is online with a sandbox that works: see --driver and --docker-socket")
    query = f"sha256={manifest.source.sha256}"
    await ground.call(session, "PUT", f"/v1/models/{MODEL}/versions/{manifest.version}", Pushed, body=model.read_bytes(), query=query)
    await ground.call(session, "POST", "/v1/deployments", Accepted, body=DEPLOYMENT.format(place="{tier: [edge]}").encode())
    await until(is_ready, within_s=120, what="the deployment is ready")


async def power_off(ground: Ground, box: Box, socket: str) -> None:
    """Every process of the box, and what does not outlast it."""
    for program in PROGRAMS:
        await ground.kill(f"{box.name}.{program}")
    for handle in (box.folder / "warden" / "bubblewrap").glob("*/handle.json"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(json.loads(handle.read_text())["pid"], signal.SIGKILL)
    if socket:
        client = docker.DockerClient(base_url=f"unix://{socket}")
        for container in client.containers.list(filters={"label": "skerry.owner"}):
            if ground.name in container.labels["skerry.owner"]:
                container.kill()
        client.close()
    for path in (box.folder / "routes.json", box.gateway_socket, box.folder / "warden.sock"):
        path.unlink(missing_ok=True)
    for folder in (box.folder / "warden" / "sandboxes").glob("*/run"):
        for path in folder.iterdir():
            path.unlink() if not path.is_dir() else shutil.rmtree(path)
    for path in (box.folder / "warden" / "sandboxes").glob("*/slot.json"):  # as written before another boot
        path.write_text(json.dumps({**json.loads(path.read_text()), "boot_id": "before"}))
    await asyncio.sleep(0.5)


async def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """All rounds."""
    manifest = next(manifest for manifest in catalogue.read_catalogue(MODELS) if manifest.name == MODEL)
    model = catalogue.materialise(manifest, CACHE)
    request, is_correct = question(model)
    socket = "" if arguments.driver == "bubblewrap" else arguments.docker_socket or docker_socket()
    took_s = []
    async with (
        standing(boxes=1, drivers=[arguments.driver], docker_socket=arguments.docker_socket) as ground,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session,
    ):
        box = ground.boxes[0]
        await deploy(ground, session, manifest, model)
        for name in ("coordinator", "signer", "broker"):
            await ground.kill(name)
        for _ in range(arguments.rounds):
            await power_off(ground, box, socket)
            began = time.perf_counter()
            await asyncio.gather(*(ground.start_process(f"{box.name}.{program}") for program in PROGRAMS))
            while True:
                reply = await ask(session, box.gateway_url, request)
                if reply.status == 200:
                    break
                if time.perf_counter() - began > WITHIN_S:
                    raise RuntimeError(f"no answer within {WITHIN_S:.0f} s: {reply.status} {reply.error}")
                await asyncio.sleep(POLL_S)
            took_s.append(time.perf_counter() - began)
            if not is_correct(reply):
                raise RuntimeError(f"a wrong answer: {reply.outputs}")
        for name in ("broker", "signer", "coordinator"):
            await ground.start_process(name)
    bar_s, p50_s = BARS_S.get(arguments.driver), statistics.median(took_s)
    return {
        "driver": arguments.driver, "rounds": arguments.rounds, "p50_s": round(p50_s, 3), "max_s": round(max(took_s), 3), "bar_s": bar_s,
        "reached": bar_s is not None and max(took_s) <= bar_s,
    }  # fmt: skip


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.cold_boot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--driver", choices=["bubblewrap", "docker", "gvisor"], default="bubblewrap")
    parser.add_argument("--docker-socket", default="", help="default: SKERRY_DOCKER_SOCKET, DOCKER_HOST, else the machine's engine")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    report("cold_boot", **msgspec.to_builtins(run(lambda: measure(arguments))))


if __name__ == "__main__":
    main()
