"""The fleet's coordinator: registry, planner, model store, API and console."""

import sys

from coordinator.accounts import admin_link
from coordinator.backup import command
from coordinator.broker import rendering
from coordinator.config import Config
from coordinator.daemon import main
from skerry.runtime import lifecycle


def run() -> None:
    """The console command ``skerry-coordinator``."""
    if sys.argv[1:2] == ["admin-link"]:
        sys.exit(admin_link.run(sys.argv[2:]))
    if sys.argv[1:2] == ["broker-config"]:
        sys.exit(rendering.run(sys.argv[2:]))
    if sys.argv[1:2] in (["backup"], ["restore"]):
        sys.exit(command.run(sys.argv[1], sys.argv[2:]))
    lifecycle.run("skerry-coordinator", Config, main, state_dir=lambda config: config.state_dir)


if __name__ == "__main__":
    run()
