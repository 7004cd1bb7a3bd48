"""The worker as a process of its own, spoken to over its socket."""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from skerry.wire import ipc, oip


def start(model: Path, sock: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "edge_agent.worker", "--model", str(model), "--socket", str(sock), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


@contextlib.contextmanager
def serving(model: Path, folder: Path, *options: str) -> Iterator[Path]:
    """The socket of a worker that serves ``model``."""
    process = start(model, folder / "w.sock", *options)
    try:
        deadline = time.monotonic() + 30
        while not (folder / "w.sock").exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield folder / "w.sock"
        assert process.poll() is None, "the worker ended"
    finally:
        process.kill()
        process.communicate()


class Client:
    """The gateway's end of the socket, written out plainly."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(str(path))
        self.stream = self.socket.makefile("rb")
        self.hello = ipc.parse_header(self.frame()[0], ipc.Hello)

    def frame(self) -> tuple[bytes, bytes]:
        header_bytes, body_bytes = ipc.parse_prefix(self.stream.read(8))
        return self.stream.read(header_bytes), self.stream.read(body_bytes)

    def call(self, tensors: list[oip.Tensor], outputs: list[str] | None = None) -> tuple[ipc.Answer, bytes]:
        call = ipc.Call(1, ipc.heads_of(tensors), outputs or [])
        (answer,), body = self.batch([call], [t.data for t in tensors])
        return answer, body

    def send(self, calls: list[ipc.Call], body: Sequence[oip.Bytes] = ()) -> None:
        self.socket.sendall(b"".join(ipc.frame(ipc.Batch(calls), list(body))))

    def batch(self, calls: list[ipc.Call], body: Sequence[oip.Bytes] = ()) -> tuple[list[ipc.Answer], bytes]:
        self.send(calls, body)
        header, answered = self.frame()
        return ipc.parse_header(header, ipc.Answers).answers, answered

    def close(self) -> None:
        self.stream.close()
        self.socket.close()


@pytest.fixture(scope="module")
def worker(tmp_path_factory, scale_model):
    with serving(scale_model, tmp_path_factory.mktemp("worker")) as path:
        yield path


@pytest.fixture
def client(worker):
    client = Client(worker)
    yield client
    client.close()


def tensor(values, dtype="<f4", name="x", datatype="FP32") -> oip.Tensor:
    array = np.array(values, dtype=dtype)
    return oip.Tensor(name, datatype, array.shape, array.tobytes())


def test_it_says_what_it_serves_and_answers_right(client):
    assert client.hello.inputs == [ipc.TensorSpec("x", "FP32", (-1, 3))]
    assert client.hello.provider == "CPUExecutionProvider" or "GPU" in client.hello.provider
    answer, body = client.call([tensor([[1, 2, 3], [4, 5, 6]])])
    assert answer.error == ""
    (output,), _ = ipc.tensors_of(answer.outputs, memoryview(body), 0, None)
    assert np.frombuffer(output.data, "<f4").reshape(output.shape).tolist() == [[2, 4, 6], [8, 10, 12]]


@pytest.mark.parametrize(
    ("tensors", "outputs", "complaint"),
    [
        ([tensor([1, 2, 3])], [], "shape [3] given, the model takes [-1, 3]"),
        ([tensor([[1, 2, 3]], "<f8", datatype="FP64")], [], "datatype FP64 given"),
        ([tensor([[1, 2, 3]], name="z")], [], "this model takes ['x']"),
        ([], [], "this model takes ['x']"),
        ([tensor([[1, 2, 3]]), tensor([[1, 2, 3]])], [], "this model takes ['x'], got ['x', 'x']"),
        ([tensor([[1, 2, 3]])], ["nope"], "'nope' is not an output"),
        ([tensor([[1, 2, 3]])], ["y", "y"], "a name is given twice"),
    ],
)
def test_a_wrong_input_is_refused_by_name_and_the_connection_lives_on(client, tensors, outputs, complaint):
    answer, _ = client.call(tensors, outputs)
    assert complaint in answer.error
    assert answer.refused
    assert client.call([tensor([[1, 2, 3]])])[0].error == ""


@contextlib.contextmanager
def sent_ahead(client: Client, tensors: list[oip.Tensor]) -> Iterator[None]:
    """All of them, a frame each, by a thread of its own: answers that nobody reads stop the worker, as they should."""

    def send() -> None:
        for number, given in enumerate(tensors):
            client.send([ipc.Call(number, ipc.heads_of([given]))], [given.data])

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()


@pytest.mark.parametrize(
    "sizes", [[1] * 500, [1, 2000, 5400, 5450, 5461, 6000, 1, 100, 40_000, 3]], ids=["small", "over the end of the reader's 64 KiB"]
)
def test_frames_sent_ahead_are_answered_one_after_the_other_in_their_order(client, sizes):
    with sent_ahead(client, [tensor(np.full((rows, 3), number)) for number, rows in enumerate(sizes)]):
        for number, rows in enumerate(sizes):
            header, body = client.frame()
            (answer,) = ipc.parse_header(header, ipc.Answers).answers
            assert (answer.call, answer.error) == (number, "")
            assert np.array_equal(np.frombuffer(body, "<f4"), np.full(rows * 3, 2 * number))


def test_garbage_on_one_connection_leaves_the_others_alone(worker, client):
    rogue = Client(worker)
    rogue.socket.sendall(b"\xff" * 64)
    try:
        assert rogue.stream.read(1) == b""
    except ConnectionResetError:
        pass  # unread bytes turn the worker's close into a reset: closed all the same
    finally:
        rogue.close()
    assert client.call([tensor([[1, 2, 3]])])[0].error == ""


@pytest.mark.parametrize("content", [b"", b"not a model", "truncated"])
def test_a_file_that_is_no_model_ends_the_worker_with_the_reason(tmp_path, scale_model, content):
    model = tmp_path / "model.onnx"
    model.write_bytes(scale_model.read_bytes()[:-20] if content == "truncated" else content)
    process = start(model, tmp_path / "w.sock")
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 3
    assert b"load failed: " in stderr
