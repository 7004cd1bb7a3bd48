"""The memory that a gateway shares with a worker: tensors are read and written where they lie, and nothing else is reached through it."""

import contextlib
import fcntl
import mmap
import os
import resource
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import pytest

from edge_agent.worker.calls import ROOM_FROM_BYTES, Calls
from edge_agent.worker.memory import ALIGNMENT_BYTES, Room, attach
from edge_agent.worker.session import BIND_FROM_BYTES, Session
from skerry.wire import codec, ipc
from tests.integration.test_worker import Client, serving, tensor

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
FLOAT = onnx.TensorProto.FLOAT
SIZE = 2**20


def memory_file(size_bytes: int, seals: int = SEALS) -> int:
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def share(client: Client, size_bytes: int) -> memoryview:
    """Memory as a gateway attaches it."""
    descriptor = memory_file(size_bytes)
    try:
        socket.send_fds(client.socket, ipc.frame(ipc.Attach(size_bytes), []), [descriptor])
        return memoryview(mmap.mmap(descriptor, size_bytes))
    finally:
        os.close(descriptor)


@pytest.fixture(scope="module")
def worker(tmp_path_factory, scale_model) -> Iterator[Path]:
    with serving(scale_model, tmp_path_factory.mktemp("memory")) as path:
        yield path


@pytest.fixture
def client(worker) -> Iterator[Client]:
    client = Client(worker)
    yield client
    client.close()


def put(memory: memoryview, at: int, array: np.ndarray) -> ipc.TensorHead:
    memory[at : at + array.nbytes] = array.tobytes()
    return ipc.TensorHead("x", "FP32", array.shape, array.nbytes, at)


