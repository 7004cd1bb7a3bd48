"""The gateway program as callers meet it: Triton's clients unchanged, over TCP and TLS, with and without client certificates, and by both
protocols, with real workers behind it."""

import asyncio
import contextlib
import http.client
import socket
import ssl
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent.ssl
import numpy as np
import onnx
import onnx.helper as oh
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from geventhttpclient.response import HTTPConnectionClosed
from tritonclient.utils import InferenceServerException, shared_memory

from coordinator.ca.authority import DAY_MS, Authority
from skerry.demo.fleet import free_ports
from skerry.runtime import keys
from skerry.runtime.proved_time import uptime_ms
from skerry.wire import codec
from skerry.wire.box import LocalReplica, Route, RouteTable
from skerry.wire.identity import Subject
from skerry.wire.proof import Proof
from tests.e2e.world import wait_until
from tests.integration.test_worker import start
from tests.integration.test_worker_batches import model

FLOAT = onnx.TensorProto.FLOAT
WITHIN_S = 20.0
X = np.arange(6, dtype=np.float32).reshape(2, 3)


def now_ms() -> int:
    return time.time_ns() // 10**6


def pair(folder: Path, name: str, authority: Authority, *, now: int | None = None, life_ms: int = DAY_MS) -> tuple[str, str]:
    """A certificate for this machine's loopback, and its key, swapped in whole."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = Subject("north", "gateway", name)
    issued = authority.issue(
        key.public_key(), subject, now_ms=now_ms() if now is None else now, life_ms=life_ms, hosts=["127.0.0.1", "localhost"]
    )
    texts = {"key": keys.pem(key), "crt": issued.chain.encode()}
    for ending, content in texts.items():
        staging = folder / f"{name}.{ending}.new"
        staging.write_bytes(content)
        staging.rename(folder / f"{name}.{ending}")
    return str(folder / f"{name}.crt"), str(folder / f"{name}.key")


class Program:
    """A gateway with a stateless and a stateful model, on every way in."""

    def __init__(self, folder: Path, *, asks_for_certificates: bool) -> None:
        self.folder = folder
        self.authority = Authority(folder / "ca", "north", now_ms=now_ms())
        self.ca = str(folder / "ca" / "trusted.crt")
        self.certificate, self.key = pair(folder, "server", self.authority)
        self.http, self.grpc, self.https, self.grpcs = free_ports(4)
        (folder / "gateway.toml").write_text(
            f'node = "store-1"\ntier = "edge"\nlisten = "127.0.0.1:{self.http}"\nsocket = "{folder}/g.sock"\n'
            f'routes_file = "{folder}/routes.json"\ngrpc_listen = "127.0.0.1:{self.grpc}"\nshared_memory = true\n'
            f'[tls]\ncertificate_file = "{self.certificate}"\nkey_file = "{self.key}"\nlisten = "127.0.0.1:{self.https}"\n'
            f'grpc_listen = "127.0.0.1:{self.grpcs}"\n' + (f'client_ca_file = "{self.ca}"\n' if asks_for_certificates else "")
        )
        self._running: list[subprocess.Popen[Any]] = []

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def start(self) -> "Program":
        folder, self.workers = self.folder, {}
        double = model(folder / "double.onnx", [oh.make_node("Add", ["x", "x"], ["y"])], {"x": (FLOAT, ["N", 3])}, {"y": (FLOAT, ["N", 3])})
        nodes = [oh.make_node("Add", ["before", "x"], ["after"]), oh.make_node("Identity", ["after"], ["total"])]
        add = model(folder / "add.onnx", nodes, {"x": (FLOAT, [1]), "before": (FLOAT, [1])}, {"after": (FLOAT, [1]), "total": (FLOAT, [1])})
        options = {"double": (double,), "add": (add, "--state", '[{"input":"before","output":"after"}]')}
        for name, (file, *more) in options.items():
            path = folder / name / "run" / "w.sock"
            path.parent.mkdir(parents=True)
            self._running.append(start(file, path, *more))
            self.workers[name] = path
        wait_until(lambda: all(path.exists() for path in self.workers.values()), WITHIN_S)
        routes = [Route(name, name, 1, 5000, replicas=[LocalReplica(f"{name}-0", str(path))]) for name, path in self.workers.items()]
        (folder / "routes.json").write_bytes(codec.encode(RouteTable(1, routes, time=Proof(now_ms(), uptime_ms()))))
        with (folder / "log").open("ab") as log:
            command = [sys.executable, "-m", "edge_agent.gateway", "--config", str(folder / "gateway.toml")]
            self._running.append(subprocess.Popen(command, stdout=log, stderr=log))
        wait_until(lambda: all(self.is_ready(name) for name in self.workers), WITHIN_S, lambda: self.log)
        return self

    def is_ready(self, name: str) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=5)
            with contextlib.closing(connection):
                connection.request("GET", f"/v2/models/{name}/ready")
                return connection.getresponse().status == 200
        return False

    def shown(self) -> int:
        """The number of the certificate that HTTPS shows."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection(("127.0.0.1", self.https), timeout=5) as raw, context.wrap_socket(raw) as secured:
            return x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"").serial_number

    def stop(self) -> None:
        for process in reversed(self._running):
            process.terminate()
        for process in self._running:
            try:
                process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Iterator[Program]:
    program = Program(tmp_path_factory.mktemp("program"), asks_for_certificates=False)
    try:
        yield program.start()
    finally:
        program.stop()


