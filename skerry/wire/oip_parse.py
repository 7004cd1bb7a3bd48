"""Requests and answers of the Open Inference Protocol, read from HTTP bodies without I/O. Their words are all in ``oip`` too."""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import msgspec

from skerry.wire.oip_data import ITEM_BYTES, BadRequest, Bytes, Tensor, check_size, data_of_json, elements_of, join_bytes

T = TypeVar("T")

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_TENSORS = 256
MAX_NAME = 512
MAX_ID = 4096
MAX_SEQUENCE_ID = 256
MAX_KEPT_HEADER_BYTES = 2048
"""Longer JSON parts are read anew each time: what is kept of the last ones is bounded in bytes too."""


class SequenceStep(msgspec.Struct, frozen=True, omit_defaults=True):
    """To which sequence a request belongs: ``start`` begins it anew, ``end`` forgets it after this request. Triton's sequence extension."""

    id: str
    start: bool = False
    end: bool = False


class Extent(msgspec.Struct, frozen=True):
    """A part of a shared memory region that the caller registered: Triton's system shared memory extension."""

    region: str
    offset: int
    size_bytes: int


class RequestedOutput(msgspec.Struct, frozen=True):
    """An output that the caller named; ``binary`` is None where the caller left it to the request's default."""

    name: str
    binary: bool | None = None
    extent: Extent | None = None
    """Where the caller wants it put instead of into the answer."""


class InferRequest(msgspec.Struct, frozen=True):
    """``timeout_us`` is Triton's ``timeout`` parameter, 0 where none was given. ``binary_default`` is ``binary_data_output``.

    ``priority`` is Triton's: 1 is served first, 0 is the default, which counts as the lowest. A request that is not ``idempotent`` is not
    tried a second time once a replica may have begun it.
    """

    id: str
    inputs: list[Tensor]
    outputs: list[RequestedOutput]
    timeout_us: int = 0
    priority: int = 0
    binary_default: bool = False
    sequence: SequenceStep | None = None
    idempotent: bool = True


RegionReader = Callable[[Extent, str], Bytes]
"""Reads an extent of a region for the field that names it, exactly as many bytes as it says. Raises BadRequest."""
RawInput = tuple[str, str, Sequence[int]]
"""Name, datatype and shape of a model's input; -1 stands for an extent that the caller chooses."""

_Number = int | str | None
"""Triton's HTTP client sends 64-bit parameters as text."""


class _InputParameters(msgspec.Struct):
    binary_data_size: int | None = None
    shared_memory_region: str | None = None
    shared_memory_offset: _Number = None
    shared_memory_byte_size: _Number = None


class _OutputParameters(msgspec.Struct):
    binary_data: bool | None = None
    classification: _Number = None
    shared_memory_region: str | None = None
    shared_memory_offset: _Number = None
    shared_memory_byte_size: _Number = None


class _RequestParameters(msgspec.Struct):
    timeout: _Number = None
    priority: _Number = None
    binary_data_output: bool | None = None
    sequence_id: _Number = None
    sequence_start: bool | None = None
    sequence_end: bool | None = None
    idempotent: bool | None = None


_NO_INPUT_PARAMETERS = _InputParameters()
_NO_OUTPUT_PARAMETERS = _OutputParameters()
_NO_REQUEST_PARAMETERS = _RequestParameters()


