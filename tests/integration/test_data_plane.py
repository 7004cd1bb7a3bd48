"""The gateway's code with real workers behind it: shared memory, frozen and killed replicas, sequences, shared runs, hedges, budgets."""

import asyncio
import contextlib
import json
import os
import signal
import time
from pathlib import Path

import aiohttp
import numpy as np
import onnx
import onnx.helper as oh
import pytest

from edge_agent.gateway.budget import Budgets
from skerry.wire import codec, oip
from skerry.wire.box import LocalReplica, Route, RouteTable
from skerry.wire.messages import Batching, CloudBudget, StateTensor, Upstream
from tests.integration.test_gateway import Box, fleet, run
from tests.integration.test_worker import start
from tests.integration.test_worker_batches import model

FLOAT = onnx.TensorProto.FLOAT


@pytest.fixture(scope="module")
def doubler(tmp_path_factory) -> Path:
    """y = 2 x, with a free first axis."""
    node = oh.make_node("Add", ["x", "x"], ["y"])
    return model(tmp_path_factory.mktemp("doubler") / "m.onnx", [node], {"x": (FLOAT, ["N", "M"])}, {"y": (FLOAT, ["N", "M"])})


@pytest.fixture(scope="module")
def adder(tmp_path_factory) -> Path:
    """total = after = before + x."""
    nodes = [oh.make_node("Add", ["before", "x"], ["after"]), oh.make_node("Identity", ["after"], ["total"])]
    inputs, outputs = {"x": (FLOAT, [1]), "before": (FLOAT, [1])}, {"after": (FLOAT, [1]), "total": (FLOAT, [1])}
    return model(tmp_path_factory.mktemp("adder") / "m.onnx", nodes, inputs, outputs)


class Replicas:
    """Real workers, one process each."""

    def __init__(self, folder: Path, file: Path, count: int, *options: str) -> None:
        self.sockets = [folder / f"r{number}" / "run" / "w.sock" for number in range(count)]
        for path in self.sockets:
            path.parent.mkdir(parents=True)
        self.processes = [start(file, path, *options) for path in self.sockets]

    async def __aenter__(self) -> "Replicas":
        while not all(path.exists() for path in self.sockets):
            assert all(process.poll() is None for process in self.processes)
            await asyncio.sleep(0.02)
        return self

    async def __aexit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    async def serve(self, box: Box, **more) -> None:
        replicas = [LocalReplica(f"r{number}", str(path)) for number, path in enumerate(self.sockets)]
        box.service.update(RouteTable(1, [Route("m", "m", 1, 5000, replicas=replicas, **more)]))
        while box.service.routes()[0].pool.slots < len(replicas):
            await asyncio.sleep(0.01)


async def infer(session, box: Box, x: np.ndarray, *, timeout_ms: int = 5000, **parameters):
    tensor = oip.Tensor("x", "FP32", x.shape, x.astype("<f4").tobytes())
    parts, headers = oip.render_request_parts([tensor], timeout_us=timeout_ms * 1000, **parameters)
    async with session.post(f"{box.url}/v2/models/m/infer", data=b"".join(parts), headers=headers) as response:
        body = await response.read()
        if response.status != 200:
            return response.status, json.loads(body)["error"], response.headers
        answer = oip.parse_answer(body, response.headers.get(oip.HEADER_LENGTH))
        return 200, {output.name: np.frombuffer(output.data, "<f4").reshape(output.shape) for output in answer.outputs}, response.headers


def held_bytes(box: Box) -> list[int]:
    """Of the memory shared with each replica."""
    return [r.connection.arena.held_bytes for r in box.service.routes()[0].pool._connected if r.connection and r.connection.arena]


def test_large_tensors_go_both_ways_in_shared_memory_and_nothing_stays_held(tmp_path, doubler):
    async def scene():
        async with fleet(tmp_path) as (here, _, session), Replicas(tmp_path, doubler, 2) as replicas:
            await replicas.serve(here)
            images = [np.random.default_rng(seed).random((2, 60_000), "f4") for seed in range(6)]
            for _ in range(4):
                for image, (status, outputs, _) in zip(
                    images, await asyncio.gather(*(infer(session, here, image) for image in images)), strict=True
                ):
                    assert status == 200
                    assert np.array_equal(outputs["y"], image * 2)
            await asyncio.sleep(0.05)
            assert held_bytes(here) == [0, 0]
            given_up = [asyncio.create_task(infer(session, here, image)) for image in images]
            await asyncio.sleep(0.002)
            for task in given_up:
                task.cancel()
            await asyncio.gather(*given_up, return_exceptions=True)
            await asyncio.sleep(0.3)
            assert held_bytes(here) == [0, 0]

    run(scene())


