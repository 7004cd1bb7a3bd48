"""Records of who changed what, chained by their digests: whoever holds one digest knows that nothing before it was touched."""

import hashlib
from collections.abc import Iterable

import msgspec

GENESIS = "0" * 64
"""What the first record follows."""


class Record(msgspec.Struct, frozen=True):
    """A change: who made it, how they had shown who they are, from which address; and what it was before and is now, as text.

    ``sha256`` covers all other fields, ``previous`` among them, which is the record's before it.
    """

    id: int
    at_ms: int
    who: str
    via: str
    address: str
    action: str
    subject: str
    before: str
    after: str
    previous: str
    sha256: str = ""


class AuditPage(msgspec.Struct, frozen=True):
    """Records, and the greatest number that any record ever had: where the last record's is less, those at the end are gone."""

    records: list[Record]
    last_id: int


class Broken(Exception):
    """The chain does not hold; the text says where, and what that means."""


def digest(record: Record) -> str:
    """SHA-256 over the fields as a JSON list, which has no two readings."""
    fields = [getattr(record, name) for name in Record.__struct_fields__ if name != "sha256"]
    return hashlib.sha256(msgspec.json.encode(fields)).hexdigest()


def sealed(record: Record) -> Record:
    """The record with its digest."""
    return msgspec.structs.replace(record, sha256=digest(record))


class Chain:
    """Follows records from the first on."""

    def __init__(self) -> None:
        self.count = 0
        self.head = GENESIS

    def follow(self, records: Iterable[Record]) -> None:
        """Take the next ones. Raises Broken."""
        for record in records:
            if record.id != self.count + 1:
                if record.id <= self.count:
                    raise Broken(f"record {record.id} comes after record {self.count}")
                gone = f"record {self.count + 1} is" if record.id == self.count + 2 else f"records {self.count + 1} to {record.id - 1} are"
                raise Broken(f"{gone} missing")
            if record.sha256 != digest(record):
                raise Broken(f"record {record.id} was changed: its digest is another")
            if record.previous != self.head:
                raise Broken(f"record {record.id} does not follow the one before it: that one was changed, or written anew")
            self.count, self.head = record.id, record.sha256

    def close(self, last_id: int) -> None:
        """There are no more. Raises Broken where ``last_id``, the greatest number that was ever given out, is another."""
        if self.count < last_id:
            raise Broken(f"the end is missing: record {last_id} was written, the last one here is {self.count}")
        if self.count > last_id:
            raise Broken(f"record {self.count} is here, and {last_id} is the greatest number that was given out")
