"""The coordinator's way to the signing key: a signer on a Unix socket, or where none is named a key ring of its own."""

from pathlib import Path
from typing import Protocol

import aiohttp

from coordinator.signer.keyring import Keyring
from skerry.runtime import streams
from skerry.wire import codec
from skerry.wire.messages import Desired
from skerry.wire.signer import Keys

TIMEOUT_S = 5.0
MOST_ANSWER_BYTES = 2 * codec.MAX_MESSAGE_BYTES


class SignerAbsent(Exception):
    """Nothing can be signed now; the text says why."""


class NotSigned(Exception):
    """The signer refuses a document; the text says why."""


class Signer(Protocol):
    """Signs documents and knows the keys."""

    async def sign(self, desired: Desired) -> bytes:
        """The envelope. Raises SignerAbsent and NotSigned."""

    async def keys(self) -> Keys:
        """The keys as they are. Raises SignerAbsent."""

    async def close(self) -> None:
        """Nothing more will be asked."""


class OwnSigner:
    """The key in this very process: for one machine."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring

    async def sign(self, desired: Desired) -> bytes:
        """See Signer."""
        return self._keyring.sign(desired)

    async def keys(self) -> Keys:
        """See Signer."""
        return Keys(self._keyring.public_key, self._keyring.retired)

    async def close(self) -> None:
        """See Signer."""


class SignerOnSocket:
    """A signer in a process of its own."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._session: aiohttp.ClientSession | None = None

    async def sign(self, desired: Desired) -> bytes:
        """See Signer."""
        return await self._ask("POST", "/v1/sign", codec.encode(desired))

    async def keys(self) -> Keys:
        """See Signer."""
        try:
            return codec.decode(await self._ask("GET", "/v1/keys", None), Keys)
        except (codec.Malformed, NotSigned) as exc:
            raise SignerAbsent(f"signer_socket: {self._socket}: it answers what this version does not understand: {exc}") from exc

    async def _ask(self, method: str, path: str, body: bytes | None) -> bytes:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
            self._session = aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self._socket)), timeout=timeout)
        try:
            async with self._session.request(method, f"http://signer{path}", data=body) as response:
                answer = await streams.beginning(response.content, MOST_ANSWER_BYTES)
        except (aiohttp.ClientError, OSError, TimeoutError) as exc:
            raise SignerAbsent(f"signer_socket: {self._socket}: {exc or type(exc).__name__}") from exc
        if response.status != 200:
            raise NotSigned(answer[:500].decode(errors="replace"))
        return answer

    async def close(self) -> None:
        """See Signer."""
        if self._session is not None:
            await self._session.close()
