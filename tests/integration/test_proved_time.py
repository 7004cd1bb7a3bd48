"""Others' certificates are judged by the time that was proved to a box, over real TLS and on each kind of socket that its programs use."""

import asyncio
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator.ca.authority import DAY_MS, Authority
from edge_agent.warden.config import Config
from edge_agent.warden.documents import Documents
from edge_agent.warden.store import Store
from edge_agent.warden.trust import TrustFile
from edge_agent.warden.verify import Refused
from skerry.runtime import keys, tls
from skerry.runtime.proved_time import ProvedTime, uptime_ms
from skerry.wire import codec, signing
from skerry.wire.identity import Subject
from skerry.wire.messages import Desired
from skerry.wire.proof import Proof
from tests.conftest import need

START_MS = time.time_ns() // 10**6 - 400 * DAY_MS
"""Long ago: by this machine's clock every certificate here has ended."""


class Sides:
    """A server and a caller with certificates of one authority: the server's for 10 days, the caller's for 20."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority(folder / "ca", "north", now_ms=START_MS)
        self.ca = folder / "ca" / "root.crt"
        self.server, self.caller = self.pair("server", 10), self.pair("caller", 20)

    def pair(self, name: str, days: float) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = Subject("north", "gateway", name)
        issued = self.authority.issue(key.public_key(), subject, now_ms=START_MS, life_ms=int(days * DAY_MS), hosts=["localhost"])
        certificate, private = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        certificate.write_text(issued.chain)
        private.write_bytes(keys.pem(key))
        return certificate, private

    def contexts(self, day: float, *, judges: str, own: Path | None = None) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        """Of the server and of the caller; ``judges`` says which of them knows that it is ``day``, and what its own certificate is."""
        judge = tls.Judge(lambda: START_MS + int(day * DAY_MS), own)
        server = tls.server(*self.server, client_ca_file=self.ca)
        client = tls.client(str(self.ca), *map(str, self.caller), judge=judge if judges == "caller" else None)
        if judges == "server":
            judge.rule(server)
        else:
            tls.forget_time(server)
        tls.forget_time(client)
        return server, client


@pytest.fixture(scope="module")
def sides(tmp_path_factory) -> Sides:
    return Sides(tmp_path_factory.mktemp("sides"))


async def _streams(server: ssl.SSLContext, client: ssl.SSLContext) -> bytes:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readline())
        writer.close()

    listening = await asyncio.start_server(echo, "127.0.0.1", 0, ssl=server)
    async with asyncio.timeout(10), listening:
        reader, writer = await asyncio.open_connection(*listening.sockets[0].getsockname(), ssl=client, server_hostname="localhost")
        writer.write(b"hello\n")
        said = await reader.readline()
        writer.close()
        return said


def with_asyncio(server: ssl.SSLContext, client: ssl.SSLContext) -> bytes:
    return asyncio.run(_streams(server, client))


def with_uvloop(server: ssl.SSLContext, client: ssl.SSLContext) -> bytes:
    return uvloop.run(_streams(server, client))


def with_sockets(server: ssl.SSLContext, client: ssl.SSLContext) -> bytes:
    """As paho does it: the handshake on its own."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            raw, _ = listening.accept()
            try:
                with server.wrap_socket(raw, server_side=True) as secured:
                    secured.sendall(secured.recv(100))
            except OSError:
                raw.close()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            raw = socket.create_connection(listening.getsockname(), timeout=10)
            with client.wrap_socket(raw, server_hostname="localhost", do_handshake_on_connect=False) as secured:
                secured.do_handshake()
                secured.sendall(b"hello\n")
                return secured.recv(100)
        finally:
            thread.join(10)


Way = Callable[[ssl.SSLContext, ssl.SSLContext], bytes]


@pytest.mark.parametrize("way", [with_asyncio, with_uvloop, with_sockets])
def test_a_servers_certificate_is_over_when_that_was_proved_and_the_clock_has_no_say(sides, way: Way):
    assert way(*sides.contexts(9.9, judges="caller")) == b"hello\n", "this machine's clock says that it ended a year ago"
    with pytest.raises(ssl.SSLCertVerificationError, match="has ended, by the time that was proved"):
        way(*sides.contexts(10.1, judges="caller"))


@pytest.mark.parametrize("way", [with_asyncio, with_uvloop, with_sockets])
def test_a_callers_certificate_is_over_when_that_was_proved(sides, way: Way):
    assert way(*sides.contexts(19.9, judges="server")) == b"hello\n"
    try:
        said = way(*sides.contexts(20.1, judges="server"))
    except OSError:
        said = b""
    assert said == b"", "it may learn of it only when it reads"


def test_a_time_that_is_past_its_own_certificate_says_nothing_of_others_until_the_next_one_is_there(sides):
    own, _ = sides.pair("own", 5)
    server, client = sides.contexts(10.1, judges="caller", own=own)
    assert with_asyncio(server, client) == b"hello\n"
    sides.pair("own", 30)
    with pytest.raises(ssl.SSLCertVerificationError, match="has ended"):
        with_asyncio(server, client)
    own.write_text("nothing")
    with pytest.raises(ssl.SSLCertVerificationError, match="has ended"):
        with_asyncio(server, client)


