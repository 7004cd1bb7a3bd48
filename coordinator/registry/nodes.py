"""Boxes: what they are, whether they are connected, what they report, what they were told."""

import functools
from collections.abc import Collection
from typing import Any, TypeVar, cast

import msgspec
from sqlite_utils import Database as Tables

from coordinator.core.liveness import Contact, Ear
from skerry.wire import codec
from skerry.wire.messages import Birth, Desired, Presence, Reported

T = TypeVar("T")

REMEMBERED = 8192
REMEMBERED_CHARS = 4096
"""What was decoded is remembered by its text, so many of at most so many characters: a plan reads every box's documents, and so does each
list of boxes, and between two of them few change. They are frozen."""


class Node(msgspec.Struct, frozen=True):
    """A box as the registry holds it; ``birth`` and ``reported`` are None until they came."""

    id: str
    online: bool
    changed_at_ms: int
    first_seen_ms: int
    session_epoch: int
    birth: Birth | None
    reported: Reported | None
    silent_since_ms: int = 0
    said_goodbye: bool = False
    is_lost: bool = False

    @property
    def contact(self) -> Contact:
        """Whether it is there, as core/liveness takes it."""
        return Contact(self.online, self.changed_at_ms, self.silent_since_ms)


def _own(text: str, kind: type[T]) -> T:
    if len(text) > REMEMBERED_CHARS:
        return codec.decode(text.encode(), kind, max_bytes=codec.NO_LIMIT_BYTES)
    hashable: Any = kind  # a generic type is not one to the type checker
    return cast("T", _remembered(text, hashable))


@functools.lru_cache(maxsize=REMEMBERED)
def _remembered(text: str, kind: type[Any]) -> Any:
    return codec.decode(text.encode(), kind, max_bytes=codec.NO_LIMIT_BYTES)


def _node(row: dict[str, Any]) -> Node:
    return Node(
        id=row["id"],
        online=bool(row["online"]),
        changed_at_ms=row["changed_at_ms"],
        first_seen_ms=row["first_seen_ms"],
        session_epoch=row["session_epoch"],
        birth=_own(row["birth"], Birth) if row["birth"] else None,
        reported=_own(row["reported"], Reported) if row["reported"] else None,
        silent_since_ms=row["silent_since_ms"],
        said_goodbye=bool(row["said_goodbye"]),
        is_lost=bool(row["is_lost"]),
    )


def read_nodes(tables: Tables) -> list[Node]:
    """Every box, by name."""
    return [_node(row) for row in tables.query("SELECT * FROM nodes ORDER BY id")]


def read_node(tables: Tables, node: str) -> Node | None:
    """One box."""
    return next((_node(row) for row in tables.query("SELECT * FROM nodes WHERE id = ?", [node])), None)


def _ensure(tables: Tables, node: str, now_ms: int) -> None:
    tables.execute(
        "INSERT OR IGNORE INTO nodes (id, online, changed_at_ms, first_seen_ms, session_epoch) VALUES (?, 0, ?, ?, 0)",
        [node, now_ms, now_ms],
    )


def save_presence(tables: Tables, node: str, presence: Presence, now_ms: int) -> bool:
    """Note a connection or its end; says whether the box's state changed. The will of an older session changes nothing."""
    _ensure(tables, node, now_ms)
    held = read_node(tables, node)
    assert held is not None  # noqa: S101 - just made
    if not presence.online and presence.session_epoch < held.session_epoch:
        return False
    if held.online == presence.online and held.session_epoch == presence.session_epoch:
        return False
    first = Contact(presence.online, now_ms, 0 if presence.online else now_ms)
    contact = held.contact.after(online=presence.online, now_ms=now_ms) if held.session_epoch else first
    goodbye = presence.is_goodbye and not presence.online
    tables.execute(
        "UPDATE nodes SET online = ?, session_epoch = ?, changed_at_ms = ?, silent_since_ms = ?, said_goodbye = ? WHERE id = ?",
        [int(presence.online), presence.session_epoch, contact.since_ms, contact.silent_since_ms, int(goodbye), node],
    )
    return held.online != presence.online


def save_lost(tables: Tables, node: str, *, is_lost: bool) -> None:
    """Note whether a box was silent for too long and is not steadily back."""
    tables.execute("UPDATE nodes SET is_lost = ? WHERE id = ?", [int(is_lost), node])


class Drained(msgspec.Struct, frozen=True):
    """A box that is to run nothing: since when, and why, in an operator's words."""

    at_ms: int
    reason: str

    @property
    def text(self) -> str:
        """As the planner and people are told."""
        return f"is drained: {self.reason}" if self.reason else "is drained"


