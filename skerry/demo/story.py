"""The demo's story, step by step, each with its figure: a fleet comes up, recognises, overflows, is cut off, and heals."""

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import aiohttp
import msgspec

from skerry.cli import catalogue
from skerry.demo import inputs
from skerry.demo.fleet import Box, DemoFailed, Fleet
from skerry.demo.load import Callers, Reply, Request, Tally, ask, request_of
from skerry.demo.screen import Screen
from skerry.wire import codec, oip
from skerry.wire.api import DeploymentView, LoginLink, NodeView, Pushed, StatusView

T = TypeVar("T")

MODELS = Path(__file__).resolve().parents[2] / "models"
CACHE = Path(".cache/models")
SPEECH, TEXT = "speech-detector", "text-recogniser"
SPEECH_DEADLINE_MS = 300.0
TEXT_DEADLINE_MS = 600.0
DEPLOYMENT = """\
name: {name}
model: {name}:1
replicas: {{per_node: 1}}
place: {{tier: [edge, cloud]}}
resources: {{memory: 512MiB, cpus: 1.0}}
slo: {{deadline_ms: {deadline_ms}}}
split: {{mode: overflow}}
"""
LEAST_SPEECH_AGREEMENT = 0.95
MOST_CHARACTERS_WRONG = 0.02
BASE_SPEECH_PER_S = 4.0
BASE_TEXT_PER_S = 1.0
RAMP_FACTOR = 1.3
RAMP_EVERY_S = 0.7
MOST_TEXT_PER_S = 150.0
HOLD_S = 5.0
CALM_S = 2.0
CUT_S = 6.0
TABLE_S = 0.7


class StepFailed(Exception):
    """A step did not hold; the text says how."""


class Step(msgspec.Struct, frozen=True):
    """One line of the summary."""

    name: str
    held: bool
    figure: str


