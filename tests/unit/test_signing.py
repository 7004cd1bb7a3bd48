"""Only what the coordinator signed, byte for byte and for this purpose, is believed."""

import contextlib
import json

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from skerry.wire import codec, signing
from skerry.wire.messages import Desired

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
DOC = Desired(fleet="f", node="n", generation=7, issued_at_ms=1)


def signed(doc: Desired = DOC, key: Ed25519PrivateKey = KEY) -> bytes:
    return signing.sign(doc, key, context=signing.DESIRED_CONTEXT)


def opened(envelope: bytes) -> Desired:
    return signing.verify(envelope, Desired, [KEY.public_key()], context=signing.DESIRED_CONTEXT)


def test_a_signed_document_comes_back_as_it_was():
    assert opened(signed()) == DOC


def test_an_operator_can_read_the_payload_without_any_key():
    assert json.loads(signed())["payload"]["generation"] == 7


def test_fields_that_this_version_does_not_know_stay_covered_by_the_signature():
    payload = b'{"fleet":"f","node":"n","generation":7,"issued_at_ms":1, "newer": true}'
    envelope = signing.sign(msgspec.Raw(payload), KEY, context=signing.DESIRED_CONTEXT)
    assert opened(envelope) == DOC
    with pytest.raises(signing.BadSignature):
        opened(envelope.replace(b'"newer": true', b'"newer": null'))


def test_another_key_and_another_purpose_are_refused():
    with pytest.raises(signing.BadSignature, match="key_id"):
        opened(signed(key=OTHER))
    with pytest.raises(signing.BadSignature, match="signature"):
        signing.verify(signed(), Desired, [KEY.public_key()], context=b"skerry something else v1")


@given(st.data())
def test_no_changed_byte_is_ever_believed_to_say_something_else(data):
    envelope = bytearray(signed())
    where = data.draw(st.integers(0, len(envelope) - 1))
    envelope[where] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(signing.BadSignature, codec.Malformed):
        assert opened(bytes(envelope)) == DOC  # a byte outside key, signature and payload may change without effect


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b'{"generation": "x"}', b"\xff\xfe", b"[" * 100_000])
def test_bytes_that_are_no_message_name_what_is_wrong(payload):
    with pytest.raises(codec.Malformed, match="Desired: "):
        codec.decode(payload, Desired)


def test_a_message_over_the_limit_is_refused_before_it_is_parsed():
    with pytest.raises(codec.Malformed, match="at most"):
        codec.decode(b" " * (codec.MAX_MESSAGE_BYTES + 1), Desired)