def read_drained(tables: Tables) -> dict[str, Drained]:
    """By box."""
    return {row["node"]: Drained(row["at_ms"], row["reason"]) for row in tables.query("SELECT * FROM drained")}


def read_drained_one(tables: Tables, node: str) -> Drained | None:
    """Of one box."""
    return next((Drained(row["at_ms"], row["reason"]) for row in tables.query("SELECT * FROM drained WHERE node = ?", [node])), None)


def save_drained(tables: Tables, node: str, drained: Drained | None) -> None:
    """None where it may run things again."""
    if drained is None:
        tables.execute("DELETE FROM drained WHERE node = ?", [node])
        return
    tables.execute("INSERT OR REPLACE INTO drained (node, at_ms, reason) VALUES (?, ?, ?)", [node, drained.at_ms, drained.reason])


def ask_restart(tables: Tables, node: str, replica: str) -> None:
    """Have the next plan start a replica anew."""
    tables.execute("INSERT OR IGNORE INTO restarts (node, replica) VALUES (?, ?)", [node, replica])


def take_restarts(tables: Tables) -> dict[str, set[str]]:
    """By box, the replicas that were asked for, once: whoever takes them has the boxes told."""
    asked: dict[str, set[str]] = {}
    for row in list(tables.query("SELECT node, replica FROM restarts")):
        asked.setdefault(row["node"], set()).add(row["replica"])
    if asked:
        tables.execute("DELETE FROM restarts")
    return asked


def read_ear(tables: Tables) -> Ear:
    """The moment up to which silence is counted."""
    return Ear(next(tables.query("SELECT heard_until_ms FROM ear"))["heard_until_ms"])


def save_ear(tables: Tables, ear: Ear) -> None:
    """Keep it."""
    tables.execute("UPDATE ear SET heard_until_ms = ?", [ear.heard_until_ms])


def save_birth(tables: Tables, node: str, birth: Birth, now_ms: int) -> bool:
    """Keep an inventory; says whether it differs from the last.

    An agent that has not heard from its warden yet does not know which sandboxes there are: what was known of them holds, since a box
    that is taken for one without any would be told to stop all it runs.
    """
    _ensure(tables, node, now_ms)
    if not birth.rungs and not birth.rungs_absent:
        held = read_node(tables, node)
        if held is not None and held.birth is not None:
            birth = msgspec.structs.replace(birth, rungs=held.birth.rungs, rungs_absent=held.birth.rungs_absent)
    text = codec.encode(birth).decode()
    changed = tables.execute("UPDATE nodes SET birth = ? WHERE id = ? AND birth IS NOT ?", [text, node, text]).rowcount
    return changed > 0


def save_reported(tables: Tables, node: str, reported: Reported, now_ms: int) -> bool:
    """Keep a report; says whether it differs from the last."""
    _ensure(tables, node, now_ms)
    text = codec.encode(reported).decode()
    changed = tables.execute("UPDATE nodes SET reported = ? WHERE id = ? AND reported IS NOT ?", [text, node, text]).rowcount
    return changed > 0


def read_desired(tables: Tables) -> dict[str, Desired]:
    """What each box was last told, by box."""
    rows = tables.query("SELECT node, document FROM desired")
    return {row["node"]: _own(row["document"], Desired) for row in rows}


def read_some(tables: Tables, names: Collection[str]) -> list[Node]:
    """These boxes, by name; one that is not known is not there."""
    rows = tables.query("SELECT * FROM nodes WHERE id IN (SELECT value FROM json_each(?)) ORDER BY id", [_names(names)])
    return [_node(row) for row in rows]


def read_desired_of_some(tables: Tables, names: Collection[str]) -> dict[str, Desired]:
    """What each of these boxes was last told."""
    query = "SELECT node, document FROM desired WHERE node IN (SELECT value FROM json_each(?))"
    return {row["node"]: _own(row["document"], Desired) for row in tables.query(query, [_names(names)])}


def _names(names: Collection[str]) -> str:
    return codec.encode(sorted(names)).decode()


def read_desired_of(tables: Tables, node: str) -> Desired | None:
    """What one box was last told."""
    rows = tables.query("SELECT document FROM desired WHERE node = ?", [node])
    return next((_own(row["document"], Desired) for row in rows), None)


def ahead(node: Node, told: Desired | None) -> int:
    """The generation that a box says it holds, where that is newer than what it was told from here; 0 where it is not."""
    held = node.reported.generation if node.reported else 0
    return held if held > (told.generation if told else 0) else 0


def save_desired(tables: Tables, desired: Desired) -> None:
    """Keep what a box is told, before it is told."""
    tables.execute(
        "INSERT OR REPLACE INTO desired (node, generation, document) VALUES (?, ?, ?)",
        [desired.node, desired.generation, codec.encode(desired).decode()],
    )
