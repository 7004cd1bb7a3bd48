"""A place on disk for each sandbox: its directories, its user id, and which replica it is for. What is written here outlives the warden.

    state_dir/sandboxes/<sandbox>/slot.json   whose it is (Slot); only the warden reads it
                                 /model/      the model, a hard link to the store's file; seen read-only inside
                                 /run/        its sockets; the one directory that inside and outside both write to

Anyone may write to ``run`` and read ``model``: it is ``sandboxes`` that only the warden and the programs of the box may pass through.
"""

import contextlib
import os
import uuid
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
LOG_MOST_BYTES, LOG_LEAST_BYTES = 8 * 2**20, 64 * 2**10
"""What one sandbox's log may take."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def erase(folder: Path) -> None:
    """Remove a folder of the warden's and all that a sandbox left below it, however deep, and closed or not; what can't be goes unsaid.

    Each directory is first moved to the top, where the sandbox can't reach it: so no path is long, no walk is deep, and nobody can put
    a link in its place meanwhile.
    """
    try:
        left = [folder, *(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))]
    except OSError:
        with contextlib.suppress(OSError):
            folder.unlink()
        return
    for here in left:  # grows on the way
        with contextlib.suppress(OSError):
            _open_up(here)
            for entry in list(os.scandir(here)):
                with contextlib.suppress(OSError):
                    if not entry.is_dir(follow_symlinks=False):
                        Path(entry.path).unlink()
                    elif here != folder:
                        _open_up(Path(entry.path))
                        left.append(Path(entry.path).rename(folder / uuid.uuid4().hex))
    for here in reversed(left):
        with contextlib.suppress(OSError):
            here.rmdir()
        with contextlib.suppress(OSError):
            here.unlink()  # a link that took its place on the way


def _open_up(path: Path) -> None:
    """Let the owner into a directory. Raises OSError for all else: what a link points to is left alone."""
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(PermissionError):
            Path(f"/proc/self/fd/{descriptor}").chmod(0o700)
    finally:
        os.close(descriptor)


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
    log_max_bytes: int = LOG_MOST_BYTES
    given_up: str = ""
    """Why it is in a crash loop; empty where it is not."""


class Slots:
    """The slots below ``root``. User ids are given out from ``uid_first`` on, each to one slot at a time.

    ``logs_bytes`` is what the logs of all sandboxes may take together: a new one is granted half of what the others leave at the most, and
    LOG_LEAST_BYTES at the least.
    """

    def __init__(self, root: Path, *, uid_first: int, logs_bytes: int = 2**63) -> None:
        self._root = root
        self._uid_first = uid_first
        self._logs_bytes = logs_bytes
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
        left = self._logs_bytes - sum(slot.log_max_bytes for slot in self._held.values())
        log_max_bytes = max(LOG_LEAST_BYTES, min(LOG_MOST_BYTES, left // 2))
        slot = Slot(driver, uid, kind, self.boot_id, replica, gpu, attempts, is_warm=replica is None, log_max_bytes=log_max_bytes)
        folder = self._root / name
        self._erase(folder)
        folder.mkdir(mode=0o755)
        for part, mode in ((self.model_dir(name), 0o755), (self.socket_dir(name), 0o1777)):
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
        # What is made in a meeting place belongs to its group: nobody but the warden may change whose sandbox this is.
        with os.fdopen(os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(codec.encode(slot))
        staging.rename(self._root / name / "slot.json")
        self._held[name] = slot

    def close(self, name: str) -> None:
        """Forget a slot whose sandbox is gone."""
        self._erase(self._root / name)
        self._held.pop(name, None)

    @staticmethod
    def _erase(folder: Path) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (folder / "slot.json").unlink()  # first: what is half erased is no slot
        erase(folder)

    def overfull(self, name: str) -> str:
        """What is wrong with a sandbox's socket directory; empty where nothing is. A sandbox could fill the disk there."""
        size_bytes, entries = 0, 0
        errors: list[OSError] = []
        for folder, folders, files in os.walk(self.socket_dir(name), onerror=errors.append):
            for entry in [*folders, *files]:
                try:
                    size_bytes += (Path(folder) / entry).lstat().st_blocks * 512
                except OSError as exc:
                    errors.append(exc)
            if any(isinstance(error, PermissionError) for error in errors):
                break
            entries += len(folders) + len(files)
            if entries > RUN_MAX_ENTRIES or size_bytes > RUN_MAX_BYTES:
                return f"it filled its socket directory: over {RUN_MAX_ENTRIES} entries or {RUN_MAX_BYTES // 2**20} MiB"
        if any(isinstance(error, PermissionError) for error in errors):  # it is the warden's own user: what it closes it can fill
            return "it hides what is in its socket directory: a directory there can't be looked into"
        return ""
