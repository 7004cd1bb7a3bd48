"""Model files by content: ``state_dir/models/<sha256>``. Nothing of a model is parsed here: a confined process looks into it."""

import asyncio
import hashlib
import os
import shutil
import sys
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

from coordinator.inspector import MOST_ANSWER, MOST_GRAPH_BYTES, MOST_S, Drawn, Verdict
from skerry.runtime import durable, log
from skerry.wire import codec
from skerry.wire.messages import StateTensor
from skerry.wire.model_graph import ModelGraph

logger = log.get("coordinator.models")

RESERVE_BYTES = 256 * 2**20
"""Left free on the disk: the registry must go on when a model is too large."""
MOST_GRAPHS = 16
MOST_INSPECTIONS = 2
"""At a time; the next waits."""


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
        self._inspections = asyncio.Semaphore(MOST_INSPECTIONS)
        self._graphs: OrderedDict[str, ModelGraph] = OrderedDict()
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob("*.part"):
            left_over.unlink()

    def path(self, sha256: str) -> Path | None:
        """Where a model lies, or None."""
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            return None
        path = self._folder / sha256
        return path if path.is_file() else None

    def remove(self, sha256: str) -> None:
        """Forget a file."""
        if (path := self.path(sha256)) is not None:
            path.unlink()

    async def receive(
        self,
        chunks: AsyncIterator[bytes],
        *,
        expected_sha256: str,
        expected_bytes: int | None,
        state: Sequence[StateTensor] = (),
        look: Callable[[Path], Awaitable[None]] | None = None,
    ) -> tuple[str, int]:
        """Take a model in that has the inputs and outputs of ``state``, or what ``look`` takes; returns its digest and size.

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
            await (look(staging) if look is not None else self._inspect(staging, state))
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

    async def graph(self, sha256: str) -> ModelGraph:
        """The network in a file that is here; the last few are kept. Raises NotTaken where it can't be told."""
        if sha256 in self._graphs:
            self._graphs.move_to_end(sha256)
            return self._graphs[sha256]
        path = self.path(sha256)
        if path is None:
            raise NotTaken("unknown", "the file is not here")
        drawn = codec.decode(await self._look(path, b"", "graph"), Drawn, max_bytes=2 * MOST_GRAPH_BYTES)
        if drawn.graph is None:
            raise NotTaken("not_drawn", drawn.reason)
        self._graphs[sha256] = drawn.graph
        while len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
        return drawn.graph

    async def _inspect(self, path: Path, state: Sequence[StateTensor]) -> None:
        """Have a process of its own look into the file (coordinator/inspector.py). Raises NotTaken."""
        verdict = codec.decode(await self._look(path, codec.encode(list(state))), Verdict, max_bytes=MOST_ANSWER)
        if verdict.code:
            raise NotTaken(verdict.code, verdict.reason)

    async def _look(self, path: Path, told: bytes, *what: str) -> bytes:
        """What that process says. Raises NotTaken."""
        async with self._inspections:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                child = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-I", "-m", "coordinator.inspector", str(descriptor), *what),
                    stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
                    env={}, pass_fds=(descriptor,),
                )  # fmt: skip
            finally:
                os.close(descriptor)
            try:
                async with asyncio.timeout(MOST_S):
                    answer, complaint = await child.communicate(told)
            except TimeoutError:
                raise NotTaken("inspection", f"looking into the file took more than {MOST_S:.0f} s") from None
            finally:
                if child.returncode is None:
                    child.kill()
                    await child.wait()
        if child.returncode != 0:
            status = child.returncode or 0
            ended = f"by signal {-status}" if status < 0 else f"with status {status}"
            logger.warning("model.not_inspected", ended=ended, said=complaint.decode(errors="replace")[-300:])
            raise NotTaken("inspection", f"looking into the file ended {ended}; what was seen of it is not trusted")
        return answer
