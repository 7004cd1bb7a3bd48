"""gRPC at the gateway, as Triton's own clients see it: over TCP, a Unix socket, TLS and with client certificates."""

import asyncio
import contextlib
import datetime
import queue
import stat
import struct
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import grpc
import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, serialize_byte_tensor

from edge_agent.gateway.grpc_calls import STREAM_REQUESTS
from edge_agent.gateway.grpc_server import GrpcServer, Listen, Tls
from edge_agent.gateway.service import Failed, Refused, Rejected, Unknown
from skerry.wire import oip
from skerry.wire.box import Route

BODY_LIMIT_BYTES = 2 * 2**20
WAIT_S = 20


class EchoAnswer:
    """The inputs as outputs, on loan until they are given back: what is read after that is wrong."""

    def __init__(self, service: "Echo", route: Route, request: oip.InferRequest) -> None:
        self._service = service
        self._lent = [bytearray(tensor.data) for tensor in request.inputs]
        self.served_by, self.node, self.reason = "edge", "box-1", "this box is done in 4 ms → sooner"
        self.route, self.timing, self.numbers = route, "queue;dur=0.100, compute;dur=4.000", {"local_ms": 4.5}
        self.outputs = [
            oip.Tensor(f"{tensor.name}_out", tensor.datatype, tensor.shape, memoryview(lent))
            for tensor, lent in zip(request.inputs, self._lent, strict=True)
        ]
        service.lent += 1

    def release(self) -> None:
        self._service.lent -= 1
        for lent in self._lent:
            lent[:] = bytes(len(lent))


class Echo:
    """A service with one model, which answers with what it got, or with the error that its name asks for."""

    def __init__(self) -> None:
        self.served = SimpleNamespace(route=Route("echo", "echo", 3, 5000), pool=SimpleNamespace(hello=None), account=None)
        self.arrivals = []
        self.steps = []
        self.lent = self.running = self.most_running = self.cancelled = 0
        self.delay_s = 0.0
        self.error = None

    def find(self, name, version):
        if name != "echo" or version not in (None, "3"):
            raise Unknown(f"model {name!r} is not served here; served: echo:3")
        return self.served

    def routes(self):
        return [self.served]

    async def infer(self, arrival, served):
        self.arrivals.append(arrival)
        step = arrival.request.sequence
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.steps.append(("begin", step))
        try:
            await asyncio.sleep(self.delay_s if arrival.request.id != "slow" else 0.3)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
            self.steps.append(("end", step))
        if self.error:
            raise self.error
        return EchoAnswer(self, served.route, arrival.request)


class EchoFacts:
    """What the REST side tells, in its shapes."""

    def __init__(self) -> None:
        self.ready = True

    def server_metadata(self):
        return {"name": "skerry", "version": "0.1.0", "extensions": ["statistics"], "node": "box-1", "tier": "edge"}

    def is_ready(self):
        return self.ready

    def can_answer(self, served):
        return self.ready

    def model_metadata(self, served):
        if not self.ready:
            raise Refused("no replica of this model has been ready here yet, its inputs are not known", 1)
        tensors = [{"name": "x", "datatype": "FP32", "shape": (-1, 3)}]
        return {"name": "echo", "versions": ["3"], "platform": "onnxruntime_onnx", "inputs": tensors, "outputs": tensors}

    def model_config(self, served):
        tensor = {"name": "x", "data_type": "TYPE_FP32", "dims": [3]}
        return {
            "name": "echo",
            "platform": "onnxruntime_onnx",
            "backend": "onnxruntime",
            "max_batch_size": 8,
            "input": [tensor],
            "output": [tensor],
            "version_policy": {"specific": {"versions": [3]}},
            "dynamic_batching": {"max_queue_delay_microseconds": 500},
            "instance_group": [{"name": "echo", "count": 2, "kind": "KIND_CPU"}],
            "optimization": {"of": "which our messages know nothing"},
        }

    def statistics(self, name, version):
        if name not in (None, "echo"):
            raise Unknown(f"model {name!r} is not served here; served: echo:3")
        part = {"count": 2, "ns": 2**40}
        stats = dict.fromkeys(["success", "fail", "queue", "compute_input", "compute_infer", "compute_output"], part)
        batch = {"batch_size": 4, "compute_input": part, "compute_infer": part, "compute_output": part}
        return {
            "model_stats": [
                {
                    "name": "echo",
                    "version": "3",
                    "last_inference": 1_700_000_000_000,
                    "inference_count": 2,
                    "execution_count": 1,
                    "inference_stats": stats,
                    "batch_stats": [batch],
                }
            ]
        }

    def repository_index(self, *, ready_only):
        gone = [] if ready_only else [{"name": "gone", "version": "1", "state": "UNAVAILABLE", "reason": "no replica"}]
        return [{"name": "echo", "version": "3", "state": "READY", "reason": ""}, *gone]


