"""A box goes to another release and back: real files, environments, links and processes, cut off at each step."""

import asyncio
import functools
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from edge_agent.core.update import Limits
from edge_agent.updater.config import Config
from edge_agent.updater.loop import Updater
from edge_agent.updater.manager import Systemd
from edge_agent.updater.programs import Programs
from edge_agent.updater.record import RecordFile
from edge_agent.updater.releases import ReleasesOnDisk
from skerry.release import unpack
from skerry.runtime import keys
from skerry.wire import codec
from skerry.wire.box import Outcome, WantedSoftware
from skerry.wire.messages import Software
from tests.integration.stand_in_release import PROGRAMS, Site

LIMITS = Limits(observe_s=0.8, trial_s=6, back_s=6, settle_s=2, linger_s=0.1)
OLD, NEW = "1.0.0", "2.0.0"


class PowerCut(BaseException):
    """Nothing after it happens."""


class Fuse:
    """Blows at the ``at``-th thing that is done: an even number before it, an odd one after it."""

    def __init__(self, at: int) -> None:
        self.at, self.done = at, 0

    def guard(self, port: Any, *names: str) -> Any:
        """The same port, on this fuse."""
        fuse = self

        class Guarded:
            def __getattr__(self, name: str) -> Any:
                found = getattr(port, name)
                if name not in names:
                    return found
                return fuse._awaited(found) if asyncio.iscoroutinefunction(found) else fuse._called(found)

        return Guarded()

    def _tick(self) -> None:
        self.done += 1
        if self.done - 1 == self.at:
            raise PowerCut

    def _called(self, found: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(found)
        def call(*given: Any, **named: Any) -> Any:
            self._tick()
            result = found(*given, **named)
            self._tick()
            return result

        return call

    def _awaited(self, found: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(found)
        async def call(*given: Any, **named: Any) -> Any:
            self._tick()
            result = await found(*given, **named)
            self._tick()
            return result

        return call


NEVER = 10**9


class Box:
    """A box on which the first release runs."""

    def __init__(self, site: Site) -> None:
        self.site = site
        folder = site.folder
        public = site.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (folder / "release-keys.pem").write_bytes(public)
        self.config = Config(
            root=folder / "root", state_dir=folder / "state", wanted_file=folder / "software.json", heard_file=folder / "heard.json",
            gateway_socket=folder / "gateway.sock", settings_dir=folder / "settings", units_dir=folder / "units",
            systemctl=site.systemctl, release_keys_file=folder / "release-keys.pem", reserve_bytes=0,
        )  # fmt: skip
        self.config.state_dir.mkdir(exist_ok=True)

    def want(self, software: Software | None, path: Path = Path()) -> None:
        self.config.wanted_file.write_bytes(codec.encode(WantedSoftware(software, str(path))))

    def update(self, at: int = NEVER) -> int:
        """One life of the updater, cut off at a step; how many steps there were."""
        fuse, config = Fuse(at), self.config
        updater = Updater(
            fuse.guard(RecordFile(config.state_dir / "record.json"), "keep"),
            fuse.guard(ReleasesOnDisk(config), "prepare", "point", "prove"),
            fuse.guard(Systemd(config.systemctl, config.root), "reload", "restart"),
            Programs(config),
            LIMITS,
        )

        async def life() -> None:
            async with asyncio.timeout(60):
                await updater.run(asyncio.Event())

        asyncio.run(life())
        return fuse.done

    @property
    def outcomes(self) -> list[Outcome]:
        return RecordFile(self.config.state_dir / "record.json").record.outcomes

    def all_run(self, version: str) -> bool:
        return self.site.running == dict.fromkeys(PROGRAMS, version)


@pytest.fixture(scope="module")
def key():
    return keys.made()


@pytest.fixture(scope="module")
def first(tmp_path_factory, key) -> Iterator[Site]:
    """A site whose first release is unpacked."""
    site = Site(tmp_path_factory.mktemp("box"), key)
    _, path = site.release(OLD)
    python = str(Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")
    unpack.unpack(path, site.folder / "root", python=python, say=lambda _: None)
    yield site
    site.end()


@pytest.fixture
def box(first: Site) -> Iterator[Box]:
    """The first release runs, and is what there is."""
    folder = first.folder
    shutil.rmtree(folder / "state", ignore_errors=True)
    for path in (folder / "root").iterdir():
        if path.is_symlink():
            path.unlink()
    for name in ("current", "proven"):
        (folder / "root" / name).symlink_to(OLD)
    for name in ("skerry-warden.service", "skerry-gateway.service"):
        shutil.copy(folder / "root" / OLD / "share/skerry/systemd" / name, folder / "units" / name)
    (folder / "called").unlink(missing_ok=True)
    (folder / "heard.json").unlink(missing_ok=True)
    first.manage("boot")
    yield Box(first)
    first.manage("off")
    for path in (folder / "root").iterdir():
        if path.is_dir() and not path.is_symlink() and path.name != OLD:
            shutil.rmtree(path)
    for path in [*folder.glob("wheels-2*"), *folder.glob("wheels-3*")]:
        shutil.rmtree(path)


def test_a_good_release_takes_the_place_of_the_one_before(box):
    box.want(*box.site.release(NEW, gateway="2", unit="with a new limit"))
    box.update()
    assert box.outcomes == [Outcome(NEW, box.outcomes[0].sha256, 0, True)]
    assert box.all_run(NEW)
    assert box.site.links == {"current": NEW, "previous": OLD, "proven": NEW}
    assert (box.site.folder / "units/skerry-warden.service").read_text() == "# with a new limit\n"
    assert not (box.site.folder / "units/skerry-new.service").exists()
    assert not list((box.site.folder / "root").glob(".update-*"))
    called = (box.site.folder / "called").read_text()
    assert "daemon-reload" in called
    box.update()
    assert len(box.outcomes) == 1


def test_the_data_plane_is_not_restarted_unless_its_own_code_changed(box):
    before = json.loads((box.site.folder / "manager.json").read_text())["skerry-gateway"]
    box.want(*box.site.release(NEW))
    box.update()
    assert box.outcomes[0].is_good
    assert box.site.running == {"skerry-warden": NEW, "skerry-agent": NEW, "skerry-gateway": OLD}
    assert json.loads((box.site.folder / "manager.json").read_text())["skerry-gateway"] == before
    assert "restart skerry-warden skerry-agent\n" in (box.site.folder / "called").read_text()


@pytest.mark.parametrize(
    ("nature", "why"),
    [
        ({"ends": "skerry-warden"}, "skerry-warden ended 3 times"),
        ({"loses": "d"}, "nobody answers for d"),
        ({"unheard": "skerry-agent"}, "the coordinator was not reached"),
    ],
)
def test_a_release_that_is_no_good_is_taken_back_and_not_tried_again(box, nature, why):
    software, path = box.site.release(NEW, gateway="2", unit="another", **nature)
    box.want(software, path)
    box.update()
    [outcome] = box.outcomes
    assert not outcome.is_good
    assert why in outcome.reason
    assert outcome.is_unreached == ("unheard" in nature)
    assert box.all_run(OLD)
    assert (box.site.links["current"], box.site.links["proven"]) == (OLD, OLD)
    assert (box.site.folder / "units/skerry-warden.service").read_text() == "# as ever\n"
    calls = (box.site.folder / "called").read_text()
    box.update()
    assert (box.site.folder / "called").read_text() == calls, "it is known"


@pytest.mark.parametrize(
    ("nature", "why"),
    [
        ({"refuses": "skerry-gateway"}, r"self-test: skerry-gateway with .*gateway\.toml: .*these settings are not for me"),
        ({"computes": "no"}, "self-test: the worker: .*no runtime"),
    ],
)
def test_what_fails_its_self_test_is_never_switched_to(box, nature, why):
    box.want(*box.site.release(NEW, **nature))
    before = box.site.running
    box.update()
    assert not box.outcomes[0].is_good
    assert re.search(why, box.outcomes[0].reason, re.DOTALL)
    assert box.site.running == before
    assert box.site.links["current"] == OLD


def changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(bytes(content))


def test_nothing_is_unpacked_that_nobody_who_is_trusted_vouches_for(box):
    software, path = box.site.release(NEW)
    by_another = box.site.software(NEW, path, key=keys.made())
    older = box.site.release("3.0.0")
    tried: list[tuple[Software, Path, str]] = [
        (msgspec.structs.replace(software, signature=None), path, "there is none"),
        (by_another, path, "by none of the keys"),
        (msgspec.structs.replace(older[0], version=NEW), older[1], "it is for skerry/3.0.0/release.tar"),
        (box.site.software(NEW, older[1]), older[1], "its manifest says 3.0.0"),
        (msgspec.structs.replace(software, sha256="", version="9.9"), path, "9.9 is not on this box any more"),
    ]
    for attempt, (wanted, at, why) in enumerate(tried):
        box.want(msgspec.structs.replace(wanted, attempt=attempt), at)
        box.update()
        assert why in box.outcomes[-1].reason
    changed(path)
    box.want(msgspec.structs.replace(software, attempt=len(tried)), path)
    box.update()
    assert "are not those that were signed" in box.outcomes[-1].reason
    assert {path.name for path in (box.site.folder / "root").iterdir()} == {OLD, "current", "proven"}


def test_without_keys_nothing_is_installed(box):
    box.config = msgspec.structs.replace(box.config, release_keys_file=None)
    box.want(*box.site.release(NEW))
    box.update()
    assert "release_keys_file: is not named" in box.outcomes[0].reason


def test_the_way_back_to_what_is_on_the_disk_needs_no_bytes(box):
    box.want(*box.site.release(NEW))
    box.update()
    box.want(Software(OLD))
    box.update()
    assert box.site.links["current"] == OLD
    assert [(one.version, one.is_good) for one in box.outcomes] == [(NEW, True), (OLD, True)]


def test_what_is_wanted_no_more_is_dropped_before_it_is_switched_to(box):
    software, path = box.site.release(NEW)
    box.want(software, path)
    with pytest.raises(PowerCut):
        box.update(at=2)  # noted, and nothing more
    box.want(None)
    box.update()
    assert box.outcomes == []
    assert box.site.links["current"] == OLD


@pytest.mark.parametrize(("nature", "ends_with"), [({}, NEW), ({"ends": "skerry-agent"}, OLD)], ids=["good", "bad"])
def test_power_that_is_cut_at_any_step_leaves_a_box_that_serves(box, nature, ends_with):
    software, path = box.site.release(NEW, gateway="2", unit="another", **nature)
    steps = 0
    cut = True
    while cut:
        box.want(software, path)
        cut = False
        try:
            box.update(at=steps)
        except PowerCut:
            cut = True
            box.site.manage("off")
            box.site.manage("boot")
            assert set(box.site.running.values()) <= {OLD, NEW}
            box.update()
        assert box.site.links["current"] == ends_with, f"cut at step {steps}"
        assert box.all_run(ends_with), f"cut at step {steps}"
        assert [one.is_good for one in box.outcomes] == [ends_with == NEW]
        (box.config.state_dir / "record.json").unlink()
        for name in ("current", "proven"):
            link = box.config.root / name
            link.unlink()
            link.symlink_to(OLD)
        shutil.copy(box.config.root / OLD / "share/skerry/systemd/skerry-warden.service", box.config.units_dir / "skerry-warden.service")
        box.site.manage("boot")
        steps += 1
    assert steps > 12
