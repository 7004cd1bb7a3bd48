"""Who vouches for a model: signatures in the way of OpenSSF Model Signing v1.0, by keys of one's own.

Signed is an in-toto statement that lists paths and SHA-256 digests (predicate ``https://model_signing/signature/v1.0``), as DSSE does it.
A path says which model the bytes are: ``NAME/VERSION/model.onnx``, as a model lies in a Triton repository, so that the file of one model or
version can't be passed off as another's. ``model_signing sign key`` over such a folder makes the same. Sources:
github.com/sigstore/model-transparency, in-toto/attestation spec/v1/statement.md, secure-systems-lab/dsse protocol.md.
"""

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from skerry.wire import codec
from skerry.wire.bundle import (
    MAX_BUNDLE_BYTES,
    PAYLOAD_TYPE,
    Bundle,
    DsseEnvelope,
    DsseSignature,
    PublicKeyIdentifier,
    VerificationMaterial,
)

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
MAX_SIGNATURES = 8
_HASHES: dict[str, hashes.HashAlgorithm] = {"secp256r1": hashes.SHA256(), "secp384r1": hashes.SHA384(), "secp521r1": hashes.SHA512()}
_BEGIN, _END = b"-----BEGIN PUBLIC KEY-----", b"-----END PUBLIC KEY-----"

Hex64 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class NotVouched(ValueError):
    """No trusted key vouches for the model; the text says what is wrong."""


class Resource(msgspec.Struct, frozen=True):
    """A file and what it holds."""

    name: str
    digest: str
    algorithm: str


class _Subject(msgspec.Struct, frozen=True):
    name: str
    digest: dict[str, str]


class _Serialization(msgspec.Struct, frozen=True):
    method: str = "files"
    hash_type: str = "sha256"
    allow_symlinks: bool = False
    ignore_paths: list[str] = []


class _Predicate(msgspec.Struct, frozen=True):
    resources: list[Resource]
    serialization: _Serialization = _Serialization()


class _Statement(msgspec.Struct, frozen=True, rename={"type": "_type", "predicate_type": "predicateType"}):
    type: str
    subject: list[_Subject]
    predicate_type: str
    predicate: _Predicate


def path_of(name: str, version: int) -> str:
    """Where a model's file lies in a repository, which is what its signature says that it is."""
    return f"{key_of(name, version)}/model.onnx"


def key_of(name: str, version: int) -> str:
    """By what ``Desired.signatures`` knows a model."""
    return f"{name}/{version}"


def release_path(version: str) -> str:
    """What the signature of a release of Skerry itself says that the file is. No model's: those end in ``model.onnx``."""
    return f"skerry/{version}/release.tar"


def hint_of(key: ec.EllipticCurvePublicKey) -> str:
    """What a bundle names a key by; safe to log."""
    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def parse_keys(text: bytes) -> list[ec.EllipticCurvePublicKey]:
    """The public keys in a file of PEM blocks. Raises ValueError where one is of another kind, or there is none."""
    keys = []
    for number, block in enumerate(text.split(_BEGIN)[1:], 1):
        try:
            key = load_pem_public_key(_BEGIN + block.partition(_END)[0] + _END)
        except Exception as exc:
            raise ValueError(f"key {number}: not a public key: {exc}") from exc
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _HASHES:
            raise ValueError(f"key {number}: not of the curve P-256, P-384 or P-521")
        keys.append(key)
    if not keys:
        raise ValueError("there is no public key (PEM) in it")
    return keys