class DictRegions:
    """Shared memory that is a dictionary, by name."""

    def __init__(self) -> None:
        self.memory = {}
        self.told = {}

    def register(self, name, key, offset, size_bytes, peer):
        if name in self.told:
            raise oip.BadRequest(f"name: region {name!r} is registered already")
        self.told[name] = {"name": name, "key": key, "offset": offset, "byte_size": size_bytes}
        self.memory[name] = bytearray(size_bytes)

    def unregister(self, name, peer):
        for gone in [name] if name else list(self.told):
            self.told.pop(gone, None)

    def status(self, name, peer):
        return [told for told in self.told.values() if name in (None, told["name"])]

    def resolver(self, peer):
        assert peer.startswith(("ipv4:127.0.0.1:", "unix:"))

        def resolve(extent, field):
            if extent.region not in self.told:
                raise oip.BadRequest(f"{field}.parameters.shared_memory_region: {extent.region!r} is not registered")
            return memoryview(self.memory[extent.region])[extent.offset : extent.offset + extent.size_bytes]

        return resolve

    def write(self, extent, data, field, peer):
        if len(data) > extent.size_bytes:
            raise oip.BadRequest(f"{field}.parameters.shared_memory_byte_size: {extent.size_bytes} is less than {len(data)}")
        self.memory[extent.region][extent.offset : extent.offset + len(data)] = data


class Gateway:
    """The server in a thread of its own with a loop of its own, so that blocking clients can be asked from the test."""

    def __init__(self, listen, *, regions=None, **more) -> None:
        self.service, self.facts = Echo(), EchoFacts()
        self._more = {"listen": listen, "body_limit_bytes": BODY_LIMIT_BYTES, **more}
        self._regions = regions
        self._up, self._loop, self._stop = threading.Event(), None, None
        self._error = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = GrpcServer(self.service, self.facts, self._regions, **self._more)
        try:
            await server.start()
            self.addresses = server.addresses
            self._up.set()
            await self._stop.wait()
            await server.stop(1.0)
        except OSError as exc:
            self._error = exc
            self._up.set()

    def __enter__(self) -> "Gateway":
        self._thread.start()
        assert self._up.wait(WAIT_S)
        if self._error:
            self._thread.join(WAIT_S)
            raise self._error
        return self

    def __exit__(self, *_) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def wait_until(self, condition) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition(self.service):
            assert time.monotonic() < deadline
            time.sleep(0.01)


TCP = [Listen("127.0.0.1:0")]


@pytest.fixture
def gateway():
    with Gateway(TCP) as started:
        yield started


@pytest.fixture
def client(gateway):
    with triton.InferenceServerClient(gateway.addresses[0]) as connected:
        yield connected


def tensor(array, name="x", datatype=None):
    made = triton.InferInput(name, list(array.shape), datatype or np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array)
    return made


ONE = np.array([1.5, -2], "f4")


