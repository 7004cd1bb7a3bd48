"""The warden put together: who calls whom is read here and nowhere else."""

import asyncio
import hashlib
import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_agent.core.admission import Limits
from edge_agent.warden.config import Config
from edge_agent.warden.documents import Documents
from edge_agent.warden.drivers import host_runtime
from edge_agent.warden.drivers.bubblewrap import BubblewrapDriver
from edge_agent.warden.drivers.docker import DockerDriver
from edge_agent.warden.journal import Journal
from edge_agent.warden.link_watch import LinkWatch
from edge_agent.warden.listener import Listener
from edge_agent.warden.offer import FIRST_WITHIN_S, Offer
from edge_agent.warden.ports import Driver
from edge_agent.warden.reconcile import Reconciler
from edge_agent.warden.shelf import Shelf
from edge_agent.warden.slots import Slots
from edge_agent.warden.software import BoxSoftware
from edge_agent.warden.store import Store, StoreFailed
from edge_agent.warden.trust import TrustFile
from edge_agent.warden.verify import Refused, unvouched
from skerry.runtime import keys, lifecycle, log, nvml, sdnotify, settings
from skerry.runtime.proved_time import ProvedTime
from skerry.wire import signing
from skerry.wire.messages import Desired

logger = log.get("warden")

STALLED_AFTER_S = 60.0
"""A reconcile loop that has not looked for this long is not fed to the watchdog."""
DRIVERS = ("docker", "gvisor", "bubblewrap")


def make_driver(name: str, config: Config) -> Driver:
    """The driver called ``name``; raises SettingsError."""
    # The state directory is in it: two wardens of one name on one engine (two demos, say) must not take each other's sandboxes.
    owner = f"{config.fleet}-{config.node}-{hashlib.sha256(str(config.state_dir.resolve()).encode()).hexdigest()[:8]}"
    match name:
        case "bubblewrap":
            return BubblewrapDriver(config.state_dir / "bubblewrap", owner=owner)
        case "docker":
            return DockerDriver(config.state_dir / "docker", socket=config.docker_socket, owner=owner)
        case "gvisor":
            return DockerDriver(config.state_dir / "gvisor", socket=config.docker_socket, runtime="runsc", owner=f"{owner}-gvisor")
        case _:
            raise settings.SettingsError(f"drivers: {name!r} is not one of {', '.join(DRIVERS)}")


def limits_of(config: Config) -> Limits:
    """What replicas may use: the settings, else four fifths of the memory and all of the GPUs' memory."""
    memory_bytes = config.memory_bytes
    if not memory_bytes:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        memory_bytes = int(fields["MemTotal"].split()[0]) * 1024 * 4 // 5
    most_bytes = config.gpu_memory_bytes or 2**63
    return Limits(memory_bytes, {gpu.uuid: min(most_bytes, gpu.memory_mib * 2**20) for gpu in nvml.gpus()})


def trusted_keys(path: Path) -> tuple[list[Ed25519PublicKey], int]:
    """The coordinator's keys, and since when, as enrolment left them. Raises SettingsError."""
    try:
        return signing.parse_trusted(path.read_text())
    except OSError as exc:
        raise settings.SettingsError(f"trusted_keys_file: {path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise settings.SettingsError(f"trusted_keys_file: {path}: {exc}") from exc


def held_document(documents: Documents, journal: Journal, store: Store) -> Desired | None:
    """What this box was told last; one that is not trusted any more is set aside. Raises SettingsError."""
    try:
        return documents.load()
    except StoreFailed as exc:
        raise settings.SettingsError(f"state_dir: {exc}") from exc
    except Refused as exc:
        journal.add("desired.damaged", "", f"the document on disk is not used: {exc}", at_ms=time.time_ns() // 1_000_000)
        store.set_aside_desired()
        return None


async def main(config: Config, stop: asyncio.Event) -> None:
    """Run the warden until ``stop`` is set; sandboxes are left running for the next one to adopt."""
    trust = TrustFile(config.state_dir / "trust.json", *trusted_keys(config.trusted_keys_file))
    model_keys = keys.trusted(config.model_keys_file)
    store = Store(config.state_dir)
    journal = Journal(config.state_dir / "journal.db", most=config.journal_entries)

    proved = ProvedTime(config.state_dir / "proved_time.json")
    documents = Documents(config, store, trust, proved)
    desired = held_document(documents, journal, store)
    link = LinkWatch(config.state_dir / "link.json", proved)
    await asyncio.to_thread(host_runtime.compile_ours)
    offer = Offer([make_driver(name, config) for name in config.drivers])
    await offer.look(within_s=FIRST_WITHIN_S)
    if not offer.working:
        journal.add("driver.none", "", f"none of {', '.join(config.drivers)} works on this box", at_ms=time.time_ns() // 1_000_000)
    reconciler = Reconciler(
        config,
        offer=offer,
        store=store,
        slots=Slots(config.state_dir / "sandboxes", uid_first=config.uid_first, logs_bytes=config.logs_bytes),
        journal=journal,
        limits=limits_of(config),
        desired=desired,
        unvouched=lambda document: unvouched(document, model_keys),
    )

    async def apply(envelope: bytes) -> None:
        try:
            document = documents.take(envelope, reconciler.desired)
        except (Refused, StoreFailed) as exc:
            reconciler.refuse(str(exc))
        else:
            reconciler.accept(document)

    listener = Listener(
        config.socket,
        state=lambda: reconciler.state,
        apply=apply,
        arrived=reconciler.arrived,
        entries_after=journal.after,
        forget=journal.forget,
        linked=lambda who, is_up: link.hear(who, is_up=is_up),
        read_logs=reconciler.read_logs,
        journal_id=journal.id,
    )
    announcing: set[asyncio.Task[None]] = set()

    def announce(*_: object) -> None:
        task = asyncio.create_task(listener.announce(), name="warden.announce")
        announcing.add(task)
        task.add_done_callback(announcing.discard)

    reconciler.on_change = announce
    reconciler.time_proof = lambda: proved.proof
    reconciler.cut_off_ms = lambda: link.cut_off_ms
    link.keep_every_s = reconciler.keep_link_every_s
    reconciler.shelf = Shelf(
        config.state_dir / "models.json", store,
        now_ms=proved.now_at_least_ms, reserve_bytes=config.disk_reserve_bytes, most_bytes=config.models_bytes,
    )  # fmt: skip
    reconciler.software = BoxSoftware(
        config.state_dir, config.updater_record_file, store,
        on_step=lambda step: journal.note(step.kind, step.subject, step.text, at_ms=step.at_ms),
    )  # fmt: skip
    if desired is not None:
        reconciler.shelf.note(desired)
    journal.on_add = announce
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(reconciler.run(stop), name="warden.reconcile")
        tasks.create_task(listener.serve(stop), name="warden.listener")
        tasks.create_task(proved.run(stop), name="warden.proved_time")
        tasks.create_task(link.run(stop), name="warden.link")
        tasks.create_task(offer.run(stop, reconciler.wake), name="warden.offer")
        tasks.create_task(
            lifecycle.feed_watchdog(stop, lambda: time.monotonic() - reconciler.looked_at < STALLED_AFTER_S), name="warden.watchdog"
        )
        logger.info("warden.up", drivers=[driver.name for driver in offer.working], generation=desired.generation if desired else 0)
        sdnotify.notify("READY=1")
    journal.close()
