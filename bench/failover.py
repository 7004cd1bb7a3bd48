"""What callers notice when a replica is killed, and when the box that answered them is gone.

``python -m bench.failover [--driver bubblewrap|docker] [--docker-socket PATH] [--rounds N] [--seconds S]``

replica: its sandbox is killed while another of its kind waits in the warm pool. Seconds until a request that was sent then is answered.
box: callers ask a box without a replica, which has two neighbours and the cloud to ask. The one that answers most of them stops in the
middle of everything, as when its cable is cut: no connection is closed, nothing is said. Seconds until nobody waits for it any more,
callers' errors, and when the coordinator called it silent.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import time
from collections import Counter
from pathlib import Path

import aiohttp
import docker
import msgspec
import psutil

from bench.deploy_time import DEPLOYMENT, MODEL, NAME, Timer, question
from bench.report import report
from sim.ground import Ground, run, standing, until
from skerry.cli import catalogue
from skerry.demo.fleet import Box, docker_socket
from skerry.demo.load import Callers, Reply, Request, ask
from skerry.demo.story import CACHE, MODELS
from skerry.wire.api import Accepted, DeploymentView, NodeView, Pushed

REPLICA_BAR_S, BOX_BAR_S = 0.3, 3.0
DEADLINE_MS = 1000.0
PER_SECOND = 40.0
POLL_S = 0.02
SMALL = "memory_bytes = 1048576\n"
WITHOUT_REPLICA = "store-1"
SHOP = DEPLOYMENT.replace("mode: edge", "mode: overflow").replace("deadline_ms: 5000", f"deadline_ms: {DEADLINE_MS:.0f}")


def one_shop(path: Path, text: str) -> str:
    """All boxes at one site, at 2 s keep-alive, and no room for a replica on one of them."""
    for site in ("store-1", "store-2", "van-7"):
        text = text.replace(f'site = "{site}"', 'site = "shop"')
    if path.name == "agent.toml":
        text = text.replace("[broker]\n", "[broker]\nkeepalive_s = 2\n")
    return SMALL + text if path.name == "warden.toml" and path.parent.name == WITHOUT_REPLICA else text


def with_warm_pool(path: Path, text: str) -> str:
    """As many as a box has by itself."""
    return text.replace("warm_most = 0\n", "") if path.name == "warden.toml" else text


# -- a replica


def sandboxes(box: Box, *, is_warm: bool) -> list[str]:
    """Names of those that wait for a model, or of those of replicas."""
    folders = [slot.parent for slot in (box.folder / "warden" / "sandboxes").glob("*/slot.json")]
    return [folder.name for folder in folders if (folder / "run" / "control.sock").exists() == is_warm]


def kill_sandbox(box: Box, name: str, driver: str, socket: str) -> None:
    """``kill -9`` of all that is in it."""
    if driver == "bubblewrap":
        os.kill(json.loads((box.folder / "warden" / "bubblewrap" / name / "handle.json").read_text())["pid"], signal.SIGKILL)
        return
    client = docker.DockerClient(base_url=f"unix://{socket}")
    with contextlib.closing(client):
        (container,) = [one for one in client.containers.list() if name in one.name or name in one.labels.values()]
        os.kill(container.attrs["State"]["Pid"], signal.SIGKILL)


async def replica_rounds(arguments: argparse.Namespace, manifest: catalogue.Manifest, model: Path) -> list[float]:
    """Deploy, kill, ask; the next round has a deployment of its own, so that each is the replica's first end."""
    request, is_correct = question(model)
    socket = arguments.docker_socket or docker_socket()
    took_s = []
    async with (
        standing(boxes=1, drivers=[arguments.driver], docker_socket=arguments.docker_socket, edit=with_warm_pool) as ground,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session,
    ):
        box, timer = ground.boxes[0], Timer(ground, session, model)
        await timer.boxes_are_up()
        query = f"sha256={manifest.source.sha256}"
        await ground.call(session, "PUT", f"/v1/models/{MODEL}/versions/{manifest.version}", Pushed, body=model.read_bytes(), query=query)

        async def is_warm() -> bool:
            return bool(sandboxes(box, is_warm=True))

        for _ in range(arguments.rounds):
            await timer.first_answer_s("{tier: [edge]}")
            await until(is_warm, within_s=60, what="a warm sandbox waits")
            await asyncio.sleep(1)
            (name,) = sandboxes(box, is_warm=False)
            kill_sandbox(box, name, arguments.driver, socket)
            began = time.perf_counter()
            reply = await ask(session, box.gateway_url, request)
            took_s.append(time.perf_counter() - began)
            if reply.status != 200 or not is_correct(reply):
                raise RuntimeError(f"not answered: {reply.status} {reply.error}")
            await timer.delete()
    return took_s


# -- a box


class Asked(msgspec.Struct):
    """One request: when it was answered or refused, on the monotonic clock, and how."""

    at: float
    reply: Reply

    @property
    def sent_at(self) -> float:
        """When it was sent."""
        return self.at - self.reply.took_ms / 1000


