"""From "deployment accepted" to the first correct answer, on a box that has the model's bytes already.

``python -m bench.deploy_time [--driver bubblewrap|docker|gvisor] [--docker-socket PATH] [--rounds N] [--place one|all]``
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import msgspec
import numpy as np
import onnxruntime as ort

from bench.report import report
from sim.ground import Ground, run, standing, until
from skerry.cli import catalogue
from skerry.demo.fleet import Box
from skerry.demo.load import Reply, Request, ask, request_of
from skerry.demo.story import CACHE, MODELS
from skerry.wire import oip
from skerry.wire.api import Accepted, DeploymentView, NodeView, Pushed

MODEL = "speech-detector"
NAME = "timed"
POLL_S = 0.01
BARS_S = {"bubblewrap": 2.0, "docker": 3.0}
DEPLOYMENT = """\
name: timed
model: speech-detector:1
replicas: {{per_node: 1}}
place: {place}
resources: {{memory: 512MiB, cpus: 1.0}}
slo: {{deadline_ms: 5000}}
split: {{mode: edge}}
"""
EVERYWHERE = "{tier: [edge, cloud]}"
FIRST_ANSWER_WITHIN_S = 60.0


def question(model: Path) -> tuple[Request, Callable[[Reply], bool]]:
    """A request, and whether a reply to it is what the model says outside of any sandbox."""
    feeds = {
        "input": (np.random.default_rng(1).standard_normal((1, 576)) * 0.1).astype("f4"),
        "state": np.zeros((2, 1, 128), "f4"),
        "sr": np.array(16000, "i8"),
    }
    truth = np.asarray(ort.InferenceSession(str(model), providers=["CPUExecutionProvider"]).run(["output"], feeds)[0])
    tensors = [oip.Tensor(name, "INT64" if name == "sr" else "FP32", value.shape, value.tobytes()) for name, value in feeds.items()]

    def is_correct(reply: Reply) -> bool:
        output = next((output for output in reply.outputs if output.name == "output"), None)
        return output is not None and np.allclose(np.frombuffer(output.data, "f4").reshape(output.shape), truth, atol=1e-5)

    return request_of(MODEL, tensors, deadline_ms=5000), is_correct


class Timer:
    """Deploys, asks and deletes again, on a ground that is up."""

    def __init__(self, ground: Ground, session: aiohttp.ClientSession, model: Path) -> None:
        self._ground = ground
        self._session = session
        self._request, self._is_correct = question(model)
        self._box: Box = ground.boxes[0]
        self.asked = 0

    async def boxes_are_up(self) -> None:
        """Every box is online and has said what it can run."""

        async def hold() -> bool:
            found = await self._ground.call(self._session, "GET", "/v1/nodes", list[NodeView])
            return len(found) == len(self._ground.boxes) and all(node.state == "online" and node.rungs for node in found)

        await until(hold, within_s=60, what="every box online with a sandbox that works: see --driver and --docker-socket")

    async def warm_up(self, manifest: catalogue.Manifest, model: Path) -> None:
        """Push the model, have it on every box once, and take it away again."""
        query = f"sha256={manifest.source.sha256}"
        path = f"/v1/models/{MODEL}/versions/{manifest.version}"
        await self._ground.call(self._session, "PUT", path, Pushed, body=model.read_bytes(), query=query)
        await self._deploy(EVERYWHERE)

        async def all_ready() -> bool:
            view = await self._ground.call(self._session, "GET", f"/v1/deployments/{NAME}", DeploymentView)
            return view.wanted == view.ready == len(self._ground.boxes)

        await until(all_ready, within_s=120, what="the first deployment is ready everywhere")
        await self.delete()

    async def _deploy(self, place: str) -> None:
        await self._ground.call(self._session, "POST", "/v1/deployments", Accepted, body=DEPLOYMENT.format(place=place).encode())

    async def first_answer_s(self, place: str) -> float:
        """Deploy; seconds from the coordinator's word that it was accepted to the first correct answer by the box itself."""
        await self._deploy(place)
        accepted = time.perf_counter()
        while time.perf_counter() - accepted < FIRST_ANSWER_WITHIN_S:
            reply = await ask(self._session, self._box.gateway_url, self._request)
            self.asked += 1
            if reply.status == 200:
                if not self._is_correct(reply) or reply.node != self._box.name:
                    raise RuntimeError(f"a wrong answer by {reply.node}: {reply.outputs}")
                return time.perf_counter() - accepted
            await asyncio.sleep(POLL_S)
        raise RuntimeError(f"no answer within {FIRST_ANSWER_WITHIN_S:.0f} s: {reply.status} {reply.error}")

    async def delete(self) -> None:
        """Delete, and wait until no box runs or routes it."""
        await self._ground.call(self._session, "DELETE", f"/v1/deployments/{NAME}", Accepted)

        async def is_gone() -> bool:
            found = await self._ground.call(self._session, "GET", "/v1/nodes", list[NodeView])
            reply = await ask(self._session, self._box.gateway_url, self._request)
            return reply.status == 404 and not any(node.replicas for node in found)

        await until(is_gone, within_s=60, what="the deployment is gone")


async def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """All rounds."""
    manifest = next(manifest for manifest in catalogue.read_catalogue(MODELS) if manifest.name == MODEL)
    model = catalogue.materialise(manifest, CACHE)
    took_s = []
    async with (
        standing(boxes=4, drivers=[arguments.driver], docker_socket=arguments.docker_socket) as ground,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session,
    ):
        timer = Timer(ground, session, model)
        await timer.boxes_are_up()
        await timer.warm_up(manifest, model)
        place = EVERYWHERE if arguments.place == "all" else f"{{labels: {{site: {ground.boxes[0].name}}}, tier: [edge]}}"
        for _ in range(arguments.rounds):
            took_s.append(await timer.first_answer_s(place))
            await timer.delete()
    bar_s = BARS_S.get(arguments.driver)
    p50_s = statistics.median(took_s)
    return {
        "driver": arguments.driver,
        "rounds": arguments.rounds,
        "place": arguments.place,
        "p50_s": round(p50_s, 3),
        "p90_s": round(statistics.quantiles(took_s, n=10, method="inclusive")[8] if len(took_s) > 1 else p50_s, 3),
        "max_s": round(max(took_s), 3),
        "bar_p50_s": bar_s,
        "reached": bar_s is not None and p50_s < bar_s,
        "requests": timer.asked,
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--driver", choices=["bubblewrap", "docker", "gvisor"], default="bubblewrap")
    parser.add_argument("--docker-socket", default="", help="default: SKERRY_DOCKER_SOCKET, DOCKER_HOST, else the machine's engine")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--place", choices=["one", "all"], default="one", help="all: the four boxes' sandboxes start at one time, on this machine"
    )
    arguments = parser.parse_args()
    report("deploy_time", **msgspec.to_builtins(run(lambda: measure(arguments))))


if __name__ == "__main__":
    main()
