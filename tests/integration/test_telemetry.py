"""What a gateway tells the agent on its Unix socket: counted once, and its sampled decisions made events once."""

import asyncio
import subprocess
import sys
import threading
import time

import msgspec
from aiohttp import web

from edge_agent.link.outbox import Outbox
from edge_agent.link.telemetry import Standing, Telemetry
from skerry.wire import codec
from skerry.wire.box import GatewayTotals, Routed, ServeTotals
from skerry.wire.messages import GpuSample

FIRST = GatewayTotals(1, "box", "edge", [ServeTotals("d", edge=3)], [Routed(1, 7, "d", "here: 4 ms of 50 ms left")])
SECOND = GatewayTotals(1, "box", "edge", [ServeTotals("d", edge=5)], [*FIRST.routed, Routed(2, 8, "d", "to c1: 30 ms of 50 ms left")])


def test_each_decision_is_an_event_once_over_two_agents_and_the_counters_are_kept_without_them(tmp_path):
    answers = [FIRST, FIRST, SECOND, SECOND]
    outbox = Outbox(tmp_path / "o.db", most_bytes=2**23)

    async def scene() -> None:
        async def tell(_: web.Request) -> web.Response:
            return web.Response(body=codec.encode(answers.pop(0) if len(answers) > 1 else answers[0]))

        app = web.Application()
        app.add_routes([web.get("/totals", tell)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.UnixSite(runner, str(tmp_path / "g")).start()
        for _ in range(2):
            await asyncio.wait_for(an_agent(), 20)
        await runner.cleanup()

    async def an_agent() -> None:
        stop = asyncio.Event()
        readings = 0

        async def offer(sample, totals) -> None:
            nonlocal readings
            outbox.add_sample(sample, sent_at_ms=0, totals=totals)
            readings += 1
            if readings == 2:
                stop.set()

        telemetry = Telemetry(
            every_s=0.05,
            gateway_socket=tmp_path / "g",
            epoch=lambda: outbox.epoch,
            next_seq=outbox.next_sample_seq,
            standing=lambda: Standing(*outbox.depth(), 3.5),
            before=outbox.last_totals(),
            offer=offer,
            routed=lambda totals: outbox.add_routed("request.routed", totals, at_ms=60_000),
        )
        await telemetry.run(stop)

    asyncio.run(scene())
    assert [event.text for event in outbox.events_after(0, 10)] == [one.text for one in SECOND.routed]
    assert outbox.last_totals() == msgspec.structs.replace(SECOND, routed=[])
    outbox.close()


def test_a_gpu_driver_that_hangs_or_fails_costs_its_own_readings_and_nothing_else(tmp_path):
    """As NVML does on a GPU that fell off the bus: the call never returns."""
    hangs, asked = threading.Event(), []
    gpu = GpuSample("GPU-0", 0.5, 100, 50.0, 90.0)

    def read_gpus() -> list[GpuSample]:
        asked.append(time.monotonic())
        if len(asked) == 2:
            hangs.wait()
        if len(asked) == 3:
            raise RuntimeError("GPU is lost")
        return [gpu]

    seen: list[list[GpuSample]] = []

    async def scene() -> None:
        stop = asyncio.Event()

        async def offer(sample, _) -> None:
            seen.append(sample.gpus)
            if len(seen) == 4:
                assert len(asked) == 2, "it is not asked again while it hangs"
                hangs.set()
            if len(seen) == 7:
                stop.set()

        telemetry = Telemetry(
            every_s=0.05, gateway_socket=tmp_path / "none", epoch=lambda: "e", next_seq=lambda: len(seen) + 1,
            standing=lambda: Standing(0, 0), before=None, offer=offer, routed=lambda _: None, read_gpus=read_gpus,
        )  # fmt: skip
        async with asyncio.timeout(30):
            await telemetry.run(stop)

    asyncio.run(scene())
    assert seen == [[gpu], [], [], [], [gpu], [], [gpu]], "and its late answer is not lost"


def test_a_driver_that_never_answers_does_not_keep_the_program_from_its_end(tmp_path):
    program = (
        "import asyncio, threading\nfrom skerry.runtime import lifecycle\n"
        "async def main():\n    lifecycle.in_a_thread_of_its_own(threading.Event().wait)\n    await asyncio.sleep(0.1)\n"
        "asyncio.run(main())"
    )
    subprocess.run([sys.executable, "-c", program], timeout=20, check=True)
