"""Fixtures of the tests that run a box's warden."""

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import need
from tests.contract.test_drivers import absence


@pytest.fixture
def folder() -> Iterator[Path]:
    """A box's disk, with a path short enough for the sockets on it."""
    path = Path(f"/tmp/sk-{uuid.uuid4().hex[:8]}")
    path.mkdir(mode=0o700)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def needs_bubblewrap() -> None:
    """Skip where bubblewrap does not work."""
    need("bubblewrap", absence("bubblewrap"))
