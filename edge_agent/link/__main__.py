"""Keeps this box in touch with the coordinator. Reaches no container engine and starts nothing."""

import sys

from edge_agent.link import enrol
from edge_agent.link.config import Config
from edge_agent.link.daemon import main
from skerry.runtime import lifecycle


def run() -> None:
    """The console command ``skerry-agent``."""
    if sys.argv[1:2] == ["enroll"]:
        sys.exit(enrol.run(sys.argv[2:]))
    lifecycle.run("skerry-agent", Config, main, state_dir=lambda config: config.state_dir)


if __name__ == "__main__":
    run()
