"""What a sandbox wrote, made fit to be passed on: bounded, and harmless on a terminal. Pure.

Everybody on the way does it again, since nobody believes the one before: the warden, the agent and the coordinator.
"""

import re

import msgspec

from skerry.wire import codec
from skerry.wire.messages import LogsReply

MAX_LINES = 2000
"""Most lines of one answer; LogsRequest asks for no more."""
MAX_LINE_BYTES = 4096
MAX_REPLY_BYTES = 96 * 1024
"""Most bytes of an answer's lines as JSON: with the rest of the message it stays below codec.MAX_MESSAGE_BYTES."""
MAX_POSITION = 256
"""Most characters of a position, which is the driver's own and means nothing to anybody else."""
MAX_ERROR = 500
MAX_REPLICA = 200
"""Most characters of a replica's name that are worth looking for."""

UNKNOWN_REPLICA = "unknown replica"
"""The ``error`` of a box that has no such replica."""
BUSY = "busy"
"""The ``error`` of a box that is reading as many logs as it may at a time."""

_MARK_BYTES = 64
_CUT = "…"
_ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
"""Colours and cursor movements of a terminal (ECMA-48's control sequences)."""


def harmless(line: str) -> str:
    """A line that can be printed: no control character, no escape sequence, no lone surrogate, at most MAX_LINE_BYTES."""
    is_cut = len(line) > MAX_LINE_BYTES
    plain = _ESCAPE.sub("", line[:MAX_LINE_BYTES]).rstrip()
    if not plain.isprintable():
        plain = "".join(c if c.isprintable() or c == "\t" else " " if c.isspace() else "\ufffd" for c in plain)
    encoded = plain.encode()
    if is_cut or len(encoded) > MAX_LINE_BYTES:
        plain = encoded[: MAX_LINE_BYTES - len(_CUT.encode())].decode(errors="ignore") + _CUT
    return plain


def fitting(reply: LogsReply) -> LogsReply:
    """The reply within all bounds. Where it is too long the newest lines stay, and a first line says how many are missing."""
    kept: list[str] = []
    used = 0
    for line in reversed(reply.lines):  # what does not fit is not looked at
        plain = harmless(line)
        size = _size_of(plain)
        if used + size > MAX_REPLY_BYTES or len(kept) == MAX_LINES:
            break
        used += size
        kept.append(plain)
    if len(kept) < len(reply.lines):
        while used > MAX_REPLY_BYTES - _MARK_BYTES or len(kept) == MAX_LINES:
            used -= _size_of(kept.pop())
        kept.append(f"[{len(reply.lines) - len(kept)} earlier lines left out]")
    position = reply.position if len(reply.position) <= MAX_POSITION and reply.position.isprintable() else ""
    return msgspec.structs.replace(reply, lines=kept[::-1], position=position, error=harmless(reply.error[:MAX_ERROR]))


def _size_of(line: str) -> int:
    """Bytes in the message, with the comma."""
    return len(codec.encode(line)) + 1
