"""The relay as a process of its own, between a gateway's connection and model servers that do as they please."""

import contextlib
import http.server
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skerry.wire import ipc, oip
from tests.integration.test_worker import Client

X = oip.Tensor("x", "FP32", (1, 3), np.array([[1, 2, 3]], "<f4").tobytes())
METADATA = {
    "name": "m",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-2, 3]}],
}
MEMORY_BYTES = 64 * 2**20


class Script:
    """What a server does; ``infer`` gets the handler and the request's body."""

    def __init__(self) -> None:
        self.about: Any = {"name": "plain", "version": "1", "extensions": []}
        self.model: Any = METADATA
        self.not_ready = 0
        self.infer: Callable[[Handler, bytes], None] = double
        self.seen: list[tuple[int, dict[str, str], bytes]] = []
        """By call: the caller's port, headers and body."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    script: Script

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, body: bytes, *, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def raw(self, data: bytes) -> None:
        self.wfile.write(data)
        self.close_connection = True

    def do_GET(self) -> None:
        script = self.script
        if self.path == "/v2/health/ready":
            script.not_ready -= 1
            self.reply(b"", status=503 if script.not_ready >= 0 else 200)
        elif self.path == "/v2/models/m/ready":
            self.reply(b"")
        else:
            value = {"/v2": script.about, "/v2/models/m": script.model}[self.path]
            self.reply(value if isinstance(value, bytes) else json.dumps(value).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.script.seen.append((self.client_address[1], dict(self.headers), body))
        with contextlib.suppress(ConnectionError):
            self.script.infer(self, body)


def double(handler: Handler, body: bytes) -> None:
    """As a server should: in binary where binary was asked for."""
    request = oip.parse_infer(body, handler.headers.get(oip.HEADER_LENGTH))
    outputs = [oip.Tensor("y", t.datatype, t.shape, (2 * np.frombuffer(t.data, "<f4")).tobytes()) for t in request.inputs]
    answer = oip.render_infer(request, outputs, model_name="m", model_version="1", parameters={})
    length = {} if answer.header_length is None else {oip.HEADER_LENGTH.replace("-", "_"): str(answer.header_length)}
    handler.reply(b"".join(bytes(part) for part in answer.parts), **length)


@pytest.fixture
def script() -> Iterator[tuple[Script, int]]:
    script = Script()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Scripted", (Handler,), {"script": script}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield script, server.server_address[1]
    server.shutdown()
    thread.join(5)
    server.server_close()


@contextlib.contextmanager
def relay(folder: Path, port: int, *options: str) -> Iterator[subprocess.Popen[str]]:
    words = ["--socket", str(folder / "worker.sock"), "--port", str(port), "--model", "m", "--memory-bytes", str(MEMORY_BYTES), *options]
    process = subprocess.Popen([sys.executable, "-m", "edge_agent.worker.relay", *words], stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def connected(folder: Path, port: int, *options: str) -> Iterator[Client]:
    """A gateway's connection through a relay."""
    with relay(folder, port, "--timeout", "3", *options) as process:
        deadline = time.monotonic() + 30
        while not (folder / "worker.sock").exists():
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with contextlib.closing(Client(folder / "worker.sock")) as client:
            yield client


def doubled(client: Client) -> None:
    answer, body = client.call([X])
    assert answer.error == ""
    assert np.frombuffer(body, "<f4").tolist() == [2.0, 4.0, 6.0]


@pytest.mark.parametrize("extensions", [[], ["binary_tensor_data"]])
def test_tensors_go_in_binary_where_the_server_says_that_it_takes_them(script, tmp_path, extensions):
    plan, port = script
    plan.about["extensions"] = extensions
    with connected(tmp_path, port) as client:
        assert client.hello.inputs == [ipc.TensorSpec("x", "FP32", (-1, 3))]
        assert client.hello.outputs == [ipc.TensorSpec("y", "FP32", (-1, 3))], "a free extent is -1, whatever the server calls it"
        assert client.hello.provider == f"plain 1 on port {port}"
        doubled(client)
        answer, _ = client.call([X], ["y"])
        assert [output.name for output in answer.outputs] == ["y"]
    assert all((oip.HEADER_LENGTH in headers) == bool(extensions) for _, headers, _ in plan.seen)


def test_a_server_is_waited_for_until_it_is_ready(script, tmp_path):
    plan, port = script
    plan.not_ready = 5
    with connected(tmp_path, port) as client:
        doubled(client)


