"""Who vouches for a model: our signatures and those of OpenSSF's own tool are the same, and nothing else passes for one."""

import base64
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from skerry.runtime import keys
from skerry.wire import codec
from skerry.wire.bundle import Bundle, DsseSignature
from skerry.wire.model_signature import NotVouched, check_names, hint_of, parse_bundle, parse_keys, path_of, sign, verify

KEY, OTHER = keys.made(), keys.made()
CONTENT = b"a model's bytes"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
TOOL = Path(sys.executable).with_name("model_signing")


def public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def signed(key: ec.EllipticCurvePrivateKey = KEY, **files: str) -> Bundle:
    return sign({path.replace("__", "/"): digest for path, digest in files.items()} or {path_of("shelf", 3): DIGEST}, key, title="shelf")


def refusal(bundle: Bundle | None, *, name: str = "shelf", version: int = 3, sha256: str = DIGEST, trusted=(KEY,)) -> str:
    try:
        verify(bundle, [key.public_key() for key in trusted], name=name, version=version, sha256=sha256)
    except NotVouched as exc:
        return str(exc)
    return ""


@pytest.fixture
def repository(tmp_path) -> Path:
    """A Triton repository with one model, and the keys beside it."""
    path = tmp_path / "repository" / path_of("shelf", 3)
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    (tmp_path / "key").write_bytes(keys.pem(KEY))
    (tmp_path / "key.pub").write_bytes(public_pem(KEY))
    (tmp_path / "other.pub").write_bytes(public_pem(OTHER))
    return tmp_path / "repository"


def tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TOOL, *arguments], capture_output=True, text=True, check=False, timeout=60)


def test_openssf_s_own_tool_takes_ours_and_only_by_the_key_that_signed(repository):
    folder = repository.parent
    (folder / "ours.sig").write_bytes(codec.encode(signed()))
    for key, takes in (("key.pub", True), ("other.pub", False)):
        done = tool("verify", "key", "--signature", folder / "ours.sig", "--public_key", folder / key, repository)
        assert (done.returncode == 0) == takes, done.stdout + done.stderr
    (repository / "shelf" / "3" / "model.onnx").write_bytes(CONTENT + b" changed")
    done = tool("verify", "key", "--signature", folder / "ours.sig", "--public_key", folder / "key.pub", repository)
    assert done.returncode != 0


def test_ours_takes_what_openssf_s_own_tool_made_and_only_by_the_key_that_signed(repository):
    folder = repository.parent
    done = tool("sign", "key", "--signature", folder / "theirs.sig", "--private_key", folder / "key", repository)
    assert done.returncode == 0, done.stderr
    bundle = parse_bundle((folder / "theirs.sig").read_bytes())
    assert refusal(bundle) == ""
    assert bundle.verification_material.public_key.hint == hint_of(KEY.public_key())
    assert "none of the keys" in refusal(bundle, trusted=[OTHER])
    assert "other bytes" in refusal(bundle, sha256="0" * 64)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_keys_of_three_curves_vouch_and_any_of_several_trusted_ones_does(curve):
    key = ec.generate_private_key(curve)
    bundle = signed(key)
    assert refusal(bundle, trusted=[OTHER, KEY, key]) == ""
    assert "none of the keys" in refusal(bundle)
    text = public_pem(OTHER) + b"# the next one\n" + public_pem(key)
    assert [hint_of(found) for found in parse_keys(text)] == [hint_of(OTHER.public_key()), hint_of(key.public_key())]


def test_one_signature_may_cover_a_whole_repository():
    bundle = signed(shelf__3__model_onnx="0" * 64)
    many = sign({path_of("shelf", 3): DIGEST, path_of("speech", 1): "1" * 64}, KEY, title="all")
    assert refusal(many) == ""
    assert refusal(many, name="speech", version=1, sha256="1" * 64) == ""
    assert "not for shelf/3/model.onnx" in refusal(bundle)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"name": "speech"}, "it is for shelf/3/model.onnx, not for speech/3/model.onnx"),
        ({"version": 4}, "it is for shelf/3/model.onnx, not for shelf/4/model.onnx"),
        ({"sha256": "f" * 64}, "it is for other bytes of shelf/3/model.onnx"),
        ({"trusted": (OTHER,)}, "by none of the keys"),
        ({"trusted": ()}, "by none of the keys"),
    ],
)
def test_a_signature_is_for_one_version_of_one_model_and_its_bytes(asked, words):
    assert words in refusal(signed(), **asked)


