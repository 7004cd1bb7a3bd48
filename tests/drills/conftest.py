"""A fleet that serves, and what an enemy must not change of it."""

from collections.abc import Iterator

import pytest

from tests.drills.fleet import DEPLOYMENT, Target
from tests.e2e.world import World, running


@pytest.fixture(scope="package")
def world(scale_model) -> Iterator[World]:
    with running() as world:
        world.push(scale_model, "scale")
        world.deploy(DEPLOYMENT)
        world.wait_ready("scale")
        yield world


@pytest.fixture
def target(world) -> Target:
    return Target(world, "store-1")
