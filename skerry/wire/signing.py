"""Ed25519 envelopes: the signature covers the very bytes that travel, never a re-encoding of them.

The payload stays readable JSON inside the envelope (``msgspec.Raw`` keeps its bytes as received), so an operator can
look at it with any MQTT client, and a verifier parses nothing of it before the signature holds. RFC 8032 signatures over
``context || 0x00 || payload``: the context keeps one kind of document from being passed off as another.
"""

import base64
import binascii
import hashlib
from typing import TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from skerry.wire import codec

T = TypeVar("T")

DESIRED_CONTEXT = b"skerry desired v1"


class Envelope(msgspec.Struct, frozen=True):
    """A signed document. ``signature`` is base64, ``key_id`` the first 16 hex digits of the public key's sha256."""

    key_id: str
    signature: str
    payload: msgspec.Raw


class BadSignature(ValueError):
    """The envelope was not signed by a key that is trusted here."""


def key_id_of(key: Ed25519PublicKey) -> str:
    """A short name for a public key, safe to log."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]


def public_key_line(key: Ed25519PublicKey) -> str:
    """A public key as one line of a file of trusted keys: base64 of its 32 bytes."""
    return base64.b64encode(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()


def parse_public_keys(text: str) -> list[Ed25519PublicKey]:
    """The keys in a file of trusted keys, one a line, ``#`` starts a comment. Raises ValueError with the line's number."""
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        try:
            keys.append(Ed25519PublicKey.from_public_bytes(base64.b64decode(content, validate=True)))
        except (binascii.Error, ValueError) as exc:
            raise ValueError(f"line {number}: not the base64 of a 32-byte Ed25519 public key") from exc
    return keys


def sign(document: object, key: Ed25519PrivateKey, *, context: bytes) -> bytes:
    """The envelope's bytes, ready to publish."""
    payload = codec.encode(document)
    signature = base64.b64encode(key.sign(context + b"\x00" + payload)).decode()
    return codec.encode(Envelope(key_id=key_id_of(key.public_key()), signature=signature, payload=msgspec.Raw(payload)))


def verify(
    envelope_bytes: bytes,
    kind: type[T],
    trusted: list[Ed25519PublicKey],
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
    try:
        key.verify(base64.b64decode(envelope.signature, validate=True), context + b"\x00" + payload)
    except (InvalidSignature, binascii.Error, ValueError) as exc:
        raise BadSignature(f"signature: does not match the payload under key {envelope.key_id}") from exc
    return codec.decode(payload, kind, max_bytes=max_bytes)
