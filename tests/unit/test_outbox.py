"""What the coordinator has not confirmed is held, each thing once, bounded and counted, on a full disk and after a crash too."""

import shutil
import sqlite3
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.core.thinning import Row, run_of
from edge_agent.link.outbox import ROUTED_PER_MINUTE, Loss, Outbox, OutboxFailed
from skerry.wire import codec
from skerry.wire.box import Entry, GatewayTotals, Routed
from skerry.wire.messages import EventBatch, Sample, ServeSample
from tests.conftest import fill

MOST_BYTES = 4 * 2**20


@pytest.fixture
def open_outbox(tmp_path):
    """Opens the same file again and again; an open one is closed first."""
    opened: list[Outbox] = []

    def open_it(*, most_bytes: int = MOST_BYTES, folder=tmp_path) -> Outbox:
        for outbox in opened:
            outbox.close()
        opened[:] = [Outbox(folder / "o.db", most_bytes=most_bytes)]
        return opened[0]

    yield open_it
    for outbox in opened:
        outbox.close()


def events(outbox: Outbox, after: int = 0) -> list[tuple[int, str]]:
    return [(event.seq, event.text) for event in outbox.events_after(after, 1_000_000)]


def entry(seq: int) -> Entry:
    return Entry(seq, at_ms=7, kind="kind", subject="subject", text=f"entry {seq}")


def sampled(outbox: Outbox, *, sent_at_ms: int = 0) -> int:
    """Take a sample as telemetry does; its number."""
    sample = Sample(outbox.epoch, outbox.next_sample_seq(), at_ms=7, cpu_ratio=0.5, memory_used_bytes=1)
    outbox.add_sample(sample, sent_at_ms=sent_at_ms)
    return sample.seq


def numbers(outbox: Outbox) -> list[int]:
    return [sample.seq for sample in outbox.samples_after(0, 10_000)]


def test_an_event_stays_until_the_coordinator_confirms_it_in_the_right_epoch(open_outbox):
    outbox = open_outbox()
    for word in ("one", "two", "three"):
        outbox.add_event("kind", "subject", word, at_ms=7)
    outbox.confirm_events("another epoch", 3)
    assert events(outbox) == [(1, "one"), (2, "two"), (3, "three")]
    outbox.confirm_events(outbox.epoch, 2)
    outbox.confirm_events(outbox.epoch, 1)
    assert events(outbox) == [(3, "three")]
    assert (outbox.oldest_event(), outbox.depth(), outbox.lost()) == (3, (1, 0), (0, 0))
    held = outbox.events_after(0, 1)[0]
    assert (held.epoch, held.kind, held.subject, held.at_ms) == (outbox.epoch, "kind", "subject", 7)


def test_numbers_go_on_after_all_was_confirmed_and_the_file_opened_again(open_outbox):
    outbox = open_outbox()
    outbox.add_event("kind", text="one", at_ms=7)
    outbox.confirm_events(outbox.epoch, 1)
    again = open_outbox()
    assert again.epoch == outbox.epoch
    again.add_event("kind", text="two", at_ms=7)
    assert events(again) == [(2, "two")]


