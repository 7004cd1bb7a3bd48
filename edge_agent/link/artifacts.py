"""Models fetched from the coordinator by digest: resumed where a transfer broke off, hashed while they stream, renamed when whole."""

import asyncio
import contextlib
import hashlib
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp

from skerry.runtime import backoff, durable, lifecycle, log, tls
from skerry.wire.messages import ModelRef

logger = log.get("agent.artifacts")

CHUNK_BYTES = 1 << 20
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 20.0
RETRY_FIRST_S = 0.5
RETRY_MOST_S = 60.0
ADMIT_S = 120.0
"""How long the warden may take to admit a model before it is fetched anew."""
RESERVE_BYTES = 64 * 1024 * 1024
"""Left free on the disk: a model must not be what fills it."""


class FetchFailed(Exception):
    """The model could not be fetched; the text says why, and the next try may succeed."""


class Artifacts:
    """Fetches whatever the warden lacks, one after the other, for as long as it lacks it."""

    def __init__(
        self,
        *,
        folder: Path,
        url: Callable[[], str],
        url_failed: Callable[[], None] = lambda: None,
        token: str,
        proxy: str,
        ca_file: str = "",
        judge: tls.Judge | None = None,
        arrived: Callable[[str, str], None],
        reserve_bytes: int = RESERVE_BYTES,
    ) -> None:
        self._folder = folder
        self._url = url
        self._url_failed = url_failed
        self._token = token
        self._ca_file = ca_file
        self._judge = judge
        self._proxy = proxy or None
        self._arrived = arrived
        self._reserve_bytes = reserve_bytes
        self._needs: dict[str, ModelRef] = {}
        self._changed = asyncio.Event()
        self._attempts: dict[str, int] = {}
        self._next_try: dict[str, float] = {}

    def need(self, models: list[ModelRef]) -> None:
        """What the warden lacks now; what it no longer lacks is removed from the incoming folder."""
        needs = {model.sha256: model for model in models}
        for digest in [digest for digest in self._needs if digest not in needs]:
            self._attempts.pop(digest, None)
            self._next_try.pop(digest, None)
            for path in (self._folder / digest, self._folder / f"{digest}.part"):
                path.unlink(missing_ok=True)
        self._needs = needs
        self._changed.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Fetch until ``stop`` is set."""
        self._folder.mkdir(parents=True, exist_ok=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
        secured = self._ca_file or self._url().startswith("https:")  # and where it moves to
        connector = aiohttp.TCPConnector(ssl=tls.client(self._ca_file, judge=self._judge)) if secured else None
        headers = {"Authorization": f"Bearer {self._token}"}
        async with aiohttp.ClientSession(timeout=timeout, headers=headers, connector=connector) as session:
            while not stop.is_set():
                self._changed.clear()
                now = time.monotonic()
                due = [model for digest, model in self._needs.items() if self._next_try.get(digest, 0.0) <= now]
                for model in due:
                    await self._fetch(session, model)
                pause_s = min([30.0, *(self._next_try.get(d, 0.0) - time.monotonic() for d in self._needs)]) if self._needs else 30.0
                await lifecycle.first_of(self._changed, stop, within_s=max(0.02, pause_s))

    async def _fetch(self, session: aiohttp.ClientSession, model: ModelRef) -> None:
        attempt = self._attempts.get(model.sha256, 0)
        self._attempts[model.sha256] = attempt + 1
        self._next_try[model.sha256] = time.monotonic() + backoff.delay_s(
            attempt, random.random(), first_s=RETRY_FIRST_S, most_s=RETRY_MOST_S
        )
        try:
            await self._download(session, model)
        except (FetchFailed, aiohttp.ClientError, OSError, TimeoutError) as exc:
            if not isinstance(exc, FetchFailed):
                self._url_failed()
            reason = f"{model.title}: {exc or type(exc).__name__}"
            logger.warning("model.not_fetched", reason=reason, attempt=attempt + 1)
            self._arrived(model.sha256, reason[:500])
        else:
            logger.info("model.fetched", model=model.title, bytes=model.size_bytes)
            self._next_try[model.sha256] = time.monotonic() + ADMIT_S  # the warden hashes it now
            self._arrived(model.sha256, "")

    async def _download(self, session: aiohttp.ClientSession, model: ModelRef) -> None:
        """Leave the whole, verified model at ``folder/<sha256>``. Raises FetchFailed and what aiohttp and the disk raise."""
        part = self._folder / f"{model.sha256}.part"
        (self._folder / model.sha256).unlink(missing_ok=True)
        digest, have = await asyncio.to_thread(_hash_part, part, model.size_bytes)
        free_bytes = shutil.disk_usage(self._folder).free
        if model.size_bytes - have + self._reserve_bytes > free_bytes:
            raise FetchFailed(
                f"{model.size_bytes - have} bytes are to come and {free_bytes} are free, of which {self._reserve_bytes} are kept"
            )
        if have < model.size_bytes:
            await self._stream(session, model, part, digest, have)
        if digest.hexdigest() != model.sha256:
            part.unlink(missing_ok=True)
            raise FetchFailed(f"digest: {digest.hexdigest()} came, {model.sha256} was asked for")
        part.rename(self._folder / model.sha256)
        await asyncio.to_thread(durable.sync_directory, self._folder)

    async def _stream(self, session: aiohttp.ClientSession, model: ModelRef, part: Path, digest: "hashlib._Hash", have: int) -> None:
        headers = {"Range": f"bytes={have}-"} if have else {}
        async with session.get(f"{self._url()}/v1/artifacts/{model.sha256}", headers=headers, proxy=self._proxy) as response:
            if response.status not in (200, 206):
                raise FetchFailed(f"the coordinator answered {response.status}")
            if (response.status == 206) != bool(have):
                part.unlink(missing_ok=True)
                raise FetchFailed("the coordinator did not resume where it was asked to")
            with part.open("ab") as file:
                async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                    have += len(chunk)
                    if have > model.size_bytes:
                        break
                    digest.update(chunk)
                    file.write(chunk)
                file.flush()
                await asyncio.to_thread(os.fsync, file.fileno())
        if have != model.size_bytes:
            if have > model.size_bytes:
                part.unlink(missing_ok=True)
            raise FetchFailed(f"{have} bytes came, {model.size_bytes} were announced")


def _hash_part(part: Path, size_bytes: int) -> tuple["hashlib._Hash", int]:
    """The digest so far and the length of what an earlier transfer left; something too long is thrown away."""
    digest, have = hashlib.sha256(), 0
    with contextlib.suppress(FileNotFoundError):
        if part.stat().st_size > size_bytes:
            part.unlink()
            return digest, 0
        with part.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                have += len(chunk)
    return digest, have
