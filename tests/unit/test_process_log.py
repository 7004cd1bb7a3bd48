"""A sandbox's output is followed by position, over cuts and through whatever it wrote."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.warden.drivers.process_log import READ_MAX_BYTES, ProcessLog
from edge_agent.warden.ports import LogLines


def append(path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def numbered(first: int, last: int) -> str:
    return "".join(f"line {number}\n" for number in range(first, last + 1))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log"


def test_the_last_lines_are_given_oldest_first(path):
    append(path, numbered(1, 5))
    assert ProcessLog(path).read(2).lines == ["line 4", "line 5"]
    assert ProcessLog(path).read(9).lines == [f"line {number}" for number in range(1, 6)]
    assert ProcessLog(path).read(0).lines == []


def test_a_log_that_is_absent_has_no_lines_and_no_position(path):
    assert ProcessLog(path).read(5) == LogLines([])
    assert ProcessLog(path).read(5, after="12") == LogLines([])


def test_who_asks_on_from_a_position_gets_what_was_written_since(path):
    append(path, numbered(1, 3))
    first = ProcessLog(path).read(9)
    assert ProcessLog(path).read(9, after=first.position) == LogLines([], first.position)
    append(path, numbered(4, 5))
    second = ProcessLog(path).read(9, after=first.position)
    assert second.lines == ["line 4", "line 5"]
    assert ProcessLog(path).read(9, after=second.position).lines == []


def test_who_follows_is_shown_a_line_once_it_is_whole(path):
    append(path, "one\n")
    position = ProcessLog(path).read(9).position
    append(path, "tw")
    found = ProcessLog(path).read(9, after=position)
    assert found == LogLines([], position)
    append(path, "o\nthr")
    assert ProcessLog(path).read(9, after=position).lines == ["two"]
    assert ProcessLog(path).read(9).lines == ["one", "two", "thr"]


def test_positions_go_on_counting_over_a_cut(path):
    log = ProcessLog(path)
    append(path, numbered(1, 1000))
    before = log.read(1).position
    log.trim(1000)
    assert path.stat().st_size == 500
    assert log.read(9, after=before) == LogLines([], before)
    append(path, numbered(1001, 1002))
    found = log.read(9, after=before)
    assert found.lines == ["line 1001", "line 1002"]
    append(path, numbered(1003, 2000))
    log.trim(1000)
    append(path, "last\n")
    assert log.read(1, after=found.position).lines == ["last"]
    assert int(log.read(1).position) == len(numbered(1, 2000)) + len("last\n")


def test_a_position_that_was_cut_away_goes_on_with_what_is_left(path):
    log = ProcessLog(path)
    append(path, numbered(1, 10))
    position = log.read(9).position
    append(path, numbered(11, 1000))
    log.trim(1000)
    lines = log.read(5000, after=position).lines
    assert lines[-1] == "line 1000"
    assert 10 < len(lines) < 60


def test_a_log_within_its_bound_is_not_cut(path):
    append(path, numbered(1, 10))
    size = path.stat().st_size
    ProcessLog(path).trim(size)
    assert path.stat().st_size == size
    ProcessLog(path).trim(size - 1)
    assert path.stat().st_size == (size - 1) // 2


def test_who_writes_on_while_the_log_is_cut_goes_on_at_its_new_end(path):
    with path.open("ab", buffering=0) as sandbox:
        sandbox.write(numbered(1, 1000).encode())
        ProcessLog(path).trim(1000)
        sandbox.write(b"after\n")
    assert path.stat().st_size == 506
    assert ProcessLog(path).read(1).lines == ["after"]


def test_cutting_what_is_absent_is_nothing(path):
    ProcessLog(path).trim(10)
    assert not path.exists()


GARBAGE = [
    "x",
    "-1",
    "1.5",
    " 3",
    "0x10",
    "9" * 19,
    "9" * 20,
    "9" * 5000,
    "²",
    "٣",
    "\U0001d7d7",
    "⑨",
    "1\n",
    "\x00",
    "2026-01-01T00:00:00Z",
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_position_that_is_none_is_no_error_and_ends_with_a_good_one(path, garbage):
    append(path, numbered(1, 3))
    found = ProcessLog(path).read(9, after=garbage)
    assert found.lines in ([f"line {number}" for number in range(1, 4)], [])
    assert found.position == str(path.stat().st_size)


@given(st.text(max_size=25))
@settings(deadline=None)
def test_no_position_whatever_it_is_raises(tmp_path_factory, garbage):
    path = tmp_path_factory.mktemp("log") / "log"
    append(path, "a\nb\n")
    assert ProcessLog(path).read(9, after=garbage).lines in (["a", "b"], ["b"], [""], ["", "b"], [])


@pytest.mark.parametrize("cut", ["", "x", "²", "1e3", "\x00"])
def test_a_count_of_cut_bytes_that_is_damaged_counts_as_none(path, cut):
    append(path, numbered(1, 3))
    path.with_name("log.cut").write_text(cut)
    assert ProcessLog(path).read(1) == LogLines(["line 3"], str(path.stat().st_size))


def test_of_a_huge_log_only_the_end_is_read_and_a_follower_comes_to_its_end(path):
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse: 1 TiB that nobody could read
        file.seek(0, 2)
        file.write(b"\n" + numbered(1, 3).encode())
    found = ProcessLog(path).read(3)
    assert found.lines == ["line 1", "line 2", "line 3"]
    followed = ProcessLog(path).read(10, after="0")
    assert followed.lines[-3:] == found.lines
    assert sum(map(len, followed.lines)) <= READ_MAX_BYTES
    assert followed.position == found.position


def test_a_line_without_end_does_not_hold_a_follower_up(path):
    append(path, "x" * (2 * READ_MAX_BYTES))
    found = ProcessLog(path).read(5, after="0")
    assert found.lines == []
    append(path, "\nnext\n")
    lines = ProcessLog(path).read(5, after=found.position).lines
    assert lines[-1] == "next"
    assert max(map(len, lines)) <= READ_MAX_BYTES


def test_bytes_that_are_no_text_are_shown_as_such(path):
    path.write_bytes(b"\xff\xfe\x00\n\x80ok\n")
    assert ProcessLog(path).read(9).lines == ["\ufffd\ufffd\x00", "\ufffdok"]


@given(
    st.lists(
        st.one_of(st.integers(1, 12), st.just("read"), st.just("cut")),
        min_size=1,
        max_size=30,
    )
)
@settings(deadline=None, max_examples=60)
def test_a_follower_sees_every_line_once_and_in_order_where_no_cut_went_past_it(tmp_path_factory, doings):
    path = tmp_path_factory.mktemp("log") / "log"
    log, written, seen, position = ProcessLog(path), 0, [], "0"
    path.touch()
    for doing in [*doings, "read"]:
        if doing == "cut":
            found = log.read(1000, after=position)  # read first, as the warden's callers may: then no cut takes what is unread
            seen, position = seen + found.lines, found.position
            log.trim(100)
        elif doing == "read":
            found = log.read(1000, after=position)
            seen, position = seen + found.lines, found.position
        else:
            append(path, numbered(written + 1, written + doing))
            written += doing
    assert seen == [f"line {number}" for number in range(1, written + 1)]
