"""The signer as a program of its own: what it signs, what it refuses, and a fleet whose key is changed while it serves."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from coordinator.signer.client import NotSigned, SignerAbsent, SignerOnSocket
from skerry.wire import codec, signing
from skerry.wire.messages import Desired
from skerry.wire.signing import Envelope
from tests.drills.fleet import DEPLOYMENT, Target
from tests.e2e.world import World, running, wait_until

DAY_MS = 86_400_000


class Signer:
    """The program, on a socket in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.socket = folder, folder / "s.sock"
        self.config = folder / "signer.toml"
        self.config.write_text(f'fleet = "f"\nstate_dir = "{folder}"\nsocket = "{self.socket}"\nmost_days = 10\n')
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-m", "coordinator.signer", "--config", self.config], stderr=subprocess.DEVNULL)
        wait_until(self.socket.exists, 20)

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(10)

    def ask(self, document: Desired) -> bytes:
        async def asking() -> bytes:
            signer = SignerOnSocket(self.socket)
            try:
                return await signer.sign(document)
            finally:
                await signer.close()

        return asyncio.run(asking())

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        return command(self.config, *words)


def command(config: Path, *words: str) -> subprocess.CompletedProcess[str]:
    done = [sys.executable, "-m", "coordinator.signer", *words, "--config", str(config)]
    return subprocess.run(done, capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture
def signer(tmp_path) -> Iterator[Signer]:
    signer = Signer(tmp_path)
    signer.start()
    yield signer
    assert signer.stop() == 0


def document(*, fleet: str = "f", days: float = 5) -> Desired:
    now_ms = time.time_ns() // 1_000_000
    return Desired(fleet, "n", 1, now_ms, expires_at_ms=int(now_ms + days * DAY_MS) if days else 0)


def test_it_signs_this_fleets_documents_for_a_bounded_time_and_nothing_else(signer):
    wanted = document()
    envelope = signer.ask(wanted)
    trusted = signing.parse_public_keys((signer.folder / "signing.pub").read_text())
    assert signing.verify(envelope, Desired, trusted, context=signing.DESIRED_CONTEXT) == wanted
    large = msgspec.structs.replace(wanted, revoked=[f"box-{number:05}" for number in range(9000)])
    assert signing.verify(signer.ask(large), Desired, trusted, context=signing.DESIRED_CONTEXT) == large, "as large as documents get"
    far = document()
    far = msgspec.structs.replace(far, issued_at_ms=far.issued_at_ms + 11 * DAY_MS, expires_at_ms=far.issued_at_ms + 12 * DAY_MS)
    for refused, words in (
        (document(fleet="g"), "fleet: "),
        (document(days=11), "expires_at_ms: "),
        (document(days=0), "expires_at_ms: "),
        (far, "issued_at_ms: "),
    ):
        with pytest.raises(NotSigned, match=words):
            signer.ask(refused)
    assert (signer.folder / "signing.pem").stat().st_mode & 0o077 == 0
    assert signer.socket.stat().st_mode & 0o007 == 0


def test_one_that_is_away_is_said_to_be(tmp_path):
    with pytest.raises(SignerAbsent, match="signer_socket"):
        Signer(tmp_path).ask(document())


def test_its_key_is_changed_by_hand_and_taken_up_on_a_signal(signer):
    before = codec.decode(signer.ask(document()), Envelope)
    assert signer.command("rotate").returncode == 0
    assert codec.decode(signer.ask(document()), Envelope).key_id == before.key_id, "not before it is told"
    assert signer.process is not None
    signer.process.send_signal(signal.SIGHUP)
    wait_until(lambda: codec.decode(signer.ask(document()), Envelope).key_id != before.key_id, 10)
    assert [grant.key_id for grant in codec.decode(signer.ask(document()), Envelope).grants] == [before.key_id]
    done = signer.command("retire", "nonsense")
    assert (done.returncode, "not an older key" in done.stderr) == (1, True)
    assert f"{before.key_id} retired" in signer.command("retire", before.key_id).stdout
    assert f"{before.key_id} retired" in signer.command("keys").stdout


@pytest.fixture(scope="module")
def world(scale_model) -> Iterator[World]:
    with running() as world:
        world.push(scale_model, "scale")
        world.deploy(DEPLOYMENT)
        world.wait_ready("scale")
        yield world


def assert_serves(target: Target) -> None:
    """From the very sandbox of before."""
    assert target.ask() == target.answer
    assert [one.sandbox for one in target.world.node(target.name).replicas] == [sandbox for _, sandbox, _, _ in target.runs]


def test_a_fleet_follows_its_keys_a_box_that_was_away_too_and_no_request_is_lost(world):
    target, away = Target(world, "store-1"), Target(world, "store-2")
    config = world.fleet.folder / "signer" / "signer.toml"
    (old,) = (line.split()[0] for line in command(config, "keys").stdout.splitlines())
    for name in ("agent", "warden"):
        world.do(world.fleet.kill(f"store-2.{name}"))
    for words in (("rotate",), ("rotate",), ("retire", old)):
        assert command(config, *words).returncode == 0
        world.do(signalled(world, "signer"))
    target.assert_it_still_obeys()
    assert_serves(target)
    for name in ("warden", "agent"):
        world.do(world.fleet.start_process(f"store-2.{name}"))
    wait_until(away.is_in_step, 40, world.log_tails)
    assert_serves(away)
    trust = (world.fleet.folder / "boxes" / "store-2" / "warden" / "trust.json").read_text()
    assert f'"retired":["{old}"]' in trust.replace(" ", "")


async def signalled(world: World, name: str) -> None:
    os.kill(world.fleet.pid(name), signal.SIGHUP)
    await asyncio.sleep(0.5)


def test_while_the_signer_is_away_boxes_serve_and_what_was_asked_for_is_done_when_it_is_back(world):
    target = Target(world, "store-1")
    world.do(world.fleet.kill("signer"))
    before = world.node("store-1").generation
    world.deploy(DEPLOYMENT.replace("5000", "4321"))
    wait_until(lambda: world.node("store-1").generation > before, 20, world.log_tails)
    assert_serves(target)
    assert not target.is_in_step()
    world.do(world.fleet.start_process("signer"))
    wait_until(target.is_in_step, 30, world.log_tails)
    assert_serves(target)
