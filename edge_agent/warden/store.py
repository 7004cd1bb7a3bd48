"""What the warden keeps on disk: the desired document as it was signed, and models whose bytes it has hashed itself."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from edge_agent.warden.reserve import Reserve
from skerry.runtime import durable
from skerry.wire.messages import ModelRef

T = TypeVar("T")

RESERVE_BYTES = 4 << 20
_CHUNK_BYTES = 1 << 20


class StoreFailed(Exception):
    """The store could not take something; the text says why."""


class Store:
    """``state_dir/desired.json`` and ``state_dir/models/<sha256>/model.onnx``."""

    def __init__(self, state_dir: Path) -> None:
        self._desired = state_dir / "desired.json"
        self._reserve = Reserve(state_dir / "reserve", RESERVE_BYTES)
        self._models = state_dir / "models"
        self._models.mkdir(parents=True, exist_ok=True)
        for left_over in self._models.glob("*/.staging"):
            left_over.unlink()

    def save_desired(self, envelope: bytes) -> None:
        """Persist before acting, on a full disk with the room that is kept for it. Raises StoreFailed."""
        try:
            try:
                durable.write(self._desired, envelope)
            except OSError as exc:
                if exc.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._reserve.give_up():
                    raise
                durable.write(self._desired, envelope)
        except OSError as exc:
            raise StoreFailed(f"the document can't be kept: {exc.strerror}") from exc

    def hold_reserve(self) -> None:
        """Keep room for the next document, where there is some."""
        self._reserve.hold()

    def load_desired(self, judge: Callable[[bytes], T]) -> T | None:
        """What ``judge`` makes of the document last saved, since the file may have been tampered with. It raises for a bad one."""
        try:
            envelope = self._desired.read_bytes()
        except FileNotFoundError:
            return None
        return judge(envelope)

    def set_aside_desired(self) -> None:
        """Keep a document that can't be used for a person to look at, out of the way."""
        self._desired.replace(self._desired.with_suffix(".refused"))

    def model_path(self, sha256: str) -> Path:
        """Where an admitted model lies."""
        return self._models / sha256 / "model.onnx"

    def models(self) -> set[str]:
        """Digests of the admitted models."""
        return {folder.name for folder in self._models.iterdir() if (folder / "model.onnx").is_file()}

    def sizes(self) -> dict[str, int]:
        """Bytes of the admitted models, by digest."""
        return {digest: self.model_path(digest).stat().st_size for digest in self.models()}

    def remove(self, sha256: str) -> None:
        """Forget a model; a sandbox that runs it keeps its own name of the file."""
        shutil.rmtree(self.model_path(sha256).parent, ignore_errors=True)

    def admit(self, incoming: Path, model: ModelRef) -> None:
        """Copy a fetched model in while hashing it, so that what was checked is what will be used. Raises StoreFailed.

        The folder it comes from belongs to the agent, which may be in an enemy's hands: nothing there is used in place.
        """
        target = self.model_path(model.sha256)
        staging = target.with_name(".staging")
        try:
            target.parent.mkdir(exist_ok=True)
            digest, size = hashlib.sha256(), 0
            source = os.open(incoming, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(source, "rb") as reader, staging.open("wb") as writer:
                while chunk := reader.read(_CHUNK_BYTES):
                    size += len(chunk)
                    if size > model.size_bytes:
                        break
                    digest.update(chunk)
                    writer.write(chunk)
                writer.flush()
                os.fsync(writer.fileno())
            if size != model.size_bytes or digest.hexdigest() != model.sha256:
                raise StoreFailed(f"{model.title}: the bytes that were fetched have another digest than the one pinned")
            staging.chmod(0o444)
            staging.rename(target)
            durable.sync_directory(target.parent)
        except OSError as exc:
            raise StoreFailed(f"{model.title}: {exc.strerror}") from exc
        finally:
            staging.unlink(missing_ok=True)
            if not target.exists():
                shutil.rmtree(target.parent, ignore_errors=True)
