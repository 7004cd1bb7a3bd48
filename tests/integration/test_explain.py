"""``skerry explain --at``: a gateway's word on who would answer, as a person reads it. The gateway is a server of this test's."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from aiohttp import web

NUMBERS = {
    "remaining_ms": 50.0,
    "here_ms": 72.34,
    "queue_ms": 60.0,
    "service_ms": 12.34,
    "upstreams": [
        {"node": "mill-2", "tier": "edge", "estimate_ms": 31.0, "link_ms": 2.5, "remote_ms": 28.5, "why_not": ""},
        {"node": "mill-3", "tier": "edge", "estimate_ms": 40.0, "link_ms": 2.5, "remote_ms": 37.5},
        {"node": "cloud-1", "tier": "cloud", "estimate_ms": 140.5, "link_ms": 120.0, "remote_ms": 20.5, "why_not": ""},
        {"node": "cloud-2", "tier": "cloud", "estimate_ms": None, "link_ms": None, "remote_ms": None, "why_not": "budget [spent]"},
    ],
}
FORWARD = {
    "deployment": "sorter", "model": "sorter-net", "version": 3, "decision": "forward", "served_by": "peer", "node": "mill-2",
    "reason": "here 72 ms of 50 ms left, at mill-2 31 ms", "numbers": NUMBERS,
    "recent": [{"at_ms": 1_700_000_000_000, "text": "here: 12 ms of 50 ms left"}], "new_in_a_later_version": 1,
}  # fmt: skip


class Gateway:
    """Answers each call with ``status`` and ``body``, and notes what was asked."""

    def __init__(self) -> None:
        self.status, self.body = 200, json.dumps(FORWARD)
        self.asked: list[str] = []
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append(request.raw_path)
        return web.Response(status=self.status, text=self.body, content_type="application/json")


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    gateway, loop = Gateway(), asyncio.new_event_loop()

    async def serve() -> web.AppRunner:
        app = web.Application()
        app.add_routes([web.get("/{path:.*}", gateway.answer)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        gateway.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    thread = threading.Thread(target=loop.run_forever, name="gateway")
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(serve(), loop).result(20)
    yield gateway
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(20)
    loop.close()


def explain(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("SKERRY_")} | {"COLUMNS": "160", "TZ": "UTC"}
    command = [sys.executable, "-m", "skerry", "explain", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_who_could_answer_how_long_each_would_take_and_why_not_is_a_table(gateway):
    done = explain("sorter", "--at", gateway.url, "--deadline", "50ms", "--size", "588KiB")
    assert done.returncode == 0, done.stderr
    assert gateway.asked == ["/v2/models/sorter/decision?priority=0&deadline_ms=50&size_bytes=602112"]
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines == [
        "sorter sorter-net:3",
        "a request that has 50.0 ms is passed on to mill-2 (peer): here 72 ms of 50 ms left, at mill-2 31 ms",
        "who tier would take of that why not",
        "this box 72.3 ms queue 60.0 ms, service 12.3 ms longer than the 50.0 ms that are left",
        "→ mill-2 edge 31.0 ms link 2.5 ms, there 28.5 ms",
        "mill-3 edge 40.0 ms link 2.5 ms, there 37.5 ms not needed",
        "cloud-1 cloud 140 ms link 120 ms, there 20.5 ms longer than the 50.0 ms that are left",
        "cloud-2 cloud - budget [spent]",
        "at what was decided lately",
        "2023-11-14 22:13:20 here: 12 ms of 50 ms left",
    ]


def test_an_answer_here_is_marked_and_what_is_not_given_is_left_to_the_gateway(gateway):
    numbers = {"remaining_ms": 50, "here_ms": 4, "queue_ms": 0, "service_ms": 4, "upstreams": []}
    gateway.body = json.dumps({**FORWARD, "decision": "here", "node": "mill-1", "reason": "fits here", "numbers": numbers, "recent": []})
    done = explain("a b/c", "--at", f"{gateway.url}/", "--priority", "2")
    assert gateway.asked == ["/v2/models/a%20b%2Fc/decision?priority=2"]
    assert "a request that has 50.0 ms is answered here, on mill-1: fits here" in done.stdout
    assert "→ this box" in done.stdout


def test_a_refusal_says_that_there_is_no_replica(gateway):
    gateway.body = json.dumps({"deployment": "sorter", "decision": "refuse", "reason": "no replica is ready here; there is no upstream"})
    done = explain("sorter", "--at", gateway.url)
    assert "a request is refused: no replica is ready here; there is no upstream" in done.stdout
    assert done.returncode == 0, "the question was answered"


def test_json_is_the_gateways_answer(gateway):
    told = json.loads(explain("sorter", "--at", gateway.url, "--json").stdout)
    assert (told["decision"], told["node"], told["numbers"]["upstreams"][0]["link_ms"]) == ("forward", "mill-2", 2.5)


@pytest.mark.parametrize(
    ("status", "body", "code", "words"),
    [
        (404, '{"error": "there is no model \'x\' here"}', 5, "there is no model 'x' here"),
        (400, '{"error": "deadline_ms: not a number"}', 4, "deadline_ms: not a number"),
        (503, "", 1, "status 503"),
        (200, "<html>", 1, "is it a Skerry gateway?"),
        (200, '{"deployment": "d", "decision": "perhaps", "reason": ""}', 1, "$.decision"),
        (200, '{"deployment": "d", "decision": "here", "reason": "", "numbers": {"here_ms": "soon"}}', 1, "$.numbers.here_ms"),
    ],
)
def test_a_gateway_that_does_not_say_is_quoted(gateway, status, body, code, words):
    gateway.status, gateway.body = status, body
    done = explain("x", "--at", gateway.url)
    assert done.returncode == code
    assert words in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--at", "http://127.0.0.1:9", "--node", "n"], "--node goes without --at"),
        (["--deadline", "50ms"], "go with --at"),
        (["--at", "http://127.0.0.1:9", "--deadline", "50"], "--deadline: expected a duration"),
        (["--at", "http://127.0.0.1:9", "--size", "big"], "--size: expected a size"),
        (["--at", "mill-1"], "is not an http:// or https:// address"),
    ],
)
def test_what_can_not_be_asked_is_wrong_usage(arguments, words):
    done = explain("x", *arguments)
    assert done.returncode == 2
    assert words in done.stderr


def test_a_gateway_that_is_not_there_is_said():
    done = explain("x", "--at", "http://127.0.0.1:9")
    assert done.returncode == 3
    assert "does not answer" in done.stderr
