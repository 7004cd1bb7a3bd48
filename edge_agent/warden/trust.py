"""Whose documents this box obeys, and what it knows of the time: from its enrolment on, and as signed documents change it.

Serving depends on no clock. What is judged by time is judged by the latest moment that something signed has proved, and by how long ago
that was on a clock that only runs forward: a wall clock in 1970, or two years ahead, changes nothing.
"""

import time
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from skerry.runtime import durable, log
from skerry.wire import codec, signing

logger = log.get("warden.trust")

MOST_BYTES = 64 * 1024


class Trust(msgspec.Struct, frozen=True):
    """``anchor`` and ``since_ms`` are what root put into the file of trusted keys; ``granted`` and ``retired`` (ids) are what documents
    said since; ``proved_ms`` is a moment that has passed."""

    anchor: list[str]
    since_ms: int = 0
    granted: list[str] = []
    retired: list[str] = []
    proved_ms: int = 0

    @property
    def keys(self) -> list[Ed25519PublicKey]:
        """Those that are obeyed."""
        keys = [signing.public_key(line) for line in dict.fromkeys([*self.anchor, *self.granted])]
        return [key for key in keys if signing.key_id_of(key) not in self.retired]

    def following(self, keys: list[Ed25519PublicKey], retired: list[str], issued_at_ms: int) -> "Trust":
        """After a document that was found good under ``keys``."""
        gone = list(dict.fromkeys([*self.retired, *retired]))
        granted = [signing.public_key_line(key) for key in keys if signing.key_id_of(key) not in gone]
        return msgspec.structs.replace(
            self,
            granted=[line for line in granted if line not in self.anchor],
            retired=gone,
            proved_ms=max(self.proved_ms, issued_at_ms),
        )


class TrustFile:
    """``state_dir/trust.json``, and a clock that starts from what it proves."""

    def __init__(self, path: Path, anchor: list[Ed25519PublicKey], since_ms: int) -> None:
        self._path = path
        lines = [signing.public_key_line(key) for key in anchor]
        held = self._read()
        if held is None or (held.anchor, held.since_ms) != (lines, since_ms):  # root has spoken anew
            held = Trust(lines, since_ms, proved_ms=max(since_ms, held.proved_ms if held else 0))
        self._trust = held
        self._proved_at_s = _forward_s()

    def _read(self) -> Trust | None:
        try:
            return codec.decode(self._path.read_bytes(), Trust, max_bytes=MOST_BYTES)
        except FileNotFoundError:
            return None
        except (OSError, codec.Malformed) as exc:
            logger.error("trust.unreadable", reason=str(exc))
            return None

    @property
    def trust(self) -> Trust:
        """As it stands."""
        return self._trust

    @property
    def now_at_least_ms(self) -> int:
        """A moment that has passed for sure, Unix milliseconds."""
        return self._trust.proved_ms + int((_forward_s() - self._proved_at_s) * 1000)

    def keep(self, trust: Trust) -> None:
        """Raises OSError. The time that has passed meanwhile is kept with it."""
        now_ms = self.now_at_least_ms
        self._trust = msgspec.structs.replace(trust, proved_ms=max(trust.proved_ms, now_ms))
        self._proved_at_s = _forward_s()
        durable.write(self._path, codec.encode(self._trust))


def _forward_s() -> float:
    """Seconds that a machine asleep counts too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
