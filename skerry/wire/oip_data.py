"""Tensors of the Open Inference Protocol: their datatypes, how many bytes they take, and their forms in JSON and in binary.

A tensor is carried as little-endian row-major bytes; BYTES elements have a 4-byte length prefix. JSON numbers become bytes through
the standard library's ``array``: a gateway needs no numpy, and stays small.
"""

import json
import math
import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

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

MAX_RANK = 32
MAX_ELEMENTS = 2**40
MAX_BYTES_ELEMENTS = 200_000
"""They are walked one by one, in the loop that answers everybody."""

Bytes = bytes | memoryview

_length = struct.Struct("<I")


class BadRequest(ValueError):
    """An inference request that breaks the protocol; the text names the field."""


class Tensor(msgspec.Struct, frozen=True):
    """``data`` is exactly as long as ``shape`` and ``datatype`` ask for."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Bytes


def elements_of(shape: Sequence[int], field: str) -> int:
    """How many elements a shape has; raises BadRequest for what is no shape."""
    if len(shape) > MAX_RANK:
        raise BadRequest(f"{field}.shape: {len(shape)} dimensions, at most {MAX_RANK} are accepted")
    if shape:
        if min(shape) < 0:
            raise BadRequest(f"{field}.shape: {list(shape)} has a negative extent")
        if max(shape) > MAX_ELEMENTS:
            raise BadRequest(f"{field}.shape: an extent is more than {MAX_ELEMENTS}")
    count = math.prod(shape)
    if count > MAX_ELEMENTS:
        raise BadRequest(f"{field}.shape: {list(shape)} has more than {MAX_ELEMENTS} elements")
    return count


def check_size(data: Bytes, datatype: str, count: int, field: str) -> None:
    """Raises BadRequest unless ``data`` holds exactly ``count`` elements."""
    if datatype == "BYTES":
        if count > MAX_BYTES_ELEMENTS:
            raise BadRequest(f"{field}.shape: {count} BYTES elements, at most {MAX_BYTES_ELEMENTS} are accepted")
        found = sum(1 for _ in _extents_of_bytes(data, field, count + 1))
        if found != count:
            raise BadRequest(f"{field}: {found} BYTES elements, the shape asks for {count}")
    elif len(data) != count * ITEM_BYTES[datatype]:
        raise BadRequest(f"{field}: {len(data)} bytes, the shape asks for {count} x {ITEM_BYTES[datatype]}")


def _extents_of_bytes(data: Bytes, field: str, most: int) -> Iterator[tuple[int, int]]:
    """Where each element of a BYTES tensor begins and ends, ``most`` at most."""
    offset, end = 0, len(data)
    for _ in range(most):
        if offset >= end:
            return
        if offset + 4 > end:
            raise BadRequest(f"{field}: a length prefix is cut off at byte {offset}")
        start = offset + 4
        offset = start + _length.unpack_from(data, offset)[0]
        if offset > end:
            raise BadRequest(f"{field}: an element of {offset - start} bytes reaches past the end at byte {start}")
        yield start, offset


def split_bytes(data: Bytes, field: str, *, most: int = MAX_BYTES_ELEMENTS) -> list[bytes]:
    """The elements of a BYTES tensor, ``most`` at most; raises BadRequest where a length prefix reaches past the end."""
    return [bytes(data[start:end]) for start, end in _extents_of_bytes(data, field, most)]


def join_bytes(elements: Sequence[bytes]) -> bytes:
    """The binary form of BYTES elements."""
    return b"".join(_length.pack(len(element)) + element for element in elements)


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
    try:
        if datatype == "BYTES":
            if not all(isinstance(item, str) for item in flat):
                raise BadRequest(f"{field}.data: BYTES elements in JSON are strings")
            return join_bytes([item.encode() for item in flat])
        allowed: tuple[type, ...] = {"BOOL": (bool,), "FP32": (float, int), "FP64": (float, int)}.get(datatype, (int,))
        if any(not isinstance(item, allowed) or (isinstance(item, bool) and datatype != "BOOL") for item in flat):
            raise BadRequest(f"{field}.data: an element is not {datatype}")
        values = array(ARRAY_CODES[datatype], flat)
    except (OverflowError, TypeError, UnicodeEncodeError) as exc:
        raise BadRequest(f"{field}.data: a value does not fit {datatype}") from exc
    if datatype == "FP32" and not _finite_alike(values, flat):
        raise BadRequest(f"{field}.data: a value does not fit FP32")
    return _little_endian(values)


def _finite_alike(values: "array[Any]", given: list[Any]) -> bool:
    """Whether nothing became infinite that was not: ``array`` makes infinity of a number that is too large for 32 bits."""
    return all(was in (math.inf, -math.inf) for value, was in zip(values, given, strict=True) if value in (math.inf, -math.inf))


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


def json_text_of_data(tensor: Tensor) -> list[Any] | msgspec.Raw:
    """As ``json_of_data``, ready to be encoded: numbers that are not finite are written NaN, Infinity and -Infinity.

    JSON has no such numbers. Triton writes these words, and its clients and Python's own reader take them. ``null`` would tell
    infinity from nothing no more, and would pass for a missing number: a reader that knows the words not should fail instead.
    """
    values = json_of_data(tensor)
    if tensor.datatype in ("FP32", "FP64") and not all(map(math.isfinite, values)):
        return msgspec.Raw(json.dumps(values).encode())
    return values
