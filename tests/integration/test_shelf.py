"""Models on a warden's disk: the next version finds room, the last one stays to go back to, and what is told is kept on a full disk."""

import hashlib
import os

import pytest

from edge_agent.warden.shelf import Shelf
from edge_agent.warden.store import RESERVE_BYTES, Store, StoreFailed
from skerry.wire.messages import Desired, ModelRef, ReplicaSpec
from tests.conftest import fill, need
from tests.integration.box import MIB, Box


class Disk:
    """A store with models of a megabyte."""

    def __init__(self, folder, *, most: int = 0) -> None:
        self.folder, self.store, self.now_ms, self.most = folder, Store(folder), 1, most
        self.shelf = self.started()

    def started(self) -> Shelf:
        return Shelf(self.folder / "models.json", self.store, now_ms=lambda: self.now_ms, reserve_bytes=0, most_bytes=self.most)

    def admit(self, version: int) -> ModelRef:
        content = bytes([version]) * MIB
        model = ModelRef("m", version, hashlib.sha256(content).hexdigest(), MIB)
        (self.folder / "incoming").write_bytes(content)
        self.store.admit(self.folder / "incoming", model)
        return model

    def deploy(self, *models: tuple[str, ModelRef]) -> None:
        self.now_ms += 1000
        specs = [ReplicaSpec(f"{name}-0", name, 1, model, 1, 1.0) for name, model in models]
        self.shelf.note(Desired("f", "n", self.now_ms, 1, specs))

    def versions(self) -> list[int]:
        return sorted(self.store.model_path(digest).read_bytes()[0] for digest in self.store.models())


def test_the_oldest_go_first_and_never_the_present_one_nor_the_one_before(tmp_path):
    disk = Disk(tmp_path, most=4 * MIB)
    for version in range(1, 5):
        disk.deploy(("d", disk.admit(version)))
    assert disk.shelf.tend((), 0) == []
    gone = disk.shelf.tend((), MIB)
    assert [model.size_bytes for model in gone] == [MIB]
    assert disk.versions() == [2, 3, 4]
    disk.shelf = disk.started()
    disk.shelf.tend((), 100 * MIB)
    assert disk.versions() == [3, 4], "after a restart too"


def test_what_a_sandbox_runs_and_what_another_deployment_has_stays(tmp_path):
    disk = Disk(tmp_path, most=1)
    one, two, three = (disk.admit(version) for version in (1, 2, 3))
    disk.deploy(("d", one), ("e", two))
    disk.deploy(("e", two))
    disk.shelf.tend((one.sha256,), 0)
    assert disk.versions() == [1, 2], "three was never deployed"
    disk.shelf.tend((), 0)
    assert disk.versions() == [2]
    assert three


def test_a_damaged_record_costs_what_it_held_and_no_start(tmp_path):
    disk = Disk(tmp_path)
    disk.deploy(("d", disk.admit(1)))
    (tmp_path / "models.json").write_bytes(b"{")
    disk.started().tend((), 0)
    assert disk.versions() == [1]


def test_a_warden_whose_disk_is_short_lets_go_of_what_it_does_not_need_and_says_so(tmp_path):
    box = Box(tmp_path)

    async def scene():
        async with box.up():
            store = Store(box.config.state_dir)

            def shelf() -> Shelf:
                return Shelf(box.config.state_dir / "models.json", store, now_ms=lambda: 1, reserve_bytes=2**62, most_bytes=0)

            box.warden.shelf = shelf()
            for version in (1, 2, 3, 4):
                await box.want(box.spec(version=version))
                await box.until_ready("d-0")
            box.warden.shelf = shelf()  # another start, which looks at once
            box.warden.wake()
            await box.until(lambda: box.entries("model.evicted"))
            passed_over = hashlib.sha256(b"version 2").hexdigest()
            assert [entry.subject for entry in box.entries("model.evicted")] == [passed_over], "the first is what served for long enough"
            assert store.models() == {hashlib.sha256(f"version {version}".encode()).hexdigest() for version in (1, 3, 4)}

    box.play(scene)


@pytest.fixture
def disk_of_32_mib(tmp_path):
    import subprocess

    need("root", "" if os.geteuid() == 0 else "mounting a small disk needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_on_a_full_disk_what_the_box_is_told_is_kept_in_the_room_that_was_held_for_it(disk_of_32_mib):
    folder = disk_of_32_mib
    store = Store(folder)
    store.hold_reserve()
    assert (folder / "reserve").stat().st_blocks * 512 >= RESERVE_BYTES
    store.save_desired(b"first")
    fill(folder)
    store.save_desired(b"second" * 1000)
    assert (folder / "desired.json").read_bytes() == b"second" * 1000
    assert not (folder / "reserve").exists()
    fill(folder)
    with pytest.raises(StoreFailed, match="can't be kept"):
        store.save_desired(b"third" * 10_000)
    assert (folder / "desired.json").read_bytes() == b"second" * 1000, "the old one is whole"
    (folder / "filler").unlink()
    store.hold_reserve()
    assert (folder / "reserve").exists()


def test_where_there_is_little_room_none_is_held(small_disk):
    store = Store(small_disk)
    store.hold_reserve()
    assert not (small_disk / "reserve").exists()
