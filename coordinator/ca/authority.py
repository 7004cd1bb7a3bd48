"""The fleet's certificate authority: a root that can be taken away, a key that issues, short certificates, a list of revoked ones.

``ca/root.crt`` is what everybody trusts. ``ca/root.key`` signs the issuing certificate alone, every few years: move it to a safe once
the coordinator has started, and back when its start says that the issuing certificate is about to end. Keys are P-256, which every TLS
library takes (gRPC's takes no Ed25519 in certificates). Times are Unix milliseconds, given by the caller.
"""

import datetime
import hashlib
import ipaddress
from collections.abc import Iterable
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from skerry.runtime import durable, keys
from skerry.wire import identity
from skerry.wire.identity import Subject

DAY_MS = 24 * 3600 * 1000
ROOT_DAYS = 20 * 365
ISSUING_DAYS = 5 * 365
RENEW_ISSUING_DAYS = 400
"""The issuing certificate is made anew when less than this is left, if the root's key is there."""
BACKDATED_MS = 3600 * 1000
"""Certificates begin a while ago: no two clocks agree."""
CRL_DAYS = 30
"""A broker refuses everybody once its list has ended: it is written anew every day, and lasts a holiday."""
USAGE = {"digital_signature": True, "key_cert_sign": False, "crl_sign": False}
USAGE_CA = {"digital_signature": False, "key_cert_sign": True, "crl_sign": True}
OTHER_USAGE = dict.fromkeys(
    ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only"), False
)


class AuthorityUnusable(Exception):
    """The authority's files can't be used; the text says why."""


class BadRequest(Exception):
    """What was sent is no signing request, or no certificate of this fleet; the text names the field."""


class Issued(msgspec.Struct, frozen=True):
    """A certificate: its number as hex digits, its PEM followed by the issuing certificate's, the first and last moment it holds."""

    serial: str
    chain: str
    not_before_ms: int
    not_after_ms: int