def is_closed(client: Client) -> bool:
    try:
        return client.stream.read(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("rows", [1, ROOM_FROM_BYTES // 12, ROOM_FROM_BYTES // 12 + 1, 20_000])
def test_inputs_and_outputs_lie_where_the_gateway_says(client, rows):
    memory = share(client, SIZE)
    array = np.arange(3 * rows, dtype="<f4").reshape(-1, 3)
    (answer,), body = client.batch([ipc.Call(7, [put(memory, 4096, array)], room=ipc.Room(SIZE // 2 + 8, SIZE // 2 - 8))])
    assert (answer.call, answer.error) == (7, "")
    (head,) = answer.outputs
    assert (head.at < 0) == (head.size_bytes < ROOM_FROM_BYTES) == bool(body), "small outputs go with the frame"
    if head.at >= 0:
        assert head.at % ALIGNMENT_BYTES == 0
        assert SIZE // 2 + 8 <= head.at <= SIZE - head.size_bytes
    (output,), _ = ipc.tensors_of(answer.outputs, memoryview(body), 0, memory)
    assert np.array_equal(np.frombuffer(output.data, "<f4").reshape(output.shape), 2 * array)


def test_an_output_that_does_not_fit_into_its_room_goes_with_the_frame(client):
    memory = share(client, SIZE)
    array = np.ones((20_000, 3), "<f4")
    for size in (0, 5000, array.nbytes - 1):
        (answer,), body = client.batch([ipc.Call(1, [put(memory, 0, array)], room=ipc.Room(SIZE // 2, size))])
        assert answer.outputs[0].at < 0
        assert np.array_equal(np.frombuffer(body, "<f4"), np.full(60_000, 2))
        assert not any(memory[SIZE // 2 :]), "and nothing is written past it"


def test_tensors_in_the_frame_and_in_memory_may_be_mixed(client):
    memory = share(client, SIZE)
    rows = [tensor([[number, 1, 2]]) for number in range(4)]
    array = np.full((2000, 3), 5, "<f4")
    calls = [ipc.Call(number, ipc.heads_of([row])) for number, row in enumerate(rows)]
    calls.insert(2, ipc.Call(9, [put(memory, 64, array)]))
    answers, body = client.batch(calls, [row.data for row in rows])
    assert [answer.call for answer in answers] == [0, 1, 9, 2, 3]
    got, offset = [], 0
    for answer in answers:
        (output,), offset = ipc.tensors_of(answer.outputs, memoryview(body), offset, memory)
        got.append(np.frombuffer(output.data, "<f4"))
    ipc.check_end(memoryview(body), offset)
    assert [values[0] for values in got] == [0, 2, 10, 4, 6]


@pytest.mark.parametrize(
    ("head", "room"),
    [
        (ipc.TensorHead("x", "FP32", (1, 3), 12, SIZE - 8), None),
        (ipc.TensorHead("x", "FP32", (1, 3), 12, 2**62), None),
        (ipc.TensorHead("x", "FP32", (1, 3), 12, 10**30), None),
        (ipc.TensorHead("x", "FP32", (1, 3), 16, 0), None),
        (ipc.TensorHead("x", "FP32", (1, 3), -12, 0), None),
        (ipc.TensorHead("x", "FP32", (1, 3), 12, 0), ipc.Room(SIZE, 1)),
        (ipc.TensorHead("x", "FP32", (1, 3), 12, 0), ipc.Room(-64, 128)),
        (ipc.TensorHead("x", "FP32", (1, 3), 12, 0), ipc.Room(0, 2**63)),
        (ipc.TensorHead("x", "FP32", (1, 3), 12, 0), ipc.Room(64, -1)),
    ],
)
def test_what_lies_outside_the_memory_ends_the_connection_and_no_other(worker, client, head, room):
    rogue = Client(worker)
    share(rogue, SIZE)
    rogue.send([ipc.Call(1, [head], room=room)])
    assert is_closed(rogue)
    rogue.close()
    assert client.call([tensor([[1, 2, 3]])])[0].error == ""


def test_without_memory_nothing_lies_in_it(worker):
    for head, room in ((ipc.TensorHead("x", "FP32", (0, 3), 0, 0), None), (ipc.TensorHead("x", "FP32", (0, 3), 0), ipc.Room(0, 0))):
        client = Client(worker)
        client.send([ipc.Call(1, [head], room=room)])
        assert is_closed(client)
        client.close()


def pipe(size_bytes: int) -> int:
    reading, writing = os.pipe()
    os.close(writing)
    return reading


REFUSED = {
    "shorter than announced": lambda: [memory_file(SIZE - 4096)],
    "longer than announced": lambda: [memory_file(SIZE + 4096)],
    "it can shrink": lambda: [memory_file(SIZE, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)],
    "it can grow": lambda: [memory_file(SIZE, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)],
    "not sealed": lambda: [memory_file(SIZE, 0)],
    "it can't be written": lambda: [memory_file(SIZE, SEALS | fcntl.F_SEAL_WRITE)],
    "a pipe": lambda: [pipe(SIZE)],
    "a device": lambda: [os.open("/dev/zero", os.O_RDWR)],
    "two": lambda: [memory_file(SIZE), memory_file(SIZE)],
    "many": lambda: [memory_file(SIZE) for _ in range(20)],
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_sealed_memory_ends_the_connection_and_leaves_no_descriptor(worker, client, case):
    descriptors = REFUSED[case]()
    rogue = Client(worker)
    socket.send_fds(rogue.socket, ipc.frame(ipc.Attach(SIZE), []), descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    assert is_closed(rogue)
    rogue.close()
    with contextlib.closing(Client(worker)) as other:
        assert other.hello.shares_memory, "that is its maker's fault, not this kernel's"
    assert client.call([tensor([[1, 2, 3]])])[0].error == ""


def pid_of_worker(client: Client) -> int:
    pid, _, _ = struct.unpack("3i", client.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid


def test_a_kernel_that_does_not_map_it_is_said_to_the_next_connection_which_goes_on_without(tmp_path, scale_model):
    """Here it is a limit on the worker's addresses."""
    with serving(scale_model, tmp_path) as path:
        with contextlib.closing(Client(path)) as client:
            pid = pid_of_worker(client)
            used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * mmap.PAGESIZE
            most = used + 128 * SIZE
            resource.prlimit(pid, resource.RLIMIT_AS, (most, most))
            share(client, 256 * SIZE)
            assert is_closed(client)
        with contextlib.closing(Client(path)) as client:
            assert not client.hello.shares_memory
            assert client.call([tensor([[1, 2, 3]])])[0].error == ""


def test_an_attach_frame_without_memory_ends_the_connection(client):
    client.socket.sendall(b"".join(ipc.frame(ipc.Attach(SIZE), [])))
    assert is_closed(client)


def test_memory_goes_with_its_connection(tmp_path, scale_model):
    with serving(scale_model, tmp_path) as path:
        with contextlib.closing(Client(path)) as client:
            pid = pid_of_worker(client)

        def held() -> tuple[int, int]:
            maps = Path(f"/proc/{pid}/maps").read_text().count("memfd:")
            return maps, len(list(Path(f"/proc/{pid}/fd").iterdir()))

        def ask(then: str) -> None:
            client = Client(path)
            memory = share(client, SIZE)
            head = put(memory, 0, np.ones((20_000, 3), "<f4"))
            (answer,), _ = client.batch([ipc.Call(1, [head], room=ipc.Room(SIZE // 2, SIZE // 2))])
            assert answer.error == ""
            if then == "garbage":
                client.send([ipc.Call(1, [ipc.TensorHead("x", "FP32", (1, 3), 12, SIZE)])])
            client.close()

        before = held()
        for _ in range(20):
            ask("hang up")
            ask("garbage")

        def is_let_go() -> bool:
            """The first reading may have counted a connection that was ending just then."""
            maps, descriptors = held()
            return maps == before[0] and descriptors <= before[1]

        for _ in range(100):
            if is_let_go():
                break
            Client(path).close()
        assert is_let_go(), (held(), before)


# -- in this process, to see what is copied


@pytest.fixture
def scale(scale_model) -> Session:
    return Session(scale_model, threads=1, warmup=[])


def test_a_large_output_is_written_to_its_room_by_onnx_runtime_itself(scale):
    rows = BIND_FROM_BYTES // 12 + 1
    x, y = np.ones((rows, 3), "<f4"), np.zeros((rows, 3), "<f4")
    assert scale.shape_ahead("y", {"x": x}) == (rows, 3)
    assert scale.shape_ahead("y", {"x": x[:-1]}) is None, "copying less is faster"
    assert scale.compute({"x": x}, ["y"], {"y": ((rows, 3), y.ctypes.data)}) == [None]
    assert np.array_equal(y, 2 * x)


def test_a_large_input_is_read_where_it_lies_and_numbers_that_may_be_indices_are_copied(scale, tmp_path):
    memory = np.ones((20_000, 3), "<f4")
    given = tensor(memory)
    in_place = scale.feeds_of([type(given)("x", "FP32", memory.shape, memory.reshape(-1).view(np.uint8).data)])
    assert np.shares_memory(in_place["x"], memory)
    path = tmp_path / "i.onnx"
    graph = oh.make_graph(
        [oh.make_node("Cast", ["x"], ["y"], to=FLOAT)],
        "g",
        [oh.make_tensor_value_info("x", onnx.TensorProto.INT64, ["N"])],
        [oh.make_tensor_value_info("y", FLOAT, ["N"])],
    )
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=9), path)
    whole = np.arange(20_000)
    copied = Session(path, threads=1, warmup=[]).feeds_of([type(given)("x", "INT64", whole.shape, whole.view(np.uint8).data)])
    assert np.array_equal(copied["x"], whole)
    assert not np.shares_memory(copied["x"], whole)


def test_a_model_that_gives_another_shape_than_it_says_is_answered_all_the_same(tmp_path):
    graph = oh.make_graph(
        [oh.make_node("Concat", ["x", "x"], ["y"], axis=0)],
        "liar",
        [oh.make_tensor_value_info("x", FLOAT, ["N", 3])],
        [oh.make_tensor_value_info("y", FLOAT, ["N", 3])],
    )
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=9), tmp_path / "m.onnx")
    calls = Calls(Session(tmp_path / "m.onnx", threads=1, warmup=[]))
    descriptor = memory_file(4 * SIZE)
    memory = attach(descriptor, 4 * SIZE)
    os.close(descriptor)
    array = np.ones((20_000, 3), "<f4")
    for _ in range(2):
        call = ipc.Call(1, [put(memory.view, 0, array)], room=ipc.Room(SIZE, 3 * SIZE))
        answers, parts = calls.answer(memoryview(codec.encode(ipc.Batch([call]))), memoryview(b""), memory)
        assert parts == []
        (output,), _ = ipc.tensors_of(answers.answers[0].outputs, memoryview(b""), 0, memory.view)
        assert output.shape == (40_000, 3)
        assert np.all(np.frombuffer(output.data, "<f4") == 1)
    del output
    memory.close()


def test_parts_of_a_room_are_aligned_do_not_overlap_and_end_with_it():
    descriptor = memory_file(SIZE)
    memory = attach(descriptor, SIZE)
    os.close(descriptor)
    room = Room(memory, ipc.Room(100, 1000))
    assert [room.part(size) for size in (10, 64, 65, 500, 300, 210, 0)] == [128, 192, 256, 384, -1, -1, 896]
    assert room.part(204) == 896
    assert room.part(1) == -1
    memory.close()
