"""What a model remembers between the calls of a sequence is kept in its worker, and what was forgotten is never silently begun anew."""

import contextlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx.helper as oh
import pytest

from edge_agent.warden import launch
from edge_agent.warden.drivers.host_runtime import with_model, worker_argv
from edge_agent.worker.calls import Calls
from edge_agent.worker.sequences import IDLE_S, MOST_SEQUENCES
from edge_agent.worker.session import LoadFailed, Session
from skerry.wire import codec, ipc, oip
from skerry.wire.messages import ModelRef, StateTensor
from tests.conftest import need
from tests.contract.test_drivers import Kit, absence, spec_of, until, wait_ready
from tests.integration.test_worker import Client, serving, start, tensor
from tests.integration.test_worker_batches import model

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
STATE = [StateTensor("state", "state_after")]


@pytest.fixture(scope="module")
def adder(tmp_path_factory) -> Path:
    """total = state_after = state + x; ``index`` out of a table of one fails the run."""
    nodes = [
        oh.make_node("Gather", ["table", "index"], ["zero"]),
        oh.make_node("Add", ["x", "zero"], ["checked"]),
        oh.make_node("Add", ["state", "checked"], ["state_after"]),
        oh.make_node("ReduceSum", ["state_after", "first"], ["total"], keepdims=0),
    ]
    inputs = {"x": (FLOAT, ["N", 3]), "index": (INT64, [1]), "state": (FLOAT, [1, "N", 3])}
    outputs = {"total": (FLOAT, ["N", 3]), "state_after": (FLOAT, [1, "N", 3])}
    constants = {"table": np.zeros(1, "f4"), "first": np.zeros(1, "i8")}
    return model(tmp_path_factory.mktemp("adder") / "m.onnx", nodes, inputs, outputs, **constants)


@pytest.fixture(scope="module")
def worker(tmp_path_factory, adder) -> Iterator[Path]:
    with serving(adder, tmp_path_factory.mktemp("run"), "--state", codec.encode(STATE).decode()) as path:
        yield path


@pytest.fixture
def client(worker) -> Iterator[Client]:
    with contextlib.closing(Client(worker)) as client:
        yield client


def inputs_of(number: float, *, rows: int = 1, index: int = 0) -> list[oip.Tensor]:
    return [tensor(np.full((rows, 3), number)), tensor([index], "<i8", "index", "INT64")]


def step(client: Client, sequence: str, number: float, *, given: list[oip.Tensor] | None = None, **flags: bool) -> tuple[ipc.Answer, bytes]:
    tensors = given or inputs_of(number)
    call = ipc.Call(1, ipc.heads_of(tensors), ["total"], sequence=oip.SequenceStep(sequence, **flags))
    (answer,), body = client.batch([call], [t.data for t in tensors])
    return answer, body


def total(client: Client, sequence: str, number: float, **flags: bool) -> float:
    answer, body = step(client, sequence, number, **flags)
    assert answer.error == ""
    return float(np.frombuffer(body, "<f4")[0])


def test_a_sequence_goes_on_from_what_its_last_call_left(client):
    assert client.hello.state == STATE
    assert total(client, "a", 1, start=True) == 1
    assert total(client, "b", 10, start=True) == 10
    assert [total(client, "a", 2), total(client, "b", 20), total(client, "a", 3, end=True)] == [3, 30, 6]
    assert total(client, "b", 30, end=True) == 60


def test_sequences_are_the_workers_whatever_connection_a_call_comes_by(worker, client):
    assert total(client, "shared", 1, start=True) == 1
    with contextlib.closing(Client(worker)) as other:
        assert total(other, "shared", 1) == 2
    assert total(client, "shared", 1, end=True) == 3


def test_calls_of_one_sequence_by_many_connections_at_once_lose_nothing(worker, client):
    total(client, "crowd", 0, start=True)

    def add(_: int) -> None:
        with contextlib.closing(Client(worker)) as other:
            for _ in range(50):
                total(other, "crowd", 1)

    with ThreadPoolExecutor(4) as callers:
        list(callers.map(add, range(4)))
    assert total(client, "crowd", 0, end=True) == 200


def test_start_begins_anew_what_is_held(client):
    assert total(client, "again", 5, start=True) == 5
    assert total(client, "again", 1, start=True) == 1
    assert total(client, "again", 1, end=True) == 2


@pytest.mark.parametrize("before", ["never begun", "ended", "begun and ended at once"])
def test_a_sequence_of_which_nothing_is_held_is_an_error_that_says_so_and_nothing_is_run(client, before):
    if before == "ended":
        total(client, before, 1, start=True)
        total(client, before, 1, end=True)
    elif before == "begun and ended at once":
        assert total(client, before, 1, start=True, end=True) == 1
    for _ in range(2):
        answer, body = step(client, before, 1)
        assert (answer.no_sequence, answer.outputs, answer.compute_us, body) == (True, [], 0, b"")
        assert answer.error == f"sequence {before!r} is interrupted: nothing is held of it here, start it anew"


