"""Gateways among themselves: real programs with certificates of one fleet, and strangers who try the same door."""

import asyncio
import contextlib
import http.client
import json
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from coordinator.ca.authority import DAY_MS, Authority, requested_key
from coordinator.gateways import Gateways, NotAnswered
from skerry.demo.fleet import free_ports
from skerry.runtime import keys
from skerry.runtime.proved_time import uptime_ms
from skerry.wire import codec
from skerry.wire.box import LocalReplica, Route, RouteTable
from skerry.wire.identity import Role, Subject
from skerry.wire.messages import Tier, Upstream
from skerry.wire.proof import Proof
from tests.integration.test_gateway import ScriptedWorker

FLEET = "north"
BODY = json.dumps({"inputs": [{"name": "x", "shape": [2], "datatype": "FP32", "data": [1, 2]}], "parameters": {"timeout": 2_000_000}})
PATH = "/v2/models/echo/infer"


def now_ms() -> int:
    return time.time_ns() // 10**6


class Gateway:
    """A gateway program that has a door for others; its replica is in this process."""

    def __init__(self, folder: Path, authority: Authority, node: str, *, tier: Tier = "edge", site: str = "hull") -> None:
        self.node, self.tier, self.site, self.authority = node, tier, site, authority
        self.folder = folder / node
        self.folder.mkdir()
        self.port, self.door = free_ports(2)
        self.worker = ScriptedWorker(self.folder / "worker.sock")
        self.ca = self.folder / "ca.crt"
        self.ca.write_text(authority.root_pem)
        self.config = self.folder / "gateway.toml"
        self.config.write_text(
            f'node = "{node}"\ntier = "{tier}"\nlisten = "127.0.0.1:{self.port}"\nsocket = "{self.folder}/g.sock"\n'
            f'routes_file = "{self.folder}/routes.json"\n[peers]\nlisten = "127.0.0.1:{self.door}"\n'
            f'key_file = "{self.folder}/gateway.key"\n'
            f'csr_file = "{self.folder}/gateway.csr"\ncertificate_file = "{self.folder}/gateway.crt"\nca_file = "{self.ca}"\n'
        )
        self.generation = 0

    async def start(self) -> None:
        await self.worker.start()
        self.process = await asyncio.to_thread(self._started)
        await self.until(lambda: self.status(self.port, "GET", "/v2/health/live") == 200)

    def _started(self) -> "subprocess.Popen[bytes]":
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", "edge_agent.gateway", "--config", str(self.config)], stdout=log, stderr=log)

    async def until(self, happened, within_s: float = 15.0) -> None:
        deadline = time.monotonic() + within_s
        while not await asyncio.to_thread(happened):
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            await asyncio.sleep(0.05)

    def status(self, port: int, method: str, path: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request(method, path)
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    def sign(self, *, life_ms: int = DAY_MS) -> int:
        """What agent and coordinator do with the request that the gateway left; returns the certificate's number."""
        key = requested_key((self.folder / "gateway.csr").read_text())
        issued = self.authority.issue(key, Subject(FLEET, "gateway", self.node, self.site), now_ms=now_ms(), life_ms=life_ms)
        staging = self.folder / "new.crt"
        staging.write_text(issued.chain)
        staging.rename(self.folder / "gateway.crt")
        return int(issued.serial, 16)

    def shown(self) -> int:
        """The number of the certificate that the door shows; 0 where it is shut."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            with socket.create_connection(("127.0.0.1", self.door), timeout=5) as raw, context.wrap_socket(raw) as secured:
                return x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"").serial_number
        except OSError:
            return 0

    def serve(self, *upstreams: Upstream, here: bool = True, revoked: tuple[str, ...] = (), proved_ms: int = 0) -> None:
        replicas = [LocalReplica("r-0", str(self.worker.path))] if here else []
        self.generation += 1
        routes = [Route("echo", "echo", 1, 2000, replicas=replicas, upstreams=list(upstreams))]
        table = RouteTable(self.generation, routes, list(revoked), Proof(proved_ms, uptime_ms()))
        staging = self.folder / "routes.new"
        staging.write_bytes(codec.encode(table))
        staging.rename(self.folder / "routes.json")

    def as_upstream(self) -> Upstream:
        return Upstream(self.node, f"https://127.0.0.1:{self.door}", self.tier)

    def ask(self) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request("POST", PATH, BODY)
            response = connection.getresponse()
            return response.status, {key.lower(): value for key, value in response.getheaders()}, response.read()

    async def stop(self) -> None:
        self.process.terminate()
        await asyncio.to_thread(self.process.wait, 10)
        await self.worker.die()


class Stranger:
    """Somebody with a key and a certificate of their choice, or none."""

    def __init__(self, folder: Path, authority: Authority, subject: Subject | None, *, trusts: Authority) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "root.crt").write_text(trusts.root_pem)
        self.context = ssl.create_default_context(cafile=str(folder / "root.crt"))
        self.context.check_hostname = False
        if subject is not None:
            key = ec.generate_private_key(ec.SECP256R1())
            issued = authority.issue(key.public_key(), subject, now_ms=now_ms(), life_ms=DAY_MS)
            (folder / "pair.pem").write_bytes(keys.pem(key) + issued.chain.encode())
            self.context.load_cert_chain(folder / "pair.pem")

    def connection(self, gateway: Gateway) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection("127.0.0.1", gateway.door, timeout=5, context=self.context)

    def ask(self, gateway: Gateway, *, method: str = "POST", path: str = PATH, says: str = "store-2") -> tuple[int, str]:
        """Status and text; 0 where not even TLS came about."""
        connection = self.connection(gateway)
        try:
            return said(connection, method=method, path=path, says=says)
        except (OSError, http.client.HTTPException) as exc:
            return 0, str(exc)
        finally:
            connection.close()


def said(connection: http.client.HTTPSConnection, *, method: str = "POST", path: str = PATH, says: str = "store-2") -> tuple[int, str]:
    connection.request(method, path, BODY if method == "POST" else None, {"Skerry-Forwarded": says, "Skerry-Timeout-Ms": "2000"})
    response = connection.getresponse()
    return response.status, response.read().decode()


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority") / "ca", FLEET, now_ms=now_ms())


@contextlib.asynccontextmanager
async def running(folder: Path, authority: Authority, *nodes: str, **more: Any) -> AsyncIterator[list[Gateway]]:
    gateways = [Gateway(folder, authority, node, **more) for node in nodes]
    try:
        for gateway in gateways:
            await gateway.start()
            assert gateway.shown() == 0, "it opens its door before it is anybody"
            gateway.sign()
            await gateway.until(gateway.shown)
            gateway.serve()
            await gateway.until(lambda gateway=gateway: gateway.ask()[0] == 200)
        yield gateways
    finally:
        for gateway in gateways:
            if hasattr(gateway, "process"):
                await gateway.stop()


def test_a_neighbour_answers_over_tls_and_the_key_never_left_the_gateway(folder, authority):
    async def scene() -> None:
        async with running(folder, authority, "store-1", "store-2") as (one, two):
            assert (one.folder / "gateway.key").stat().st_mode & 0o777 == 0o600
            one.serve(two.as_upstream(), here=False)

            def is_passed_on() -> bool:
                status, headers, _ = one.ask()
                return status == 200 and headers["skerry-served-by"] == "peer" and headers["skerry-node"] == "store-2"

            await one.until(is_passed_on)
            assert two.worker.calls > 0

    asyncio.run(scene())


def strangers(folder: Path, authority: Authority) -> dict[str, tuple[Stranger, int, str]]:
    """By what they are: with what they come, and what becomes of them."""
    other = Authority(folder / "other", FLEET, now_ms=now_ms())

    def of(name: str, role: Role, site: str = "hull", fleet: str = FLEET, by: Authority = authority) -> Stranger:
        return Stranger(folder / f"s-{name}", by, Subject(fleet, role, "store-2", site), trusts=authority)

    return {
        "without a certificate": (Stranger(folder / "s-none", authority, None, trusts=authority), 0, ""),
        "of another authority": (of("authority", "gateway", by=other), 0, ""),
        "with the box's own certificate": (of("box", "box"), 403, "gateways alone"),
        "with the broker's": (of("broker", "broker"), 403, "gateways alone"),
        "the coordinator in another's name": (of("coordinator", "coordinator"), 403, "asks for itself"),
        "of another site": (of("site", "gateway", site="bank"), 403, "of site bank"),
        "of no site": (of("nowhere", "gateway", site=""), 403, "of site none"),
        "of another fleet": (of("fleet", "gateway", fleet="south"), 403, "of fleet south"),
        "a neighbour": (of("good", "gateway"), 200, "outputs"),
    }


def test_a_stranger_is_turned_away_and_a_neighbour_gets_inference_alone(folder, authority):
    async def scene() -> None:
        async with running(folder, authority, "store-1") as (one,):
            found, theirs = {}, strangers(folder, authority)
            for what, (stranger, status, words) in theirs.items():
                found[what] = await asyncio.to_thread(stranger.ask, one)
                assert found[what][0] == status, found
                assert words in found[what][1], found
            neighbour = theirs["a neighbour"][0]
            for method, path in (("GET", "/metrics"), ("GET", "/v2"), ("POST", "/v2/repository/index"), ("GET", PATH)):
                status, text = await asyncio.to_thread(neighbour.ask, one, method=method, path=path)
                assert (status, "nothing else" in text) == (403, True), (method, path, text)
            status, text = await asyncio.to_thread(neighbour.ask, one, says="store-9")
            assert (status, "store-2's" in text) == (403, True), text

    asyncio.run(scene())


def test_the_coordinator_asks_a_box_for_who_tries_a_model_and_takes_no_other_for_it(folder, authority):
    async def scene() -> None:
        async with running(folder, authority, "store-1", "store-2") as (one, two):
            own = Stranger(folder / "s-own", authority, Subject(FLEET, "coordinator", "coordinator"), trusts=authority)
            own.context.check_hostname = True
            gateways = Gateways(FLEET, lambda: own.context)
            url = f"https://127.0.0.1:{one.door}"
            asked = await gateways.infer("store-1", url, "echo", BODY, {"Content-Type": "application/json", "Skerry-Forwarded": "x"})
            assert (asked.status, asked.headers["Skerry-Served-By"], asked.headers["Skerry-Node"]) == (200, "edge", "store-1")
            assert b"outputs" in asked.body
            for node, where, why in (
                ("store-2", url, "certificate"),  # another box answers there
                ("store-1", f"http://127.0.0.1:{one.port}", "not over TLS"),
                ("store-1", "file:///etc/passwd", "not over TLS"),
                ("store-1", "https://127.0.0.1:1", "store-1"),
                ("store-1", "https://[", "store-1"),
            ):
                with pytest.raises(NotAnswered, match=why):
                    await gateways.infer(node, where, "echo", BODY, {})
            foreseen = await gateways.look("store-1", url, "echo", "decision", {"deadline_ms": "900"})
            assert (foreseen.status, json.loads(foreseen.body)["decision"]) == (200, "here")
            told = await gateways.look("store-1", url, "echo", "decisions", {"is_cut_off": "true"})
            assert (told.status, json.loads(told.body)["before"]["edge"] > 0) == (200, True)
            told = await gateways.look("store-1", url, "echo", "slowest", {})
            assert (told.status, json.loads(told.body)["requests"][0]["who"]) == (200, "edge")
            assert (await gateways.look("store-1", url, "echo", "stats", {})).status == 403
            one.serve(two.as_upstream(), here=False)
            await one.until(lambda: one.ask()[1].get("skerry-served-by") == "peer")
            asked = await gateways.infer("store-1", url, "echo", BODY, {})
            assert asked.headers["Skerry-Node"] == "store-2", "it is asked as any caller asks, and passes on as for any"

    asyncio.run(scene())


def test_the_cloud_answers_every_site(folder, authority):
    async def scene() -> None:
        async with running(folder, authority, "cloud-1", tier="cloud", site="") as (cloud,):
            theirs = strangers(folder, authority)
            for what in ("of another site", "of no site", "a neighbour"):
                assert (await asyncio.to_thread(theirs[what][0].ask, cloud))[0] == 200, what
            for what in ("with the box's own certificate", "of another fleet"):
                assert (await asyncio.to_thread(theirs[what][0].ask, cloud))[0] == 403, what

    asyncio.run(scene())


def test_a_box_that_was_thrown_out_is_turned_away_within_a_second_on_a_connection_that_stands(folder, authority):
    async def scene() -> None:
        async with running(folder, authority, "store-1") as (one,):
            neighbour = strangers(folder, authority)["a neighbour"][0]
            connection = neighbour.connection(one)
            with contextlib.closing(connection):
                assert (await asyncio.to_thread(said, connection))[0] == 200
                one.serve(revoked=("store-2",))
                await asyncio.sleep(1)
                status, text = await asyncio.to_thread(said, connection)
                assert (status, "thrown out" in text) == (403, True), text
                one.serve()
                await asyncio.sleep(1)
                assert (await asyncio.to_thread(said, connection))[0] == 200

    asyncio.run(scene())


def test_a_neighbour_whose_certificate_ended_by_the_time_that_was_proved_is_turned_away_also_where_it_stands(folder, authority):
    async def scene() -> None:
        async with running(folder, authority, "store-1", "store-2") as (one, two):
            one.sign(life_ms=30 * DAY_MS)
            await asyncio.sleep(3)
            neighbour = strangers(folder, authority)["a neighbour"][0]
            connection = neighbour.connection(one)
            with contextlib.closing(connection):
                assert (await asyncio.to_thread(said, connection))[0] == 200
                one.serve(proved_ms=now_ms() + 2 * DAY_MS)
                await asyncio.sleep(1)
                status, text = await asyncio.to_thread(said, connection)
                assert (status, "has ended" in text) == (403, True), text
            assert (await asyncio.to_thread(neighbour.ask, one))[0] == 0, "and comes not even through the door again"
            assert (await asyncio.to_thread(one.ask))[0] == 200, "callers on the box are served all the same"
            before = two.worker.calls
            one.serve(two.as_upstream(), here=False, proved_ms=now_ms() + 2 * DAY_MS)
            await asyncio.sleep(1)
            assert (await asyncio.to_thread(one.ask))[0] == 503
            assert two.worker.calls == before, "nor is anything passed on to one"

    asyncio.run(scene())


def test_an_upstream_that_shows_anothers_certificate_is_told_nothing(folder, authority):
    async def scene() -> None:
        async with running(folder, authority, "store-1", "store-2") as (one, two):
            before = two.worker.calls
            one.serve(Upstream("store-3", f"https://127.0.0.1:{two.door}", "edge"), here=False)
            await asyncio.sleep(1)
            status, _, body = await asyncio.to_thread(one.ask)
            assert status == 503, body
            assert two.worker.calls == before

    asyncio.run(scene())


def test_the_next_certificate_is_taken_up_without_a_connection_lost(folder, authority):
    async def scene() -> None:
        async with running(folder, authority, "store-1") as (one,):
            neighbour = strangers(folder, authority)["a neighbour"][0]
            connection = neighbour.connection(one)
            with contextlib.closing(connection):
                assert (await asyncio.to_thread(said, connection))[0] == 200
                serial = one.sign()

                def is_new() -> bool:
                    shown = one.shown()
                    assert shown, "the door was shut in between"
                    return shown == serial

                await one.until(is_new)
                assert (await asyncio.to_thread(said, connection))[0] == 200
                (one.folder / "gateway.crt").write_text("-----BEGIN CERTIFICATE-----\n")
                await asyncio.sleep(3)
                assert one.shown() == serial, "a damaged file changes nothing"
                assert "fleet.not_renewed" in (one.folder / "log").read_text()

    asyncio.run(scene())
