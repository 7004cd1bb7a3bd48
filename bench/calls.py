"""One call of a model in each form that a server may want it, and how its answer is checked."""

import json
from collections.abc import Callable

import msgspec
import numpy as np
import tritonclient.grpc.service_pb2 as pb

from bench.load import Call
from bench.models import DATATYPES, Model
from skerry.wire import oip

METHOD = "/inference.GRPCInferenceService/ModelInfer"
KINDS = {"FP32": "<f4", "INT64": "<i8"}

Check = Callable[[bytes, bytes], None]


class Target(msgspec.Struct, frozen=True):
    """How to ask a server for one model, and what raises unless an answer's head and body are right."""

    call: Call
    check: Check


def http_request(address: str, path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """All bytes of a POST on a kept connection."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {address if ':' in address and '/' not in address else 'localhost'}"]
    lines += [f"Content-Length: {len(body)}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode() + body


def _header(head: bytes, name: str) -> str | None:
    for line in head.decode("latin-1").split("\r\n")[1:]:
        key, _, value = line.partition(":")
        if key.lower() == name.lower():
            return value.strip()
    return None


def _arrays(tensors: list[oip.Tensor]) -> list[np.ndarray]:
    return [np.frombuffer(tensor.data, KINDS[tensor.datatype]) for tensor in tensors]


def tensors_of(model: Model) -> list[oip.Tensor]:
    """The call's inputs as the protocol has them."""
    return [oip.Tensor(name, DATATYPES[str(value.dtype)], value.shape, value.tobytes()) for name, value in model.feeds.items()]


def binary(address: str, model: Model, *, timeout_us: int = 0, priority: int = 0, as_name: str = "") -> Target:
    """The protocol over HTTP with binary tensors."""
    parameters: dict[str, object] = {"binary_data_output": True}
    parameters |= {"timeout": timeout_us} if timeout_us else {}
    parameters |= {"priority": priority} if priority else {}
    tensors = tensors_of(model)
    inputs = [
        {"name": t.name, "shape": list(t.shape), "datatype": t.datatype, "parameters": {"binary_data_size": len(t.data)}} for t in tensors
    ]
    head = msgspec.json.encode({"inputs": inputs, "parameters": parameters})
    body = b"".join([head, *(bytes(t.data) for t in tensors)])
    headers = {oip.HEADER_LENGTH: str(len(head)), "Content-Type": oip.BINARY_CONTENT_TYPE}
    path = f"/v2/models/{as_name or model.name}/infer"

    def check(answer_head: bytes, answer: bytes) -> None:
        model.check(_arrays(oip.parse_answer(answer, _header(answer_head, oip.HEADER_LENGTH)).outputs))

    return Target(Call("http", address, http_request(address, path, body, headers)), check)


def in_json(address: str, model: Model, path: str) -> Target:
    """The protocol over HTTP in JSON alone."""
    inputs = [
        {"name": name, "shape": list(value.shape), "datatype": DATATYPES[str(value.dtype)], "data": value.reshape(-1).tolist()}
        for name, value in model.feeds.items()
    ]
    body = json.dumps({"inputs": inputs}).encode()

    def check(_: bytes, answer: bytes) -> None:
        model.check(_arrays(oip.parse_answer(answer, None).outputs))

    return Target(Call("http", address, http_request(address, path, body, {"Content-Type": "application/json"})), check)


def raw(address: str, model: Model, path: str) -> Target:
    """The inputs' bytes and nothing else."""
    body = b"".join(value.tobytes() for value in model.feeds.values())
    request = http_request(address, path, body, {"Content-Type": "application/octet-stream"})
    return Target(Call("http", address, request), lambda _, answer: model.check_raw(answer))


def grpc(address: str, model: Model) -> Target:
    """The protocol over gRPC with raw contents."""
    request = pb.ModelInferRequest(model_name=model.name)
    for name, value in model.feeds.items():
        request.inputs.add(name=name, datatype=DATATYPES[str(value.dtype)], shape=list(value.shape))
        request.raw_input_contents.append(value.tobytes())

    def check(_: bytes, answer: bytes) -> None:
        parsed = pb.ModelInferResponse.FromString(answer)
        if parsed.raw_output_contents:
            kinds = [KINDS[output.datatype] for output in parsed.outputs]
            model.check([np.frombuffer(data, kind) for data, kind in zip(parsed.raw_output_contents, kinds, strict=True)])
        else:
            model.check([np.array(output.contents.fp32_contents, "f4") for output in parsed.outputs])

    return Target(Call("grpc", address, request.SerializeToString(), METHOD), check)