def test_a_replica_that_is_frozen_or_killed_under_load_costs_time_and_no_request(tmp_path, doubler):
    async def scene():
        async with fleet(tmp_path) as (here, _, session), Replicas(tmp_path, doubler, 2) as replicas:
            await replicas.serve(here)
            x = np.ones((1, 30_000), "f4")
            for _ in range(20):
                assert (await infer(session, here, x))[0] == 200
            for signum in (signal.SIGSTOP, signal.SIGKILL):
                asked = [asyncio.create_task(infer(session, here, x)) for _ in range(20)]
                await asyncio.sleep(0.01)
                os.kill(replicas.processes[0].pid, signum)
                asked += [asyncio.create_task(infer(session, here, x)) for _ in range(20)]
                answers = await asyncio.gather(*asked)
                assert [said for status, said, _ in answers if status != 200] == []
                assert all(np.array_equal(outputs["y"], x * 2) for _, outputs, _ in answers)
            assert held_bytes(here) == [0]

    run(scene())


async def used_to_quick_answers(session, here: Box) -> np.ndarray:
    """So that a replica which takes long is seen to be overdue."""
    x = np.ones((1, 5), "f4")
    for _ in range(60):
        assert (await infer(session, here, x))[0] == 200
    return x


async def refused_after_s(session, here: Box, x: np.ndarray) -> float:
    began = time.monotonic()
    assert (await infer(session, here, x, timeout_ms=2500))[0] == 503
    return time.monotonic() - began


def test_the_only_replica_held_up_for_a_moment_costs_time_and_no_request(tmp_path, doubler):
    async def scene():
        async with fleet(tmp_path) as (here, _, session), Replicas(tmp_path, doubler, 1) as replicas:
            await replicas.serve(here)
            x = await used_to_quick_answers(session, here)
            (process,) = replicas.processes
            process.send_signal(signal.SIGSTOP)
            held_up = asyncio.create_task(infer(session, here, x))
            await asyncio.sleep(0.15)
            waiting = [asyncio.create_task(infer(session, here, x)) for _ in range(8)]
            await asyncio.sleep(0.15)
            process.send_signal(signal.SIGCONT)
            assert [status for status, *_ in await asyncio.gather(held_up, *waiting)] == [200] * 9

    run(scene())


def test_who_comes_to_a_frozen_replica_that_is_the_only_one_is_told_at_once(tmp_path, doubler):
    async def scene():
        async with fleet(tmp_path) as (here, _, session), Replicas(tmp_path, doubler, 1) as replicas:
            await replicas.serve(here)
            x = await used_to_quick_answers(session, here)
            (process,) = replicas.processes
            process.send_signal(signal.SIGSTOP)
            frozen = asyncio.create_task(infer(session, here, x, timeout_ms=25_000))
            await asyncio.sleep(2)
            took_s = [await refused_after_s(session, here, x) for _ in range(4)]
            # How long an answer may take before its replica counts as frozen goes by the slowest of those before.
            assert min(took_s) < 1
            assert took_s[-1] < 1, "and so it stays"
            process.send_signal(signal.SIGCONT)
            assert (await frozen)[0] == 200

    run(scene())


