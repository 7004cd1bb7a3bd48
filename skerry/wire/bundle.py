"""A Sigstore bundle as OpenSSF Model Signing writes it for a key of one's own: ``application/vnd.dev.sigstore.bundle.v0.3+json``.

Sources: sigstore/protobuf-specs, sigstore_bundle.proto and sigstore_common.proto; secure-systems-lab/dsse, envelope.md. Unknown fields
are passed over.
"""

import msgspec

MAX_BUNDLE_BYTES = 16 * 1024
"""It travels to every box that the model runs on, within the document that says what to run."""
MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"


class PublicKeyIdentifier(msgspec.Struct, frozen=True):
    """``hint``: hexadecimal SHA-256 of the public key in PEM."""

    hint: str = ""


class VerificationMaterial(msgspec.Struct, frozen=True, rename="camel"):
    """Which key signed. Nothing is believed for standing here."""

    public_key: PublicKeyIdentifier = PublicKeyIdentifier()
    tlog_entries: list[msgspec.Raw] = []


class DsseSignature(msgspec.Struct, frozen=True):
    """``sig`` is base64."""

    sig: str
    keyid: str = ""


class DsseEnvelope(msgspec.Struct, frozen=True, rename="camel"):
    """``payload`` is base64 of what was signed together with its type."""

    payload: str
    payload_type: str
    signatures: list[DsseSignature]


class Bundle(msgspec.Struct, frozen=True, rename="camel"):
    """The file that lies beside a model."""

    dsse_envelope: DsseEnvelope
    media_type: str = MEDIA_TYPE
    verification_material: VerificationMaterial = VerificationMaterial()
