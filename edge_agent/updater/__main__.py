"""Changes this box's own programs to the release that the coordinator signed for, watches it, and goes back if it is no good."""

from edge_agent.updater.config import Config
from edge_agent.updater.daemon import main
from skerry.runtime import lifecycle


def run() -> None:
    """The console command ``skerry-updater``."""
    lifecycle.run("skerry-updater", Config, main, state_dir=lambda config: config.state_dir)


if __name__ == "__main__":
    run()
