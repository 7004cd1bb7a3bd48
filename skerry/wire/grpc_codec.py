"""Open Inference Protocol v2, gRPC: ``ModelInfer`` messages to and from the same Structs as the REST form, without I/O.

Raw contents are most of a message, and are not copied on their way in: ``read_request`` takes them off the message's bytes as views, and
protobuf parses what is left. On the way out they are put behind what protobuf rendered; they have the highest field number.
"""

import sys
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from skerry.wire import oip
from skerry.wire.grpc_messages import FIELDS, MESSAGES, Message

Parameter = str | int | float | bool
Resolve = Callable[[oip.Extent, str], oip.Bytes]
"""The bytes that a caller put into a shared memory region, and the field to name where there are none; raises BadRequest."""
Put = Callable[[oip.Extent, oip.Bytes, str], None]
"""Write an output into a caller's shared memory region; raises BadRequest with the field."""

CONTENTS: dict[str, str] = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Where the elements of a datatype lie in InferTensorContents; FP16 and BF16 travel as raw contents alone."""

MAX_PARAMETERS = 256
MAX_FIELDS = 3 * oip.MAX_TENSORS + MAX_PARAMETERS + 16
"""Of a request's own, not of what lies within them: they are walked one by one."""

_RAW_INPUT = FIELDS["ModelInferRequest"]["raw_input_contents"][0]
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
"""Protobuf's wire types; the two that are missing are groups, which this protocol has none of."""
_RAW_OUTPUT_TAG = bytes([FIELDS["ModelInferResponse"]["raw_output_contents"][0] << 3 | _LENGTH])
_STREAMED_TAG = bytes([FIELDS["ModelStreamInferResponse"]["infer_response"][0] << 3 | _LENGTH])
_PACKED = ("BOOL", "FP32", "FP64")
"""Whose typed contents have on the wire the very bytes of the tensor, one element after the other."""

_Request = MESSAGES["ModelInferRequest"]
_Response = MESSAGES["ModelInferResponse"]
_Contents = MESSAGES["InferTensorContents"]


class Received(msgspec.Struct, frozen=True):
    """A ``ModelInferRequest``: the message without its raw contents, and those, as views of its bytes."""

    head: Message
    raw: list[memoryview]


def read_request(body: bytes) -> Received:
    """The request in a message's bytes; raises BadRequest for what is none, and for one that is over the limits."""
    head, raw = _split(body)
    if len(head) > oip.MAX_HEADER_BYTES:
        raise oip.BadRequest(
            f"request: {len(head)} bytes beside raw contents, at most {oip.MAX_HEADER_BYTES} are accepted; send tensors raw"
        )
    try:
        return Received(_Request.FromString(head), raw)
    except DecodeError as exc:
        raise oip.BadRequest("request: not a ModelInferRequest") from exc


def _split(body: bytes) -> tuple[bytes, list[memoryview]]:
    """The message's bytes without raw_input_contents, and those."""
    view, end = memoryview(body), len(body)
    kept: list[memoryview] = []
    raw: list[memoryview] = []
    at = kept_to = fields = 0
    while at < end:
        start = at
        tag, at = _read_varint(body, at)
        wire = tag & 7
        if wire == _LENGTH:
            length, at = _read_varint(body, at)
            if tag >> 3 == _RAW_INPUT:
                raw.append(view[at : at + length])
                kept.append(view[kept_to:start])
                kept_to = at + length
            at += length
        elif wire == _VARINT:
            _, at = _read_varint(body, at)
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise oip.BadRequest("request: not a ModelInferRequest")
        fields += 1
        if fields > MAX_FIELDS:
            raise oip.BadRequest(f"request: more than {MAX_FIELDS} fields")
    if at != end:
        raise oip.BadRequest("request: the message is cut off")
    kept.append(view[kept_to:])
    return b"".join(kept), raw


def _read_varint(body: bytes, at: int) -> tuple[int, int]:
    """A variable-length number, and the offset after it."""
    value = shift = 0
    for octet in body[at : at + 10]:
        at += 1
        value |= (octet & 0x7F) << shift
        if octet < 0x80:
            return value, at
        shift += 7
    raise oip.BadRequest("request: the message is cut off")