@pytest.mark.parametrize("dtype", ["?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"])
def test_every_datatype_comes_back_as_it_went(client, gateway, dtype):
    array = np.array([[0, 1, 1], [1, 0, 1]], dtype=dtype)
    result = client.infer("echo", [tensor(array)], request_id="7")
    assert result.as_numpy("x_out").tobytes() == array.tobytes()
    response = result.get_response()
    assert (response.model_name, response.model_version, response.id) == ("echo", "3", "7")
    assert gateway.service.lent == 0


def test_bytes_and_bfloat16_come_back_as_they_went(client):
    texts = np.array([b"\x00\xff", "häfen".encode(), b""], dtype=object)
    assert client.infer("echo", [tensor(texts)]).as_numpy("x_out").tolist() == texts.tolist()
    halves = np.array([1.5, -2.25, 0], ml_dtypes.bfloat16)
    result = client.infer("echo", [tensor(halves, datatype="BF16")])
    assert result.get_response().raw_output_contents[0] == halves.tobytes()


@pytest.mark.parametrize(
    ("datatype", "field", "values", "packed"),
    [
        ("BOOL", "bool_contents", [True, False], "??"),
        ("INT8", "int_contents", [-128, 127], "bb"),
        ("INT16", "int_contents", [-(2**15), 1], "hh"),
        ("INT32", "int_contents", [-(2**31), 1], "ii"),
        ("INT64", "int64_contents", [-(2**63), 1], "qq"),
        ("UINT8", "uint_contents", [0, 255], "BB"),
        ("UINT16", "uint_contents", [0, 2**16 - 1], "HH"),
        ("UINT32", "uint_contents", [0, 2**32 - 1], "II"),
        ("UINT64", "uint64_contents", [0, 2**64 - 1], "QQ"),
        ("FP32", "fp32_contents", [1.5, float("inf")], "ff"),
        ("FP64", "fp64_contents", [1e300, -0.0], "dd"),
    ],
)
def test_typed_contents_are_taken_for_every_datatype_that_has_them(gateway, datatype, field, values, packed):
    request = service_pb2.ModelInferRequest(model_name="echo")
    entry = request.inputs.add(name="x", datatype=datatype, shape=[2])
    getattr(entry.contents, field).extend(values)
    response = call(gateway, "ModelInfer", request, service_pb2.ModelInferResponse)
    assert response.raw_output_contents[0] == struct.pack(f"<{packed}", *values)


def test_typed_bytes_are_taken(gateway):
    request = service_pb2.ModelInferRequest(model_name="echo")
    request.inputs.add(name="x", datatype="BYTES", shape=[2]).contents.bytes_contents.extend([b"a", b"\xff\x00"])
    response = call(gateway, "ModelInfer", request, service_pb2.ModelInferResponse)
    assert response.raw_output_contents[0] == serialize_byte_tensor(np.array([b"a", b"\xff\x00"], dtype=object)).item()


def call(gateway, method, request, answer, **more):
    """One call through a stub made by hand."""
    body = request if isinstance(request, bytes) else request.SerializeToString()
    with grpc.insecure_channel(gateway.addresses[0]) as channel:
        stub = channel.unary_unary(f"/inference.GRPCInferenceService/{method}", response_deserializer=answer and answer.FromString)
        return stub(body, timeout=WAIT_S, **more)


def test_only_the_outputs_that_were_asked_for_come_in_their_order(client):
    inputs = [tensor(np.array([index], "i4"), name) for index, name in enumerate("abc")]
    wanted = [triton.InferRequestedOutput("c_out"), triton.InferRequestedOutput("a_out")]
    result = client.infer("echo", inputs, outputs=wanted)
    assert [output.name for output in result.get_response().outputs] == ["c_out", "a_out"]
    assert (result.as_numpy("c_out").item(), result.as_numpy("a_out").item()) == (2, 0)
    with pytest.raises(InferenceServerException, match="'no' is not an output of this model"):
        client.infer("echo", inputs, outputs=[triton.InferRequestedOutput("no")])