def test_calls_of_one_sequence_in_one_batch_run_in_their_order(client):
    calls, data = [], []
    for number, flags in enumerate([{"start": True}, {}, {}, {"end": True}, {}]):
        tensors = inputs_of(10**number)
        calls.append(ipc.Call(number, ipc.heads_of(tensors), ["total"], sequence=oip.SequenceStep("batch", **flags)))
        data += [t.data for t in tensors]
    answers, body = client.batch(calls, data)
    assert [answer.no_sequence for answer in answers] == [False] * 4 + [True]
    assert np.frombuffer(body, "<f4")[::3].tolist() == [1, 11, 111, 1111]


def test_a_step_whose_answer_came_to_nothing_is_forgotten_and_no_other(client, worker):
    assert total(client, "f", 1, start=True) == 1
    assert client.batch([])[0] == []
    client.socket.sendall(b"".join(ipc.frame(ipc.Batch([], forget=[2, 7]), [])))
    assert ipc.parse_header(client.frame()[0], ipc.Answers).answers == [], "no call of these numbers left anything"
    assert total(client, "f", 2) == 3
    with contextlib.closing(Client(worker)) as other:
        other.socket.sendall(b"".join(ipc.frame(ipc.Batch([], forget=[1]), [])))
        assert ipc.parse_header(other.frame()[0], ipc.Answers).answers == [], "another connection's call of that number is another"
        assert total(other, "f", 3) == 6
        client.socket.sendall(b"".join(ipc.frame(ipc.Batch([], forget=[1]), [])))
        client.frame()
        assert total(other, "f", 4) == 10, "the sequence has gone on since, from another call"
        other.socket.sendall(b"".join(ipc.frame(ipc.Batch([], forget=[1]), [])))
        other.frame()
        answer, _ = step(other, "f", 5)
        assert answer.no_sequence


def test_a_step_that_was_not_done_in_time_ends_its_sequence(client):
    assert total(client, "late", 1, start=True) == 1
    tensors = inputs_of(2.0)
    call = ipc.Call(1, ipc.heads_of(tensors), ["total"], sequence=oip.SequenceStep("late", False, False), within_us=1)
    (answer,), _ = client.batch([call], [t.data for t in tensors])
    assert "not done within" in answer.error
    assert step(client, "late", 3)[0].no_sequence
    assert total(client, "late", 1, start=True) == 1
    in_time = ipc.Call(1, ipc.heads_of(tensors), ["total"], sequence=oip.SequenceStep("late", False, False), within_us=10_000_000)
    assert client.batch([in_time], [t.data for t in tensors])[0][0].error == ""
    assert total(client, "late", 1) == 4


def test_a_caller_may_give_the_state_itself_and_be_given_it(client):
    given = [*inputs_of(1, rows=2), tensor(np.full((1, 2, 3), 100), name="state")]
    answer, body = step(client, "given", 1, given=given, start=True)
    assert answer.error == ""
    assert np.frombuffer(body, "<f4").tolist() == [101] * 6
    tensors = inputs_of(1, rows=2)
    call = ipc.Call(1, ipc.heads_of(tensors), sequence=oip.SequenceStep("given", end=True))
    (answer,), body = client.batch([call], [t.data for t in tensors])
    outputs, _ = ipc.tensors_of(answer.outputs, memoryview(body), 0, None)
    assert {t.name: (t.shape, np.frombuffer(t.data, "<f4")[0]) for t in outputs} == {
        "total": ((2, 3), 102.0),
        "state_after": ((1, 2, 3), 102.0),
    }


def test_without_a_sequence_every_input_must_be_given(client):
    answer, _ = client.call(inputs_of(1))
    assert answer.refused
    assert "this model takes ['index', 'state', 'x'], got ['index', 'x']" in answer.error
    answer, _ = client.call([*inputs_of(1), tensor(np.zeros((1, 1, 3)), name="state")])
    assert answer.error == ""


def test_a_wrong_input_is_refused_before_the_run_and_the_sequence_goes_on(client):
    assert total(client, "wrong", 1, start=True) == 1
    answer, _ = step(client, "wrong", 1, given=[tensor([[1, 2]]), inputs_of(1)[1]])
    assert (answer.refused, answer.no_sequence) == (True, False)
    assert total(client, "wrong", 1, end=True) == 2


