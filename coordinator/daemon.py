"""The coordinator put together: who calls whom is read here and nowhere else."""

import asyncio
import ssl
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

from aiohttp import web

from coordinator.accounts.changes import Changes
from coordinator.accounts.directory import Directory
from coordinator.accounts.entry import Entry
from coordinator.accounts.passwords import Passwords
from coordinator.accounts.provider import Provider
from coordinator.api import accounts as account_calls
from coordinator.api import deployments as deployment_calls
from coordinator.api import draining as drain_calls
from coordinator.api import enrolment as enrolment_calls
from coordinator.api import exposition as metrics_calls
from coordinator.api import glance as glance_calls
from coordinator.api import models as model_calls
from coordinator.api import recovery as recovery_calls
from coordinator.api import releases as release_calls
from coordinator.api import restarting as restart_calls
from coordinator.api import rollouts as rollout_calls
from coordinator.api.access import Access
from coordinator.api.accounts import AccountCalls
from coordinator.api.answers import Handler, json_answer, problems, refuse
from coordinator.api.calls import CALLS, Call, Calls
from coordinator.api.deployments import DeploymentCalls
from coordinator.api.draining import DrainCalls
from coordinator.api.enrolment import EnrolmentCalls
from coordinator.api.exposition import MetricsCalls
from coordinator.api.glance import GlanceCalls
from coordinator.api.models import ModelCalls
from coordinator.api.openapi import EVERY, document
from coordinator.api.recovery import RecoveryCalls
from coordinator.api.releases import ReleaseCalls, Trusted
from coordinator.api.restarting import RestartCalls
from coordinator.api.rollouts import RolloutCalls
from coordinator.ca.authority import Authority, AuthorityUnusable
from coordinator.commands import Commands
from coordinator.config import Config
from coordinator.console import routes as console
from coordinator.console.entrance import CALLBACK, Entrance
from coordinator.console.guide import Guide
from coordinator.console.pages import Pages
from coordinator.console.people import People
from coordinator.enrolment import Enrolment
from coordinator.eviction import Evictions
from coordinator.gateways import Gateways
from coordinator.glance import Glance
from coordinator.housekeeping import Housekeeping
from coordinator.ingest import Ingest
from coordinator.live import Live
from coordinator.model_store import ModelStore
from coordinator.news import News
from coordinator.plan_loop import PlanLoop, Terms
from coordinator.publish import Publisher
from coordinator.registry.database import Database
from coordinator.registry.migrations import TooNew
from coordinator.rollout_loop import RolloutLoop
from coordinator.session import FleetSession, Message
from coordinator.signer.client import OwnSigner, Signer, SignerOnSocket
from coordinator.signer.keyring import Keyring, KeyUnusable
from coordinator.survey import Survey
from coordinator.views import Views
from coordinator.vouching import Vouching
from coordinator.webhooks import Webhooks
from skerry.runtime import keys, lifecycle, log, sdnotify, settings, tls
from skerry.wire.identity import Role, Subject
from skerry.wire.messages import Ack, Addresses, LogsRequest

logger = log.get("coordinator")

SHUTDOWN_S = 3.0
STALLED_AFTER_S = 180.0
"""Loops that plan and keep house turn once a minute at the least; one that stands still for so long is not fed to the watchdog."""
DAY_MS = 24 * 3600 * 1000
OWN_CERTIFICATE_MS = 365 * DAY_MS
"""Looked at on each start."""


async def main(config: Config, stop: asyncio.Event) -> None:
    """Run the coordinator until ``stop`` is set."""
    try:
        signer = SignerOnSocket(config.signer_socket) if config.signer_socket else OwnSigner(Keyring(config.state_dir, config.fleet))
        authority = Authority(config.state_dir / "ca", config.fleet, now_ms=_now_ms())
        own_certificates(config, authority)
        async with Database(config.state_dir / "registry.db") as database:
            await _serve(config, signer, authority, database, stop)
        await signer.close()
    except (KeyUnusable, AuthorityUnusable, TooNew) as exc:
        raise settings.SettingsError(f"state_dir: {exc}") from exc


