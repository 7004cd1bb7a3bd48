"""Whether bytes are a whole ONNX model in one file, told without building anything from them.

Walks the protobuf wire format (protobuf.dev/programming-guides/encoding) along the fields that lead to tensors, wherever one may
stand (onnx/onnx.proto3); the model itself is parsed in a sandbox only. Pure.
"""

from collections.abc import Iterator, Sequence
from itertools import count

from skerry.wire.messages import StateTensor

Buffer = memoryview

MAX_FIELDS = 20_000_000
"""Fields looked at before giving up on a file."""
MAX_PATH = 120
"""Characters that are kept of where something stands, and of a name."""
MAX_NAMES = 20
"""Inputs or outputs that are told to who named another."""

_GRAPH, _NODE, _ATTRIBUTE, _TENSOR, _SPARSE, _FUNCTION, _TRAINING, _EXTERNAL = range(8)
_MODEL_PARTS = {7: ("graph", _GRAPH), 20: ("training_info", _TRAINING), 25: ("functions", _FUNCTION)}
_PARTS: dict[int, dict[int, tuple[str, int]]] = {
    _GRAPH: {1: ("node", _NODE), 5: ("initializer", _TENSOR), 15: ("sparse_initializer", _SPARSE)},
    _NODE: {5: ("attribute", _ATTRIBUTE)},
    _ATTRIBUTE: {
        5: ("t", _TENSOR), 6: ("g", _GRAPH), 10: ("tensors", _TENSOR), 11: ("graphs", _GRAPH),
        22: ("sparse_tensor", _SPARSE), 23: ("sparse_tensors", _SPARSE),
    },
    _TENSOR: {13: ("external_data", _EXTERNAL)},
    _SPARSE: {1: ("values", _TENSOR), 2: ("indices", _TENSOR)},
    _FUNCTION: {7: ("node", _NODE), 11: ("attribute_proto", _ATTRIBUTE)},
    _TRAINING: {1: ("initialization", _GRAPH), 2: ("algorithm", _GRAPH)},
}  # fmt: skip
"""By message, which of its fields hold what."""


class NotOnnx(ValueError):
    """The file can't be served; the text says why."""


class NoSuchTensor(ValueError):
    """A name that the model does not have; the text says which, and those that it has."""


def check_state(data: Buffer, state: Sequence[StateTensor]) -> None:
    """Raises NoSuchTensor where ``state`` names what is no input or no output of a file that ``check`` took, or one input twice."""
    if not state:
        return
    inputs, outputs = _names(data)
    for kept in state:
        for name, known, kind in ((kept.input, inputs, "input"), (kept.output, outputs, "output")):
            if name not in known:
                have = ", ".join(repr(found[:MAX_PATH]) for found in known[:MAX_NAMES]) or f"no {kind}"
                raise NoSuchTensor(f"{name[:MAX_PATH]!r} is not an {kind} of the model: it has {have}")
        if sum(other.input == kept.input for other in state) > 1:
            raise NoSuchTensor(f"the input {kept.input[:MAX_PATH]!r} is given twice")


def _names(data: Buffer) -> tuple[list[str], list[str]]:
    """The graph's inputs and outputs, in order. An input with an initializer is a constant that may be replaced, and does not count."""
    seen = count()
    named: dict[int, list[str]] = {5: [], 11: [], 12: []}  # initializer, input, output
    for number, kind, graph in fields(data, "the file", seen):
        if number != 7 or kind != 2:
            continue
        for field, wire_type, part in fields(graph, "graph", seen):
            if field in named and wire_type == 2:
                named[field].append(_name_in(part, 8 if field == 5 else 1, seen))
    constants = set(named[5])
    return [name for name in named[11] if name not in constants], named[12]


def _name_in(part: Buffer, field: int, seen: Iterator[int]) -> str:
    """The last text in a field, as protobuf has it; empty where there is none."""
    texts = [bytes(value) for number, kind, value in fields(part, "graph", seen) if number == field and kind == 2]
    return texts[-1].decode(errors="replace") if texts else ""


def check(data: Buffer) -> None:
    """Raises NotOnnx for a file that is empty, truncated, of another kind, or that leans on files beside it."""
    if not data:
        raise NotOnnx("the file is empty")
    seen = count()
    has_version = has_graph = False
    for number, kind, value in fields(data, "the file", seen):
        if number == 1 and kind == 0:
            has_version = True
        elif number in _MODEL_PARTS and kind == 2:
            has_graph = has_graph or number == 7
            _check_part(value, *_MODEL_PARTS[number], seen)
    if not (has_version and has_graph):
        raise NotOnnx("the file is not an ONNX model: it has no " + ("graph" if has_version else "ir_version"))


def _check_part(data: Buffer, path: str, message: int, seen: Iterator[int]) -> None:
    """Look through a part and all that lies in it. Not recursive: graphs may lie in graphs as deep as a file likes."""
    parts = [(data, path, message)]
    while parts:
        data, path, message = parts.pop()
        if message == _EXTERNAL:
            _refuse_external(data, path, seen)
            continue
        for number, kind, value in fields(data, path, seen):
            if kind == 2 and number in _PARTS[message]:
                name, below = _PARTS[message][number]
                parts.append((value, f"{path}.{name}"[-MAX_PATH:], below))


def _refuse_external(entry: Buffer, path: str, seen: Iterator[int]) -> None:
    pair = {number: bytes(value[:200]).decode(errors="replace") for number, kind, value in fields(entry, path, seen) if kind == 2}
    if pair.get(1) != "location":
        return
    location = pair.get(2, "")
    outside = location.startswith("/") or ".." in location.split("/") or "\\" in location
    where = "lies outside the model's folder" if outside else "is not part of the push"
    raise NotOnnx(f"{path}.location: {location[:120]!r} {where}; save the model as a single file")


def varint(data: Buffer, at: int, where: str) -> tuple[int, int]:
    """The number at ``at``, and where it ends. Raises NotOnnx."""
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


def fields(data: Buffer, where: str, seen: Iterator[int]) -> Iterator[tuple[int, int, Buffer]]:
    """Number, wire type and bytes of each field; ``seen`` counts them all, over every part of a file. Raises NotOnnx."""
    at = 0
    while at < len(data):
        if next(seen) >= MAX_FIELDS:
            raise NotOnnx(f"{where}: more than {MAX_FIELDS} fields")
        key, at = varint(data, at, where)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise NotOnnx(f"{where}: the file is not an ONNX model (field 0 at byte {at})")
        match kind:
            case 0:
                begin = at
                _, at = varint(data, at, where)
                yield number, kind, data[begin:at]
                continue
            case 1:
                size = 8
            case 2:
                size, at = varint(data, at, where)
            case 5:
                size = 4
            case _:
                raise NotOnnx(f"{where}: the file is not an ONNX model (wire type {kind} at byte {at})")
        if size > len(data) - at:
            raise NotOnnx(f"{where}: not ONNX, or truncated: field {number} announces {size} bytes, {len(data) - at} are left")
        yield number, kind, data[at : at + size]
        at += size
