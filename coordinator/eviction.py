"""A box that was thrown out is thrown off the broker too: MQTT ends the older of two sessions of one client (5.0, 3.1.4-3).

Lists of revoked certificates are read when a connection is made: one that stands, stands. So the coordinator, which can issue itself a
certificate of any name, connects once under the box's. After that the box is a stranger with a revoked certificate.
"""

import asyncio
import ssl
import tempfile
from collections.abc import Callable
from pathlib import Path

import aiomqtt
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from coordinator.ca.authority import Authority
from skerry.runtime import lifecycle, log
from skerry.runtime.settings import Broker
from skerry.wire import topics
from skerry.wire.identity import Subject

logger = log.get("coordinator.eviction")

TIMES_S = (0.0, 1.0, 4.0, 15.0)
"""Until the broker has read the new list the box may come back, so it is done again."""
CERTIFICATE_MS = 5 * 60 * 1000
TIMEOUT_S = 5.0
WAITING = 1000


class Evictions:
    """``evict`` puts a name into a bounded queue; ``run`` works it off."""

    def __init__(self, broker: Broker, authority: Authority, fleet: str, *, now_ms: Callable[[], int]) -> None:
        self._broker = broker
        self._authority = authority
        self._fleet = fleet
        self._now_ms = now_ms
        self._due: asyncio.PriorityQueue[tuple[float, str, int]] = asyncio.PriorityQueue(WAITING)

    async def evict(self, node: str) -> None:
        """Soon. Where the broker asks for no certificates there is nothing to be done."""
        if self._broker.cert_file:
            await self._due.put((asyncio.get_running_loop().time(), node, 0))

    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop`` is set."""
        while not stop.is_set():
            try:
                due_s, node, turn = await asyncio.wait_for(self._due.get(), 0.5)
            except TimeoutError:
                continue
            if await lifecycle.sleep_until(stop, max(0.0, due_s - asyncio.get_running_loop().time())):
                return
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    await self._take_over(node)
                logger.info("node.evicted", node=node)
            except (aiomqtt.MqttError, OSError, TimeoutError) as exc:
                logger.warning("node.not_evicted", node=node, reason=str(exc) or type(exc).__name__)
            if turn + 1 < len(TIMES_S) and not self._due.full():
                self._due.put_nowait((due_s + TIMES_S[turn + 1] - TIMES_S[turn], node, turn + 1))

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
        key = ec.generate_private_key(ec.SECP256R1())
        issued = self._authority.issue(key.public_key(), Subject(self._fleet, "box", node), now_ms=self._now_ms(), life_ms=CERTIFICATE_MS)
        pem = folder / "evict.pem"
        pem.touch(0o600)
        pem.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + issued.chain.encode())
        context = ssl.create_default_context(cafile=self._broker.ca_file)
        context.load_cert_chain(pem)
        return context