async def _serve(config: Config, signer: Signer, authority: Authority, database: Database, stop: asyncio.Event) -> None:
    live, news = Live(), News()
    queue: asyncio.Queue[Message] = asyncio.Queue(maxsize=config.queue)

    async def on_connected() -> None:
        plan_loop.wake()
        await publisher.publish_all()

    async def ack(node: str, word: Ack) -> None:
        await publisher.ack(config.fleet, node, word)

    async def ask_logs(node: str, correlation: bytes, request: LogsRequest) -> None:
        await publisher.ask_logs(config.fleet, node, correlation, request)

    commands = Commands(ask_logs)
    session = FleetSession(config.broker, config.fleet, queue=queue, on_connected=on_connected, on_reply=commands.answered)
    publisher = Publisher(session, signer, database)
    plan_loop = PlanLoop(
        database, publisher, news, signer,
        fleet=config.fleet, terms=_terms(config),
        listening_since_ms=lambda: session.listening_since_ms,
    )  # fmt: skip
    rollout_loop = RolloutLoop(database, news, replan=plan_loop.wake)

    def deployed() -> None:
        rollout_loop.wake()
        plan_loop.wake()

    webhooks = Webhooks(database, news, config.webhooks, config.fleet)
    evictions = Evictions(config.broker, authority, config.fleet, now_ms=_now_ms)

    async def thrown_out(node: str) -> None:
        plan_loop.wake()
        await evictions.evict(node)

    enrolment = Enrolment(
        database,
        authority,
        news,
        signer,
        fleet=config.fleet,
        public_url=config.public_url,
        certificate_ms=int(config.certificate_days * DAY_MS),
        list_file=config.revoked_list_file or config.state_dir / "ca" / "revoked.pem",
        thrown_out=thrown_out,
    )
    await enrolment.begin()
    directory, passwords = Directory(database), Passwords()
    await directory.begin()
    entry = Entry(database, directory, passwords)
    changes = Changes(database, directory, entry, passwords, state_dir=config.state_dir, public_url=config.public_url)

    def admits(node: str) -> bool:
        return not enrolment.is_thrown_out(node) and (enrolment.is_enrolled(node) or not config.require_enrolled)

    ingest = Ingest(
        database,
        live=live,
        news=news,
        ack=ack,
        replan=plan_loop.wake,
        admits=admits,
        rollup_s=config.rollup_s,
        keep_rollups_s=config.keep_rollups_h * 3600,
    )
    housekeeping = Housekeeping(
        database,
        live,
        news,
        keep_rollups_h=config.keep_rollups_h,
        keep_events=config.keep_events,
        listening_since_ms=lambda: session.listening_since_ms,
        refresh_list=enrolment.refresh_list,
        write_uses=directory.write_uses,
    )
    access = Access(config.state_dir, directory, enrolment.is_token, behind_proxy=config.behind_proxy)
    core = _Core(
        database, live, news, session, commands, enrolment, directory, entry, changes, access, plan_loop, rollout_loop, deployed,
    )  # fmt: skip
    app = _application(config, core)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    try:
        await web.TCPSite(runner, *settings.split_listen(config.listen), ssl_context=_tls(config)).start()
        async with asyncio.TaskGroup() as tasks:
            for name, loop in (("session", session), ("plan", plan_loop), ("evictions", evictions), ("rollout", rollout_loop),
                               ("housekeeping", housekeeping), ("webhooks", webhooks)):  # fmt: skip
                tasks.create_task(loop.run(stop), name=f"coordinator.{name}")
            tasks.create_task(ingest.run(queue, stop), name="coordinator.ingest")
            beats = lifecycle.feed_watchdog(stop, lambda: _beat(plan_loop, rollout_loop, housekeeping))
            tasks.create_task(beats, name="coordinator.watchdog")
            logger.info("coordinator.up", listen=config.listen, url=config.public_url)
            sdnotify.notify("READY=1")
    finally:
        await runner.cleanup()


class _Core(NamedTuple):
    """What stands behind API and console."""

    database: Database
    live: Live
    news: News
    session: FleetSession
    commands: Commands
    enrolment: Enrolment
    directory: Directory
    entry: Entry
    changes: Changes
    access: Access
    plan_loop: PlanLoop
    rollout_loop: RolloutLoop
    deployed: Callable[[], None]


