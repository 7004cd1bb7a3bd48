"""One box's way out, which can be cut: every connection that its agent and gateway make runs through here.

Two doors: one leads to the broker, the other is an HTTP proxy (RFC 9112 3.2.2, absolute-form) to the coordinator and the cloud.
A cut is what pulling the plug is: nothing more passes, and nobody is told. Connections hang until their owners give up.
"""

import asyncio
import contextlib
from urllib.parse import urlsplit

CHUNK_BYTES = 65536
CONNECT_TIMEOUT_S = 5.0
HEAD_BYTES = 65536


class Uplink:
    """Listens on loopback; ``cut`` and ``mend`` are the plug."""

    def __init__(self, *, broker_port: int, door_port: int, proxy_port: int) -> None:
        self._broker_port = broker_port
        self._door_port = door_port
        self._proxy_port = proxy_port
        self._whole = asyncio.Event()
        self._whole.set()
        self._servers: list[asyncio.Server] = []
        self._before_the_cut: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """Open both doors."""
        self._servers = [
            await asyncio.start_server(self._to_broker, "127.0.0.1", self._door_port),
            await asyncio.start_server(self._proxy, "127.0.0.1", self._proxy_port, limit=HEAD_BYTES),
        ]

    async def stop(self) -> None:
        """Close everything."""
        for server in self._servers:
            server.close()
        for writer in list(self._before_the_cut):
            writer.transport.abort()

    def cut(self) -> None:
        """Pull the plug."""
        self._whole.clear()

    def mend(self) -> None:
        """Plug in again. What was connected before stays dead: the other side has given it up, or will."""
        for writer in list(self._before_the_cut):
            writer.transport.abort()
        self._whole.set()

    async def _to_broker(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._join(reader, writer, "127.0.0.1", self._broker_port, b"")

    async def _proxy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await reader.readline()
            target = urlsplit(line.split(b" ")[1].decode())
            host, port = target.hostname or "", target.port or 80
        except (IndexError, ValueError, OSError):
            writer.close()
            return
        await self._join(reader, writer, host, port, line)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int, first: bytes) -> None:
        """Connect and pass bytes both ways until one side ends. The request line stays in absolute form: servers must take it."""
        self._before_the_cut.add(writer)
        far: asyncio.StreamWriter | None = None
        try:
            await self._whole.wait()
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                far_reader, far = await asyncio.open_connection(host, port)
            self._before_the_cut.add(far)
            far.write(first)
            both = [asyncio.create_task(self._pass(reader, far)), asyncio.create_task(self._pass(far_reader, writer))]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
        except (OSError, TimeoutError):
            pass  # the far side is not there: the near one is closed, as a router would
        finally:
            for end in (writer, far):
                if end is not None:
                    self._before_the_cut.discard(end)
                    with contextlib.suppress(OSError):
                        end.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                await self._whole.wait()
                writer.write(data)
                await writer.drain()
