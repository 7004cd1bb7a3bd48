"""A gateway process that is killed while it writes its page leaves one that can be read, and that never goes back."""

import subprocess
import sys

from edge_agent.gateway.processes import Board

WRITERS_KILLED = 60
SCRIPT = """
import os, random, signal, sys, time
from edge_agent.gateway.processes import Board

board, dice, newest = Board(2, page_bytes=200_000), random.Random(int(sys.argv[2])), 0
for _ in range(int(sys.argv[1])):
    writer = os.fork()
    if writer == 0:
        number = newest
        while True:
            number += 1
            board.write(1, [number] * (1 + number * 7919 % 40_000))
    until = time.monotonic() + dice.uniform(0.002, 0.02)
    is_dead = False
    while True:
        page = board.read(1, list[int])
        if page is not None:
            assert len(page) == 1 + page[0] * 7919 % 40_000 and set(page) == {page[0]}, "a page that nobody wrote"
            assert page[0] >= newest, f"went back from {newest} to {page[0]}"
            newest = page[0]
        if is_dead:
            break
        if time.monotonic() > until:
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
            is_dead = True
    assert page is not None or not newest, "nothing can be read any more"
assert board.read(0, list[int]) is None, "another's page was written"
print(newest)
"""


def test_a_writer_that_is_killed_leaves_a_page_that_is_whole_and_never_goes_back():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(WRITERS_KILLED), "11"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > WRITERS_KILLED, "hardly anything was written"


def test_what_is_too_long_for_a_page_leaves_the_old_one():
    board = Board(1, page_bytes=100)
    board.write(0, ["kept"])
    board.write(0, ["x" * 200])
    assert board.read(0, list[str]) == ["kept"]
    board.write(0, ["next"])
    assert board.read(0, list[str]) == ["next"]


CROWDED = """
import os, signal, time
from edge_agent.gateway.processes import Board

board, newest, parent = Board(2, page_bytes=2000), 0, os.getpid()
children = []
for number in range(4):
    children.append(os.fork())
    if children[-1] == 0:
        count = 0
        while os.getppid() == parent:
            count += 1
            if number == 0:
                board.write(1, [count] * (1 + count % 300))
        os._exit(0)
until = time.monotonic() + 6
while time.monotonic() < until:
    page = board.read(1, list[int])
    assert page is not None or not newest, "what could be read went away"
    if page is not None:
        assert page[0] >= newest, f"went back from {newest} to {page[0]}"
        newest = page[0]
print(newest)
"""


def test_a_reader_that_is_held_up_between_the_two_halves_does_not_take_an_old_one_for_the_newest():
    done = subprocess.run([sys.executable, "-c", CROWDED], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10_000
