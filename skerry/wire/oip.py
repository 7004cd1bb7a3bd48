"""Open Inference Protocol v2, REST: JSON and the binary tensor extension, parsed and rendered without I/O.

Sources: kserve/open-inference-protocol ``specification/protocol/inference_rest.md`` and Triton's
``extension_binary_data.md``. A tensor is carried as little-endian row-major bytes; BYTES elements have a 4-byte length prefix.
JSON numbers become bytes through the standard library's ``array``: a gateway needs no numpy, and stays small.
"""

import math
import struct
import sys
from array import array
from collections.abc import Sequence
from typing import Any

import msgspec

BINARY_CONTENT_TYPE = "application/octet-stream"
HEADER_LENGTH = "Inference-Header-Content-Length"
EXTENSIONS = ["binary_tensor_data", "model_repository", "schedule_policy", "statistics"]

ITEM_BYTES: dict[str, int] = {
    "BOOL": 1,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "BF16": 2,
    "FP32": 4,
    "FP64": 8,
}
"""Bytes of one element; BYTES has no fixed size."""
NUMPY_DTYPES: dict[str, str] = {
    "BOOL": "?",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
"""numpy has no bfloat16: BF16 travels as bytes alone."""

ARRAY_CODES: dict[str, str] = {
    "BOOL": "B",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP32": "f",
    "FP64": "d",
}
"""The standard library's array type codes for what has a JSON form."""

MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_TENSORS = 256
MAX_RANK = 32
MAX_ELEMENTS = 2**40
MAX_BYTES_ELEMENTS = 200_000
"""They are walked one by one, in the loop that answers everybody."""
MAX_NAME = 512
MAX_ID = 4096

Bytes = bytes | memoryview


class BadRequest(ValueError):
    """An inference request that breaks the protocol; the text names the field."""


class Tensor(msgspec.Struct, frozen=True):
    """``data`` is exactly as long as ``shape`` and ``datatype`` ask for."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Bytes


class RequestedOutput(msgspec.Struct, frozen=True):
    """An output that the caller named; ``binary`` is None where the caller left it to the request's default."""

    name: str
    binary: bool | None = None


class InferRequest(msgspec.Struct, frozen=True):
    """``timeout_us`` is Triton's ``timeout`` parameter, 0 where none was given. ``binary_default`` is ``binary_data_output``."""

    id: str
    inputs: list[Tensor]
    outputs: list[RequestedOutput]
    timeout_us: int = 0
    priority: int = 0
    binary_default: bool = False


class _InputJson(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: Any = None


class _OutputJson(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class _RequestJson(msgspec.Struct):
    inputs: list[_InputJson]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[_OutputJson] = []


_request_decoder = msgspec.json.Decoder(_RequestJson)


def elements_of(shape: Sequence[int], field: str) -> int:
    """How many elements a shape has; raises BadRequest for what is no shape."""
    if len(shape) > MAX_RANK:
        raise BadRequest(f"{field}.shape: {len(shape)} dimensions, at most {MAX_RANK} are accepted")
    if any(extent < 0 for extent in shape):
        raise BadRequest(f"{field}.shape: {list(shape)} has a negative extent")
    if any(extent > MAX_ELEMENTS for extent in shape):
        raise BadRequest(f"{field}.shape: an extent is more than {MAX_ELEMENTS}")
    count = math.prod(shape)
    if count > MAX_ELEMENTS:
        raise BadRequest(f"{field}.shape: {list(shape)} has more than {MAX_ELEMENTS} elements")
    return count


def parse_infer(body: Bytes, header_length: str | None) -> InferRequest:
    """The request in an HTTP body; ``header_length`` is the Inference-Header-Content-Length header or None.

    Raises BadRequest with the name of the field that is wrong.
    """
    view = memoryview(body)
    json_bytes = len(view)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit() and len(header_length) <= 12):
            raise BadRequest(f"{HEADER_LENGTH}: {header_length[:40]!r} is not a number of bytes")
        json_bytes = int(header_length)
        if json_bytes > len(view):
            raise BadRequest(f"{HEADER_LENGTH}: {json_bytes} is more than the body's {len(view)} bytes")
    if json_bytes > MAX_HEADER_BYTES:
        raise BadRequest(f"JSON part of {json_bytes} bytes, at most {MAX_HEADER_BYTES} are accepted; send tensors in binary")
    try:
        request = _request_decoder.decode(view[:json_bytes])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise BadRequest(f"request: {exc}") from exc
    _check_limits(request)
    inputs, offset = [], json_bytes
    for index, item in enumerate(request.inputs):
        tensor, offset = _parse_input(item, f"inputs[{index}]", view, offset)
        inputs.append(tensor)
    if offset != len(view):
        raise BadRequest(f"body: {len(view) - offset} bytes after the last tensor")
    names = [tensor.name for tensor in inputs]
    if len(set(names)) != len(names):
        raise BadRequest(f"inputs: a name is given twice in {names}")
    return InferRequest(
        id=request.id,
        inputs=inputs,
        outputs=[RequestedOutput(o.name, _flag(o.parameters, "binary_data", f"outputs[{i}]")) for i, o in enumerate(request.outputs)],
        timeout_us=_whole_number(request.parameters, "timeout"),
        priority=_whole_number(request.parameters, "priority"),
        binary_default=bool(_flag(request.parameters, "binary_data_output", "request")),
    )


def _check_limits(request: _RequestJson) -> None:
    if not 0 < len(request.inputs) <= MAX_TENSORS or len(request.outputs) > MAX_TENSORS:
        raise BadRequest(f"inputs: 1 to {MAX_TENSORS} tensors are accepted, got {len(request.inputs)}")
    if any(len(output.name) > MAX_NAME for output in request.outputs) or len(request.id) > MAX_ID:
        raise BadRequest(f"outputs.name or id: at most {MAX_NAME} and {MAX_ID} characters are accepted")


def _flag(parameters: dict[str, Any], name: str, field: str) -> bool | None:
    value = parameters.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{field}.parameters.{name}: expected true or false, got {str(value)[:40]!r}")
    return value


def _whole_number(parameters: dict[str, Any], name: str) -> int:
    value = parameters.get(name, 0)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 18:
        value = int(value)  # Triton's HTTP client sends 64-bit parameters as text
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise BadRequest(f"parameters.{name}: expected a whole number, got {str(value)[:40]!r}")
    return value


def _parse_input(item: _InputJson, field: str, view: memoryview, offset: int) -> tuple[Tensor, int]:
    """One input and the offset after its binary data, if it has any."""
    if len(item.name) > MAX_NAME:
        raise BadRequest(f"{field}.name: {len(item.name)} characters, a name has at most {MAX_NAME} characters")
    if item.datatype not in ITEM_BYTES and item.datatype != "BYTES":
        raise BadRequest(f"{field}.datatype: {item.datatype[:40]!r} is not one of {', '.join([*ITEM_BYTES, 'BYTES'])}")
    count = elements_of(item.shape, field)
    shape = tuple(item.shape)
    if "shared_memory_region" in item.parameters:
        raise BadRequest(f"{field}.parameters.shared_memory_region: shared memory regions are not offered by this server")
    size = item.parameters.get("binary_data_size")
    if size is None:
        if item.data is None:
            raise BadRequest(f"{field}: has neither data nor parameters.binary_data_size")
        return Tensor(item.name, item.datatype, shape, data_of_json(item.data, item.datatype, count, field)), offset
    if item.data is not None:
        raise BadRequest(f"{field}: has both data and parameters.binary_data_size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise BadRequest(f"{field}.parameters.binary_data_size: expected a number of bytes, got {str(size)[:40]!r}")
    if size > len(view) - offset:
        raise BadRequest(f"{field}.parameters.binary_data_size: {size} bytes announced, {len(view) - offset} are left in the body")
    data = view[offset : offset + size]
    check_size(data, item.datatype, count, field)
    return Tensor(item.name, item.datatype, shape, data), offset + size


def check_size(data: Bytes, datatype: str, count: int, field: str) -> None:
    """Raises BadRequest unless ``data`` holds exactly ``count`` elements."""
    if datatype == "BYTES":
        if count > MAX_BYTES_ELEMENTS:
            raise BadRequest(f"{field}.shape: {count} BYTES elements, at most {MAX_BYTES_ELEMENTS} are accepted")
        found = len(split_bytes(data, field, most=count + 1))
        if found != count:
            raise BadRequest(f"{field}: {found} BYTES elements, the shape asks for {count}")
    elif len(data) != count * ITEM_BYTES[datatype]:
        raise BadRequest(f"{field}: {len(data)} bytes, the shape asks for {count} x {ITEM_BYTES[datatype]}")


def split_bytes(data: Bytes, field: str, *, most: int = MAX_BYTES_ELEMENTS) -> list[bytes]:
    """The elements of a BYTES tensor, ``most`` at most; raises BadRequest where a length prefix reaches past the end."""
    elements: list[bytes] = []
    offset = 0
    while offset < len(data) and len(elements) < most:
        if offset + 4 > len(data):
            raise BadRequest(f"{field}: a length prefix is cut off at byte {offset}")
        (length,) = struct.unpack_from("<I", data, offset)
        offset += 4
        if offset + length > len(data):
            raise BadRequest(f"{field}: an element of {length} bytes reaches past the end at byte {offset}")
        elements.append(bytes(data[offset : offset + length]))
        offset += length
    return elements


def join_bytes(elements: Sequence[bytes]) -> bytes:
    """The binary form of BYTES elements."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def _flat(data: Any) -> list[Any]:
    """Leaves of nested lists in row-major order, without recursion: nesting depth is the caller's to choose."""
    leaves: list[Any] = []
    stack = [iter(data if isinstance(data, list) else [data])]
    while stack:
        for item in stack[-1]:
            if isinstance(item, list):
                stack.append(iter(item))
                break
            leaves.append(item)
        else:
            stack.pop()
    return leaves


def data_of_json(data: Any, datatype: str, count: int, field: str) -> bytes:
    """Row-major bytes of a tensor given as JSON, flat or nested; raises BadRequest."""
    if datatype in ("FP16", "BF16"):
        raise BadRequest(f"{field}: {datatype} has no JSON form, send it as binary data")
    flat = _flat(data)
    if len(flat) != count:
        raise BadRequest(f"{field}.data: {len(flat)} elements, the shape asks for {count}")
    if datatype == "BYTES":
        if not all(isinstance(item, str) for item in flat):
            raise BadRequest(f"{field}.data: BYTES elements in JSON are strings")
        return join_bytes([item.encode() for item in flat])
    allowed: tuple[type, ...] = {"BOOL": (bool,), "FP32": (float, int), "FP64": (float, int)}.get(datatype, (int,))
    if any(not isinstance(item, allowed) or (isinstance(item, bool) and datatype != "BOOL") for item in flat):
        raise BadRequest(f"{field}.data: an element is not {datatype}")
    try:
        return _little_endian(array(ARRAY_CODES[datatype], flat))
    except (OverflowError, ValueError, TypeError) as exc:
        raise BadRequest(f"{field}.data: a value does not fit {datatype}") from exc


def _little_endian(values: "array[Any]") -> bytes:
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def json_of_data(tensor: Tensor) -> list[Any]:
    """The flat JSON form of a tensor; raises BadRequest for the datatypes that have none and for bytes that are not UTF-8."""
    if tensor.datatype == "BYTES":
        try:
            return [element.decode() for element in split_bytes(tensor.data, tensor.name)]
        except UnicodeDecodeError as exc:
            raise BadRequest(f"output {tensor.name!r}: BYTES that are not UTF-8 have no JSON form, ask for binary data") from exc
    if tensor.datatype not in ARRAY_CODES:
        raise BadRequest(f"output {tensor.name!r}: {tensor.datatype} has no JSON form, ask for binary data")
    values: array[Any] = array(ARRAY_CODES[tensor.datatype], bytes(tensor.data))
    if sys.byteorder == "big":
        values.byteswap()
    return [value != 0 for value in values] if tensor.datatype == "BOOL" else values.tolist()


def select_outputs(request: InferRequest, outputs: Sequence[Tensor]) -> list[tuple[Tensor, bool]]:
    """The outputs that the caller asked for, all where none was named, each with whether it goes as binary."""
    if not request.outputs:
        return [(tensor, request.binary_default) for tensor in outputs]
    by_name = {tensor.name: tensor for tensor in outputs}
    for wanted in request.outputs:
        if wanted.name not in by_name:
            raise BadRequest(f"outputs: {wanted.name[:80]!r} is not an output of this model, which has {sorted(by_name)}")
    return [(by_name[w.name], request.binary_default if w.binary is None else w.binary) for w in request.outputs]


class InferResponse(msgspec.Struct, frozen=True):
    """A rendered answer: HTTP body parts in order, and the JSON part's length where binary tensors follow it."""

    parts: list[Bytes]
    header_length: int | None


def render_infer(
    request: InferRequest,
    outputs: Sequence[Tensor],
    *,
    model_name: str,
    model_version: str,
    parameters: dict[str, str | int | float | bool],
) -> InferResponse:
    """The answer's body; ``parameters`` carries the routing facts. Raises BadRequest for an output that can't be given as asked."""
    rendered: list[dict[str, Any]] = []
    binary: list[Bytes] = []
    for tensor, as_binary in select_outputs(request, outputs):
        entry: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if as_binary:
            entry["parameters"] = {"binary_data_size": len(tensor.data)}
            binary.append(tensor.data)
        else:
            entry["data"] = json_of_data(tensor)
        rendered.append(entry)
    head: dict[str, Any] = {"model_name": model_name, "model_version": model_version, "parameters": parameters, "outputs": rendered}
    if request.id:
        head["id"] = request.id
    header = msgspec.json.encode(head)
    return InferResponse([header, *binary], len(header) if binary else None)


class InferAnswer(msgspec.Struct, frozen=True):
    """An answer as a client reads it; JSON outputs are turned into bytes too."""

    model_name: str
    model_version: str
    id: str
    parameters: dict[str, Any]
    outputs: list[Tensor]


class _AnswerJson(msgspec.Struct):
    model_name: str
    outputs: list[_InputJson]
    model_version: str = ""
    id: str = ""
    parameters: dict[str, Any] = {}


def parse_answer(body: Bytes, header_length: str | None) -> InferAnswer:
    """The answer in an HTTP body, as ``parse_infer`` reads a request. Raises BadRequest for what is none."""
    view = memoryview(body)
    json_bytes = int(header_length) if header_length is not None and header_length.isdigit() else len(view)
    try:
        answer = msgspec.json.decode(view[:json_bytes], type=_AnswerJson)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise BadRequest(f"answer: {exc}") from exc
    outputs, offset = [], json_bytes
    for index, item in enumerate(answer.outputs):
        tensor, offset = _parse_input(item, f"outputs[{index}]", view, offset)
        outputs.append(tensor)
    return InferAnswer(answer.model_name, answer.model_version, answer.id, answer.parameters, outputs)


def render_request(tensors: Sequence[Tensor], *, timeout_us: int = 0, outputs: Sequence[str] = ()) -> tuple[bytes, dict[str, str]]:
    """A client's request with every tensor in binary, answers wanted in binary too: the body and its HTTP headers.

    ``outputs`` names those wanted, all where it is empty.
    """
    inputs = [
        {"name": t.name, "shape": list(t.shape), "datatype": t.datatype, "parameters": {"binary_data_size": len(t.data)}} for t in tensors
    ]
    request: dict[str, Any] = {
        "inputs": inputs,
        "parameters": {"binary_data_output": True} | ({"timeout": timeout_us} if timeout_us else {}),
    }
    if outputs:
        request["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    head = msgspec.json.encode(request)
    return b"".join([head, *(bytes(t.data) for t in tensors)]), {HEADER_LENGTH: str(len(head)), "Content-Type": BINARY_CONTENT_TYPE}
