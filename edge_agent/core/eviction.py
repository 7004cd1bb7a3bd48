"""Which models a box gives up for room: those that were not used for longest, and never one that is deployed or that it may have to go back
to. Pure."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

KEPT_OF_EACH = 2
"""Versions of a deployment that are kept while it is deployed: the present one, and the one before, to go back to."""


class Held(msgspec.Struct, frozen=True):
    """A model on disk, and when it was last deployed here (Unix milliseconds, as proved)."""

    sha256: str
    size_bytes: int
    used_at_ms: int


class Room(msgspec.Struct, frozen=True):
    """What there is: free on the disk, of which a reserve is kept; models may take ``most_bytes`` in all, 0 for as much as there is."""

    free_bytes: int
    reserve_bytes: int
    most_bytes: int = 0


def evictions(held: Sequence[Held], *, kept: Collection[str], coming_bytes: int, room: Room) -> list[Held]:
    """What goes, in that order, so that ``coming_bytes`` of further models find room; less than enough where the rest is kept."""
    total, free, gone = sum(model.size_bytes for model in held), room.free_bytes, []
    for model in sorted((model for model in held if model.sha256 not in kept), key=lambda model: (model.used_at_ms, model.sha256)):
        is_over = room.most_bytes and total + coming_bytes > room.most_bytes
        if not is_over and free - coming_bytes >= room.reserve_bytes:
            break
        gone.append(model)
        total, free = total - model.size_bytes, free + model.size_bytes
    return gone


def remembered(history: Mapping[str, Sequence[str]], deployed: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """By deployment, the versions that are kept of it, the present ones first, after ``deployed`` (deployment, digest) came. What is no
    longer deployed is forgotten: it may go."""
    present: dict[str, list[str]] = {}
    for name, digest in deployed:
        if digest not in present.setdefault(name, []):
            present[name].append(digest)
    return {
        name: [*digests, *(old for old in history.get(name, ()) if old not in digests)][: max(KEPT_OF_EACH, len(digests))]
        for name, digests in present.items()
    }
