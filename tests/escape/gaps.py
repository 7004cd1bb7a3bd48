"""What is known not to be held. The tests assert that each is still open, so that this list stays true in both directions."""

from typing import NamedTuple


class Gap(NamedTuple):
    """``when`` narrows it to machines of that condition (``Climb.conditions``); empty: everywhere."""

    attempt: str
    rung: str
    reason: str
    when: str = ""


_OWN_KERNEL = (
    "gVisor's kernel grants it: what it makes is its own, the host's kernel takes no part. A filter of system calls would refuse it."
)
_ONE_BY_ONE = "without control groups an address space is all that is bounded, with 2 GiB of slack, and that for each process"

GAPS: list[Gap] = [
    *(Gap(name, "gvisor", _OWN_KERNEL, "unfiltered") for name in ("unshare-user", "unshare-mount", "clone-user", "clone-all-namespaces")),
    *(Gap(name, "gvisor", _OWN_KERNEL, "unfiltered") for name in ("io-uring", "raise-its-priority")),
    Gap(
        "escape-the-memory-killer",
        "gvisor",
        "gVisor's kernel keeps that number for itself; the host's killer sees its own, which is the engine's",
    ),
    *(Gap(name, "process", _ONE_BY_ONE, "rlimits") for name in ("memory-bomb", "memory-bomb-of-many", "memory-files")),
    Gap("processor-hog", "process", "without control groups nothing but niceness holds processor time", "rlimits"),
]

NOT_YET = {
    "paths-in-a-model-archive": (
        "Packs links and paths with `..` into a model archive.",
        "not applicable yet: a model is one file",
    ),
}
"""Attempts that have nothing to aim at in this version."""


def gap_of(attempt: str, rung: str, conditions: frozenset[str]) -> Gap | None:
    """The entry for an attempt on a rung, on a machine with these conditions."""
    return next((gap for gap in GAPS if (gap.attempt, gap.rung) == (attempt, rung) and (not gap.when or gap.when in conditions)), None)
