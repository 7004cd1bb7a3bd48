"""What people type to find boxes: words, each of which narrows the list. Pure.

``store`` is part of a name; ``site=store-*`` a label and a pattern for it; ``state:lost``, ``version:0.2*``, ``tier:edge``,
``deployment:scale`` and ``model:detector:3`` (or ``model:detector`` in any version) say the rest.
"""

from typing import get_args

import msgspec

from skerry.wire.api import NodeState
from skerry.wire.messages import Tier

MOST_WORDS = 8
MOST_CHARS = 200
STATES: tuple[str, ...] = get_args(NodeState)
TIERS: tuple[str, ...] = get_args(Tier)
KINDS = ("state", "version", "tier", "deployment", "model")


class NotUnderstood(ValueError):
    """The text says which word."""


class Search(msgspec.Struct, frozen=True):
    """All of it must hold: parts of the name, labels by key with a pattern of ``*``, ``?`` and ``[...]``, and one of each of the rest,
    empty for any. ``deployment`` and ``model`` are what a box was told to run; the model's version may follow, as in ``detector:3``."""

    names: list[str] = []
    labels: dict[str, str] = {}
    state: str = ""
    version: str = ""
    tier: str = ""
    deployment: str = ""
    model: str = ""


def parse(text: str) -> Search:
    """Raises NotUnderstood."""
    if len(text) > MOST_CHARS or not text.isprintable():
        raise NotUnderstood(f"more than {MOST_CHARS} characters, or such as can't be printed")
    words = text.split()
    if len(words) > MOST_WORDS:
        raise NotUnderstood(f"more than {MOST_WORDS} words")
    names, labels, said = [], {}, {}
    for word in words:
        key, equals, pattern = word.partition("=")
        kind, colon, value = word.partition(":")
        if equals:
            if not key or not pattern or '"' in key:
                raise NotUnderstood(f"{word}: a label is KEY=PATTERN")
            labels[key] = pattern
        elif colon:
            said[kind] = _checked(kind, value, word)
        else:
            names.append(word)
    return Search(names, labels, **said)


def _checked(kind: str, value: str, word: str) -> str:
    known = {"state": STATES, "tier": TIERS}
    if kind not in KINDS:
        raise NotUnderstood(f"{word}: there is {', '.join(f'{one}:' for one in KINDS)}, and KEY=PATTERN for labels")
    if kind in known and value not in known[kind]:
        raise NotUnderstood(f"{word}: {kind} is one of {', '.join(known[kind])}")
    if not value:
        raise NotUnderstood(f"{word}: what {kind}?")
    if kind == "model" and ":" in value and not value.partition(":")[2].isdecimal():
        raise NotUnderstood(f"{word}: a model's version is a whole number")
    return value