def test_what_must_not_be_done_twice_is_not_tried_again(tmp_path):
    async def scene():
        async with fleet(tmp_path) as (here, _, session):
            await here.serve()
            here.worker.delay_s = 0.3
            asked = asyncio.create_task(
                session.post(
                    f"{here.url}/v2/models/echo/infer",
                    json={"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}], "parameters": {"idempotent": False}},
                )
            )
            await asyncio.sleep(0.1)
            await here.worker.die()
            await here.worker.start()
            async with await asked as response:
                assert response.status == 500
                assert "must not be tried again" in (await response.json())["error"]
            assert here.worker.calls == 1

    run(scene())


def test_sequences_keep_their_state_apart_and_say_when_it_is_lost(tmp_path, adder):
    state = codec.encode([StateTensor("before", "after")]).decode()

    async def scene():
        async with fleet(tmp_path) as (here, _, session), Replicas(tmp_path, adder, 2, "--state", state) as replicas:
            await replicas.serve(here)

            async def step(name: str, x: float, *, start: bool = False, end: bool = False):
                sequence = oip.SequenceStep(name, start, end)
                status, outputs, _ = await infer(session, here, np.array([x], "f4"), sequence=sequence, outputs=["total"])
                return (status, float(outputs["total"][0])) if status == 200 else (status, outputs)

            totals = {}
            for name in ("a", "b", "c", "d"):
                assert await step(name, 1.0, start=True) == (200, 1.0)
                totals[name] = 1.0
            for round_ in range(2, 6):
                answers = await asyncio.gather(*(step(name, float(round_)) for name in totals))
                totals = {name: total + round_ for name, total in totals.items()}
                assert [total for _, total in answers] == list(totals.values())
            status, words = await step("never-started", 1.0)
            assert status == 409
            assert "start it anew" in words
            pins = dict(here.service.routes()[0].pool._pins)
            assert {pins[name] for name in totals} == {"r0", "r1"}, "they are spread"
            replicas.processes[0].kill()
            await asyncio.sleep(0.1)
            for name, total in totals.items():
                status, said = await step(name, 1.0)
                if pins[name] == "r0":
                    assert status == 409
                    assert "interrupted" in said
                else:
                    assert (status, said) == (200, total + 1.0)
                    assert await step(name, 1.0, end=True) == (200, total + 2.0)
                    assert (await step(name, 1.0))[0] == 409, "it has ended"

    run(scene())


def test_a_sequence_that_one_gateway_interrupted_is_at_an_end_for_every_other(tmp_path, adder):
    """Two gateways stand for two processes of one: the second knows nothing of what the first told its caller."""
    state = codec.encode([StateTensor("before", "after")]).decode()

    async def scene():
        async with fleet(tmp_path) as (here, other, session), Replicas(tmp_path, adder, 1, "--state", state) as replicas:
            for box in (here, other):
                await replicas.serve(box)

            async def step(box: Box, x: float, *, start: bool = False, timeout_ms: int = 5000):
                sequence = oip.SequenceStep("s", start, False)
                status, outputs, _ = await infer(
                    session, box, np.array([x], "f4"), sequence=sequence, outputs=["total"], timeout_ms=timeout_ms
                )
                return (status, float(outputs["total"][0])) if status == 200 else (status, outputs)

            assert await step(here, 1.0, start=True) == (200, 1.0)
            assert await step(other, 2.0) == (200, 3.0), "the state is the worker's"
            (process,) = replicas.processes
            process.send_signal(signal.SIGSTOP)
            while " (stopped)" not in Path(f"/proc/{process.pid}/status").read_text():
                await asyncio.sleep(0.01)
            status, words = await step(here, 4.0, timeout_ms=300)
            process.send_signal(signal.SIGCONT)
            assert (status, "interrupted" in str(words)) == (409, True), words
            await asyncio.sleep(0.2)
            status, words = await step(other, 8.0)
            assert (status, "start it anew" in str(words)) == (409, True), words
            assert await step(other, 1.0, start=True) == (200, 1.0)
            await asyncio.sleep(0.2)
            assert await step(here, 2.0, start=True) == (200, 2.0)
            assert await step(here, 2.0) == (200, 4.0)

    run(scene())


def test_requests_share_runs_where_it_pays_and_each_gets_its_own_answer(tmp_path, doubler):
    async def scene():
        async with fleet(tmp_path) as (here, _, session), Replicas(tmp_path, doubler, 1) as replicas:
            await replicas.serve(here, batching=Batching(max_batch=8, max_wait_us=2000))
            for round_ in range(10):
                asked = [np.full((1, 5), round_ * 100 + number, "f4") for number in range(24)]
                answers = await asyncio.gather(*(infer(session, here, x) for x in asked))
                assert [said for status, said, _ in answers if status != 200] == []
                assert all(np.array_equal(outputs["y"], x * 2) for x, (_, outputs, _) in zip(asked, answers, strict=True))
            wrong = infer(session, here, np.ones((1, 5, 1), "f4"))
            status, right, refused = *(await asyncio.gather(infer(session, here, asked[0]), wrong)), None
            assert (status[0], right[0], refused) == (200, 400, None)
            runs = here.service.routes()[0].account.runs
            assert max(runs) > 1
            assert max(runs) <= 8

    run(scene())


def test_a_cloud_that_hangs_costs_no_request_and_is_left_alone_until_it_answers_again(tmp_path):
    async def scene():
        async with fleet(tmp_path) as (here, cloud, session):
            await here.serve(cloud, split="cloud")
            await cloud.serve()

            async def ask():
                x = [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]
                body = {"inputs": x, "parameters": {"timeout": 600_000}}
                began = time.perf_counter()
                async with session.post(f"{here.url}/v2/models/echo/infer", json=body) as response:
                    took_ms = (time.perf_counter() - began) * 1000
                    return response.status, response.headers.get("Skerry-Served-By"), response.headers["Skerry-Reason"], took_ms

            first = [await ask() for _ in range(5)]
            assert [by for _, by, *_ in first].count("cloud") >= 3, first  # the others were overdue on a busy machine
            cloud.worker.delay_s = 3.0
            answers = [await ask() for _ in range(6)]
            assert [(status, by) for status, by, *_ in answers] == [(200, "edge")] * 6
            assert all(took_ms < 600 for *_, took_ms in answers)
            async with session.get(f"{here.url}/v2/models/echo/decision") as response:
                considered = (await response.json())["numbers"]["upstreams"]
            assert [one["why_not"] for one in considered] == ["its circuit is open"]
            cloud.worker.delay_s = 0.0
            async with asyncio.timeout(25):
                while (await ask())[1] != "cloud":
                    await asyncio.sleep(0.2)

    run(scene())


def test_a_neighbour_that_hangs_costs_no_request_of_a_box_without_a_replica_and_is_asked_again_when_it_answers(tmp_path):
    async def scene():
        async with fleet(tmp_path) as (here, cloud, session), Box("edge-2", "edge", tmp_path) as neighbour:
            await neighbour.serve()
            upstreams = [Upstream("edge-2", neighbour.url, "edge"), Upstream("cloud-1", cloud.url, "cloud")]
            here.service.update(RouteTable(1, [Route("echo", "echo", 1, 1000, upstreams=upstreams)]))
            cloud.worker.delay_s = 0.02

            async def ask():
                x = [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]
                body = {"inputs": x, "parameters": {"timeout": 900_000}}
                async with session.post(f"{here.url}/v2/models/echo/infer", json=body) as response:
                    return response.status, response.headers.get("Skerry-Node"), response.headers.get("Skerry-Reason")

            first = [await ask() for _ in range(10)]
            assert [node for _, node, _ in first].count("edge-2") >= 6, first  # others were overdue on a busy machine
            neighbour.worker.delay_s = 3.0
            answers = [await ask() for _ in range(12)]
            assert [(status, node) for status, node, _ in answers] == [(200, "cloud-1")] * 12
            neighbour.worker.delay_s = 0.0
            async with asyncio.timeout(25):
                while (answer := await ask())[1] != "edge-2":
                    assert answer[0] == 200, answer
                    await asyncio.sleep(0.1)

    run(scene())


def test_the_cloud_budget_is_never_exceeded_by_several_processes_nor_by_starting_again(tmp_path):
    async def scene():
        file, budget = tmp_path / "budget.json", CloudBudget(requests_per_hour=50)
        taken = 0
        for _ in range(4):  # each pair stands for two processes that are then killed
            pair = [Budgets(file), Budgets(file)]
            for budgets in pair:
                budgets.update({"m": budget})
            for _ in range(40):
                await asyncio.sleep(0.005)
                for budgets in pair:
                    if budgets.has("m", 100):
                        taken += budgets.reserve("m", 100) is not None
        assert 30 <= taken <= 50

    run(scene())


def test_a_spent_budget_keeps_requests_here_and_the_box_says_so(tmp_path):
    async def scene():
        async with fleet(tmp_path) as (here, cloud, session):
            upstream = Upstream("cloud-1", cloud.url, "cloud")
            route = Route(
                "echo", "echo", 1, 1000, split="cloud", upstreams=[upstream], replicas=[LocalReplica("r-0", str(here.worker.path))],
                cloud_budget=CloudBudget(requests_per_hour=3),
            )  # fmt: skip
            here.service.update(RouteTable(1, [route]))
            await asyncio.sleep(0.3)
            x = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}
            by = []
            for _ in range(8):
                async with session.post(f"{here.url}/v2/models/echo/infer", json=x) as response:
                    by.append(response.headers["Skerry-Served-By"])
                await asyncio.sleep(0.05)
            assert by.count("cloud") <= 3
            assert by[-1] == "edge"
            async with session.get(f"{here.url}/v2/models/echo/decision?deadline_ms=1000") as response:
                decision = await response.json()
            assert [one["why_not"] for one in decision["numbers"]["upstreams"]] == ["the cloud budget of this hour is spent"]
            assert decision["recent"]

    run(scene())


