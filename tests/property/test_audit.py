"""Whatever is done to a chain of records is found. The oracle compares with the records as they were written."""

import hashlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlite_utils import Database

from coordinator.registry import audit
from coordinator.registry.migrations import STEPS
from skerry.wire.audit import GENESIS, Broken, Chain, Record, digest, sealed

TEXTS = st.text(max_size=12)
CHANGES = st.lists(st.tuples(TEXTS, TEXTS, TEXTS, TEXTS), min_size=1, max_size=8)
FIELDS = [name for name in Record.__struct_fields__ if name not in ("id", "at_ms")]


def written(changes: list[tuple[str, str, str, str]]) -> list[Record]:
    """Records as the registry writes them."""
    tables = Database(memory=True)
    tables.conn.executescript(STEPS[4])
    for at_ms, (who, subject, before, after) in enumerate(changes):
        audit.append(tables, audit.Actor(who, "test", "127.0.0.1"), "test.changed", subject, before=before, after=after, now_ms=at_ms)
    page = audit.read_after(tables, 0, limit=1000)
    tables.close()
    assert page.last_id == len(changes)
    return page.records


def holds(records: list[Record], last_id: int) -> bool:
    chain = Chain()
    try:
        chain.follow(records)
        chain.close(last_id)
    except Broken:
        return False
    return True


@given(CHANGES)
def test_what_was_written_holds_in_one_piece_and_in_any_pieces(changes):
    records = written(changes)
    assert holds(records, len(records))
    chain = Chain()
    for record in records:
        chain.follow([record])
    assert (chain.count, chain.head) == (len(records), records[-1].sha256)


@settings(max_examples=400)
@given(CHANGES, st.data())
def test_a_record_that_is_changed_removed_moved_or_added_is_found(changes, data):
    records = written(changes)
    at = data.draw(st.integers(0, len(records) - 1))
    kind = data.draw(st.sampled_from(["change", "change and seal", "remove", "repeat", "swap", "time", "split"]))
    tampered = list(records)
    record = records[at]
    match kind:
        case "change" | "change and seal":
            name = data.draw(st.sampled_from(FIELDS[:-1] if kind == "change and seal" else FIELDS))
            changed = msgspec.structs.replace(record, **{name: data.draw(TEXTS)})
            tampered[at] = sealed(changed) if kind == "change and seal" else changed
        case "remove":
            del tampered[at]
        case "repeat":
            tampered.insert(at, record)
        case "swap":
            other = data.draw(st.integers(0, len(records) - 1))
            tampered[at], tampered[other] = tampered[other], tampered[at]
        case "time":
            tampered[at] = msgspec.structs.replace(record, at_ms=record.at_ms + 1)
        case "split":  # the same letters in other fields
            tampered[at] = msgspec.structs.replace(record, who=record.who + record.subject, subject="")
    # The last record, sealed anew, is one that could have been written: who noted its digest finds it, and nothing else can.
    if kind == "change and seal" and at == len(records) - 1 and tampered[at].previous == record.previous:
        chain = Chain()
        chain.follow(tampered)
        assert (chain.head == records[-1].sha256) == (tampered == records)
    else:
        assert holds(tampered, len(records)) == (tampered == records)


@given(CHANGES, st.integers(1, 3))
def test_an_end_that_is_cut_off_is_found(changes, cut):
    records = written(changes)
    assert not holds(records[:-cut], len(records))
    assert not holds(records, len(records) - cut)


def test_the_digest_is_the_published_one():
    """So that other programs can check an export: SHA-256 over the JSON list of the fields in their order, the digest aside."""
    record = Record(1, 2, "ada", "session", "::1", "user.role", "vera", 'a "b"', "é\n", GENESIS)
    text = '[1,2,"ada","session","::1","user.role","vera","a \\"b\\"","é\\n","' + "0" * 64 + '"]'
    assert digest(record) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("statement", ["UPDATE audit SET after = 'x'", "DELETE FROM audit"])
def test_the_registry_itself_changes_and_removes_no_record(statement):
    tables = Database(memory=True)
    tables.conn.executescript(STEPS[4])
    audit.append(tables, audit.Actor("a", "test"), "test.changed", "s", now_ms=1)
    with pytest.raises(Exception, match="audit records are not"):
        tables.conn.execute(statement)
    tables.close()