class _InputJson(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: _InputParameters | None = None
    data: Any = None


class _OutputJson(msgspec.Struct):
    name: str
    parameters: _OutputParameters | None = None


class _RequestJson(msgspec.Struct):
    inputs: list[_InputJson]
    id: str = ""
    parameters: _RequestParameters | None = None
    outputs: list[_OutputJson] = []


class _Plan(msgspec.Struct, frozen=True):
    """An input as the JSON part tells it: ``data`` is there already, or ``size`` bytes follow in the body or lie in ``extent``."""

    field: str
    name: str
    datatype: str
    shape: tuple[int, ...]
    count: int
    size: int = 0
    data: bytes | None = None
    extent: Extent | None = None


class _RequestPlan(msgspec.Struct, frozen=True):
    """A request without the bytes that its JSON part does not hold."""

    inputs: tuple[_Plan, ...]
    outputs: tuple[RequestedOutput, ...]
    id: str
    timeout_us: int
    priority: int
    binary_default: bool
    sequence: SequenceStep | None
    idempotent: bool
    places: bool
    """Whether an output is wanted in a region."""


_request_decoder = msgspec.json.Decoder(_RequestJson)


def parse_infer(body: Bytes, header_length: str | None, *, regions: RegionReader | None = None) -> InferRequest:
    """The request in an HTTP body; ``header_length`` is the Inference-Header-Content-Length header or None.

    ``regions`` reads what lies in shared memory, None where this caller may not name any. Tensors are views of ``body``, uncopied. Raises
    BadRequest with the name of the field that is wrong. A body that is one tensor and nothing else is for ``parse_raw``.
    """
    view = memoryview(body)
    json_bytes = _json_bytes(header_length, len(view))
    plan = _kept_plan(bytes(view[:json_bytes])) if json_bytes <= MAX_KEPT_HEADER_BYTES else _plan_of(view[:json_bytes])
    if plan.places and regions is None:
        raise BadRequest("outputs.parameters.shared_memory_region: shared memory regions are not offered on this connection")
    return InferRequest(
        plan.id,
        _bound(plan.inputs, view, json_bytes, regions),
        list(plan.outputs),
        plan.timeout_us,
        plan.priority,
        plan.binary_default,
        plan.sequence,
        plan.idempotent,
    )


def _json_bytes(header_length: str | None, body_bytes: int) -> int:
    """How many bytes of the body are JSON."""
    json_bytes = body_bytes
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit() and len(header_length) <= 12):
            raise BadRequest(f"{HEADER_LENGTH}: {header_length[:40]!r} is not a number of bytes")
        json_bytes = int(header_length)
        if json_bytes > body_bytes:
            raise BadRequest(f"{HEADER_LENGTH}: {json_bytes} is more than the body's {body_bytes} bytes")
    if json_bytes > MAX_HEADER_BYTES:
        raise BadRequest(f"JSON part of {json_bytes} bytes, at most {MAX_HEADER_BYTES} are accepted; send tensors in binary")
    return json_bytes


def _plan_of(head: Bytes) -> _RequestPlan:
    request = _decoded(head, _request_decoder, "request")
    _check_limits(request)
    inputs = tuple([_plan_input(item, f"inputs[{index}]") for index, item in enumerate(request.inputs)])
    _check_names([item.name for item in inputs], "inputs")
    _check_names([item.name for item in request.outputs], "outputs")
    outputs = tuple([_requested(item, f"outputs[{index}]") for index, item in enumerate(request.outputs)])
    parameters = request.parameters or _NO_REQUEST_PARAMETERS
    return _RequestPlan(
        inputs,
        outputs,
        request.id,
        _whole_number(parameters.timeout, "parameters.timeout"),
        _whole_number(parameters.priority, "parameters.priority"),
        bool(parameters.binary_data_output),
        _sequence_of(parameters),
        parameters.idempotent is not False,
        any(output.extent is not None for output in outputs),
    )


_kept_plan = lru_cache(maxsize=256)(_plan_of)
"""A caller's requests differ in their tensors' bytes; their JSON parts are mostly the same."""


def _decoded(head: Bytes, decoder: msgspec.json.Decoder[T], what: str) -> T:
    try:
        return decoder.decode(head)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        text = bytes(head)
        if b"NaN" not in text and b"Infinity" not in text:
            raise BadRequest(f"{what}: {exc}") from exc
    try:  # Triton and its client write numbers that JSON has not, and Python's reader takes them
        document = json.loads(text)
        msgspec.json.encode(document)  # that reader takes half characters too, which could never be written again
        return msgspec.convert(document, decoder.type)
    except (ValueError, RecursionError) as exc:
        raise BadRequest(f"{what}: {exc}") from exc


def _check_limits(request: _RequestJson) -> None:
    if not 0 < len(request.inputs) <= MAX_TENSORS or len(request.outputs) > MAX_TENSORS:
        raise BadRequest(f"inputs: 1 to {MAX_TENSORS} tensors are accepted, got {len(request.inputs)}")
    if any(len(output.name) > MAX_NAME for output in request.outputs) or len(request.id) > MAX_ID:
        raise BadRequest(f"outputs.name or id: at most {MAX_NAME} and {MAX_ID} characters are accepted")


