"""What is known not to be held. The tests assert that each is still open, so that this list stays true in both directions."""

from typing import NamedTuple


class Gap(NamedTuple):
    """``limits`` narrows it to machines where the driver holds resources by that alone; empty: everywhere."""

    attempt: str
    rung: str
    reason: str
    limits: str = ""


GAPS: list[Gap] = []

NOT_YET = {
    "shared-memory-truncated": (
        "Shortens shared memory while the gateway reads a tensor in it, so that the gateway dies of SIGBUS.",
        "not applicable yet: tensors travel inline",
    ),
    "shared-memory-changed": (
        "Changes a tensor in shared memory after the gateway has checked it.",
        "not applicable yet: tensors travel inline",
    ),
    "paths-in-a-model-archive": (
        "Packs links and paths with `..` into a model archive.",
        "not applicable yet: a model is one file",
    ),
}
"""Attempts that have nothing to aim at in this version."""


def gap_of(attempt: str, rung: str, limits: str) -> Gap | None:
    """The entry for an attempt on a rung, on a machine whose driver has ``limits``."""
    return next((gap for gap in GAPS if (gap.attempt, gap.rung) == (attempt, rung) and gap.limits in ("", limits)), None)
