"""One site for all of these tests, in the order in which they stand: bare machines at first, and none at last."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.boxes import root
from tests.boxes.fleet import Operator, fetch_wheels, release
from tests.boxes.machine import Ground
from tests.conftest import need

BOXES = ("box-1", "box-2", "box-3")
# What a release may do wrong: a line of a module, and what stands there instead.
NOT_STARTING = {"edge_agent__gateway__config": '"""The gateway\'s settings."""=>raise SystemExit("this release does not start")'}
STARTS_ELSEWHERE = {
    "edge_agent__gateway__config": '"""The gateway\'s settings."""=>import socket\nif socket.gethostname() == "box-3":\n'
    '    raise SystemExit("this release does not start on box-3")'
}
ENDS = {
    "edge_agent__warden__daemon": '    """Run the warden until ``stop`` is set; sandboxes are left running for the next one to adopt."""=>'
    '    raise SystemExit("this release does not stay up")'
}
SLOW = {
    "edge_agent__gateway__service": "    async def _answered(self, request: _Request) -> Answer:\n=>"
    "    async def _answered(self, request: _Request) -> Answer:\n        await asyncio.sleep(0.06)\n"
}


@pytest.fixture(scope="session")
def releases(tmp_path_factory) -> Path:
    """A folder with releases: 0.1.0, 0.2.0, 0.4.0, and four that are not what they should be; all are signed."""
    wanted = "" if os.environ.get("SKERRY_BOXES") else "booting and installing them takes a quarter of an hour: make test-boxes"
    need("boxes that boot", wanted, is_optional=True)
    need("boxes that boot", root.missing())
    wheels, folder = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("releases")
    fetch_wheels(wheels)
    for version, patches in (
        ("0.1.0", {}), ("0.2.0", {}), ("0.3.0", NOT_STARTING), ("0.3.1", SLOW), ("0.3.2", STARTS_ELSEWHERE),
        ("0.3.3", ENDS), ("0.4.0", {}),
    ):  # fmt: skip
        release(version, folder, wheels, **patches)
    return folder


@pytest.fixture(scope="session")
def operator(releases, tmp_path_factory) -> Iterator[Operator]:
    """At a site of bare machines: one for coordinator and broker, and the boxes."""
    folder = tmp_path_factory.mktemp("site")
    with Ground(folder, root.cached()) as ground:
        hub, *boxes = ground.add("hub", *BOXES)
        (folder / "home").mkdir()
        yield Operator(ground, hub, boxes, folder / "home", releases)
    shutil.rmtree(folder, ignore_errors=True)
