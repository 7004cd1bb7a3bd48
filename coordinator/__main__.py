"""The fleet's coordinator: registry, planner, model store, API and console."""

from coordinator.config import Config
from coordinator.daemon import main
from skerry.runtime import lifecycle


def run() -> None:
    """The console command ``skerry-coordinator``."""
    lifecycle.run("skerry-coordinator", Config, main, state_dir=lambda config: config.state_dir)


if __name__ == "__main__":
    run()