def _application(config: Config, core: _Core) -> web.Application:
    """The API and, over it, the console."""
    database, access, news, replan = core.database, core.access, core.news, core.plan_loop.wake
    vouching = Vouching(keys.trusted(config.model_keys_file))
    views = Views(database, core.live, vouching, news, rollup_s=config.rollup_s)
    glance = Glance(database, core.live, news, fleet=config.fleet, is_connected=lambda: core.session.is_connected)
    store = ModelStore(config.state_dir / "models", limit_bytes=config.model_limit_bytes)
    calls = Calls(
        database=database, views=views, vouching=vouching, store=store, news=news, access=access, replan=core.deployed,
        commands=core.commands,
    )  # fmt: skip
    parts: list[tuple[Sequence[Call], Handlers]] = [
        (CALLS, calls),
        (glance_calls.CALLS, GlanceCalls(glance, access)),
        (deployment_calls.CALLS, DeploymentCalls(database, views, vouching, access, news, replan=core.deployed)),
        (enrolment_calls.CALLS, EnrolmentCalls(core.enrolment, access)),
        (account_calls.CALLS, AccountCalls(database, core.changes, core.entry, access, public_url=config.public_url)),
        (recovery_calls.CALLS, RecoveryCalls(database, access, news, fleet=config.fleet, replan=replan)),
        (drain_calls.CALLS, DrainCalls(database, access, news, replan=replan)),
        (model_calls.CALLS, ModelCalls(database, views, store, Survey(views, Gateways(config.fleet, _asking(config))), access)),
        (restart_calls.CALLS, RestartCalls(database, access, news, replan=replan)),
        (rollout_calls.CALLS, RolloutCalls(database, access, news, look=core.rollout_loop.wake, replan=replan)),
        (metrics_calls.CALLS, MetricsCalls(database, glance, access)),
        (release_calls.CALLS, ReleaseCalls(database, store, _trusted(config), access, news, changed=core.deployed)),
    ]
    app = make_app(config, parts, access)
    provider = _provider(config)
    entrance = Entrance(access, core.entry, core.changes, provider)
    console.attach(
        app, fleet=config.fleet, elsewhere=provider.title if provider else "", access=access, entrance=entrance,
        pages=Pages(views, glance, database, store), people=People(database, core.changes, entrance),
        guide=Guide(config, glance, views, EVERY),
    )  # fmt: skip
    return app


def own_certificates(config: Config, authority: Authority) -> None:
    """What the coordinator shows to the broker, and to whoever opens its pages, and the broker to boxes: ``ca/coordinator.crt`` and
    ``ca/broker.crt``, with keys beside them."""
    host = urlsplit(config.public_url).hostname
    roles: list[tuple[Role, list[str]]] = [
        ("coordinator", [host] if host else []), ("broker", config.broker_hosts or [config.broker.host]),
    ]  # fmt: skip
    for role, hosts in roles:
        authority.own(Subject(config.fleet, role, role), now_ms=_now_ms(), life_ms=OWN_CERTIFICATE_MS, hosts=hosts)
    if authority.issuing_ends_in_ms < OWN_CERTIFICATE_MS:
        days = authority.issuing_ends_in_ms // (24 * 3600 * 1000)
        logger.error("ca.ends_soon", days=days, hint="bring ca/root.key back and start again: a new issuing certificate is made then")


def _provider(config: Config) -> Provider | None:
    return Provider(config.openid_connect, f"{config.public_url.rstrip('/')}{CALLBACK}") if config.openid_connect else None


def _trusted(config: Config) -> Trusted:
    return Trusted(keys.trusted(config.release_keys_file, "release_keys_file"))


def _tls(config: Config) -> ssl.SSLContext | None:
    if not config.tls:
        return None
    folder = config.state_dir / "ca"
    return tls.server(folder / "coordinator.crt", folder / "coordinator.key")


def _asking(config: Config) -> Callable[[], ssl.SSLContext] | None:
    """What is shown to boxes' gateways, read anew each time: certificates are renewed."""
    folder = config.state_dir / "ca"
    if not config.tls:
        return None
    return lambda: tls.client(str(folder / "root.crt"), str(folder / "coordinator.crt"), str(folder / "coordinator.key"))


def _beat(*loops: PlanLoop | RolloutLoop | Housekeeping) -> bool:
    return all(loop.pulse.beats(within_s=STALLED_AFTER_S) for loop in loops)


def _terms(config: Config) -> Terms:
    addresses = Addresses(config.announce.brokers, config.announce.coordinator)
    return Terms(int(config.desired_days * DAY_MS), None, int(config.lost_after_s * 1000), addresses)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class Handlers(Protocol):
    """The methods behind some calls of the API."""

    def handler(self, call: Call) -> Handler:
        """A call's method, behind the check of who calls."""


def make_app(config: Config, parts: Sequence[tuple[Sequence[Call], Handlers]], access: Access) -> web.Application:
    """The API under ``/v1``."""
    app = web.Application(middlewares=[problems], client_max_size=config.model_limit_bytes)
    for calls, handlers in parts:
        app.add_routes([web.route(call.method, call.path, handlers.handler(call)) for call in calls])
    described = document()

    async def openapi(request: web.Request) -> web.Response:
        if access.caller_of(request) is None:
            raise refuse(401, "not_logged_in", "a token is needed", hint="set SKERRY_TOKEN, or run 'skerry login'")
        return json_answer(described)

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    app.add_routes([web.get("/openapi.json", openapi), web.get("/healthz", healthz)])
    return app
