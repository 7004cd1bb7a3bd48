"""What happened in the warden is kept across kill -9, a full disk and a damaged file; what can't be kept is counted."""

import shutil
import signal
import sqlite3
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.warden.journal import BATCH, PENDING, Journal
from tests.conftest import fill


def texts(journal: Journal, after: int = 0) -> list[str]:
    """All entries, batch by batch."""
    found = []
    while entries := journal.after(after).entries:
        found += [entry.text for entry in entries]
        after = entries[-1].seq
    return found


def add(journal: Journal, *words: str) -> None:
    for word in words:
        journal.add("kind", "subject", word, at_ms=7)


def test_entries_are_numbered_and_kept_with_their_journal_across_a_restart(tmp_path):
    journal = Journal(tmp_path / "j.db", most=100)
    add(journal, "one", "two")
    journal.close()
    again = Journal(tmp_path / "j.db", most=100)
    assert again.id == journal.id
    add(again, "three")
    held = again.after(0)
    assert [(entry.seq, entry.kind, entry.subject, entry.at_ms, entry.text) for entry in held.entries] == [
        (number, "kind", "subject", 7, word) for number, word in enumerate(["one", "two", "three"], 1)
    ]
    assert (held.journal, held.lost) == (journal.id, 0)
    again.close()


def test_whoever_listens_hears_of_an_entry_once_it_can_be_read(tmp_path):
    journal = Journal(tmp_path / "j.db", most=100)
    heard = []
    journal.on_add = lambda: heard.append(texts(journal))
    add(journal, "one", "two")
    assert heard == [["one"], ["one", "two"]]
    journal.close()


def test_over_the_bound_the_oldest_go_and_are_counted(tmp_path):
    journal = Journal(tmp_path / "j.db", most=10)
    add(journal, *map(str, range(25)))
    assert (texts(journal), journal.after(0).lost) == ([str(number) for number in range(15, 25)], 15)
    journal.close()
    again = Journal(tmp_path / "j.db", most=10)
    assert again.after(0).lost == 15
    again.close()


def test_what_the_outbox_has_is_forgotten_without_being_counted_and_its_numbers_do_not_come_again(tmp_path):
    journal = Journal(tmp_path / "j.db", most=10)
    add(journal, "one", "two", "three")
    journal.forget(2)
    assert texts(journal) == ["three"]
    journal.forget(3)
    journal.close()
    again = Journal(tmp_path / "j.db", most=10)
    add(again, "four")
    assert [(entry.seq, entry.text) for entry in again.after(0).entries] == [(4, "four")]
    assert again.after(0).lost == 0
    again.close()


def test_a_batch_is_bounded(tmp_path):
    journal = Journal(tmp_path / "j.db", most=10_000)
    add(journal, *["x"] * (BATCH + 1))
    assert len(journal.after(0).entries) == BATCH
    assert len(journal.after(BATCH).entries) == 1
    journal.close()


def test_an_entry_is_never_longer_than_what_a_line_of_the_socket_holds(tmp_path):
    journal = Journal(tmp_path / "j.db", most=10)
    add(journal, "x" * 1_000_000)
    assert texts(journal) == ["x" * 2000]
    journal.close()


