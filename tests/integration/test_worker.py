"""The worker as a process of its own, spoken to over its socket."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from skerry.wire import ipc, oip


def start(model: Path, sock: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "edge_agent.worker", "--model", str(model), "--socket", str(sock)], stderr=subprocess.PIPE
    )


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
        self.socket.sendall(b"".join(ipc.frame(ipc.Call(1, ipc.heads_of(tensors), outputs or []), [t.data for t in tensors])))
        header, body = self.frame()
        return ipc.parse_header(header, ipc.Answer), body

    def close(self) -> None:
        self.stream.close()
        self.socket.close()


@pytest.fixture(scope="module")
def worker(tmp_path_factory, scale_model):
    folder = tmp_path_factory.mktemp("worker")
    process = start(scale_model, folder / "w.sock")
    deadline = time.monotonic() + 30
    while not (folder / "w.sock").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    yield folder / "w.sock"
    process.kill()
    process.communicate()


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
    (output,) = ipc.tensors_of(answer.outputs, memoryview(body))
    assert np.frombuffer(output.data, "<f4").reshape(output.shape).tolist() == [[2, 4, 6], [8, 10, 12]]


@pytest.mark.parametrize(
    ("tensors", "outputs", "complaint"),
    [
        ([tensor([1, 2, 3])], [], "shape [3] given, the model takes [-1, 3]"),
        ([tensor([[1, 2, 3]], "<f8", datatype="FP64")], [], "datatype FP64 given"),
        ([tensor([[1, 2, 3]], name="z")], [], "this model takes ['x']"),
        ([], [], "this model takes ['x']"),
        ([tensor([[1, 2, 3]])], ["nope"], "'nope' is not an output"),
    ],
)
def test_a_wrong_input_is_refused_by_name_and_the_connection_lives_on(client, tensors, outputs, complaint):
    answer, _ = client.call(tensors, outputs)
    assert complaint in answer.error
    assert answer.refused
    assert client.call([tensor([[1, 2, 3]])])[0].error == ""


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
