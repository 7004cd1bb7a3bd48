"""Whose documents this box obeys: from its enrolment on, and as signed documents change it."""

from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from skerry.runtime import durable
from skerry.wire import codec, signing


class Trust(msgspec.Struct, frozen=True):
    """``anchor`` and ``since_ms`` are what root put into the file of trusted keys; ``granted`` and ``retired`` (ids) are what documents
    said since."""

    anchor: list[str]
    since_ms: int = 0
    granted: list[str] = []
    retired: list[str] = []

    @property
    def keys(self) -> list[Ed25519PublicKey]:
        """Those that are obeyed."""
        keys = [signing.public_key(line) for line in dict.fromkeys([*self.anchor, *self.granted])]
        return [key for key in keys if signing.key_id_of(key) not in self.retired]

    def following(self, keys: list[Ed25519PublicKey], retired: list[str]) -> "Trust":
        """After a document that was found good under ``keys``."""
        gone = list(dict.fromkeys([*self.retired, *retired]))
        granted = [signing.public_key_line(key) for key in keys if signing.key_id_of(key) not in gone]
        return msgspec.structs.replace(
            self,
            granted=[line for line in granted if line not in self.anchor],
            retired=gone,
        )


class TrustFile:
    """``state_dir/trust.json``."""

    def __init__(self, path: Path, anchor: list[Ed25519PublicKey], since_ms: int) -> None:
        self._path = path
        lines = [signing.public_key_line(key) for key in anchor]
        held = durable.read(path, Trust)
        if held is None or (held.anchor, held.since_ms) != (lines, since_ms):  # root has spoken anew
            held = Trust(lines, since_ms)
        self._trust = held

    @property
    def trust(self) -> Trust:
        """As it stands."""
        return self._trust

    def keep(self, trust: Trust) -> None:
        """Raises OSError."""
        durable.write(self._path, codec.encode(trust))
        self._trust = trust