class Authority:
    """Makes its files in ``folder`` on the first start. Raises AuthorityUnusable."""

    def __init__(self, folder: Path, fleet: str, *, now_ms: int) -> None:
        self._fleet = fleet
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            if not (folder / "root.crt").exists():
                self._make_root(now_ms)
            self._root = x509.load_pem_x509_certificate((folder / "root.crt").read_bytes())
            if not (folder / "issuing.crt").exists() or (self._left_ms(now_ms) < RENEW_ISSUING_DAYS * DAY_MS and self._has_root_key()):
                self._make_issuing(now_ms)
            self._issuing, self._key = self._load()
        except (OSError, ValueError, InvalidSignature) as exc:
            raise AuthorityUnusable(f"{folder}: {exc or type(exc).__name__}") from exc
        durable.write(folder / "trusted.crt", self.trusted_pem.encode(), mode=0o644)
        self.issuing_ends_in_ms = self._left_ms(now_ms)
        """Negative once it has ended. Boxes that renew then get a certificate that nobody takes."""

    @property
    def root_pem(self) -> str:
        """What everybody trusts."""
        return self._root.public_bytes(Encoding.PEM).decode()

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the root certificate (DER), as hex digits."""
        return hashlib.sha256(self._root.public_bytes(Encoding.DER)).hexdigest()

    # -- certificates

    def issue(
        self, public_key: ec.EllipticCurvePublicKey, subject: Subject, *, now_ms: int, life_ms: int, hosts: Iterable[str] = ()
    ) -> Issued:
        """A certificate for both ends of TLS. ``hosts`` are further names or addresses by which the holder is reached."""
        not_before_ms = now_ms - BACKDATED_MS
        not_after_ms = min(now_ms + life_ms, _ms(self._issuing.not_valid_after_utc))
        certificate = (
            _builder(_name(subject.fleet, subject.common_name), self._issuing.subject, public_key, not_before_ms, not_after_ms)
            .add_extension(x509.SubjectAlternativeName(_names(subject, hosts)), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**USAGE, **OTHER_USAGE), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        chain = certificate.public_bytes(Encoding.PEM) + self._issuing.public_bytes(Encoding.PEM)
        return Issued(f"{certificate.serial_number:x}", chain.decode(), not_before_ms, not_after_ms)

    def own(self, subject: Subject, *, now_ms: int, life_ms: int, hosts: Iterable[str] = ()) -> None:
        """See to it that ``<name>.key`` and ``<name>.crt`` are there for a program of the coordinator's: made anew for other hosts, and
        when less than a third of their life is left."""
        key_path, path = self._folder / f"{subject.name}.key", self._folder / f"{subject.name}.crt"
        if path.exists() and key_path.exists():
            held = x509.load_pem_x509_certificate(path.read_bytes())
            names = held.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            if set(names) == set(_names(subject, hosts)) and _ms(held.not_valid_after_utc) - now_ms > life_ms / 3:
                return
        key = keys.made()
        issued = self.issue(key.public_key(), subject, now_ms=now_ms, life_ms=life_ms, hosts=hosts)
        durable.write(key_path, keys.pem(key), mode=0o600)
        durable.write(path, issued.chain.encode(), mode=0o644)

    def judge(self, pem: str) -> tuple[Subject, x509.Certificate]:
        """Whose a certificate is, if this authority issued it; it may have ended or been revoked. Raises BadRequest."""
        try:
            certificate = x509.load_pem_x509_certificate(pem.encode())
            certificate.verify_directly_issued_by(self._issuing)
            subject = identity.subject_of(certificate)
        except InvalidSignature as exc:
            raise BadRequest("certificate: not issued by this fleet's authority") from exc
        except (ValueError, TypeError) as exc:
            raise BadRequest(f"certificate: {str(exc)[:200]}") from exc
        if subject.fleet != self._fleet:
            raise BadRequest(f"certificate: of fleet {subject.fleet!r}, this is {self._fleet!r}")
        return subject, certificate

    def revoked_list(self, revoked: Iterable[tuple[str, int]], *, now_ms: int) -> bytes:
        """The list (CRL, PEM) of revoked certificates: number as hex digits, and when."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._issuing.subject)
            .last_update(_utc(now_ms - BACKDATED_MS))
            .next_update(_utc(now_ms + CRL_DAYS * DAY_MS))
            .add_extension(x509.CRLNumber(now_ms), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        for serial, at_ms in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(_utc(at_ms)).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)

    @property
    def trusted_pem(self) -> str:
        """Root and issuing certificate, also in ``trusted.crt``: for programs that want the whole chain in one file."""
        return self.root_pem + self._issuing.public_bytes(Encoding.PEM).decode()

    # -- files

    def _has_root_key(self) -> bool:
        return (self._folder / "root.key").exists()

    def _left_ms(self, now_ms: int) -> int:
        path = self._folder / "issuing.crt"
        return _ms(x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc) - now_ms if path.exists() else 0

    def _make_root(self, now_ms: int) -> None:
        if self._has_root_key():
            raise ValueError("root.key is there and root.crt is not: bring root.crt back, or take both away to begin a new fleet")
        key = keys.made()
        name = _name(self._fleet, f"{self._fleet} root")
        builder = _builder(name, name, key.public_key(), now_ms - BACKDATED_MS, now_ms + ROOT_DAYS * DAY_MS)
        certificate = _ca(builder, key, path_length=1)
        durable.write(self._folder / "root.key", keys.pem(key), mode=0o600)
        durable.write(self._folder / "root.crt", certificate.public_bytes(Encoding.PEM), mode=0o644)

    def _make_issuing(self, now_ms: int) -> None:
        if not self._has_root_key():
            raise ValueError("issuing.crt is not there, and root.key, which could sign one, is not either: bring one of them back")
        root_key = keys.load_own(self._folder / "root.key")
        path = self._folder / "issuing.key"
        if path.exists():  # the same key: what it signed holds on
            key = keys.load_own(path)
        else:
            key = keys.made()
            durable.write(path, keys.pem(key), mode=0o600)
        name = _name(self._fleet, f"{self._fleet} issuing")
        builder = _builder(name, self._root.subject, key.public_key(), now_ms - BACKDATED_MS, now_ms + ISSUING_DAYS * DAY_MS)
        certificate = _ca(builder, root_key, path_length=0)
        durable.write(self._folder / "issuing.crt", certificate.public_bytes(Encoding.PEM), mode=0o644)

    def _load(self) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        certificate = x509.load_pem_x509_certificate((self._folder / "issuing.crt").read_bytes())
        key = keys.load_own(self._folder / "issuing.key")
        certificate.verify_directly_issued_by(self._root)
        if _spki(certificate.public_key()) != _spki(key.public_key()):
            raise ValueError("issuing.key is not the key of issuing.crt")
        return certificate, key


def requested_key(csr_pem: str) -> ec.EllipticCurvePublicKey:
    """The public key of a signing request, whose holder signed it. Raises BadRequest."""
    try:
        request = x509.load_pem_x509_csr(csr_pem.encode())
        key = request.public_key()
        is_signed = request.is_signature_valid
    except (ValueError, TypeError) as exc:
        raise BadRequest(f"csr: {str(exc)[:200]}") from exc
    except Exception as exc:  # cryptography raises UnsupportedAlgorithm and others for keys that nobody sends by mistake
        raise BadRequest(f"csr: {type(exc).__name__}") from exc
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise BadRequest("csr: its key is not one of the curve P-256")
    if not is_signed:
        raise BadRequest("csr: not signed with its own key")
    return key


def key_digest(key: object) -> str:
    """A public key's SHA-256 (SubjectPublicKeyInfo, DER), as hex digits."""
    return hashlib.sha256(_spki(key)).hexdigest()


def _spki(key: object) -> bytes:
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise BadRequest("certificate: its key is not one of the curve P-256")
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _name(fleet: str, common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet), x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, not_before_ms: int, not_after_ms: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_utc(not_before_ms))
        .not_valid_after(_utc(not_after_ms))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _ca(builder: x509.CertificateBuilder, signer: ec.EllipticCurvePrivateKey, *, path_length: int) -> x509.Certificate:
    return (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(x509.KeyUsage(**USAGE_CA, **OTHER_USAGE), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )


def _names(subject: Subject, hosts: Iterable[str]) -> list[x509.GeneralName]:
    return [*map(x509.UniformResourceIdentifier, subject.uris), x509.DNSName(subject.dns_name), *map(_host, hosts)]


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _utc(at_ms: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(at_ms // 1000, datetime.UTC)


def _ms(moment: datetime.datetime) -> int:
    return int(moment.timestamp() * 1000)
