"""A question gets the first good answer of the box that was asked, and nothing that anybody else says."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.commands import CORRELATION_BYTES, MOST_WAITING, Commands, NoAnswer, TooMany
from coordinator.session import NotConnected
from skerry.wire import codec
from skerry.wire.messages import LogsReply, LogsRequest

NODES = ["box-a", "box-b", "box-c"]
GARBAGE = [b"", b"[]", b"\xff", b'{"lines":"many"}', b'{"lines":[1]}', b'{"error":7}', b"[" * 50_000, b'"' + b"x" * 200_000 + b'"']

replies = st.tuples(
    st.one_of(st.integers(0, 5), st.binary(max_size=CORRELATION_BYTES)),  # which question, or a number that nobody gave out
    st.sampled_from(NODES),
    st.one_of(st.sampled_from(GARBAGE), st.integers(0, 99).map(lambda i: codec.encode(LogsReply([f"line {i}"])))),
)


class Wire:
    """What was asked, in order."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes, LogsRequest]] = []

    async def send(self, node: str, correlation: bytes, request: LogsRequest) -> None:
        self.sent.append((node, correlation, request))

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not holds():
                await asyncio.sleep(0)


async def outcome(commands: Commands, node: str) -> LogsReply | str:
    try:
        return await commands.read_logs(node, LogsRequest("r"))
    except NoAnswer:
        return "no answer"


def expected(index: int, node: str, said: list) -> LogsReply | str:
    for which, speaker, payload in said:
        if which == index and speaker == node and payload not in GARBAGE:
            return codec.decode(payload, LogsReply)
    return "no answer"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(NODES), min_size=1, max_size=6), st.lists(replies, max_size=12))
def test_each_question_gets_the_first_good_answer_of_its_own_box_or_none(asked, said):
    async def scene() -> list[LogsReply | str]:
        wire = Wire()
        commands = Commands(wire.send, timeout_s=0.05)
        waiting = [asyncio.create_task(outcome(commands, node)) for node in asked]
        await wire.until(lambda: len(wire.sent) == len(asked))
        for which, speaker, payload in said:
            if isinstance(which, int) and which >= len(asked):
                continue
            commands.answered(speaker, wire.sent[which][1] if isinstance(which, int) else which, payload)
        return await asyncio.gather(*waiting)

    assert asyncio.run(scene()) == [expected(index, node, said) for index, node in enumerate(asked)]


def test_no_two_questions_have_one_number_and_it_can_not_be_guessed():
    async def scene() -> None:
        wire = Wire()
        commands = Commands(wire.send, timeout_s=0.01)
        for _ in range(MOST_WAITING):
            await outcome(commands, "box-a")
        numbers = {correlation for _, correlation, _ in wire.sent}
        assert len(numbers) == MOST_WAITING
        assert {len(number) for number in numbers} == {CORRELATION_BYTES}

    asyncio.run(scene())


def test_beyond_the_bound_a_question_is_refused_and_room_comes_back_when_one_ends():
    async def scene() -> None:
        wire = Wire()
        commands = Commands(wire.send, timeout_s=5)
        waiting = [asyncio.create_task(outcome(commands, "box-a")) for _ in range(MOST_WAITING)]
        await wire.until(lambda: len(wire.sent) == MOST_WAITING)
        with pytest.raises(TooMany):
            await commands.read_logs("box-b", LogsRequest("r"))
        waiting[0].cancel()  # who asked went away
        commands.answered("box-a", wire.sent[1][1], codec.encode(LogsReply(["one"])))
        assert await waiting[1] == LogsReply(["one"])
        again = [asyncio.create_task(outcome(commands, "box-b")) for _ in range(2)]
        await wire.until(lambda: len(wire.sent) == MOST_WAITING + 2)
        for task in [*waiting, *again]:
            task.cancel()
        await asyncio.gather(*waiting, *again, return_exceptions=True)

    asyncio.run(scene())


def test_a_question_that_can_not_be_sent_is_not_waited_for():
    async def send(node: str, correlation: bytes, request: LogsRequest) -> None:
        raise NotConnected("the broker is not there")

    async def scene() -> None:
        commands = Commands(send, timeout_s=5)
        for _ in range(MOST_WAITING + 1):  # none of them takes up room
            with pytest.raises(NotConnected):
                await commands.read_logs("box-a", LogsRequest("r"))

    asyncio.run(scene())


def test_a_hostile_answer_is_made_short_and_harmless():
    async def scene() -> None:
        wire = Wire()
        commands = Commands(wire.send, timeout_s=5)
        waiting = asyncio.create_task(outcome(commands, "box-a"))
        await wire.until(lambda: bool(wire.sent))
        commands.answered("box-a", wire.sent[0][1], codec.encode(LogsReply(["\x1b[2J\x07" + "x" * 9000], position="\n")))
        assert await waiting == LogsReply(["\ufffd" + "x" * 4090 + "…"], position="")

    asyncio.run(scene())
