"""Boxes let in and thrown out: claims, certificates, and the list of revoked ones that brokers read."""

import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from sqlite_utils import Database as Tables

from coordinator.ca.authority import Authority, BadRequest, key_digest, requested_key
from coordinator.news import News
from coordinator.registry import audit, events, identity, nodes
from coordinator.registry.audit import Actor
from coordinator.registry.database import Database
from coordinator.signer.client import Signer
from skerry.runtime import durable, log
from skerry.runtime.settings import SettingsError
from skerry.wire.identity import (
    SITE,
    CertificateView,
    ClaimMade,
    ClaimRequest,
    ClaimView,
    Enrolled,
    EnrollRequest,
    Renewed,
    RenewRequest,
    RootView,
    Subject,
    claim_text,
    parse_claim,
)
from skerry.wire.messages import Presence

logger = log.get("coordinator.enrolment")

CLAIM_ID_BYTES, SECRET_BYTES = 4, 24
TRIES_PER_MINUTE = 120
"""Of enrolment and renewal together, by anybody: a fleet of 100,000 with certificates of a week renews 20 a minute, and what is refused
here comes again."""
LIST_EVERY_MS = 24 * 3600 * 1000


class TooManyTries(Exception):
    """More boxes want in than are let in within a minute."""


class Enrolment:
    """``thrown_out`` is called with the name of a box that was revoked, once the registry and the list say so."""

    def __init__(
        self,
        database: Database,
        authority: Authority,
        news: News,
        signer: Signer,
        *,
        fleet: str,
        public_url: str,
        certificate_ms: int,
        list_file: Path,
        thrown_out: Callable[[str], Awaitable[None]],
    ) -> None:
        self._database = database
        self._authority = authority
        self._news = news
        self._fleet = fleet
        self._public_url = public_url
        self._signer = signer
        self._certificate_ms = certificate_ms
        self._list_file = list_file
        self._thrown_out = thrown_out
        self._enrolled: dict[str, identity.Enrolment] = {}
        self._tokens: dict[str, str] = {}
        self._tries: list[float] = []
        self._listed_at_ms = 0

    async def begin(self) -> None:
        """Read who is in, and write the list of revoked certificates. Raises SettingsError where that can't be written."""
        for held in (await self._database.read(identity.read_enrolled)).values():
            self._note(held)
        try:
            await self.write_list()
        except OSError as exc:
            raise SettingsError(f"revoked_list_file: {self._list_file}: {exc.strerror}") from exc

    def is_thrown_out(self, node: str) -> bool:
        """Whether what this box says is to be passed over."""
        held = self._enrolled.get(node)
        return held is not None and held.revoked_at_ms > 0

    def is_enrolled(self, node: str) -> bool:
        """Whether it joined, and was not thrown out since."""
        held = self._enrolled.get(node)
        return held is not None and not held.revoked_at_ms

    def is_token(self, token: str) -> bool:
        """Whether a box that is in was given this token."""
        return self.is_enrolled(self._tokens.get(identity.digest_of(token), ""))

    def _note(self, held: identity.Enrolment) -> None:
        before = self._enrolled.get(held.node)
        if before is not None:
            self._tokens.pop(before.token_sha256, None)
        self._enrolled[held.node] = held
        self._tokens[held.token_sha256] = held.node

    def root(self) -> RootView:
        """What everybody trusts."""
        return RootView(self._authority.root_pem, self._authority.fingerprint)

    # -- by operators

    async def make_claim(self, request: ClaimRequest, actor: Actor) -> ClaimMade:
        """A new one."""
        claim_id, secret, now_ms = secrets.token_hex(CLAIM_ID_BYTES), secrets.token_urlsafe(SECRET_BYTES), _now_ms()
        view = ClaimView(claim_id, request.labels, request.node or "", request.tier, now_ms, now_ms + request.expires_s * 1000)

        def work(tables: Tables) -> None:
            identity.save_claim(tables, view, identity.digest_of(secret))
            bound = [f"tier {view.tier}", *([f"name {view.node}"] if view.node else []), _labels(view.labels), f"{request.expires_s} s"]
            audit.append(tables, actor, "claim.made", claim_id, after=", ".join(bound), now_ms=now_ms)

        await self._database.write(work)
        return ClaimMade(claim_id, claim_text(claim_id, secret), view.expires_at_ms, self._public_url, self._authority.fingerprint)

    async def claims(self) -> list[ClaimView]:
        """Every claim, without what it takes to redeem it."""
        return await self._database.read(identity.read_claims)

    async def withdraw(self, claim_id: str, actor: Actor) -> bool:
        """Take a claim back that nobody redeemed."""

        def work(tables: Tables) -> bool:
            was_there = identity.withdraw_claim(tables, claim_id)
            if was_there:
                audit.append(tables, actor, "claim.withdrawn", claim_id, now_ms=_now_ms())
            return was_there

        return await self._database.write(work)

    async def certificates(self, node: str) -> list[CertificateView]:
        """Those of a box that have not ended."""
        return await self._database.read(lambda tables: identity.read_certificates(tables, node))

    async def revoke(self, node: str, reason: str, actor: Actor) -> bool:
        """Throw a box out; says whether it was in."""
        now_ms = _now_ms()

        def work(tables: Tables) -> identity.Enrolment | None:
            if identity.revoke(tables, node, reason=reason, now_ms=now_ms):
                box = nodes.read_node(tables, node)
                if box is not None:
                    nodes.save_presence(tables, node, Presence(False, "", box.session_epoch), now_ms)
                events.add_own_event(tables, node, "node.revoked", node, reason or "no reason was given", now_ms)
                audit.append(tables, actor, "node.revoked", node, after=reason, now_ms=now_ms)
            return identity.read_one(tables, node)

        held = await self._database.write(work)
        if held is None:
            return False
        self._note(held)
        await self.write_list()
        logger.warning("node.revoked", node=node, reason=reason)
        self._news.tell("nodes", "events")
        await self._thrown_out(node)
        return True

    # -- by boxes

    async def enroll(self, request: EnrollRequest, *, address: str) -> Enrolled:
        """Let a box in. Raises BadRequest, TooManyTries, and registry.identity.Refused."""
        self._count_try()
        claim = parse_claim(request.claim)
        if claim is None:
            raise BadRequest("claim: not of the form skn_<number>_<secret>")
        key, token, now_ms = requested_key(request.csr), secrets.token_urlsafe(32), _now_ms()

        def work(tables: Tables) -> tuple[identity.Enrolment, str]:
            held = identity.redeem(
                tables, *claim, node=request.node, tier=request.tier, key_sha256=key_digest(key),
                token_sha256=identity.digest_of(token), now_ms=now_ms,
            )  # fmt: skip
            labels = _labels(held.labels)
            events.add_own_event(tables, request.node, "node.enrolled", request.node, f"by claim {claim[0]}; {labels}", now_ms)
            actor = Actor(f"box {request.node}", f"claim {claim[0]}", address)
            after = f"tier {held.tier}, {labels}, key {held.key_sha256}"
            audit.append(tables, actor, "node.enrolled", request.node, after=after, now_ms=now_ms)
            return held, self._issue(tables, held, key, now_ms)

        key_line = (await self._signer.keys()).public_key  # before anything is changed: without them nobody can join
        before = self._enrolled.get(request.node)
        held, chain = await self._database.write(work)
        self._note(held)
        if before is not None and before.key_sha256 != held.key_sha256:
            await self.write_list()  # the old key's certificates are on it now
        logger.info("node.enrolled", node=request.node, claim=claim[0])
        self._news.tell("nodes", "events")
        return Enrolled(
            self._fleet, request.node, chain, self._authority.root_pem, token, [key_line], held.labels, since_ms=held.enrolled_at_ms
        )

    async def renew(self, request: RenewRequest) -> Renewed:
        """A new certificate for the key of one that this fleet issued, ended or not. Raises as ``enroll`` does."""
        self._count_try()
        subject, certificate = self._authority.judge(request.certificate)
        key, now_ms = requested_key(request.csr), _now_ms()
        gateway_key = requested_key(request.gateway_csr) if request.gateway_csr else None
        if key_digest(key) != key_digest(certificate.public_key()):
            raise BadRequest("csr: signed with another key than the certificate's")

        def work(tables: Tables) -> Renewed:
            held = identity.read_one(tables, subject.name)
            if subject.role != "box" or held is None or held.revoked_at_ms or held.key_sha256 != key_digest(key):
                raise identity.Refused("certificate: its box was revoked, or enrolled anew with another key")
            gateways = self._issue(tables, held, gateway_key, now_ms, role="gateway") if gateway_key is not None else ""
            return Renewed(self._issue(tables, held, key, now_ms), self._authority.root_pem, gateways)

        return await self._database.write(work)

    def _issue(
        self, tables: Tables, held: identity.Enrolment, key: EllipticCurvePublicKey, now_ms: int, *, role: Literal["box", "gateway"] = "box"
    ) -> str:
        subject = Subject(self._fleet, role, held.node, held.labels.get(SITE, ""))
        issued = self._authority.issue(key, subject, now_ms=now_ms, life_ms=self._certificate_ms)
        view = CertificateView(issued.serial, held.node, role, issued.not_before_ms, issued.not_after_ms)
        identity.save_certificate(tables, view, key_sha256=key_digest(key))
        return issued.chain

    def _count_try(self) -> None:
        now = time.monotonic()
        self._tries = [at for at in self._tries if at > now - 60]
        if len(self._tries) >= TRIES_PER_MINUTE:
            raise TooManyTries(f"{TRIES_PER_MINUTE} boxes asked within a minute; try again in a minute")
        self._tries.append(now)

    # -- the list

    async def write_list(self) -> None:
        """Write the list of revoked certificates where a broker, or what copies it there, reads it."""
        revoked, now_ms = await self._database.read(identity.read_revoked), _now_ms()
        durable.write(self._list_file, self._authority.revoked_list(revoked, now_ms=now_ms), mode=0o644)
        self._listed_at_ms = now_ms

    async def refresh_list(self) -> None:
        """The same, when a day has passed: a list that ended would shut everybody out."""
        if _now_ms() - self._listed_at_ms > LIST_EVERY_MS:
            await self.write_list()


def _labels(labels: dict[str, str]) -> str:
    return f"labels {', '.join(f'{name}={value}' for name, value in labels.items()) or 'none'}"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
