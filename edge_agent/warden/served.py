"""What answered last of each replica: it runs again where its successor can't, whatever befell the box meanwhile."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from edge_agent.core import diff
from skerry.runtime import durable, log
from skerry.wire import codec, model_signature
from skerry.wire.bundle import Bundle
from skerry.wire.messages import Desired, ReplicaSpec

logger = log.get("warden.served")

MOST_BYTES = 1 << 20
PROVEN_AFTER_S = 60.0


class _Served(msgspec.Struct, frozen=True):
    """``signature`` is what vouches for its model, where anything does."""

    spec: ReplicaSpec
    signature: Bundle | None = None


class Served:
    """``state_dir/served.json``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held = durable.read(path, dict[str, _Served], max_bytes=MOST_BYTES) or {}

    @property
    def specs(self) -> Mapping[str, ReplicaSpec]:
        """By replica."""
        return {name: one.spec for name, one in self._held.items()}

    def as_document(self, desired: Desired) -> Desired:
        """The same as a document, for whoever judges those."""
        signatures = {_key(one.spec): one.signature for one in self._held.values() if one.signature is not None}
        return msgspec.structs.replace(desired, replicas=list(self.specs.values()), signatures=signatures)

    def note(self, ready_s: Iterable[tuple[ReplicaSpec, float]], desired: Desired) -> None:
        """These have answered for so long as they are wanted; of what is not wanted any more nothing is remembered.

        One that has just begun to answer does not take the place of another: it may yet turn out to be no good.
        """
        wanted = {spec.name for spec in desired.replicas}
        held = {name: one for name, one in self._held.items() if name in wanted}
        for spec, for_s in ready_s:
            before = held.get(spec.name)
            if before is None or (for_s >= PROVEN_AFTER_S and not diff.runs_alike(before.spec, spec)):
                held[spec.name] = _Served(spec, desired.signatures.get(_key(spec)))
        if held == self._held:
            return
        self._held = held
        try:
            durable.write(self._path, codec.encode(held))
        except OSError as exc:
            logger.error("served.not_noted", reason=exc.strerror)


def _key(spec: ReplicaSpec) -> str:
    return model_signature.key_of(spec.model.name, spec.model.version)
