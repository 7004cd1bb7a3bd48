"""A box that was thrown out is thrown off the broker too: MQTT ends the older of two sessions of one client (5.0, 3.1.4-3).

Lists of revoked certificates are read when a connection is made: one that stands, stands. So the coordinator, which can issue itself a
certificate of any name, connects once under the box's. After that the box is a stranger with a revoked certificate.
"""

import asyncio
import contextlib
import ssl
import tempfile
from collections.abc import Callable
from pathlib import Path

import aiomqtt

from coordinator.ca.authority import Authority
from skerry.runtime import keys, lifecycle, log, tls
from skerry.runtime.settings import Broker
from skerry.wire import topics
from skerry.wire.identity import Subject

logger = log.get("coordinator.eviction")

PAUSES_S = (0.0, 1.0, 3.0, 11.0)
"""Until the broker has read the new list the box may come back, so it is done again."""
LOOK_S = 0.5
CERTIFICATE_MS = 5 * 60 * 1000
TIMEOUT_S = 5.0
WAITING = 1000
"""Names in the queue, and as many that are being seen to."""


class Evictions:
    """``evict`` puts a name into a bounded queue; ``run`` sees to each, beside the others."""

    def __init__(self, broker: Broker, authority: Authority, fleet: str, *, now_ms: Callable[[], int]) -> None:
        self._broker = broker
        self._authority = authority
        self._fleet = fleet
        self._now_ms = now_ms
        self._wanted: asyncio.Queue[str] = asyncio.Queue(WAITING)
        self._places = asyncio.Semaphore(WAITING)

    async def evict(self, node: str) -> None:
        """Soon. Where the broker asks for no certificates there is nothing to be done."""
        if self._broker.cert_file:
            await self._wanted.put(node)

    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop`` is set."""
        async with asyncio.TaskGroup() as tasks:
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    node = await asyncio.wait_for(self._wanted.get(), LOOK_S)
                    await self._places.acquire()
                    tasks.create_task(self._see_to(node, stop), name="coordinator.eviction")

    async def _see_to(self, node: str, stop: asyncio.Event) -> None:
        try:
            for pause_s in PAUSES_S:
                if await lifecycle.sleep_until(stop, pause_s):
                    return
                await self._try(node)
        finally:
            self._places.release()

    async def _try(self, node: str) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._take_over(node)
            logger.info("node.evicted", node=node)
        except (aiomqtt.MqttError, OSError, TimeoutError) as exc:
            logger.warning("node.not_evicted", node=node, reason=str(exc) or type(exc).__name__)

    async def _take_over(self, node: str) -> None:
        with tempfile.TemporaryDirectory(prefix="skerry-evict-") as folder:
            context = self._context(Path(folder), node)
        async with aiomqtt.Client(
            self._broker.host,
            self._broker.port,
            identifier=topics.client_id(self._fleet, node),
            protocol=aiomqtt.ProtocolVersion.V5,
            clean_start=True,
            tls_context=context,
            timeout=TIMEOUT_S,
        ):
            pass

    def _context(self, folder: Path, node: str) -> ssl.SSLContext:
        key = keys.made()
        issued = self._authority.issue(key.public_key(), Subject(self._fleet, "box", node), now_ms=self._now_ms(), life_ms=CERTIFICATE_MS)
        pem = folder / "evict.pem"
        pem.touch(0o600)
        pem.write_bytes(keys.pem(key) + issued.chain.encode())
        return tls.client(self._broker.ca_file, str(pem))
