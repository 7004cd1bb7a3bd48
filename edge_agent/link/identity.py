"""This box's certificate: kept fresh as long as the coordinator can be reached, and used for as long as it cannot."""

import asyncio
import hashlib
import os
import random
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import aiohttp
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from edge_agent.core import renewal
from edge_agent.core.renewal import Life
from edge_agent.link.addresses import AddressBook
from edge_agent.link.config import Config
from skerry.runtime import backoff, durable, keys, lifecycle, log, streams, tls
from skerry.runtime.proved_time import ProvedTime
from skerry.wire import codec
from skerry.wire.api import ProblemBody
from skerry.wire.identity import Renewed, RenewRequest

T = TypeVar("T")

logger = log.get("agent.identity")

TIMEOUT_S = 30.0
RETRY_FIRST_S, RETRY_MOST_S = 5.0, 3600.0
AGAIN_S = 60.0
"""Between two requests for the sake of a gateway's new key."""
LOOK_S = 10.0
"""A gateway that was put in after the agent started asks for its first certificate."""
MOST_ANSWER_BYTES = 128 * 1024


class IdentityFailed(Exception):
    """No certificate was got, or none can be read; the text says why."""


class Identity:
    """Renews the certificate of ``broker.cert_file`` with ``broker.key_file``; whoever connects next reads the new one.

    ``say`` takes an event's kind, subject and text. The certificate's first moment proves that it has passed.
    """

    def __init__(
        self, config: Config, *, say: Callable[[str, str, str], None], proved: ProvedTime, judge: tls.Judge, book: AddressBook
    ) -> None:
        self._config = config
        self._say = say
        self._proved = proved
        self._judge = judge
        self._book = book
        self._started_at = time.monotonic()
        self._renewed_at: float | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop`` is set; without a certificate, or where its file is somebody else's to renew, there is nothing to do."""
        broker = self._config.broker
        if not broker.cert_file or not os.access(Path(broker.cert_file).parent, os.W_OK):
            if broker.cert_file:
                logger.warning(
                    "certificate.not_ours", cert_file=broker.cert_file, hint="its folder can't be written: somebody else renews it"
                )
            await stop.wait()
            return
        attempt = 0
        while not stop.is_set():
            try:
                wait_s = self._due_in_s()
                if wait_s == 0:
                    await self._renew()
                    attempt = 0
                    continue
            except (IdentityFailed, aiohttp.ClientError, OSError, TimeoutError) as exc:
                if not isinstance(exc, IdentityFailed):
                    self._book.coordinator_failed()
                wait_s = backoff.delay_s(attempt, random.random(), first_s=RETRY_FIRST_S, most_s=RETRY_MOST_S)
                reason = str(exc) or type(exc).__name__
                logger.warning("certificate.not_renewed", reason=reason, again_in_s=round(wait_s, 1))
                if attempt == 0:
                    self._say("certificate.not_renewed", self._config.node, reason[:500])
                attempt += 1
            await lifecycle.sleep_until(stop, min(wait_s, LOOK_S))

    def _due_in_s(self) -> float:
        now = time.monotonic()
        is_new = _is_unsigned(self._config.gateway_csr_file, self._config.gateway_certificate_file)
        if is_new and (self._renewed_at is None or now - self._renewed_at > AGAIN_S):
            return 0.0
        life = life_of(Path(self._config.broker.cert_file))
        self._proved.prove(life.not_before_ms)
        return renewal.due_in_s(
            life,
            wall_ms=max(time.time_ns() // 1_000_000, self._proved.now_at_least_ms()),
            started_s_ago=now - self._started_at,
            renewed_s_ago=None if self._renewed_at is None else now - self._renewed_at,
        )

    async def _renew(self) -> None:
        broker, coordinator = self._config.broker, self._config.coordinator
        key = load_key(Path(broker.key_file))
        own = keys.signing_request(key, self._config.node)
        request = RenewRequest(Path(broker.cert_file).read_text(), own, _text(self._config.gateway_csr_file))
        context: ssl.SSLContext | bool = True
        url = self._book.coordinator_url()
        if url.startswith("https:"):
            try:
                context = tls.client(coordinator.ca_file, judge=self._judge)
            except ValueError as exc:
                raise IdentityFailed(f"coordinator.ca_file: {exc}") from exc
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(
                f"{url}/v1/renew", data=codec.encode(request), ssl=context, proxy=coordinator.proxy or None,
                headers={"Content-Type": "application/json"},
            ) as response,
        ):  # fmt: skip
            body = await streams.beginning(response.content, MOST_ANSWER_BYTES)
            if response.status != 200:
                raise IdentityFailed(f"the coordinator says: {problem_of(response.status, body)}")
        renewed = answer_of(body, Renewed)
        check(renewed.certificate, key, self._config.node)
        durable.write(Path(broker.cert_file), renewed.certificate.encode(), mode=0o644)
        if renewed.gateway_certificate and self._config.gateway_certificate_file is not None:
            durable.write(self._config.gateway_certificate_file, renewed.gateway_certificate.encode(), mode=0o644)
        self._renewed_at = time.monotonic()
        life = life_of(Path(broker.cert_file))
        days = (life.not_after_ms - life.not_before_ms) / 86_400_000
        logger.info("certificate.renewed", days=round(days, 2))
        self._say("certificate.renewed", self._config.node, f"for {days:.3g} days")


