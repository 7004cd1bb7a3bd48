"""What boxes are told and asked: whole signed documents, retained; the word that their events are safe; commands."""

from coordinator.registry import nodes
from coordinator.registry.database import Database
from coordinator.session import FleetSession
from coordinator.signer.client import NotSigned, Signer, SignerAbsent
from skerry.runtime import log
from skerry.wire import codec, topics
from skerry.wire.messages import Ack, Desired, LogsRequest

logger = log.get("coordinator.publish")

ACK_EXPIRY_S = 60
COMMAND_EXPIRY_S = 30
"""Somebody waits for the answer: a box that comes back later need not hear of it."""


class Publisher:
    """Signs and sends; what can't be sent now is sent by ``publish_all`` after the next connect."""

    def __init__(self, session: FleetSession, signer: Signer, database: Database) -> None:
        self._session = session
        self._signer = signer
        self._database = database
        self.unsigned: set[str] = set()
        """Boxes that could not be told what was planned last, because nobody signed it."""

    async def publish(self, desired: Desired) -> None:
        """Tell one box what to do. Raises NotConnected."""
        try:
            envelope = await self._signer.sign(desired)
        except (SignerAbsent, NotSigned) as exc:
            if desired.node not in self.unsigned:
                logger.error("desired.not_signed", node=desired.node, generation=desired.generation, reason=str(exc))
            self.unsigned.add(desired.node)
            return
        self.unsigned.discard(desired.node)
        if len(envelope) > codec.MAX_MESSAGE_BYTES:
            logger.error("desired.too_large", node=desired.node, bytes=len(envelope))
            return
        await self._session.publish(topics.desired(desired.fleet, desired.node), envelope, retain=True)

    async def publish_unsigned(self) -> None:
        """Try again what nobody signed. Raises NotConnected."""
        if self.unsigned and await self._is_signer_there():
            documents = await self._database.read(nodes.read_desired)
            for node in sorted(self.unsigned & documents.keys()):
                await self.publish(documents[node])

    async def publish_all(self) -> None:
        """Tell every box again: a broker that lost its retained messages has them back, and each box answers with what it is."""
        documents = await self._database.read(nodes.read_desired)
        if not await self._is_signer_there():
            self.unsigned |= documents.keys()
            return
        for desired in documents.values():
            await self.publish(desired)

    async def _is_signer_there(self) -> bool:
        """Asked once, and not waited for once for each box."""
        try:
            await self._signer.keys()
        except SignerAbsent as exc:
            logger.error("signer.absent", reason=str(exc))
            return False
        return True

    async def ack(self, fleet: str, node: str, ack: Ack) -> None:
        """Tell a box that its events are in the registry. Raises NotConnected."""
        await self._session.publish(topics.command(fleet, node, "ack"), codec.encode(ack), retain=False, expiry_s=ACK_EXPIRY_S)

    async def ask_logs(self, fleet: str, node: str, correlation: bytes, request: LogsRequest) -> None:
        """Ask a box what a replica's sandbox wrote. Raises NotConnected."""
        await self._session.publish(
            topics.command(fleet, node, "logs"),
            codec.encode(request),
            retain=False,
            expiry_s=COMMAND_EXPIRY_S,
            response_topic=topics.up(fleet, node, "reply"),
            correlation=correlation,
        )