def test_a_server_that_never_gets_ready_is_said(script, tmp_path):
    plan, port = script
    plan.not_ready = 10**6
    with relay(tmp_path, port, "--ready-within", "0.5") as process:
        _, said = process.communicate(timeout=20)
    assert process.returncode == 3
    assert said == "load failed: not ready within 0 s: /v2/health/ready: status 503\n"
    assert not (tmp_path / "worker.sock").exists()


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (b"no json", "malformed"),
        (b"[" * 100_000, "/v2/models/m"),
        ({"inputs": 5}, "Expected `array"),
        ({"inputs": [{"name": "x", "datatype": "FP128\x1b[2J", "shape": [1]}]}, "'FP128?[2J'"),
        ({"inputs": [{"name": "x" * 600, "datatype": "FP32", "shape": [1]}]}, "too long"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1]}] * 300}, "at most 256"),
        (b"x" * (2 * 2**20), "more than 1048576 bytes"),
    ],
)
def test_a_description_that_makes_no_sense_ends_the_relay_with_the_reason(script, tmp_path, model, word):
    plan, port = script
    plan.model = model
    with relay(tmp_path, port) as process:
        _, said = process.communicate(timeout=20)
    assert process.returncode == 3
    assert said.startswith("load failed: ")
    assert word in said
    assert "\x1b" not in said


def test_one_connection_to_the_server_is_kept_for_each_of_the_gateways(script, tmp_path):
    plan, port = script
    with connected(tmp_path, port) as client:
        for _ in range(3):
            doubled(client)
        with contextlib.closing(Client(tmp_path / "worker.sock")) as other:
            doubled(other)
    ports = [port for port, _, _ in plan.seen]
    assert len(set(ports[:3])) == 1
    assert len(set(ports)) == 2


def test_a_server_that_closed_the_connection_in_between_costs_nobody_an_answer(script, tmp_path):
    plan, port = script

    def answer_and_leave(handler: Handler, body: bytes) -> None:
        double(handler, body)
        handler.close_connection = True  # without having said so

    plan.infer = answer_and_leave
    with connected(tmp_path, port) as client:
        for _ in range(4):
            doubled(client)
            time.sleep(0.05)
    assert len({port for port, _, _ in plan.seen}) == 4


OUTPUT = '"outputs":[{"name":"y","datatype":"FP32","shape":[1,3],"data":[2,4,6]}]'


def say(text: str, **headers: str) -> Callable[[Handler, bytes], None]:
    return lambda handler, _: handler.reply(text.encode(), **headers)


def changed(old: str, new: str) -> Callable[[Handler, bytes], None]:
    """A good answer in JSON with one thing in it that is not."""
    assert old in OUTPUT
    return say('{"model_name":"m",' + OUTPUT.replace(old, new) + "}")


def drip(handler: Handler, _: bytes) -> None:
    handler.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(100):
        handler.wfile.write(b"x")
        time.sleep(0.1)


def sleep(handler: Handler, _: bytes) -> None:
    time.sleep(5)
    handler.reply(b"late")


