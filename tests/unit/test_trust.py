"""Signing keys follow one another and boxes follow them, whatever they missed; what is over, by the time that a box knows, is not taken."""

import tempfile
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.signer.keyring import Keyring, KeyUnusable
from edge_agent.warden.trust import Trust, TrustFile
from edge_agent.warden.verify import Refused, judge
from skerry.wire import codec, signing
from skerry.wire.messages import Desired
from skerry.wire.signing import Envelope, SignedGrant

DAY_MS = 86_400_000
NOW_MS = 1_800_000_000_000


def document(generation: int, *, retired: list[str] | None = None, issued_at_ms: int = NOW_MS, expires_at_ms: int = 0) -> Desired:
    return Desired("f", "n", generation, issued_at_ms, expires_at_ms=expires_at_ms, retired_keys=retired or [])


class Box:
    """What a box keeps of what it took."""

    def __init__(self, anchor: str, since_ms: int = 0) -> None:
        self.trust, self.held = Trust([anchor], since_ms), None

    def take(self, envelope: bytes, *, now_at_least_ms: int = 0) -> str:
        """Why it is refused; empty where it is taken."""
        try:
            self.held, self.trust = judge(envelope, trust=self.trust, fleet="f", node="n", held=self.held, now_at_least_ms=now_at_least_ms)
        except Refused as exc:
            return str(exc)
        return ""


@given(st.lists(st.sampled_from(["rotate", "retire", "tell", "tell"]), max_size=24), st.data())
@settings(max_examples=80, deadline=None)
def test_a_box_follows_the_keys_whatever_it_missed_and_obeys_none_that_it_heard_was_retired(happened, data):
    with tempfile.TemporaryDirectory() as folder:
        keyring = Keyring(Path(folder), "f")
        box, told = Box(keyring.public_key), 0
        stolen: dict[str, Ed25519PrivateKey] = {}
        heard_retired: set[str] = set()
        for generation, what in enumerate(happened, 1):
            stolen[keyring.key_id] = signing_key(Path(folder))
            if what == "rotate" and len(keyring.older) < signing.MAX_GRANTS:
                keyring.rotate()
            elif what == "retire" and (older := [key_id for key_id in keyring.older if key_id not in keyring.retired]):
                keyring.retire(data.draw(st.sampled_from(older)))
            elif what == "tell":
                told = generation
                assert box.take(keyring.sign(document(generation, retired=keyring.retired))) == ""
                heard_retired |= set(keyring.retired)
        for key_id, key in stolen.items():
            grants = data.draw(st.permutations(envelope_of(keyring.sign(document(0))).grants))
            forged = signing.sign(document(told + 100), key, context=signing.DESIRED_CONTEXT, grants=grants)
            if key_id in heard_retired:
                assert "not trusted" in Box.take(copy_of(box), forged), "a key that was retired opens nothing"
        assert copy_of(box).take(keyring.sign(document(told + 200, retired=keyring.retired))) == "", "and the one that signs always does"


def copy_of(box: Box) -> Box:
    twin = Box("")
    twin.trust, twin.held = box.trust, box.held
    return twin


def signing_key(folder: Path) -> Ed25519PrivateKey:
    return load_pem_private_key((folder / "signing.pem").read_bytes(), password=None)


def envelope_of(text: bytes) -> Envelope:
    return codec.decode(text, Envelope)


def resealed(text: bytes, grants: list[SignedGrant]) -> bytes:
    return codec.encode(msgspec.structs.replace(envelope_of(text), grants=grants))


@pytest.fixture
def keyring(tmp_path) -> Keyring:
    """Two keys came after the first."""
    keyring = Keyring(tmp_path, "f")
    keyring.first = keyring.public_key
    keyring.rotate()
    keyring.rotate()
    return keyring


def test_who_was_away_while_keys_changed_twice_follows_by_the_grants_in_any_order(keyring):
    text = keyring.sign(document(1))
    grants = envelope_of(text).grants
    assert len(grants) == 2
    assert Box(keyring.first).take(text) == ""
    assert Box(keyring.first).take(resealed(text, grants[::-1])) == ""
    for cut in ([], grants[:1], grants[1:]):
        assert "not trusted" in Box(keyring.first).take(resealed(text, cut))


def test_a_grant_that_a_stranger_made_or_that_is_another_fleets_opens_nothing(keyring, tmp_path):
    stranger, own = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    for grant in (
        signing.grant("f", own.public_key(), stranger),
        msgspec.structs.replace(signing.grant("f", own.public_key(), stranger), key_id=keyring.key_id),
        signing.grant("another", own.public_key(), signing_key(tmp_path)),
    ):
        text = signing.sign(document(1), own, context=signing.DESIRED_CONTEXT, grants=[grant])
        assert "not trusted" in Box(keyring.public_key).take(text)
    text = signing.sign(
        document(1), own, context=signing.DESIRED_CONTEXT, grants=[signing.grant("f", own.public_key(), signing_key(tmp_path))]
    )
    assert Box(keyring.public_key).take(text) == "", "the same by the fleet's own key does"


