"""Ends every sandbox of one warden: for an uninstall, or when a demo is over. The warden itself must not run.

``python -m edge_agent.warden.purge --config FILE``
"""

import argparse
import asyncio
import os
import sys
from pathlib import Path

from edge_agent.warden.config import Config
from edge_agent.warden.daemon import make_driver
from edge_agent.warden.offer import Offer
from edge_agent.warden.slots import erase
from skerry.runtime import durable, log, settings

GRACE_S = 1.0


async def purge(config: Config) -> int:
    """End them; returns how many there were."""
    count = 0
    offer = Offer([make_driver(name, config) for name in config.drivers])
    await offer.look()
    for driver in offer.working:
        for sandbox in await driver.sandboxes():
            await driver.stop(sandbox.name, grace_s=GRACE_S)
            count += 1
    erase(config.state_dir / "sandboxes")
    return count


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="edge_agent.warden.purge", description="End every sandbox of a warden that is not running.")
    parser.add_argument("--config", type=Path, required=True, help="the warden's TOML settings")
    arguments = parser.parse_args()
    log.configure("skerry-warden-purge")
    try:
        config = settings.load(arguments.config, Config)
        held = durable.lock(config.state_dir, "skerry-warden")
    except (settings.SettingsError, durable.AlreadyRunning) as exc:
        sys.stderr.write(f"{exc}\n")
        sys.exit(78)
    sys.stdout.write(f"{asyncio.run(purge(config))} sandboxes ended\n")
    os.close(held)


if __name__ == "__main__":
    main()