def _varint(value: int) -> bytes:
    octets = bytearray()
    while value > 0x7F:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    octets.append(value)
    return bytes(octets)


def infer_request(received: Received, *, regions: Resolve | None = None) -> oip.InferRequest:
    """What is asked for; raises BadRequest with the name of the field that is wrong.

    ``regions`` gives what lies in the caller's shared memory; without it such inputs and outputs are refused.
    """
    head = received.head
    _check_limits(head)
    inputs = _inputs(head, received.raw, regions)
    if len({tensor.name for tensor in inputs}) != len(inputs):
        raise oip.BadRequest(f"inputs: a name is given twice in {[tensor.name for tensor in inputs]}")
    outputs = [_output(item, f"outputs[{index}]", regions) for index, item in enumerate(head.outputs)]
    if len({output.name for output in outputs}) != len(outputs):
        raise oip.BadRequest(f"outputs: a name is given twice in {[output.name for output in outputs]}")
    given = _values(head.parameters, "")
    return oip.InferRequest(
        id=head.id,
        inputs=inputs,
        outputs=outputs,
        timeout_us=_whole_number(given, "timeout", ""),
        priority=_whole_number(given, "priority", ""),
        binary_default=True,
        sequence=_sequence(given),
        idempotent=_flag(given, "idempotent", default=True),
    )


def _check_limits(head: Message) -> None:
    if not 0 < len(head.inputs) <= oip.MAX_TENSORS:
        raise oip.BadRequest(f"inputs: 1 to {oip.MAX_TENSORS} tensors are accepted, got {len(head.inputs)}")
    if len(head.outputs) > oip.MAX_TENSORS:
        raise oip.BadRequest(f"outputs: at most {oip.MAX_TENSORS} are accepted, got {len(head.outputs)}")
    if len(head.id) > oip.MAX_ID:
        raise oip.BadRequest(f"id: {len(head.id)} characters, at most {oip.MAX_ID} are accepted")


def _values(parameters: Message, field: str) -> dict[str, Parameter]:
    """A map of InferParameter as plain values; one in which nothing is chosen is left out."""
    if len(parameters) > MAX_PARAMETERS:
        raise oip.BadRequest(f"{field}parameters: {len(parameters)} are given, at most {MAX_PARAMETERS} are accepted")
    return {name: getattr(item, kind) for name, item in parameters.items() if (kind := item.WhichOneof("parameter_choice"))}


def _inputs(head: Message, raw: list[memoryview], regions: Resolve | None) -> list[oip.Tensor]:
    """Every input, raw contents given out in order to those that lie in no shared memory."""
    inputs, taken = [], 0
    for index, item in enumerate(head.inputs):
        field = f"inputs[{index}]"
        if len(item.name) > oip.MAX_NAME:
            raise oip.BadRequest(f"{field}.name: {len(item.name)} characters, a name has at most {oip.MAX_NAME} characters")
        if item.datatype not in oip.ITEM_BYTES and item.datatype != "BYTES":
            raise oip.BadRequest(f"{field}.datatype: {item.datatype[:40]!r} is not one of {', '.join([*oip.ITEM_BYTES, 'BYTES'])}")
        if len(item.shape) > oip.MAX_RANK:
            raise oip.BadRequest(f"{field}.shape: {len(item.shape)} dimensions, at most {oip.MAX_RANK} are accepted")
        shape = tuple(item.shape)
        count = oip.elements_of(shape, field)
        extent = _extent(_values(item.parameters, f"{field}."), field) if item.parameters else None
        data: oip.Bytes
        if (extent or raw) and item.HasField("contents"):
            raise oip.BadRequest(f"{field}.contents: given beside {'a shared memory region' if extent else 'raw_input_contents'}")
        if extent:
            data = _from_region(extent, item.datatype, field, regions)
            oip.check_size(data, item.datatype, count, field)
        elif raw:
            if taken == len(raw):
                raise oip.BadRequest(f"raw_input_contents: {len(raw)} are given, {field} has none left")
            data = raw[taken]
            taken += 1
            oip.check_size(data, item.datatype, count, field)
        else:
            data = _typed(item.contents, item.datatype, count, field)
        inputs.append(oip.Tensor(item.name, item.datatype, shape, data))
    if taken != len(raw):
        raise oip.BadRequest(f"raw_input_contents: {len(raw)} are given, the inputs take {taken}")
    return inputs


