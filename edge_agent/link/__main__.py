"""Keeps this box in touch with the coordinator. Reaches no container engine and starts nothing."""

from edge_agent.link.config import Config
from edge_agent.link.daemon import main
from skerry.runtime import lifecycle


def run() -> None:
    """The console command ``skerry-agent``."""
    lifecycle.run("skerry-agent", Config, main, state_dir=lambda config: config.state_dir)


if __name__ == "__main__":
    run()