def test_a_box_tells_what_would_have_become_of_requests_and_which_took_longest(tmp_path):
    async def scene():
        async with fleet(tmp_path) as (here, cloud, session):
            await here.serve(cloud, split="cloud")
            await cloud.serve()
            cloud.worker.delay_s = 0.005
            x = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}], "parameters": {"timeout": 900_000}}

            async def ask() -> str:
                async with session.post(f"{here.url}/v2/models/echo/infer", json=x) as response:
                    return response.headers["Skerry-Served-By"]

            async def told(box, what: str):
                async with session.get(f"{box.url}/v2/models/echo/{what}") as response:
                    return response.status, await response.json()

            by = [await ask() for _ in range(12)]
            assert "cloud" in by
            status, found = await told(here, "decisions")
            assert status == 200
            decided = found["before"]
            assert (sum(decided.values()), decided["refused"]) == (12, 0)
            assert decided["cloud"] > 0
            assert (found["after"], found["moved"]) == (decided, [])
            assert 1 <= found["cases"] <= 2, "one of ten seconds stands for all"
            for change in ("is_cut_off=true", "split=edge", "cloud_requests_per_hour=0", "link_ms=5000"):
                _, found = await told(here, f"decisions?minutes=5&{change}")
                assert found["before"] == decided
                assert found["after"] == {"edge": 12, "peer": 0, "cloud": 0, "refused": 0}, change
                assert sum(move["count"] for move in found["moved"]) == decided["cloud"]
                assert {(move["before"], move["after"]) for move in found["moved"]} == {("cloud", "edge")}
            _, found = await told(here, "decisions?deadline_ms=1")
            assert found["after"] == {"edge": 0, "peer": 0, "cloud": 0, "refused": 12}
            assert (await told(here, "decisions?minutes=0"))[1]["before"]["cloud"] == 0
            _, of_the_cloud = await told(cloud, "decisions")
            assert sum(of_the_cloud["before"].values()) == 0, "what was passed on was decided elsewhere"
            for wrong, field in (("deadline_ms=never", "deadline_ms"), ("split=up", "split"), ("cloud_requests_per_hour=-1", "per_hour")):
                status, refusal = await told(here, f"decisions?{wrong}")
                assert (status, field in refusal["error"]) == (400, True), refusal
            status, found = await told(here, "slowest")
            took = [one["took_ms"] for one in found["requests"]]
            assert (status, len(took), took) == (200, 10, sorted(took, reverse=True))
            slow = next(one for one in found["requests"] if one["who"] == "cloud")
            assert (slow["node"], slow["deadline_ms"]) == ("cloud-1", 900)
            parts = dict(part.split(";dur=") for part in slow["timing"].split(", "))
            assert 0 < float(parts["forward"]) <= slow["took_ms"], parts
            assert {"queue", "compute", "remote"} <= set(parts)

    run(scene())