def processes_of(box: Box) -> list[psutil.Process]:
    """Its programs and sandboxes, but for what waits for a model."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            mine = f"{box.folder}/"
            if mine in " ".join(process.cmdline()) or mine in Path(f"/proc/{process.pid}/mountinfo").read_text():
                found.append(process)
    return [process for process in found if process.pid != os.getpid()]


async def lose_a_box(arguments: argparse.Namespace, manifest: catalogue.Manifest, model: Path) -> dict[str, object]:
    """One box that is gone, and back."""
    request, _ = question(model)
    request = msgspec.structs.replace(request, deadline_ms=DEADLINE_MS)
    asked: list[Asked] = []

    def note(reply: Reply, _: Request) -> None:
        asked.append(Asked(time.perf_counter(), reply))

    async with (
        standing(boxes=4, drivers=[arguments.driver], docker_socket=arguments.docker_socket, edit=one_shop) as ground,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session,
    ):
        await Timer(ground, session, model).boxes_are_up()
        query = f"sha256={manifest.source.sha256}"
        await ground.call(session, "PUT", f"/v1/models/{MODEL}/versions/{manifest.version}", Pushed, body=model.read_bytes(), query=query)
        await ground.call(session, "POST", "/v1/deployments", Accepted, body=SHOP.format(place="{tier: [edge, cloud]}").encode())

        async def is_ready() -> bool:
            view = await ground.call(session, "GET", f"/v1/deployments/{NAME}", DeploymentView)
            return view.ready == 3

        await until(is_ready, within_s=120, what="three boxes serve")
        by_name = {box.name: box for box in ground.boxes}
        async with Callers(session, by_name[WITHOUT_REPLICA].gateway_url, lambda: request, note) as callers:
            callers.per_second = PER_SECOND
            await asyncio.sleep(arguments.seconds)
            served = Counter(one.reply.node for one in asked if one.sent_at > time.perf_counter() - arguments.seconds / 2)
            lost = max((name for name in served if by_name[name].tier == "edge"), key=lambda name: served[name])
            frozen = processes_of(by_name[lost])
            began = time.perf_counter()
            for process in frozen:
                process.send_signal(signal.SIGSTOP)
            silent_after_s = await _until_silent(ground, session, lost, began)
            await asyncio.sleep(max(0.0, arguments.seconds - (time.perf_counter() - began)))
            back = time.perf_counter()
            for process in frozen:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGCONT)
            await asyncio.sleep(arguments.seconds)
    return _figures(asked, lost, began=began, back=back, share=served[lost] / served.total(), silent_after_s=silent_after_s)


async def _until_silent(ground: Ground, session: aiohttp.ClientSession, lost: str, began: float) -> float:
    async def is_silent() -> bool:
        nodes = await ground.call(session, "GET", "/v1/nodes", list[NodeView])
        return next(node.state for node in nodes if node.id == lost) != "online"

    await until(is_silent, within_s=60, what=f"{lost} is silent for the coordinator")
    return time.perf_counter() - began


def _figures(asked: list[Asked], lost: str, *, began: float, back: float, share: float, silent_after_s: float) -> dict[str, object]:
    before = [one.reply.took_ms for one in asked if one.at < began and one.reply.status == 200]
    usual_ms = max(50.0, 2 * statistics.quantiles(before, n=100)[98])
    while_gone = [one for one in asked if began - DEADLINE_MS / 1000 < one.sent_at < back and one.at > began]
    unanswered = [one for one in asked if one.reply.status != 200]
    waited = [one for one in while_gone if one.reply.status != 200 or one.reply.took_ms > usual_ms]
    by_trial = [one for one in waited if one.sent_at > began + BOX_BAR_S]
    first = [one for one in waited if one.sent_at <= began + BOX_BAR_S]
    elsewhere_s = max((one.at - began for one in first), default=0.0)
    again = [one.at - back for one in asked if one.at > back and one.reply.node == lost]
    return {
        "lost": lost, "share_before": round(share, 2), "requests": len(asked), "unanswered": len(unanswered),
        "why": sorted({one.reply.error[:200] for one in unanswered})[:3],
        "elsewhere_s": round(elsewhere_s, 3), "bar_s": BOX_BAR_S, "waited": len(first), "waited_for_trials": len(by_trial),
        "slowest_ms": round(max(one.reply.took_ms for one in while_gone), 1), "usual_p99_ms": round(usual_ms / 2, 1),
        "silent_after_s": round(silent_after_s, 2), "used_again_s": round(min(again), 2) if again else None,
        "reached": elsewhere_s <= BOX_BAR_S and not unanswered and len(by_trial) < len(while_gone) / 50,
    }  # fmt: skip


async def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Both."""
    manifest = next(manifest for manifest in catalogue.read_catalogue(MODELS) if manifest.name == MODEL)
    model = catalogue.materialise(manifest, CACHE)
    figures: dict[str, object] = {"driver": arguments.driver, "rounds": arguments.rounds}
    if arguments.rounds:
        took_s = await replica_rounds(arguments, manifest, model)
        figures["replica"] = {
            "p50_s": round(statistics.median(took_s), 3), "max_s": round(max(took_s), 3), "bar_s": REPLICA_BAR_S,
            "reached": max(took_s) <= REPLICA_BAR_S,
        }  # fmt: skip
    if arguments.seconds:
        figures["box"] = await lose_a_box(arguments, manifest, model)
    return figures


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.failover", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--driver", choices=["bubblewrap", "docker"], default="bubblewrap")
    parser.add_argument("--docker-socket", default="", help="default: SKERRY_DOCKER_SOCKET, DOCKER_HOST, else the machine's engine")
    parser.add_argument("--rounds", type=int, default=10, help="replicas that are killed; 0: none")
    parser.add_argument("--seconds", type=float, default=15.0, help="before the box is lost, while it is, and after; 0: no box is")
    arguments = parser.parse_args()
    report("failover", **run(lambda: measure(arguments)))


if __name__ == "__main__":
    main()