@pytest.fixture(scope="module")
def strict(tmp_path_factory) -> Iterator[Program]:
    """One that asks callers over TLS for a certificate of its authority."""
    program = Program(tmp_path_factory.mktemp("strict"), asks_for_certificates=True)
    try:
        yield program.start()
    finally:
        program.stop()


def http_input(kind: Any, array: np.ndarray, *, is_binary: bool = True) -> Any:
    tensor = kind.InferInput("x", list(array.shape), "FP32")
    tensor.set_data_from_numpy(array, binary_data=is_binary)
    return tensor


def grpc_input(kind: Any, array: np.ndarray) -> Any:
    tensor = kind.InferInput("x", list(array.shape), "FP32")
    tensor.set_data_from_numpy(array)
    return tensor


def https_client(program: Program, own: tuple[str, str] | None = None) -> triton_http.InferenceServerClient:
    options = {"ca_certs": program.ca, "cert_reqs": gevent.ssl.CERT_REQUIRED}
    if own is not None:
        options |= {"certfile": own[0], "keyfile": own[1]}
    return triton_http.InferenceServerClient(f"127.0.0.1:{program.https}", ssl=True, ssl_options=options, connection_timeout=5)


def grpcs_client(program: Program, own: tuple[str, str] | None = None) -> triton_grpc.InferenceServerClient:
    files = {"root_certificates": program.ca}
    if own is not None:
        files |= {"certificate_chain": own[0], "private_key": own[1]}
    return triton_grpc.InferenceServerClient(f"127.0.0.1:{program.grpcs}", ssl=True, **files)


def doubled(client: Any, kind: Any) -> np.ndarray:
    tensor = http_input(kind, X) if kind in (triton_http, triton_http_aio) else grpc_input(kind, X)
    return client.infer("double", [tensor]).as_numpy("y")


# -- Triton's clients


