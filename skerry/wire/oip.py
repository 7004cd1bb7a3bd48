"""Open Inference Protocol v2, REST: JSON and the binary tensor extension, parsed and rendered without I/O.

Sources: kserve/open-inference-protocol ``specification/protocol/inference_rest.md`` and Triton's ``extension_binary_data.md``,
``extension_sequence.md``, ``extension_schedule_policy.md`` and ``extension_shared_memory.md``. What a tensor's bytes look like stands in
``oip_data``, how requests and answers are read in ``oip_parse``; all of that can be had from here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from skerry.wire.oip_data import (
    ARRAY_CODES,
    ITEM_BYTES,
    MAX_BYTES_ELEMENTS,
    MAX_ELEMENTS,
    MAX_RANK,
    NUMPY_DTYPES,
    BadRequest,
    Bytes,
    Tensor,
    check_size,
    data_of_json,
    elements_of,
    join_bytes,
    json_of_data,
    json_text_of_data,
    split_bytes,
)
from skerry.wire.oip_parse import (
    HEADER_LENGTH,
    MAX_HEADER_BYTES,
    MAX_ID,
    MAX_NAME,
    MAX_SEQUENCE_ID,
    MAX_TENSORS,
    Extent,
    InferAnswer,
    InferRequest,
    RegionReader,
    RequestedOutput,
    SequenceStep,
    parse_answer,
    parse_infer,
    parse_raw,
)

__all__ = [
    "ARRAY_CODES",
    "BINARY_CONTENT_TYPE",
    "EXTENSIONS",
    "HEADER_LENGTH",
    "ITEM_BYTES",
    "MAX_BYTES_ELEMENTS",
    "MAX_ELEMENTS",
    "MAX_HEADER_BYTES",
    "MAX_ID",
    "MAX_NAME",
    "MAX_RANK",
    "MAX_SEQUENCE_ID",
    "MAX_TENSORS",
    "NUMPY_DTYPES",
    "SHARED_MEMORY_EXTENSION",
    "BadRequest",
    "Bytes",
    "Extent",
    "InferAnswer",
    "InferRequest",
    "InferResponse",
    "RegionReader",
    "RequestedOutput",
    "SequenceStep",
    "Tensor",
    "check_size",
    "data_of_json",
    "elements_of",
    "join_bytes",
    "json_of_data",
    "json_text_of_data",
    "parse_answer",
    "parse_infer",
    "parse_raw",
    "placements",
    "render_infer",
    "render_request",
    "render_request_parts",
    "select_outputs",
    "split_bytes",
]

BINARY_CONTENT_TYPE = "application/octet-stream"
EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "schedule_policy", "sequence", "statistics"]
SHARED_MEMORY_EXTENSION = "system_shared_memory"
"""Offered beside EXTENSIONS where a gateway takes registrations of regions."""


def placements(request: InferRequest, outputs: Sequence[Tensor]) -> list[tuple[Tensor, Extent]]:
    """The outputs that the caller wants in regions, each with where; write them there before ``render_infer`` says that they are there.

    Raises BadRequest where one does not fit.
    """
    placed = []
    for tensor, _, extent in select_outputs(request, outputs):
        if extent is None:
            continue
        if len(tensor.data) > extent.size_bytes:
            field = f"output {tensor.name[:80]!r}.parameters.shared_memory_byte_size"
            raise BadRequest(f"{field}: {extent.size_bytes} bytes, the output takes {len(tensor.data)}")
        placed.append((tensor, extent))
    return placed


class InferResponse(msgspec.Struct, frozen=True):
    """A rendered answer: HTTP body parts in order, and the JSON part's length where binary tensors follow it."""

    parts: list[Bytes]
    header_length: int | None


class _EntryParameters(msgspec.Struct, omit_defaults=True):
    binary_data_size: int | None = None
    shared_memory_region: str | None = None
    shared_memory_byte_size: int | None = None
    shared_memory_offset: int = 0


