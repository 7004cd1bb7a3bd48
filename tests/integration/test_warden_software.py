"""A warden that is told of a release of the box's own programs: it has the bytes brought, tells the updater, and tells of the updater."""

import hashlib
from pathlib import Path

import msgspec
import pytest

from edge_agent.core import update
from edge_agent.updater.record import RecordFile
from skerry import __version__
from skerry.runtime import durable
from skerry.wire.box import Outcome, UpdateRecord, WantedSoftware
from skerry.wire.messages import Software, SoftwareReport
from tests.integration.box import Box

BYTES = b"a release"
SOFTWARE = Software("9.9", hashlib.sha256(BYTES).hexdigest(), len(BYTES))


class Updated(Box):
    """A box with an updater, whose part the test plays by its own file."""

    def __init__(self, folder: Path, *, has_updater: bool = True) -> None:
        (folder / "updater").mkdir()
        self.record_file = folder / "updater/record.json"
        super().__init__(folder, **({"updater_record_file": self.record_file} if has_updater else {}))

    def tell(self, software: Software | None) -> None:
        self.desired = msgspec.structs.replace(self.document(), software=software)
        self.warden.accept(self.desired)

    @property
    def said(self) -> SoftwareReport:
        return self.warden.state.reported.software

    @property
    def wanted(self) -> WantedSoftware | None:
        return durable.read(self.config.state_dir / "software.json", WantedSoftware)

    async def bring_it(self) -> None:
        await self.until(lambda: (state := self.warden.state) and [model.sha256 for model in state.needs] == [SOFTWARE.sha256])
        (self.config.incoming_dir / SOFTWARE.sha256).write_bytes(BYTES)
        await self.warden.arrived(SOFTWARE.sha256, "")

    async def until_said(self, phase: str) -> None:
        def look() -> bool:
            self.warden.wake()
            return self.warden.state is not None and self.said.phase == phase

        await self.until(look)


def test_the_bytes_are_brought_handed_to_the_updater_and_gone_when_it_has_them(tmp_path):
    box = Updated(tmp_path)

    async def scene():
        async with box.up():
            await box.looked(1)
            assert box.said == SoftwareReport()
            box.tell(SOFTWARE)
            await box.until_said("fetching")
            assert box.wanted is None or box.wanted.software is None, "not before it is here"
            await box.bring_it()
            await box.until_said("preparing")
            assert box.wanted.software == SOFTWARE
            assert Path(box.wanted.path).read_bytes() == BYTES
            record = RecordFile(box.record_file)
            held = update.begun(SOFTWARE, __version__)
            record.keep(UpdateRecord(held), "software.preparing", "9.9")
            await box.looked(3)
            assert Path(box.wanted.path).exists()
            record.keep(UpdateRecord(msgspec.structs.replace(held, stage="trial", units=["skerry-warden"])), "software.trial", "9.9")
            await box.until_said("trial")
            await box.until(lambda: not Path(box.config.state_dir / "models" / SOFTWARE.sha256).exists())
        async with box.up():  # as it would start anew from the release on trial
            await box.until_said("trial")
            record.keep(UpdateRecord(outcomes=[Outcome("9.9", SOFTWARE.sha256, 0, False, "no good")]), "software.failed", "9.9", "no good")
            await box.until_said("failed")
            assert box.said == SoftwareReport("9.9", 0, "failed", "no good")
            assert box.warden.state.needs == [], "what was given up is not fetched again"
            box.tell(msgspec.structs.replace(SOFTWARE, attempt=1))
            await box.until_said("fetching")
            await box.bring_it()
            await box.until_said("preparing")
            steps = [entry.kind for entry in box.entries() if entry.kind.startswith("software.")]
            assert steps == ["software.preparing", "software.trial", "software.failed"], "each once, restarts or not"

    box.play(scene)


def test_what_is_wanted_no_more_is_taken_back_from_the_updater(tmp_path):
    box = Updated(tmp_path)

    async def scene():
        async with box.up():
            box.tell(SOFTWARE)
            await box.bring_it()
            await box.until_said("preparing")
            box.tell(None)
            await box.until_said("")
            await box.until(lambda: box.wanted.software is None)

    box.play(scene)


def test_other_bytes_than_those_that_were_signed_for_are_not_handed_over(tmp_path):
    box = Updated(tmp_path)

    async def scene():
        async with box.up():
            box.tell(SOFTWARE)
            await box.until(lambda: box.warden.state and box.warden.state.needs)
            (box.config.incoming_dir / SOFTWARE.sha256).write_bytes(b"a  release"[:9])
            await box.warden.arrived(SOFTWARE.sha256, "")
            await box.until_said("fetching")
            await box.until(lambda: box.said.reason)
            assert "another digest than the one pinned" in box.said.reason
            assert box.wanted is None or box.wanted.software is None

    box.play(scene)


@pytest.mark.parametrize(("version", "phase"), [("9.9", "failed"), (__version__, "done")])
def test_a_box_without_an_updater_says_so(tmp_path, version, phase):
    box = Updated(tmp_path, has_updater=False)

    async def scene():
        async with box.up():
            box.tell(msgspec.structs.replace(SOFTWARE, version=version))
            await box.until_said(phase)
            assert box.warden.state.needs == []
            assert (box.said.reason == update.NO_UPDATER) == (phase == "failed")

    box.play(scene)


def test_the_way_back_needs_no_bytes(tmp_path):
    box = Updated(tmp_path)

    async def scene():
        async with box.up():
            box.tell(Software("1.0"))
            await box.until_said("preparing")
            assert box.warden.state.needs == []
            assert box.wanted == WantedSoftware(Software("1.0"), "")

    box.play(scene)
