"""Bytes to Structs and back, once, at the edge."""

from typing import TypeVar

import msgspec

T = TypeVar("T")

MAX_MESSAGE_BYTES = 128 * 1024
"""Largest MQTT payload we send or accept; AWS IoT Core, a broker that fleets bridge to, has the same limit."""

NO_LIMIT_BYTES = 2**31
"""For what we wrote ourselves: defaults written out can make a message longer than it came."""

_encoder = msgspec.json.Encoder()


class Malformed(ValueError):
    """Bytes from outside that are not the message they should be; the text names the field."""


def encode(message: object) -> bytes:
    """JSON of a Struct: fields in the order of their definition, mappings in their own."""
    return _encoder.encode(message)


def decode(payload: bytes | bytearray | memoryview, kind: type[T], *, max_bytes: int = MAX_MESSAGE_BYTES) -> T:
    """The Struct that ``payload`` holds. Unknown fields are ignored; raises Malformed with the field's path."""
    label = getattr(kind, "__name__", str(kind))
    if len(payload) > max_bytes:
        raise Malformed(f"{label}: {len(payload)} bytes, at most {max_bytes} are accepted")
    try:
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise Malformed(f"{label}: {exc}") from exc
