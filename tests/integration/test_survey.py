"""The coordinator asks boxes for what they decided by and what took long: it adds up what makes sense, and says who told none and why."""

import asyncio
import time
from pathlib import Path

from aiohttp import web

from coordinator.gateways import Gateways
from coordinator.live import Live
from coordinator.news import News
from coordinator.registry import measurements, nodes
from coordinator.registry.database import Database
from coordinator.registry.measurements import Served
from coordinator.survey import MOST_ASKED, MOST_SHOWN, Survey
from coordinator.views import Views
from coordinator.vouching import Vouching
from skerry.wire import codec
from skerry.wire.decision import Decisions, Moved, Tally
from skerry.wire.messages import Birth, Presence
from skerry.wire.slowest import Slowest, SlowRequest


class Boxes:
    """Gateways that say what they were given to say, whatever they are asked."""

    def __init__(self) -> None:
        self.says: dict[str, tuple[int, bytes]] = {}
        self.asked: list[str] = []
        self.url = ""

    async def __aenter__(self) -> "Boxes":
        app = web.Application()
        app.router.add_get("/{box}/v2/models/{model}/{what}", self._answer)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        self.asked.append(request.path_qs)
        status, body = self.says[request.match_info["box"]]
        return web.Response(status=status, body=body)


async def surveying(folder: Path, boxes: Boxes, database: Database, *, online: dict[str, bool]) -> Survey:
    def work(tables) -> None:
        at_s = int(time.time()) - 60
        for number, (name, is_online) in enumerate(online.items()):
            url = f"{boxes.url}/{name}" if name != "nowhere" else ""
            nodes.save_birth(tables, name, Birth("edge", {}, url, "b", 1, "0.2.0", 8, 2**35), 1)
            nodes.save_presence(tables, name, Presence(is_online, "b", 1), 1)
            measurements.add_served(tables, [Served("m", at_s, name, edge=1000 - number)])

    await database.write(work)
    views = Views(database, Live(), Vouching(None), News(), rollup_s=2)
    return Survey(views, Gateways("fleet", None))


def decisions(before: Tally, after: Tally, *moved: Moved) -> tuple[int, bytes]:
    return 200, codec.encode(Decisions("m", 5, 3, before, after, list(moved)))


def test_what_boxes_tell_is_added_up_and_who_tells_none_is_named(tmp_path):
    async def scene() -> None:
        async with Boxes() as boxes, Database(tmp_path / "r.db") as database:
            names = ("good", "better", "older", "nonsense", "huge", "hostile", "worse", "nowhere")
            survey = await surveying(tmp_path, boxes, database, online={**dict.fromkeys(names, True), "away": False})
            boxes.says = {
                "good": decisions(Tally(edge=3, cloud=2), Tally(edge=5), Moved(7, 2, "cloud", "edge", "why")),
                "better": decisions(Tally(refused=1), Tally(peer=1), Moved(9, 1, "refused", "peer", "why too")),
                "older": (404, b'{"error": "no such path"}'),
                "nonsense": (200, b"<html>"),
                "huge": (200, b'{"a": "' + b"x" * 2**21 + b'"}'),
                "hostile": decisions(Tally(edge=2**53), Tally(edge=2**53)),
                "worse": decisions(Tally(edge=2**70, peer=-5), Tally()),
            }
            found = await survey.decisions("m", {"split": "edge", "node": "ignored", "strange": "1"}, minutes=30)
            assert found.asked == ["better", "good", "hostile"]
            assert (found.boxes, found.cases, found.since_ms) == (9, 9, 5)
            assert (found.before.cloud, found.before.refused, found.before.edge, found.before.peer) == (2, 1, 2**53, 0)
            assert [(move.at_ms, move.node, move.after) for move in found.moved] == [(9, "better", "peer"), (7, "good", "edge")]
            told = " | ".join(found.silent)
            for words in (
                "away: it is",
                "box older said 404",
                "box nonsense says what",
                "box worse says what",
                "box huge",
                "nowhere: where its gateway is",
            ):
                assert words in told, told
            assert len(found.silent) == 6
            assert {asked.partition("?")[2] for asked in boxes.asked} == {"split=edge&minutes=30"}
            alone = await survey.decisions("m", {}, minutes=30, node="good")
            assert (alone.asked, alone.silent, alone.before.edge) == (["good"], [], 3)
            assert (await survey.decisions("m", {}, minutes=30, node="x" * 300)).silent == [f"{'x' * 80}: there is no such box"]

    asyncio.run(scene())


def test_the_slowest_of_all_come_first_and_no_more_boxes_are_asked_than_bear_it(tmp_path):
    async def scene() -> None:
        async with Boxes() as boxes, Database(tmp_path / "r.db") as database:
            names = [f"box-{number:02}" for number in range(MOST_ASKED + 6)]
            survey = await surveying(tmp_path, boxes, database, online=dict.fromkeys(names, True))
            for number, name in enumerate(names):
                slow = [SlowRequest(1, float(100 * step + number), 50.0, "edge", name, "why", "queue;dur=1") for step in range(10)]
                boxes.says[name] = 200, codec.encode(Slowest("m", slow))
            found = await survey.slowest("m", minutes=60)
            assert (found.boxes, found.asked) == (len(names), names[:MOST_ASKED]), "those that had the most requests"
            took = [one.took_ms for one in found.requests]
            assert (len(took), took) == (MOST_SHOWN, sorted(took, reverse=True))
            assert took[0] == 900.0 + MOST_ASKED - 1
            assert found.requests[0].asked == names[MOST_ASKED - 1]

    asyncio.run(scene())
