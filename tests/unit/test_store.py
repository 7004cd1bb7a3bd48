"""What the warden keeps: it believes no bytes that it has not hashed itself, and survives being cut at any write."""

import hashlib

import msgspec
import pytest

from edge_agent.warden.store import Store, StoreFailed
from edge_agent.warden.verify import Refused
from skerry.wire.messages import Desired, ModelRef

CONTENT = b"model" * 1000
MODEL = ModelRef("m", 1, hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "warden")


def test_a_model_with_the_pinned_digest_is_admitted_read_only(store, tmp_path):
    (tmp_path / "in").write_bytes(CONTENT)
    store.admit(tmp_path / "in", MODEL)
    assert store.models() == {MODEL.sha256}
    path = store.model_path(MODEL.sha256)
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mode & 0o222 == 0
    (tmp_path / "in").write_bytes(b"changed afterwards")
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"!", CONTENT[:-1], CONTENT + b"more", b""])
def test_other_bytes_than_those_pinned_are_refused_and_leave_nothing(store, tmp_path, content):
    (tmp_path / "in").write_bytes(content)
    with pytest.raises(StoreFailed, match="another digest"):
        store.admit(tmp_path / "in", MODEL)
    assert store.models() == set()
    assert list((tmp_path / "warden" / "models").iterdir()) == []


def test_a_link_in_the_agents_folder_is_not_followed(store, tmp_path):
    (tmp_path / "target").write_bytes(CONTENT)
    (tmp_path / "in").symlink_to(tmp_path / "target")
    with pytest.raises(StoreFailed):
        store.admit(tmp_path / "in", MODEL)
    with pytest.raises(StoreFailed):
        store.admit(tmp_path / "missing", MODEL)
    assert store.models() == set()


def test_a_document_comes_back_as_saved_and_is_judged_again(store):
    document = Desired("f", "n", 3, 1)
    assert store.load_desired(lambda _: document) is None
    store.save_desired(b"first")
    store.save_desired(b"second")
    seen = []
    assert store.load_desired(lambda envelope: seen.append(envelope) or document) == document
    assert seen == [b"second"]

    def refuse(_: bytes) -> Desired:
        raise Refused("tampered with")

    with pytest.raises(Refused):
        store.load_desired(refuse)
    store.set_aside_desired()
    assert store.load_desired(refuse) is None


def test_what_an_earlier_warden_had_half_copied_is_swept_away(store, tmp_path):
    folder = tmp_path / "warden" / "models" / MODEL.sha256
    folder.mkdir()
    (folder / ".staging").write_bytes(CONTENT[:100])
    again = Store(tmp_path / "warden")
    assert again.models() == set()
    (tmp_path / "in").write_bytes(CONTENT)
    again.admit(tmp_path / "in", msgspec.structs.replace(MODEL))
    assert again.models() == {MODEL.sha256}
