"""Room for models: when each was last deployed here, which are kept, and which go when the disk is short."""

import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

from edge_agent.core.eviction import Held, Room, evictions, remembered
from edge_agent.warden.store import Store
from skerry.runtime import durable, log
from skerry.wire import codec
from skerry.wire.messages import Desired

logger = log.get("warden.shelf")

MOST_BYTES = 1 << 20


class _Uses(msgspec.Struct, frozen=True):
    """By digest, when it was last deployed; by deployment, the versions that are kept of it."""

    used_at_ms: dict[str, int] = {}
    history: dict[str, list[str]] = {}


class Shelf:
    """``state_dir/models.json``. ``now_ms`` is the time that was proved: it never goes back."""

    def __init__(self, path: Path, store: Store, *, now_ms: Callable[[], int], reserve_bytes: int, most_bytes: int) -> None:
        self._path = path
        self._store = store
        self._now_ms = now_ms
        self._reserve_bytes = reserve_bytes
        self._most_bytes = most_bytes
        self._uses = durable.read(path, _Uses, max_bytes=MOST_BYTES) or _Uses()
        self._tended_at = 0.0

    def note(self, desired: Desired) -> None:
        """What is deployed now."""
        now_ms, deployed = self._now_ms(), [(spec.deployment, spec.model.sha256) for spec in desired.replicas]
        history = remembered(self._uses.history, deployed)
        used = self._uses.used_at_ms | dict.fromkeys([digest for _, digest in deployed], now_ms)
        here = self._store.models() | {digest for _, digest in deployed}
        uses = _Uses({digest: at_ms for digest, at_ms in used.items() if digest in here}, history)
        if uses.history == self._uses.history and uses.used_at_ms.keys() == self._uses.used_at_ms.keys():
            return
        self._uses = uses
        try:
            durable.write(self._path, codec.encode(uses))
        except OSError as exc:
            logger.error("models.not_noted", reason=exc.strerror)

    def tend(self, in_use: Collection[str], coming_bytes: int) -> list[Held]:
        """Remove what must go so that ``coming_bytes`` find room; says what went. Called in a thread."""
        self._tended_at = time.monotonic()
        self._store.hold_reserve()
        kept = {*in_use, *(digest for digests in self._uses.history.values() for digest in digests)}
        held = [Held(digest, size, self._uses.used_at_ms.get(digest, 0)) for digest, size in self._store.sizes().items()]
        room = Room(shutil.disk_usage(self._path.parent).free, self._reserve_bytes, self._most_bytes)
        gone = evictions(held, kept=kept, coming_bytes=coming_bytes, room=room)
        for model in gone:
            self._store.remove(model.sha256)
        return gone

    def is_due(self, every_s: float) -> bool:
        """Whether nobody looked for so long."""
        return time.monotonic() - self._tended_at >= every_s