@pytest.mark.parametrize("is_binary", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_tritons_http_client_infers_in_each_form_and_compression(program, is_binary, compression):
    with contextlib.closing(triton_http.InferenceServerClient(f"127.0.0.1:{program.http}")) as client:
        outputs = [triton_http.InferRequestedOutput("y", binary_data=is_binary)]
        found = client.infer(
            "double", [http_input(triton_http, X, is_binary=is_binary)], outputs=outputs, request_id="r-7", priority=1, timeout=2_000_000,
            request_compression_algorithm=compression, response_compression_algorithm=compression,
        )  # fmt: skip
        np.testing.assert_array_equal(found.as_numpy("y"), 2 * X)
        assert found.get_response()["id"] == "r-7"


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tritons_clients_are_told_what_is_served_and_how_it_went(program, protocol):
    kind = triton_http if protocol == "http" else triton_grpc
    port = program.http if protocol == "http" else program.grpc
    as_json = {} if protocol == "http" else {"as_json": True}
    with contextlib.closing(kind.InferenceServerClient(f"127.0.0.1:{port}")) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("double", "1")
        assert not client.is_model_ready("nobody")
        assert client.get_model_metadata("double", **as_json)["inputs"][0]["name"] == "x"
        config = client.get_model_config("double", **as_json)
        assert (config if protocol == "http" else config["config"])["name"] == "double"
        before = int(client.get_inference_statistics("double", **as_json)["model_stats"][0].get("inference_count", 0))
        doubled(client, kind)
        after = int(client.get_inference_statistics("double", **as_json)["model_stats"][0]["inference_count"])
        assert after > before
        index = client.get_model_repository_index(**as_json)
        assert {entry["name"] for entry in (index if protocol == "http" else index["models"])} == {"double", "add"}


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_sequence_of_tritons_goes_on_from_step_to_step_and_an_unknown_one_is_an_error_that_says_so(program, protocol):
    kind = triton_http if protocol == "http" else triton_grpc
    port = program.http if protocol == "http" else program.grpc
    make = http_input if protocol == "http" else grpc_input
    number = 7001 if protocol == "http" else 7002
    with contextlib.closing(kind.InferenceServerClient(f"127.0.0.1:{port}")) as client:
        totals = [
            float(
                client.infer(
                    "add", [make(kind, np.array([step], np.float32))], sequence_id=number, sequence_start=step == 1, sequence_end=step == 4
                ).as_numpy("total")[0]
            )
            for step in (1, 2, 3, 4)
        ]
        assert totals == [1, 3, 6, 10]
        with pytest.raises(InferenceServerException, match="sequence"):
            client.infer("add", [make(kind, np.array([1], np.float32))], sequence_id=number)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tritons_shared_memory_is_read_and_written(program, protocol):
    kind = triton_http if protocol == "http" else triton_grpc
    port = program.http if protocol == "http" else program.grpc
    key = f"skerry-test-{protocol}-{now_ms()}"
    region = shared_memory.create_shared_memory_region(key, f"/{key}", 2 * X.nbytes)
    try:
        shared_memory.set_shared_memory_region(region, [X])
        with contextlib.closing(kind.InferenceServerClient(f"127.0.0.1:{port}")) as client:
            client.register_system_shared_memory(key, f"/{key}", 2 * X.nbytes)
            tensor = kind.InferInput("x", list(X.shape), "FP32")
            tensor.set_shared_memory(key, X.nbytes)
            output = kind.InferRequestedOutput("y")
            output.set_shared_memory(key, X.nbytes, offset=X.nbytes)
            client.infer("double", [tensor], outputs=[output])
            np.testing.assert_array_equal(shared_memory.get_contents_as_numpy(region, np.float32, list(X.shape), offset=X.nbytes), 2 * X)
            client.unregister_system_shared_memory(key)
            with pytest.raises(InferenceServerException, match=key):
                client.infer("double", [tensor], outputs=[output])
    finally:
        shared_memory.destroy_shared_memory_region(region)


def test_tritons_asyncio_clients_infer_many_at_once(program):
    async def scene() -> None:
        over_http = triton_http_aio.InferenceServerClient(f"127.0.0.1:{program.http}")
        over_grpc = triton_grpc_aio.InferenceServerClient(f"127.0.0.1:{program.grpc}")
        try:
            calls = [over_http.infer("double", [http_input(triton_http_aio, X + number)]) for number in range(50)]
            calls += [over_grpc.infer("double", [grpc_input(triton_grpc_aio, X + number)]) for number in range(50)]
            for number, found in enumerate(await asyncio.gather(*calls)):
                np.testing.assert_array_equal(found.as_numpy("y"), 2 * (X + number % 50))
        finally:
            await over_http.close()
            await over_grpc.close()

    asyncio.run(scene())


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_an_error_reaches_tritons_client_in_words(program, protocol):
    kind = triton_http if protocol == "http" else triton_grpc
    port = program.http if protocol == "http" else program.grpc
    make = http_input if protocol == "http" else grpc_input
    with contextlib.closing(kind.InferenceServerClient(f"127.0.0.1:{port}")) as client:
        with pytest.raises(InferenceServerException, match="nobody"):
            client.infer("nobody", [make(kind, X)])
        with pytest.raises(InferenceServerException, match="x"):
            client.infer("double", [make(kind, X.reshape(3, 2))])


# -- TLS


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tls_serves_whoever_trusts_the_authority_and_nobody_else_trusts_it(program, protocol, tmp_path):
    client, kind = (https_client(program), triton_http) if protocol == "http" else (grpcs_client(program), triton_grpc)
    with contextlib.closing(client):
        np.testing.assert_array_equal(doubled(client, kind), 2 * X)
    Authority(tmp_path / "other", "north", now_ms=now_ms())  # another fleet's, whom they trust instead
    context = ssl.create_default_context(cafile=str(tmp_path / "other" / "root.crt"))
    with pytest.raises(ssl.SSLCertVerificationError):
        https(program, context)


def https(program: Program, context: ssl.SSLContext) -> int:
    connection = http.client.HTTPSConnection("127.0.0.1", program.https, timeout=5, context=context)
    with contextlib.closing(connection):
        connection.request("GET", "/v2/health/live")
        return connection.getresponse().status


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_where_certificates_are_asked_for_only_callers_with_one_of_the_authority_are_answered(strict, protocol, tmp_path):
    mine = pair(tmp_path, "caller", strict.authority)
    other = Authority(tmp_path / "other", "north", now_ms=now_ms())
    theirs = pair(tmp_path, "stranger", other)
    ended = pair(tmp_path, "ended", strict.authority, now=now_ms() - 10 * DAY_MS)
    make, kind = (https_client, triton_http) if protocol == "http" else (grpcs_client, triton_grpc)
    with contextlib.closing(make(strict, mine)) as client:
        np.testing.assert_array_equal(doubled(client, kind), 2 * X)
    for own in (None, theirs, ended):
        with contextlib.closing(make(strict, own)) as client, pytest.raises((InferenceServerException, HTTPConnectionClosed, OSError)):
            doubled(client, kind)


def test_old_tls_plain_text_and_a_handshake_that_never_ends_are_cut_off_and_hold_nobody_up(program):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, OSError)):
        https(program, context)
    good = ssl.create_default_context(cafile=program.ca)
    with socket.create_connection(("127.0.0.1", program.https), timeout=15) as silent, \
            socket.create_connection(("127.0.0.1", program.https), timeout=15) as plain:  # fmt: skip
        plain.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        silent.sendall(b"\x16\x03\x01")
        began = time.monotonic()
        assert https(program, good) == 200
        assert time.monotonic() - began < 5
        with contextlib.suppress(ConnectionResetError):
            assert plain.recv(100)[:8] != b"HTTP/1.1"
        with contextlib.suppress(ConnectionResetError):
            assert silent.recv(100) == b""
        assert time.monotonic() - began < 15


def test_certificates_that_are_replaced_are_taken_up_and_a_bad_pair_changes_nothing(program):
    context = ssl.create_default_context(cafile=program.ca)
    connection = http.client.HTTPSConnection("127.0.0.1", program.https, timeout=5, context=context)
    with contextlib.closing(connection):
        connection.request("GET", "/v2/health/live")
        assert connection.getresponse().read() is not None
        before = program.shown()
        pair(program.folder, "server", program.authority)
        wait_until(lambda: program.shown() != before, WITHIN_S, lambda: program.log)
        connection.request("GET", "/v2/health/live")
        assert connection.getresponse().status == 200, "a connection that stood goes on"
        now = program.shown()
        good = Path(program.key).read_bytes()
        Path(program.key).write_text("-----BEGIN PRIVATE KEY-----\n")
        wait_until(lambda: "tls.not_renewed" in program.log, WITHIN_S)
        assert program.shown() == now
        Path(program.key).write_bytes(good)
        with contextlib.closing(grpcs_client(program)) as client:
            np.testing.assert_array_equal(doubled(client, triton_grpc), 2 * X)
