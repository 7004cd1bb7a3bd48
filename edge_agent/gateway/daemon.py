"""The gateway put together."""

import asyncio

from edge_agent.gateway import http, listen, processes
from edge_agent.gateway.app import Api
from edge_agent.gateway.books import Books
from edge_agent.gateway.budget import Budgets
from edge_agent.gateway.config import Config
from edge_agent.gateway.facts import Facts
from edge_agent.gateway.fleet import Door, FleetIdentity, prepare
from edge_agent.gateway.inquiry import Inquiry
from edge_agent.gateway.ledger import Ledger
from edge_agent.gateway.listen import Fleetward, Front, Remote, Sockets
from edge_agent.gateway.processes import Place
from edge_agent.gateway.regions import Regions
from edge_agent.gateway.routes import Follower
from edge_agent.gateway.samples import Samples
from edge_agent.gateway.service import Service
from edge_agent.gateway.tls import Certificates
from edge_agent.gateway.upstream import Upstreams
from skerry.runtime import lifecycle, log, sdnotify, tls
from skerry.runtime.proved_time import ProvedTime
from skerry.wire import oip
from skerry.wire.box import RouteTable

logger = log.get("gateway")

SHUTDOWN_S = 5.0
"""For requests that are under way when the gateway is told to stop."""
SWEEP_S = 0.25
"""How often counts are put on the board, and how often it is looked at what no request would look at."""
STALLED_AFTER_S = 10.0
"""A loop of counts that stands still for so long is not fed to the watchdog."""
RENEW_S = 2.0
"""How often it is looked whether certificates were replaced."""


def before_loop(config: Config) -> dict[str, object]:
    """Become as many processes as are wanted, while there is neither a thread nor an event loop."""
    if config.peers is not None:
        prepare(config.peers, config.node)
    sockets = listen.before_fork(config)
    return {"place": processes.split(config.processes), "sockets": sockets}


async def main(config: Config, stop: asyncio.Event, *, place: Place, sockets: Sockets) -> None:
    """Serve until ``stop`` is set; requests under way then get SHUTDOWN_S to end."""
    proved, pulse = ProvedTime(), lifecycle.Pulse()
    certificates = Certificates(config.tls, tls.Judge(proved.now_at_least_ms)) if config.tls is not None else None
    ledger, samples, budgets = (
        Ledger(config.node, config.tier),
        Samples(),
        Budgets(config.budget_file or config.socket.with_name("cloud_budget.json")),
    )
    fleet = FleetIdentity(config.peers, proved)
    books = Books(place, ledger, samples)
    books.resume()
    async with Upstreams(
        node=config.node,
        proxy=config.upstream_proxy,
        limit=place.share(config.upstream_limit),
        answer_limit_bytes=config.body_limit_bytes,
        secured=fleet.secured,
    ) as upstreams:
        follower = Follower(config.routes_file)
        service = Service(
            node=config.node, tier=config.tier, upstreams=upstreams, ledger=ledger, budgets=budgets, samples=samples,
            queue_limit=place.share(config.queue_limit), arena_bytes=place.share(config.replica_memory_bytes), look=follower.look,
        )  # fmt: skip

        def use(table: RouteTable) -> None:
            fleet.hear(table)
            service.update(table)

        follower.use = use
        extensions = [*oip.EXTENSIONS, *([oip.SHARED_MEMORY_EXTENSION] if config.shared_memory else [])]
        facts = Facts(service, node=config.node, tier=config.tier, extensions=extensions, accounts=books.accounts)
        inquiry = Inquiry(service, samples, node=config.node, tier=config.tier)
        regions = Regions(most_bytes=config.body_limit_bytes) if config.shared_memory else None

        def served(*, for_agent: bool = False, for_peers: bool = False) -> http.Server:
            api = Api(
                service,
                facts,
                regions=None if for_peers else regions,
                body_limit_bytes=config.body_limit_bytes,
                for_agent=for_agent,
                books=books,
                inquiry=inquiry,
            )
            return http.Server(
                Door(api, fleet, config.tier) if for_peers else api,
                body_limit_bytes=config.body_limit_bytes, memory_limit_bytes=place.share(config.bodies_limit_bytes),
                connection_limit=place.share(config.connection_limit),
            )  # fmt: skip

        servers = public, private, peers = served(), served(for_agent=True), served(for_peers=True)
        fleetward = Fleetward(config.peers.listen if config.peers else "", place, fleet, peers)
        front, remote, over = Front(config, place, sockets, certificates), Remote(config, place, certificates), asyncio.Event()
        try:
            await remote.open(service, facts, regions)
            await front.open(public, private)
            await fleetward.open()
            follower.look()
            logger.info("gateway.up", listen=config.listen, process=place.number)
            sdnotify.notify("READY=1")
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(follower.follow(over), name="gateway.routes")
                for one in servers:
                    tasks.create_task(one.sweep(over), name="gateway.sweep")
                tasks.create_task(_keep_books(books, service, place, pulse, over), name="gateway.books")
                if certificates is not None:
                    tasks.create_task(_renew(front, stop), name="gateway.certificates")
                tasks.create_task(_renew(fleetward, stop), name="gateway.fleet")
                tasks.create_task(lifecycle.feed_watchdog(over, lambda: pulse.beats(within_s=STALLED_AFTER_S)), name="gateway.watchdog")
                await stop.wait()
                front.close()
                fleetward.close()
                await asyncio.gather(*(one.drain(SHUTDOWN_S) for one in servers), remote.stop(SHUTDOWN_S))
                over.set()
        finally:
            front.close()
            fleetward.close()
            await remote.stop(0)
            books.write()
            service.update(RouteTable())


async def _keep_books(books: Books, service: Service, place: Place, pulse: lifecycle.Pulse, over: asyncio.Event) -> None:
    while True:
        pulse.beat()
        service.sweep()
        books.write()
        place.beat()
        if await lifecycle.sleep_until(over, SWEEP_S):
            return


async def _renew(front: Front | Fleetward, stop: asyncio.Event) -> None:
    while not await lifecycle.sleep_until(stop, RENEW_S):
        await front.renew()