@pytest.mark.parametrize("case", ["the run fails", "the state's shape changes"])
def test_a_run_that_fails_interrupts_its_sequence_and_no_other(client, case):
    given = inputs_of(1, index=7) if case == "the run fails" else inputs_of(1, rows=2)
    assert total(client, "failing", 1, start=True) == 1
    assert total(client, "beside", 1, start=True) == 1
    answer, _ = step(client, "failing", 1, given=given)
    assert answer.error.endswith("; sequence 'failing' is interrupted, start it anew")
    assert not answer.no_sequence
    assert step(client, "failing", 1)[0].no_sequence
    assert total(client, "beside", 1, end=True) == 2
    assert total(client, "failing", 1, start=True, end=True) == 1


class Desk:
    """Calls in this process, with a clock of the test's own."""

    def __init__(self, path: Path) -> None:
        self.now = 1000.0
        self.calls = Calls(Session(path, threads=1, warmup=[], state=STATE), clock=lambda: self.now)

    def step(self, sequence: str, **flags: bool) -> ipc.Answer:
        tensors = inputs_of(1)
        call = ipc.Call(1, ipc.heads_of(tensors), ["total"], sequence=oip.SequenceStep(sequence, **flags))
        body = memoryview(b"".join(bytes(t.data) for t in tensors))
        answers, _ = self.calls.answer(memoryview(codec.encode(ipc.Batch([call]))), body, None)
        return answers.answers[0]


def test_a_sequence_that_is_idle_for_long_is_forgotten_and_that_is_said(adder):
    desk = Desk(adder)
    desk.step("idle", start=True)
    desk.now += IDLE_S
    assert desk.step("idle").error == ""
    desk.now += IDLE_S + 1
    assert desk.step("idle").no_sequence


def test_of_more_sequences_than_are_held_the_longest_idle_is_forgotten(adder):
    desk = Desk(adder)
    for number in range(MOST_SEQUENCES):
        desk.step(f"s{number}", start=True)
    desk.step("s0")
    desk.step("one more", start=True)
    assert desk.step("s1").no_sequence
    assert desk.step("s0").error == desk.step("s2").error == ""


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ([StateTensor("nope", "state_after")], "state: 'nope' is not an input of this model, which has ['index', 'state', 'x']"),
        ([StateTensor("state", "nope")], "state: 'nope' is not an output of this model, which has ['state_after', 'total']"),
        ([StateTensor("index", "state_after")], "state: 'state_after' is FP32 and can't become 'index', which is INT64"),
        ([StateTensor("state", "total")], "state: 'total' has shape [-1, 3] and can't become 'state', which has [1, -1, 3]"),
        ([*STATE, StateTensor("x", "state_after")], "'state_after'"),
    ],
)
def test_a_state_that_the_model_does_not_have_fails_the_load_by_name(adder, state, complaint):
    with pytest.raises(LoadFailed, match="state: ") as failed:
        Session(adder, threads=1, warmup=[], state=state)
    assert complaint in str(failed.value)


def test_a_worker_whose_state_makes_no_sense_ends_with_the_reason(adder, tmp_path):
    process = start(adder, tmp_path / "w.sock", "--state", '[{"input": "nope", "output": "total"}]')
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 3
    assert b"load failed: state: 'nope' is not an input" in stderr


@pytest.mark.parametrize("waits", [False, True])
def test_the_warden_hands_the_state_to_a_worker_that_starts_and_to_one_that_waited(adder, tmp_path, waits):
    need("bubblewrap", absence("bubblewrap"))
    kit, spec = Kit("bubblewrap", tmp_path / "run"), spec_of(tmp_path, adder, waits=waits)
    if not waits:
        spec = msgspec.structs.replace(spec, argv=with_model(worker_argv(1.0), [], STATE))

    async def scene() -> None:
        driver = kit.make()
        await driver.start(spec)
        if waits:
            await until(lambda: launch.is_waiting(spec.socket_dir))
            shutil.copy(adder, spec.model_dir / "model.onnx")
            await launch.tell(spec.socket_dir, ModelRef("m", 1, "0" * 64, 1, state=STATE))
        await wait_ready(driver, spec)
        with contextlib.closing(Client(spec.socket_dir / "worker.sock")) as client:
            assert client.hello.state == STATE
            assert [total(client, "a", 1, start=True), total(client, "a", 2, end=True)] == [1, 3]

    kit.play(scene)


def test_a_model_without_state_takes_the_calls_of_a_sequence_as_any_other(tmp_path, scale_model):
    with serving(scale_model, tmp_path) as path, contextlib.closing(Client(path)) as client:
        answer, _ = step(client, "plain", 1, given=[tensor([[1, 2, 3]])])
        assert "'total' is not an output" in answer.error
        given = tensor([[1, 2, 3]])
        call = ipc.Call(1, ipc.heads_of([given]), sequence=oip.SequenceStep("plain"))
        (answer,), _ = client.batch([call], [given.data])
        assert answer.error == ""