HOSTILE: dict[str, tuple[Callable[[Handler, bytes], None], str]] = {
    "no json": (say("no json"), "not of the protocol"),
    "brackets": (say("[" * 200_000), "not of the protocol"),
    "no outputs": (say('{"model_name":"m"}'), "not of the protocol"),
    "another output": (changed('"y"', '"z"'), "lacks the output 'y'"),
    "one output twice": (changed("}]", "}," + OUTPUT[11:]), "2 outputs of 1 names"),
    "too few numbers": (changed("[2,4,6]", "[2]"), "not of the protocol"),
    "a huge shape": (changed("[1,3]", "[1099511627776,1099511627776]"), "not of the protocol"),
    "text for numbers": (changed("[2,4,6]", '["a","b","c"]'), "not of the protocol"),
    "an unknown datatype": (changed("FP32", "FP\\u001b"), "not of the protocol"),
    "a length that is none": (say("{}", Inference_Header_Content_Length="²"), "not of the protocol"),
    "a length past the end": (say("{}", Inference_Header_Content_Length="99"), "not of the protocol"),
    "a length beyond measure": (say("{}", Inference_Header_Content_Length="99999999999"), "bytes of JSON"),
    "too much json": (say(" " * (2 * 2**20)), "more than 1048576 bytes"),
    "compressed": (say("x", Content_Encoding="gzip"), "compressed"),
    "an error": (lambda h, _: h.reply(b'{"error":"no\\u001b[31m memory"}', status=500), "status 500: no?[31m memory"),
    "an error without words": (lambda h, _: h.reply(b"\xff\xfe", status=503), "status 503"),
    "no http": (lambda h, _: h.raw(b"hello\r\n\r\n"), "BadStatusLine"),
    "many headers": (lambda h, _: h.raw(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 1000 + b"\r\n"), "HTTPException"),
    "cut off": (lambda h, _: h.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{}"), "cut off"),
    "bad chunks": (lambda h, _: h.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), "can't be spoken to"),
    "silence": (sleep, "did not answer within 3 s"),
    "drops": (drip, "was not whole after 3 s"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_a_server_should_not_say_is_an_error_and_the_next_call_is_answered(script, tmp_path, case):
    plan, port = script
    plan.infer, word = HOSTILE[case]
    with connected(tmp_path, port) as client:
        answer, body = client.call([X], ["y"])
        assert word in answer.error
        assert (answer.outputs, answer.refused, body) == ([], False, b"")
        assert answer.error.isprintable()
        plan.infer = double
        doubled(client)


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_what_the_server_calls_the_callers_mistake_is_one(script, tmp_path, status):
    plan, port = script
    plan.infer = lambda handler, _: handler.reply(b'{"error":"x has rank 1"}', status=status)
    with connected(tmp_path, port) as client:
        answer, _ = client.call([X])
        assert (answer.refused, answer.error) == (True, f"the server refused with status {status}: x has rank 1")


@pytest.mark.parametrize(("extensions", "most_bytes"), [([], MEMORY_BYTES // 64), (["binary_tensor_data"], MEMORY_BYTES // 8)])
def test_more_than_the_relays_memory_bears_is_refused_and_the_next_call_is_answered(script, tmp_path, extensions, most_bytes):
    plan, port = script
    plan.about["extensions"] = extensions
    with connected(tmp_path, port) as client:
        rows = most_bytes // 12 + 1
        answer, _ = client.call([oip.Tensor("x", "FP32", (rows, 3), bytes(12 * rows))])
        assert answer.refused
        assert f"at most {most_bytes} are taken" in answer.error
        doubled(client)
    assert len(plan.seen) == 1


def test_the_calls_of_a_batch_go_to_the_server_one_after_the_other(script, tmp_path):
    plan, port = script
    with connected(tmp_path, port) as client:
        assert (client.hello.shares_memory, client.hello.batches) == (False, False)
        wrong = oip.Tensor("x", "FP16", (1,), b"\0\0")
        calls = [ipc.Call(number, ipc.heads_of([given])) for number, given in enumerate([X, wrong, X])]
        answers, body = client.batch(calls, [X.data, wrong.data, X.data])
    assert [(answer.call, answer.refused, answer.batch) for answer in answers] == [(0, False, 1), (1, True, 1), (2, False, 1)]
    assert np.frombuffer(body, "<f4").tolist() == [2, 4, 6, 2, 4, 6]
    assert len(plan.seen) == 2


def test_the_answers_to_one_batch_have_together_no_more_than_the_relay_bears(script, tmp_path):
    plan, port = script
    plan.about["extensions"] = ["binary_tensor_data"]
    row = oip.Tensor("x", "FP32", (1, 3), bytes(12))
    large = oip.Tensor("y", "FP32", (MEMORY_BYTES // 8 // 20, 3), bytes(12 * (MEMORY_BYTES // 8 // 20)))

    def swell(handler: Handler, body: bytes) -> None:
        request = oip.parse_infer(body, handler.headers.get(oip.HEADER_LENGTH))
        answer = oip.render_infer(request, [large], model_name="m", model_version="1", parameters={})
        length = {oip.HEADER_LENGTH.replace("-", "_"): str(answer.header_length)}
        handler.reply(b"".join(bytes(part) for part in answer.parts), **length)

    plan.infer = swell
    with connected(tmp_path, port) as client:
        answers, body = client.batch([ipc.Call(number, ipc.heads_of([row])) for number in range(3)], [row.data] * 3)
        assert len(body) == len(large.data)
        assert answers[0].error == ""
        assert all("the answers to one batch have more than" in answer.error for answer in answers[1:])


def test_a_tensor_in_memory_that_was_never_shared_ends_the_connection(script, tmp_path):
    _, port = script
    with connected(tmp_path, port) as client:
        client.send([ipc.Call(1, [ipc.TensorHead("x", "FP32", (1, 3), 12, 0)])])
        assert client.stream.read(1) == b""


def test_a_datatype_without_a_json_form_is_refused_where_the_server_takes_json_alone(script, tmp_path):
    _, port = script
    with connected(tmp_path, port) as client:
        answer, _ = client.call([oip.Tensor("x", "FP16", (1,), b"\0\0")])
        assert answer.refused
        assert "FP16 has no JSON form" in answer.error


def test_a_server_that_is_gone_is_an_error_for_each_call(tmp_path, script):
    plan, port = script
    plan.infer = lambda handler, _: handler.connection.shutdown(socket.SHUT_RDWR)
    with connected(tmp_path, port) as client:
        for _ in range(2):
            answer, _ = client.call([X])
            assert "can't be spoken to" in answer.error
