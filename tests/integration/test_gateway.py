"""The gateway's promises, on real sockets: overflow, refusal at once, never late, a worker's death costs time only."""

import asyncio
import contextlib
import json
import struct
import time
from pathlib import Path

import aiohttp
import pytest

from edge_agent.gateway import http
from edge_agent.gateway.app import Api
from edge_agent.gateway.books import Books
from edge_agent.gateway.budget import Budgets
from edge_agent.gateway.facts import Facts
from edge_agent.gateway.inquiry import Inquiry
from edge_agent.gateway.ledger import Ledger
from edge_agent.gateway.processes import split
from edge_agent.gateway.samples import Samples
from edge_agent.gateway.service import Service
from edge_agent.gateway.upstream import FORWARDED, Upstreams
from skerry.wire import codec, ipc
from skerry.wire.box import GatewayTotals, LocalReplica, Route, RouteTable
from skerry.wire.messages import Upstream

HELLO = ipc.Hello([ipc.TensorSpec("x", "FP32", (-1,))], [ipc.TensorSpec("y", "FP32", (-1,))], "test", 1.0, True)


class ScriptedWorker:
    """A worker on a Unix socket that takes ``delay_s`` for each call; ``behave`` may make it misbehave instead."""

    def __init__(self, path: Path, delay_s: float = 0.0) -> None:
        self.path = path
        self.delay_s = delay_s
        self.calls = 0
        self.behave = ""
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, str(self.path))

    async def die(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()
        self.path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        writer.writelines(ipc.frame(HELLO, []))
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                header_bytes, body_bytes = ipc.parse_prefix(await reader.readexactly(ipc.PREFIX.size))
                batch = ipc.parse_header(await reader.readexactly(header_bytes), ipc.Batch)
                body = await reader.readexactly(body_bytes)
                self.calls += 1
                await asyncio.sleep(self.delay_s)
                (call,) = batch.calls
                if self.behave == "garbage":
                    writer.write(b"\xff" * 64)
                elif self.behave == "huge":
                    writer.write(struct.pack("<II", 10, 2**31))
                elif self.behave == "short tensor":
                    head = ipc.TensorHead("y", "FP32", (9,), 4)
                    writer.writelines(ipc.frame(ipc.Answers([ipc.Answer(call.call, [head])]), [b"1234"]))
                elif self.behave == "another call":
                    writer.writelines(ipc.frame(ipc.Answers([ipc.Answer(call.call + 7)]), []))
                elif self.behave == "outside":
                    head = ipc.TensorHead("y", "FP32", (1,), 4, 4096)
                    writer.writelines(ipc.frame(ipc.Answers([ipc.Answer(call.call, [head])]), []))
                else:
                    head = ipc.TensorHead("y", "FP32", call.inputs[0].shape, len(body))
                    writer.writelines(ipc.frame(ipc.Answers([ipc.Answer(call.call, [head], int(self.delay_s * 1e6))]), [body]))


class Box:
    """A gateway in this process, on a port of its own."""

    def __init__(self, node: str, tier: str, folder: Path, queue_limit: int = 64) -> None:
        self.node = node
        self.worker = ScriptedWorker(folder / node / "worker.sock")
        self._tier = tier
        self._queue_limit = queue_limit
        self._stack = contextlib.AsyncExitStack()
        self.url = ""

    async def __aenter__(self) -> "Box":
        await self.worker.start()
        upstreams = await self._stack.enter_async_context(Upstreams(node=self.node, proxy="", limit=8, answer_limit_bytes=2**20))
        ledger, samples, place = Ledger(self.node, self._tier), Samples(), split(1)
        self.service = Service(
            node=self.node, tier=self._tier, upstreams=upstreams, ledger=ledger, budgets=Budgets(self.worker.path.with_name("budget.json")),
            samples=samples, queue_limit=self._queue_limit, arena_bytes=2**20, look=lambda: None,
        )  # fmt: skip
        books = Books(place, ledger, samples)
        facts = Facts(self.service, node=self.node, tier=self._tier, accounts=books.accounts)
        inquiry = Inquiry(self.service, samples, node=self.node, tier=self._tier)
        api = Api(self.service, facts, regions=None, body_limit_bytes=2**20, for_agent=True, books=books, inquiry=inquiry)
        self.server = http.Server(api, body_limit_bytes=2**20, memory_limit_bytes=2**30, connection_limit=100)
        listener = await asyncio.get_running_loop().create_server(self.server.connection, "127.0.0.1", 0)
        self._stack.callback(listener.close)
        self.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_) -> None:
        await self.server.drain(1.0)
        self.service.update(RouteTable())
        await self._stack.aclose()
        with contextlib.suppress(AssertionError):
            await self.worker.die()
        await asyncio.sleep(0.05)

    async def serve(self, upstream: "Box | None" = None, **more) -> None:
        upstreams = [Upstream(upstream.node, upstream.url, "cloud")] if upstream else []
        replicas = [LocalReplica("r-0", str(self.worker.path))]
        self.service.update(RouteTable(1, [Route("echo", "echo", 1, 1000, replicas=replicas, upstreams=upstreams, **more)]))
        while not self.service.routes()[0].pool.slots:
            await asyncio.sleep(0.01)


