"""A place on disk for each sandbox: its directories, its user id, and which replica it is for. What is written here outlives the warden.

    state_dir/sandboxes/<sandbox>/slot.json   whose it is (Slot); only the warden reads it
                                 /model/      the model, a hard link to the store's file; seen read-only inside
                                 /run/        its sockets; the one directory that inside and outside both write to

Anyone may write to ``run`` and read ``model``: it is ``sandboxes`` that only the warden and the programs of the box may pass through.
"""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import msgspec

from edge_agent.core.crash import Attempts
from edge_agent.core.pool import Kind
from edge_agent.warden.ports import MODEL_FILE
from skerry.wire import codec
from skerry.wire.messages import ReplicaSpec

RUN_MAX_BYTES = 4 * 2**20
RUN_MAX_ENTRIES = 64
"""A socket directory holds two sockets; whoever puts more there is filling the box's disk."""
ERASE_TIMEOUT_S = 30.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Slot(msgspec.Struct, frozen=True):
    """One sandbox's entry. ``replica`` is None while it is warm. ``attempts`` count the replica's endings before this sandbox."""

    driver: str
    uid: int
    kind: Kind
    boot_id: str
    replica: ReplicaSpec | None = None
    gpu: str = ""
    attempts: Attempts = Attempts()
    is_warm: bool = False
    given_up: str = ""
    """Why it is in a crash loop; empty where it is not."""


class Slots:
    """The slots below ``root``. User ids are given out from ``uid_first`` on, each to one slot at a time."""

    def __init__(self, root: Path, *, uid_first: int) -> None:
        self._root = root
        self._uid_first = uid_first
        self.boot_id = _BOOT_ID.read_text().strip()
        root.mkdir(parents=True, exist_ok=True)
        self._held: dict[str, Slot] = {}
        for folder in root.iterdir():
            try:
                self._held[folder.name] = codec.decode((folder / "slot.json").read_bytes(), Slot)
            except (OSError, codec.Malformed):
                self._erase(folder)  # cut off while it was made: nothing can have been started in it

    def all(self) -> dict[str, Slot]:
        """Every slot by sandbox name."""
        return dict(self._held)

    def model_dir(self, name: str) -> Path:
        """What the sandbox sees as /model."""
        return self._root / name / "model"

    def socket_dir(self, name: str) -> Path:
        """What the sandbox sees as /run/skerry."""
        return self._root / name / "run"

    def open(
        self, name: str, *, driver: str, kind: Kind, replica: ReplicaSpec | None, model: Path | None, gpu: str = "", attempts: Attempts
    ) -> Slot:
        """Make a slot, before its sandbox is started. Raises OSError."""
        used = {slot.uid for slot in self._held.values()}
        uid = next(uid for uid in range(self._uid_first, self._uid_first + len(used) + 1) if uid not in used)
        slot = Slot(driver, uid, kind, self.boot_id, replica, gpu, attempts, is_warm=replica is None)
        folder = self._root / name
        self._erase(folder)
        folder.mkdir(mode=0o755)
        for part, mode in ((self.model_dir(name), 0o755), (self.socket_dir(name), 0o777)):
            part.mkdir()
            part.chmod(mode)
        self._put(name, slot, model)
        return slot

    def claim(self, name: str, replica: ReplicaSpec, model: Path, attempts: Attempts) -> Slot:
        """A warm sandbox becomes ``replica``'s. Raises OSError."""
        slot = msgspec.structs.replace(self._held[name], replica=replica, attempts=attempts)
        self._put(name, slot, model)
        return slot

    def give_up(self, name: str, reason: str) -> None:
        """Remember that this slot's replica is not to be tried again. One that never came to a slot is tried anew by the next warden."""
        if name not in self._held:
            return
        with contextlib.suppress(OSError):  # a full disk: it is remembered until the warden ends
            self._put(name, msgspec.structs.replace(self._held[name], given_up=reason), None)

    def _put(self, name: str, slot: Slot, model: Path | None) -> None:
        """Not synced to the disk: after a power cut there is no sandbox left for it to tell of."""
        if model is not None:
            with contextlib.suppress(FileExistsError):
                os.link(model, self.model_dir(name) / MODEL_FILE)
        staging = self._root / name / "slot.json.new"
        staging.write_bytes(codec.encode(slot))
        staging.rename(self._root / name / "slot.json")
        self._held[name] = slot

    def close(self, name: str) -> None:
        """Forget a slot whose sandbox is gone."""
        self._erase(self._root / name)
        self._held.pop(name, None)

    @staticmethod
    def _erase(folder: Path) -> None:
        (folder / "slot.json").unlink(missing_ok=True)  # first: what is half erased is no slot
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except RecursionError:  # folders in folders, as deep as a sandbox could make them
            subprocess.run(["/bin/rm", "-rf", "--", str(folder)], check=False, timeout=ERASE_TIMEOUT_S)  # noqa: S603 - a path of our own making

    def overfull(self, name: str) -> str:
        """What is wrong with a sandbox's socket directory; empty where nothing is. A sandbox could fill the disk there."""
        size_bytes, entries = 0, 0
        for folder, folders, files in os.walk(self.socket_dir(name)):
            for entry in files:
                with contextlib.suppress(OSError):
                    size_bytes += (Path(folder) / entry).lstat().st_blocks * 512
            entries += len(folders) + len(files)
            if entries > RUN_MAX_ENTRIES or size_bytes > RUN_MAX_BYTES:
                return f"it filled its socket directory: over {RUN_MAX_ENTRIES} entries or {RUN_MAX_BYTES // 2**20} MiB"
        return ""