# -- how it is kept


def test_what_is_known_of_the_time_is_kept_and_only_grows(tmp_path):
    path, now_ms = tmp_path / "time.json", START_MS
    proved = ProvedTime(path)
    assert proved.now_at_least_ms() < 60_000, "nothing is known yet"
    proved.prove(now_ms)
    proof = proved.proof
    proved.prove(now_ms - DAY_MS)
    proved.believe(Proof(now_ms - 5, uptime_ms()))
    assert proved.proof == proof, "what says less changes nothing"
    proved.keep()
    kept = path.read_bytes()
    assert now_ms <= ProvedTime(path).now_at_least_ms() < now_ms + 60_000
    rebooted = codec.decode(kept, Proof)
    path.write_bytes(codec.encode(Proof(rebooted.moment_ms, uptime_ms() + DAY_MS)))
    assert now_ms <= ProvedTime(path).now_at_least_ms() < now_ms + 60_000, "another boot's uptime"
    path.write_bytes(b"{")
    assert ProvedTime(path).now_at_least_ms() < 60_000, "a damaged file costs what it held, and no start"


def test_what_passes_while_a_program_runs_is_kept_when_it_ends(tmp_path):
    path = tmp_path / "time.json"

    async def scene() -> None:
        proved, stop = ProvedTime(path), asyncio.Event()
        proved.prove(START_MS)
        running = asyncio.create_task(proved.run(stop))
        await asyncio.sleep(0.3)
        stop.set()
        await running

    asyncio.run(scene())
    assert codec.decode(path.read_bytes(), Proof).moment_ms >= START_MS + 250


def test_a_disk_that_takes_nothing_stops_nothing(tmp_path):
    proved = ProvedTime(tmp_path / "missing" / "time.json")
    proved.prove(START_MS)
    proved.keep()
    assert proved.now_at_least_ms() >= START_MS


@pytest.mark.parametrize("clock", ["1970-01-01 00:00:10", "2029-01-01 00:00:00"])
def test_a_wall_clock_that_is_wrong_by_years_changes_nothing(tmp_path, clock):
    need("faketime", "" if shutil.which("faketime") else "not on the PATH")
    path = tmp_path / "time.json"
    before = ProvedTime(path)
    before.prove(START_MS)
    before.keep()
    program = (
        "import sys, time; from pathlib import Path; from skerry.runtime.proved_time import ProvedTime\n"
        "print(int(time.time()), ProvedTime(Path(sys.argv[1])).now_at_least_ms())"
    )
    done = subprocess.run(
        ["faketime", "-f", f"@{clock}", sys.executable, "-c", program, path],
        env={**os.environ, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    wall_s, proved_ms = (int(word) for word in done.stdout.split())
    assert abs(wall_s - START_MS // 1000) > 30 * 86400, "the clock is wrong indeed"
    assert START_MS <= proved_ms < START_MS + 60_000


# -- what proves it

KEY = Ed25519PrivateKey.generate()


def document(generation: int, day: float) -> bytes:
    """Signed on that day, for thirty."""
    issued_ms = START_MS + int(day * DAY_MS)
    return signing.sign(
        Desired("f", "n", generation, issued_ms, expires_at_ms=issued_ms + 30 * DAY_MS), KEY, context=signing.DESIRED_CONTEXT
    )


def documents(folder: Path) -> tuple[Documents, ProvedTime]:
    """A warden's, as its next start finds them."""
    config = Config(
        fleet="f", node="n", state_dir=folder, socket=folder / "s", incoming_dir=folder / "in", routes_file=folder / "routes.json",
        trusted_keys_file=folder / "keys",
    )  # fmt: skip
    proved = ProvedTime(folder / "proved_time.json")
    return Documents(config, Store(folder), TrustFile(folder / "trust.json", [KEY.public_key()], START_MS), proved), proved


def day_of(proved: ProvedTime) -> float:
    return round((proved.now_at_least_ms() - START_MS) / DAY_MS, 2)


def test_documents_prove_the_time_across_restarts_and_what_is_over_is_not_taken(tmp_path):
    taken, proved = documents(tmp_path)
    assert day_of(proved) == 0, "when the box was enrolled"
    held = taken.take(document(1, 10), None)
    assert day_of(proved) == 10
    taken.take(document(2, 5), held)
    assert day_of(proved) == 10, "an older word proves nothing less"
    taken, proved = documents(tmp_path)
    assert day_of(proved) == 10
    held = taken.load()
    assert held is not None
    assert held.generation == 2
    taken.take(document(3, 60), held)
    with pytest.raises(Refused, match="expires_at_ms"):
        taken.take(document(4, 29), held)
    (tmp_path / "proved_time.json").unlink()
    taken, proved = documents(tmp_path)
    taken.load()
    assert day_of(proved) == 60, "the document on disk says it too"