def test_what_decided_is_told_in_parameters_and_in_trailing_metadata(gateway):
    request = service_pb2.ModelInferRequest(model_name="echo", raw_input_contents=[b"\x01"])
    request.inputs.add(name="x", datatype="INT8", shape=[1])
    with grpc.insecure_channel(gateway.addresses[0]) as channel:
        stub = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer", response_deserializer=service_pb2.ModelInferResponse.FromString
        )
        response, called = stub.with_call(request.SerializeToString(), timeout=WAIT_S)
    assert response.parameters["served_by"].string_param == "edge"
    assert response.parameters["node"].string_param == "box-1"
    assert response.parameters["reason"].string_param == "this box is done in 4 ms → sooner"
    assert response.parameters["local_ms"].double_param == 4.5
    assert dict(called.trailing_metadata()) == {
        "skerry-served-by": "edge",
        "skerry-node": "box-1",
        "skerry-reason": "this box is done in 4 ms ? sooner",
        "server-timing": "queue;dur=0.100, compute;dur=4.000",
    }


def test_parameters_reach_the_service(client, gateway):
    client.infer("echo", [tensor(ONE)], timeout=250_000, priority=2, sequence_id=7, sequence_start=True, parameters={"idempotent": False})
    client.infer("echo", [tensor(ONE)], sequence_id="seven", sequence_end=True)
    first, second = gateway.service.arrivals
    assert (first.request.timeout_us, first.request.priority, first.request.idempotent, first.deadline_ms) == (250_000, 2, False, 250)
    assert first.request.sequence == oip.SequenceStep("7", start=True)
    assert second.request.sequence == oip.SequenceStep("seven", end=True)
    assert (second.request.idempotent, second.deadline_ms, second.forwarded) == (True, 5000, False)


