"""Who may join and who did: claims, enrolled boxes, the certificates that were issued. Secrets are kept as their SHA-256 alone."""

import hashlib
import hmac
import json
from collections.abc import Collection
from typing import Any

import msgspec
from sqlite_utils import Database as Tables

from skerry.wire.identity import SITE, CertificateView, ClaimView
from skerry.wire.messages import Tier

USED_CLAIMS_KEPT_MS = 30 * 24 * 3600 * 1000


class Refused(Exception):
    """A box that may not join, or not stay; the text says why, and no more than the one who asks may know."""


class Enrolment(msgspec.Struct, frozen=True):
    """A box that joined: tier and labels, which it can't change, the key that it joined with, when it was thrown out (0: it was not)."""

    node: str
    tier: Tier
    labels: dict[str, str]
    key_sha256: str
    token_sha256: str
    revoked_at_ms: int
    enrolled_at_ms: int = 0


def digest_of(secret: str) -> str:
    """What is kept of a secret. It is long and random: no salt and no slow hash are needed."""
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()


# -- claims


def save_claim(tables: Tables, claim: ClaimView, secret_sha256: str) -> None:
    """Keep a claim; those that ended long ago are forgotten."""
    tables.execute("DELETE FROM claims WHERE expires_at_ms < ?", [claim.created_at_ms - USED_CLAIMS_KEPT_MS])
    tables.execute(
        "INSERT INTO claims (id, secret_sha256, labels, node, tier, created_at_ms, expires_at_ms) VALUES (?, ?, ?, ?, ?, ?, ?)",
        [claim.id, secret_sha256, json.dumps(claim.labels), claim.node, claim.tier, claim.created_at_ms, claim.expires_at_ms],
    )


def _claim(row: dict[str, Any]) -> ClaimView:
    return ClaimView(
        id=row["id"],
        labels=json.loads(row["labels"]),
        node=row["node"],
        tier=row["tier"],
        created_at_ms=row["created_at_ms"],
        expires_at_ms=row["expires_at_ms"],
        used_at_ms=row["used_at_ms"] or 0,
        used_by=row["used_by"] or "",
    )


def read_claims(tables: Tables) -> list[ClaimView]:
    """Every claim, the newest first."""
    return [_claim(row) for row in tables.query("SELECT * FROM claims ORDER BY created_at_ms DESC, id")]


def withdraw_claim(tables: Tables, claim_id: str) -> bool:
    """Forget a claim that nobody redeemed; says whether there was one."""
    return tables.execute("DELETE FROM claims WHERE id = ? AND used_at_ms IS NULL", [claim_id]).rowcount > 0


def redeem(
    tables: Tables, claim_id: str, secret: str, *, node: str, tier: Tier, key_sha256: str, token_sha256: str, now_ms: int
) -> Enrolment:
    """Let a box in, once for each claim. Raises Refused.

    The same box, by its key, may redeem it again while it lasts: the answer may have been lost. A name that another key joined under
    is given anew only by a claim that names it.
    """
    rows = list(tables.query("SELECT * FROM claims WHERE id = ?", [claim_id]))
    known = rows[0]["secret_sha256"] if rows else digest_of("")
    if not hmac.compare_digest(known, digest_of(secret)) or not rows or rows[0]["expires_at_ms"] <= now_ms:
        raise Refused("claim: unknown, or it has expired")
    row = rows[0]
    claim = _claim(row)
    if row["used_at_ms"] is not None and (row["used_by"], row["key_sha256"]) != (node, key_sha256):
        raise Refused("claim: it was redeemed before, with another key or under another name; each is good for one box")
    if claim.node and claim.node != node:
        raise Refused(f"node: this claim is for {claim.node!r} alone")
    if claim.tier and claim.tier != tier:
        raise Refused(f"tier: this claim is for {claim.tier!r} alone")
    same = list(tables.query("SELECT * FROM enrolled WHERE lower(node) = lower(?)", [node]))
    for held in same:
        if held["node"] != node:
            raise Refused(f"node: {held['node']!r} is enrolled, and names differ in more than upper and lower case")
        if held["key_sha256"] != key_sha256 and not claim.node:
            raise Refused(
                f"node: {node!r} is enrolled with another key; a claim that names it ('skerry node token --name {node}') replaces it"
            )
    tables.execute(
        "INSERT OR REPLACE INTO enrolled (node, tier, labels, key_sha256, token_sha256, enrolled_at_ms, revoked_at_ms)"
        " VALUES (?, ?, ?, ?, ?, ?, NULL)",
        [node, tier, row["labels"], key_sha256, token_sha256, now_ms],
    )
    tables.execute("UPDATE claims SET used_at_ms = ?, used_by = ?, key_sha256 = ? WHERE id = ?", [now_ms, node, key_sha256, claim_id])
    if any(held["key_sha256"] != key_sha256 for held in same):
        tables.execute(
            "UPDATE certificates SET revoked_at_ms = ?, reason = 'replaced'"
            " WHERE node = ? AND role IN ('box', 'gateway') AND revoked_at_ms IS NULL",
            [now_ms, node],
        )
    return Enrolment(node, tier, claim.labels, key_sha256, token_sha256, 0, now_ms)


