"""Who is who in a fleet: what stands in a certificate (RFC 5280), and the messages by which a box comes to one.

A certificate names its holder three times: the common name, which a broker takes as the user's name; a URI
``skerry://<fleet>/<role>/<name>``, which tells a box from a coordinator that bears the same name; and a DNS name that no DNS knows,
so that one gateway can check with the usual means that it speaks to the other it meant, wherever that is.
"""

import re
import urllib.parse
from typing import Annotated, Literal, get_args

import msgspec
from cryptography import x509
from cryptography.x509.oid import NameOID

from skerry.wire.messages import Tier
from skerry.wire.topics import NAME, Name

Role = Literal["box", "gateway", "coordinator", "broker"]
SITE = "site"
CLAIM_PREFIX = "skn"
MOST_PEM_BYTES = 16 * 1024
MOST_CLAIM_S = 30 * 24 * 3600

Pem = Annotated[str, msgspec.Meta(max_length=MOST_PEM_BYTES)]
Labels = Annotated[
    dict[Annotated[str, msgspec.Meta(max_length=63)], Annotated[str, msgspec.Meta(max_length=255)]], msgspec.Meta(max_length=64)
]

_URI = re.compile(rf"skerry://({NAME})/({'|'.join(get_args(Role))})/({NAME})")


class NotOurs(ValueError):
    """A certificate that names nobody of a fleet; the text says what it lacks."""


class Subject(msgspec.Struct, frozen=True):
    """Whose a certificate is. ``site`` is the box's label of that name, as it was when the certificate was issued."""

    fleet: Name
    role: Role
    name: Name
    site: str = ""

    @property
    def uri(self) -> str:
        """The name that says all."""
        return f"skerry://{self.fleet}/{self.role}/{self.name}"

    @property
    def uris(self) -> list[str]:
        """All that stand in its certificate: the site has one of its own."""
        return [self.uri, f"skerry://{self.fleet}/{SITE}/{urllib.parse.quote(self.site, safe='')}"] if self.site else [self.uri]

    @property
    def common_name(self) -> str:
        """The name that a broker goes by: a box's own, and for whatever is none one that begins with an underscore, as no box's does."""
        return self.name if self.role == "box" else f"_{self.role}"

    @property
    def dns_name(self) -> str:
        """The name that TLS clients check; upper and lower case are one here, as in any DNS name."""
        return f"{self.name}.{self.role}.{self.fleet}.skerry".lower()


def subject_of(certificate: x509.Certificate) -> Subject:
    """Whose it is, by its URIs; that it was signed by a fleet's authority is checked elsewhere. Raises NotOurs."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError) as exc:
        raise NotOurs(f"subjectAltName: {exc}") from exc
    found = [match for match in map(_URI.fullmatch, uris) if match is not None]
    if len(found) != 1:
        raise NotOurs(f"subjectAltName: {len(found)} URIs of a fleet where one should be")
    fleet, role, name = found[0].groups()
    common = [attribute.value for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    start = f"skerry://{fleet}/{SITE}/"
    sites = [urllib.parse.unquote(uri.removeprefix(start)) for uri in uris if uri.startswith(start)]
    if len(sites) > 1:
        raise NotOurs(f"subjectAltName: {len(sites)} sites where at most one should be")
    subject = Subject(fleet, msgspec.convert(role, Role), name, sites[0] if sites else "")
    if common != [subject.common_name]:
        raise NotOurs(f"subject: the common name {str(common)[:80]} is not the {subject.common_name!r} that the URI asks for")
    return subject


class ClaimRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A claim to make: the labels and the tier that whoever redeems it gets and can't change, and, where it is given, the name."""

    labels: Labels = {}
    node: Name | None = None
    tier: Tier = "edge"
    expires_s: Annotated[int, msgspec.Meta(ge=60, le=MOST_CLAIM_S)] = 24 * 3600


class ClaimMade(msgspec.Struct, frozen=True):
    """A claim, told once: it is kept hashed. ``fingerprint`` is the SHA-256 of the root certificate, as hex digits."""

    id: str
    claim: str
    expires_at_ms: int
    coordinator: str
    fingerprint: str


class ClaimView(msgspec.Struct, frozen=True):
    """A claim as it stands; ``used_by`` is the box that it was redeemed for. Claims of earlier versions have no ``tier``."""

    id: str
    labels: dict[str, str]
    node: str
    tier: str
    created_at_ms: int
    expires_at_ms: int
    used_at_ms: int = 0
    used_by: str = ""


class EnrollRequest(msgspec.Struct, frozen=True):
    """A box that wants in. Of the signing request (PKCS #10, PEM) only the public key is taken."""

    claim: Annotated[str, msgspec.Meta(max_length=200)]
    node: Name
    csr: Pem
    tier: Tier = "edge"


class Enrolled(msgspec.Struct, frozen=True):
    """What a box needs from now on. ``certificate`` is its own and the one that it was issued with, ``root`` what to trust, all PEM.

    ``desired_keys`` are the lines of the warden's file of trusted keys, ``since_ms`` the moment before which nothing was signed for it;
    ``token`` fetches models.
    """

    fleet: str
    node: str
    certificate: str
    root: str
    token: str
    desired_keys: list[str]
    labels: dict[str, str] = {}
    since_ms: int = 0

    @property
    def trusted_lines(self) -> str:
        """The warden's file of trusted keys."""
        return "".join(f"{line}\n" for line in [*self.desired_keys, *([f"since={self.since_ms}"] if self.since_ms else [])])


class RenewRequest(msgspec.Struct, frozen=True):
    """A box that wants a new certificate for the key it has. The request is signed with that key, so that nobody else can ask; a copy
    of it gets whoever sends it a certificate for a key that is not theirs. The old one may have expired.

    ``gateway_csr`` is the request of the box's gateway, which has a key of its own; empty where it has none.
    """

    certificate: Pem
    csr: Pem
    gateway_csr: Pem = ""


class Renewed(msgspec.Struct, frozen=True):
    """The new certificate, and the one that it was issued with; ``root`` as the coordinator has it now."""

    certificate: str
    root: str
    gateway_certificate: str = ""


class RevokeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a box is thrown out."""

    reason: Annotated[str, msgspec.Meta(max_length=500)] = ""


class RootView(msgspec.Struct, frozen=True):
    """The root certificate (PEM) and its SHA-256; whoever asks over a line that they do not trust compares it with what they were told."""

    root: str
    fingerprint: str


class CertificateView(msgspec.Struct, frozen=True):
    """A certificate that was issued; ``revoked_at_ms`` 0 for one that was not revoked."""

    serial: str
    node: str
    role: Role
    not_before_ms: int
    not_after_ms: int
    revoked_at_ms: int = 0
    reason: str = ""


def claim_text(claim_id: str, secret: str) -> str:
    """A claim as it is handed over."""
    return f"{CLAIM_PREFIX}_{claim_id}_{secret}"


def parse_claim(text: str) -> tuple[str, str] | None:
    """Its number and its secret; None where it is none."""
    prefix, _, rest = text.strip().partition("_")
    claim_id, _, secret = rest.partition("_")
    return (claim_id, secret) if prefix == CLAIM_PREFIX and claim_id and secret else None
