"""Calls that come in one frame share one run where the model allows it, and none of them can spoil another's."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import pytest

from edge_agent.worker.calls import MAX_CALLS
from edge_agent.worker.session import Session
from skerry.wire import ipc, oip
from tests.integration.test_worker import Client, serving, tensor
from tests.integration.test_worker_memory import is_closed, put, share

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
Shape = list[int | str | None]


def model(path: Path, nodes: list, inputs: dict[str, tuple[int, Shape]], outputs: dict[str, tuple[int, Shape]], **constants) -> Path:
    infos = [[oh.make_tensor_value_info(name, *what) for name, what in infos.items()] for infos in (inputs, outputs)]
    graph = oh.make_graph(nodes, "g", *infos, [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()])
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture(scope="module")
def scale(tmp_path_factory, scale_model) -> Iterator[Path]:
    with serving(scale_model, tmp_path_factory.mktemp("batches")) as path:
        yield path


@pytest.fixture
def client(scale) -> Iterator[Client]:
    client = Client(scale)
    yield client
    client.close()


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Iterator[Path]:
    """y[i] = 10 x[i], looked up: an index that the table of four lacks fails the whole run."""
    folder = tmp_path_factory.mktemp("table")
    nodes = [oh.make_node("Gather", ["table", "x"], ["y"])]
    path = model(folder / "m.onnx", nodes, {"x": (INT64, ["N"])}, {"y": (FLOAT, ["N"])}, table=np.array([0, 10, 20, 30], "f4"))
    with serving(path, folder) as socket:
        yield socket


def outputs_of(answers: list[ipc.Answer], body: bytes, memory: memoryview | None = None) -> list[list[list[float]]]:
    """The first output of each answer that has one."""
    offset, values = 0, []
    for answer in answers:
        tensors, offset = ipc.tensors_of(answer.outputs, memoryview(body), offset, memory)
        values += [np.frombuffer(t.data, "<f4").reshape(t.shape).tolist() for t in tensors[:1]]
    ipc.check_end(memoryview(body), offset)
    return values


def ask(client: Client, tensors: list[oip.Tensor]) -> tuple[list[ipc.Answer], bytes]:
    return client.batch([ipc.Call(10 + n, ipc.heads_of([t])) for n, t in enumerate(tensors)], [t.data for t in tensors])


def test_calls_that_come_together_run_together_and_each_gets_its_own_rows(client):
    assert client.hello.batches
    answers, body = ask(client, [tensor([[1, 2, 3]]), tensor([[4, 5, 6], [7, 8, 9]]), tensor([[0, 0, 1]])])
    assert [(answer.call, answer.batch) for answer in answers] == [(10, 3), (11, 3), (12, 3)]
    assert len({answer.compute_us for answer in answers}) == 1, "the run's time is everybody's"
    assert outputs_of(answers, body) == [[[2, 4, 6]], [[8, 10, 12], [14, 16, 18]], [[0, 0, 2]]]


def test_a_call_that_is_wrong_in_itself_is_answered_so_and_the_others_run_without_it(client):
    wrong = [tensor([[1, 2]]), tensor([1, 2, 3]), tensor([[1, 2, 3]], name="z"), tensor([[1, 2, 3]], "<f8", datatype="FP64")]
    answers, body = ask(client, [tensor([[1, 1, 1]]), *wrong, tensor([[2, 2, 2]])])
    assert [answer.refused for answer in answers] == [False, True, True, True, True, False]
    assert [answer.batch for answer in answers] == [2, 1, 1, 1, 1, 2]
    assert outputs_of(answers, body) == [[[2, 2, 2]], [[4, 4, 4]]]


def test_a_call_that_fails_the_run_fails_alone(table):
    client = Client(table)
    answers, body = ask(client, [tensor(rows, "<i8", datatype="INT64") for rows in ([1], [9], [3, 2])])
    assert [answer.batch for answer in answers] == [1, 1, 1]
    assert [bool(answer.error) for answer in answers] == [False, True, False]
    assert "out of" in answers[1].error
    assert outputs_of(answers, body) == [[10], [30, 20]]
    answers, body = ask(client, [tensor(rows, "<i8", datatype="INT64") for rows in ([1], [3, 2])])
    assert [answer.batch for answer in answers] == [2, 2], "and the next ones run together again"
    client.close()


def test_calls_without_rows_or_with_other_outputs_run_apart(client):
    rows = tensor([[1, 2, 3]])
    calls = [ipc.Call(n, ipc.heads_of([rows]), outputs) for n, outputs in enumerate([[], ["y"], ["nope"]])]
    empty = oip.Tensor("x", "FP32", (0, 3), b"")
    calls.append(ipc.Call(3, ipc.heads_of([empty])))
    answers, body = client.batch(calls, [rows.data] * 3)
    assert [answer.batch for answer in answers] == [2, 2, 1, 1]
    assert [answer.refused for answer in answers] == [False, False, True, False]
    assert answers[3].outputs[0].shape == (0, 3)
    assert outputs_of(answers[:2], body) == [[[2, 4, 6]]] * 2


def test_a_batch_of_none_is_answered_and_one_of_too_many_ends_the_connection(client):
    assert client.batch([]) == ([], b"")
    client.send([ipc.Call(1, [])] * (MAX_CALLS + 1))
    assert is_closed(client)


def test_bytes_after_the_last_tensor_end_the_connection(client):
    client.send([ipc.Call(1, ipc.heads_of([tensor([[1, 2, 3]])]))], [bytes(13)])
    assert is_closed(client)


def test_outputs_of_one_run_go_to_each_calls_own_room(client):
    memory = share(client, 2**20)
    arrays = [np.full((rows, 3), rows, "<f4") for rows in (700, 1000, 1, 2000)]
    ats, calls = [0, 2**16, 2 * 2**16, 3 * 2**16], []
    for number, (at, array) in enumerate(zip(ats, arrays, strict=True)):
        room = ipc.Room(2**19 + at, 2**16)
        calls.append(ipc.Call(number, [put(memory, at, array)], room=room))
    answers, body = client.batch(calls)
    assert [answer.batch for answer in answers] == [4] * 4
    assert [answer.outputs[0].at for answer in answers] == [2**19, 2**19 + ats[1], -1, 2**19 + ats[3]]
    assert outputs_of(answers, body, memory) == [(2 * array).tolist() for array in arrays]


def signature(tmp_path: Path, x: Shape, z: Shape, y: Shape, kind: int = FLOAT) -> Session:
    nodes = [oh.make_node("Identity", ["x"], ["y"]), oh.make_node("Identity", ["z"], ["w"])]
    return Session(
        model(tmp_path / "m.onnx", nodes, {"x": (kind, x), "z": (FLOAT, z)}, {"y": (kind, y), "w": (FLOAT, z)}), threads=1, warmup=[]
    )


@pytest.mark.parametrize(
    ("x", "z", "y", "kind", "expected"),
    [
        (["N", 3], ["N"], ["N", 3], FLOAT, True),
        ([None, 3], [None], [None, 3], FLOAT, True),
        (["N", 3], ["M"], ["N", 3], FLOAT, False),
        ([2, 3], ["N"], [2, 3], FLOAT, False),
        (["N", 3], [], ["N", 3], FLOAT, False),
        (["N", 3], ["N"], ["N", 3], onnx.TensorProto.STRING, False),
    ],
)
def test_a_model_runs_batches_where_every_first_axis_is_free_and_the_same(tmp_path, x, z, y, kind, expected):
    assert signature(tmp_path, x, z, y, kind).batches == expected


def test_a_model_whose_outputs_do_not_have_the_calls_rows_is_answered_right_call_by_call(tmp_path):
    """It says that its first axis is free and then gives a sum over all rows."""
    nodes = [oh.make_node("ReduceSum", ["x"], ["y"], keepdims=1)]
    path = model(tmp_path / "m.onnx", nodes, {"x": (FLOAT, ["N", 3])}, {"y": (FLOAT, ["M", 1])})
    with serving(path, tmp_path) as socket:
        client = Client(socket)
        for _ in range(2):
            answers, body = ask(client, [tensor([[1, 2, 3]]), tensor([[4, 5, 6]])])
            assert [answer.batch for answer in answers] == [1, 1]
            assert outputs_of(answers, body) == [[[6]], [[15]]]
        client.close()


def test_a_model_without_a_free_axis_runs_the_calls_of_a_batch_one_after_the_other(tmp_path):
    path = model(tmp_path / "m.onnx", [oh.make_node("Neg", ["x"], ["y"])], {"x": (FLOAT, [1, 2])}, {"y": (FLOAT, [1, 2])})
    with serving(path, tmp_path) as socket:
        client = Client(socket)
        assert not client.hello.batches
        answers, body = ask(client, [tensor([[1, 2]]), tensor([[3, 4]])])
        assert [answer.batch for answer in answers] == [1, 1]
        assert outputs_of(answers, body) == [[[-1, -2]], [[-3, -4]]]
        client.close()