def _to_be_signed(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def sign(files: Mapping[str, str], key: ec.EllipticCurvePrivateKey, *, title: str) -> Bundle:
    """A bundle over paths and their hexadecimal SHA-256; ``title`` is for people. Raises ValueError for another curve's key."""
    if key.curve.name not in _HASHES:
        raise ValueError(f"a key of the curve {key.curve.name}: P-256, P-384 and P-521 are taken")
    resources = [Resource(path, files[path], "sha256") for path in sorted(files)]
    root = hashlib.sha256(b"".join(bytes.fromhex(resource.digest) for resource in resources)).hexdigest()
    statement = _Statement(STATEMENT_TYPE, [_Subject(title, {"sha256": root})], PREDICATE_TYPE, _Predicate(resources))
    payload = codec.encode(statement)
    signature = key.sign(_to_be_signed(payload), ec.ECDSA(_HASHES[key.curve.name]))
    return Bundle(
        DsseEnvelope(base64.b64encode(payload).decode(), PAYLOAD_TYPE, [DsseSignature(base64.b64encode(signature).decode())]),
        verification_material=VerificationMaterial(PublicKeyIdentifier(hint_of(key.public_key()))),
    )


def parse_bundle(text: bytes) -> Bundle:
    """The bundle in a file. Raises codec.Malformed."""
    return codec.decode(text, Bundle, max_bytes=MAX_BUNDLE_BYTES)


def _signer(envelope: DsseEnvelope, payload: bytes, keys: Sequence[ec.EllipticCurvePublicKey]) -> ec.EllipticCurvePublicKey:
    """The one of ``keys`` that signed. Raises NotVouched."""
    for signature in envelope.signatures[:MAX_SIGNATURES]:
        try:
            sig = base64.b64decode(signature.sig, validate=True)
        except (binascii.Error, ValueError) as exc:
            raise NotVouched("signature: dsseEnvelope.signatures.sig is not base64") from exc
        for key in keys:
            try:
                key.verify(sig, _to_be_signed(payload), ec.ECDSA(_HASHES[key.curve.name]))
            except InvalidSignature:
                continue
            return key
    raise NotVouched("signature: by none of the keys that are trusted here")


def _payload(bundle: Bundle) -> bytes:
    envelope = bundle.dsse_envelope
    if envelope.payload_type != PAYLOAD_TYPE:
        raise NotVouched(f"signature: dsseEnvelope.payloadType: {envelope.payload_type[:80]!r} is not {PAYLOAD_TYPE}")
    try:
        return base64.b64decode(envelope.payload, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise NotVouched("signature: dsseEnvelope.payload is not base64") from exc


def _check_statement(payload: bytes, path: str, sha256: str) -> None:
    """Raises NotVouched unless the statement says that ``path`` holds what has that digest."""
    try:
        statement = codec.decode(payload, _Statement, max_bytes=MAX_BUNDLE_BYTES)
    except codec.Malformed as exc:
        raise NotVouched(f"signature: not a model's: {exc}") from exc
    for field, found, wanted in (
        ("_type", statement.type, STATEMENT_TYPE),
        ("predicateType", statement.predicate_type, PREDICATE_TYPE),
        ("serialization.method", statement.predicate.serialization.method, "files"),
    ):
        if found != wanted:
            raise NotVouched(f"signature: {field}: {found[:80]!r} is not {wanted}")
    said = [resource for resource in statement.predicate.resources if resource.name == path]
    if len(said) != 1:
        others = ", ".join(resource.name[:80] for resource in statement.predicate.resources[:3]) or "nothing"
        raise NotVouched(f"signature: it is for {others}, not for {path}" if not said else f"signature: it names {path} twice")
    if said[0].algorithm != "sha256" or said[0].digest != sha256:
        raise NotVouched(f"signature: it is for other bytes of {path}: {said[0].algorithm[:20]} {said[0].digest[:64]}")


def check_names(bundle: Bundle, *, name: str, version: int, sha256: str) -> None:
    """Raises NotVouched unless the bundle is for this model and these bytes, whoever signed it."""
    check_file(bundle, path=path_of(name, version), sha256=sha256)


def check_file(bundle: Bundle, *, path: str, sha256: str) -> None:
    """Raises NotVouched unless the bundle is for this file and these bytes, whoever signed it."""
    _check_statement(_payload(bundle), path, sha256)


def verify(
    bundle: Bundle | None, keys: Sequence[ec.EllipticCurvePublicKey], *, name: str, version: int, sha256: str
) -> ec.EllipticCurvePublicKey:
    """The key that vouches for these bytes being this version of this model. Raises NotVouched."""
    return verify_file(bundle, keys, path=path_of(name, version), sha256=sha256)


def verify_file(bundle: Bundle | None, keys: Sequence[ec.EllipticCurvePublicKey], *, path: str, sha256: str) -> ec.EllipticCurvePublicKey:
    """The key that vouches for these bytes being the file ``path``. Raises NotVouched.

    Nothing of the statement is parsed before the signature holds.
    """
    if bundle is None:
        raise NotVouched("signature: there is none")
    payload = _payload(bundle)
    key = _signer(bundle.dsse_envelope, payload, keys)
    _check_statement(payload, path, sha256)
    return key
