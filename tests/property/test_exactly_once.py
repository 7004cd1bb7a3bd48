"""Each event stands in the registry once, whatever is sent again, in whatever order, and whatever day the box's disk is of."""

import itertools
import sqlite3

from hypothesis import given, settings
from hypothesis import strategies as st
from sqlite_utils import Database

from coordinator.registry.events import save_events
from coordinator.registry.migrations import migrate
from edge_agent.link.outbox import Outbox


class Box:
    """An agent's outbox in memory, of which images can be taken; ``said`` is every event that it ever made and that was not lost with
    an image."""

    def __init__(self, tmp, name: str = "event") -> None:
        self.folder, self.number, self.name = tmp, 0, name
        self.outbox = Outbox(tmp / "o.db", most_bytes=2**23)

    def say(self) -> str:
        self.number += 1
        text = f"{self.name} {self.number}"
        self.outbox.add_event("kind", "s", text, at_ms=self.number)
        return text

    def image(self) -> tuple[bytes, list[str]]:
        self.outbox.close()
        content = (self.folder / "o.db").read_bytes()
        self.outbox = Outbox(self.folder / "o.db", most_bytes=2**23)
        return content, self.waiting()

    def restore(self, content: bytes) -> None:
        self.outbox.close()
        for path in self.folder.glob("o.db*"):
            path.unlink()
        (self.folder / "o.db").write_bytes(content)
        self.outbox = Outbox(self.folder / "o.db", most_bytes=2**23)

    def waiting(self) -> list[str]:
        return [event.text for event in self.outbox.events_after(0, 10**6)]


def registry() -> Database:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    migrate(connection)
    return Database(connection)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_each_event_is_kept_once_through_repeats_reorderings_restored_disks_and_copies(tmp_path_factory, data):  # noqa: C901, PLR0912 - a story
    box, tables = Box(tmp_path_factory.mktemp("b")), registry()
    boxes = [box]
    said: list[str] = []
    image: tuple[bytes, list[str]] | None = None
    sent: list[tuple[Box, list, int]] = []
    nonce = 0
    for _ in range(data.draw(st.integers(1, 30))):
        what = data.draw(st.sampled_from(["say", "say", "say", "send", "send", "send", "again", "image", "restore", "copy"]))
        one = data.draw(st.sampled_from(boxes))
        if what == "say":
            said.append(one.say())
        elif what == "image":
            image = box.image()
        elif what == "copy" and image is not None and len(boxes) == 1:
            boxes.append(Box(tmp_path_factory.mktemp("c"), "copy"))
            boxes[1].restore(image[0])
            said.append(boxes[1].say())
        elif what == "restore" and image is not None and len(boxes) == 1:
            lost = set(box.waiting()) - set(image[1])
            registered = {row["text"] for row in tables.query("SELECT text FROM events")}
            said = [text for text in said if text not in lost or text in registered]  # those are gone with the disk
            box.restore(image[0])
            said.append(box.say())  # an agent that starts says so, before anything else
        elif what == "send":
            batch = one.outbox.events_after(0, data.draw(st.integers(1, 8)))
            if batch:
                nonce += 1
                sent.append((one, batch, one.outbox.oldest_event()))
                deliver(tables, one, batch, one.outbox.oldest_event(), nonce=f"{nonce}", cuts=data.draw(st.sets(st.integers(1, 7))))
        elif sent:  # what a broker still held
            whose, batch, oldest = data.draw(st.sampled_from(sent))
            if batch[0].epoch == whose.outbox.epoch:
                save_events(tables, "n", data.draw(st.permutations(batch)), oldest=oldest, dropped=0, now_ms=1)
    for round_ in range(100):
        for one in boxes:
            if batch := one.outbox.events_after(0, 100):
                deliver(tables, one, batch, one.outbox.oldest_event(), nonce=f"last {round_}")
    assert [one.waiting() for one in boxes] == [[] for _ in boxes]
    kept = [row["text"] for row in tables.query("SELECT text FROM events")]
    assert sorted(kept) == sorted(set(kept)), "none twice"
    assert set(said) <= set(kept), "none missing"
    for one in boxes:
        one.outbox.close()


def deliver(tables: Database, box: Box, batch: list, oldest: int, *, nonce: str, cuts: frozenset = frozenset()) -> None:
    """In several messages on one connection, each on its way before the answer to the one before has come."""
    edges = sorted({0, len(batch), *(cut for cut in cuts if cut < len(batch))})
    parts = [batch[begin:end] for begin, end in itertools.pairwise(edges)]
    answers = [save_events(tables, "n", part, oldest=oldest, dropped=0, now_ms=1, nonce=nonce) for part in parts]
    for part, kept in zip(parts, answers, strict=True):
        box.outbox.confirm_events(part[0].epoch, kept.settled, is_spent=kept.is_spent)