def _check_names(names: list[str], field: str) -> None:
    """An output given twice would make the answer larger than the model's; an input given twice has no meaning."""
    if len(names) > 1 and len(set(names)) != len(names):
        raise BadRequest(f"{field}: a name is given twice in {[name[:80] for name in names[:20]]}")


def _whole_number(value: _Number, field: str, most: int = 2**63 - 1) -> int:
    if value is None:
        return 0
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
        value = int(value)
    if not isinstance(value, int) or not 0 <= value <= most:
        raise BadRequest(f"{field}: expected a whole number, got {str(value)[:40]!r}")
    return value


def _sequence_of(parameters: _RequestParameters) -> SequenceStep | None:
    """The sequence that a request belongs to; 0 and an empty text are Triton's words for none."""
    given = parameters.sequence_id
    if given is None or given in (0, ""):
        return None
    if isinstance(given, int):
        given = str(_whole_number(given, "parameters.sequence_id", 2**64 - 1))
    if len(given) > MAX_SEQUENCE_ID:
        raise BadRequest(f"parameters.sequence_id: {len(given)} characters, at most {MAX_SEQUENCE_ID} are accepted")
    return SequenceStep(given, bool(parameters.sequence_start), bool(parameters.sequence_end))


def _extent_of(parameters: _InputParameters | _OutputParameters, field: str) -> Extent | None:
    region = parameters.shared_memory_region
    if region is None:
        return None
    if not 0 < len(region) <= MAX_NAME:
        raise BadRequest(f"{field}.parameters.shared_memory_region: 1 to {MAX_NAME} characters are accepted, got {len(region)}")
    if parameters.shared_memory_byte_size is None:
        raise BadRequest(f"{field}.parameters.shared_memory_byte_size: is missing, a region is named")
    return Extent(
        region,
        _whole_number(parameters.shared_memory_offset, f"{field}.parameters.shared_memory_offset"),
        _whole_number(parameters.shared_memory_byte_size, f"{field}.parameters.shared_memory_byte_size"),
    )


def _requested(item: _OutputJson, field: str) -> RequestedOutput:
    parameters = item.parameters
    if parameters is None:
        return RequestedOutput(item.name)
    if _whole_number(parameters.classification, f"{field}.parameters.classification"):
        raise BadRequest(f"{field}.parameters.classification: the classification extension is not offered, ask for the whole tensor")
    return RequestedOutput(item.name, parameters.binary_data, _extent_of(parameters, field))


def _plan_input(item: _InputJson, field: str) -> _Plan:
    if len(item.name) > MAX_NAME:
        raise BadRequest(f"{field}.name: {len(item.name)} characters, a name has at most {MAX_NAME} characters")
    datatype = item.datatype
    item_bytes = ITEM_BYTES.get(datatype, 0)
    if not item_bytes and datatype != "BYTES":
        raise BadRequest(f"{field}.datatype: {datatype[:40]!r} is not one of {', '.join([*ITEM_BYTES, 'BYTES'])}")
    count = elements_of(item.shape, field)
    shape = tuple(item.shape)
    parameters = item.parameters or _NO_INPUT_PARAMETERS
    extent = _extent_of(parameters, field)
    size = parameters.binary_data_size
    if extent is not None:
        if item.data is not None or size is not None:
            raise BadRequest(f"{field}: has data besides parameters.shared_memory_region")
        announced, size = f"{field}.parameters.shared_memory_byte_size", extent.size_bytes
    elif size is None:
        if item.data is None:
            raise BadRequest(f"{field}: has neither data nor parameters.binary_data_size")
        return _Plan(field, item.name, datatype, shape, count, data=data_of_json(item.data, datatype, count, field))
    else:
        if item.data is not None:
            raise BadRequest(f"{field}: has both data and parameters.binary_data_size")
        announced = f"{field}.parameters.binary_data_size"
    if size < 0:
        raise BadRequest(f"{announced}: expected a number of bytes, got {size}")
    if item_bytes and size != count * item_bytes:
        raise BadRequest(f"{announced}: {size} bytes announced, the shape asks for {count} x {item_bytes}")
    return _Plan(field, item.name, datatype, shape, count, size, None, extent)