def _from_region(extent: oip.Extent, datatype: str, field: str, regions: Resolve | None) -> oip.Bytes:
    if regions is None:
        raise oip.BadRequest(f"{field}.parameters.shared_memory_region: shared memory regions are not offered by this server")
    data = regions(extent, field)
    # The lengths within BYTES are checked once and relied on later, and the caller can still write there.
    return bytes(data) if datatype == "BYTES" else data


def _typed(contents: Message, datatype: str, count: int, field: str) -> oip.Bytes:
    """The bytes of an input whose elements are given one by one."""
    wanted = CONTENTS.get(datatype)
    for descriptor, _ in contents.ListFields():
        if descriptor.name != wanted:
            raise oip.BadRequest(f"{field}.contents.{descriptor.name}: {datatype} is given {f'in {wanted}' if wanted else 'raw alone'}")
    if wanted is None:
        if count:
            raise oip.BadRequest(f"{field}: {datatype} has no typed contents, send it in raw_input_contents")
        return b""
    elements = getattr(contents, wanted)
    if len(elements) != count:
        raise oip.BadRequest(f"{field}.contents.{wanted}: {len(elements)} elements, the shape asks for {count}")
    return _joined(elements, wanted, datatype, field)


def _joined(elements: Any, wanted: str, datatype: str, field: str) -> oip.Bytes:
    """Typed elements as the bytes of a tensor."""
    if datatype == "BYTES":
        if len(elements) > oip.MAX_BYTES_ELEMENTS:
            raise oip.BadRequest(f"{field}.shape: {len(elements)} BYTES elements, at most {oip.MAX_BYTES_ELEMENTS} are accepted")
        return oip.join_bytes(elements)
    if datatype in _PACKED:
        size = len(elements) * oip.ITEM_BYTES[datatype]
        packed = memoryview(_Contents(**{wanted: elements}).SerializeToString())
        return packed[len(packed) - size :]
    try:
        values: array[Any] = array(oip.ARRAY_CODES[datatype], elements)
    except OverflowError as exc:
        raise oip.BadRequest(f"{field}.contents.{wanted}: a value does not fit {datatype}") from exc
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def _output(item: Message, field: str, regions: Resolve | None) -> oip.RequestedOutput:
    if len(item.name) > oip.MAX_NAME:
        raise oip.BadRequest(f"{field}.name: {len(item.name)} characters, a name has at most {oip.MAX_NAME} characters")
    extent = _extent(_values(item.parameters, f"{field}."), field) if item.parameters else None
    if extent and regions is None:
        raise oip.BadRequest(f"{field}.parameters.shared_memory_region: shared memory regions are not offered by this server")
    return oip.RequestedOutput(item.name, True, extent)


def _extent(given: dict[str, Parameter], field: str) -> oip.Extent | None:
    """Where in shared memory a tensor lies or shall lie; None for one that travels in the message."""
    region = given.get("shared_memory_region")
    if region is None:
        return None
    if not isinstance(region, str) or not 0 < len(region) <= oip.MAX_NAME:
        raise oip.BadRequest(f"{field}.parameters.shared_memory_region: expected a name of 1 to {oip.MAX_NAME} characters")
    size_bytes = _whole_number(given, "shared_memory_byte_size", f"{field}.")
    return oip.Extent(region, _whole_number(given, "shared_memory_offset", f"{field}."), size_bytes)


def _whole_number(given: dict[str, Parameter], name: str, field: str) -> int:
    value = given.get(name, 0)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 18:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise oip.BadRequest(f"{field}parameters.{name}: expected a whole number, got {str(value)[:40]!r}")
    return value