async def ask(session, box: Box, timeout_ms: int = 1000, headers=None):
    body = json.dumps(
        {"inputs": [{"name": "x", "shape": [2], "datatype": "FP32", "data": [1, 2]}], "parameters": {"timeout": timeout_ms * 1000}}
    )
    started = time.perf_counter()
    async with session.post(f"{box.url}/v2/models/echo/infer", data=body, headers=headers or {}) as response:
        answer = await response.json()
        return response.status, answer, response.headers, (time.perf_counter() - started) * 1000


@contextlib.asynccontextmanager
async def fleet(tmp_path, **edge):
    async with (
        Box("edge-1", "edge", tmp_path, **edge) as here,
        Box("cloud-1", "cloud", tmp_path) as cloud,
        aiohttp.ClientSession() as session,
    ):
        await cloud.serve()
        yield here, cloud, session


def run(scene) -> None:
    asyncio.run(asyncio.wait_for(scene, 30))


def test_what_would_be_late_here_goes_to_the_cloud_and_comes_back_when_the_box_is_free(tmp_path):
    async def scene():
        async with fleet(tmp_path) as (here, cloud, session):
            await here.serve(cloud)
            here.worker.delay_s = 0.1
            for _ in range(3):
                assert (await ask(session, here))[2]["Skerry-Served-By"] == "edge"
            replies = await asyncio.gather(*(ask(session, here, timeout_ms=350) for _ in range(10)))
            assert [status for status, *_ in replies] == [200] * 10
            by = [headers["Skerry-Served-By"] for _, _, headers, _ in replies]
            assert 1 <= by.count("edge") <= 3
            assert by.count("cloud") == 10 - by.count("edge")
            assert all(took_ms < 350 for *_, took_ms in replies)
            cloudy = next(reply for reply in replies if reply[2]["Skerry-Served-By"] == "cloud")
            assert cloudy[1]["parameters"]["node"] == cloudy[2]["Skerry-Node"] == "cloud-1"
            assert "forward;dur=" in cloudy[2]["Server-Timing"]
            assert (await ask(session, here, timeout_ms=350))[2]["Skerry-Served-By"] == "edge"

    run(scene())


def test_what_nobody_can_do_in_time_is_refused_at_once_with_a_time_to_come_again(tmp_path):
    async def scene():
        async with fleet(tmp_path) as (here, _, session):
            await here.serve()
            here.worker.delay_s = 0.2
            await asyncio.gather(*(ask(session, here) for _ in range(2)))
            busy = [asyncio.create_task(ask(session, here, timeout_ms=2000)) for _ in range(3)]
            await asyncio.sleep(0.02)
            status, answer, headers, took_ms = await ask(session, here, timeout_ms=150)
            assert status == 503
            assert took_ms < 100
            assert int(headers["Retry-After"]) >= 1
            assert "here it would take" in answer["error"]
            assert "there is no upstream" in answer["error"]
            assert [status for status, *_ in await asyncio.gather(*busy)] == [200] * 3

    run(scene())


def test_the_queue_is_bounded(tmp_path):
    async def scene():
        async with fleet(tmp_path, queue_limit=2) as (here, _, session):
            await here.serve()
            here.worker.delay_s = 0.1
            replies = await asyncio.gather(*(ask(session, here, timeout_ms=5000) for _ in range(8)))
            assert sorted(status for status, *_ in replies) == [200] * 3 + [503] * 5
            assert sum("the queue here is full (2)" in reply[1].get("error", "") for reply in replies) == 5

    run(scene())


def test_no_answer_is_late_even_when_the_estimate_was_wrong(tmp_path):
    async def scene():
        async with fleet(tmp_path) as (here, _, session):
            await here.serve()
            await ask(session, here)
            here.worker.delay_s = 0.5
            status, answer, _, took_ms = await ask(session, here, timeout_ms=120)
            assert status == 503
            assert took_ms < 200
            assert "not done within 120 ms" in answer["error"]
            here.worker.delay_s = 0.0
            await asyncio.sleep(0.6)  # the worker was busy with it all the same; then it serves again
            assert (await ask(session, here))[0] == 200

    run(scene())


