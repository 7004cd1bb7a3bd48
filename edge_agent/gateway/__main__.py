"""Serves the Open Inference Protocol on this box, from its sandboxes, its neighbours or the cloud."""

from edge_agent.gateway.config import Config
from edge_agent.gateway.daemon import before_loop, main
from skerry.runtime import lifecycle


def run() -> None:
    """The console command ``skerry-gateway``."""
    lifecycle.run("skerry-gateway", Config, main, state_dir=lambda _: None, before_loop=before_loop)


if __name__ == "__main__":
    run()