def _flag(given: dict[str, Parameter], name: str, *, default: bool) -> bool:
    value = given.get(name, default)
    if not isinstance(value, bool):
        raise oip.BadRequest(f"parameters.{name}: expected true or false, got {str(value)[:40]!r}")
    return value


def _sequence(given: dict[str, Parameter]) -> oip.SequenceStep | None:
    """The step that ``sequence_id``, ``sequence_start`` and ``sequence_end`` tell of; 0 and the empty text are no sequence."""
    name = given.get("sequence_id", 0)
    if isinstance(name, bool | float) or (isinstance(name, str) and len(name) > oip.MAX_NAME):
        raise oip.BadRequest(f"parameters.sequence_id: expected a whole number or at most {oip.MAX_NAME} characters")
    start, end = _flag(given, "sequence_start", default=False), _flag(given, "sequence_end", default=False)
    if name:
        return oip.SequenceStep(str(name), start, end)
    if start or end:
        raise oip.BadRequest("parameters.sequence_id: missing beside sequence_start or sequence_end")
    return None


def render_infer(
    request: oip.InferRequest,
    outputs: Sequence[oip.Tensor],
    *,
    model_name: str,
    model_version: str,
    parameters: dict[str, Parameter],
    put: Put | None = None,
) -> list[oip.Bytes]:
    """The answer's ``ModelInferResponse``, as parts to be joined; outputs are not copied, and raw.

    One that the caller wants in shared memory is given to ``put`` and travels as no bytes. Raises BadRequest for an output that the model
    does not have.
    """
    extents = {output.name: (output.extent, f"outputs[{index}]") for index, output in enumerate(request.outputs) if output.extent}
    response = _Response(model_name=model_name, model_version=model_version, id=request.id)
    _set_parameters(response.parameters, parameters)
    raw: list[oip.Bytes] = []
    for tensor, _, _ in oip.select_outputs(request, outputs):
        entry = response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        extent, field = extents.get(tensor.name, (None, ""))
        if extent is None:
            raw += [_RAW_OUTPUT_TAG + _varint(len(tensor.data)), tensor.data]
            continue
        if put is None:
            raise oip.BadRequest(f"{field}.parameters.shared_memory_region: shared memory regions are not offered by this server")
        put(extent, tensor.data, field)
        told: dict[str, Parameter] = {"shared_memory_region": extent.region, "shared_memory_byte_size": len(tensor.data)}
        _set_parameters(entry.parameters, told | ({"shared_memory_offset": extent.offset} if extent.offset else {}))
        raw.append(_RAW_OUTPUT_TAG + _varint(0))  # clients find an output's contents by its place among the outputs
    return [response.SerializeToString(), *raw]


def _set_parameters(target: Message, parameters: dict[str, Parameter]) -> None:
    for name, value in parameters.items():
        if isinstance(value, bool):
            target[name].bool_param = value
        elif isinstance(value, int):
            target[name].int64_param = value
        elif isinstance(value, float):
            target[name].double_param = value
        else:
            target[name].string_param = value


def streamed(parts: list[oip.Bytes]) -> bytes:
    """A ``ModelStreamInferResponse`` of an answer's parts."""
    return b"".join([_STREAMED_TAG, _varint(sum(len(part) for part in parts)), *parts])


def streamed_error(text: str, *, model_name: str, model_version: str, request_id: str) -> bytes:
    """A ``ModelStreamInferResponse`` that says why a request has no answer, and which."""
    told = _Response(model_name=model_name, model_version=model_version, id=request_id)
    message: bytes = MESSAGES["ModelStreamInferResponse"](error_message=text, infer_response=told).SerializeToString()
    return message


def read(name: str, body: bytes) -> Message:
    """The message called ``name`` in ``body``; raises BadRequest."""
    try:
        return MESSAGES[name].FromString(body)
    except DecodeError as exc:
        raise oip.BadRequest(f"request: not a {name}") from exc


def of_json(name: str, value: Any) -> bytes:
    """The message called ``name`` with what its REST form holds; what gRPC's has no field for is left out."""
    message: bytes = json_format.Parse(msgspec.json.encode(value), MESSAGES[name](), ignore_unknown_fields=True).SerializeToString()
    return message
