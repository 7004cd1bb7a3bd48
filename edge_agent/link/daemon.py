"""The agent put together: who calls whom is read here and nowhere else."""

import asyncio
import functools
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from edge_agent.link.addresses import AddressBook
from edge_agent.link.artifacts import Artifacts
from edge_agent.link.commands import Commands
from edge_agent.link.config import Config
from edge_agent.link.identity import Identity
from edge_agent.link.outbox import Outbox, OutboxFailed
from edge_agent.link.session import Reach, Session
from edge_agent.link.telemetry import Standing, Telemetry
from edge_agent.link.warden import WardenLink
from skerry import __version__
from skerry.runtime import durable, lifecycle, log, nvml, sdnotify, settings, tls
from skerry.runtime.proved_time import ProvedTime
from skerry.wire import codec
from skerry.wire.box import Entries, GatewayTotals, Heard, State
from skerry.wire.messages import Birth, Gpu, LogsReply, Rung

logger = log.get("agent")

STALLED_AFTER_S = 30.0
"""A loop of readings that stands still for so much longer than between two of them is not fed to the watchdog."""


def read_token(path: Path) -> str:
    """The token in a file, or in the systemd credential of the same name. Raises SettingsError."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    candidate = Path(folder) / path.name if folder and (Path(folder) / path.name).exists() else path
    try:
        return candidate.read_text().strip()
    except OSError as exc:
        raise settings.SettingsError(f"coordinator.token_file: {candidate}: {exc.strerror}") from exc


def note_heard(path: Path) -> None:
    """For the updater, which judges a new release by it."""
    try:
        durable.write(path, codec.encode(Heard(__version__, os.getpid())), mode=0o644, is_synced=False)
    except OSError as exc:
        logger.error("heard.not_noted", reason=exc.strerror)


class Inventory:
    """What this box is; the warden adds what it can run."""

    def __init__(self, config: Config, outbox_epoch: Callable[[], str]) -> None:
        self._config = config
        self._outbox_epoch = outbox_epoch
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._gpus: list[Gpu] = nvml.gpus()
        self.rungs: list[Rung] = []
        self.rungs_absent: dict[Rung, str] = {}
        self.generation = 0

    def birth(self, session_epoch: int) -> Birth:
        """The birth message of one session."""
        return Birth(
            tier=self._config.tier,
            labels=self._config.labels,
            gateway_url=self._config.gateway_url,
            boot_id=self._boot_id,
            session_epoch=session_epoch,
            version=__version__,
            cpus=psutil.cpu_count() or 1,
            memory_bytes=psutil.virtual_memory().total,
            gpus=self._gpus,
            rungs=self.rungs,
            rungs_absent=self.rungs_absent,
            outbox_epoch=self._outbox_epoch(),
            desired_generation=self.generation,
            machine=platform.machine(),
            python=".".join(platform.python_version_tuple()[:2]),
        )


class Taking:
    """Takes what warden and gateway tell over into the outbox."""

    def __init__(self, outbox: Outbox, session: Callable[[], Session], node: str) -> None:
        self._outbox = outbox
        self._session = session
        self._node = node
        self._lost = 0

    def entries(self, entries: Entries) -> tuple[str, int] | None:
        """The warden's journal; how far it was taken, None where the disk refuses."""
        if entries.lost > self._lost:
            self._lost = entries.lost
            text = f"{entries.lost} entries of the warden's journal were dropped in all"
            self._session().say_event("journal.dropped", self._node, text)
        try:
            self._outbox.add_entries(entries.journal, entries.entries)
        except OutboxFailed as exc:
            logger.error("outbox.full", reason=str(exc))
            return None
        self._session().events_added()
        return self._outbox.journal_position()

    def routed(self, totals: GatewayTotals) -> None:
        """The gateway's sampled decisions."""
        try:
            self._outbox.add_routed("request.routed", totals, at_ms=time.time_ns() // 1_000_000)
        except OutboxFailed as exc:
            logger.error("outbox.full", reason=str(exc))
            return
        self._session().events_added()


async def main(config: Config, stop: asyncio.Event) -> None:
    """Run the agent until ``stop`` is set."""
    token = read_token(config.coordinator.token_file)
    outbox = Outbox(config.state_dir / "outbox.db", most_bytes=config.outbox_bytes)
    inventory = Inventory(config, lambda: outbox.epoch)
    proved = ProvedTime(config.state_dir / "proved_time.json")
    judge = tls.Judge(proved.now_at_least_ms, Path(config.broker.cert_file) if config.broker.cert_file else None)
    book = AddressBook(config.state_dir / "addresses.json", config.broker, config.coordinator.url)
    artifacts = Artifacts(
        folder=config.state_dir / "incoming",
        url=book.coordinator_url,
        url_failed=book.coordinator_failed,
        token=token,
        ca_file=config.coordinator.ca_file,
        judge=judge,
        proxy=config.coordinator.proxy,
        arrived=lambda digest, reason: warden.arrived(digest, reason),  # noqa: PLW0108 - made below
    )

    async def on_state(state: State) -> None:
        proved.believe(state.time)
        book.hear(state.addresses)
        if (state.rungs, state.rungs_absent) != (inventory.rungs, inventory.rungs_absent):
            inventory.rungs, inventory.rungs_absent = state.rungs, state.rungs_absent
            session.announce()
        inventory.generation = state.reported.generation
        session.report(state.reported)
        artifacts.need(state.needs)

    taking = Taking(outbox, lambda: session, config.node)
    warden = WardenLink(config.warden_socket, on_state=on_state, on_entries=taking.entries, position=outbox.journal_position)

    async def reply(correlation: bytes, message: LogsReply) -> None:
        await session.reply(correlation, message)

    commands = Commands(read_logs=warden.read_logs, reply=reply)
    session = Session(
        reach=Reach(config.broker, config.will_delay_s, (config.reconnect_first_s, config.reconnect_most_s), judge, book.brokers),
        fleet=config.fleet,
        node=config.node,
        outbox=outbox,
        birth=inventory.birth,
        on_desired=warden.apply,
        on_command=commands.hear,
        on_link=lambda is_up: warden.linked(is_up=is_up),
        on_heard=lambda: note_heard(config.state_dir / "heard.json"),
    )
    book.on_move = session.move
    telemetry = Telemetry(
        every_s=config.sample_every_s,
        gateway_socket=config.gateway_socket,
        epoch=lambda: outbox.epoch,
        next_seq=outbox.next_sample_seq,
        standing=lambda: Standing(*outbox.depth(), session.rtt_ms()),
        before=outbox.last_totals(),
        offer=session.offer,
        routed=taking.routed,
    )
    session.say_event("agent.started", config.node, f"version {__version__}")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(warden.run(stop), name="agent.warden")
        tasks.create_task(artifacts.run(stop), name="agent.artifacts")
        tasks.create_task(telemetry.run(stop), name="agent.telemetry")
        tasks.create_task(Identity(config, say=session.say_event, proved=proved, judge=judge, book=book).run(stop), name="agent.identity")
        tasks.create_task(proved.run(stop), name="agent.proved_time")
        tasks.create_task(commands.run(stop), name="agent.commands")
        tasks.create_task(session.run(stop), name="agent.session")
        patience_s = STALLED_AFTER_S + 2 * config.sample_every_s
        alive = functools.partial(telemetry.pulse.beats, within_s=patience_s)
        tasks.create_task(lifecycle.feed_watchdog(stop, alive), name="agent.watchdog")
        sdnotify.notify("READY=1")
    outbox.close()
