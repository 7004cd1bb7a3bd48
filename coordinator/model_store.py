"""Model files by content: ``state_dir/models/<sha256>``. Nothing of a model is parsed here but the outline that core/onnx_file walks."""

import asyncio
import hashlib
import mmap
import os
import shutil
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from coordinator.core import onnx_file
from skerry.runtime import durable
from skerry.wire.messages import StateTensor

RESERVE_BYTES = 256 * 2**20
"""Left free on the disk: the registry must go on when a model is too large."""


class NotTaken(Exception):
    """A model that the store does not take; ``code`` is short and fixed, the text says why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class ModelStore:
    """Receives, checks and hands out model files."""

    def __init__(self, folder: Path, *, limit_bytes: int, reserve_bytes: int = RESERVE_BYTES) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._reserve_bytes = reserve_bytes
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob("*.part"):
            left_over.unlink()

    def path(self, sha256: str) -> Path | None:
        """Where a model lies, or None."""
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            return None
        path = self._folder / sha256
        return path if path.is_file() else None

    async def receive(
        self,
        chunks: AsyncIterator[bytes],
        *,
        expected_sha256: str,
        expected_bytes: int | None,
        state: Sequence[StateTensor] = (),
    ) -> tuple[str, int]:
        """Take a model in that has the inputs and outputs of ``state``; returns its digest and size.

        Raises NotTaken; nothing of a refused one stays.
        """
        staging = self._folder / f"{uuid.uuid4().hex}.part"
        if expected_bytes is not None:
            self._check_room(expected_bytes)
        try:
            digest, size = hashlib.sha256(), 0
            with staging.open("wb") as file:
                async for chunk in chunks:
                    size += len(chunk)
                    if size > self._limit_bytes:
                        raise NotTaken("too_large", f"the model has more than {self._limit_bytes} bytes (model_limit_bytes)")
                    digest.update(chunk)
                    await asyncio.to_thread(file.write, chunk)
                file.flush()
                await asyncio.to_thread(os.fsync, file.fileno())
            sha256 = digest.hexdigest()
            if expected_bytes is not None and size != expected_bytes:
                raise NotTaken("truncated", f"{size} bytes came, {expected_bytes} were announced: push it again")
            if expected_sha256 and sha256 != expected_sha256:
                raise NotTaken("wrong_digest", f"sha256: {sha256} came, {expected_sha256} was announced: push it again")
            await asyncio.to_thread(_check_file, staging, state)
            staging.chmod(0o444)
            staging.rename(self._folder / sha256)
            await asyncio.to_thread(durable.sync_directory, self._folder)
        except OSError as exc:
            raise NotTaken("disk", f"the store can't keep the model: {exc.strerror}") from exc
        finally:
            staging.unlink(missing_ok=True)
        return sha256, size

    def _check_room(self, size_bytes: int) -> None:
        if size_bytes > self._limit_bytes:
            raise NotTaken("too_large", f"the model has {size_bytes} bytes, at most {self._limit_bytes} are taken (model_limit_bytes)")
        free_bytes = shutil.disk_usage(self._folder).free
        if size_bytes + self._reserve_bytes > free_bytes:
            raise NotTaken("disk", f"the model has {size_bytes} bytes and {free_bytes} are free, of which {self._reserve_bytes} are kept")


def _check_file(path: Path, state: Sequence[StateTensor]) -> None:
    if path.stat().st_size == 0:
        raise NotTaken("not_onnx", "the file is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = memoryview(mapped)
        code = reason = ""
        try:
            onnx_file.check(view)
            onnx_file.check_state(view, state)
        except onnx_file.NotOnnx as exc:
            code, reason = "not_onnx", str(exc)
        except onnx_file.NoSuchTensor as exc:
            code, reason = "invalid_state", f"state: {exc}"
        finally:
            view.release()
    if code:
        raise NotTaken(code, reason)