def test_a_document_is_no_grant_and_a_grant_no_document(keyring, tmp_path):
    own = Ed25519PrivateKey.generate()
    as_document = signing.sign(
        signing.Grant("f", signing.public_key_line(own.public_key())), signing_key(tmp_path), context=signing.DESIRED_CONTEXT
    )
    inner = envelope_of(as_document)
    grant = SignedGrant(inner.key_id, inner.signature, inner.payload)
    text = signing.sign(document(1), own, context=signing.DESIRED_CONTEXT, grants=[grant])
    assert "not trusted" in Box(keyring.public_key).take(text)
    assert "signature" in Box(keyring.public_key).take(signing.sign(document(1), signing_key(tmp_path), context=signing.GRANT_CONTEXT))


def test_what_was_retired_once_stays_so_though_no_later_document_names_it(keyring, tmp_path):
    box, old = Box(keyring.first), signing.key_id_of(signing.public_key(keyring.first))
    assert box.take(keyring.sign(document(1, retired=[old]))) == ""
    assert box.take(keyring.sign(document(2))) == ""
    assert box.trust.retired == [old]
    assert old not in [signing.key_id_of(key) for key in box.trust.keys]


def test_a_document_can_not_retire_the_key_that_signed_it(keyring):
    assert "can't retire itself" in Box(keyring.public_key).take(keyring.sign(document(1, retired=[keyring.key_id])))


def test_a_key_ring_stands_after_a_restart_and_retires_only_what_is_older(keyring, tmp_path):
    again = Keyring(tmp_path, "f")
    assert (again.key_id, again.older, again.retired) == (keyring.key_id, keyring.older, [])
    for key_id, words in ((again.key_id, "rotate first"), ("0" * 16, "not an older key")):
        with pytest.raises(KeyUnusable, match=words):
            again.retire(key_id)
    again.retire(again.older[0])
    assert Keyring(tmp_path, "f").retired == [again.older[0]]
    (tmp_path / "signing.pem").chmod(0o640)
    with pytest.raises(KeyUnusable, match="others may read"):
        Keyring(tmp_path, "f")


# -- time


@pytest.mark.parametrize(
    ("issued", "expires", "now_at_least", "words"),
    [
        (NOW_MS, NOW_MS + DAY_MS, NOW_MS + DAY_MS - 1, ""),
        (NOW_MS, NOW_MS + DAY_MS, NOW_MS + DAY_MS + 1, "expires_at_ms"),
        (NOW_MS, 0, NOW_MS + 900 * DAY_MS, ""),
        (NOW_MS - 2, NOW_MS + DAY_MS, NOW_MS, "when this box was enrolled"),
        (NOW_MS - 1, NOW_MS + DAY_MS, NOW_MS, ""),
    ],
)
def test_what_is_over_or_older_than_the_box_is_not_taken(keyring, issued, expires, now_at_least, words):
    box = Box(keyring.public_key, since_ms=NOW_MS - 1)
    said = box.take(keyring.sign(document(1, issued_at_ms=issued, expires_at_ms=expires)), now_at_least_ms=now_at_least)
    assert (words in said) if words else said == ""


def test_what_is_held_is_obeyed_for_ever_and_taken_again(keyring):
    text = keyring.sign(document(1, expires_at_ms=NOW_MS + DAY_MS))
    box = Box(keyring.public_key)
    assert box.take(text, now_at_least_ms=NOW_MS) == ""
    assert box.take(text, now_at_least_ms=NOW_MS + 900 * DAY_MS) == ""
    late = Trust(box.trust.anchor, since_ms=NOW_MS + 5 * DAY_MS)
    assert judge(text, trust=late, fleet="f", node="n", held=None, now_at_least_ms=NOW_MS + 900 * DAY_MS, is_own=True)[0] == box.held


def test_root_s_new_word_stands_above_what_documents_said(keyring, tmp_path):
    path, first = tmp_path / "trust.json", signing.public_key(keyring.first)
    file = TrustFile(path, [first], 0)
    present = signing.public_key(keyring.public_key)
    file.keep(file.trust.following([first, present], [signing.key_id_of(first)]))
    assert [signing.key_id_of(key) for key in TrustFile(path, [first], 0).trust.keys] == [keyring.key_id]
    assert len(TrustFile(path, [first, present], 0).trust.keys) == 2
    path.write_bytes(b"{")
    assert len(TrustFile(path, [first], 0).trust.keys) == 1, "a damaged file costs what it held, and no start"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("since=x\n", "line 1: since"),
        ("since=\n", "line 1: since"),
        ("# a\nsince=12345678901234\n", "line 2: since"),
        ("abc\n", "line 1: not the base64"),
    ],
)
def test_a_file_of_trusted_keys_that_is_wrong_says_where(text, words):
    with pytest.raises(ValueError, match=words):
        signing.parse_trusted(text)


def test_a_file_of_trusted_keys_may_say_since_when(keyring):
    keys, since_ms = signing.parse_trusted(f"# made by enrolment\n{keyring.first}\nsince={NOW_MS}\n{keyring.public_key}\n")
    assert ([signing.public_key_line(key) for key in keys], since_ms) == ([keyring.first, keyring.public_key], NOW_MS)
