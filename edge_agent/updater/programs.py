"""What the box's programs say of themselves: the warden by a file, the gateway on its socket, the agent by a file."""

from pathlib import Path

import aiohttp
import msgspec

from edge_agent.updater.config import Config
from skerry.runtime import durable, streams
from skerry.wire import codec
from skerry.wire.box import Heard, WantedSoftware
from skerry.wire.messages import Software

ASK_TIMEOUT_S = 5.0


class _Ready(msgspec.Struct, frozen=True):
    waiting_for: list[str] = []


class Programs:
    """See ports.Box."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def wanted(self) -> tuple[Software | None, Path]:
        """See Box."""
        wanted = durable.read(self._config.wanted_file, WantedSoftware) or WantedSoftware()
        return wanted.software, Path(wanted.path)

    async def waiting_for(self) -> frozenset[str] | None:
        """See Box."""
        connector = aiohttp.UnixConnector(path=str(self._config.gateway_socket))
        try:
            async with (
                aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=ASK_TIMEOUT_S)) as session,
                session.get("http://gateway/v2/health/ready") as response,
            ):
                said = await streams.beginning(response.content, codec.MAX_MESSAGE_BYTES)
                return frozenset(codec.decode(said, _Ready).waiting_for)
        except (aiohttp.ClientError, OSError, TimeoutError, codec.Malformed):
            return None

    def is_heard(self, version: str, pid: int) -> bool:
        """See Box."""
        return pid > 0 and durable.read(self._config.heard_file, Heard) == Heard(version, pid)