@given(st.lists(st.one_of(st.just("add"), st.integers(0, 14), st.just("restart")), max_size=30), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_each_entry_is_held_forgotten_or_counted_as_lost(tmp_path_factory, calls, most):
    path = tmp_path_factory.mktemp("j") / "j.db"
    journal = Journal(path, most=most)
    held, added, lost = {}, 0, 0
    for call in calls:
        if call == "add":
            added += 1
            add(journal, f"entry {added}")
            held[added] = f"entry {added}"
            for old in [number for number in held if number <= added - most]:
                del held[old]
                lost += 1
        elif call == "restart":
            journal.close()
            journal = Journal(path, most=most)
        else:
            journal.forget(call)
            held = {number: text for number, text in held.items() if number > call}
        told = journal.after(0)
        assert {entry.seq: entry.text for entry in told.entries} == held
        assert told.lost == lost
    journal.close()


@pytest.mark.parametrize("damage", ["not a database", "cut", "pages", "another schema"])
def test_a_damaged_file_is_set_aside_and_a_new_journal_begins(tmp_path, damage):
    path = tmp_path / "j.db"
    journal = Journal(path, most=1000)
    add(journal, *["x" * 1500] * 100)
    journal.close()
    content = path.read_bytes()
    match damage:
        case "not a database":
            path.write_bytes(b"\x00\xff" * 5000)
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "pages":  # as a worn-out flash card leaves it: the file opens, and what it holds can't be read
            path.write_bytes(content[: 5 * 4096] + b"\xff" * (len(content) - 5 * 4096))
        case "another schema":
            path.unlink()
            with sqlite3.connect(path) as db:
                db.execute("CREATE TABLE journal (x)")
            db.close()
    before = path.read_bytes()
    again = Journal(path, most=1000)
    assert again.id != journal.id, "a new journal must not be taken for the old"
    assert damage == "another schema" or (tmp_path / "j.corrupt").read_bytes() == before, "kept for a person to look at"
    add(again, "after")
    assert texts(again) == ["after"]
    crashed = tmp_path / "crashed"  # what a power cut would leave now
    crashed.mkdir()
    for left in tmp_path.glob("j.db*"):
        shutil.copy(left, crashed)
    survivor = Journal(crashed / "j.db", most=1000)
    assert (survivor.id, texts(survivor)) == (again.id, ["after"])
    survivor.close()
    again.close()


def test_what_was_written_survives_kill_9(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from edge_agent.warden.journal import Journal
journal = Journal(Path({str(tmp_path)!r}) / "j.db", most=100)
journal.add("kind", "subject", "the last words", at_ms=7)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    journal = Journal(tmp_path / "j.db", most=100)
    assert texts(journal) == ["the last words"]
    journal.close()


def test_a_full_disk_makes_entries_wait_in_memory_and_they_are_written_in_order_once_there_is_room(small_disk):
    journal = Journal(small_disk / "j.db", most=1000)
    add(journal, "before")
    fill(small_disk)
    waiting = [f"{number} {'x' * 1000}" for number in range(30)]
    add(journal, *waiting)
    journal.forget(0)
    journal.flush()
    assert texts(journal)[0] == "before"
    assert len(texts(journal)) < 31, "the disk was not full"
    (small_disk / "filler").unlink()
    journal.flush()
    assert texts(journal) == ["before", *waiting]
    assert journal.after(0).lost == 0
    journal.close()


def test_what_finds_no_room_in_memory_either_is_counted(small_disk):
    journal = Journal(small_disk / "j.db", most=10_000)
    fill(small_disk)
    add(journal, *map(str, range(PENDING + 50)))
    assert (texts(journal), journal.after(0).lost) == ([], 50)
    (small_disk / "filler").unlink()
    journal.flush()
    assert journal.after(0).lost == 50
    journal.close()
    again = Journal(small_disk / "j.db", most=10_000)
    assert again.after(0).lost == 50
    assert texts(again) == [str(number) for number in range(50, PENDING + 50)]
    again.close()


@pytest.mark.parametrize("cleanly", [True, False])
def test_a_warden_that_starts_on_a_full_disk_keeps_its_journal(small_disk, cleanly):
    journal = Journal(small_disk / "j.db", most=100)
    add(journal, "before")
    if cleanly:
        journal.close()
    fill(small_disk)
    if not cleanly:
        journal.close()
    again = Journal(small_disk / "j.db", most=100)
    assert again.id == journal.id
    assert not list(small_disk.glob("*.corrupt"))
    add(again, "on a full disk " + "x" * 1900)
    (small_disk / "filler").unlink()
    again.flush()
    assert [text[:14] for text in texts(again)] == ["before", "on a full disk"]
    again.close()


def test_a_journal_that_can_not_begin_for_want_of_room_sets_nothing_aside(small_disk):
    fill(small_disk)
    with pytest.raises(sqlite3.OperationalError, match="full"):
        Journal(small_disk / "new.db", most=100)
    assert not list(small_disk.glob("*corrupt*"))