class _Entry(msgspec.Struct, omit_defaults=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: _EntryParameters | None = None
    data: list[Any] | msgspec.Raw | None = None


class _Head(msgspec.Struct, omit_defaults=True):
    model_name: str
    model_version: str
    parameters: Mapping[str, str | int | float | bool]
    outputs: list[_Entry]
    id: str = ""


_encode = msgspec.json.Encoder().encode


def render_infer(
    request: InferRequest,
    outputs: Sequence[Tensor],
    *,
    model_name: str,
    model_version: str,
    parameters: Mapping[str, str | int | float | bool],
) -> InferResponse:
    """The answer's body; ``parameters`` carries the routing facts. Of an output that the caller wanted in a region only the place is told.

    Raises BadRequest for an output that can't be given as asked.
    """
    entries: list[_Entry] = []
    binary: list[Bytes] = []
    for tensor, as_binary, extent in select_outputs(request, outputs):
        name, datatype, shape, size = tensor.name, tensor.datatype, tensor.shape, len(tensor.data)
        if extent is not None:
            entries.append(_Entry(name, datatype, shape, _EntryParameters(None, extent.region, size, extent.offset)))
        elif as_binary:
            entries.append(_Entry(name, datatype, shape, _EntryParameters(size)))
            binary.append(tensor.data)
        else:
            entries.append(_Entry(name, datatype, shape, None, json_text_of_data(tensor)))
    header = _encode(_Head(model_name, model_version, parameters, entries, request.id))
    return InferResponse([header, *binary], len(header) if binary else None)


def select_outputs(request: InferRequest, outputs: Sequence[Tensor]) -> list[tuple[Tensor, bool, Extent | None]]:
    """The outputs that the caller asked for, all where none was named, each with whether it goes as binary and the region it goes to."""
    default = request.binary_default
    if not request.outputs:
        return [(tensor, default, None) for tensor in outputs]
    by_name = {tensor.name: tensor for tensor in outputs}
    selected = []
    for wanted in request.outputs:
        tensor = by_name.get(wanted.name)
        if tensor is None:
            raise BadRequest(f"outputs: {wanted.name[:80]!r} is not an output of this model, which has {sorted(by_name)}")
        selected.append((tensor, default if wanted.binary is None else wanted.binary, wanted.extent))
    return selected


def render_request_parts(
    tensors: Sequence[Tensor],
    *,
    timeout_us: int = 0,
    priority: int = 0,
    outputs: Sequence[str] = (),
    id: str = "",  # noqa: A002 - the protocol's word
    sequence: SequenceStep | None = None,
    idempotent: bool = True,
) -> tuple[list[Bytes], dict[str, str]]:
    """A request with every tensor in binary, answers wanted in binary too: the body's parts, uncopied, and its HTTP headers.

    ``outputs`` names those wanted, all where it is empty.
    """
    parameters: dict[str, Any] = {"binary_data_output": True}
    if timeout_us:
        parameters["timeout"] = timeout_us
    if priority:
        parameters["priority"] = priority
    if sequence is not None:
        parameters |= {"sequence_id": sequence.id, "sequence_start": sequence.start, "sequence_end": sequence.end}
    if not idempotent:
        parameters["idempotent"] = False
    request: dict[str, Any] = {
        "inputs": [_Entry(t.name, t.datatype, t.shape, _EntryParameters(len(t.data))) for t in tensors],
        "parameters": parameters,
    }
    if outputs:
        request["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    if id:
        request["id"] = id
    head = _encode(request)
    return [head, *[t.data for t in tensors]], {HEADER_LENGTH: str(len(head)), "Content-Type": BINARY_CONTENT_TYPE}


def render_request(tensors: Sequence[Tensor], *, timeout_us: int = 0, outputs: Sequence[str] = ()) -> tuple[bytes, dict[str, str]]:
    """As ``render_request_parts``, with the body in one piece."""
    parts, headers = render_request_parts(tensors, timeout_us=timeout_us, outputs=outputs)
    return b"".join(parts), headers
