"""Ed25519 envelopes: the signature covers the very bytes that travel, never a re-encoding of them.

The payload stays readable JSON inside the envelope (``msgspec.Raw`` keeps its bytes as received), so an operator can
look at it with any MQTT client, and a verifier parses nothing of it before the signature holds. RFC 8032 signatures over
``context || 0x00 || payload``: the context keeps one kind of document from being passed off as another.
"""

import base64
import binascii
import hashlib
from collections.abc import Collection, Sequence
from typing import TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from skerry.wire import codec

T = TypeVar("T")

DESIRED_CONTEXT = b"skerry desired v1"
GRANT_CONTEXT = b"skerry key v1"
MAX_GRANTS = 16
"""Keys that follow one another before boxes must be given new anchors."""


class Grant(msgspec.Struct, frozen=True):
    """What one signing key says of the next: it is the fleet's too. ``key`` is base64 of its 32 public bytes."""

    fleet: str
    key: str


class SignedGrant(msgspec.Struct, frozen=True):
    """A Grant and who says it."""

    key_id: str
    signature: str
    payload: msgspec.Raw


class Envelope(msgspec.Struct, frozen=True):
    """A signed document. ``signature`` is base64, ``key_id`` the first 16 hex digits of the public key's sha256.

    ``grants`` lead from older keys to the one that signed, so that a box that was away while keys changed can follow.
    """

    key_id: str
    signature: str
    payload: msgspec.Raw
    grants: list[SignedGrant] = []


class BadSignature(ValueError):
    """The envelope was not signed by a key that is trusted here."""


def key_id_of(key: Ed25519PublicKey) -> str:
    """A short name for a public key, safe to log."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]


def public_key_line(key: Ed25519PublicKey) -> str:
    """A public key as one line of a file of trusted keys: base64 of its 32 bytes."""
    return base64.b64encode(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()


def public_key(line: str) -> Ed25519PublicKey:
    """The other way round. Raises ValueError."""
    try:
        return Ed25519PublicKey.from_public_bytes(base64.b64decode(line, validate=True))
    except (binascii.Error, ValueError) as exc:
        raise ValueError("not the base64 of a 32-byte Ed25519 public key") from exc


def parse_trusted(text: str) -> tuple[list[Ed25519PublicKey], int]:
    """A file of trusted keys: one a line, ``#`` starts a comment; and the Unix milliseconds after ``since=``, 0 where there is none.

    What was signed before that moment is not for this box. Raises ValueError with the line's number.
    """
    keys, since_ms = [], 0
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        name, separator, value = content.partition("=")
        if separator and name == "since":
            if not (value.isascii() and value.isdigit() and len(value) <= 13):
                raise ValueError(f"line {number}: since: {value[:20]!r} is not a number of milliseconds")
            since_ms = int(value)
            continue
        try:
            keys.append(public_key(content))
        except ValueError as exc:
            raise ValueError(f"line {number}: {exc}") from exc
    return keys, since_ms


def parse_public_keys(text: str) -> list[Ed25519PublicKey]:
    """The keys alone."""
    return parse_trusted(text)[0]


def _signature(payload: bytes, key: Ed25519PrivateKey, context: bytes) -> str:
    return base64.b64encode(key.sign(context + b"\x00" + payload)).decode()


def sign(document: object, key: Ed25519PrivateKey, *, context: bytes, grants: Sequence[SignedGrant] = ()) -> bytes:
    """The envelope's bytes, ready to publish."""
    payload = codec.encode(document)
    return codec.encode(Envelope(key_id_of(key.public_key()), _signature(payload, key, context), msgspec.Raw(payload), list(grants)))


def grant(fleet: str, following: Ed25519PublicKey, key: Ed25519PrivateKey) -> SignedGrant:
    """``key``'s word for the one that follows it."""
    payload = codec.encode(Grant(fleet, public_key_line(following)))
    return SignedGrant(key_id_of(key.public_key()), _signature(payload, key, GRANT_CONTEXT), msgspec.Raw(payload))


def _holds(key: Ed25519PublicKey, signature: str, payload: bytes, context: bytes) -> bool:
    try:
        key.verify(base64.b64decode(signature, validate=True), context + b"\x00" + payload)
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return True


def followed(
    trusted: Sequence[Ed25519PublicKey], grants: Sequence[SignedGrant], *, fleet: str, retired: Collection[str] = ()
) -> list[Ed25519PublicKey]:
    """``trusted``, and every key that one of them, or one of those, says is the fleet's, but for those that are ``retired`` by their id."""
    known = {key_id_of(key): key for key in trusted}
    for _ in range(min(len(grants), MAX_GRANTS)):
        before = len(known)
        for signed in grants[:MAX_GRANTS]:
            by = known.get(signed.key_id)
            if by is None or not _holds(by, signed.signature, bytes(signed.payload), GRANT_CONTEXT):
                continue
            try:
                said = codec.decode(bytes(signed.payload), Grant)
                key = public_key(said.key)
            except ValueError:  # codec.Malformed is one
                continue
            if said.fleet == fleet and key_id_of(key) not in retired:
                known.setdefault(key_id_of(key), key)
        if len(known) == before:
            break
    return list(known.values())


def verify(
    envelope_bytes: bytes,
    kind: type[T],
    trusted: Sequence[Ed25519PublicKey],
    *,
    context: bytes,
    max_bytes: int = codec.MAX_MESSAGE_BYTES,
) -> T:
    """The document inside, once its signature holds. Raises BadSignature or codec.Malformed."""
    envelope = codec.decode(envelope_bytes, Envelope, max_bytes=max_bytes)
    key = next((candidate for candidate in trusted if key_id_of(candidate) == envelope.key_id), None)
    if key is None:
        raise BadSignature(f"key_id {envelope.key_id[:32]!r} is not trusted on this box")
    payload = bytes(envelope.payload)
    if not _holds(key, envelope.signature, payload, context):
        raise BadSignature(f"signature: does not match the payload under key {envelope.key_id}")
    return codec.decode(payload, kind, max_bytes=max_bytes)
