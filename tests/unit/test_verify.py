"""A box acts on documents that its coordinator signed for it, and on no older one than it holds."""

import contextlib
import itertools

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.warden.trust import Trust
from edge_agent.warden.verify import Refused, judge
from skerry.wire import signing
from skerry.wire.messages import Desired, ModelRef, ReplicaSpec

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
NEXT_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
DIGEST = "0123456789abcdef" * 4


def replica(name: str = "d-0", digest: str = DIGEST) -> ReplicaSpec:
    return ReplicaSpec(name, "d", 1, ModelRef("m", 1, digest, 1), memory_bytes=1, cpus=1.0)


def doc(generation: int = 5, *replicas: ReplicaSpec, fleet: str = "f", node: str = "n") -> Desired:
    return Desired(fleet, node, generation, issued_at_ms=1, replicas=list(replicas))


def judged(
    document: Desired, *, key: Ed25519PrivateKey = KEY, held: Desired | None = None, context: bytes = signing.DESIRED_CONTEXT
) -> Desired:
    envelope = signing.sign(document, key, context=context)
    return judged_bytes(envelope, NEXT_KEY, KEY, held=held)


def judged_bytes(envelope: bytes, *trusted: Ed25519PrivateKey, held: Desired | None = None) -> Desired:
    trust = Trust([signing.public_key_line(key.public_key()) for key in trusted])
    return judge(envelope, trust=trust, fleet="f", node="n", held=held)[0]


def test_a_document_for_this_box_is_taken_as_it_was_signed():
    document = doc(5, replica("d-0"), replica("d-1"))
    assert judged(document) == document


def test_either_of_two_keys_is_believed_while_they_are_being_exchanged():
    assert judged(doc(), key=NEXT_KEY) == doc()


def test_what_is_held_already_is_taken_again_and_so_is_what_is_newer():
    held = doc(5, replica())
    assert judged(held, held=held) == held
    assert judged(doc(6), held=held) == doc(6)


@pytest.mark.parametrize(
    ("document", "word"),
    [
        (doc(node="other"), "f/other, this box is f/n"),
        (doc(fleet="other"), "other/n, this box is f/n"),
        (doc(4), "4 is older than 5"),
        (doc(-1), "Expected `int` >= 0 - at `$.generation`".replace("$", r"\$")),
        (doc(5, replica()), "another document of generation 5"),
        (doc(6, replica("../x")), "'../x' is not a name"),
        (doc(6, replica("")), "'' is not a name"),
        (doc(6, replica("a"), replica("a")), "given twice"),
        (doc(6, replica(digest="../../etc/passwd")), "is not a SHA-256 digest"),
        (doc(6, replica(digest=DIGEST.upper())), "is not a SHA-256 digest"),
        (doc(6, replica(digest=DIGEST[:-1])), "is not a SHA-256 digest"),
        (doc(6, replica(digest=DIGEST[:-1] + "\n")), "is not a SHA-256 digest"),
        (doc(6, replica("good"), replica(digest="")), "is not a SHA-256 digest"),
    ],
)
def test_a_signed_document_that_is_not_for_now_and_here_is_refused_with_the_reason(document, word):
    with pytest.raises(Refused, match=word.replace(".", r"\.")):
        judged(document, held=doc(5))


def test_a_stranger_and_another_purpose_are_refused():
    with pytest.raises(Refused, match="not trusted"):
        judged(doc(), key=Ed25519PrivateKey.from_private_bytes(bytes(32)))
    with pytest.raises(Refused, match="signature"):
        judged(doc(), context=b"skerry something else v1")


def test_a_box_with_no_key_believes_nobody():
    with pytest.raises(Refused, match="not trusted"):
        judged_bytes(signing.sign(doc(), KEY, context=signing.DESIRED_CONTEXT))


def test_the_signed_document_of_one_kind_with_the_fields_of_another_is_refused():
    envelope = signing.sign({"fleet": "f", "node": "n", "generation": "5"}, KEY, context=signing.DESIRED_CONTEXT)
    with pytest.raises(Refused, match="generation"):
        judged_bytes(envelope, KEY)


@given(st.one_of(st.binary(max_size=60), st.tuples(st.integers(0, 400), st.integers(1, 255))))
@settings(max_examples=200, deadline=None)
def test_bytes_from_the_network_are_refused_in_one_way_and_never_believed_to_say_something_else(damage):
    envelope = bytearray(signing.sign(doc(5, replica()), KEY, context=signing.DESIRED_CONTEXT))
    if isinstance(damage, bytes):
        envelope = bytearray(damage)
    else:
        envelope[damage[0] % len(envelope)] ^= damage[1]
    with contextlib.suppress(Refused):
        assert judged_bytes(bytes(envelope), KEY) == doc(5, replica())


@given(st.permutations([doc(generation, *replicas) for generation, replicas in itertools.product((1, 2, 3), ((), (replica(),)))]))
@settings(max_examples=100, deadline=None)
def test_however_documents_are_repeated_and_reordered_the_generation_never_falls_and_none_has_two_meanings(arriving):
    held, meant = None, {}
    for document in [*arriving, *arriving]:
        try:
            taken = judged(document, held=held)
        except Refused:
            continue
        assert held is None or taken.generation >= held.generation
        assert meant.setdefault(taken.generation, taken) == taken
        held = taken
    assert held is not None
    assert held.generation == 3


def test_fields_of_a_newer_coordinator_are_passed_over():
    payload = msgspec.json.decode(msgspec.json.encode(doc()))
    envelope = signing.sign({**payload, "newer": [1]}, KEY, context=signing.DESIRED_CONTEXT)
    assert judged_bytes(envelope, KEY) == doc()
