"""Each event stands in the registry once, whatever is sent again, in whatever order, and whatever day the box's disk is of."""

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

    def __init__(self, tmp) -> None:
        self.folder, self.number = tmp, 0
        self.outbox = Outbox(tmp / "o.db", most_bytes=2**23)

    def say(self) -> str:
        self.number += 1
        text = f"event {self.number}"
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
@settings(max_examples=80, deadline=None)
def test_each_event_is_kept_once_through_repeats_reorderings_and_restored_disks(tmp_path_factory, data):  # noqa: C901 - a story
    box, tables = Box(tmp_path_factory.mktemp("b")), registry()
    said: list[str] = []
    image: tuple[bytes, list[str]] | None = None
    sent: list[tuple[list, int]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        what = data.draw(st.sampled_from(["say", "say", "say", "send", "send", "again", "image", "restore"]))
        if what == "say":
            said.append(box.say())
        elif what == "image":
            image = box.image()
        elif what == "restore" and image is not None:
            lost = set(box.waiting()) - set(image[1])
            registered = {row["text"] for row in tables.query("SELECT text FROM events")}
            said = [text for text in said if text not in lost or text in registered]  # those are gone with the disk
            box.restore(image[0])
            said.append(box.say())  # an agent that starts says so, before anything else
        elif what == "send":
            batch = box.outbox.events_after(0, data.draw(st.integers(1, 8)))
            if batch:
                sent.append((batch, box.outbox.oldest_event()))
                deliver(tables, box, batch, box.outbox.oldest_event())
        elif sent:  # what a broker still held
            batch, oldest = data.draw(st.sampled_from(sent))
            if batch[0].epoch == box.outbox.epoch:
                save_events(tables, "n", data.draw(st.permutations(batch)), oldest=oldest, dropped=0, now_ms=1)
    for _ in range(100):
        batch = box.outbox.events_after(0, 100)
        if not batch:
            break
        deliver(tables, box, batch, box.outbox.oldest_event())
    assert box.waiting() == []
    kept = [row["text"] for row in tables.query("SELECT text FROM events")]
    assert sorted(kept) == sorted(set(kept)), "none twice"
    assert set(said) <= set(kept), "none missing"
    box.outbox.close()


def deliver(tables: Database, box: Box, batch: list, oldest: int) -> None:
    kept = save_events(tables, "n", batch, oldest=oldest, dropped=0, now_ms=1)
    box.outbox.confirm_events(batch[0].epoch, kept.settled, is_spent=kept.is_spent)
