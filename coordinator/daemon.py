"""The coordinator put together: who calls whom is read here and nowhere else."""

import asyncio

from aiohttp import web

from coordinator.api.access import Access
from coordinator.api.answers import json_answer, problems
from coordinator.api.calls import CALLS, Calls
from coordinator.api.openapi import document
from coordinator.ca.signer import KeyUnusable, Signer
from coordinator.commands import Commands
from coordinator.config import Config
from coordinator.console import pages
from coordinator.housekeeping import Housekeeping
from coordinator.ingest import Ingest
from coordinator.live import Live
from coordinator.model_store import ModelStore
from coordinator.news import News
from coordinator.plan_loop import PlanLoop
from coordinator.publish import Publisher
from coordinator.registry.database import Database
from coordinator.registry.migrations import TooNew
from coordinator.session import FleetSession, Message
from coordinator.views import Views
from skerry.runtime import lifecycle, log, sdnotify, settings
from skerry.wire.messages import Ack, LogsRequest

logger = log.get("coordinator")

SHUTDOWN_S = 3.0


async def main(config: Config, stop: asyncio.Event) -> None:
    """Run the coordinator until ``stop`` is set."""
    try:
        signer = Signer(config.state_dir)
        async with Database(config.state_dir / "registry.db") as database:
            await _serve(config, signer, database, stop)
    except (KeyUnusable, TooNew) as exc:
        raise settings.SettingsError(f"state_dir: {exc}") from exc


async def _serve(config: Config, signer: Signer, database: Database, stop: asyncio.Event) -> None:
    live, news = Live(), News()
    queue: asyncio.Queue[Message] = asyncio.Queue(maxsize=config.queue)

    async def on_connected() -> None:
        await publisher.publish_all()

    async def ack(node: str, word: Ack) -> None:
        await publisher.ack(config.fleet, node, word)

    async def ask_logs(node: str, correlation: bytes, request: LogsRequest) -> None:
        await publisher.ask_logs(config.fleet, node, correlation, request)

    commands = Commands(ask_logs)
    session = FleetSession(config.broker, config.fleet, queue=queue, on_connected=on_connected, on_reply=commands.answered)
    publisher = Publisher(session, signer, database)
    plan_loop = PlanLoop(database, publisher, news, fleet=config.fleet)
    ingest = Ingest(database, live=live, news=news, ack=ack, replan=plan_loop.wake, rollup_s=config.rollup_s)
    housekeeping = Housekeeping(
        database,
        live,
        news,
        keep_rollups_h=config.keep_rollups_h,
        keep_events=config.keep_events,
        is_connected=lambda: session.is_connected,
    )
    access = Access(config.state_dir)
    views = Views(database, live, fleet=config.fleet, rollup_s=config.rollup_s)
    calls = Calls(
        database=database,
        views=views,
        store=ModelStore(config.state_dir / "models", limit_bytes=config.model_limit_bytes),
        news=news,
        access=access,
        replan=plan_loop.wake,
        commands=commands,
        is_connected=lambda: session.is_connected,
        public_url=config.public_url,
    )
    runner = web.AppRunner(make_app(config, calls, views, access), access_log=None, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    try:
        host, port = settings.split_listen(config.listen)
        await web.TCPSite(runner, host, port).start()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(session.run(stop), name="coordinator.session")
            tasks.create_task(ingest.run(queue, stop), name="coordinator.ingest")
            tasks.create_task(plan_loop.run(stop), name="coordinator.plan")
            tasks.create_task(housekeeping.run(stop), name="coordinator.housekeeping")
            tasks.create_task(lifecycle.feed_watchdog(stop, lambda: True), name="coordinator.watchdog")
            logger.info("coordinator.up", listen=config.listen, url=config.public_url)
            sdnotify.notify("READY=1")
    finally:
        await runner.cleanup()


def make_app(config: Config, calls: Calls, views: Views, access: Access) -> web.Application:
    """The API under ``/v1`` and the console everywhere else."""
    app = web.Application(middlewares=[problems], client_max_size=config.model_limit_bytes)
    app.add_routes([web.route(call.method, call.path, calls.handler(call)) for call in CALLS])
    described = document()

    async def openapi(_: web.Request) -> web.Response:
        return json_answer(described)

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    app.add_routes([web.get("/openapi.json", openapi), web.get("/healthz", healthz)])
    pages.attach(app, views, access, fleet=config.fleet, status=calls.status)
    return app