def test_the_least_urgent_make_way_when_the_queue_is_full(tmp_path):
    async def scene():
        async with fleet(tmp_path, queue_limit=3) as (here, _, session):
            await here.serve()
            here.worker.delay_s = 0.1

            async def ask(priority: int) -> int:
                x = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}
                x["parameters"] = {"priority": priority, "timeout": 5_000_000}
                async with session.post(f"{here.url}/v2/models/echo/infer", json=x) as response:
                    return response.status

            low = [asyncio.create_task(ask(0)) for _ in range(6)]
            await asyncio.sleep(0.03)
            high = [asyncio.create_task(ask(1)) for _ in range(3)]
            assert await asyncio.gather(*high) == [200] * 3
            statuses = await asyncio.gather(*low)
            assert statuses.count(503) >= 3
            assert here.service.routes()[0].account.shed >= 1

    run(scene())


def test_a_shape_of_no_rows_and_a_scalar_are_answered_or_refused(tmp_path, doubler):
    async def scene():
        async with fleet(tmp_path) as (here, _, session), Replicas(tmp_path, doubler, 1) as replicas:
            await replicas.serve(here, batching=Batching(max_batch=4))
            assert (await infer(session, here, np.ones((0, 5), "f4")))[0] in (200, 400)
            assert (await infer(session, here, np.ones((), "f4")))[0] == 400
            with contextlib.suppress(aiohttp.ClientError):
                assert (await infer(session, here, np.ones((1, 5), "f4")))[0] == 200

    run(scene())