def _bound(plans: Sequence[_Plan], view: memoryview, offset: int, regions: RegionReader | None) -> list[Tensor]:
    """The tensors, with the body's bytes from ``offset`` on; raises BadRequest unless these are all used up."""
    tensors = []
    for plan in plans:
        data: Bytes | None = plan.data
        if data is None:
            if plan.extent is None:
                end = offset + plan.size
                if end > len(view):
                    left = len(view) - offset
                    raise BadRequest(f"{plan.field}.parameters.binary_data_size: {plan.size} bytes announced, {left} are left in the body")
                data = view[offset:end]
                offset = end
            else:
                data = _read(plan, plan.extent, regions)
            if plan.datatype == "BYTES":
                check_size(data, plan.datatype, plan.count, plan.field)
        tensors.append(Tensor(plan.name, plan.datatype, plan.shape, data))
    if offset != len(view):
        raise BadRequest(f"body: {len(view) - offset} bytes after the last tensor")
    return tensors


def _read(plan: _Plan, extent: Extent, regions: RegionReader | None) -> Bytes:
    field = f"{plan.field}.parameters.shared_memory_region"
    if regions is None:
        raise BadRequest(f"{field}: shared memory regions are not offered on this connection")
    data = regions(extent, field)
    if len(data) != extent.size_bytes:
        raise BadRequest(f"{field}: {extent.region[:80]!r} gave {len(data)} bytes instead of {extent.size_bytes}")
    return data


def parse_raw(body: Bytes, inputs: Sequence[RawInput]) -> InferRequest:
    """Triton's raw binary request (Inference-Header-Content-Length: 0): the body is the model's one input, and nothing else.

    ``inputs`` are the model's. A free extent follows from the size; a BYTES input is one element, without its length. Outputs are wanted in
    binary. Raises BadRequest.
    """
    if len(inputs) != 1:
        raise BadRequest(f"body: a request without JSON can be made to a model with one input, this one has {len(inputs)}")
    name, datatype, extents = inputs[0]
    field = f"input {name[:80]!r}"
    free = [index for index, extent in enumerate(extents) if extent < 0]
    fixed = elements_of([extent for extent in extents if extent >= 0], field)
    if datatype == "BYTES":
        if fixed != 1:
            raise BadRequest(f"body: without JSON it can only be one BYTES element, {field} takes {list(extents)}")
        shape = tuple([1 if extent < 0 else extent for extent in extents])
        return InferRequest("", [Tensor(name, datatype, shape, join_bytes([bytes(body)]))], [], binary_default=True)
    if datatype not in ITEM_BYTES:
        raise BadRequest(f"body: {field} is {datatype[:40]!r}, which has no binary form")
    if len(free) > 1:
        raise BadRequest(f"body: its size can't tell {len(free)} free extents of {field} {list(extents)}, send JSON with a shape")
    row_bytes = fixed * ITEM_BYTES[datatype]
    rows, rest = divmod(len(body), row_bytes) if row_bytes else (0, len(body))
    if rest or (not free and rows != 1 and row_bytes):
        raise BadRequest(f"body: {len(body)} bytes do not fill {field} {datatype} {list(extents)}")
    shape = tuple([rows if extent < 0 else extent for extent in extents])
    return InferRequest("", [Tensor(name, datatype, shape, memoryview(body))], [], binary_default=True)


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


_answer_decoder = msgspec.json.Decoder(_AnswerJson)


def parse_answer(body: Bytes, header_length: str | None) -> InferAnswer:
    """The answer in an HTTP body, as ``parse_infer`` reads a request. Raises BadRequest for what is none."""
    view = memoryview(body)
    json_bytes = _json_bytes(header_length, len(view))
    answer = _decoded(view[:json_bytes], _answer_decoder, "answer")
    plans = [_plan_input(item, f"outputs[{index}]") for index, item in enumerate(answer.outputs)]
    outputs = _bound(plans, view, json_bytes, None)
    return InferAnswer(answer.model_name, answer.model_version, answer.id, answer.parameters, outputs)
