"""What a gateway tells the agent on its Unix socket: counted once, and its sampled decisions made events once."""

import asyncio

import msgspec
from aiohttp import web

from edge_agent.link.outbox import Outbox
from edge_agent.link.telemetry import Telemetry
from skerry.wire import codec
from skerry.wire.box import GatewayTotals, Routed, ServeTotals

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
            outbox_depth=outbox.depth,
            before=outbox.last_totals(),
            offer=offer,
            routed=lambda totals: outbox.add_routed("request.routed", totals, at_ms=60_000),
        )
        await telemetry.run(stop)

    asyncio.run(scene())
    assert [event.text for event in outbox.events_after(0, 10)] == [one.text for one in SECOND.routed]
    assert outbox.last_totals() == msgspec.structs.replace(SECOND, routed=[])
    outbox.close()
