"""(b) The agent is an enemy's: it has the network, the warden's socket and the incoming folder, and asks for what it should not get."""

import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from skerry.wire import codec, signing
from skerry.wire.box import Apply, Arrived, ReadLogs, State, Taken
from skerry.wire.messages import LogsRequest
from tests.drills.fleet import document_in, signed_documents
from tests.e2e.world import wait_until


@pytest.fixture(scope="module")
def seen(world) -> dict[str, list[bytes]]:
    return signed_documents(world)


class Owned:
    """What speaks on the warden's socket in the agent's place."""

    def __init__(self, folder: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(15)
        self.socket.connect(str(folder / "warden.sock"))
        self.lines = self.socket.makefile("rb")

    def say(self, message: msgspec.Struct | bytes) -> None:
        self.socket.sendall(message if isinstance(message, bytes) else codec.encode(message) + b"\n")

    def state(self) -> State:
        """What the warden says of itself next."""
        while True:
            line = self.lines.readline()
            assert line, "the warden hung up"
            if json.loads(line)["type"] == "state":
                return msgspec.json.decode(line, type=State)

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


@pytest.fixture
def owned(world, seen, target) -> Iterator[Owned]:
    """The real agent is stopped, so that nobody mends meanwhile what the enemy did."""
    world.do(world.fleet.kill("store-1.agent"))
    enemy = Owned(target.box.folder)
    yield enemy
    enemy.close()
    world.do(world.fleet.start_process("store-1.agent"))
    wait_until(target.is_in_step, 30, world.log_tails)
    target.assert_untouched()


def test_it_can_have_nothing_started_that_the_coordinator_did_not_sign_for_this_box_and_now(seen, owned):
    held = owned.state()
    emptied = msgspec.structs.replace(document_in(seen["store-1"][-1]), generation=10**9, replicas=[])
    forged = signing.sign(emptied, Ed25519PrivateKey.generate(), context=signing.DESIRED_CONTEXT)
    older, others = seen["store-1"][0], seen["store-2"][-1]
    for envelope, reason in ((forged, "not trusted"), (older, "is older than"), (others, "the document is for demo/store-2")):
        owned.say(Apply(envelope))
        refused = owned.state().reported
        assert reason in refused.refused
        assert refused.generation == held.reported.generation
        assert [one.sandbox for one in refused.replicas] == [one.sandbox for one in held.reported.replicas]


@pytest.mark.parametrize(
    "digest", ["../../../../etc/passwd", "/etc/passwd", "", "a" * 64, "A" * 64, "\x00" * 64, "..", "x" * 100_000, "a" * 63 + "/"]
)
def test_it_can_have_no_file_taken_that_nobody_signed_for(target, owned, digest):
    before = {path: path.stat().st_mtime_ns for path in (target.box.folder / "warden").rglob("*") if path.name == "model.onnx"}
    owned.say(Arrived(digest))
    owned.say(ReadLogs(1, LogsRequest("../../x", 10)))
    until = time.monotonic() + 15
    while (line := json.loads(owned.lines.readline()))["type"] != "logs_read":  # answered after what came before it
        assert time.monotonic() < until
    assert line["reply"]["error"]
    after = {path: path.stat().st_mtime_ns for path in (target.box.folder / "warden").rglob("*") if path.name == "model.onnx"}
    assert after == before


@pytest.mark.parametrize(
    "words",
    [
        b"\n",
        b"{}\n",
        b"[]\n",
        b"null\n",
        b"\xff\xfe\n",
        b'{"type":"apply"}\n',
        b'{"type":"apply","envelope":"%%%"}\n',
        b'{"type":"stop"}\n',
        b"[" * 500_000 + b"\n",
        b"a" * 2_000_000 + b"\n",
        b'{"type":"taken","journal":"x","seq":-1}\n',
        b'{"type":"read_logs","call":1,"request":{"replica":"' + b"a" * 100_000 + b'","lines":10}}\n',
    ],
    ids=lambda words: words[:24].decode(errors="replace"),
)
def test_whatever_it_says_the_warden_serves_the_next_one(target, owned, words):
    try:
        owned.say(words)
    except OSError:
        pass  # hung up on in the middle of it
    again = Owned(target.box.folder)
    assert again.state().reported.replicas
    again.close()


def test_it_can_not_keep_others_from_the_warden_for_good(target, owned):
    crowd = [Owned(target.box.folder) for _ in range(40)]
    for one in crowd:
        one.close()

    def is_served() -> bool:
        fresh = Owned(target.box.folder)
        try:
            return bool(fresh.state().reported.replicas)
        except (AssertionError, OSError):
            return False
        finally:
            fresh.close()

    wait_until(is_served, 15)


def test_a_number_that_it_makes_up_loses_no_entry_for_the_real_agent(world, target, owned):
    owned.say(Taken("not the journal", 10**12))
    assert owned.state().reported.replicas


def test_the_wardens_own_files_are_not_for_its_user(target):
    """In the demo all programs are one user's; on an installed box the unit's users part them, and the keys are root's."""
    for path in (target.box.folder / "warden").rglob("*"):
        if path.is_file() and not path.is_socket():
            assert not stat.S_IMODE(path.stat().st_mode) & 0o022, f"{path} may be written by others"
    assert os.access(target.box.folder / "warden.sock", os.W_OK)


def test_in_the_end_the_box_still_obeys_its_coordinator(target):
    target.assert_it_still_obeys()