def _text(path: Path | None) -> str:
    return path.read_text() if path is not None and path.exists() else ""


def _is_unsigned(csr_file: Path | None, certificate_file: Path | None) -> bool:
    """Whether the gateway has a key that no certificate is there for. What can't be read is not waited for."""
    if csr_file is None or certificate_file is None or not csr_file.exists():
        return False
    try:
        wanted = x509.load_pem_x509_csr(csr_file.read_bytes()).public_key()
        held = x509.load_pem_x509_certificate(certificate_file.read_bytes()).public_key() if certificate_file.exists() else None
    except (OSError, ValueError) as exc:
        logger.warning("gateway.csr_unreadable", reason=str(exc)[:300])
        return False
    return held != wanted


def life_of(path: Path) -> Life:
    """When a certificate begins and ends. Raises IdentityFailed."""
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as exc:
        raise IdentityFailed(f"{path}: {exc}") from exc
    moments = (certificate.not_valid_before_utc, certificate.not_valid_after_utc)
    begins, ends = (int(moment.timestamp() * 1000) for moment in moments)
    jitter = int.from_bytes(hashlib.sha256(certificate.signature).digest()[:8], "big") / 2**64
    return Life(begins, ends, jitter)


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Raises IdentityFailed."""
    try:
        return keys.load(path)
    except (OSError, ValueError, TypeError) as exc:
        raise IdentityFailed(f"{path}: {exc}") from exc


def check(chain: str, key: ec.EllipticCurvePrivateKey, node: str) -> None:
    """Whether a certificate that came is one for this box's key and name. Raises IdentityFailed."""
    try:
        certificate = x509.load_pem_x509_certificate(chain.encode())
    except ValueError as exc:
        raise IdentityFailed(f"certificate: {exc}") from exc
    names = [attribute.value for attribute in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
    if certificate.public_key() != key.public_key() or names != [node]:
        raise IdentityFailed(f"certificate: it is for {str(names)[:80]} and another key, or not for {node!r}")


def problem_of(status: int, body: bytes) -> str:
    """What an answer that is none says is wrong."""
    try:
        return codec.decode(body, ProblemBody).error.message[:500]
    except codec.Malformed:
        return f"HTTP status {status}"


def answer_of(body: bytes, kind: type[T]) -> T:
    """Raises IdentityFailed."""
    try:
        return codec.decode(body, kind)
    except codec.Malformed as exc:
        raise IdentityFailed(f"the coordinator answers what this version does not understand: {exc}") from exc
