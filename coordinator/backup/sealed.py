"""A stream of bytes that only a passphrase opens, and of which no part can be changed, moved or cut off unnoticed.

Chunks of CHUNK_BYTES, each sealed with AES-256-GCM under a nonce of a random prefix, the chunk's number and whether it is the last: STREAM
of Hoang, Reyhanitabar, Rogaway and Vizár, "Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance" (2015). The key is made
of the passphrase by scrypt (RFC 7914).
"""

import os
from typing import BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

MAGIC = b"skerry backup 1\n"
CHUNK_BYTES = 1 << 20
TAG_BYTES = 16
SALT_BYTES, PREFIX_BYTES = 16, 7
COST, MOST_COST = 17, 20
"""scrypt's N is two to the power of it: 128 MiB of memory and a good part of a second for each guess, and what is accepted at the most."""
_HEADER_BYTES = len(MAGIC) + 1 + SALT_BYTES + PREFIX_BYTES
LEAST_PASSPHRASE = 12


class SealBroken(Exception):
    """Not to be opened, or not whole; the text says what."""


def _cipher(passphrase: bytes, header: bytes) -> AESGCM:
    cost, salt = header[len(MAGIC)], header[len(MAGIC) + 1 :][:SALT_BYTES]
    return AESGCM(Scrypt(salt=salt, length=32, n=1 << cost, r=8, p=1).derive(passphrase))


class Sealing:
    """Writes into ``file``; ``close`` seals the last chunk, without which nothing is whole."""

    def __init__(self, file: BinaryIO, passphrase: bytes, *, cost: int = COST) -> None:
        self._file = file
        self._prefix = os.urandom(PREFIX_BYTES)
        self._header = MAGIC + bytes([cost]) + os.urandom(SALT_BYTES) + self._prefix
        self._cipher = _cipher(passphrase, self._header)
        self._pending = bytearray()
        self._number = 0
        file.write(self._header)

    def write(self, data: bytes) -> int:
        """As of a file."""
        self._pending += data
        while len(self._pending) > CHUNK_BYTES:  # one chunk is kept back: it may be the last
            self._seal(bytes(self._pending[:CHUNK_BYTES]), is_last=False)
            del self._pending[:CHUNK_BYTES]
        return len(data)

    def close(self) -> None:
        """Seal what is left."""
        self._seal(bytes(self._pending), is_last=True)

    def _seal(self, chunk: bytes, *, is_last: bool) -> None:
        self._file.write(self._cipher.encrypt(_nonce(self._prefix, self._number, is_last=is_last), chunk, self._header))
        self._number += 1


class Opening:
    """Reads what Sealing wrote. Raises SealBroken, and gives nothing out that was not authenticated."""

    def __init__(self, file: BinaryIO, passphrase: bytes) -> None:
        self._file = file
        self._header = file.read(_HEADER_BYTES)
        if not self._header.startswith(MAGIC) or len(self._header) < _HEADER_BYTES or not 1 <= self._header[len(MAGIC)] <= MOST_COST:
            raise SealBroken("it is no backup of a coordinator")
        self._cipher = _cipher(passphrase, self._header)
        self._prefix = self._header[-PREFIX_BYTES:]
        self._ahead = file.read(CHUNK_BYTES + TAG_BYTES)
        self._open = b""
        self._number = 0
        self._is_over = False

    def read(self, size: int = -1) -> bytes:
        """As of a file."""
        parts, wanted = [], size if size >= 0 else 1 << 62
        while wanted > 0 and (self._open or not self._is_over):
            if not self._open:
                self._next()
                continue
            part, self._open = self._open[:wanted], self._open[wanted:]
            parts.append(part)
            wanted -= len(part)
        return b"".join(parts)

    def _next(self) -> None:
        chunk, self._ahead = self._ahead, self._file.read(CHUNK_BYTES + TAG_BYTES)
        self._is_over = not self._ahead
        try:
            self._open = self._cipher.decrypt(_nonce(self._prefix, self._number, is_last=self._is_over), chunk, self._header)
        except InvalidTag as exc:
            what = "the passphrase is another one, or it is damaged" if self._number == 0 else "it is damaged, or its end is missing"
            raise SealBroken(what) from exc
        self._number += 1


def _nonce(prefix: bytes, number: int, *, is_last: bool) -> bytes:
    return prefix + number.to_bytes(4, "big") + (b"\x01" if is_last else b"\x00")
