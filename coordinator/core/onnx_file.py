"""Whether bytes are a whole ONNX model in one file, told without building anything from them.

Walks the protobuf wire format (protobuf.dev/programming-guides/encoding) along the few fields that matter (onnx/onnx.proto3:
ModelProto.ir_version = 1, graph = 7; GraphProto.initializer = 5; TensorProto.external_data = 13, StringStringEntryProto.key = 1,
value = 2). The model itself is parsed in a sandbox only. Pure.
"""

from collections.abc import Iterator

Buffer = memoryview

MAX_DEPTH_FIELDS = 2_000_000
"""Fields looked at before giving up on a file."""


class NotOnnx(ValueError):
    """The file can't be served; the text says why."""


def check(data: Buffer) -> None:
    """Raises NotOnnx for a file that is empty, truncated, of another kind, or that leans on files beside it."""
    if not data:
        raise NotOnnx("the file is empty")
    has_version = has_graph = False
    for number, kind, value in _fields(data, "the file"):
        if number == 1 and kind == 0:
            has_version = True
        elif number == 7 and kind == 2:
            has_graph = True
            _check_graph(value)
    if not (has_version and has_graph):
        raise NotOnnx("the file is not an ONNX model: it has no " + ("graph" if has_version else "ir_version"))


def _check_graph(graph: Buffer) -> None:
    for number, kind, tensor in _fields(graph, "graph"):
        if number == 5 and kind == 2:
            for inner, inner_kind, entry in _fields(tensor, "graph.initializer"):
                if inner == 13 and inner_kind == 2:
                    _refuse_external(entry)


def _refuse_external(entry: Buffer) -> None:
    pair = {number: bytes(value[:200]).decode(errors="replace") for number, kind, value in _fields(entry, "external_data") if kind == 2}
    if pair.get(1) != "location":
        return
    location = pair.get(2, "")
    outside = location.startswith("/") or ".." in location.split("/") or "\\" in location
    where = "lies outside the model's folder" if outside else "is not part of the push"
    raise NotOnnx(f"graph.initializer.external_data.location: {location[:120]!r} {where}; save the model as a single file")


def _varint(data: Buffer, at: int, where: str) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise NotOnnx(f"{where}: not ONNX, or cut off at byte {at}")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: Buffer, where: str) -> Iterator[tuple[int, int, Buffer]]:
    """Number, wire type and bytes (empty for numbers) of each field."""
    at = seen = 0
    while at < len(data):
        seen += 1
        if seen > MAX_DEPTH_FIELDS:
            raise NotOnnx(f"{where}: more than {MAX_DEPTH_FIELDS} fields")
        key, at = _varint(data, at, where)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise NotOnnx(f"{where}: the file is not an ONNX model (field 0 at byte {at})")
        match kind:
            case 0:
                _, at = _varint(data, at, where)
                yield number, kind, data[:0]
                continue
            case 1:
                size = 8
            case 2:
                size, at = _varint(data, at, where)
            case 5:
                size = 4
            case _:
                raise NotOnnx(f"{where}: the file is not an ONNX model (wire type {kind} at byte {at})")
        if size > len(data) - at:
            raise NotOnnx(f"{where}: not ONNX, or truncated: field {number} announces {size} bytes, {len(data) - at} are left")
        yield number, kind, data[at : at + size]
        at += size
