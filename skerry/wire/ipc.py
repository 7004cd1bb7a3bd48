"""Frames on the Unix socket between the gateway and a worker.

    frame := u32 header_bytes | u32 body_bytes | header (JSON Struct) | body (tensor bytes, in the header's order)

Both ends treat the other as hostile: lengths are bounded before anything is allocated, and a tensor's size must be
exactly what its shape and datatype ask for.
"""

import struct
from typing import TypeVar

import msgspec

from skerry.wire import codec, oip
from skerry.wire.messages import WarmupTensor

T = TypeVar("T")

PREFIX = struct.Struct("<II")
MAX_HEADER_BYTES = 1024 * 1024
MAX_BODY_BYTES = 1024 * 1024 * 1024


class TensorSpec(msgspec.Struct, frozen=True):
    """An input or output of a model; -1 stands for an extent that the caller chooses."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class Hello(msgspec.Struct, frozen=True):
    """The worker's first frame on each connection: what it serves."""

    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    provider: str = ""
    load_ms: float = 0.0
    warm: bool = False
    confinement: str = ""
    """What the worker took from itself before it served, for people."""


class Load(msgspec.Struct, frozen=True):
    """To a worker that waits, on its control socket: load the model that lies in the model directory now."""

    warmup: list[WarmupTensor] = []


class TensorHead(msgspec.Struct, frozen=True):
    """A tensor whose bytes follow in the body."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    size_bytes: int


class Call(msgspec.Struct, frozen=True):
    """One inference. ``outputs`` names those wanted, all where it is empty."""

    call: int
    inputs: list[TensorHead]
    outputs: list[str] = []


class Answer(msgspec.Struct, frozen=True):
    """The answer to ``call``. ``error`` is empty on success; ``refused`` tells a caller's mistake from a failure here."""

    call: int
    outputs: list[TensorHead] = []
    compute_us: int = 0
    error: str = ""
    refused: bool = False


def frame(header: msgspec.Struct, body: list[oip.Bytes]) -> list[oip.Bytes]:
    """A frame as buffers to be written one after the other, tensors uncopied."""
    head = codec.encode(header)
    return [PREFIX.pack(len(head), sum(len(part) for part in body)) + head, *body]


def parse_prefix(prefix: bytes) -> tuple[int, int]:
    """Header and body length of the frame that ``prefix`` begins; raises codec.Malformed over the limits."""
    header_bytes, body_bytes = PREFIX.unpack(prefix)
    if header_bytes > MAX_HEADER_BYTES or body_bytes > MAX_BODY_BYTES:
        raise codec.Malformed(f"frame: header of {header_bytes} and body of {body_bytes} bytes are over the limits")
    return header_bytes, body_bytes


def parse_header(header: oip.Bytes, kind: type[T]) -> T:
    """The Struct of a frame's header; raises codec.Malformed."""
    return codec.decode(header, kind, max_bytes=MAX_HEADER_BYTES)


def heads_of(tensors: list[oip.Tensor]) -> list[TensorHead]:
    """What a frame's header says of its tensors."""
    return [TensorHead(t.name, t.datatype, t.shape, len(t.data)) for t in tensors]


def tensors_of(heads: list[TensorHead], body: memoryview) -> list[oip.Tensor]:
    """The tensors in a frame's body; raises codec.Malformed unless heads and body agree to the byte."""
    tensors, offset = [], 0
    for head in heads:
        if head.datatype not in oip.ITEM_BYTES and head.datatype != "BYTES":
            raise codec.Malformed(f"tensor {head.name[:80]!r}: unknown datatype {head.datatype[:40]!r}")
        if not 0 <= head.size_bytes <= len(body) - offset:
            raise codec.Malformed(f"tensor {head.name[:80]!r}: {head.size_bytes} bytes announced, {len(body) - offset} are left")
        data = body[offset : offset + head.size_bytes]
        try:
            oip.check_size(data, head.datatype, oip.elements_of(head.shape, head.name[:80]), head.name[:80])
        except oip.BadRequest as exc:
            raise codec.Malformed(f"tensor {exc}") from exc
        tensors.append(oip.Tensor(head.name, head.datatype, head.shape, data))
        offset += head.size_bytes
    if offset != len(body):
        raise codec.Malformed(f"frame: {len(body) - offset} bytes after the last tensor")
    return tensors