class Story:
    """Runs the steps on a fleet that is up. ``steps`` is the summary so far."""

    def __init__(self, fleet: Fleet, screen: Screen, session: aiohttp.ClientSession, stop: asyncio.Event) -> None:
        self._fleet = fleet
        self._screen = screen
        self._session = session
        self._stop = stop
        self._recording = inputs.read_recording(CACHE / "inputs")
        self._alphabet = inputs.read_alphabet(CACHE / TEXT / "1" / "model.onnx")
        self._texts = [request_of(TEXT, [inputs.text_tensor(text)], deadline_ms=TEXT_DEADLINE_MS) for text in inputs.TEXTS]
        self._windows = itertools.cycle(
            [request_of(SPEECH, inputs.window_tensors(self._recording, i, None), deadline_ms=SPEECH_DEADLINE_MS) for i in range(0, 900, 9)]
        )
        self._lines = itertools.cycle(self._texts)
        self._callers: dict[tuple[str, str], Callers] = {}
        self._tallies: dict[str, Tally] = {}
        self._by_box: dict[str, Tally] = {}
        self.all = Tally()
        self.steps: list[Step] = []

    async def _get(self, path: str, kind: type[T]) -> T:
        async with self._session.get(self._fleet.url + path, headers={"Authorization": f"Bearer {self._fleet.token}"}) as response:
            return codec.decode(await response.read(), kind, max_bytes=64 * 2**20)

    async def _until(self, holds: Callable[[], Awaitable[bool]], *, within_s: float, failure: Callable[[], str]) -> float:
        """Seconds until ``holds()`` was true. Raises StepFailed."""
        started = time.monotonic()
        while True:
            if await holds():
                return time.monotonic() - started
            if self._stop.is_set():
                raise StepFailed("interrupted")
            if time.monotonic() - started > within_s:
                raise StepFailed(f"{failure()} after {within_s:.0f} s")
            await asyncio.sleep(0.1)

    # -- steps

    async def boxes_come_up(self) -> str:
        """Step 1."""
        found: list[NodeView] = []

        async def all_online() -> bool:
            nonlocal found
            found = await self._get("/v1/nodes", list[NodeView])
            return len(found) == len(self._fleet.boxes) and all(node.state == "online" and node.rungs for node in found)

        took_s = await self._until(
            all_online, within_s=30, failure=lambda: f"only {[n.id for n in found if n.state == 'online']} are online"
        )
        rungs = sorted({rung for node in found for rung in node.rungs})
        return f"{len(found)} boxes online after {took_s:.1f} s, sandboxes: {', '.join(rungs)}"

    async def models_are_deployed(self) -> str:
        """Step 2."""
        started = time.monotonic()
        for manifest in catalogue.read_catalogue(MODELS):
            path = catalogue.materialised_path(CACHE, manifest)
            query = {
                "sha256": manifest.source.sha256,
                "warmup": codec.encode(manifest.warmup).decode(),
                "state": codec.encode(manifest.state).decode(),
            }
            url = f"{self._fleet.url}/v1/models/{manifest.name}/versions/{manifest.version}"
            headers = {"Authorization": f"Bearer {self._fleet.token}"}
            async with self._session.put(url, params=query, data=path.read_bytes(), headers=headers) as response:
                codec.decode(await response.read(), Pushed)
        pushed_s = time.monotonic() - started
        for name, deadline_ms in ((SPEECH, SPEECH_DEADLINE_MS), (TEXT, TEXT_DEADLINE_MS)):
            text = DEPLOYMENT.format(name=name, deadline_ms=int(deadline_ms))
            headers = {"Authorization": f"Bearer {self._fleet.token}"}
            async with self._session.post(f"{self._fleet.url}/v1/deployments", data=text.encode(), headers=headers) as response:
                if response.status != 202:
                    raise StepFailed(f"{name} was refused: {(await response.text())[:300]}")
        views: list[DeploymentView] = []

        async def all_ready() -> bool:
            nonlocal views
            views = await self._get("/v1/deployments", list[DeploymentView])
            self._screen.note(", ".join(f"{view.name} {view.ready}/{view.wanted}" for view in views))
            return len(views) == 2 and all(view.wanted == len(self._fleet.boxes) == view.ready for view in views)

        took_s = await self._until(
            all_ready, within_s=60, failure=lambda: "; ".join(f"{v.name} {v.ready}/{v.wanted} {v.problem}" for v in views)
        )
        drivers = sorted({f"{p.driver} ({p.rung})" for view in views for p in view.placements})
        return (
            f"2 models pushed in {pushed_s:.1f} s, 8 of 8 replicas ready {took_s:.1f} s later, each in its own {', '.join(drivers)} sandbox"
        )

    async def speech_is_detected(self) -> str:
        """Step 3, sound: the whole recording through one box, its state kept by the caller."""
        box = self._fleet.boxes[0]
        state: oip.Tensor | None = None
        agree = said = 0
        total = len(self._recording.speech)
        for index in range(total):
            request = request_of(SPEECH, inputs.window_tensors(self._recording, index, state), deadline_ms=5000)
            reply = await ask(self._session, box.gateway_url, request)
            if reply.status != 200:
                raise StepFailed(f"window {index} on {box.name}: {reply.error or reply.status}")
            outputs = {output.name: output for output in reply.outputs}
            state = outputs["stateN"]
            heard = bool(scalar_of(outputs["output"]) > 0.5)
            said += heard
            agree += heard == bool(self._recording.speech[index])
            if index % 100 == 0:
                self._screen.note(f"{index * 32 / 1000:.0f} s of 30 s heard on {box.name}")
            if self._stop.is_set():
                raise StepFailed("interrupted")
        truth = self._recording.speech.mean()
        figure = f"{agree / total:.1%} of {total} windows as people heard them (speech in {said / total:.0%}, truth {truth:.0%})"
        if agree / total < LEAST_SPEECH_AGREEMENT:
            raise StepFailed(f"{figure}, at least {LEAST_SPEECH_AGREEMENT:.0%} is asked for")
        return figure

    async def text_is_read(self) -> str:
        """Step 3, pictures: every line on every box."""
        right = total = characters = wrong = 0
        for box in self._fleet.boxes:
            for text, request in zip(inputs.TEXTS, self._texts, strict=True):
                reply = await ask(self._session, box.gateway_url, msgspec.structs.replace(request, deadline_ms=5000))
                read = inputs.text_of(reply.outputs[0], self._alphabet) if reply.status == 200 else f"no answer: {reply.error}"
                total += 1
                right += read == text
                characters += len(text)
                wrong += inputs.mistakes(read, text)
                if box is self._fleet.boxes[0] or read != text:
                    mark = "[green]=[/]" if read == text else "[red]≠[/]"
                    self._screen.say(f"    {box.name}: truth {text!r:28} {mark} read {read!r}")
        figure = (
            f"{right} of {total} lines and {1 - wrong / characters:.1%} of the characters read right, on {len(self._fleet.boxes)} boxes"
        )
        if wrong / characters > MOST_CHARACTERS_WRONG:
            raise StepFailed(f"{figure}; at least {1 - MOST_CHARACTERS_WRONG:.0%} of the characters is asked for")
        return figure

    async def load_overflows(self) -> str:
        """Step 4, up: raise the load until the cloud answers, and hold it there.

        A replica computes on one core, and all boxes of the demo share this machine: so many boxes are overloaded that a core
        is left for the cloud's.
        """
        edge_boxes = [box.name for box in self._fleet.boxes if box.tier == "edge"]
        rushed = edge_boxes[: max(1, min(len(edge_boxes), len(os.sched_getaffinity(0)) - 1))]
        where = ", ".join(rushed)
        rate = BASE_TEXT_PER_S * 4
        before = msgspec.structs.replace(self.all)
        while self.all.cloud - before.cloud < 5:
            if rate > MOST_TEXT_PER_S or self._stop.is_set():
                raise StepFailed(f"nothing went to the cloud at {rate:.0f} requests/s to each of {where}")
            rate *= RAMP_FACTOR
            self._set_rate(TEXT, rate, rushed)
            self._screen.note(f"{rate:.0f} requests/s to each of {where}, {self.all.cloud - before.cloud} answers by the cloud yet")
            await asyncio.sleep(RAMP_EVERY_S)
        self._screen.note(f"the cloud answers at {rate:.0f} requests/s to {where}; held for {HOLD_S:.0f} s")
        await asyncio.sleep(HOLD_S)
        self._set_rate(TEXT, BASE_TEXT_PER_S, rushed)
        await self._settle()
        now = self.all
        edge, cloud, refused = now.edge - before.edge, now.cloud - before.cloud, now.refused - before.refused
        figure = (
            f"at {rate:.0f} requests/s to {where}: {edge} answers by the edge, {cloud} by the cloud, {refused} refused at once; "
            f"{now.late} late, {now.lost} lost, slowest {now.slowest_ms:.0f} ms of {TEXT_DEADLINE_MS:.0f} ms"
        )
        if now.late or now.lost or now.wrong:
            raise StepFailed(f"{figure}, {now.wrong} wrong")
        return figure

    async def load_falls(self) -> str:
        """Step 4, down: the edge answers alone again."""
        started = time.monotonic()
        while True:
            before = msgspec.structs.replace(self.all)
            await asyncio.sleep(CALM_S)
            cloud, edge = self.all.cloud - before.cloud, self.all.edge - before.edge
            if cloud == 0 and edge > 0:
                return f"{edge} answers in {CALM_S:.0f} s, all by the edge, {time.monotonic() - started:.1f} s after the load fell"
            if time.monotonic() - started > 20 or self._stop.is_set():
                raise StepFailed(f"the cloud still answers: {cloud} of {cloud + edge}")

    async def box_is_cut_off(self) -> str:
        """Step 5: pull one box's plug, see it serve, plug in again, and account for every number."""
        box = self._fleet.boxes[2]
        served = self._by_box[box.name]
        answered, failed = served.answered, served.lost + served.late + served.refused + served.wrong
        box.uplink.cut()
        try:

            async def is_noticed() -> bool:
                return (await self._get(f"/v1/nodes/{box.name}", NodeView)).is_silent

            noticed_s = await self._until(is_noticed, within_s=30, failure=lambda: f"{box.name} is not called silent")
            self._screen.note(f"{box.name} silent, noticed after {noticed_s:.1f} s; it goes on answering")
            await asyncio.sleep(CUT_S)
            during = served.answered - answered
            missed = served.lost + served.late + served.refused + served.wrong - failed
        finally:
            box.uplink.mend()
        node: NodeView | None = None

        async def is_whole() -> bool:
            nonlocal node
            node = await self._get(f"/v1/nodes/{box.name}", NodeView)
            return node.state == "online" and all(stream.missing == 0 for stream in node.streams)

        back_s = await self._until(is_whole, within_s=40, failure=lambda: f"{box.name}: {node.streams if node else 'unknown'}")
        assert node is not None  # noqa: S101 - just seen
        samples = next(stream for stream in node.streams if stream.stream == "samples")
        figure = (
            f"{box.name} answered {during} requests while cut off ({missed} missed); whole again {back_s:.1f} s after: "
            f"{samples.high} samples numbered, {samples.missing} missing, {samples.lost} lost"
        )
        if missed or not during or samples.lost:
            raise StepFailed(figure)
        return figure

    async def nothing_is_missing(self) -> str:
        """The books at the end: every event of every box, and one line from the console."""
        status: StatusView | None = None

        async def is_settled() -> bool:
            nonlocal status
            status = await self._get("/v1/status", StatusView)
            return status.events_missing == 0

        await self._until(is_settled, within_s=20, failure=lambda: f"{status}")
        assert status is not None  # noqa: S101 - just seen
        async with self._session.get(f"{self._fleet.url}/", headers={"Authorization": f"Bearer {self._fleet.token}"}) as response:
            page = await response.text()
        missing = [box.name for box in self._fleet.boxes if box.name not in page]
        if response.status != 200 or missing:
            raise StepFailed(f"the console's first page does not show {missing} (status {response.status})")
        dead = self._fleet.dead()
        if dead or status.events_lost:
            raise StepFailed(f"{status.events_lost} events lost, ended by themselves: {dead}")
        return f"{status.events} events in the registry, 0 missing, 0 lost; the console shows all {len(self._fleet.boxes)} boxes"

    # -- load

    def _set_rate(self, model: str, per_second: float, boxes: list[str]) -> None:
        for box in boxes:
            self._callers[(box, model)].per_second = per_second

    async def _settle(self) -> None:
        for callers in self._callers.values():
            await callers.settle()

    @contextlib.asynccontextmanager
    async def callers(self) -> AsyncIterator[None]:
        """Steady requests to every edge box for as long as this is open."""
        async with contextlib.AsyncExitStack() as stack:
            for box in self._fleet.boxes:
                if box.tier != "edge":
                    continue
                self._by_box[box.name] = Tally()
                for model, next_request, rate in (
                    (SPEECH, lambda: next(self._windows), BASE_SPEECH_PER_S),
                    (TEXT, lambda: next(self._lines), BASE_TEXT_PER_S),
                ):
                    callers = Callers(self._session, box.gateway_url, next_request, self._counter(box))
                    callers.per_second = rate
                    self._callers[(box.name, model)] = await stack.enter_async_context(callers)
            yield

    def _counter(self, box: Box) -> Callable[[Reply, Request], None]:
        def count(reply: Reply, request: Request) -> None:
            self.all.take(reply, request.deadline_ms)
            self._by_box[box.name].take(reply, request.deadline_ms)

        return count

    # -- telling

    async def run(self, name: str, about: str, work: Callable[[], Awaitable[str]]) -> bool:
        """One step, told and noted; says whether it held."""
        self._screen.step(name, about)
        try:
            figure = await work()
        except (StepFailed, DemoFailed, aiohttp.ClientError, OSError, codec.Malformed, TimeoutError) as exc:
            self._screen.close(str(exc) or type(exc).__name__, held=False)
            self.steps.append(Step(name, held=False, figure=str(exc) or type(exc).__name__))
            return False
        self._screen.close(figure, held=True)
        self.steps.append(Step(name, held=True, figure=figure))
        return True

    async def keep_table(self) -> None:
        """Fresh numbers for the live table, until cancelled."""
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError, codec.Malformed, TimeoutError):
                self._screen.fleet(await self._get("/v1/nodes", list[NodeView]), await self._get("/v1/deployments", list[DeploymentView]))
            await asyncio.sleep(TABLE_S)

    async def login_link(self) -> str:
        """The console's address, with a code that works once."""
        url = f"{self._fleet.url}/v1/login-links"
        async with self._session.post(url, headers={"Authorization": f"Bearer {self._fleet.token}"}) as response:
            return codec.decode(await response.read(), LoginLink).url


def scalar_of(tensor: oip.Tensor) -> float:
    """The only number in a float tensor."""
    return float(memoryview(bytes(tensor.data)).cast("f")[0])
