"""The gateway put together."""

import asyncio
import os

from aiohttp import web

from edge_agent.gateway import routes
from edge_agent.gateway.app import Endpoints, make_app
from edge_agent.gateway.config import Config
from edge_agent.gateway.ledger import Ledger
from edge_agent.gateway.service import Service
from edge_agent.gateway.upstream import Upstreams
from skerry.runtime import lifecycle, log, sdnotify, settings
from skerry.wire.box import RouteTable

logger = log.get("gateway")

SHUTDOWN_S = 5.0
READ_BUFFER_BYTES = 4 * 1024 * 1024
"""A body of this size is read without stopping in between."""


async def main(config: Config, stop: asyncio.Event) -> None:
    """Serve until ``stop`` is set; requests under way then get SHUTDOWN_S to end."""
    host, port = settings.split_listen(config.listen)
    ledger = Ledger(config.node, config.tier)
    async with Upstreams(node=config.node, proxy=config.upstream_proxy, limit=config.upstream_limit) as upstreams:
        service = Service(node=config.node, tier=config.tier, upstreams=upstreams, ledger=ledger, queue_limit=config.queue_limit)
        endpoints = Endpoints(service, ledger, node=config.node, tier=config.tier)
        public, private = (
            web.AppRunner(
                make_app(endpoints, body_limit_bytes=config.body_limit_bytes, for_agent=for_agent),
                access_log=None,
                shutdown_timeout=SHUTDOWN_S,
                keepalive_timeout=75,
                read_bufsize=READ_BUFFER_BYTES,
            )
            for for_agent in (False, True)
        )
        try:
            await public.setup()
            await private.setup()
            await web.TCPSite(public, host, port, reuse_port=None).start()
            await _listen_privately(config, private)
            logger.info("gateway.up", listen=config.listen)
            sdnotify.notify("READY=1")
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(routes.follow(config.routes_file, service.update, stop), name="gateway.routes")
                tasks.create_task(lifecycle.feed_watchdog(stop, lambda: True), name="gateway.watchdog")
        finally:
            await public.cleanup()
            await private.cleanup()
            service.update(RouteTable())


async def _listen_privately(config: Config, runner: web.AppRunner) -> None:
    """The socket of this box's programs, swapped in whole so that whoever sees it can connect."""
    config.socket.parent.mkdir(parents=True, exist_ok=True)
    staging = config.socket.with_name(f".{config.socket.name}.new")
    staging.unlink(missing_ok=True)
    await web.UnixSite(runner, str(staging)).start()
    os.chmod(staging, 0o660)  # noqa: PTH101 - the group is the programs of this box
    staging.rename(config.socket)
