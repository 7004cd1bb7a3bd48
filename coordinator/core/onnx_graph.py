"""The network in an ONNX file: operators, what flows between them, and the sizes of weights.

Pure, like onnx_file, whose walk it uses: it is run where that is, in a process that has nothing but the file. Field numbers are those of
onnx/onnx.proto3.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import count
from math import prod

import msgspec

from coordinator.core.onnx_file import MAX_PATH, Buffer, fields, varint
from skerry.wire.model_graph import GraphNode, GraphTensor, ModelGraph

MOST_NODES = 2000
MOST_TENSORS = 64
"""Inputs or outputs of the model that are told of."""
MOST_EDGES = 32
"""Inputs or outputs of one operator."""
MOST_WEIGHTS = 4
MOST_KINDS = 200
MOST_AXES = 8
MOST_NUMBER = 2**53
"""Axes that a file makes up must not multiply to what JSON can't carry."""
MOST_LABELS = 20_000
MOST_LABEL_CHARS = 64
LABELS = ("character", "labels", "names", "classes")
"""Keys of a file's metadata under which lines of labels are found in practice (PaddleOCR: character)."""
DATATYPES = {
    1: ("FP32", 4), 2: ("UINT8", 1), 3: ("INT8", 1), 4: ("UINT16", 2), 5: ("INT16", 2), 6: ("INT32", 4), 7: ("INT64", 8), 8: ("BYTES", 0),
    9: ("BOOL", 1), 10: ("FP16", 2), 11: ("FP64", 8), 12: ("UINT32", 4), 13: ("UINT64", 8), 16: ("BF16", 2),
}  # fmt: skip
"""By TensorProto.DataType: the Open Inference Protocol's name, and bytes of one element."""


class _Weight(msgspec.Struct, frozen=True):
    name: str
    shape: tuple[int, ...]
    size_bytes: int

    @property
    def parameters(self) -> int:
        return min(prod(self.shape), MOST_NUMBER)


def graph(data: Buffer) -> ModelGraph:
    """Of a file that onnx_file.check took. Raises NotOnnx where it is none after all."""
    seen = count()
    producer, opset, labels, body = "", 0, list[str](), data[:0]
    for number, kind, value in fields(data, "the file", seen):
        match number, kind:
            case 2, 2:
                producer = _text(value)
            case 8, 2:
                opset = max(opset, _opset(value, seen))
            case 14, 2:
                labels = labels or _labels(value, seen)
            case 7, 2:
                body = value
    return _graph(body, seen, producer=producer, opset=opset, labels=labels)


def _graph(body: Buffer, seen: Iterator[int], *, producer: str, opset: int, labels: list[str]) -> ModelGraph:
    weights: dict[str, _Weight] = {}
    shapes: dict[str, GraphTensor] = {}
    sides: dict[int, list[GraphTensor]] = {11: [], 12: [], 13: []}
    raw: list[Buffer] = []
    operators: Counter[str] = Counter()
    for number, kind, value in fields(body, "graph", seen):
        if kind != 2:
            continue
        if number == 1:
            constant = _constant(value, seen)
            if constant is None:
                raw.append(value)
            else:
                operators["Constant"] += 1
                weights[constant.name] = constant
        elif number == 5:
            weight = _weight(value, seen)
            weights[weight.name] = weight
        elif number in sides:
            tensor = _tensor(value, seen)
            shapes[tensor.name] = tensor
            if number != 13 and len(sides[number]) < MOST_TENSORS:
                sides[number].append(tensor)
    nodes: list[GraphNode] = []
    for part in raw:
        node = _node(part, weights, shapes, seen)
        operators[node.op] += 1
        if len(nodes) < MOST_NODES:
            nodes.append(node)
    return ModelGraph(
        producer=producer,
        opset=opset,
        inputs=[one for one in sides[11] if one.name not in weights],
        outputs=sides[12],
        nodes=nodes,
        # Not most_common(), which imports a module when it is first called: where this is run no file can be opened any more.
        operators=dict(sorted(operators.items(), key=lambda one: -one[1])[:MOST_KINDS]),
        parameters=min(MOST_NUMBER, sum(weight.parameters for weight in weights.values())),
        weight_bytes=min(MOST_NUMBER, sum(weight.size_bytes for weight in weights.values())),
        is_cut=len(raw) > MOST_NODES,
        labels=labels,
    )


def _node(part: Buffer, weights: dict[str, _Weight], shapes: dict[str, GraphTensor], seen: Iterator[int]) -> GraphNode:
    inputs, outputs, op, name, inner = list[str](), list[str](), "", "", 0
    for number, kind, value in fields(part, "graph.node", seen):
        if kind != 2:
            continue
        match number:
            case 1:
                inputs.append(_text(value))
            case 2:
                outputs.append(_text(value))
            case 3:
                name = _text(value)
            case 4:
                op = _text(value)
            case 5:
                inner += _operators_in(value, seen)
    own = [weights[one] for one in inputs if one in weights]
    first = shapes.get(outputs[0]) if outputs else None
    return GraphNode(
        op=op,
        name=name,
        inputs=[one for one in inputs if one and one not in weights][:MOST_EDGES],
        outputs=[one for one in outputs if one][:MOST_EDGES],
        parameters=min(MOST_NUMBER, sum(weight.parameters for weight in own)),
        weights=["\u00d7".join(map(str, weight.shape)) or "1" for weight in own[:MOST_WEIGHTS]],
        shape="\u00d7".join(map(str, first.shape)) if first else "",
        inner=inner,
    )


