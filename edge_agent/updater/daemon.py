"""The updater put together: who calls whom is read here and nowhere else."""

import asyncio

from edge_agent.core.update import Limits
from edge_agent.updater.config import Config
from edge_agent.updater.loop import Updater
from edge_agent.updater.manager import Systemd
from edge_agent.updater.programs import Programs
from edge_agent.updater.record import RecordFile
from edge_agent.updater.releases import ReleasesOnDisk
from skerry.release.unpack import STEP_WITHIN_S
from skerry.runtime import lifecycle, sdnotify, settings

STALLED_AFTER_S = 6.0 * STEP_WITHIN_S
"""Unpacking has as many steps at the most, each with its own bound."""


async def main(config: Config, stop: asyncio.Event) -> None:
    """Run the updater until there is nothing to change, or ``stop`` is set."""
    updater = Updater(
        RecordFile(config.state_dir / "record.json"),
        ReleasesOnDisk(config),
        Systemd(config.systemctl, config.root),
        Programs(config),
        Limits(observe_s=config.observe_s, trial_s=config.trial_s),
    )
    feeding = asyncio.create_task(
        lifecycle.feed_watchdog(stop, lambda: updater.pulse.beats(within_s=STALLED_AFTER_S)), name="updater.watchdog"
    )
    sdnotify.notify("READY=1")
    try:
        await updater.run(stop)
    except OSError as exc:
        raise settings.SettingsError(f"{exc.filename or config.state_dir}: {exc.strerror}") from exc
    finally:
        await lifecycle.end(feeding)
