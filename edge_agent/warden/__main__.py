"""Runs the sandboxes that the coordinator signed for, and keeps them as they should be. Has no network."""

from edge_agent.warden.config import Config
from edge_agent.warden.daemon import main
from skerry.runtime import lifecycle


def run() -> None:
    """The console command ``skerry-warden``."""
    lifecycle.run("skerry-warden", Config, main, state_dir=lambda config: config.state_dir)


if __name__ == "__main__":
    run()