def _constant(part: Buffer, seen: Iterator[int]) -> _Weight | None:
    """A tensor that stands in an operator of its own, as some exporters write all weights; None for any other operator."""
    op, output, value = "", "", part[:0]
    for number, kind, field in fields(part, "graph.node", seen):
        if kind != 2:
            continue
        if number == 4:
            op = _text(field)
        elif number == 2:
            output = _text(field)
        elif number == 5:
            value = next((tensor for key, form, tensor in fields(field, "attribute", seen) if key == 5 and form == 2), value)
    return msgspec.structs.replace(_weight(value, seen), name=output) if op == "Constant" else None


def _operators_in(attribute: Buffer, seen: Iterator[int]) -> int:
    """Operators in graphs that an attribute holds, however deep. Not recursive: graphs lie in graphs as deep as a file likes."""
    found, attributes = 0, [attribute]
    while attributes:
        for number, kind, value in fields(attributes.pop(), "graph.node.attribute", seen):
            if kind != 2 or number not in (6, 11):
                continue
            for field, wire_type, node in fields(value, "graph.node.attribute.g", seen):
                if field == 1 and wire_type == 2:
                    found += 1
                    attributes += [part for key, form, part in fields(node, "graph.node", seen) if key == 5 and form == 2]
    return found


def _tensor(part: Buffer, seen: Iterator[int]) -> GraphTensor:
    """A ValueInfoProto; what is no tensor has neither datatype nor shape."""
    name, datatype, shape = "", "", list[int | str]()
    for number, kind, value in fields(part, "value_info", seen):
        if kind == 2 and number == 1:
            name = _text(value)
        elif kind == 2 and number == 2:
            for field, wire_type, tensor in fields(value, "type", seen):
                if field == 1 and wire_type == 2:
                    datatype, shape = _tensor_type(tensor, seen)
    return GraphTensor(name, datatype, shape)


def _tensor_type(part: Buffer, seen: Iterator[int]) -> tuple[str, list[int | str]]:
    datatype, shape = "", list[int | str]()
    for number, kind, value in fields(part, "tensor_type", seen):
        if number == 1 and kind == 0:
            datatype = DATATYPES.get(varint(value, 0, "elem_type")[0], ("", 0))[0]
        elif number == 2 and kind == 2:
            shape = [_axis(axis, seen) for field, form, axis in fields(value, "shape", seen) if field == 1 and form == 2][:MOST_AXES]
    return datatype, shape


def _axis(part: Buffer, seen: Iterator[int]) -> int | str:
    found: int | str = "?"
    for number, kind, value in fields(part, "dim", seen):
        if number == 1 and kind == 0:
            size = varint(value, 0, "dim_value")[0]
            found = size if 0 < size < 2**31 else "?"
        elif number == 2 and kind == 2:
            found = _text(value) or "?"
    return found


def _weight(part: Buffer, seen: Iterator[int]) -> _Weight:
    name, datatype, shape = "", 0, list[int]()
    for number, kind, value in fields(part, "initializer", seen):
        if number == 8 and kind == 2:
            name = _text(value)
        elif number == 2 and kind == 0:
            datatype = varint(value, 0, "data_type")[0]
        elif number == 1 and kind == 0:
            shape.append(varint(value, 0, "dims")[0])
        elif number == 1 and kind == 2:  # packed
            at = 0
            while at < len(value) and len(shape) < MOST_AXES:
                size, at = varint(value, at, "dims")
                shape.append(size)
    bounded = tuple(min(size, 2**31) for size in shape[:MOST_AXES])
    return _Weight(name, bounded, min(prod(bounded) * DATATYPES.get(datatype, ("", 0))[1], MOST_NUMBER))


def _opset(part: Buffer, seen: Iterator[int]) -> int:
    """The version, of ONNX's own operators; 0 for another domain's."""
    domain, version = "", 0
    for number, kind, value in fields(part, "opset_import", seen):
        if number == 1 and kind == 2:
            domain = _text(value)
        elif number == 2 and kind == 0:
            version = varint(value, 0, "version")[0]
    return version if domain in ("", "ai.onnx") and version < 2**31 else 0


def _labels(part: Buffer, seen: Iterator[int]) -> list[str]:
    pair = {number: value for number, kind, value in fields(part, "metadata_props", seen) if kind == 2}
    if _text(pair.get(1, part[:0])) not in LABELS:
        return []
    lines = bytes(pair.get(2, part[:0])).decode(errors="replace").split("\n")
    return [line[:MOST_LABEL_CHARS] for line in lines[:MOST_LABELS]]


def _text(value: Buffer) -> str:
    plain = bytes(value[: 4 * MAX_PATH]).decode(errors="replace")[:MAX_PATH]
    return plain if plain.isprintable() else "".join(one if one.isprintable() else "\ufffd" for one in plain)
