"""Frames on the Unix socket between the gateway and a worker, and the memory that both map.

    frame := u32 header_bytes | u32 body_bytes | header (JSON Struct) | body (bytes of the tensors that lie nowhere else, in order)

    worker  -> Hello
    gateway -> Attach, with a sealed memory file as ancillary data, where the worker said that it shares memory
    gateway -> Batch     worker -> Answers     (over and over; answers come in the order of the batches)

A tensor's bytes follow in the body, or lie in the shared memory ``at`` an offset. Both ends treat the other as hostile: lengths are
bounded before anything is allocated, offsets are checked against the size of the memory, which is sealed so that it can't shrink, and a
tensor's size must be exactly what its shape and datatype ask for. What lies in shared memory can change while it is read: whoever
must rely on what it checked copies first.
"""

import struct
from typing import TypeVar

import msgspec

from skerry.wire import codec, oip
from skerry.wire.messages import StateTensor, WarmupTensor

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
    shares_memory: bool = False
    batches: bool = False
    """Whether calls that come together are run together, along the first axis of every input and output."""
    state: list[StateTensor] = []
    """What it keeps between the calls of a sequence."""


class Attach(msgspec.Struct, frozen=True):
    """With a descriptor of the memory that gateway and worker share on this connection."""

    size_bytes: int


class Load(msgspec.Struct, frozen=True):
    """To a worker that waits, on its control socket: load the model that lies in the model directory now."""

    warmup: list[WarmupTensor] = []
    state: list[StateTensor] = []


class TensorHead(msgspec.Struct, frozen=True, omit_defaults=True):
    """A tensor whose bytes lie in the shared memory from ``at`` on, or follow in the body where that is negative."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    size_bytes: int
    at: int = -1


class Room(msgspec.Struct, frozen=True):
    """A part of the shared memory that outputs may be put into; what does not fit goes into the body."""

    at: int
    size_bytes: int


class Call(msgspec.Struct, frozen=True, omit_defaults=True):
    """One inference. ``outputs`` names those wanted, all where it is empty.

    A step of a ``sequence`` that is not done ``within_us`` microseconds of its coming has come to nothing: whoever asked no longer waits,
    and the sequence is at an end. 0: it may take as long as it takes.
    """

    call: int
    inputs: list[TensorHead]
    outputs: list[str] = []
    room: Room | None = None
    sequence: oip.SequenceStep | None = None
    within_us: int = 0


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer to ``call``. ``error`` is empty on success; ``refused`` tells a caller's mistake from a failure here.

    ``compute_us`` is what the run took that it shared with ``batch`` calls, itself included; ``no_sequence`` says that the call is of a
    sequence of which this worker knows nothing, so that nothing was run.
    """

    call: int
    outputs: list[TensorHead] = []
    compute_us: int = 0
    error: str = ""
    refused: bool = False
    batch: int = 1
    no_sequence: bool = False


class Batch(msgspec.Struct, frozen=True, omit_defaults=True):
    """Calls to be run together where the worker can, one after the other where not. The gateway puts together what fits together.

    ``forget`` names earlier calls of this connection whose answers came to nothing: a sequence that stands where such a step left it is at
    an end, before any of ``calls`` is run. One that was begun or went on since, by whomever, is another.
    """

    calls: list[Call]
    forget: list[int] = []


class Answers(msgspec.Struct, frozen=True):
    """The answers to one batch, in its order."""

    answers: list[Answer]


def frame(header: msgspec.Struct, body: list[oip.Bytes]) -> list[oip.Bytes]:
    """A frame as buffers to be written one after the other, tensors uncopied."""
    head = codec.encode(header)
    return [PREFIX.pack(len(head), sum(len(part) for part in body)) + head, *body]


def parse_prefix(prefix: bytes | memoryview) -> tuple[int, int]:
    """Header and body length of the frame that ``prefix`` begins; raises codec.Malformed over the limits."""
    header_bytes, body_bytes = PREFIX.unpack(prefix)
    if header_bytes > MAX_HEADER_BYTES or body_bytes > MAX_BODY_BYTES:
        raise codec.Malformed(f"frame: header of {header_bytes} and body of {body_bytes} bytes are over the limits")
    return header_bytes, body_bytes


def parse_header(header: oip.Bytes, kind: type[T]) -> T:
    """The Struct of a frame's header; raises codec.Malformed."""
    return codec.decode(header, kind, max_bytes=MAX_HEADER_BYTES)


def heads_of(tensors: list[oip.Tensor]) -> list[TensorHead]:
    """What a frame's header says of tensors whose bytes follow in its body."""
    return [TensorHead(t.name, t.datatype, t.shape, len(t.data)) for t in tensors]


def tensors_of(heads: list[TensorHead], body: memoryview, offset: int, memory: memoryview | None) -> tuple[list[oip.Tensor], int]:
    """The tensors of one call or answer, those in the body from ``offset`` on, and the offset after the last.

    Nothing is copied. Raises codec.Malformed unless each has exactly the bytes that its shape and datatype ask for, within body or memory.
    """
    tensors = []
    for head in heads:
        size = head.size_bytes
        if head.datatype not in oip.ITEM_BYTES and head.datatype != "BYTES":
            raise codec.Malformed(f"tensor {head.name[:80]!r}: unknown datatype {head.datatype[:40]!r}")
        if head.at >= 0:
            if memory is None or not 0 <= size <= len(memory) - head.at:
                raise codec.Malformed(f"tensor {head.name[:80]!r}: {size} bytes at {head.at} are not within the shared memory")
            data = memory[head.at : head.at + size]
            if head.datatype == "BYTES":
                data = memoryview(bytes(data))  # its lengths are checked below and relied on later
        else:
            if not 0 <= size <= len(body) - offset:
                raise codec.Malformed(f"tensor {head.name[:80]!r}: {size} bytes announced, {len(body) - offset} are left")
            data = body[offset : offset + size]
            offset += size
        try:
            oip.check_size(data, head.datatype, oip.elements_of(head.shape, head.name[:80]), head.name[:80])
        except oip.BadRequest as exc:
            raise codec.Malformed(f"tensor {exc}") from exc
        tensors.append(oip.Tensor(head.name, head.datatype, head.shape, data))
    return tensors, offset


def check_end(body: memoryview, offset: int) -> None:
    """Raises codec.Malformed where a frame's body goes on after its last tensor."""
    if offset != len(body):
        raise codec.Malformed(f"frame: {len(body) - offset} bytes after the last tensor")