def test_a_callers_own_deadline_counts_where_it_is_shorter(client, gateway):
    client.infer("echo", [tensor(ONE)], client_timeout=2)
    client.infer("echo", [tensor(ONE)], client_timeout=2, timeout=500_000)
    assert 1000 < gateway.service.arrivals[0].deadline_ms < 2100  # gRPC rounds up what it sends
    assert gateway.service.arrivals[1].deadline_ms == 500


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Refused("too late → by 3 ms", 4), grpc.StatusCode.UNAVAILABLE),
        (Rejected("input 'x' has 2 axes"), grpc.StatusCode.INVALID_ARGUMENT),
        (Failed("the model failed"), grpc.StatusCode.INTERNAL),
        (oip.BadRequest("outputs: none"), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_each_failure_has_its_status_and_its_text(gateway, error, status):
    gateway.service.error = error
    request = service_pb2.ModelInferRequest(model_name="echo", raw_input_contents=[b"\x01"])
    request.inputs.add(name="x", datatype="INT8", shape=[1])
    with pytest.raises(grpc.RpcError) as failed:
        call(gateway, "ModelInfer", request, None)
    assert failed.value.code() is status
    assert failed.value.details() == str(error)
    trailing = dict(failed.value.trailing_metadata())
    assert trailing == ({"retry-after": "4", "skerry-reason": "too late ? by 3 ms"} if isinstance(error, Refused) else {})


def test_a_model_that_is_not_served_is_not_found(client):
    with pytest.raises(InferenceServerException, match="served: echo:3") as failed:
        client.infer("other", [tensor(ONE)])
    assert failed.value.status() == "StatusCode.NOT_FOUND"
    with pytest.raises(InferenceServerException, match="served: echo:3"):
        client.infer("echo", [tensor(ONE)], model_version="4")


def test_a_long_text_is_cut_to_what_travels(gateway):
    gateway.service.error = Failed("ö" * 5000)
    with triton.InferenceServerClient(gateway.addresses[0]) as client, pytest.raises(InferenceServerException) as failed:
        client.infer("echo", [tensor(ONE)])
    assert failed.value.message() == "ö" * 512


@pytest.mark.parametrize("body", [b"\xff" * 40, b"\x2a\x05abc", b"\x0b\x0c", b"\x0a\x02\xff\xfe"])
def test_garbage_is_told_to_be_garbage_and_the_server_goes_on(client, gateway, body):
    with pytest.raises(grpc.RpcError) as failed:
        call(gateway, "ModelInfer", body, None)
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as failed:
        call(gateway, "ModelMetadata", b"\xff\xff", None)
    assert failed.value.details() == "request: not a ModelMetadataRequest"
    assert client.is_server_live()


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_a_message_over_the_limit_is_refused_also_when_it_comes_compressed(client, compression):
    small = np.ones(1000, "f4")
    assert client.infer("echo", [tensor(small)], compression_algorithm=compression).as_numpy("x_out").tolist() == small.tolist()
    with pytest.raises(InferenceServerException) as failed:
        client.infer("echo", [tensor(np.zeros(BODY_LIMIT_BYTES, "u1"))], compression_algorithm=compression)
    assert failed.value.status() == "StatusCode.RESOURCE_EXHAUSTED"


def test_a_cancelled_call_cancels_the_inference(gateway):
    gateway.service.delay_s = 30
    answers = queue.Queue()
    with triton.InferenceServerClient(gateway.addresses[0]) as client:
        asked = client.async_infer("echo", [tensor(ONE)], callback=lambda result, error: answers.put(error))
        gateway.wait_until(lambda service: service.running == 1)
        asked.cancel()
        assert answers.get(timeout=WAIT_S).status() == "StatusCode.CANCELLED"
        gateway.wait_until(lambda service: service.cancelled == 1 and service.running == 0)


def test_a_caller_that_waits_no_longer_cancels_the_inference(client, gateway):
    gateway.service.delay_s = 30
    with pytest.raises(InferenceServerException) as failed:
        client.infer("echo", [tensor(ONE)], client_timeout=0.2)
    assert failed.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    gateway.wait_until(lambda service: service.cancelled == 1)


def test_calls_over_the_limit_are_refused():
    with Gateway(TCP, calls_limit=1) as gateway, triton.InferenceServerClient(gateway.addresses[0]) as client:
        gateway.service.delay_s = 30
        asked = client.async_infer("echo", [tensor(ONE)], callback=lambda result, error: None)
        gateway.wait_until(lambda service: service.running == 1)
        with pytest.raises(InferenceServerException) as failed:
            client.infer("echo", [tensor(ONE)])
        assert failed.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
        asked.cancel()
        gateway.wait_until(lambda service: service.running == 0)


def test_live_ready_and_metadata(client, gateway):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("echo", "3")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata(as_json=True) == {"name": "skerry", "version": "0.1.0", "extensions": ["statistics"]}
    metadata = client.get_model_metadata("echo")
    assert (metadata.platform, list(metadata.versions), list(metadata.inputs[0].shape)) == ("onnxruntime_onnx", ["3"], [-1, 3])
    with pytest.raises(InferenceServerException, match="served: echo:3"):
        client.get_model_metadata("other")
    gateway.facts.ready = False
    assert not client.is_server_ready()
    assert not client.is_model_ready("echo")
    with pytest.raises(InferenceServerException, match="no replica of this model has been ready") as failed:
        client.get_model_metadata("echo")
    assert failed.value.status() == "StatusCode.UNAVAILABLE"


def test_configuration_statistics_and_index(client):
    config = client.get_model_config("echo").config
    assert (config.name, config.backend, config.max_batch_size) == ("echo", "onnxruntime", 8)
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert (config.input[0].data_type, list(config.input[0].dims)) == (11, [3])
    assert list(config.version_policy.specific.versions) == [3]
    assert client.get_model_config("echo", as_json=True)["config"]["instance_group"][0]["kind"] == "KIND_CPU"
    [counted] = client.get_inference_statistics().model_stats
    assert (counted.name, counted.inference_count, counted.inference_stats.success.ns) == ("echo", 2, 2**40)
    assert (counted.batch_stats[0].batch_size, counted.last_inference) == (4, 1_700_000_000_000)
    with pytest.raises(InferenceServerException, match="is not served here"):
        client.get_inference_statistics("other")
    index = client.get_model_repository_index().models
    assert [(model.name, model.version, model.state, model.reason) for model in index] == [
        ("echo", "3", "READY", ""),
        ("gone", "1", "UNAVAILABLE", "no replica"),
    ]


def test_what_is_not_offered_says_so(client):
    for refused, text in [
        (lambda: client.load_model("echo"), "placed by the coordinator"),
        (lambda: client.unload_model("echo"), "placed by the coordinator"),
        (client.get_cuda_shared_memory_status, "of a GPU is not offered"),
        (client.get_system_shared_memory_status, "regions are not offered"),
        (lambda: client.register_system_shared_memory("a", "/a", 10), "regions are not offered"),
        (client.get_trace_settings, "not set through this server"),
        (client.get_log_settings, "not set through this server"),
    ]:
        with pytest.raises(InferenceServerException, match=text) as failed:
            refused()
        assert failed.value.status() == "StatusCode.UNIMPLEMENTED"
    shared = triton.InferInput("x", [2], "FP32")
    shared.set_shared_memory("a", 8)
    with pytest.raises(InferenceServerException, match="regions are not offered"):
        client.infer("echo", [shared])


def test_shared_memory_regions_are_registered_read_written_and_let_go():
    regions = DictRegions()
    with Gateway(TCP, regions=regions) as gateway, triton.InferenceServerClient(gateway.addresses[0]) as client:
        client.register_system_shared_memory("in", "/in", 64, offset=16)
        client.register_system_shared_memory("out", "/out", 64)
        with pytest.raises(InferenceServerException, match="registered already"):
            client.register_system_shared_memory("in", "/in", 64)
        told = client.get_system_shared_memory_status().regions
        assert (sorted(told), told["in"].key, told["in"].offset, told["in"].byte_size) == (["in", "out"], "/in", 16, 64)
        regions.memory["in"][8:16] = ONE.tobytes()
        shared, wanted = triton.InferInput("x", [2], "FP32"), triton.InferRequestedOutput("x_out")
        shared.set_shared_memory("in", 8, offset=8)
        wanted.set_shared_memory("out", 32, offset=4)
        result = client.infer("echo", [shared, tensor(ONE, "y")], outputs=[wanted, triton.InferRequestedOutput("y_out")])
        assert bytes(regions.memory["out"][4:12]) == ONE.tobytes()
        assert result.as_numpy("y_out").tolist() == ONE.tolist()
        output = result.get_output("x_out")
        assert {name: getattr(p, p.WhichOneof("parameter_choice")) for name, p in output.parameters.items()} == {
            "shared_memory_region": "out",
            "shared_memory_offset": 4,
            "shared_memory_byte_size": 8,
        }
        wanted.set_shared_memory("out", 4)
        with pytest.raises(InferenceServerException, match=r"outputs\[0\].parameters.shared_memory_byte_size: 4 is less than 8"):
            client.infer("echo", [shared], outputs=[wanted])
        assert gateway.service.lent == 0
        client.unregister_system_shared_memory("in")
        with pytest.raises(InferenceServerException, match=r"inputs\[0\].parameters.shared_memory_region: 'in' is not registered"):
            client.infer("echo", [shared])
        client.unregister_system_shared_memory()
        assert not client.get_system_shared_memory_status().regions


class Stream:
    """A stream of Triton's blocking client, its answers in a queue."""

    def __init__(self, gateway) -> None:
        self.client = triton.InferenceServerClient(gateway.addresses[0])
        self._answers = queue.Queue()
        self.client.start_stream(callback=lambda result, error: self._answers.put((result, error)))

    def ask(self, value: int = 0, model: str = "echo", **more) -> None:
        self.client.async_stream_infer(model, [tensor(np.array([value], "i4"))], **more)

    def take(self):
        return self._answers.get(timeout=WAIT_S)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self.client.stop_stream()
        self.client.close()


def test_a_stream_runs_its_requests_side_by_side_and_answers_in_their_order(gateway):
    with Stream(gateway) as stream:
        gateway.service.delay_s = 0.05
        for index in range(200):
            stream.ask(index, request_id="slow" if index == 0 else str(index))
        answers = [stream.take() for _ in range(200)]
    assert [result.as_numpy("x_out").item() for result, _ in answers] == list(range(200))
    assert all(result.get_response().parameters["triton_final_response"].bool_param for result, _ in answers)
    assert 1 < gateway.service.most_running <= STREAM_REQUESTS
    assert gateway.service.lent == 0


def test_a_stream_tells_the_error_of_one_request_and_goes_on(gateway):
    with Stream(gateway) as stream:
        stream.ask(1, model="other", request_id="a")
        stream.ask(2)
        _, error = stream.take()
        result, _ = stream.take()
        gateway.service.error = Refused("too late", 1)
        stream.ask(3)
        _, refused = stream.take()
    assert "is not served here" in error.message()
    assert result.as_numpy("x_out").item() == 2
    assert refused.message() == "too late"


def test_the_steps_of_a_sequence_run_one_after_the_other_on_a_stream(gateway):
    gateway.service.delay_s = 0.02
    with Stream(gateway) as stream:
        for index in range(8):
            stream.ask(index, sequence_id=1 + index % 2, sequence_start=index < 2, sequence_end=index > 5)
        assert [stream.take()[0].as_numpy("x_out").item() for _ in range(8)] == list(range(8))
    for name in "12":
        steps = [(what, step.start, step.end) for what, step in gateway.service.steps if step.id == name]
        kinds = [(True, False), (False, False), (False, False), (False, True)]
        assert steps == [(what, *kind) for kind in kinds for what in ("begin", "end")]
    assert gateway.service.most_running == 2


def test_a_stream_that_is_cancelled_cancels_what_it_asked_for(gateway):
    gateway.service.delay_s = 30
    stream = Stream(gateway)
    for index in range(3):
        stream.ask(index, sequence_id=5)
    stream.ask(9)
    gateway.wait_until(lambda service: service.running == 2)
    stream.client.stop_stream(cancel_requests=True)
    stream.client.close()
    gateway.wait_until(lambda service: service.running == 0 and service.cancelled == 2)


def test_the_asyncio_client_infers_streams_and_cancels(gateway):
    async def ask() -> None:
        async with triton_aio.InferenceServerClient(gateway.addresses[0]) as client:
            assert await client.is_model_ready("echo")
            results = await asyncio.gather(*(client.infer("echo", [tensor(np.array([n], "i8"))]) for n in range(50)))
            assert [result.as_numpy("x_out").item() for result in results] == list(range(50))
            with pytest.raises(InferenceServerException, match="is not served here"):
                await client.infer("other", [tensor(ONE)])

            async def requests():
                for n in range(5):
                    yield {"model_name": "echo" if n != 3 else "other", "inputs": [tensor(np.array([n], "i8"))], "request_id": str(n)}

            answers = [(result, error) async for result, error in client.stream_infer(requests())]
            assert [error is None for _, error in answers] == [True, True, True, False, True]
            assert answers[4][0].as_numpy("x_out").item() == 4
            gateway.service.delay_s = 30
            asked = asyncio.create_task(client.infer("echo", [tensor(ONE)]))
            await asyncio.to_thread(gateway.wait_until, lambda service: service.running == 1)
            asked.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asked
            await asyncio.to_thread(gateway.wait_until, lambda service: service.cancelled == 1)

    asyncio.run(ask())


def test_a_unix_socket_is_for_its_group_and_stands_when_it_is_seen(folder: Path):
    path = folder / "run" / "grpc.sock"
    for _ in range(2):  # the second finds what the first left lying
        with Gateway([*TCP, Listen(str(path))]) as gateway:
            assert gateway.addresses[1] == str(path)
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
            assert [p.name for p in path.parent.iterdir()] == ["grpc.sock"]
            with triton.InferenceServerClient(f"unix:{path}") as client:
                assert client.infer("echo", [tensor(ONE)]).as_numpy("x_out").tolist() == ONE.tolist()


def test_an_address_that_is_taken_is_named(gateway):
    with pytest.raises(OSError, match=gateway.addresses[0]), Gateway([Listen(gateway.addresses[0])]):
        pass


def test_two_servers_share_a_port_where_they_are_told_to():
    with Gateway(TCP, reuse_port=True) as first:
        second = Gateway([Listen(first.addresses[0])], reuse_port=True)
        with second, triton.InferenceServerClient(first.addresses[0]) as client:
            assert client.is_server_live()


def test_stopping_lets_what_is_under_way_end():
    answers = queue.Queue()
    with triton.InferenceServerClient((gateway := Gateway(TCP).__enter__()).addresses[0]) as client:
        gateway.service.delay_s = 0.3
        client.async_infer("echo", [tensor(ONE)], callback=lambda result, error: answers.put((result, error)))
        gateway.wait_until(lambda service: service.running == 1)
        gateway.__exit__()
        result, error = answers.get(timeout=WAIT_S)
    assert error is None
    assert result.as_numpy("x_out").tolist() == ONE.tolist()


class Authority:
    """A certificate authority of one test, and what it signs, in PEM files."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(_pem(self._signed(self._name, self._key.public_key(), is_ca=True)))

    def _signed(self, subject, public_key, *, is_ca: bool):
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(public_key)
        builder = (
            builder.serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(hours=1))
        )
        builder = builder.add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        return builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False).sign(
            self._key, hashes.SHA256()
        )

    def issue(self, name: str) -> tuple[Path, Path]:
        """A certificate for localhost and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate, key_file = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        certificate.write_bytes(_pem(self._signed(subject, key.public_key(), is_ca=False)))
        unencrypted = serialization.NoEncryption()
        key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, unencrypted))
        return certificate, key_file


