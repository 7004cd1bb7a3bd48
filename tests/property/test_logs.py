"""Whatever a sandbox writes, and whatever a box makes of it: what is passed on is bounded, harmless, and says what is missing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skerry.wire import codec
from skerry.wire.logs import MAX_ERROR, MAX_LINE_BYTES, MAX_LINES, MAX_POSITION, fitting, harmless
from skerry.wire.messages import LogsReply

texts = st.text(st.one_of(st.characters(), st.characters(categories=["Cs", "Cc"]), st.sampled_from("\x1b[3m;é…\t ")), max_size=40)
lines = st.one_of(texts, st.builds(lambda text, times: text * times, texts, st.sampled_from([50, 200, 2000])))
replies = st.builds(
    LogsReply,
    lines=st.one_of(
        st.lists(lines, max_size=8), st.builds(lambda some, times: some * times, st.lists(lines, max_size=3), st.sampled_from([100, 1500]))
    ),
    position=st.one_of(texts, st.just("9" * (MAX_POSITION + 1))),
    error=lines,
)


@given(replies)
def test_what_is_passed_on_is_bounded_and_has_no_character_that_a_terminal_obeys(reply):
    kept = fitting(reply)
    assert len(codec.encode(kept)) <= codec.MAX_MESSAGE_BYTES
    assert len(kept.lines) <= MAX_LINES
    assert all(len(line.encode()) <= MAX_LINE_BYTES for line in kept.lines)
    assert all(c == "\t" or c.isprintable() for text in [*kept.lines, kept.position, kept.error] for c in text)
    assert len(kept.error) <= MAX_ERROR
    assert codec.decode(codec.encode(kept), LogsReply) == kept


@given(replies)
def test_who_does_it_again_changes_nothing(reply):
    assert fitting(fitting(reply)) == fitting(reply)


@given(replies)
def test_the_newest_lines_stay_in_order_and_those_that_are_missing_are_counted(reply):
    kept = fitting(reply).lines
    if len(kept) == len(reply.lines):
        assert kept == [harmless(line) for line in reply.lines]
    else:
        stay = len(kept) - 1
        assert kept[0] == f"[{len(reply.lines) - stay} earlier lines left out]"
        assert kept[1:] == [harmless(line) for line in reply.lines[len(reply.lines) - stay :]]


@given(st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=1000))
def test_ordinary_text_is_left_as_it_is(text):
    assert harmless(text) == text


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("\x1b[1;31mload failed\x1b[0m: no file", "load failed: no file"),
        ("50 %\r100 %\r\n", "50 % 100 %"),
        ("a\tb", "a\tb"),
        ("title\x1b]0;owned\x07", "title\ufffd]0;owned\ufffd"),
        ("abc\u202etxt.exe", "abc\ufffdtxt.exe"),
        ("half \udcff", "half \ufffd"),
        ("x" * 5000, "x" * 4093 + "…"),
        ("é" * 3000, "é" * 2046 + "…"),
    ],
)
def test_a_line_reads_as_it_was_meant_without_what_a_terminal_would_obey(line, shown):
    assert harmless(line) == shown