# -- boxes


def read_enrolled(tables: Tables) -> dict[str, Enrolment]:
    """Every box that ever joined, by name."""
    return {row["node"]: _enrolment(row) for row in tables.query("SELECT * FROM enrolled")}


def read_some(tables: Tables, names: Collection[str]) -> dict[str, Enrolment]:
    """Those of these boxes that ever joined."""
    return {name: found for name in names if (found := read_one(tables, name)) is not None}


def read_one(tables: Tables, node: str) -> Enrolment | None:
    """A box that joined."""
    return next((_enrolment(row) for row in tables.query("SELECT * FROM enrolled WHERE node = ?", [node])), None)


def _enrolment(row: dict[str, Any]) -> Enrolment:
    return Enrolment(
        row["node"], row["tier"], json.loads(row["labels"]), row["key_sha256"], row["token_sha256"], row["revoked_at_ms"] or 0,
        row["enrolled_at_ms"],
    )  # fmt: skip


def revoke(tables: Tables, node: str, *, reason: str, now_ms: int) -> bool:
    """Throw a box out with all its certificates; says whether it was in."""
    changed = tables.execute("UPDATE enrolled SET revoked_at_ms = ? WHERE node = ? AND revoked_at_ms IS NULL", [now_ms, node]).rowcount
    tables.execute(
        "UPDATE certificates SET revoked_at_ms = ?, reason = ? WHERE node = ? AND role IN ('box', 'gateway') AND revoked_at_ms IS NULL",
        [now_ms, reason or "revoked", node],
    )
    return changed > 0


# -- certificates


def save_certificate(tables: Tables, view: CertificateView, *, key_sha256: str) -> None:
    """Note a certificate, before it is handed out. Those that ended are forgotten, and need no place in a list of revoked ones."""
    tables.execute("DELETE FROM certificates WHERE not_after_ms < ?", [view.not_before_ms])
    tables.execute(
        "INSERT INTO certificates (serial, node, role, key_sha256, not_before_ms, not_after_ms, reason) VALUES (?, ?, ?, ?, ?, ?, '')",
        [view.serial, view.node, view.role, key_sha256, view.not_before_ms, view.not_after_ms],
    )


def read_certificates(tables: Tables, node: str) -> list[CertificateView]:
    """A box's certificates that have not ended, the newest first."""
    return [
        CertificateView(
            row["serial"], row["node"], row["role"], row["not_before_ms"], row["not_after_ms"], row["revoked_at_ms"] or 0, row["reason"]
        )
        for row in tables.query("SELECT * FROM certificates WHERE node = ? ORDER BY not_before_ms DESC", [node])
    ]


def read_revoked(tables: Tables) -> list[tuple[str, int]]:
    """Number and moment of every revoked certificate that has not ended."""
    rows = tables.query("SELECT serial, revoked_at_ms FROM certificates WHERE revoked_at_ms IS NOT NULL ORDER BY revoked_at_ms")
    return [(row["serial"], row["revoked_at_ms"]) for row in rows]


def read_thrown_out(tables: Tables) -> dict[str, str]:
    """Boxes that were thrown out and whose gateway's certificate has not ended, with the site that they were bound to."""
    rows = tables.query(
        "SELECT DISTINCT enrolled.node, enrolled.labels FROM enrolled JOIN certificates ON certificates.node = enrolled.node"
        " WHERE enrolled.revoked_at_ms IS NOT NULL AND certificates.role = 'gateway' AND certificates.revoked_at_ms IS NOT NULL"
    )
    return {row["node"]: json.loads(row["labels"]).get(SITE, "") for row in rows}