def test_without_a_signature_nobody_vouches():
    assert refusal(None) == "signature: there is none"


def with_payload(bundle: Bundle, payload: bytes) -> Bundle:
    envelope = msgspec.structs.replace(bundle.dsse_envelope, payload=base64.b64encode(payload).decode())
    return msgspec.structs.replace(bundle, dsse_envelope=envelope)


def payload_of(bundle: Bundle) -> dict:
    return json.loads(base64.b64decode(bundle.dsse_envelope.payload))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("_type", "https://in-toto.io/Statement/v0.1"),
        ("predicateType", "https://slsa.dev/provenance/v1"),
        ("predicate", {"resources": [], "serialization": {"method": "files"}}),
        ("predicate", {"resources": [{"name": "shelf/3/model.onnx", "digest": DIGEST, "algorithm": "md5"}]}),
        ("predicate", {"resources": [{"name": "shelf/3/model.onnx", "digest": DIGEST, "algorithm": "sha256"}] * 2}),
        ("predicate", {"resources": [{"name": "shelf/3/model.onnx", "digest": DIGEST, "algorithm": "sha256"}],
                       "serialization": {"method": "shards"}}),
        ("predicate", {"resources": {"name": "shelf/3/model.onnx"}}),
        ("predicate", None),
    ],
)  # fmt: skip
def test_what_a_trusted_key_signed_for_another_purpose_vouches_for_no_model(field, value):
    statement = payload_of(signed()) | {field: value}
    payload = json.dumps(statement).encode()
    kind = "application/vnd.in-toto+json"
    pae = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
    bundle = with_payload(signed(), payload)
    fresh = DsseSignature(base64.b64encode(KEY.sign(pae, ec.ECDSA(hashes.SHA256()))).decode())
    bundle = msgspec.structs.replace(bundle, dsse_envelope=msgspec.structs.replace(bundle.dsse_envelope, signatures=[fresh]))
    said = refusal(bundle)
    assert said.startswith("signature: ")
    assert "none of the keys" not in said, "the signature holds: it is the statement that is refused"


SIGNED = signed()


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_bundle_of_which_anything_was_changed_vouches_for_nothing(data):
    """Whatever is cut, put in or replaced in the file: it is malformed, refused, or says the very same."""
    text = codec.encode(SIGNED)
    at = data.draw(st.integers(0, len(text) - 1))
    cut = data.draw(st.integers(0, min(4, len(text) - at)))
    changed = text[:at] + data.draw(st.binary(max_size=4)) + text[at + cut :]
    try:
        bundle = parse_bundle(changed)
    except codec.Malformed:
        return
    if refusal(bundle) == "":
        assert bundle.dsse_envelope.payload == SIGNED.dsse_envelope.payload


@given(st.binary(max_size=400))
def test_bytes_that_are_no_bundle_are_malformed_and_nothing_worse(content):
    with pytest.raises(codec.Malformed):
        parse_bundle(content)


def test_names_can_be_checked_without_a_key_and_a_bundle_is_bounded():
    check_names(signed(), name="shelf", version=3, sha256=DIGEST)
    with pytest.raises(NotVouched, match="not for"):
        check_names(signed(), name="shelf", version=2, sha256=DIGEST)
    huge = sign({path_of(f"model-{i}", 1): DIGEST for i in range(1000)}, KEY, title="all")
    with pytest.raises(codec.Malformed, match="at most 16384"):
        parse_bundle(codec.encode(huge))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "no public key"),
        (keys.pem(KEY), "no public key"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "key 1: not a public key"),
        (
            rsa.generate_private_key(65537, 2048).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
            "key 1: not of the curve",
        ),
    ],
)
def test_a_file_of_keys_that_holds_something_else_is_refused_with_its_place(text, words):
    with pytest.raises(ValueError, match=words):
        parse_keys(text)


def test_another_curve_s_key_signs_nothing():
    with pytest.raises(ValueError, match="secp256k1"):
        signed(ec.generate_private_key(ec.SECP256K1()))