def test_each_connection_has_a_number_of_its_own_across_restarts(open_outbox):
    seen = [open_outbox().next_session() for _ in range(3)]
    outbox = open_outbox()
    assert [*seen, outbox.next_session(), outbox.next_session()] == [1, 2, 3, 4, 5]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_each_entry_of_the_warden_is_taken_over_once_whatever_is_repeated_and_however_often_either_starts_again(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("o") / "o.db"
    outbox = Outbox(path, most_bytes=MOST_BYTES)
    for _ in range(data.draw(st.integers(1, 12))):
        first = data.draw(st.integers(1, 12))
        batch = [entry(seq) for seq in range(first, first + data.draw(st.integers(0, 4)))]
        journal, reached = outbox.journal_position()
        assert journal in ("", "j")
        if batch and batch[0].seq <= reached + 1:  # the warden sends from where it is asked to, or from earlier
            if data.draw(st.booleans()):
                batch = data.draw(st.permutations([*batch, data.draw(st.sampled_from(batch))]))
            outbox.add_entries("j", batch)
            assert outbox.journal_position() == ("j", max([reached, *(one.seq for one in batch)]))
        if data.draw(st.booleans()):
            outbox.close()
            outbox = Outbox(path, most_bytes=MOST_BYTES)
        reached = outbox.journal_position()[1]
        assert events(outbox) == [(seq, f"entry {seq}") for seq in range(1, reached + 1)]
    outbox.close()


def test_a_new_journal_is_not_taken_for_the_old_one(open_outbox):
    outbox = open_outbox()
    outbox.add_entries("old", [entry(1), entry(2)])
    outbox.add_entries("new", [entry(1)])
    outbox.add_entries("new", [entry(1), entry(2)])
    assert [text for _, text in events(outbox)] == ["entry 1", "entry 2", "entry 1", "entry 2"]
    assert outbox.journal_position() == ("new", 2)


def test_an_agent_killed_while_it_takes_over_has_each_entry_once_and_knows_how_far_it_came(tmp_path, open_outbox):
    code = f"""
from pathlib import Path
from edge_agent.link.outbox import Outbox
from skerry.wire.box import Entry
outbox = Outbox(Path({str(tmp_path)!r}) / "o.db", most_bytes=2**30)
for first in range(1, 10_000_000, 100):
    outbox.add_entries("j", [Entry(seq, 7, "kind", text=f"entry {{seq}}") for seq in range(first, first + 100)])
    print("taken over", first + 99, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as agent:
        assert b"taken over 500\n" in iter(agent.stdout.readline, b"")  # its log stands there too
        time.sleep(0.02)
        agent.kill()
    outbox = open_outbox(most_bytes=2**30)
    journal, reached = outbox.journal_position()
    assert (journal, reached % 100) == ("j", 0)
    assert reached >= 500
    assert [text for _, text in events(outbox)] == [f"entry {seq}" for seq in range(1, reached + 1)]


def totals(started_at_ms: int, *seqs: int) -> GatewayTotals:
    return GatewayTotals(started_at_ms, "box", "edge", routed=[Routed(seq, 7, "d", f"{started_at_ms}/{seq}") for seq in seqs])


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_each_decision_of_the_gateway_is_an_event_once_whatever_is_repeated_and_whoever_starts_again(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("o") / "o.db"
    outbox = Outbox(path, most_bytes=MOST_BYTES)
    started, newest, minute, told, passed, taken = 1, 0, 100, [], 0, 0
    for _ in range(data.draw(st.integers(1, 12))):
        match data.draw(st.sampled_from(["ask", "ask", "decide", "agent", "gateway", "minute"])):
            case "decide":
                newest += data.draw(st.integers(1, 15))
            case "agent":
                outbox.close()
                outbox = Outbox(path, most_bytes=MOST_BYTES)
            case "gateway":
                started, newest, passed = started + 1, data.draw(st.integers(0, 5)), 0
            case "minute":
                minute, taken = minute + 1, 0
        held = range(max(1, newest - 9), newest + 1)  # the gateway keeps the last ten
        outbox.add_routed("request.routed", totals(started, *data.draw(st.permutations(held))), at_ms=minute * 60_000)
        fresh = [f"{started}/{seq}" for seq in held if seq > passed]
        while len(fresh) > ROUTED_PER_MINUTE - taken:
            del fresh[0]
        told, passed, taken = told + fresh, max(passed, newest), taken + len(fresh)
        assert [text for _, text in events(outbox)] == told
    outbox.close()


def test_all_decisions_come_while_they_are_few_and_twenty_in_a_minute_at_most(open_outbox):
    outbox = open_outbox()
    outbox.add_routed("request.routed", totals(1, 1, 2, 3), at_ms=60_000)
    outbox.add_routed("request.routed", totals(1, 2, 3, 4), at_ms=61_000)
    assert [text for _, text in events(outbox)] == ["1/1", "1/2", "1/3", "1/4"]
    outbox.add_routed("request.routed", totals(1, *range(5, 50)), at_ms=62_000)
    room = ROUTED_PER_MINUTE - 4
    assert [text for _, text in events(outbox, after=4)] == [f"1/{seq}" for seq in range(50 - room, 50)], "the newest"
    again = open_outbox()
    again.add_routed("request.routed", totals(1, 50), at_ms=119_999)
    again.add_routed("request.routed", totals(2, 1), at_ms=119_999)
    assert len(events(again)) == ROUTED_PER_MINUTE, "an agent that starts again has no more of them, nor a gateway that does"
    again.add_routed("request.routed", totals(2, 1, 2), at_ms=120_000)
    assert [text for _, text in events(again, after=ROUTED_PER_MINUTE)] == ["2/2"], "what was passed over does not come late"
    first = again.events_after(0, 1)[0]
    assert (first.kind, first.subject, first.at_ms) == ("request.routed", "d", 7)


@pytest.mark.parametrize("at_ms", [-1, 2**63, 2**70, 4_102_444_800_001])
def test_a_decision_of_a_gateway_in_an_enemys_hands_keeps_no_other_event_from_the_coordinator(open_outbox, at_ms):
    outbox = open_outbox()
    sick = [Routed(1, at_ms, "d" * 1000, "x" * 100_000), Routed(-5, 7, "d", "no number"), Routed(2**80, 7, "d", "too large a number")]
    outbox.add_routed("request.routed", GatewayTotals(1, "box", "edge", routed=sick), at_ms=60_000)
    outbox.add_routed("request.routed", GatewayTotals(2**80, "box", "edge", routed=[Routed(1, 7, "d", "no time")]), at_ms=60_000)
    outbox.add_event("kind", text="after", at_ms=7)
    held = codec.decode(codec.encode(EventBatch(outbox.events_after(0, 10))), EventBatch).events
    assert [(event.at_ms, len(event.text)) for event in held] == [(60_000, 500), (7, 5)]


def test_decisions_that_a_full_disk_refused_are_taken_once_there_is_room(small_disk, open_outbox):
    outbox = open_outbox()
    fill(small_disk)
    large = GatewayTotals(1, "box", "edge", routed=[Routed(seq, 7, "d", "x" * 500) for seq in range(1, 20)])

    def fill_up() -> None:
        for minute in range(1, 50):
            outbox.add_routed("request.routed", GatewayTotals(minute, "box", "edge", routed=large.routed), at_ms=minute * 60_000)

    with pytest.raises(OutboxFailed):
        fill_up()
    (small_disk / "filler").unlink()
    before = len(events(outbox))
    outbox.add_routed("request.routed", GatewayTotals(99, "box", "edge", routed=large.routed), at_ms=99 * 60_000)
    outbox.add_routed("request.routed", GatewayTotals(99, "box", "edge", routed=large.routed), at_ms=99 * 60_000)
    assert len(events(outbox)) == before + 19


def test_an_outbox_of_an_earlier_version_takes_decisions_too(tmp_path, open_outbox):
    open_outbox().close()
    with sqlite3.connect(tmp_path / "o.db") as db:
        db.execute("DROP TABLE routed")
    db.close()
    again = open_outbox()
    again.add_routed("request.routed", totals(1, 1), at_ms=60_000)
    assert (again.set_aside, events(again)) == ("", [(1, "1/1")])


def test_the_numbers_of_samples_go_on_after_the_file_is_opened_again_even_when_none_is_held(open_outbox):
    outbox = open_outbox()
    assert [sampled(outbox, sent_at_ms=1000) for _ in range(3)] == [1, 2, 3]
    outbox.forget_samples(sent_before_ms=2000)
    assert numbers(outbox) == []
    assert sampled(open_outbox()) == 4


def test_samples_are_held_until_they_were_sent_long_enough_ago(open_outbox):
    outbox = open_outbox()
    for sent_at_ms in (0, 1000, 3000, 0):
        sampled(outbox, sent_at_ms=sent_at_ms)
    outbox.forget_samples(sent_before_ms=2000)
    assert numbers(outbox) == [1, 3, 4]
    outbox.mark_sent([1, 3], at_ms=5000)
    outbox.mark_sent([], at_ms=5000)
    outbox.forget_samples(sent_before_ms=4000)
    assert numbers(outbox) == [1, 3, 4]
    outbox.forget_samples(sent_before_ms=6000)
    assert (numbers(outbox), outbox.lost()) == ([4], (0, 0))


def test_a_sample_that_rotted_on_disk_is_left_out_and_the_others_are_read(tmp_path, open_outbox):
    outbox = open_outbox()
    for _ in range(3):
        sampled(outbox)
    outbox.close()
    with sqlite3.connect(tmp_path / "o.db") as db:
        db.execute("UPDATE readings SET payload = ? WHERE seq = 2", (b"{half",))
    db.close()
    assert numbers(open_outbox()) == [1, 3]


@pytest.mark.parametrize("damage", ["not a database", "cut", "pages", "another schema"])
def test_a_damaged_file_is_set_aside_and_a_new_epoch_begins(tmp_path, open_outbox, damage):
    path = tmp_path / "o.db"
    outbox = open_outbox()
    for _ in range(60):
        outbox.add_event("kind", text="x" * 1500, at_ms=7)
    outbox.close()
    content = path.read_bytes()
    match damage:
        case "not a database":
            path.write_bytes(b"\x00\xff" * 5000)
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "pages":  # as a worn-out flash card leaves it: the file opens, and what it holds can't be read
            path.write_bytes(content[: 6 * 4096] + b"\xff" * (len(content) - 6 * 4096))
        case "another schema":
            path.unlink()
            with sqlite3.connect(path) as db:
                db.execute("CREATE TABLE box (x)")
            db.close()
    again = open_outbox()
    assert again.epoch != outbox.epoch, "its numbers begin anew, so the old ones must not be taken for them"
    aside = list(tmp_path.glob("o.db.corrupt-*"))
    assert len(aside) == 1
    assert again.set_aside.startswith(f"{aside[0].name}: ")
    again.add_event("kind", text="after", at_ms=7)
    kept = events(again)
    assert kept == [(1, f"set aside as {again.set_aside}"), (2, "after")]
    assert again.journal_position() == ("", 0)
    crashed = tmp_path / "crashed"  # what a power cut would leave now
    crashed.mkdir()
    for left in [path, *tmp_path.glob("o.db-*")]:
        shutil.copy(left, crashed)
    survivor = open_outbox(folder=crashed)
    assert (survivor.epoch, events(survivor), survivor.set_aside) == (again.epoch, kept, "")


def test_a_file_that_turns_out_to_be_damaged_while_it_is_used_is_set_aside_and_what_was_to_be_kept_is_kept(tmp_path, open_outbox):
    """In the middle, where the start does not look: to read all of it would take as long as there is much."""
    path = tmp_path / "o.db"
    outbox = open_outbox()
    for _ in range(400):
        outbox.add_event("kind", text="x" * 1500, at_ms=7)
    outbox.close()
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * (size // 8))
    again = open_outbox()
    assert (again.set_aside, again.epoch) == ("", outbox.epoch), "the damage is found when it is met"
    held = [event.seq for first in range(0, 400, 50) for event in again.events_after(first, 50)]
    assert again.set_aside
    assert again.epoch != outbox.epoch
    assert held[0] == 1
    again.add_event("kind", text="after", at_ms=7)
    assert events(again) == [(1, f"set aside as {again.set_aside}"), (2, "after")]
    again.close()
    assert len(list(tmp_path.glob("o.db.corrupt-*"))) == 1


# -- its size


def disk_bytes(folder) -> int:
    return sum(path.stat().st_size for path in folder.glob("o.db*") if ".corrupt-" not in path.name)


def reading(outbox: Outbox, at_s: float, *, edge: int = 3) -> Sample:
    serve = [ServeSample("d", edge=edge, latency={70: edge - 1, 90: 1})]
    return Sample(outbox.epoch, outbox.next_sample_seq(), int(at_s * 1000), 0.25, 2**30, serve=serve)


def test_over_its_size_readings_become_minutes_and_hours_and_none_is_lost_of_a_week(tmp_path, open_outbox):
    outbox = open_outbox()
    count = 7 * 86400 // 5
    for index in range(count):
        outbox.add_sample(reading(outbox, index * 5), sent_at_ms=0)
        if index % 5000 == 0:
            outbox.add_event("kind", text=f"at {index}", at_ms=index * 5000)
            assert disk_bytes(tmp_path) <= MOST_BYTES
    assert disk_bytes(tmp_path) <= MOST_BYTES
    held = outbox.samples_after(0, 10**6)
    assert {sample.width_ms > 1_000_000 for sample in held} == {True, False}, "hours, and what is finer"
    assert held[-1].readings == 1, "the newest are as they were"
    reached = 0
    for sample in held:
        assert sample.first == reached + 1
        assert sample.readings == sample.seq - sample.first + 1
        reached = sample.seq
    assert reached == count
    assert sum(sample.serve[0].edge for sample in held) == 3 * count
    assert outbox.lost() == (0, 0)
    loss = outbox.take_loss()
    assert (loss.events, loss.samples) == (0, 0)
    assert loss.thinned == sum(sample.readings for sample in held if sample.readings > 1)
    assert outbox.take_loss() == Loss(0, 0, 0), "told once"
    assert len(events(outbox)) == -(-count // 5000), "events go last"
    assert outbox.depth() == (len(events(outbox)), len(held))


def test_events_push_out_readings_and_then_the_oldest_of_themselves_and_all_is_counted(tmp_path, open_outbox):
    outbox = open_outbox()
    for index in range(3000):
        outbox.add_sample(reading(outbox, index), sent_at_ms=0)
    for number in range(1, 5001):
        outbox.add_event("kind", text=f"{number} {'x' * 1000}", at_ms=7)
    assert disk_bytes(tmp_path) <= MOST_BYTES
    lost_events, lost_samples = outbox.lost()
    held = events(outbox)
    assert lost_events > 0
    assert [seq for seq, _ in held] == list(range(lost_events + 1, 5001))
    assert lost_samples + sum(sample.readings for sample in outbox.samples_after(0, 10**6)) == 3000
    assert lost_samples > 0
    again = open_outbox()
    assert again.lost() == (lost_events, lost_samples)
    loss = again.take_loss()
    assert (loss.events, loss.samples) == (lost_events, lost_samples)


def test_what_was_sent_and_may_have_arrived_is_not_made_part_of_anything(open_outbox):
    outbox = open_outbox()
    for index in range(40):
        outbox.add_sample(reading(outbox, index), sent_at_ms=1 if index < 5 else 0)
    for index in range(30_000):
        outbox.add_sample(reading(outbox, 40 + index), sent_at_ms=0)
    held = outbox.samples_after(0, 10**6)
    assert [(sample.seq, sample.readings) for sample in held[:5]] == [(seq, 1) for seq in range(1, 6)]
    assert held[5].first == 6
    assert held[5].readings > 1


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 400_000)), min_size=1, max_size=60), st.integers(1, 3_600_000))
def test_a_run_is_of_one_stretch_of_the_clock_and_without_a_gap(steps, width_ms):
    seq, at_ms, rows = 0, 0, []
    for step, lapse_ms in steps:
        seq, at_ms = seq + step, at_ms + lapse_ms
        rows.append(Row(seq, seq, at_ms, b""))
    run = run_of(iter(rows), width_ms)
    assert run == rows[: len(run)]
    assert len({row.at_ms // width_ms for row in run}) == 1
    assert [row.seq for row in run] == list(range(1 + rows[0].seq - 1, rows[0].seq + len(run)))
    if len(run) < len(rows):
        following = rows[len(run)]
        assert following.seq != run[-1].seq + 1 or following.at_ms // width_ms != run[0].at_ms // width_ms


def test_an_outbox_of_the_first_version_goes_on_with_what_it_held(tmp_path):
    with sqlite3.connect(tmp_path / "o.db") as db:
        db.executescript(
            "CREATE TABLE box (epoch TEXT NOT NULL, session_epoch INTEGER NOT NULL, sample_seq INTEGER NOT NULL,"
            "events_lost INTEGER NOT NULL,"
            "samples_lost INTEGER NOT NULL, journal TEXT NOT NULL, journal_seq INTEGER NOT NULL, totals BLOB NOT NULL);"
            "CREATE TABLE events (seq INTEGER PRIMARY KEY AUTOINCREMENT, at_ms INTEGER NOT NULL, kind TEXT NOT NULL, subject TEXT NOT NULL,"
            "text TEXT NOT NULL);"
            "CREATE TABLE samples (seq INTEGER PRIMARY KEY, sent_at_ms INTEGER NOT NULL, payload BLOB NOT NULL);"
            "INSERT INTO box VALUES ('e', 4, 12, 1, 2, 'j', 9, x'');"
            "INSERT INTO events VALUES (8, 7, 'kind', 's', 'one');"
        )
        for seq in (11, 12):
            db.execute("INSERT INTO samples VALUES (?, 0, ?)", (seq, codec.encode(Sample("e", seq, 7000, 0.5, 1))))
        db.execute("INSERT INTO samples VALUES (10, 0, x'00ff')")
    db.close()
    outbox = Outbox(tmp_path / "o.db", most_bytes=MOST_BYTES)
    assert (outbox.set_aside, outbox.epoch, outbox.depth(), outbox.lost()) == ("", "e", (1, 2), (1, 2))
    assert (events(outbox), numbers(outbox), outbox.next_sample_seq()) == ([(8, "one")], [11, 12], 13)
    assert outbox.samples_after(0, 1)[0].at_ms == 7000
    outbox.close()


def test_numbers_that_stand_for_others_already_get_an_epoch_of_their_own_and_nothing_is_lost(open_outbox):
    outbox = open_outbox()
    for word in ("one", "two", "three"):
        outbox.add_event("kind", text=word, at_ms=7)
    before = outbox.epoch
    outbox.confirm_events("another", 3, is_spent=True)
    assert (outbox.epoch, len(events(outbox))) == (before, 3)
    outbox.confirm_events(before, 1, is_spent=True)
    assert outbox.epoch != before
    assert events(outbox) == [(2, "two"), (3, "three")]
    assert {event.epoch for event in outbox.events_after(0, 9)} == {outbox.epoch}
    assert open_outbox().epoch == outbox.epoch


def test_on_a_full_disk_nothing_but_the_named_error_comes_out_and_what_was_not_kept_is_counted(small_disk, open_outbox):
    outbox = open_outbox()
    outbox.add_event("kind", text="before", at_ms=7)
    outbox.add_entries("j", [entry(1)])
    sampled(outbox)
    fill(small_disk)
    kept = 0
    for _ in range(20):
        try:
            outbox.add_event("kind", text="x" * 1000, at_ms=7)
            kept += 1
        except OutboxFailed:
            pass
    assert kept < 20, "the disk was not full"
    with pytest.raises(OutboxFailed):
        outbox.add_entries("j", [entry(seq) for seq in range(1, 20)])
    with pytest.raises(OutboxFailed):
        outbox.next_session()
    for _ in range(10):
        sampled(outbox)
    outbox.confirm_events(outbox.epoch, 1)
    outbox.mark_sent([1], at_ms=7)
    outbox.forget_samples(sent_before_ms=0)
    lost_samples = 11 - len(numbers(outbox))
    assert outbox.journal_position() == ("j", 1), "the warden is asked for the others again"
    assert outbox.lost() == (20 - kept, lost_samples)

    (small_disk / "filler").unlink()
    outbox.add_event("kind", text="after", at_ms=7)
    outbox.add_entries("j", [entry(seq) for seq in range(1, 4)])
    assert sampled(outbox) == 12
    assert [text for _, text in events(outbox)][-3:] == ["after", "entry 2", "entry 3"]
    seqs = [seq for seq, _ in events(outbox)]
    assert seqs == list(range(seqs[0], seqs[0] + len(seqs))), "what was not kept had no number"
    assert numbers(outbox)[-1] == 12
    again = open_outbox()
    assert again.lost() == (20 - kept, lost_samples)
    assert again.next_session() == 1


@pytest.mark.parametrize("cleanly", [True, False])
def test_an_agent_that_starts_on_a_full_disk_keeps_its_outbox(small_disk, open_outbox, cleanly):
    outbox = open_outbox()
    outbox.add_event("kind", text="before", at_ms=7)
    if cleanly:
        outbox.close()
    fill(small_disk)
    again = open_outbox()
    assert (again.epoch, again.set_aside, events(again)) == (outbox.epoch, "", [(1, "before")])
    (small_disk / "filler").unlink()
    again.add_event("kind", text="after", at_ms=7)
    assert events(again) == [(1, "before"), (2, "after")]


def test_an_outbox_that_can_not_begin_for_want_of_room_sets_nothing_aside(small_disk):
    fill(small_disk)
    with pytest.raises(sqlite3.OperationalError, match="full"):
        Outbox(small_disk / "new.db", most_bytes=MOST_BYTES)
    assert not list(small_disk.glob("*corrupt*"))