def test_a_worker_that_dies_in_mid_request_costs_the_caller_time_and_no_error(tmp_path):
    async def scene():
        async with fleet(tmp_path) as (here, _, session):
            await here.serve()
            here.worker.delay_s = 0.3
            asked = asyncio.create_task(ask(session, here, timeout_ms=3000))
            await asyncio.sleep(0.1)
            await here.worker.die()
            await asyncio.sleep(0.2)
            here.worker.delay_s = 0.0
            await here.worker.start()
            status, answer, headers, _ = await asked
            assert status == 200, answer
            assert answer["outputs"][0]["data"] == [1.0, 2.0]
            assert "closed the connection" in headers["Skerry-Reason"]
            assert here.worker.calls == 2

    run(scene())


def test_a_worker_that_dies_with_a_queue_before_it_leaves_no_call_counted_as_running(tmp_path):
    async def scene():
        async with fleet(tmp_path) as (here, _, session):
            await here.serve()
            for _ in range(3):
                here.worker.delay_s = 0.3
                asked = [asyncio.create_task(ask(session, here, timeout_ms=4000)) for _ in range(4)]
                await asyncio.sleep(0.1)
                await here.worker.die()
                here.worker.delay_s = 0.0
                await here.worker.start()
                assert [status for status, *_ in await asyncio.gather(*asked)] == [200] * 4
            pool = here.service.routes()[0].pool
            assert (pool.slots, pool.running, pool.waiting) == (1, 0, 0)

    run(scene())


def test_what_is_forwarded_names_the_version_that_was_meant(tmp_path):
    async def scene():
        async with fleet(tmp_path) as (here, cloud, session):
            await here.serve(cloud, split="cloud")
            newer = Route("other", "echo", 2, 1000, replicas=[LocalReplica("r-0", str(cloud.worker.path))])
            cloud.service.update(RouteTable(2, [cloud.service.routes()[0].route, newer]))
            while not all(served.pool.slots for served in cloud.service.routes()):
                await asyncio.sleep(0.01)
            status, answer, headers, _ = await ask(session, here)
            assert (status, headers["Skerry-Served-By"], answer["model_version"]) == (200, "cloud", "1")

    run(scene())


def test_a_cloud_that_is_gone_or_overloaded_is_left_alone_for_a_while(tmp_path):
    async def scene():
        async with fleet(tmp_path) as (here, cloud, session):
            await here.serve(cloud, split="cloud")
            by = [(await ask(session, here))[2]["Skerry-Served-By"] for _ in range(5)]
            assert "cloud" in by, "one that is held up for a moment is answered here as well, and first"
            cloud.service.update(RouteTable())  # it does not know the deployment yet, or no longer
            status, _, headers, _ = await ask(session, here)
            assert (status, headers["Skerry-Served-By"]) == (200, "edge")
            assert "cloud-1: status 404" in headers["Skerry-Reason"]
            await asyncio.sleep(0.6)  # until it is no longer left alone
            cloud.url = "http://127.0.0.1:9"
            await here.serve(cloud, split="cloud")
            status, _, headers, _ = await ask(session, here)
            assert (status, headers["Skerry-Served-By"]) == (200, "edge")
            assert "cloud-1: Client" in headers["Skerry-Reason"]
            assert "Skerry-Reason" in (await ask(session, here))[2]

    run(scene())


def test_a_forwarded_request_is_answered_or_refused_but_not_passed_on_again(tmp_path):
    async def scene():
        async with fleet(tmp_path) as (here, cloud, session):
            await here.serve(cloud)
            here.worker.delay_s = 0.2
            await ask(session, here)
            reply = await ask(session, here, timeout_ms=50, headers={FORWARDED: "another-box"})
            assert reply[0] == 503
            assert cloud.worker.calls == 0

    run(scene())


@pytest.mark.parametrize("behaviour", ["garbage", "huge", "short tensor", "another call", "outside"])
def test_a_worker_that_speaks_nonsense_is_cut_off_and_harms_nobody(tmp_path, behaviour):
    async def scene():
        async with fleet(tmp_path) as (here, cloud, session):
            await here.serve(cloud)
            here.worker.behave = behaviour
            status, answer, headers, _ = await ask(session, here)
            assert status in (200, 503), answer
            if status == 200:
                assert headers["Skerry-Served-By"] == "cloud"
            here.worker.behave = ""
            await asyncio.sleep(0.3)
            assert (await ask(session, here))[0] == 200

    run(scene())


def test_the_totals_for_the_agent_add_up(tmp_path):
    async def scene():
        async with fleet(tmp_path) as (here, _, session):
            await here.serve()
            for _ in range(5):
                await ask(session, here)
            here.worker.delay_s = 0.3
            await ask(session, here, timeout_ms=50)
            async with session.get(f"{here.url}/totals") as response:
                totals = codec.decode(await response.read(), GatewayTotals)
            (echo,) = totals.deployments
            assert (echo.edge, echo.cloud, echo.refused, echo.late) == (5, 0, 1, 0)
            assert sum(echo.latency.values()) == 5
            await asyncio.sleep(0.4)

    run(scene())
