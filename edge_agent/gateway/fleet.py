"""Who this gateway is to the fleet's other gateways, and whom of them it answers.

It makes its own key, which never leaves it, and leaves a signing request beside it. The agent, which can reach the coordinator, has it
signed and puts the certificate where the settings say. Until it is there, nothing is passed on over ``https`` and nobody is answered.
"""

import ssl
from collections.abc import Collection

from cryptography import x509

from edge_agent.core import peers
from edge_agent.gateway.app import Api, json_response
from edge_agent.gateway.config import Peers
from edge_agent.gateway.http_message import Head, Memory, Peer, Response
from edge_agent.gateway.upstream import FORWARDED, Secured
from skerry.runtime import durable, keys, log, settings, tls
from skerry.runtime.proved_time import ProvedTime
from skerry.wire import identity
from skerry.wire.box import RouteTable
from skerry.wire.identity import NotOurs, Subject
from skerry.wire.messages import Tier

logger = log.get("gateway.fleet")


def prepare(config: Peers, node: str) -> None:
    """See to it that there is a key, and a request to sign it. Raises SettingsError."""
    try:
        if not config.key_file.exists():
            durable.write(config.key_file, keys.pem(keys.made()), mode=0o600)
        request = keys.signing_request(keys.load_own(config.key_file), node)
        durable.write(config.csr_file, request.encode(), mode=0o640)
    except (OSError, ValueError, TypeError) as exc:
        raise settings.SettingsError(f"peers.key_file: {exc}") from exc


class FleetIdentity:
    """The files of ``[peers]``, as they were last read; nobody, where there is no such table.

    ``judge`` says whose certificates are over, by the time that was ``proved``; ``revoked`` are the boxes that were thrown out.
    """

    def __init__(self, config: Peers | None, proved: ProvedTime) -> None:
        self._config = config
        self._proved = proved
        self.revoked: Collection[str] = frozenset()
        self.judge = tls.Judge(proved.now_at_least_ms, config.certificate_file if config is not None else None)
        self._mark: object = None
        self.subject: Subject | None = None
        """Who this gateway is, once it is somebody."""
        self.server: ssl.SSLContext | None = None
        self._client: ssl.SSLContext | None = None
        self.look()

    def secured(self, node: str) -> Secured | None:
        """How a box's gateway is reached over TLS, once this one is somebody."""
        if self._client is None or self.subject is None:
            return None
        return Secured(self._client, Subject(self.subject.fleet, "gateway", node).dns_name)

    def hear(self, table: RouteTable) -> None:
        """What the route table says of the fleet and of the time."""
        self.revoked = frozenset(table.revoked)
        self._proved.believe(table.time)

    def look(self) -> bool:
        """Read them again if one was replaced; says whether this gateway is somebody new. What does not fit changes nothing."""
        if self._config is None:
            return False
        mark = tls.marks([self._config.certificate_file, self._config.ca_file, self._config.key_file])
        if mark == self._mark:
            return False
        self._mark = mark
        if not self._config.certificate_file.exists():
            logger.info("fleet.waiting", certificate_file=str(self._config.certificate_file))
            return False
        try:
            subject = identity.subject_of(x509.load_pem_x509_certificate(self._config.certificate_file.read_bytes()))
            server, client = _contexts(self._config, self.judge)
        except (OSError, ssl.SSLError, ValueError) as exc:
            logger.error("fleet.not_renewed", reason=str(exc)[:300])
            return False
        self.subject, self.server, self._client = subject, server, client
        logger.info("fleet.known", name=subject.uri, site=subject.site)
        return True


def _contexts(config: Peers, judge: tls.Judge) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """For those who come, and for going to them."""
    server = tls.server(config.certificate_file, config.key_file, client_ca_file=config.ca_file)
    judge.rule(server)
    return server, tls.client(str(config.ca_file), str(config.certificate_file), str(config.key_file), judge=judge)


TOLD = ("/decision", "/decisions", "/slowest")
"""What people may ask through the coordinator: none of it does anything."""


class Door:
    """What other gateways are answered (``http.Application``): inference that they pass on, if they may, and nothing else.

    The coordinator is answered as any caller is, where an operator tries a model, and told how this box decides and decided (TOLD).
    """

    def __init__(self, api: Api, fleet: FleetIdentity, tier: Tier) -> None:
        self._api = api
        self._fleet = fleet
        self._tier = tier

    def begin(self, head: Head) -> Memory | Response | None:
        """See http.Application."""
        refusal = self._refusal_of(head)
        return self._api.begin(head) if refusal is None else refusal

    async def answer(self, head: Head, body: memoryview, memory: Memory | None) -> Response:
        """See http.Application."""
        refusal = self._refusal_of(head)
        if refusal is None:
            return await self._api.answer(head, body, memory)
        if memory is not None:
            memory.release()
        return refusal

    def refusal(self, status: int, message: str) -> Response:
        """See http.Application."""
        return self._api.refusal(status, message)

    def _refusal_of(self, head: Head) -> Response | None:
        reason = self._why_not(head)
        return json_response({"error": f"not answered here: {reason}"}, 403) if reason else None

    def _why_not(self, head: Head) -> str:
        own, caller = self._fleet.subject, _caller(head.peer)
        if own is None or caller is None:
            return "no certificate of a fleet was shown"
        if self._fleet.judge.is_over(head.peer.certificate_ends_ms):  # a connection may outlive it
            return "the certificate has ended"
        if reason := peers.why_not(caller, own=own, own_tier=self._tier, revoked=self._fleet.revoked):
            return reason
        if caller.role == "coordinator" and FORWARDED.lower() in head.headers:
            return f"the coordinator asks for itself, and {FORWARDED} says otherwise"
        is_told = caller.role == "coordinator" and head.method == "GET" and head.path.endswith(TOLD)
        if not is_told and (head.method != "POST" or not head.path.endswith("/infer")):
            return "requests for inference are answered here, and nothing else"
        if caller.role == "gateway" and head.headers.get(FORWARDED.lower()) != caller.name:
            return f"the certificate is {caller.name}'s, and {FORWARDED} says otherwise"
        return ""


def _caller(peer: Peer) -> Subject | None:
    """Whose certificate was shown on this connection; found out once."""
    if peer.subject is None and peer.certificate:
        try:
            certificate = x509.load_der_x509_certificate(peer.certificate)
            peer.certificate_ends_ms = tls.ends_ms(certificate)
            peer.subject = identity.subject_of(certificate)
        except (NotOurs, ValueError):
            peer.certificate = b""
    return peer.subject