def _pem(certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def trusting(gateway, authority: Authority, own: tuple[Path, Path] | None = None):
    url = f"localhost:{gateway.addresses[0].rpartition(':')[2]}"
    certificate, key = map(str, own) if own else (None, None)
    return triton.InferenceServerClient(
        url, ssl=True, root_certificates=str(authority.file), private_key=key, certificate_chain=certificate
    )


def test_tls_and_client_certificates(tmp_path):
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    certificate, key = (file.read_bytes() for file in ours.issue("server"))
    with Gateway([Listen("127.0.0.1:0", Tls(certificate, key))]) as gateway:
        with trusting(gateway, ours) as client:
            assert client.infer("echo", [tensor(ONE)]).as_numpy("x_out").tolist() == ONE.tolist()
        with trusting(gateway, theirs) as client, pytest.raises(InferenceServerException) as failed:
            client.is_server_live(client_timeout=WAIT_S)
        assert failed.value.status() == "StatusCode.UNAVAILABLE"
    with Gateway([Listen("127.0.0.1:0", Tls(certificate, key, ours.file.read_bytes()))]) as gateway:
        with trusting(gateway, ours, ours.issue("client")) as client:
            assert client.infer("echo", [tensor(ONE)]).as_numpy("x_out").tolist() == ONE.tolist()
        for stranger in (None, theirs.issue("stranger")):
            with trusting(gateway, ours, stranger) as client, pytest.raises(InferenceServerException) as failed:
                client.is_server_live(client_timeout=WAIT_S)
            assert failed.value.status() == "StatusCode.UNAVAILABLE"


def test_the_server_runs_on_uvloop():
    uvloop = pytest.importorskip("uvloop")

    async def serve_and_ask() -> None:
        server = GrpcServer(Echo(), EchoFacts(), None, listen=TCP, body_limit_bytes=BODY_LIMIT_BYTES)
        await server.start()
        async with triton_aio.InferenceServerClient(server.addresses[0]) as client:
            result = await client.infer("echo", [tensor(ONE)])
            assert result.as_numpy("x_out").tolist() == ONE.tolist()
        await server.stop(1)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve_and_ask())
